//! `ashore prune`: deletes old checkpoints, never the newest durable one.

use crate::remnants::{self, Row};
use crate::{Common, age, out, size};
use ashore::storage::Sweep;
use ashore::{Catalog, Result, Retention};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// The flags of `prune`.
#[derive(clap::Args)]
#[group(id = "keep", required = true, multiple = true, args = ["keep_last", "keep_every", "abandoned"])]
pub struct Args {
    /// Keep the newest N checkpoints [default: 1]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    keep_last: Option<u64>,
    /// Keep every step that is a multiple of K, however old
    #[arg(long, value_name = "K", value_parser = at_least_one)]
    keep_every: Option<u64>,
    /// Delete unfinished saves of other hosts that have not changed for --older-than; alone, it deletes no checkpoint
    #[arg(long)]
    abandoned: bool,
    /// A live writer touches its save every few minutes: a shorter AGE says that no writer is alive on another host
    #[arg(long, value_name = "AGE", value_parser = age::parse, default_value = "1d", requires = "abandoned")]
    older_than: Duration,
    /// Really delete
    #[arg(long, conflicts_with = "dry_run")]
    yes: bool,
    /// Only say what would be deleted; this is what happens without --yes
    #[arg(long)]
    dry_run: bool,
}

#[derive(Serialize)]
struct Pruned {
    dry_run: bool,
    removed: Vec<Step>,
    kept: Vec<Step>,
    /// Unfinished saves of dead processes.
    swept: Vec<Row>,
    /// Unfinished saves that may be alive on another host, or could not be deleted.
    left: Vec<Row>,
}

#[derive(Serialize)]
struct Step {
    step: u64,
    path: PathBuf,
    bytes: u64,
}

/// Prunes, or says what pruning would do.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let catalog = Catalog::open(common.root())?;
    let keep_last = usize::try_from(args.keep_last.unwrap_or(1)).unwrap_or(usize::MAX);
    let asked = args.keep_last.is_some() || args.keep_every.is_some();
    let retention = Retention { keep_last: asked.then_some(keep_last), keep_every: args.keep_every };
    let dry_run = !args.yes;
    let done = catalog.prune(&retention, dry_run)?;
    let how = if args.abandoned { Sweep::default().older_than(args.older_than) } else { Sweep::default() };
    let swept = catalog.sweep(if dry_run { how.dry_run() } else { how })?;
    for doubtful in &done.doubtful {
        out::complain(&format!("not counted, and kept: {}", doubtful.error));
    }
    let steps = |entries: Vec<ashore::catalog::Entry>| {
        entries.into_iter().map(|e| Step { step: e.step, path: e.path, bytes: e.bytes }).collect()
    };
    let pruned = Pruned {
        dry_run,
        removed: steps(done.removed),
        kept: steps(done.kept),
        swept: remnants::not_alive(swept.removed),
        left: remnants::not_alive(swept.left),
    };
    if common.json {
        out::json(&pruned)?
    } else {
        out::print(&pruned.shown())?
    }
    Ok(ExitCode::SUCCESS)
}

impl Pruned {
    fn shown(&self) -> String {
        let mut text = String::new();
        let verb = if self.dry_run { "would delete" } else { "deleted" };
        for gone in &self.removed {
            let path = out::printable(&gone.path.display().to_string());
            text += &format!("{verb}  step {}  {}  {path}\n", gone.step, size::shown(gone.bytes));
        }
        for dead in &self.swept {
            text += &format!("{verb}  unfinished {}\n", dead.shown());
        }
        for left in &self.left {
            text += &format!("left  unfinished {}\n", left.shown());
        }
        if !self.left.is_empty() {
            text += &format!("{}\n", remnants::ADVICE);
        }
        let bytes = size::shown(self.removed.iter().map(|gone| gone.bytes).sum());
        let (removed, kept) = (self.removed.len(), self.kept.len());
        text += &format!("{verb} {removed} ({bytes}), kept {kept}\n");
        if self.dry_run && removed + self.swept.len() > 0 {
            text += "nothing was deleted: add --yes to do it\n";
        }
        text
    }
}

fn at_least_one(text: &str) -> Result<u64, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "a number of at least 1".to_owned())
}
