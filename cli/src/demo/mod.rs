//! `ashore demo`: trains a small model with checkpointing on, then restores and proves the bytes.
//!
//! Two models train: one saves, its *twin* does not. They take turns in blocks (save, plain, plain, save, ...), so that the
//! two step times are measured side by side on a machine whose speed drifts; and because the arithmetic repeats bit for bit,
//! the twin is also the uninterrupted run that everything else must agree with.

mod adamw;
mod arithmetic;
mod blocks;
mod model;
mod report;
mod rng;
mod run;
mod text;
mod training;

use crate::out;
use crate::{Common, limit, size};
use ashore::{CheckpointExecutor, Error, ErrorKind, Result};
use model::Size;
use report::{Measured, Report};
use run::{Run, train};
use std::process::ExitCode;
use std::time::{Duration, Instant};
use text::Corpus;
use training::Training;

/// Raw loops that measure the disk in one run.
const LIMIT_ROUNDS: usize = 8;

/// How long unfinished saves may take at the end.
const PATIENCE: Duration = Duration::from_secs(10 * 60);

/// The flags of `demo`.
#[derive(clap::Args)]
pub struct Args {
    /// Train up to this step; when the directory is there already, up to the next multiple of it
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u64).range(1..1 << 40))]
    steps: u64,
    /// Save every so many steps, and after the last
    #[arg(long, value_name = "K", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..1 << 40))]
    every: u64,
    /// How large the model is
    #[arg(long, hide = true, value_enum, default_value_t = Size::Standard)]
    model: Size,
    /// The unit of copying and writing
    #[arg(long, hide = true, value_name = "SIZE", value_parser = size::parse)]
    chunk: Option<u64>,
    /// What the first weights and the order of examples come from
    #[arg(long, hide = true, default_value_t = 1)]
    seed: u64,
}

/// Runs the demo. The exit status is a failure when something that was to be proved turned out otherwise.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let device = common.device.resolve()?;
    let root = common.root();
    let arena = common.arena.unwrap_or(8 << 20);
    let chunk = args.chunk.unwrap_or_else(|| (arena / 4).clamp(4096, 2 << 20) / 4096 * 4096);
    let executor = CheckpointExecutor::builder(&root).arena(arena).chunk(chunk).keep_last(2).build()?;
    let root = root.canonicalize().unwrap_or(root);

    let corpus = Corpus::new();
    let found = executor.latest()?;
    let fresh = Training::new(args.model, args.seed, &corpus);
    let training = match &found {
        Some(checkpoint) => fresh.resumed(checkpoint)?,
        None => fresh,
    };
    let start = training.step;
    let goal = (start / args.steps + 1).saturating_mul(args.steps);
    let plan = blocks::plan(start, goal, args.every);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4);

    let mut twin = training.copied();
    let mut unsaved = twin.gradients();
    let mut saving = Run::new(&executor, &corpus, threads, training, args.every, goal);
    let opening = report::Opening {
        root: &root,
        device,
        arena,
        chunk,
        bytes: twin.bytes(),
        parameters: twin.parameters(),
        start,
        goal,
        every: args.every,
        resumed: found.is_some(),
    };
    if !common.json {
        out::print(&opening.to_string())?;
    }

    let bar = out::progress(goal);
    let mut measured = Measured::default();
    let mut kept = None;
    let mut undisturbed = true;
    let (mut curve, mut last) = (Vec::new(), Vec::new());
    for (i, block) in plan.blocks.iter().enumerate() {
        if block.from == goal {
            kept = Some(saving.training.copied());
        }
        let mut with = None;
        let mut without = None;
        for saves in if i % 2 == 0 { [false, true] } else { [true, false] } {
            if saves {
                with = Some(saving.advance(block.to, &bar)?);
            } else {
                let began = Instant::now();
                let losses = train(&mut twin, &mut unsaved, &corpus, threads, block.to)?;
                without = Some((losses, began.elapsed()));
            }
        }
        let (Some((losses, with)), Some((expected, without))) = (with, without) else { continue };
        undisturbed &= same_bits(&losses, &expected);
        measured.pair(block, without, with, plan.full);
        if block.from < goal {
            curve.extend_from_slice(&losses);
        }
        last = losses;
        if measured.limits.len() < LIMIT_ROUNDS {
            let writers = executor.settings().writers;
            measured.limits.push(limit::write(&root, twin.bytes(), chunk, writers)?);
        }
    }
    bar.finish_and_clear();
    undisturbed &= saving.training.same_bits(&twin);

    let began = Instant::now();
    let newest = executor.latest()?.ok_or_else(|| Error::new(ErrorKind::NotFound, "the last step is gone"))?;
    let mut resumed = twin.resumed(&newest)?;
    let restored_in = began.elapsed();
    let bytes_equal = newest.step() == goal && kept.is_some_and(|kept| resumed.same_bits(&kept));
    let again = train(&mut resumed, &mut unsaved, &corpus, threads, goal + plan.tail())?;
    let curve_continues = same_bits(&again, &last) && resumed.same_bits(&twin);

    let (saves, newest_step, path) = (std::mem::take(&mut saving.saved), newest.step(), newest.path().to_owned());
    executor.shutdown(PATIENCE)?;
    let report = Report {
        opening,
        measured,
        saves,
        curve,
        tail: plan.tail(),
        restored: newest_step,
        path,
        restored_in,
        bytes_equal,
        curve_continues,
        undisturbed,
    };
    if common.json {
        out::json(&report.json())?
    } else {
        out::print(&report.to_string())?
    }
    Ok(if report.verified() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Losses are equal when their bits are.
fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.iter().map(|x| x.to_bits()).eq(b.iter().map(|x| x.to_bits()))
}
