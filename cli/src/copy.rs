//! `ashore copy`: copies checkpoints from a directory to another, as the same attempts.

use crate::{Common, DAMAGED, out, size, words};
use ashore::catalog::Mark;
use ashore::storage::{self, Storage};
use ashore::{Catalog, Checkpoint, Error, ErrorKind, Result, tiers};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

/// The flags of `copy`.
#[derive(clap::Args)]
pub struct Args {
    /// The root of the checkpoints to copy from, a directory or a URL
    #[arg(value_name = "FROM")]
    from: PathBuf,
    /// The root to copy to, which is made if it is missing. A job that saves into an object store must not
    /// have it as its root: the copy takes the root over, and the job's next save fails
    #[arg(value_name = "TO")]
    to: PathBuf,
    /// Copy every checkpoint, newest first; without this, only the newest. Steps that are marked bad are left
    /// out
    #[arg(long, conflicts_with = "step")]
    all: bool,
    /// Copy this step, also if it is marked bad
    #[arg(long, value_name = "N")]
    step: Option<u64>,
    /// Only show what would be copied
    #[arg(long)]
    dry_run: bool,
}

#[derive(Serialize)]
struct Report {
    dry_run: bool,
    copied: Vec<Row>,
    /// Steps that the destination has as the same attempt.
    already: Vec<Row>,
    failed: Vec<Row>,
    #[serde(skip)]
    damaged: bool,
}

#[derive(Serialize)]
struct Row {
    step: u64,
    attempt: String,
    #[serde(serialize_with = "out::path")]
    path: PathBuf,
    bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

/// Copies. A step that cannot be copied does not stop the others.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    if common.dir.is_some() {
        let what = "give both directories after the command, and no --dir";
        return Err(Error::new(ErrorKind::Invalid, what));
    }
    let catalog = common.catalog(&args.from)?;
    let mut steps: Vec<u64> = match args.step {
        Some(step) => vec![step],
        None => unmarked(&catalog, args.all)?,
    };
    if !args.all {
        steps.truncate(1);
    }
    if steps.is_empty() {
        let none = Error::new(ErrorKind::NotFound, "there is no checkpoint to copy");
        return Err(none.with_path(&args.from));
    }
    let to = destination(&args.to, args.dry_run)?;
    let mut report =
        Report { dry_run: args.dry_run, copied: Vec::new(), already: Vec::new(), failed: Vec::new(), damaged: false };
    for step in steps {
        report.copy(&catalog, step, to.as_ref(), &args.to)?;
    }
    if common.json {
        out::json(&report)?
    } else {
        out::print(&report.shown())?
    }
    Ok(match (report.damaged, report.failed.is_empty()) {
        (true, _) => ExitCode::from(DAMAGED),
        (false, false) => ExitCode::FAILURE,
        (false, true) => ExitCode::SUCCESS,
    })
}

/// Returns the steps that are not marked bad, newest first. Reports the steps that are left out.
fn unmarked(catalog: &Catalog, all: bool) -> Result<Vec<u64>> {
    let marks = catalog.marks()?;
    let mut steps = Vec::new();
    for entry in catalog.list()?.iter().rev() {
        if marks.iter().any(|marked| marked.attempt == entry.attempt && marked.mark == Mark::Bad) {
            if all || steps.is_empty() {
                let step = entry.step;
                out::complain(&format!("step {step} is marked bad and is left out; --step {step} copies it"));
            }
        } else {
            steps.push(entry.step);
        }
    }
    Ok(steps)
}

/// Opens the storage to copy to; None if a dry run finds no storage.
fn destination(root: &Path, dry_run: bool) -> Result<Option<Arc<dyn Storage>>> {
    let opened = if dry_run { storage::at(root) } else { storage::open(root) };
    match opened {
        Err(error) if dry_run && error.kind() == ErrorKind::NotFound => Ok(None),
        opened => Ok(Some(opened?)),
    }
}

impl Report {
    fn copy(&mut self, catalog: &Catalog, step: u64, to: Option<&Arc<dyn Storage>>, root: &Path) -> Result<()> {
        let from = match catalog.checkpoint(step) {
            Ok(from) => from,
            Err(error) => return self.failed(step, None, root, &error),
        };
        let row = |path| Row { step, attempt: from.attempt().to_string(), path, bytes: from.bytes(), why: None };
        if self.dry_run {
            let there = to.map(|to| Checkpoint::from_storage(to.clone(), from.name()));
            match there {
                None => self.copied.push(row(root.join(from.name()))),
                Some(Err(error)) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Corrupt) => {
                    self.copied.push(row(root.join(from.name())));
                }
                Some(Err(error)) => return self.failed(step, Some(&from), root, &error),
                Some(Ok(there)) if there.attempt() == from.attempt() => self.already.push(row(there.path().into())),
                Some(Ok(there)) => {
                    let what = format!("the destination has another attempt at the step there={}", there.attempt());
                    return self.failed(step, Some(&from), root, &Error::new(ErrorKind::Conflict, what));
                }
            }
            return Ok(());
        }
        let Some(to) = to else { return Ok(()) };
        let bar = out::progress(from.bytes());
        bar.set_message(format!("bytes of step {step}"));
        let copied = tiers::copy(&from, to, |done, _| bar.set_position(done));
        bar.finish_and_clear();
        match copied {
            Ok(copied) if copied.already => self.already.push(row(copied.path)),
            Ok(copied) => self.copied.push(row(copied.path)),
            Err(error) => return self.failed(step, Some(&from), root, &error),
        }
        Ok(())
    }

    fn failed(&mut self, step: u64, from: Option<&Checkpoint>, root: &Path, error: &Error) -> Result<()> {
        out::complain(&format!("not copied: {}", words::of(&error.clone().with_step(step))));
        self.damaged |= error.kind() == ErrorKind::Corrupt;
        let attempt = from.map_or_else(String::new, |from| from.attempt().to_string());
        let (bytes, path) = (from.map_or(0, Checkpoint::bytes), root.join(ashore::id::step_name(step)));
        self.failed.push(Row { step, attempt, path, bytes, why: Some(format!("{error:#}")) });
        Ok(())
    }

    fn shown(&self) -> String {
        let verb = if self.dry_run { "would be copied" } else { "copied" };
        let line = |row: &Row, what: &str| {
            let (step, bytes, path) = (row.step, size::shown(row.bytes), row.path.display().to_string());
            format!("step {step} {what}: {bytes} in {}\n", out::printable(&path))
        };
        let copied = self.copied.iter().map(|row| line(row, verb));
        copied.chain(self.already.iter().map(|row| line(row, "is there already"))).collect()
    }
}
