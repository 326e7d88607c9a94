//! `ashore demo`: trains a small model with checkpoints, then restores it and verifies the bytes.
//!
//! Two models train: one saves, its *twin* does not. They alternate in blocks (save, plain, plain, save,
//! ...), so that both step times are measured side by side on a machine whose speed drifts. Because the
//! arithmetic repeats bit for bit, the twin is also the uninterrupted run that all results must equal. On a
//! GPU both have their state and optimizer there, and the restored state is also compared with the same steps
//! computed on the host alone.

mod arithmetic;
mod blocks;
mod model;
mod picture;
mod report;
mod resident;
mod run;
mod text;
mod training;

use crate::device::Home;
use crate::limit::{Config, Memory, Scratch};
use crate::out;
use crate::{Common, on_disk, size, words};
use ashore::catalog::{Found, Problem};
use ashore::{CheckpointExecutor, Error, ErrorKind, Result};
use blocks::Plan;
use model::Size;
use report::{Measured, Opening, Report};
use run::{Run, Saved, Trainer};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use text::Corpus;
use training::Training;

/// Number of raw loops that measure the disk in one run.
const LIMIT_ROUNDS: usize = 8;

/// How long unfinished saves may take at the end.
const PATIENCE: Duration = Duration::from_secs(10 * 60);

/// The flags of `demo`.
#[derive(clap::Args)]
pub struct Args {
    /// The directory of checkpoints (same as --dir)
    #[arg(value_name = "DIR")]
    root: Option<PathBuf>,
    /// Train up to this step; if the directory exists, up to the next multiple of it [default: as many as
    /// take some 10 s, at most 200]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..1 << 40))]
    steps: Option<u64>,
    /// Save every K steps, and after the last
    #[arg(long, value_name = "K", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..1 << 40))]
    every: u64,
    /// The size of the model
    #[arg(long, value_enum, default_value_t = Size::Standard)]
    model: Size,
    /// Write the page of the run, which `ashore report` makes, when the demo has ended
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Draw one save and the training steps beside it, as an SVG
    #[arg(long, hide = true, value_name = "FILE")]
    picture: Option<PathBuf>,
    /// The unit of copying and writing
    #[arg(long, hide = true, value_name = "SIZE", value_parser = size::parse)]
    chunk: Option<u64>,
    /// The seed of the initial weights and the order of examples
    #[arg(long, hide = true, default_value_t = 1)]
    seed: u64,
}

/// Runs the demo. Returns a failure status if any check failed.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let root = common.root_at(args.root.as_deref())?;
    on_disk(&root)?;
    let home = Home::of(common.device)?;
    let arena = common.arena.unwrap_or(8 << 20);
    let chunk = args.chunk.unwrap_or_else(|| (arena / 4).clamp(4096, 2 << 20) / 4096 * 4096);
    let executor = home.builder(CheckpointExecutor::builder(&root)).arena(arena).chunk(chunk).keep_last(2).build()?;
    let root = root.canonicalize().unwrap_or(root);

    let corpus = Corpus::new();
    let found = executor.latest_valid()?.map(|Found { checkpoint, skipped, .. }| {
        for Problem { step, error, .. } in skipped {
            out::complain(&format!(
                "step {step} is skipped, and replaced when training reaches it: {}",
                words::of(&error)
            ));
        }
        checkpoint
    });
    let fresh = Training::new(args.model, args.seed, &corpus);
    let training = match &found {
        Some(checkpoint) => fresh.resumed(checkpoint)?,
        None => fresh,
    };
    let start = training.step;
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(4);
    let gpu = home.gpu();
    let steps = match args.steps {
        Some(steps) => steps,
        None => fitting(&mut Trainer::new(training.copied(), gpu, &corpus, threads)?, args.every)?,
    };
    let plan = Plan::new(start, (start / steps + 1).saturating_mul(steps), args.every);
    let opening = Opening {
        root: &root,
        home: &home,
        arena,
        chunk,
        bytes: training.bytes(),
        parameters: training.parameters(),
        start,
        goal: plan.goal,
        every: args.every,
        resumed: found.is_some(),
    };
    if !common.json {
        out::print(&opening.to_string())?;
    }

    let mut twin = Trainer::new(training.copied(), gpu, &corpus, threads)?;
    let mut witness = gpu.map(|_| twin.on_host(training.copied()));
    let run = Run::new(&executor, Trainer::new(training, gpu, &corpus, threads)?, args.every, plan.goal);
    let trained = take_turns(run, &mut twin, plan, &opening)?;
    let told = |text: &str| if common.json { Ok(()) } else { out::print(text) };
    told(&opening.trained(&trained))?;
    let proof = prove(&executor, &mut twin, witness.as_mut(), plan, &trained, &opening, &told)?;
    executor.shutdown(PATIENCE)?;

    if let Some(path) = &args.picture {
        picture::write(&trained.blocks, path)?;
    }
    if let Some(path) = &args.report {
        crate::report::write(&root, path)?;
        told(&out::wrapped("page       ", &out::printable(&path.display().to_string())))?;
    }
    let report = Report { opening, trained, proof };
    if common.json {
        out::json(&report.json())?
    } else {
        told(&report.verdict())?
    }
    Ok(if report.verified() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The time of a run if the user gives no number of steps, and the maximum number of its steps.
const FITTING: Duration = Duration::from_secs(7);
const STEPS_MAX: u64 = 200;

/// Returns how many steps fit into some 10 s. The demo trains each step twice, and some steps again for the
/// proof. It makes at least three saves.
fn fitting(trial: &mut Trainer<'_>, every: u64) -> Result<u64> {
    let step = trial.training().step;
    trial.advance(step + 1)?;
    let began = Instant::now();
    trial.advance(step + 4)?;
    Ok(steps_that_fit(began.elapsed() / 3, every))
}

fn steps_that_fit(each: Duration, every: u64) -> u64 {
    let steps = (FITTING.as_secs_f64() / (2.0 * each.as_secs_f64().max(1e-6))) as u64;
    let saves = (steps.min(STEPS_MAX) / every).max(3);
    saves.saturating_mul(every)
}

/// The results of the training.
pub struct Trained {
    pub saves: Vec<Saved>,
    pub blocks: Vec<run::Block>,
    pub measured: Measured,
    /// The losses up to the goal.
    pub curve: Vec<f32>,
    /// The losses of the last block, which begins at the goal.
    tail: Vec<f32>,
    /// A copy of the state at the goal, which is saved last.
    kept: Option<Training>,
    /// Saving had no effect on training: the twin has the same losses and the same state.
    pub undisturbed: bool,
}

/// Trains both models block by block, and alternates which is first.
fn take_turns(mut run: Run<'_>, twin: &mut Trainer<'_>, plan: Plan, opening: &Opening<'_>) -> Result<Trained> {
    let bar = out::progress(plan.goal);
    let mut measured = Measured::default();
    let config = Config::threads(opening.chunk, run.writers());
    let mut memory = Memory::new(opening.chunk * run.writers() as u64);
    let (mut curve, mut tail, mut kept, mut undisturbed) = (Vec::new(), Vec::new(), None, true);
    for (i, block) in plan.blocks().enumerate() {
        if block.from == plan.goal {
            kept = Some(run.trainer.settled()?);
        }
        let first = if i % 2 == 1 { Some(run.advance(block.to, &bar)?) } else { None };
        let began = Instant::now();
        let expected = twin.advance(block.to)?;
        let without = began.elapsed();
        let (losses, with) = first.map_or_else(|| run.advance(block.to, &bar), Ok)?;

        measured.pair(&block, without, with, plan.full);
        if measured.limits.len() < LIMIT_ROUNDS {
            measured.limits.push(Scratch::new(opening.root, opening.bytes)?.write(&config, &mut memory)?);
        }
        undisturbed &= same_bits(&losses, &expected);
        if block.from < plan.goal {
            curve.extend(losses);
        } else {
            tail = losses;
        }
    }
    bar.finish_and_clear();
    undisturbed &= run.trainer.settled()?.same_bits(&twin.settled()?);
    Ok(Trained { saves: run.saved, blocks: run.blocks, measured, curve, tail, kept, undisturbed })
}

/// The checks of the newest checkpoint.
pub struct Proof {
    pub restored: u64,
    pub path: PathBuf,
    pub restored_in: Duration,
    pub bytes_equal: bool,
    pub curve_continues: bool,
    /// On a GPU: the host computed the same state.
    pub recomputed: Option<bool>,
}

/// Restores the newest step, compares it with the copy of the saved state, and continues training from it.
/// Reports each check when it is done.
fn prove(
    executor: &CheckpointExecutor,
    twin: &mut Trainer<'_>,
    witness: Option<&mut Trainer<'_>>,
    plan: Plan,
    trained: &Trained,
    opening: &Opening<'_>,
    told: &impl Fn(&str) -> Result<()>,
) -> Result<Proof> {
    let began = Instant::now();
    let newest = executor.latest()?.ok_or_else(|| Error::new(ErrorKind::NotFound, "the last step is gone"))?;
    let resumed = twin.training().resumed(&newest)?;
    let restored_in = began.elapsed();
    let bytes_equal = newest.step() == plan.goal && trained.kept.as_ref().is_some_and(|kept| resumed.same_bits(kept));
    let (restored, path) = (newest.step(), newest.path().to_owned());
    told(&opening.restored(restored, restored_in, &path))?;
    told(&report::tick(
        bytes_equal,
        "restored bytes identical: read from the disk, each compared with the saved state",
    ))?;
    let again_on_host = |witness: &mut Trainer<'_>| {
        witness.advance(plan.goal)?;
        Ok::<_, Error>(witness.settled()?.same_bits(&resumed))
    };
    let recomputed = witness.map(again_on_host).transpose()?;
    if let Some(recomputed) = recomputed {
        let what = "recomputed on the host: all steps repeated without the GPU give the same state";
        told(&report::tick(recomputed, what))?;
    }

    let mut second = twin.on_host(resumed);
    let again = second.advance(plan.end())?;
    let curve_continues = same_bits(&again, &trained.tail) && second.settled()?.same_bits(&twin.settled()?);
    let steps = plan.end() - plan.goal;
    let what =
        format!("training continues the same: {steps} steps from the restored state, losses and state bit for bit");
    told(&report::tick(curve_continues, &what))?;
    let what = "saving changed nothing: the twin that never saved has the same losses and the same state";
    told(&report::tick(trained.undisturbed, what))?;
    Ok(Proof { restored, path, restored_in, bytes_equal, curve_continues, recomputed })
}

/// Losses are equal if their bits are.
fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.iter().map(|x| x.to_bits()).eq(b.iter().map(|x| x.to_bits()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_chosen_to_fit_ten_seconds_with_three_saves_at_least() {
        let steps = |ms, every| steps_that_fit(Duration::from_millis(ms), every);
        assert_eq!([steps(1, 10), steps(50, 10), steps(50, 25), steps(5000, 10)], [200, 70, 75, 30]);
        assert!(50 * 2 * steps(50, 10) <= 10_000, "each step is trained twice");
    }
}
