//! `ashore delta`, `apply`, `chain` and `follow`: published versions, and what changes between two steps.

use crate::{Common, DAMAGED, ls, out, size};
use ashore::chain::{Chain, Follow, Weights, apply_files, delta_file};
use ashore::{Error, ErrorKind, Form, Result};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// How deltas are written.
#[derive(Clone, Copy, Default, clap::ValueEnum)]
enum Written {
    /// Gaps and differences, a byte each
    #[default]
    Packed,
    /// Indices and values, as inference servers take them
    Indices,
    /// Packed, and compressed; needs a build with the feature `zstd`
    Zstd,
}

impl From<Written> for Form {
    fn from(written: Written) -> Self {
        match written {
            Written::Packed => Self::Packed,
            Written::Indices => Self::Indices,
            Written::Zstd => Self::Zstd,
        }
    }
}

/// The flags of `delta`.
#[derive(clap::Args)]
pub struct DeltaArgs {
    /// The directory of the older step
    #[arg(value_name = "BASE")]
    base: PathBuf,
    /// The directory of the later step
    #[arg(value_name = "STEP")]
    step: PathBuf,
    /// How changes are written
    #[arg(long, value_enum, default_value_t)]
    form: Written,
    /// The directory that the delta becomes
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
}

/// The flags of `apply`.
#[derive(clap::Args)]
pub struct ApplyArgs {
    /// The directory of a complete step
    #[arg(value_name = "DIR")]
    base: PathBuf,
    /// The directories of deltas, in the order of their versions
    #[arg(value_name = "DELTA", required = true)]
    deltas: Vec<PathBuf>,
    /// The directory that the step becomes
    #[arg(short, long, value_name = "STEP")]
    output: PathBuf,
}

/// The flags of `chain`.
#[derive(clap::Args)]
pub struct ChainArgs {
    /// The directory of the chain (same as --dir)
    #[arg(value_name = "ROOT")]
    root: Option<PathBuf>,
}

/// The flags of `follow`.
#[derive(clap::Args)]
pub struct FollowArgs {
    /// The directory of the chain
    #[arg(value_name = "ROOT")]
    root: PathBuf,
    /// The directory that gets a copy of every version
    #[arg(long, value_name = "DIR")]
    into: PathBuf,
    /// End when there has been no newer version for this many seconds [default: never]
    #[arg(long, value_name = "SECONDS")]
    idle: Option<u64>,
}

/// Writes the delta between two steps.
pub fn delta(common: &Common, args: &DeltaArgs) -> Result<ExitCode> {
    let report = delta_file(&args.base, &args.step, args.form.into(), &args.output)?;
    if common.json {
        out::json(&report)?;
    } else {
        let (bytes, full) = (size::shown(report.bytes), size::shown(report.full_bytes));
        let (version, changed, path) = (report.version, report.changed, args.output.display());
        out::print(&format!("{path}: step {version}, {changed} elements changed, {bytes} instead of {full}\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Writes the step that deltas make of an older one.
pub fn apply(common: &Common, args: &ApplyArgs) -> Result<ExitCode> {
    let report = apply_files(&args.base, &args.deltas, &args.output)?;
    if common.json {
        out::json(&report)?;
    } else {
        let (version, full) = (report.version, size::shown(report.full_bytes));
        out::print(&format!("{}: step {version}, {full}\n", args.output.display()))?;
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Shown {
    versions: Vec<ashore::chain::Version>,
    holes: Vec<ashore::chain::Hole>,
}

/// Lists the versions of a chain, and its holes.
pub fn chain(common: &Common, args: &ChainArgs) -> Result<ExitCode> {
    let chain = Chain::open(common.root_at(args.root.as_deref())?)?;
    let shown = Shown { versions: chain.versions()?, holes: chain.holes()? };
    if common.json {
        out::json(&shown)?;
    } else {
        let mut table = ls::table(["version", "base", "size", "buildable", "directory"]);
        for version in &shown.versions {
            let base = version.base.map_or_else(|| "full".to_owned(), |base| base.to_string());
            let buildable = if version.buildable { "yes" } else { "NO" };
            let cells =
                [version.number.to_string(), base, size::shown(version.bytes), buildable.into(), version.name.clone()];
            table.add_row(cells);
        }
        out::print(&ls::shown(&mut table, &[0, 1, 2]))?;
    }
    for hole in &shown.holes {
        out::complain(&format!("version {} cannot be built: version {} is missing", hole.number, hole.missing));
    }
    Ok(if shown.holes.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(DAMAGED) })
}

#[derive(Serialize)]
struct Reached {
    version: u64,
    bytes: u64,
    full: bool,
}

/// Copies every new version to a directory, each once it is checked.
pub fn follow(common: &Common, args: &FollowArgs) -> Result<ExitCode> {
    let mut follow = Follow::open(&args.root)?.copy_to(&args.into)?.start(Weights::new())?;
    // Without a limit, look again after a day without news.
    let idle = args.idle.map_or(Duration::from_secs(24 * 3600), Duration::from_secs);
    loop {
        let Some(update) = follow.next(idle)? else {
            if args.idle.is_none() {
                continue;
            }
            return match follow.version() {
                Some(_) => Ok(ExitCode::SUCCESS),
                None => Err(Error::new(ErrorKind::NotFound, "the chain has no version").with_path(&args.root)),
            };
        };
        let (bytes, full) = (update.bytes(), update.is_full());
        let reached = Reached { version: follow.apply(update)?, bytes, full };
        if common.json {
            out::json(&reached)?;
        } else {
            let what = if full { "full" } else { "delta" };
            out::print(&format!("version {}: {what}, {}\n", reached.version, size::shown(bytes)))?;
        }
    }
}
