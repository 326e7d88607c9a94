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
use serde::Serialize;
use serde_json::{Value, json};
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
    let written = write(&root, &args.output)?;
    if common.json {
        out::json(&written)?;
    } else {
        out::print(&format!("{}\n{}\n", written.verdict, out::printable(&args.output.display().to_string())))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The contents of a page, in numbers.
#[derive(Serialize)]
pub struct Written {
    #[serde(serialize_with = "out::path")]
    path: PathBuf,
    verdict: String,
    saves: usize,
    failed: usize,
    stall_seconds: Value,
    durable_seconds: Value,
    cost: Value,
    at_risk_seconds: Value,
}

/// Writes the page of the run in `root`.
///
/// # Errors
/// `NotFound` without a log; other errors when a log cannot be read, or the page cannot be written.
pub fn write(root: &Path, output: &Path) -> Result<Written> {
    let facts = facts::gather(read(root)?);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let page = page::Page { name: root.display().to_string(), now: now.as_micros() as u64, facts: &facts };
    let failed = |error| Error::io("cannot write the report", error).with_path(output);
    std::fs::write(output, page.html()).map_err(failed)?;
    Ok(Written {
        path: output.to_owned(),
        verdict: page.verdict().replace('\u{a0}', " "),
        saves: facts.saves.len(),
        failed: facts.failed(),
        stall_seconds: json!({ "p50": facts.stall(0.5), "p99": facts.stall(0.99), "max": facts.stall(1.0) }),
        durable_seconds: json!({ "p50": facts.until_durable(0.5), "max": facts.until_durable(1.0) }),
        cost: json!(facts.cost()),
        at_risk_seconds: json!(facts.worst),
    })
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
