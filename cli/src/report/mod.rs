//! `ashore report`: the page of a run, made from its log alone.

mod charts;
mod facts;
mod page;
#[cfg(test)]
mod tests;
mod words;

use crate::{Common, out};
use ashore::internal::run_log::{Run, runs};
use ashore::{Error, ErrorKind, Result};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

/// The flags of `report`.
#[derive(clap::Args)]
pub struct Args {
    /// The directory of checkpoints, or one log in its .runs (same as --dir)
    #[arg(value_name = "RUN")]
    run: Option<PathBuf>,
    /// Where to write the page
    #[arg(short, long, value_name = "FILE", default_value = "ashore-report.html")]
    output: PathBuf,
}

/// Writes the page, and prints its path.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let root = common.root_at(args.run.as_deref())?;
    let facts = facts::gather(read(&root)?);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let page = page::Page { name: root.display().to_string(), now: now.as_micros() as u64, facts: &facts };
    let failed = |error| Error::io("cannot write the report", error).with_path(&args.output);
    std::fs::write(&args.output, page.html()).map_err(failed)?;
    if common.json {
        out::json(&serde_json::json!({
            "path": args.output.display().to_string(),
            "verdict": page.verdict(),
            "saves": facts.saves.len(),
            "failed": facts.failed(),
            "stall_seconds": { "p50": facts.stall(0.5), "p99": facts.stall(0.99), "max": facts.stall(1.0) },
            "durable_seconds": { "p50": facts.until_durable(0.5), "max": facts.until_durable(1.0) },
            "cost": facts.cost(),
            "at_risk_seconds": facts.worst,
        }))?;
    } else {
        out::print(&format!("{}\n{}\n", page.verdict().replace('\u{a0}', " "), args.output.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Reads the logs of a root, or one log.
fn read(root: &Path) -> Result<Vec<Run>> {
    let logs = if root.is_file() { vec![root.to_owned()] } else { runs(root)? };
    if logs.is_empty() {
        let why =
            "there is no log of a run: it is written where saves have ended, into .runs; give the directory of steps";
        return Err(Error::new(ErrorKind::NotFound, why).with_path(root));
    }
    logs.iter().map(|log| Run::read(log)).collect()
}
