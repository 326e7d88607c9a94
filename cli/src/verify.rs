//! `ashore verify`: reads every byte and reports all damage.

use crate::inspect::{Meant, Which};
use crate::{Common, DAMAGED, out, size};
use ashore::{Catalog, Checkpoint, Damage, Error, ErrorKind, Result};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The flags of `verify`.
#[derive(clap::Args)]
pub struct Args {
    /// A step of --dir, the path of a checkpoint, or a directory of checkpoints (verifies all)
    #[arg(value_name = "STEP|PATH")]
    what: Option<Which>,
}

/// The result; `damage` is that of all checkpoints.
#[derive(Default, Serialize)]
struct Findings {
    valid: bool,
    checkpoints: Vec<Verified>,
    damage: Vec<Place>,
    /// A checkpoint could not be examined, for a reason that says nothing about its bytes.
    #[serde(skip)]
    failed: bool,
}

#[derive(Serialize)]
struct Verified {
    step: Option<u64>,
    #[serde(serialize_with = "out::path")]
    path: PathBuf,
    bytes: u64,
    valid: bool,
}

#[derive(Serialize)]
struct Place {
    step: Option<u64>,
    #[serde(serialize_with = "out::path")]
    path: PathBuf,
    file: Option<String>,
    tensor: Option<String>,
    /// The first byte, and the one after the last.
    range: Option<(u64, u64)>,
    what: String,
}

/// Verifies. A checkpoint that cannot be opened because of its files' contents is damaged. A missing one is
/// an error, unless it disappeared after it was listed.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let mut findings = Findings::default();
    match Which::find(args.what.as_ref(), common) {
        Ok(Meant::One(checkpoint)) => findings.read(&checkpoint)?,
        Ok(Meant::Directory(root)) => findings.look_at_all(root)?,
        Err(error) if error.kind() == ErrorKind::Corrupt => findings.unreadable(&error),
        Err(error) => return Err(error),
    }
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
    fn look_at_all(&mut self, root: PathBuf) -> Result<()> {
        let (entries, problems) = Catalog::open(&root)?.survey()?;
        if entries.is_empty() && problems.is_empty() {
            return Err(Error::new(ErrorKind::NotFound, "nothing to verify").with_path(root));
        }
        for problem in problems {
            let is_conflict = problem.error.kind() == ErrorKind::Conflict;
            let found = self.look(problem.step, &problem.path)?;
            if is_conflict && found {
                let (step, path, what) = (Some(problem.step), problem.path, problem.error.message().to_owned());
                self.damage.push(Place { step, path, file: None, tensor: None, range: None, what });
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
                out::complain(&format!("{error:#}"));
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
        let (step, path) = (Some(checkpoint.step()), checkpoint.path().to_owned());
        self.checkpoints.push(Verified { step, path: path.clone(), bytes: report.bytes, valid: report.is_sound() });
        let found = report.damage.into_iter().chain(report.misleading);
        self.damage.extend(found.map(|Damage { file, range, tensor, what, .. }| Place {
            step,
            path: path.clone(),
            file: Some(file),
            tensor,
            range: (!range.is_empty()).then_some((range.start, range.end)),
            what,
        }));
        Ok(())
    }

    /// Records damage that hides all other damage: an invalid manifest, or a file that is missing or too
    /// short.
    fn unreadable(&mut self, error: &Error) {
        let given = error.path().unwrap_or(Path::new(""));
        let is_file = !given.is_dir();
        let dir = if is_file { given.parent().unwrap_or(given) } else { given };
        let file = given.file_name().filter(|_| is_file).map(|name| name.to_string_lossy().into_owned());
        self.checkpoints.push(Verified { step: error.step(), path: dir.into(), bytes: 0, valid: false });
        let what = error.message().to_owned();
        self.damage.push(Place { step: error.step(), path: dir.into(), file, tensor: None, range: None, what });
    }

    fn shown(&self) -> String {
        let mut text = String::new();
        for place in &self.damage {
            let file = place.path.join(place.file.as_deref().unwrap_or_default());
            text += &format!("damaged: {}", out::printable(&file.display().to_string()));
            if let Some((from, to)) = place.range {
                text += &format!(" bytes {from}..{to}");
            }
            if let Some(tensor) = &place.tensor {
                text += &format!(" tensor {}", out::printable(tensor));
            }
            text += &format!(": {}\n", out::printable(&place.what));
        }
        for seen in &self.checkpoints {
            let step = seen.step.map_or("?".to_owned(), |step| step.to_string());
            let verdict = if seen.valid { "sound" } else { "DAMAGED" };
            text += &format!("step {step}: {verdict}, {} read\n", size::shown(seen.bytes));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `verify` used to fail when `prune` removed a step while it read others.
    #[test]
    fn a_step_that_went_away_is_neither_damage_nor_a_failure() {
        let root = tempfile::tempdir().unwrap();
        let mut findings = Findings::default();
        assert!(!findings.look(5, &root.path().join("step-00000005")).unwrap());
        assert!(findings.damage.is_empty() && findings.checkpoints.is_empty() && !findings.failed);
    }
}
