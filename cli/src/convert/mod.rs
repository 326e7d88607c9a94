//! `ashore convert`: writes a checkpoint in another layout.
//!
//! **Memory.** One arena, whatever the size of the tensors, and an entry for each tensor.
//! **Crash.** The output appears by one rename. A killed run leaves a hidden attempt beside the output, and
//! the next run with the same arguments reuses the complete files in it.

mod copy;
mod layout;
mod output;
mod sums;

use crate::which::{Meant, Which, newest};
use crate::words::counted;
use crate::{Common, out, size};
use ashore::internal::format::shard::{INDEX, rank_of};
use ashore::internal::storage::is_url;
use ashore::storage::local::Local;
use ashore::storage::{Storage, Sweep};
use ashore::{Attempt, Checkpoint, Error, ErrorKind, Result};
use copy::Arena;
use layout::{Choices, Form, Layout};
use output::{Kept, Output, Values, attempt_of};
use serde::Serialize;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// The flags of `convert`.
#[derive(clap::Args)]
#[command(override_usage = "ashore convert [OPTIONS] [STEP|PATH] --to hf OUT\n       \
                            ashore convert [OPTIONS] [STEP|PATH] --to ranks N OUT")]
pub struct Args {
    /// A step of --dir, the path of a checkpoint, a directory of checkpoints (converts the newest), or a
    /// directory and a step; for ranks their number; and the directory to write, which must not exist
    #[arg(value_name = "ARGUMENTS", num_args = 1..=4, required = true)]
    arguments: Vec<String>,
    /// hf: whole tensors in model-0000i-of-0000n.safetensors and an index; ranks: a step split along the
    /// first dimension, for N ranks
    #[arg(long, value_name = "LAYOUT")]
    to: To,
    /// The most bytes of tensors in a file; a longer tensor has a file of its own
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "5GB")]
    shard_size: u64,
    /// Convert only tensors whose names begin with this
    #[arg(long, value_name = "PREFIX", default_value = "")]
    prefix: String,
    /// Remove that prefix from their names
    #[arg(long, requires = "prefix")]
    strip: bool,
    /// Tensors that share their bytes: keep writes them once, and only readers of tensors.table find the
    /// other names; copy writes them under every name
    #[arg(long, value_name = "HOW", default_value = "keep")]
    aliases: Aliases,
    /// Memory to copy through, such as 256MiB
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "256MiB")]
    arena: u64,
    /// Go on with what another host, or this one before it started again, has left; it must not run any more
    #[arg(long)]
    take_over: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum To {
    Hf,
    Ranks,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Aliases {
    Keep,
    Copy,
}

/// The result of a conversion.
#[derive(Serialize)]
struct Report {
    step: u64,
    #[serde(serialize_with = "out::path")]
    source: PathBuf,
    #[serde(serialize_with = "out::path")]
    path: PathBuf,
    tensors: usize,
    /// Bytes of all files.
    bytes: u64,
    files: Vec<String>,
    /// The number of files that an earlier run had completed.
    kept: usize,
    /// The output was complete before this run.
    already_complete: bool,
    /// Names that only readers of `tensors.table` find, because their bytes are stored under another name.
    aliases: Vec<String>,
    /// Values of single ranks for which the output has no place.
    left_out: Vec<LeftOut>,
}

#[derive(Serialize)]
struct LeftOut {
    rank: u32,
    value: String,
}

/// The minimum arena: the buffer of one reading thread, and two slabs of 1 MiB.
const LEAST: u64 = 4 << 20;

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

impl Args {
    /// Returns the checkpoint, the form of the output, and its path.
    fn parsed(&self, common: &Common) -> Result<(Checkpoint, Choices, PathBuf)> {
        let mut left = &self.arguments[..];
        let usage = || {
            let what = "give [STEP|PATH] --to hf OUT, or [STEP|PATH] --to ranks N OUT with N from 1 to 100000";
            invalid(format!("{what} arguments={:?}", self.arguments))
        };
        let mut last = || left.split_last().map(|(last, rest)| (std::mem::replace(&mut left, rest), last).1);
        let output = PathBuf::from(last().ok_or_else(usage)?);
        let form = match self.to {
            To::Hf => Form::Hf,
            To::Ranks => {
                let ranks = last().and_then(|ranks| ranks.parse().ok()).filter(|ranks| (1..=100_000).contains(ranks));
                Form::Ranks(ranks.ok_or_else(usage)?)
            }
        };
        let what = Which::of(left).map_err(|_| usage())?;
        if self.arena < LEAST {
            return Err(invalid(format!("the arena is too small bytes={} least={LEAST}", self.arena)));
        }
        let checkpoint = match Which::find(what.as_ref(), common)? {
            Meant::One(checkpoint) => *checkpoint,
            Meant::Directory(root) => newest(common, &root)?,
        };
        let choices = Choices {
            form,
            shard_size: self.shard_size,
            prefix: self.prefix.clone(),
            strip: self.strip,
            copy_aliases: self.aliases == Aliases::Copy,
        };
        Ok((checkpoint, choices, output))
    }
}

/// Converts a checkpoint.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let (checkpoint, choices, path) = args.parsed(common)?;
    let report = convert(checkpoint, &choices, &path, args)?;
    if common.json {
        out::json(&report)?
    } else {
        out::print(&report.shown())?
    }
    Ok(ExitCode::SUCCESS)
}

fn convert(checkpoint: Checkpoint, choices: &Choices, path: &Path, args: &Args) -> Result<Report> {
    let mut arena = Arena::new(args.arena)?;
    let checkpoint = checkpoint.with_threads(arena.threads);
    if is_url(path) {
        let what = "convert writes into a directory: convert there, then copy the step with `ashore copy`";
        return Err(invalid(what).with_path(path));
    }
    let name = path.file_name().and_then(|name| name.to_str()).filter(|name| !name.starts_with('.'));
    let name = name.ok_or_else(|| invalid("the output needs a name that is text and not hidden").with_path(path))?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if parent.canonicalize().is_ok_and(|parent| parent.starts_with(checkpoint.path())) {
        return Err(invalid("the output cannot lie in the checkpoint that is converted").with_path(path));
    }
    let attempt = attempt_of(&checkpoint, &format!("{choices:?}"))?;
    let layout = Layout::new(&checkpoint, choices)?;
    let (values, rank_values, left_out) = values(&checkpoint, choices.form)?;
    let mut report = Report {
        step: checkpoint.step(),
        source: checkpoint.path().to_owned(),
        path: path.to_owned(),
        tensors: layout.tensors.len(),
        bytes: layout.bytes(),
        files: layout.files.iter().map(|file| file.name.clone()).collect(),
        kept: 0,
        already_complete: false,
        aliases: layout.aliases.keys().map(|number| layout.tensors[*number].name.clone()).collect(),
        left_out,
    };
    let patience = if args.take_over { Duration::ZERO } else { Sweep::default().older_than };
    if path.symlink_metadata().is_ok() {
        is_complete(&Local::at(parent)?, path, name, attempt, patience)?;
        (report.kept, report.already_complete) = (layout.files.len(), true);
        return Ok(report);
    }
    let bar = out::progress(layout.bytes());
    let done = |bytes| bar.inc(bytes);
    let form = choices.form;
    let output = Output { checkpoint: &checkpoint, layout: &layout, form, attempt, rank_values, values, done: &done };
    let there = match parent.symlink_metadata() {
        Err(_) => None,
        Ok(_) => Some(Local::open(parent)?),
    };
    let resume = |storage: &Local| storage.resume(name, attempt, patience).map_err(still_written);
    let found = there.as_ref().map(resume).transpose()?.flatten();
    let kept = match &found {
        None => Kept::default(),
        Some(found) => {
            bar.set_message("bytes; checking the files of an earlier run");
            output.check(found, &mut arena)?
        }
    };
    has_room(parent, &layout, &kept)?;
    let storage = match there {
        Some(storage) => storage,
        None => Local::open(parent)?,
    };
    let resumable = match found {
        Some(found) => found,
        None => storage.begin_resumable(name, attempt)?,
    };
    bar.set_message(format!("bytes of step {}", checkpoint.step()));
    bar.set_position(kept.bytes());
    report.kept = kept.len();
    output.write(&storage, &resumable, kept, &mut arena)?;
    bar.finish_and_clear();
    Checkpoint::open(path)?;
    Ok(report)
}

fn still_written(error: Error) -> Error {
    if error.kind() != ErrorKind::Conflict || !error.message().contains("may still") {
        return error;
    }
    let what = format!("{}; if it has ended, run again with --take-over", error.message());
    let path = error.path().map(Path::to_owned).unwrap_or_default();
    Error::new(ErrorKind::Conflict, what).with_path(path)
}

/// Checks that the existing output is this conversion, complete and durable.
fn is_complete(storage: &Local, path: &Path, name: &str, attempt: Attempt, patience: Duration) -> Result<()> {
    let other = |why: &str| {
        let what = format!("the output exists and is not this conversion: {why}; delete it, or choose another name");
        Error::new(ErrorKind::Conflict, what).with_path(path)
    };
    let found = match Checkpoint::open(path) {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => return Err(other("no checkpoint")),
        Err(error) => return Err(other(error.message()).with_source(error)),
    };
    if found.attempt() != attempt {
        return Err(other("converted from another step, or with other options"));
    }
    let bar = out::progress(found.bytes());
    bar.set_message("bytes; checking the output");
    let report = found.verify_with(|done, _| bar.set_position(done))?;
    bar.finish_and_clear();
    if let Some(damage) = report.damage.first().or(report.misleading.first()) {
        let what = format!("the output is damaged: {} file={:?}; delete it and run again", damage.what, damage.file);
        return Err(Error::new(ErrorKind::Corrupt, what).with_path(path));
    }
    // The run that published the output may have been killed before the publish was durable.
    storage.confirm(name)?;
    // Deletes the owner record of such a run. Any other error of this call does not matter here.
    let _ = storage.resume(name, attempt, patience);
    Ok(())
}

/// Refuses to begin if the file system does not have enough space.
fn has_room(parent: &Path, layout: &Layout, kept: &Kept) -> Result<()> {
    let names: u64 = layout.tensors.iter().map(|tensor| 3 * tensor.name.len() as u64 + 300).sum();
    // Tables and the index, and a digest for each 8 MiB.
    let needed = layout.bytes() - kept.bytes() + names + layout.bytes() / (512 << 10) + (1 << 20);
    let there = |path: &&Path| path.symlink_metadata().is_ok();
    let existing = parent.ancestors().map(|path| if path.as_os_str().is_empty() { Path::new(".") } else { path });
    let Some(place) = existing.into_iter().find(there) else { return Ok(()) };
    let Ok(found) = rustix::fs::statvfs(place) else { return Ok(()) };
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    if free >= needed {
        return Ok(());
    }
    let what = "the file system of the output has not enough space; nothing was written";
    let sizes = format!("needed={} free={}", size::shown(needed), size::shown(free));
    Err(Error::new(ErrorKind::NoSpace, format!("{what} {sizes}")).with_path(place))
}

/// Returns the values of all ranks, the values of single ranks, and the values for which the output has no
/// place.
fn values(checkpoint: &Checkpoint, form: Form) -> Result<(Values, BTreeMap<u32, Values>, Vec<LeftOut>)> {
    let mut shared = checkpoint.manifest().values.clone();
    let mut of_ranks: BTreeMap<u32, Values> = BTreeMap::new();
    // If a session has one rank, its shards have the same names as those of a process that saved alone.
    let of = |name: &str| rank_of(name).or((checkpoint.world() == 1 && name != INDEX).then_some(0));
    for (number, file) in checkpoint.contents()?.files.iter().enumerate() {
        // The values of a rank are beside its first file.
        if let Some(Entry::Vacant(values)) = of(&file.name).map(|rank| of_ranks.entry(rank)) {
            values.insert(checkpoint.values_beside(number)?);
        }
    }
    if form == Form::Hf && checkpoint.world() == 1 {
        // A process that saves alone keeps its own values among the values of all ranks.
        shared.extend(of_ranks.remove(&0).unwrap_or_default());
    }
    let ranks = if let Form::Ranks(ranks) = form { ranks } else { 0 };
    let lost = of_ranks.split_off(&ranks);
    let lost = lost.into_iter().flat_map(|(rank, values)| values.into_keys().map(move |value| LeftOut { rank, value }));
    Ok((shared, of_ranks, lost.collect()))
}

impl Report {
    fn shown(&self) -> String {
        let (step, path) = (self.step, out::printable(&self.path.display().to_string()));
        let (files, tensors) = (counted(self.files.len(), "file"), counted(self.tensors, "tensor"));
        let bytes = size::shown(self.bytes);
        let mut text = if self.already_complete {
            format!("step {step} is converted already: {files}, {tensors}, {bytes} in {path}\n")
        } else {
            format!("step {step} converted: {files}, {tensors}, {bytes} in {path}\n")
        };
        if self.kept > 0 && !self.already_complete {
            text += &format!("an earlier run had completed {}\n", counted(self.kept, "file"));
        }
        if !self.aliases.is_empty() {
            let names = self.aliases.len();
            text += &format!("{names} tensors share the bytes of another one and are written once; see --aliases\n");
        }
        for LeftOut { rank, value } in &self.left_out {
            text += &format!(
                "left out: the value {} of rank {rank}, which the output has no place for\n",
                out::printable(value)
            );
        }
        text
    }
}
