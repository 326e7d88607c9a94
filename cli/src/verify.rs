//! `ashore verify`: reads every byte, reports all damage, and locates it.

use crate::damage::{self, FlipRow, Found};
use crate::sharers::{self, numbered};
use crate::which::{Meant, Which, step_of};
use crate::words::counted;
use crate::{Common, DAMAGED, out, size, words};
use ashore::{Again, Checkpoint, Error, ErrorKind, Result};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// How many damaged ranges of a step are shown; `--json` has all of them.
const SHOWN: usize = 8;

/// The flags of `verify`.
#[derive(clap::Args)]
pub struct Args {
    /// A step of --dir, the path of a checkpoint, a directory of checkpoints (verifies all), or a directory
    /// and a step
    #[arg(value_name = "STEP|PATH", num_args = 0..=2)]
    what: Vec<String>,
}

/// The result; `damage` lists the damage of all checkpoints.
#[derive(Default, Serialize)]
struct Findings {
    valid: bool,
    checkpoints: Vec<Verified>,
    damage: Vec<Place>,
    /// True when a checkpoint could not be examined, for a reason that says nothing about its bytes.
    #[serde(skip)]
    failed: bool,
    /// True when the user asked for several checkpoints.
    #[serde(skip)]
    several: bool,
}

#[derive(Serialize)]
struct Verified {
    step: Option<u64>,
    #[serde(serialize_with = "out::path")]
    path: PathBuf,
    /// The length of the files that were read, including manifest and tables.
    bytes: u64,
    valid: bool,
    /// True when every damage is one flipped bit or byte, so that `repair` can undo it.
    repairable: bool,
}

#[derive(Serialize)]
struct Place {
    step: Option<u64>,
    #[serde(serialize_with = "out::path")]
    path: PathBuf,
    file: Option<String>,
    tensor: Option<String>,
    /// The first byte, and the byte after the last.
    range: Option<(u64, u64)>,
    what: String,
    /// Other steps that share this file under a name of their own, and so its damage.
    shared_with: Vec<u64>,
    /// The result of a second reading: `same`, `as_written`, `different` or `not_read`.
    again: Option<Again>,
    /// The one flip that explains both digests.
    flip: Option<FlipRow>,
    /// The pages of 4096 bytes in the range, and how many were read as zeros.
    pages: Option<u64>,
    zero_pages: Option<u64>,
    /// The place and the damage, for people.
    #[serde(skip)]
    said: String,
}

/// Verifies. A checkpoint that cannot be opened because of its files' contents is damaged. A missing one is
/// an error, unless it disappeared after it was listed.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let mut findings = Findings::default();
    match Which::find(Which::of(&args.what)?.as_ref(), common) {
        Ok(Meant::One(checkpoint)) => findings.read(&checkpoint)?,
        Ok(Meant::Directory(root)) => findings.look_at_all(common, &root)?,
        Err(error) if error.kind() == ErrorKind::Corrupt => findings.unreadable(&error),
        Err(error) => return Err(error),
    }
    findings.look_for_sharers();
    findings.checkpoints.sort_by(|a, b| (a.step, &a.path).cmp(&(b.step, &b.path)));
    findings.valid = findings.damage.is_empty();
    if common.json {
        out::json(&findings)?
    } else {
        out::print(&findings.shown())?
    }
    Ok(match (findings.valid, findings.failed) {
        (false, _) => ExitCode::from(DAMAGED),
        (true, true) => ExitCode::FAILURE,
        (true, false) => ExitCode::SUCCESS,
    })
}

impl Findings {
    fn look_at_all(&mut self, common: &Common, root: &Path) -> Result<()> {
        let (entries, problems) = common.catalog(root)?.survey()?;
        if entries.is_empty() && problems.is_empty() {
            return Err(Error::new(ErrorKind::NotFound, "nothing to verify").with_path(root));
        }
        self.several = true;
        for problem in problems {
            let is_conflict = problem.error.kind() == ErrorKind::Conflict;
            let found = self.look(problem.step, &problem.path)?;
            if is_conflict && found {
                let what = problem.error.message().to_owned();
                self.damage.push(Place::whole(Some(problem.step), problem.path, None, what));
            }
        }
        for entry in entries {
            self.look(entry.step, &entry.path)?;
        }
        Ok(())
    }

    /// Examines a listed checkpoint. Returns false if it has disappeared since, for example because it was
    /// pruned.
    fn look(&mut self, step: u64, path: &Path) -> Result<bool> {
        match Checkpoint::open(path) {
            Ok(checkpoint) => self.read(&checkpoint)?,
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                let at = error.path().unwrap_or(path).to_owned();
                self.unreadable(&error.with_step(step).with_path(at));
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                out::complain(&format!("step {step} was deleted while others were read"));
                return Ok(false);
            }
            Err(error) => {
                out::complain(&words::of(&error));
                self.failed = true;
            }
        }
        Ok(true)
    }

    fn read(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let bar = out::progress(checkpoint.bytes());
        bar.set_message(format!("bytes of step {}", checkpoint.step()));
        let report = checkpoint.verify_with(|done, _| bar.set_position(done))?;
        bar.finish_and_clear();
        let (step, path, valid) = (Some(checkpoint.step()), checkpoint.path().to_owned(), report.is_sound());
        let found = damage::located(checkpoint, report.damage);
        let repairable = !found.is_empty() && found.iter().all(Found::is_certain);
        self.checkpoints.push(Verified { step, path: path.clone(), bytes: checkpoint.bytes(), valid, repairable });
        self.damage.extend(found.into_iter().map(|found| Place::of(step, &path, found)));
        let misleading = damage::located(checkpoint, report.misleading).into_iter();
        self.damage.extend(misleading.map(|found| Place::of(step, &path, found)));
        Ok(())
    }

    /// Finds the steps that share a damaged file.
    fn look_for_sharers(&mut self) {
        let mut known = BTreeMap::<(PathBuf, String), Vec<u64>>::new();
        for place in &mut self.damage {
            let Some(file) = &place.file else { continue };
            let key = (place.path.clone(), file.clone());
            let steps = known.entry(key).or_insert_with(|| {
                let mut steps: Vec<_> =
                    sharers::of(&place.path, file).unwrap_or_default().iter().map(|sharing| sharing.step).collect();
                steps.dedup();
                steps
            });
            place.shared_with.clone_from(steps);
        }
    }

    /// Records damage that hides all other damage: an invalid manifest, or a file that is missing or too
    /// short.
    fn unreadable(&mut self, error: &Error) {
        let given = error.path().unwrap_or(Path::new(""));
        let is_file = !given.is_dir();
        let dir = if is_file { given.parent().unwrap_or(given) } else { given };
        let file = given.file_name().filter(|_| is_file).map(|name| name.to_string_lossy().into_owned());
        let (step, valid, flip) = (error.step().or_else(|| step_of(dir)), false, damage::of_manifest(given));
        self.checkpoints.push(Verified { step, path: dir.into(), bytes: 0, valid, repairable: flip.is_some() });
        let mut place = Place::whole(step, dir.into(), file, error.message().to_owned());
        if let (Some(flip), Some(file)) = (flip, &place.file) {
            place.said = damage::of_flip(file, flip);
            place.flip = Some(FlipRow::plain(flip));
        }
        self.damage.push(place);
    }

    fn shown(&self) -> String {
        let mut text = String::new();
        for seen in &self.checkpoints {
            let step = seen.step.map_or_else(|| "?".to_owned(), |step| step.to_string());
            if seen.valid {
                text += &format!("step {step}: sound, {} read\n", size::shown(seen.bytes));
                continue;
            }
            let head = format!("step {step}: ");
            let places: Vec<&Place> = self.damage.iter().filter(|place| place.path == seen.path).collect();
            for (i, place) in places.iter().take(SHOWN).enumerate() {
                text += &if i == 0 {
                    out::wrapped(&head, &format!("DAMAGED. {}", place.said))
                } else {
                    out::wrapped(&" ".repeat(head.len()), &place.said)
                };
            }
            let indent = " ".repeat(head.len());
            if let Some(more) = places.len().checked_sub(SHOWN).filter(|more| *more > 0) {
                let what = format!("... and {} more; --json shows all", counted(more, "damaged range"));
                text += &out::wrapped(&indent, &what);
            }
            let shared: BTreeMap<_, _> =
                places.iter().filter_map(|p| Some((p.file.as_ref()?, &p.shared_with))).collect();
            for (file, steps) in shared.into_iter().filter(|(_, steps)| !steps.is_empty()) {
                let (of, have) = (numbered(steps), if steps.len() == 1 { "has" } else { "have" });
                let what = format!("{} is shared with {of}, which {have} the same damage.", out::printable(file));
                text += &out::wrapped(&indent, &what);
            }
            if seen.repairable {
                text += &out::wrapped(&indent, &format!("To repair: ashore repair {}", shown_path(&seen.path)));
            }
        }
        let damaged = self.checkpoints.iter().filter(|seen| !seen.valid).count();
        if self.several || damaged > 0 {
            let verb = if damaged == 1 { "is" } else { "are" };
            text += &match damaged {
                0 => format!("no damage in {}", counted(self.checkpoints.len(), "step")),
                _ => format!("{damaged} of {} {verb} damaged", counted(self.checkpoints.len(), "step")),
            };
            if self.several {
                let sound = self.checkpoints.iter().rfind(|seen| seen.valid).and_then(|seen| seen.step);
                text += &sound.map_or("; none is sound".to_owned(), |step| format!("; newest sound: step {step}"));
            }
            text += "\n";
        }
        text
    }
}

impl Place {
    fn whole(step: Option<u64>, path: PathBuf, file: Option<String>, what: String) -> Self {
        let shown = file.as_ref().map_or_else(String::new, |file| format!("{}: ", out::printable(file)));
        let said = shown + &words::message(&what);
        let (tensor, range, again, flip, pages, zero_pages) = (None, None, None, None, None, None);
        let shared_with = Vec::new();
        Self { step, path, file, tensor, range, what, shared_with, again, flip, pages, zero_pages, said }
    }

    fn of(step: Option<u64>, path: &Path, found: Found) -> Self {
        let said = format!("{}: {}", found.place(), found.reason());
        let flip = found.flip();
        let located = found.located.as_ref().filter(|located| located.again != Again::NotRead);
        let (pages, zeros) = (located.map(|located| located.pages), located.map(|located| located.zero_pages));
        let again = located.map(|located| located.again);
        let ashore::Damage { file, range, tensor, what, .. } = found.damage;
        Self {
            step,
            path: path.to_owned(),
            file: Some(file),
            tensor,
            range: (!range.is_empty()).then_some((range.start, range.end)),
            what,
            shared_with: Vec::new(),
            again,
            flip,
            pages,
            zero_pages: zeros,
            said,
        }
    }
}

/// Shows a path as an argument of a command.
pub fn shown_path(path: &Path) -> String {
    let here = std::env::current_dir().ok();
    let short =
        here.as_ref().and_then(|here| path.strip_prefix(here).ok()).filter(|short| !short.as_os_str().is_empty());
    let text = out::printable(&short.unwrap_or(path).display().to_string());
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b"/._-+,:@%".contains(&b));
    if plain { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `verify` used to fail when `prune` removed a step while `verify` read others.
    #[test]
    fn a_step_that_went_away_is_neither_damage_nor_a_failure() {
        let root = tempfile::tempdir().unwrap();
        let mut findings = Findings::default();
        assert!(!findings.look(5, &root.path().join("step-00000005")).unwrap());
        assert!(findings.damage.is_empty() && findings.checkpoints.is_empty() && !findings.failed);
    }
}
