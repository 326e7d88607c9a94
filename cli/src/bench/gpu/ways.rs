//! `ashore bench staging --ways`: compares ways to copy state from a GPU: gathering small tensors there,
//! queuing the copies of a chunk in one call, both, or one by one. Two further ways: one call that asks the
//! driver to overlap copies with kernels, and gathering with a stager that uses exact timers.
//!
//! Each way has its own executor, over the same state. A round is a bare copy of as many bytes and one save
//! per way, in random order. Figures are medians over rounds, and comparisons use times of the same round.

use super::bus::{self, RING, Way as Direction};
use super::checking::Checking;
use super::state::State;
use super::training::{self, Training};
use crate::bench::pairs::Estimate;
use crate::bench::usage::{Cpu, per_gb};
use crate::bench::{Bench, Figures, PATIENCE, null};
use crate::gpu::{Gpu, Pinned, Stream};
use crate::out::{self, median};
use crate::rng::Rng;
use ashore::{CheckpointExecutor, Result, tries};
use serde_json::Value;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Rounds that are not counted: the first saves plan, and check for forgotten fences.
const WARM: u32 = 3;

/// The settings of a way's saves, and the names of its figures.
struct Way {
    name: &'static str,
    gather: bool,
    batch: bool,
    overlap: bool,
    sharp: bool,
    alone: [&'static str; 9],
    computing: [&'static str; 9],
}

macro_rules! figures {
    ($($name:literal),+) => {
        [
            concat!($($name),+, "_bytes_per_second"),
            concat!($($name),+, "_fraction_of_limit"),
            concat!($($name),+, "_fraction_low"),
            concat!($($name),+, "_fraction_high"),
            concat!($($name),+, "_speedup"),
            concat!($($name),+, "_speedup_low"),
            concat!($($name),+, "_speedup_high"),
            concat!($($name),+, "_save_us"),
            concat!($($name),+, "_stage_cpu_seconds_per_gb"),
        ]
    };
}

macro_rules! way {
    ($name:literal, $gather:literal, $batch:literal, $overlap:literal, $sharp:literal) => {
        Way {
            name: $name,
            gather: $gather,
            batch: $batch,
            overlap: $overlap,
            sharp: $sharp,
            alone: figures!($name),
            computing: figures!("computing_", $name),
        }
    };
}

/// Whether small tensors are gathered, copies batched, batches overlapped with kernels, and timers exact.
const WAYS: [Way; 6] = [
    way!("gathered", true, false, false, false),
    way!("batched", false, true, false, false),
    way!("both", true, true, false, false),
    way!("singly", false, false, false, false),
    way!("overlapped", false, true, true, false),
    way!("sharp", true, false, false, true),
];
/// The way that the others are compared with.
const SINGLY: usize = 3;
/// The index of the bare copy in a round.
const LIMIT: usize = WAYS.len();

/// Measurements of one way, round by round.
#[derive(Default)]
struct Times {
    staged: Vec<f64>,
    /// Time in `save`, on the training thread.
    call: Vec<f64>,
    /// CPU time of the stager, in seconds per GB.
    stager: Vec<f64>,
}

pub fn run(bench: &Bench<'_>, gpu: &Arc<Gpu>) -> Result<Figures> {
    let (args, sizes) = (bench.args, bench.sizes());
    let sink = null::Sink::with_tables();
    let build = |way: &Way| {
        let builder =
            bench.builder().storage(Arc::new(sink.clone())).scratch(args.scratch.unwrap_or(0)).batch(way.batch);
        if way.gather { builder } else { builder.gather(0) }.build()
    };
    let executors: Vec<CheckpointExecutor> = WAYS.iter().map(build).collect::<Result<_>>()?;
    let can = |i: usize| {
        let device = executors[i].device();
        (!WAYS[i].gather || device.gather.is_ok()) && (!WAYS[i].batch || device.batch.is_ok())
    };
    let (stream, copies) = (Stream::new(gpu)?, Stream::new(gpu)?);
    let state = State::new(&stream, args.workload, args.scale)?;
    let mut pinned = Pinned::allocated(&copies, sizes.arena.min(RING))?;
    let mut checking = Checking::new(&state, &sink, &stream, &mut pinned, [0])?;
    let step = args.step_ms.unwrap_or(300.0) / 1e3;
    let computing = Training::new(&executors[SINGLY], &state, &stream, 1, step, false)?;
    state.reset(&stream)?;
    stream.wait()?;
    let stretch = state.stretch()?;
    bus::pass(Direction::ToHost, &stretch, &mut pinned, sizes.chunk)?;
    let bare = bus::pass(Direction::ToHost, &stretch, &mut pinned, sizes.chunk)?;

    let (mut numbers, mut rng) = (0, Rng::new(bench.seed()));
    let bar = out::progress(2 * u64::from(WARM + args.rounds));
    let mut measure = |busy: bool| {
        let mut times: [Times; LIMIT + 1] = Default::default();
        for round in 0..WARM + args.rounds {
            let mut order: Vec<usize> = (0..=LIMIT).filter(|&i| i == LIMIT || can(i)).collect();
            (1..order.len()).rev().for_each(|i| order.swap(i, rng.below(i + 1)));
            for i in order {
                let compute = || if busy { computing.compute_for(2.0 * bare, step) } else { Ok(()) };
                let (mut call, mut stager) = (0.0, 0.0);
                let staged = if i == LIMIT {
                    compute()?;
                    bus::pass(Direction::ToHost, &stretch, &mut pinned, sizes.chunk)?
                } else {
                    numbers += 1;
                    tries::PREFER_OVERLAP.store(WAYS[i].overlap, Ordering::Relaxed);
                    tries::SHARP_TIMERS.store(WAYS[i].sharp, Ordering::Relaxed);
                    let before = Cpu::now();
                    let pending = training::save(&executors[i], &state, numbers, 0)?;
                    compute()?;
                    let saved = pending.ended()?;
                    (call, stager) = (saved.save, per_gb(Cpu::now().since(before).stage, state.bytes));
                    checking.check(std::slice::from_ref(&saved))?;
                    saved.committed.staged.as_secs_f64()
                };
                stream.wait()?;
                if round >= WARM {
                    times[i].staged.push(staged);
                    times[i].call.push(call);
                    times[i].stager.push(stager);
                }
            }
            bar.inc(1);
        }
        Ok::<_, ashore::Error>(times)
    };
    let (alone, beside) = (measure(false)?, measure(true)?);
    bar.finish_and_clear();

    let refused = |of: fn(&ashore::DeviceReport) -> Option<String>, i: usize| Value::from(of(executors[i].device()));
    let mut figures = vec![
        ("workload", args.workload.name().into()),
        ("tensors", state.len().into()),
        ("bytes", state.bytes.into()),
        ("device", bench.home.to_string().into()),
        ("kernels", ashore::KERNELS.into()),
        ("simulated", gpu.simulated().into()),
        ("arena_bytes", executors[SINGLY].arena().report().bytes.into()),
        ("arena_pinned", executors[SINGLY].arena().report().pinned.is_ok().into()),
        ("chunk", sizes.chunk.into()),
        ("rounds", args.rounds.into()),
        ("gather_refused", refused(|report| report.gather.clone().err(), 0)),
        ("batch_refused", refused(|report| report.batch.clone().err(), 1)),
        ("saves", numbers.into()),
        ("saves_equal", checking.checked.into()),
    ];
    for (times, names, verdict, limit) in [
        (&alone, (|way| way.alone) as fn(&Way) -> [&'static str; 9], "verdict", "limit_bytes_per_second"),
        (&beside, |way| way.computing, "computing_verdict", "computing_limit_bytes_per_second"),
    ] {
        let said = (!gpu.simulated()).then(|| fastest(times));
        figures.push((verdict, said.into()));
        figures.push((limit, (state.bytes as f64 / median(times[LIMIT].staged.iter().copied())).into()));
        for (way, of) in WAYS.iter().zip(times) {
            figures.extend(names(way).into_iter().zip(each(of, times, state.bytes)));
        }
    }
    let mut figures = Figures(figures);
    if gpu.simulated() {
        figures.forget_times();
    }
    drop(computing);
    executors.into_iter().try_for_each(|executor| executor.shutdown(PATIENCE))?;
    Ok(figures)
}

/// Returns how many times as fast one was as the other.
fn ratio(one: &Times, other: &Times) -> Estimate {
    Estimate::of(&one.staged.iter().zip(&other.staged).map(|(one, other)| other / one).collect::<Vec<_>>())
}

/// Returns the figures of a way, in the order of their names; none for one that was refused.
fn each(of: &Times, all: &[Times], bytes: u64) -> Vec<Value> {
    if of.staged.is_empty() {
        return vec![Value::Null; WAYS[0].alone.len()];
    }
    let (limit, singly) = (ratio(of, &all[LIMIT]), ratio(of, &all[SINGLY]));
    let (rate, call) = (bytes as f64 / median(of.staged.iter().copied()), 1e6 * median(of.call.iter().copied()));
    let stager = median(of.stager.iter().copied());
    let Estimate { median, low, high } = limit;
    [rate, median, low, high, singly.median, singly.low, singly.high, call, stager].map(Value::from).into()
}

/// Returns which way won, and by how much.
fn fastest(all: &[Times]) -> String {
    let mut order: Vec<usize> = (0..WAYS.len()).filter(|&i| !all[i].staged.is_empty()).collect();
    order.sort_by(|&a, &b| {
        let of = |i: usize| ratio(&all[i], &all[LIMIT]).median;
        of(b).total_cmp(&of(a))
    });
    let [first, second, ..] = order[..] else { return "undecided: there was only one way".into() };
    let Estimate { median, low, high } = ratio(&all[first], &all[second]);
    let (first, second) = (WAYS[first].name, WAYS[second].name);
    let rounds = all[LIMIT].staged.len();
    let said =
        format!("{first}: {median:.3} times as fast as {second}, 95 % interval {low:.3} to {high:.3}, {rounds} rounds");
    if low > 1.0 { said } else { format!("undecided: {said}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fastest_way_is_named_and_a_tie_is_undecided() {
        let times = |seconds: f64| Times {
            staged: (0..20).map(|i| seconds * (1.0 + f64::from(i % 3) / 100.0)).collect(),
            ..Times::default()
        };
        let all = [1.5, 1.0, 1.2, 3.0, 2.0, 2.0, 0.9].map(times);
        assert!(fastest(&all).starts_with("batched: 1.200 times as fast as both"), "{}", fastest(&all));
        let figures = each(&all[1], &all, 1 << 30);
        assert_eq!(figures[4].as_f64().map(|speedup| speedup.round()), Some(3.0));
        let mut all = [1.0, 1.0, 1.2, 3.0, 2.0, 2.0, 0.9].map(times);
        assert!(fastest(&all).starts_with("undecided: "), "{}", fastest(&all));
        // A refused way is not compared.
        all[1] = Times::default();
        assert!(fastest(&all).starts_with("gathered: "), "{}", fastest(&all));
        assert!(each(&all[1], &all, 1 << 30).iter().all(Value::is_null));
    }
}
