//! The `ashore` program: trains a demo that checkpoints itself, and lists, inspects, verifies, prunes and measures
//! checkpoints. Data goes to stdout, progress to stderr.

mod adamw;
mod age;
mod bench;
mod demo;
mod device;
mod gpu;
mod inspect;
mod limit;
mod ls;
mod out;
mod prune;
mod remnants;
mod rng;
mod size;
mod verify;

use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;

/// Where `demo` writes, and the other verbs look, unless told otherwise.
const DEMO_DIR: &str = "ashore-demo";

/// Checkpoints of training programs: durable, never torn, readable by stock tools.
#[derive(Parser)]
#[command(
    name = "ashore",
    version,
    args_override_self = true,
    max_term_width = 100,
    after_help = "Exit status: 0 ok, 1 failure, 2 usage, 3 verify found damage."
)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    verb: Verb,
}

/// What all verbs take.
#[derive(Args)]
pub struct Common {
    /// The directory of checkpoints [default: ashore-demo; for bench the current directory]
    #[arg(long, global = true, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Where the state lives: auto, host or cuda:N
    #[arg(long, global = true, value_name = "DEVICE", default_value = "auto")]
    device: ashore::DeviceChoice,
    /// Memory taken for staging, such as 256MiB [default: demo 8MiB, bench 256MiB]
    #[arg(long, global = true, value_name = "SIZE", value_parser = size::parse)]
    arena: Option<u64>,
    /// Print one JSON value on stdout instead of text
    #[arg(long, global = true)]
    json: bool,
}

impl Common {
    /// The directory of checkpoints.
    pub fn root(&self) -> PathBuf {
        self.dir.clone().unwrap_or_else(|| DEMO_DIR.into())
    }
}

#[derive(Subcommand)]
enum Verb {
    /// Train a small model while checkpointing, then restore and prove the bytes
    Demo(demo::Args),
    /// List checkpoints, newest last
    Ls,
    /// Show what a checkpoint holds
    Inspect(inspect::Args),
    /// Read every byte of a checkpoint and name all damage
    Verify(verify::Args),
    /// Delete old checkpoints; says what it would delete unless --yes is given
    Prune(prune::Args),
    /// Measure against the machine's own limits
    Bench(bench::Args),
    /// Serve a training program that saves by a writer process; started by that program
    #[command(hide = true)]
    Writer,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let common = &cli.common;
    let ended = match &cli.verb {
        Verb::Demo(args) => demo::run(common, args),
        Verb::Ls => ls::run(common),
        Verb::Inspect(args) => inspect::run(common, args),
        Verb::Verify(args) => verify::run(common, args),
        Verb::Prune(args) => prune::run(common, args),
        Verb::Bench(args) => bench::run(common, args),
        Verb::Writer => ashore::compat::torch::serve().map(|()| ExitCode::SUCCESS),
    };
    ended.unwrap_or_else(|error| {
        out::complain(&format!("{error:#}"));
        ExitCode::FAILURE
    })
}
