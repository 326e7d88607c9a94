//! `ashore prune`: deletes checkpoints, after it has read one remaining checkpoint in full and found it
//! sound.

use crate::remnants::{self, Row};
use crate::{Common, age, out, size, words};
use ashore::catalog::{Best, Entry, Problem, Verify};
use ashore::storage::Sweep;
use ashore::{Catalog, PruneOptions, Result, Retention};
use clap::ArgGroup;
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// The flags of `prune`.
#[derive(clap::Args)]
#[group(skip)]
#[command(group(ArgGroup::new("what").required(true).multiple(true).args(["keep_last", "after", "damaged", "abandoned"])))]
#[command(group(ArgGroup::new("metric").args(["lowest", "highest"])))]
pub struct Args {
    /// The directory of checkpoints (same as --dir)
    #[arg(value_name = "DIR")]
    root: Option<PathBuf>,
    /// Keep the newest N checkpoints, and the newest N of the branch written last
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    keep_last: Option<u64>,
    /// Also keep every step that is a multiple of K, however old
    #[arg(long, value_name = "K", value_parser = at_least_one, requires = "keep_last")]
    keep_every: Option<u64>,
    /// Also delete unfinished saves of other hosts, unchanged for --older-than; alone, it deletes no
    /// checkpoint
    #[arg(long)]
    abandoned: bool,
    /// Age for --abandoned. A live writer touches its save every few minutes: give a shorter AGE only if no
    /// writer is alive on another host
    #[arg(long, value_name = "AGE", value_parser = age::parse, default_value = "1d", requires = "abandoned")]
    older_than: Duration,
    /// Also keep the N best checkpoints by the metric given with --lowest or --highest
    #[arg(long, value_name = "N", value_parser = at_least_one, requires = "keep_last", requires = "metric")]
    keep_best: Option<u64>,
    /// The best checkpoints have the lowest number under KEY in their metadata
    #[arg(long, value_name = "KEY", requires = "keep_best")]
    lowest: Option<String>,
    /// The best checkpoints have the highest number under KEY in their metadata
    #[arg(long, value_name = "KEY", requires = "keep_best")]
    highest: Option<String>,
    /// Delete every checkpoint after STEP, to continue the run from STEP
    #[arg(long, value_name = "STEP", conflicts_with_all = ["keep_last", "damaged"])]
    after: Option<u64>,
    /// Read every checkpoint, and delete the damaged ones
    #[arg(long, conflicts_with = "keep_last")]
    damaged: bool,
    /// Delete even if no remaining checkpoint was read and found sound
    #[arg(long)]
    unverified: bool,
    /// Delete; without this, only show what would be deleted
    #[arg(long, conflicts_with = "dry_run")]
    yes: bool,
    /// Only show what would be deleted (the default)
    #[arg(long)]
    dry_run: bool,
}

#[derive(Serialize)]
struct Pruned {
    dry_run: bool,
    removed: Vec<Step>,
    /// Damaged checkpoints that were deleted.
    damaged: Vec<Step>,
    kept: Vec<Step>,
    /// Kept checkpoints that do not count.
    doubtful: Vec<Step>,
    /// The bytes of `removed` that no remaining step shares. Clones may still use some of these bytes.
    freed_bytes: u64,
    /// What could not be deleted, or not completely.
    failed: Vec<Step>,
    /// Unfinished saves of dead processes.
    swept: Vec<Row>,
    /// Unfinished saves that may be alive on another host, or that could not be deleted.
    left: Vec<Row>,
}

#[derive(Serialize)]
struct Step {
    step: u64,
    #[serde(serialize_with = "out::path")]
    path: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

/// Prunes, or shows what pruning would do. Reports what was deleted even if something else could not be.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let catalog = common.catalog(&common.root_at(args.root.as_deref())?)?;
    let dry_run = !args.yes;
    let verify = if args.unverified { Verify::No } else { Verify::One };
    let done = delete(&catalog, args, PruneOptions::new().dry_run(dry_run).verify(verify))?;
    let how = if args.abandoned { Sweep::default().older_than(args.older_than) } else { Sweep::default() };
    let swept = catalog.sweep(if dry_run { how.dry_run() } else { how });
    for doubtful in &done.doubtful {
        out::complain(&format!("kept, but does not count: {}", words::of(&doubtful.error)));
    }
    for failed in &done.failed {
        out::complain(&format!("could not delete step {}: {}", failed.step, words::of(&failed.error)));
    }
    let mut failed = !done.failed.is_empty();
    let swept = swept.unwrap_or_else(|error| {
        failed = true;
        out::complain(&format!("could not search for unfinished saves of dead processes: {}", words::of(&error)));
        Default::default()
    });
    let pruned = Pruned {
        dry_run,
        removed: done.removed.into_iter().map(Step::of).collect(),
        damaged: done.damaged.into_iter().map(Step::because).collect(),
        freed_bytes: done.freed,
        kept: done.kept.into_iter().map(Step::of).collect(),
        doubtful: done.doubtful.into_iter().map(Step::because).collect(),
        failed: done.failed.into_iter().map(Step::because).collect(),
        swept: remnants::not_alive(swept.removed),
        left: remnants::not_alive(swept.left),
    };
    if common.json {
        out::json(&pruned)?
    } else {
        out::print(&pruned.shown())?
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn delete(catalog: &Catalog, args: &Args, options: PruneOptions) -> Result<ashore::catalog::Pruned> {
    if let Some(step) = args.after {
        return catalog.discard_after(step, options);
    }
    if args.damaged {
        return catalog.delete_damaged(options);
    }
    let Some(keep_last) = args.keep_last else { return catalog.prune(&Retention::default(), options) };
    let whole = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    let mut retention = Retention::last(whole(keep_last));
    retention.keep_every = args.keep_every;
    let best = match (args.keep_best, &args.lowest, &args.highest) {
        (Some(n), Some(key), _) => Best::lowest(key, whole(n)),
        (Some(n), _, Some(key)) => Best::highest(key, whole(n)),
        _ => return catalog.prune(&retention, options),
    };
    catalog.prune_by(&retention, &best, options)
}

impl Step {
    fn of(entry: Entry) -> Self {
        Self { step: entry.step, path: entry.path, bytes: Some(entry.bytes), why: None }
    }

    fn because(problem: Problem) -> Self {
        Self { step: problem.step, path: problem.path, bytes: None, why: Some(format!("{:#}", problem.error)) }
    }
}

impl Pruned {
    fn shown(&self) -> String {
        let mut text = String::new();
        let verb = if self.dry_run { "would delete" } else { "deleted" };
        for gone in self.removed.iter().chain(&self.damaged) {
            let path = out::printable(&gone.path.display().to_string());
            let what = gone.bytes.map_or_else(|| "damaged".to_owned(), size::shown);
            text += &format!("{verb}  step {}  {what}  {path}\n", gone.step);
        }
        for dead in &self.swept {
            text += &format!("{verb}  unfinished {}\n", dead.shown());
        }
        for left in &self.left {
            text += &format!("kept  unfinished {}\n", left.shown());
        }
        if !self.left.is_empty() {
            text += &format!("{}\n", remnants::ADVICE);
        }
        let bytes = self.removed.iter().filter_map(|gone| gone.bytes).sum();
        let (removed, kept) = (self.removed.len() + self.damaged.len(), self.kept.len());
        let freed = if self.freed_bytes == bytes {
            String::new()
        } else {
            format!(", frees {}: other steps share the rest", size::shown(self.freed_bytes))
        };
        text += &format!("{verb} {removed} ({}{freed}), kept {kept}\n", size::shown(bytes));
        if self.dry_run && removed + self.swept.len() > 0 {
            text += "nothing was deleted: add --yes to delete\n";
        }
        text
    }
}

fn at_least_one(text: &str) -> Result<u64, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "a number of at least 1".to_owned())
}
