//! `ashore tune`: measures the disk of a directory, memory, bus and a real save for some 20 s, and recommends
//! settings and how often to save.
//!
//! It uses the loops and the saved state of `ashore bench`. It writes everything in one directory below the
//! given one, and deletes that directory at the end, also after an interrupt.

mod advice;
mod measure;
#[cfg(test)]
mod tests;
mod text;

use crate::bench::workload::Shape;
use crate::device::Home;
use crate::limit::{self, Memory, Spread};
use crate::out;
use crate::place::{Interrupt, Place};
use crate::steps::{Kind, Steps};
use crate::which::{Which, is_checkpoint};
use crate::{Common, age, on_disk, size};
use advice::{Interval, Setting, Wanted};
use ashore::{Checkpoint, DeviceChoice, Error, ErrorKind, Result};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// The flags of `tune`.
#[derive(clap::Args)]
pub struct Args {
    /// The directory of checkpoints, which may be empty (same as --dir)
    #[arg(value_name = "DIR")]
    root: Option<PathBuf>,
    /// Save a state with the tensors of this step [default: the newest step of DIR]
    #[arg(long, value_name = "STEP|PATH", conflicts_with = "bytes")]
    like: Option<Which>,
    /// Save a state of this size
    #[arg(long, value_name = "SIZE", value_parser = size::parse, requires = "tensors")]
    bytes: Option<u64>,
    /// Save a state of this many tensors
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=10_000_000), requires = "bytes")]
    tensors: Option<u64>,
    /// Where the state is: auto, host or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceChoice,
    /// Milliseconds of a training step, in most of which tensors are only read
    #[arg(long, value_name = "MS", value_parser = positive)]
    step_ms: Option<f64>,
    /// How much of the training time saves may take, in percent
    #[arg(long, value_name = "PERCENT", value_parser = positive, default_value = "1")]
    cost: f64,
    /// How often the job fails: of N machines, the time between failures of one divided by N
    #[arg(long, value_name = "AGE", value_parser = age::parse)]
    fails_every: Option<Duration>,
    /// How much the drive may be written a day, such as 2TB
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    daily: Option<u64>,
    /// How long to measure, about
    #[arg(long = "for", value_name = "AGE", value_parser = age::parse, default_value = "20s")]
    span: Duration,
}

fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (1e-3..=1e7).contains(number));
    number.ok_or_else(|| "this must be a positive number, such as 0.5".to_owned())
}

/// The measurements, and the advice that follows from them.
#[derive(Serialize)]
pub struct Report {
    #[serde(serialize_with = "out::path")]
    pub path: PathBuf,
    pub device: String,
    /// On the simulated driver, times mean nothing.
    pub simulated: bool,
    pub state: Saved,
    pub measured: Measured,
    pub settings: [Setting; 4],
    pub code: String,
    pub environment: String,
    pub interval: Interval,
}

/// The state that the user wants to save, and how much of it was saved.
#[derive(Serialize)]
pub struct Saved {
    pub bytes: u64,
    pub tensors: u64,
    /// The source of the shape.
    pub source: String,
    pub saved_bytes: u64,
}

/// The figures. The figures of a save are scaled up to the whole state.
#[derive(Serialize)]
pub struct Measured {
    pub seconds: f64,
    pub written_bytes: u64,
    /// The default loop first.
    pub loops: Vec<Spread>,
    pub copy_bytes_per_second: f64,
    pub digest_bytes_per_second: f64,
    pub bus: Option<Bus>,
    pub commits: usize,
    pub commit_seconds: f64,
    pub call_seconds: f64,
    pub staged_seconds: f64,
    pub durable_seconds: f64,
}

/// The rates of copies from a GPU.
#[derive(Serialize)]
pub struct Bus {
    pub chunked_bytes_per_second: f64,
    pub long_bytes_per_second: f64,
}

/// The lengths of the tensors of a state.
struct Shapes {
    bytes: Vec<u64>,
    source: String,
}

impl Shapes {
    fn total(&self) -> u64 {
        self.bytes.iter().sum()
    }

    /// The same number of tensors, and about this many bytes.
    fn of(&self, bytes: u64) -> Self {
        let share = bytes as f64 / self.total().max(1) as f64;
        let bytes = self.bytes.iter().map(|one| ((*one as f64 * share).round() as u64).max(4)).collect();
        Self { bytes, source: self.source.clone() }
    }

    /// The tensors, of elements of two or four bytes.
    fn list(&self) -> Vec<Shape> {
        let shape = |(i, bytes): (usize, &u64)| {
            let half = !bytes.is_multiple_of(4);
            (format!("tensor.{i:06}"), half, vec![bytes.div_ceil(if half { 2 } else { 4 }).max(1) as usize])
        };
        self.bytes.iter().enumerate().map(shape).collect()
    }
}

/// Measures, and prints the advice.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let root = common.root_at(args.root.as_deref())?;
    on_disk(&root)?;
    let home = Home::of(args.device)?;
    refuse_saves_in_flight(common, &root)?;
    let shapes = shapes(common, args, &root)?;
    fits(common, &root, shapes.total())?;
    let wanted = Wanted {
        cost: args.cost / 100.0,
        fails_every: args.fails_every.map(|between| between.as_secs_f64()),
        daily: args.daily,
        step: args.step_ms.map(|ms| ms / 1e3),
    };
    let interrupt = Interrupt::watch()?;
    let place = Place::new(&root, "tune")?;
    let report = measured(&root, place.path(), &home, &shapes, &wanted, args.span, &interrupt)?;
    drop(place);
    if common.json {
        out::json(&report)?
    } else {
        out::print(&text::text(&report, &wanted, out::width()))?
    }
    Ok(ExitCode::SUCCESS)
}

/// Refuses to measure while a save runs: each would slow the other down.
fn refuse_saves_in_flight(common: &Common, root: &Path) -> Result<()> {
    let rows = Steps::of(&common.catalog(root)?, root)?.rows;
    match rows.iter().find(|row| row.state == Kind::InFlight) {
        None => Ok(()),
        Some(row) => {
            let why = row.why.as_deref().unwrap_or("being written");
            let what = format!("step {} is {why}: measure when the run has ended, or in another directory", row.step);
            Err(Error::new(ErrorKind::Busy, what).with_path(root))
        }
    }
}

/// Finds the tensors of the state that is to be saved.
fn shapes(common: &Common, args: &Args, root: &Path) -> Result<Shapes> {
    if let (Some(bytes), Some(tensors)) = (args.bytes, args.tensors) {
        let each = (bytes / tensors).max(4) / 4 * 4;
        let mut all = vec![each; tensors as usize];
        all[0] += bytes.saturating_sub(each * tensors);
        return Ok(Shapes { bytes: all, source: "all of the same size".to_owned() });
    }
    let checkpoint = match &args.like {
        Some(Which::Path(path)) if is_checkpoint(path) => Some(Checkpoint::open(path)?),
        Some(Which::Step(step)) => Some(common.catalog(root)?.checkpoint(*step)?),
        Some(Which::Path(path) | Which::In(path, _)) => common.catalog(path)?.latest()?,
        None => common.catalog(root)?.latest()?,
    };
    let Some(checkpoint) = checkpoint else {
        let what = "no step says what the program saves: give --like STEP, or --bytes SIZE and --tensors N";
        return Err(Error::new(ErrorKind::Invalid, what).with_path(root));
    };
    let bytes: Vec<u64> = checkpoint.tensors()?.map(|tensor| tensor.bytes).filter(|bytes| *bytes > 0).collect();
    if bytes.is_empty() {
        let what = "the step has no tensors: give --like STEP, or --bytes SIZE and --tensors N";
        return Err(Error::new(ErrorKind::Invalid, what).with_path(checkpoint.path()));
    }
    Ok(Shapes { bytes, source: format!("as in step {}", checkpoint.step()) })
}

/// Checks the free space: a run keeps a step until the next one is durable, so it needs space for two. The
/// space of the newest step of the root counts as available, because the run has it already.
fn fits(common: &Common, root: &Path, bytes: u64) -> Result<()> {
    let newest = common.catalog(root)?.latest()?;
    let there: u64 = newest
        .map(|newest| Ok::<_, Error>(newest.tensors()?.map(|tensor| tensor.bytes).sum()))
        .transpose()?
        .unwrap_or(0);
    let free = free(root)?;
    if bytes.saturating_mul(2) <= free.saturating_add(there) {
        return Ok(());
    }
    let (bytes, free) = (size::shown(bytes), size::shown(free));
    let there = if there > 0 { format!(", and the newest step takes {}", size::shown(there)) } else { String::new() };
    let what = format!(
        "two steps of {bytes} do not fit, {free} are free{there}: a run needs room for its newest step and the one \
         that it is writing"
    );
    Err(Error::new(ErrorKind::NoSpace, what).with_path(root))
}

fn free(root: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(root)
        .map_err(|e| Error::io("cannot ask how much space is free", e.into()).with_path(root))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// Returns the memory that programs can get without swapping.
fn memory_to_spare() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().split(' ').next()?.parse::<u64>().ok());
    kib.map_or(u64::MAX, |kib| kib << 10)
}

fn measured(
    root: &Path,
    dir: &Path,
    home: &Home,
    shapes: &Shapes,
    wanted: &Wanted,
    span: Duration,
    interrupt: &Interrupt,
) -> Result<Report> {
    let began = Instant::now();
    let bar = out::progress(4);
    let next = |what: &'static str| {
        bar.inc(1);
        bar.set_message(what);
    };
    bar.set_message("the disk");
    let mut memory = Memory::new(128 << 20);
    let share = |tenths: u32| span / 10 * tenths;
    let compared = limit::compare(dir, share(3), &mut memory, || interrupt.check())?;
    let (mut tails, mut written) = (compared.tails, compared.written);
    let (more, bytes) = measure::commits(dir, share(1), &mut memory, interrupt)?;
    drop(memory);
    tails.extend(more);
    written += bytes;
    let longest = tails.iter().max().map_or(0.0, Duration::as_secs_f64);
    next("memory");
    let (copy, digest) = measure::memory(share(1), interrupt)?;
    let settled = advice::settings(&compared.loops, longest, memory_to_spare());
    next("the bus");
    let bus = match home.gpu() {
        Some(gpu) => Some(measure::bus(gpu, settled.settings.chunk, share(1), interrupt)?),
        None => None,
    };
    next("saves");
    let staging = bus.as_ref().map_or(1.0 / (1.0 / copy + 1.0 / digest), |bus| bus.chunked_bytes_per_second);
    let rate = compared.loops[0].bytes_per_second.min(staging);
    let (each, spare) = ((rate * share(1).as_secs_f64()) as u64, memory_to_spare() / 4);
    let most = each.min(spare).min(measure::SAVE_MOST).min(free(root)? / 4).max(1 << 20);
    let whole = shapes.total();
    let saved = shapes.of(whole.min(most));
    let saves = measure::saves(dir, home, &settled.settings, &saved, share(3), interrupt)?;
    bar.finish_and_clear();
    let saved_bytes = saves[0].1.bytes;
    written += saved_bytes * (saves.len() as u64 + 1);
    let longest_of = |time: &dyn Fn(&(Duration, ashore::Committed)) -> Duration| {
        saves.iter().map(time).max().unwrap_or_default().as_secs_f64()
    };
    let tail = longest_of(&|(_, committed)| committed.tail);
    let save = Save {
        call: longest_of(&|(call, _)| *call),
        staged: longest_of(&|(_, committed)| committed.staged),
        durable: longest_of(&|(_, committed)| committed.durable),
        tail,
        bytes: saved_bytes,
    };
    let save = save.scaled(whole, settled.settings.arena, staging);
    let measured = Measured {
        seconds: began.elapsed().as_secs_f64(),
        written_bytes: written,
        loops: compared.loops,
        copy_bytes_per_second: copy,
        digest_bytes_per_second: digest,
        bus,
        commits: tails.len() + saves.len(),
        commit_seconds: longest.max(tail),
        call_seconds: save.call,
        staged_seconds: save.staged,
        durable_seconds: save.durable,
    };
    let stall = save.call + (save.staged - save.call - wanted.step.unwrap_or(0.0)).max(0.0);
    let interval = advice::interval(stall, save.durable, whole, wanted);
    Ok(Report {
        path: root.canonicalize().unwrap_or_else(|_| root.to_owned()),
        device: home.told(),
        simulated: home.simulated(),
        state: Saved {
            bytes: whole,
            tensors: shapes.bytes.len() as u64,
            source: shapes.source.clone(),
            saved_bytes: saved_bytes.min(whole),
        },
        measured,
        code: advice::code(&settled.settings),
        environment: advice::environment(&settled.list),
        settings: settled.list,
        interval,
    })
}

/// The times of a save, in seconds.
struct Save {
    call: f64,
    staged: f64,
    durable: f64,
    tail: f64,
    bytes: u64,
}

impl Save {
    /// Returns the times of a save of `bytes`. Writing time grows with the bytes. Tensors are free when the
    /// last byte is in the arena, which is ahead of the disk by its size; bytes reach the arena at `staging`
    /// bytes a second.
    fn scaled(self, bytes: u64, arena: u64, staging: f64) -> Self {
        if bytes <= self.bytes {
            return self;
        }
        let writing = (self.durable - self.tail).max(1e-9);
        let rate = self.bytes as f64 / writing;
        let behind = bytes.saturating_sub(arena) as f64 / rate;
        let staged = (bytes as f64 / staging).max(behind).max(self.staged);
        Self { staged, durable: bytes as f64 / rate + self.tail, bytes, ..self }
    }
}
