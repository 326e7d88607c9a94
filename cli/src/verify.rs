//! `ashore verify`: reads every byte and names all damage.

use crate::Common;
use crate::inspect::Which;
use crate::{out, size};
use ashore::{Catalog, Checkpoint, Damage, Error, ErrorKind, Result};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The exit status that says: damage was found.
const DAMAGED: u8 = 3;

/// The flags of `verify`.
#[derive(clap::Args)]
pub struct Args {
    /// A step of the directory, or the path of a checkpoint [default: all of the directory]
    #[arg(value_name = "STEP|PATH")]
    what: Option<Which>,
}

/// What was found; `damage` is that of all checkpoints.
#[derive(Default, Serialize)]
struct Findings {
    valid: bool,
    checkpoints: Vec<Verified>,
    damage: Vec<Place>,
}

#[derive(Serialize)]
struct Verified {
    step: Option<u64>,
    path: PathBuf,
    bytes: u64,
    valid: bool,
}

#[derive(Serialize)]
struct Place {
    step: Option<u64>,
    path: PathBuf,
    file: Option<String>,
    tensor: Option<String>,
    /// First byte, and the one after the last.
    range: Option<(u64, u64)>,
    what: String,
}

/// Verifies. A checkpoint that cannot even be opened because of what its files hold is damaged; one that is not there is an
/// error.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let mut findings = Findings::default();
    match &args.what {
        Some(which) => findings.look(which.open(common))?,
        None => {
            let root = common.root();
            let (entries, problems) = Catalog::open(&root)?.survey()?;
            if entries.is_empty() && problems.is_empty() {
                return Err(Error::new(ErrorKind::NotFound, "there is nothing to verify").with_path(root));
            }
            for problem in problems {
                findings.look(Err(problem.error.with_step(problem.step).with_path(problem.path)))?;
            }
            for entry in entries {
                findings.look(Checkpoint::open(&entry.path))?;
            }
        }
    }
    findings.checkpoints.sort_by(|a, b| (a.step, &a.path).cmp(&(b.step, &b.path)));
    findings.valid = findings.damage.is_empty();
    if common.json {
        out::json(&findings)?
    } else {
        out::print(&findings.shown())?
    }
    Ok(if findings.valid { ExitCode::SUCCESS } else { ExitCode::from(DAMAGED) })
}

impl Findings {
    fn look(&mut self, opened: Result<Checkpoint>) -> Result<()> {
        match opened {
            Ok(checkpoint) => self.read(&checkpoint),
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                self.unreadable(&error);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn read(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let bar = out::progress(checkpoint.bytes());
        bar.set_message(format!("bytes of step {}", checkpoint.step()));
        let report = checkpoint.verify_with(|done, _| bar.set_position(done))?;
        bar.finish_and_clear();
        let (step, path) = (Some(checkpoint.step()), checkpoint.path().to_owned());
        self.checkpoints.push(Verified { step, path: path.clone(), bytes: report.bytes, valid: report.is_sound() });
        self.damage.extend(report.damage.into_iter().map(|Damage { file, range, tensor, what, .. }| Place {
            step,
            path: path.clone(),
            file: Some(file),
            tensor,
            range: Some((range.start, range.end)),
            what,
        }));
        Ok(())
    }

    /// Damage that hides everything behind it: a manifest that does not parse, a file that is missing or too short.
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
