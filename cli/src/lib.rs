//! The `ashore` program: trains a demo with checkpoints, and lists, inspects, verifies, copies, converts,
//! prunes and measures checkpoints. Data goes to stdout, progress to stderr.

mod adamw;
mod age;
mod bench;
mod chain;
mod convert;
mod copy;
mod damage;
mod demo;
mod device;
mod diff;
mod element;
mod gpu;
mod inspect;
mod limit;
mod ls;
mod manual;
mod mark;
mod out;
mod place;
mod prune;
mod remnants;
mod repair;
mod report;
mod rng;
mod sharers;
mod size;
mod stats;
mod steps;
mod tune;
mod verify;
mod watch;
mod when;
mod which;
mod words;

use ashore::internal::storage::is_url;
use ashore::{Catalog, DeviceChoice, Error, ErrorKind, Result};
use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::LazyLock;

/// The default directory: `demo` writes there and the other commands read it.
const DEMO_DIR: &str = "ashore-demo";

/// The exit status for a damaged checkpoint.
const DAMAGED: u8 = 3;

/// Checkpoints of training programs: durable, never torn, readable by stock tools.
#[derive(Parser)]
#[command(
    name = "ashore",
    version = VERSION.as_str(),
    args_override_self = true,
    max_term_width = 100,
    after_help = "Exit status: 0 ok, 1 failure, 2 usage, 3 a checkpoint is damaged."
)]
struct Cli {
    /// The directory of checkpoints [default: ashore-demo; for bench the current directory]
    #[arg(long, global = true, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print one JSON value on stdout instead of text
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

/// The version of the program, and the GPU kernels in it.
static VERSION: LazyLock<String> =
    LazyLock::new(|| format!("{} kernels {}", env!("CARGO_PKG_VERSION"), ashore::KERNELS));

/// Flags of the commands that save.
#[derive(Args, Clone, Copy)]
struct Saving {
    /// Where the state is: auto, host or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: DeviceChoice,
    /// Host memory for staging, such as 256MiB [default: demo 8MiB, bench 256MiB]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    arena: Option<u64>,
}

/// Settings shared by all commands.
pub(crate) struct Common {
    dir: Option<PathBuf>,
    json: bool,
    device: DeviceChoice,
    arena: Option<u64>,
}

impl Common {
    fn new(cli: &Cli) -> Self {
        let saving = match &cli.verb {
            Verb::Demo { saving, .. } | Verb::Bench { saving, .. } => *saving,
            _ => Saving { device: DeviceChoice::Auto, arena: None },
        };
        Self { dir: cli.dir.clone(), json: cli.json, device: saving.device, arena: saving.arena }
    }

    /// The directory of checkpoints.
    pub fn root(&self) -> PathBuf {
        self.dir.clone().unwrap_or_else(|| DEMO_DIR.into())
    }

    /// Opens the steps of a directory.
    ///
    /// # Errors
    /// `NotFound` when there is no such directory.
    pub fn catalog(&self, root: &Path) -> Result<Catalog> {
        Catalog::open(root)
    }

    /// Returns the directory of checkpoints, given after the command or with `--dir`.
    ///
    /// # Errors
    /// `Invalid` when both are given.
    pub fn root_at(&self, given: Option<&Path>) -> Result<PathBuf> {
        match (given, &self.dir) {
            (Some(given), Some(dir)) => {
                let (given, dir) = (given.display(), dir.display());
                let what = format!("give the directory once: {given} after the command, or --dir {dir}");
                Err(Error::new(ErrorKind::Invalid, what))
            }
            (Some(given), None) => Ok(given.to_owned()),
            (None, _) => Ok(self.root()),
        }
    }
}

/// Refuses an object store, because the caller is a command that measures a disk.
///
/// # Errors
/// `Invalid` when `dir` is the URL of an object store.
fn on_disk(dir: &Path) -> Result<()> {
    if !is_url(dir) {
        return Ok(());
    }
    let what = "this command measures disks, not object stores: give a directory";
    Err(Error::new(ErrorKind::Invalid, what).with_path(dir))
}

#[derive(Subcommand)]
enum Verb {
    /// Train a small model with checkpoints, then restore it and verify the bytes
    Demo {
        #[command(flatten)]
        saving: Saving,
        #[command(flatten)]
        args: demo::Args,
    },
    /// List checkpoints, newest last
    Ls(ls::Args),
    /// Show the contents of a checkpoint; --stats reads its tensors
    Inspect(inspect::Args),
    /// Read every byte of a checkpoint, and report and locate all damage
    Verify(verify::Args),
    /// Show how two checkpoints differ
    Diff(diff::Args),
    /// Undo flipped bits where exactly one explanation exists; without --yes, only show them
    Repair(repair::Args),
    /// Show what happens in a directory of checkpoints, as it happens
    Watch(watch::Args),
    /// Mark a step bad, so that restarts pass over it, or as one to keep
    Mark(mark::Args),
    /// Write a checkpoint in another layout: for Hugging Face's tools, or for another number of ranks
    Convert(convert::Args),
    /// Write what changed between two steps, a small part of the later one
    Delta(chain::DeltaArgs),
    /// Make the later step of an older one and deltas
    Apply(chain::ApplyArgs),
    /// List published versions; exit 3 when a version cannot be built
    Chain(chain::ChainArgs),
    /// Copy published versions as they come
    Follow(chain::FollowArgs),
    /// Copy checkpoints from a directory to another, as the same attempts
    Copy(copy::Args),
    /// Delete old checkpoints; without --yes, only show what would be deleted
    Prune(prune::Args),
    /// Write the page of a run: what its saves cost, where their time goes, what would be lost now
    Report(report::Args),
    /// Measure a directory's disk for 20 s, and say which settings suit it and how often to save
    Tune(tune::Args),
    /// Measure speed against the machine's own limits
    Bench {
        #[command(flatten)]
        saving: Saving,
        #[command(flatten)]
        args: bench::Args,
    },
    /// Print completions of a shell
    Completions(manual::Args),
    /// Print the manual, for man
    Man,
    /// Save for a training program, which starts this process
    #[command(hide = true)]
    Writer,
}

/// Runs the program with these arguments, of which the first is its name. Wrong arguments end the process.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = Cli::parse_from(arguments);
    let common = &Common::new(&cli);
    let ended = match &cli.verb {
        Verb::Demo { args, .. } => demo::run(common, args),
        Verb::Ls(args) => ls::run(common, args),
        Verb::Inspect(args) => inspect::run(common, args),
        Verb::Verify(args) => verify::run(common, args),
        Verb::Diff(args) => diff::run(common, args),
        Verb::Watch(args) => watch::run(common, args),
        Verb::Completions(args) => manual::completions(args),
        Verb::Man => manual::man(),
        Verb::Repair(args) => repair::run(common, args),
        Verb::Mark(args) => mark::run(common, args),
        Verb::Convert(args) => convert::run(common, args),
        Verb::Delta(args) => chain::delta(common, args),
        Verb::Apply(args) => chain::apply(common, args),
        Verb::Chain(args) => chain::chain(common, args),
        Verb::Follow(args) => chain::follow(common, args),
        Verb::Copy(args) => copy::run(common, args),
        Verb::Prune(args) => prune::run(common, args),
        Verb::Report(args) => report::run(common, args),
        Verb::Tune(args) => tune::run(common, args),
        Verb::Bench { args, .. } => bench::run(common, args),
        Verb::Writer => ashore::compat::torch::serve().map(|()| ExitCode::SUCCESS),
    };
    ended.unwrap_or_else(|error| {
        out::complain(&words::of(&error));
        if error.kind() == ErrorKind::Corrupt { ExitCode::from(DAMAGED) } else { ExitCode::FAILURE }
    })
}
