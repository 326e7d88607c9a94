//! `ashore bench staging` on a GPU: how fast state leaves it compared to the bus's limit, and what a training
//! loop loses.
//!
//! The storage discards its data, so that the disk has no effect. Writers digest as always, and every save is
//! checked by the digests of its manifest.

use super::bus::{self, RING, Way};
use super::checking::Checking;
use super::readback::{self, Reading};
use super::state::State;
use super::training::{Block, Pending, Saved, Training, save_points};
use crate::bench::pairs::{self, Estimate, Pairs, Turn};
use crate::bench::usage::{Cpu, per_gb};
use crate::bench::{Bench, Figures, PATIENCE, null};
use crate::gpu::{Gpu, Pinned, Stream};
use crate::out::{median, quantile};
use ashore::Result;
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;

/// Training blocks with and without saves.
#[derive(Default)]
struct Blocks {
    without: Vec<Block>,
    with: Vec<Block>,
    readings: Vec<Reading>,
    /// CPU time of the stager, in the blocks with saves.
    stager: Duration,
}

/// Saves, and bare copies of as many bytes.
#[derive(Default)]
struct Rates {
    limit: Vec<f64>,
    staged: Vec<f64>,
    pairs: Pairs,
}

pub fn run(bench: &Bench<'_>, gpu: &Arc<Gpu>) -> Result<Figures> {
    let (args, sizes) = (bench.args, bench.sizes());
    let sink = null::Sink::with_tables();
    let builder = bench.builder().storage(Arc::new(sink.clone()));
    let executor = builder.scratch(args.scratch.unwrap_or(0)).memory_waits(args.memory_waits).build()?;
    let (stream, copies) = (Stream::new(gpu)?, Stream::new(gpu)?);
    let state = State::new(&stream, args.workload, args.scale)?;
    let mut pinned = Pinned::allocated(&copies, sizes.arena.min(RING))?;
    let (every, wanted) = (args.every.unwrap_or(10), args.step_ms.unwrap_or(300.0));
    let points = std::iter::once(0).chain(save_points(every));
    let mut checking = Checking::new(&state, &sink, &stream, &mut pinned, points)?;
    let mut training = Training::new(&executor, &state, &stream, every, wanted / 1e3, args.graph)?;

    // The first block plans and touches memory that later ones reuse.
    let warm = training.block(true)?;
    checking.check(&warm.saves)?;
    let step_seconds = warm.seconds / warm.steps.len() as f64;
    state.reset(&stream)?;
    stream.wait()?;
    let stretch = state.stretch()?;
    bus::pass(Way::ToHost, &stretch, &mut pinned, sizes.chunk)?;
    let bare = bus::pass(Way::ToHost, &stretch, &mut pinned, sizes.chunk)?;

    let (mut alone, mut beside) = (Rates::default(), Rates::default());
    for (rates, computing) in [(&mut alone, false), (&mut beside, true)] {
        let Rates { limit, staged, .. } = rates;
        let compute = |training: &Training<'_>| {
            if computing { training.compute_for(2.0 * bare, step_seconds) } else { Ok(()) }
        };
        let sample = |turn| {
            if turn == Turn::Limit {
                compute(&training)?;
                limit.push(bus::pass(Way::ToHost, &stretch, &mut pinned, sizes.chunk)?);
                stream.wait()?;
                return Ok(limit[limit.len() - 1]);
            }
            let pending: Pending = training.save(0)?;
            compute(&training)?;
            let saved = pending.ended()?;
            stream.wait()?;
            checking.check(std::slice::from_ref(&saved))?;
            staged.push(saved.committed.staged.as_secs_f64());
            Ok(staged[staged.len() - 1])
        };
        if !args.no_limit {
            rates.pairs = pairs::run(args.rounds, bench.seed(), sample)?;
        }
    }

    let (mut blocks, seed) = (Blocks::default(), bench.seed());
    let (loops, readings) = readback::watch(gpu, || {
        pairs::run(args.rounds, seed, |turn| {
            let before = Cpu::now();
            let block = training.block(turn == Turn::Ours)?;
            let seconds = block.seconds;
            if turn == Turn::Ours {
                blocks.stager += Cpu::now().since(before).stage;
                checking.check(&block.saves)?;
                blocks.with.push(block);
            } else {
                blocks.without.push(block);
            }
            Ok(seconds)
        })
    })?;
    blocks.readings = readings;

    let late: usize = warm.saves.iter().chain(blocks.saves()).map(|save| save.committed.late_chunks).sum();
    let mut figures = vec![
        ("workload", args.workload.name().into()),
        ("tensors", state.len().into()),
        ("bytes", state.bytes.into()),
        ("device", bench.home.to_string().into()),
        ("kernels", ashore::KERNELS.into()),
        ("simulated", gpu.simulated().into()),
        ("graph", args.graph.into()),
        ("every", every.into()),
        ("block_steps", training.steps.into()),
        ("step_ms_wanted", wanted.into()),
        ("arena_bytes", executor.arena().report().bytes.into()),
        ("arena_pinned", executor.arena().report().pinned.is_ok().into()),
        ("chunk", sizes.chunk.into()),
        ("writers", executor.settings().writers.into()),
        ("scratch_wanted", executor.settings().scratch.into()),
        ("scratch_slots", executor.device().scratch.clone().ok().into()),
        ("scratch_refused", executor.device().scratch.clone().err().into()),
        ("memory_waits", executor.device().memory_waits.clone().ok().into()),
        ("memory_waits_refused", executor.device().memory_waits.clone().err().filter(|_| args.memory_waits).into()),
        ("saves", (warm.saves.len() + blocks.saves().count() + alone.staged.len() + beside.staged.len()).into()),
        ("saves_equal", checking.checked.into()),
        ("late_chunks", late.into()),
    ];
    figures.extend(rates(&alone, &beside, state.bytes));
    figures.extend(overhead(&blocks, &loops, state.bytes, bare));
    figures.extend(calls(&blocks));
    figures.extend(readings_of(&blocks, bare * sizes.chunk as f64 / state.bytes as f64));
    let staged = state.bytes * blocks.saves().count() as u64;
    figures.push(("stage_cpu_seconds_per_gb", per_gb(blocks.stager, staged.max(1)).into()));
    let mut figures = Figures(figures);
    if gpu.simulated() {
        figures.forget_times();
    }
    drop(training);
    executor.shutdown(PATIENCE)?;
    Ok(figures)
}

impl Blocks {
    fn saves(&self) -> impl Iterator<Item = &Saved> {
        self.with.iter().flat_map(|block| &block.saves)
    }
}

type Rows = Vec<(&'static str, Value)>;

/// Figures: how fast the state left the device, without and with computation.
fn rates(alone: &Rates, beside: &Rates, bytes: u64) -> Rows {
    let rate = |seconds: &[f64]| (!seconds.is_empty()).then(|| bytes as f64 / median(seconds.iter().copied()));
    let estimate = |rates: &Rates| (!rates.pairs.ratios.is_empty()).then(|| rates.pairs.estimate());
    let (e, d) = (estimate(alone), estimate(beside));
    let of = |e: Option<Estimate>, part: fn(Estimate) -> f64| Value::from(e.map(part));
    vec![
        ("limit_bytes_per_second", rate(&alone.limit).into()),
        ("staged_bytes_per_second", rate(&alone.staged).into()),
        ("fraction_of_limit", of(e, |e| e.median)),
        ("fraction_low", of(e, |e| e.low)),
        ("fraction_high", of(e, |e| e.high)),
        ("computing_limit_bytes_per_second", rate(&beside.limit).into()),
        ("computing_staged_bytes_per_second", rate(&beside.staged).into()),
        ("computing_fraction_of_limit", of(d, |e| e.median)),
        ("computing_fraction_low", of(d, |e| e.low)),
        ("computing_fraction_high", of(d, |e| e.high)),
        ("pairs", alone.pairs.ratios.len().into()),
        ("computing_pairs", beside.pairs.ratios.len().into()),
    ]
}

/// Figures: what the loop lost. `bare` is the time of a bare copy of the state's `bytes`.
fn overhead(blocks: &Blocks, loops: &Pairs, bytes: u64, bare: f64) -> Rows {
    let (estimate, (quiet, loud)) = (loops.estimate(), loops.noise());
    let lost = |ratio: f64| 1.0 / ratio - 1.0;
    let each = |blocks: &[Block]| blocks.iter().flat_map(|block| block.steps.clone()).collect::<Vec<f64>>();
    let (plain, with) = (each(&blocks.without), each(&blocks.with));
    let middle = median(plain.iter().copied());
    let of_saves = blocks.with.iter().flat_map(|block| block.saves.iter().map(|save| block.steps[save.after as usize]));
    vec![
        ("loop_pairs", loops.ratios.len().into()),
        ("step_ms_without", (1e3 * middle).into()),
        ("step_ms_with", (1e3 * median(with.iter().copied())).into()),
        ("overhead_fraction", lost(estimate.median).into()),
        ("overhead_low", lost(estimate.high).into()),
        ("overhead_high", lost(estimate.low).into()),
        ("overhead_noise_low", lost(loud).into()),
        ("overhead_noise_high", lost(quiet).into()),
        // Approximate: a step computes until its last milliseconds.
        ("left_at_fence_bytes", (bytes as f64 * (1.0 - middle / bare).max(0.0)).into()),
        ("stall_ms_per_save", (1e3 * median(blocks.with.iter().flat_map(stalls))).into()),
        ("stall_ms_noise", (1e3 * median(blocks.without.iter().map(spread))).into()),
        ("step_p99_ratio", (quantile(with.iter().copied(), 0.99) / quantile(plain.iter().copied(), 0.99)).into()),
        ("save_step_p50_ratio", (median(of_saves.clone()) / middle).into()),
        ("save_step_p99_ratio", (quantile(of_saves, 0.99) / middle).into()),
    ]
}

/// Returns by how many seconds each step with a save is longer than the median step of its block. The total
/// of a block is no substitute: a clock drift of 0.1 % adds more to it than a save costs.
fn stalls(block: &Block) -> impl Iterator<Item = f64> {
    block.saves.iter().map(|save| excess(&block.steps, save.after as usize))
}

fn excess(steps: &[f64], at: usize) -> f64 {
    steps[at] - median(steps.iter().copied())
}

/// Returns the seconds between a typical step and the median step of its block: the resolution of `stalls`.
fn spread(block: &Block) -> f64 {
    let middle = median(block.steps.iter().copied());
    median(block.steps.iter().map(|step| (step - middle).abs()))
}

/// Figures: the time of the calls in the training thread.
fn calls(blocks: &Blocks) -> Rows {
    let of = |call: fn(&Saved) -> f64, q| Value::from(quantile(blocks.saves().map(call), q) * 1e6);
    vec![
        ("dict_us_p50", of(|save| save.dict, 0.5)),
        ("dict_us_p99", of(|save| save.dict, 0.99)),
        ("save_us_p50", of(|save| save.save, 0.5)),
        ("save_us_p99", of(|save| save.save, 0.99)),
        ("fence_us_p50", of(|save| save.fence, 0.5)),
        ("fence_us_p99", of(|save| save.fence, 0.99)),
    ]
}

/// Figures: how long a program waits for 4 bytes, with and without a save being staged.
fn readings_of(blocks: &Blocks, chunk: f64) -> Rows {
    let staging =
        |&&(at, _): &&Reading| blocks.saves().any(|save| at >= save.called && at < save.called + save.committed.staged);
    let (during, idle): (Vec<&Reading>, Vec<&Reading>) = blocks.readings.iter().partition(staging);
    let of = |readings: &[&Reading], q| quantile(readings.iter().map(|&&(_, took)| took), q);
    let p99 = of(&during, 0.99);
    vec![
        ("readback_count", during.len().into()),
        ("readback_us_p50", (1e6 * of(&during, 0.5)).into()),
        ("readback_us_p99", (1e6 * p99).into()),
        ("readback_idle_count", idle.len().into()),
        ("readback_idle_us_p50", (1e6 * of(&idle, 0.5)).into()),
        ("readback_idle_us_p99", (1e6 * of(&idle, 0.99)).into()),
        ("chunk_copy_us", (1e6 * chunk).into()),
        ("readback_p99_chunks", (p99 / chunk).into()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The total of this block is 2.1 ms longer than that of the block before, by drift alone; the save costs
    /// 2 ms.
    #[test]
    fn stall_of_a_save_does_not_contain_the_drift_of_the_clock() {
        let mut steps: Vec<f64> = (0..21).map(|i| 0.3001 + 1e-5 * f64::from(i - 10)).collect();
        assert!(excess(&steps, 10).abs() < 1e-9);
        steps[10] += 0.002;
        assert!((excess(&steps, 10) - 0.002).abs() < 2e-5);
        let block = Block { seconds: steps.iter().sum(), steps, saves: Vec::new() };
        assert!(spread(&block) < 1e-4);
    }
}
