//! `ashore bench`: figures beside the machine's own limit, measured alternately in the same run.

mod gpu;
mod limits;
mod null;
mod pairs;
mod ranks;
pub mod report;
mod restore;
mod save;
mod staging;
mod usage;
pub mod workload;

pub use gpu::{State as DeviceState, Way, pass as bus_pass};
pub use save::remove;

use crate::device::Home;
use crate::place::Place;
use crate::{Common, on_disk, out, size};
use ashore::{Builder, CheckpointExecutor, Engine, Error, ErrorKind, Priority, Result};
use clap::ValueEnum;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use workload::{State, Workload};

const PATIENCE: Duration = Duration::from_secs(10 * 60);

/// The flags of `bench`.
#[derive(clap::Args)]
pub struct Args {
    /// What to measure
    #[arg(value_enum)]
    what: What,
    /// The directory to measure [default: the current directory] (same as --dir)
    #[arg(value_name = "DIR")]
    root: Option<PathBuf>,
    /// What to save
    #[arg(long, value_enum, default_value = "large")]
    workload: Workload,
    /// The fraction of the workload to save
    #[arg(long, value_name = "F", default_value_t = 1.0, value_parser = scale)]
    scale: f64,
    /// Compare at most N times; fewer if the result is clear earlier
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Bytes per chunk [default: 8MiB]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    chunk: Option<u64>,
    /// Number of writer threads
    #[arg(long, value_name = "N")]
    writers: Option<usize>,
    /// Number of shard files
    #[arg(long, value_name = "N")]
    files: Option<usize>,
    /// Save one checkpoint by N processes at once, each its share; --arena and --writers are of each
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256), conflicts_with = "report")]
    ranks: Option<u32>,
    /// What the first process tells a rank that it starts: its number and the run's token
    #[arg(long, hide = true, num_args = 2, value_names = ["RANK", "TOKEN"])]
    rank: Option<Vec<String>>,
    /// How to write: auto, pwrite or uring
    #[arg(long, value_name = "ENGINE")]
    engine: Option<Engine>,
    /// The I/O priority of writers: normal or low
    #[arg(long, value_name = "PRIORITY")]
    priority: Option<Priority>,
    /// Do not measure the machine's limit
    #[arg(long)]
    no_limit: bool,
    /// On a GPU: milliseconds of a training step [default: 300]
    #[arg(long, value_name = "MS", value_parser = milliseconds)]
    step_ms: Option<f64>,
    /// On a GPU: save every N steps [default: 10]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1000))]
    every: Option<u64>,
    /// On a GPU: replay the steps as graphs
    #[arg(long)]
    graph: bool,
    /// On a GPU: scratch memory for late copies at fences [default: none]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    scratch: Option<u64>,
    /// On a GPU: streams wait at fences for a value in memory, so that a failed save can release them
    #[arg(long)]
    memory_waits: bool,
    /// On a GPU: compare only ways to copy the state: gathered, batched, both, or tensor by tensor
    #[arg(long, conflicts_with_all = ["graph", "every", "no_limit"])]
    ways: bool,
    /// Write an HTML page with the phases of every save over time
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// The limits of disk and memory, without this library
    Limits,
    /// Copying and digesting the state, beside one plain copy of it; writes nothing
    Staging,
    /// Digesting, writing and committing what is already in the arena, as from a GPU
    Write,
    /// Restoring, with every byte checked
    Restore,
    /// Saving, from the call until durable
    Save,
}

fn scale(text: &str) -> Result<f64, String> {
    let scale = text.parse().ok().filter(|scale| (1e-6..=1e6).contains(scale));
    scale.ok_or_else(|| "the scale must be a number, such as 0.25".to_owned())
}

fn milliseconds(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number| (0.01..=60_000.0).contains(number));
    number.ok_or_else(|| "milliseconds must be a number, such as 300, of at most one minute".to_owned())
}

/// Names and values of figures, in order, for a table and for JSON.
pub struct Figures(Vec<(&'static str, Value)>);

/// Runs a benchmark in its own directory under `--dir`, which is deleted afterwards.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let parent = match (&args.root, &common.dir) {
        (None, None) => ".".into(),
        // A rank gets the arguments of the process that started it, and shares its directory.
        (_, Some(dir)) if args.rank.is_some() => dir.clone(),
        (given, _) => common.root_at(given.as_deref())?,
    };
    on_disk(&parent)?;
    let home = match args.what {
        What::Limits | What::Staging => Home::of(common.device)?,
        What::Write | What::Restore | What::Save => Home::only_host(common.device, "this benchmark")?,
    };
    if let (Some(world), Some(rank)) = (args.ranks, &args.rank) {
        ranks::serve(&Bench { dir: &parent, common, args, home: &home }, world, rank)?;
        return Ok(ExitCode::SUCCESS);
    }
    if args.ranks.is_some() && args.what != What::Save {
        return Err(Error::new(ErrorKind::Invalid, "only saves have several ranks: bench save --ranks N"));
    }
    let place = Place::new(&parent, "bench")?;
    let bench = Bench { dir: place.path(), common, args, home: &home };
    if home.gpu().is_none() {
        bench.refuse_what_needs_a_gpu()?;
    }
    if let Some(world) = args.ranks {
        return ranks::run(&bench, world)?.print(common.json);
    }
    let figures = match (args.what, home.gpu()) {
        (What::Limits, None) => limits::run(&bench)?,
        (What::Limits, Some(gpu)) => gpu::limits(&bench, gpu)?,
        (What::Staging, None) => staging::run(&bench)?,
        (What::Staging, Some(gpu)) if args.ways => gpu::ways(&bench, gpu)?,
        (What::Staging, Some(gpu)) => gpu::staging(&bench, gpu)?,
        (What::Write | What::Save, _) => save::run(&bench)?,
        (What::Restore, _) => restore::run(&bench)?,
    };
    figures.print(common.json)
}

/// The sizes of the arena and of a chunk, in bytes.
struct Sizes {
    arena: u64,
    chunk: u64,
}

/// The parameters of a benchmark.
struct Bench<'a> {
    dir: &'a Path,
    common: &'a Common,
    args: &'a Args,
    home: &'a Home,
}

impl Bench<'_> {
    fn state(&self) -> State {
        State::new(self.args.workload, self.args.scale)
    }

    fn sizes(&self) -> Sizes {
        let arena = self.common.arena.unwrap_or(256 << 20);
        Sizes { arena, chunk: self.args.chunk.unwrap_or((8 << 20).min(arena / 2 / 4096 * 4096)) }
    }

    /// Refuses flags that need a GPU. Benchmarks on the host have no training steps.
    fn refuse_what_needs_a_gpu(&self) -> Result<()> {
        let Args { step_ms, every, graph, scratch, memory_waits, ways, .. } = self.args;
        let given = [
            ("--step-ms", step_ms.is_some()),
            ("--every", every.is_some()),
            ("--graph", *graph),
            ("--scratch", scratch.is_some()),
            ("--memory-waits", *memory_waits),
            ("--ways", *ways),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            None => Ok(()),
            Some((flag, _)) => {
                let why = format!("{flag} needs state on a GPU, but it is on the host device={}", self.home);
                Err(Error::new(ErrorKind::Invalid, why))
            }
        }
    }

    /// Configures an executor by the flags.
    fn builder(&self) -> Builder {
        let Args { writers, files, engine, priority, .. } = self.args;
        let Sizes { arena, chunk } = self.sizes();
        let mut builder = self.home.builder(CheckpointExecutor::builder(self.dir)).arena(arena).chunk(chunk);
        // The state does not change from save to save, but every save must write it.
        builder = builder.links(false);
        if let Some(writers) = *writers {
            builder = builder.writers(writers);
        }
        if let Some(files) = *files {
            builder = builder.files(files);
        }
        if let Some(engine) = *engine {
            builder = builder.engine(engine);
        }
        if let Some(priority) = *priority {
            builder = builder.priority(priority);
        }
        builder
    }

    /// Returns a random seed for the order of measurements, different on each call.
    fn seed(&self) -> u64 {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        since.map_or(1, |time| time.as_nanos() as u64)
    }
}

impl Figures {
    fn print(self, as_json: bool) -> Result<ExitCode> {
        if as_json {
            let named = self.0.into_iter().map(|(name, value)| (name.to_owned(), value));
            out::json(&named.collect::<serde_json::Map<_, _>>())?;
        } else {
            out::print(&self.table())?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Removes all figures made of times, which mean nothing on the simulated driver: counts and sizes are
    /// whole numbers, and every other number was measured.
    fn forget_times(&mut self) {
        for (name, value) in &mut self.0 {
            let measured = value.is_f64() && !name.ends_with("_wanted");
            if measured || name.ends_with("_loop") || name.ends_with("_loops") {
                *value = Value::Null;
            }
        }
    }

    fn rows(&self) -> Vec<(String, String)> {
        let shown = |(name, value): &(&str, Value)| {
            let (name, unit) = ["_bytes_per_second", "_seconds_per_gb", "_seconds", "_ms", "_bytes", ""]
                .iter()
                .find_map(|unit| Some((name.strip_suffix(unit)?, *unit)))
                .unwrap_or((name, ""));
            let number = value.as_f64().unwrap_or(0.0);
            let text = match (unit, value) {
                _ if value.is_null() => "-".to_owned(),
                ("_bytes_per_second", _) => format!("{:.2} GB/s", number / 1e9),
                ("_seconds_per_gb", _) => format!("{number:.3} s/GB"),
                ("_seconds", _) => format!("{number:.3} s"),
                ("_ms", _) => format!("{number:.2} ms"),
                ("_bytes", _) => size::shown(number as u64),
                (_, Value::Number(n)) if n.is_f64() => format!("{number:.3}"),
                (_, Value::String(text)) => text.clone(),
                (_, other) => other.to_string(),
            };
            let name = name.replace('_', " ");
            (if unit == "_bytes_per_second" { name + " rate" } else { name }, text)
        };
        self.0.iter().map(shown).collect()
    }

    fn table(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(comfy_table::presets::NOTHING);
        table.add_rows(self.rows().into_iter().map(|(name, value)| [name, value]));
        format!("{}\n", table.trim_fmt())
    }
}
