//! Measures the best schemes from memory to durable, and compares them with the same bytes raw and copied.

use crate::block::{BLOCK, Scheme};
use crate::data::Kind;
use crate::disk::{WRITE, write_copied, write_raw};
use crate::figures::{machine_time, median, program_time, quartiles, row, table};
use crate::memory::Aligned;
use crate::parts::{CORES, Choice};
use crate::pipeline::{Job, Pipeline, came_back};
use std::error::Error;
use std::hint::black_box;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const BYTES: usize = 1 << 30;
const ROUNDS: usize = 12;

/// The pause between files, so that a disk with a burst allowance regains it before each file.
const REST: Duration = Duration::from_millis(200);

/// A round counts as quiet when other programs used less than this many cores.
const QUIET: f64 = 0.25;

/// The first of the compared ways: writes the bytes in place.
const RAW: usize = 0;
/// Copies the bytes into a slab and writes the slab, as the library does.
const COPIED: usize = 1;
const CODED: usize = 2;

/// The cost of one way in each round.
#[derive(Default)]
struct Cost {
    seconds: Vec<f64>,
    processor: Vec<f64>,
    /// Cores that other programs kept busy.
    others: Vec<f64>,
    /// The speed of a program on every core, as a share of its speed alone.
    kept: Vec<f64>,
}

/// A table of cases.
pub fn whole_way(dir: &Path, kinds: &[Kind], chosen: &[Choice]) -> Result<(), Box<dyn Error>> {
    let columns = [
        "data",
        "ratio",
        "GB/s",
        "CPU-s/GB",
        "raw by coded time",
        "copied by coded time",
        "quiet rounds: raw by coded",
        "quiet rounds: copied by coded",
        "cores others used",
        "training lost, s/GB",
    ];
    table("From memory to durable, 1 GiB: raw, copied, coded in turn, forth and back", &columns);
    let of = |name: &str| kinds.iter().position(|kind| kind.name == name).ok_or("a kind that is not there");
    let [bf16, m, v] = [of("trained bf16 weights")?, of("trained fp32 m")?, of("trained fp32 v")?];
    let (raw, parts) = gibibyte(kinds, chosen, &[(bf16, 1)]);
    case(dir, "trained bf16 weights", &raw, parts, false)?;
    let (raw, parts) = gibibyte(kinds, chosen, &[(bf16, 1), (m, 2), (v, 2)]);
    case(dir, "trained bf16 weights, fp32 m and v", &raw, parts.clone(), false)?;
    case(dir, "the same, and training on every core", &raw, parts, true)
}

fn case(
    dir: &Path,
    name: &str,
    raw: &Aligned,
    parts: Vec<(usize, Scheme)>,
    training: bool,
) -> Result<(), Box<dyn Error>> {
    let coded = Job { raw, parts };
    let mut pipeline = Pipeline::new(&coded);
    let (file, written, _) = pipeline.write(dir, &coded)?;
    if !came_back(&file, &coded)? {
        return Err(format!("{name}: what was written came back different").into());
    }
    drop(file);
    let ratio = written as f64 / BYTES as f64;
    let mut slabs = std::array::from_fn(|_| Aligned::zeroed(WRITE));
    let stop = AtomicBool::new(false);
    let done = AtomicU64::new(0);
    let costs = std::thread::scope(|scope| {
        (0..if training { CORES } else { 0 }).for_each(|_| drop(scope.spawn(|| train(&stop, &done))));
        let costs = rounds(&done, |way| match way {
            RAW => write_raw(dir, raw),
            COPIED => write_copied(dir, raw, &mut slabs),
            _ => Ok(pipeline.write(dir, &coded)?.2),
        });
        stop.store(true, Ordering::Relaxed);
        costs
    })?;

    let each = |value: &dyn Fn(&Cost) -> f64, places: usize| {
        costs.each_ref().map(|cost| format!("{:.places$}", value(cost))).join(", ")
    };
    let speed = |cost: &Cost| BYTES as f64 / 1e9 / median(cost.seconds.iter().copied());
    let processor = |cost: &Cost| median(cost.processor.iter().copied()) / BYTES as f64 * 1e9;
    let lost = |cost: &Cost| {
        median(cost.seconds.iter().zip(&cost.kept).map(|(time, kept)| time * (1.0 - kept))) / BYTES as f64 * 1e9
    };
    let others = |round: usize| costs.iter().map(|cost| cost.others[round]).sum::<f64>() / 3.0;
    let gain = |way: usize, others_max: f64| {
        let rounds = (0..ROUNDS).filter(|&round| others(round) <= others_max);
        let gains: Vec<f64> = rounds.map(|i| costs[way].seconds[i] / costs[CODED].seconds[i]).collect();
        if gains.is_empty() {
            return "none".into();
        }
        let [low, gain, high] = quartiles(gains.iter().copied());
        format!("{gain:.2} ({low:.2} to {high:.2}; {})", gains.len())
    };
    row(&[
        name.into(),
        format!("{ratio:.3}"),
        each(&speed, 2),
        if training { String::new() } else { each(&processor, 2) },
        gain(RAW, f64::MAX),
        gain(COPIED, f64::MAX),
        gain(RAW, QUIET),
        gain(COPIED, QUIET),
        format!("{:.2}", median((0..ROUNDS).map(others))),
        if training { each(&lost, 2) } else { String::new() },
    ]);
    Ok(())
}

/// Runs every way once per round, alternately in forward and in reverse order.
fn rounds(done: &AtomicU64, mut write: impl FnMut(usize) -> std::io::Result<Duration>) -> std::io::Result<[Cost; 3]> {
    let mut costs: [Cost; 3] = Default::default();
    for round in 0..ROUNDS {
        for way in if round % 2 == 0 { [RAW, COPIED, CODED] } else { [CODED, COPIED, RAW] } {
            let (before, began) = (done.load(Ordering::Relaxed), Instant::now());
            std::thread::sleep(REST);
            let alone = (done.load(Ordering::Relaxed) - before) as f64 / began.elapsed().as_secs_f64();
            let (before, began) = (done.load(Ordering::Relaxed), Instant::now());
            let (machine, program) = (machine_time(), program_time());
            costs[way].seconds.push(write(way)?.as_secs_f64());
            let (machine, program) = (machine_time() - machine, program_time() - program);
            let elapsed = began.elapsed().as_secs_f64();
            let beside = (done.load(Ordering::Relaxed) - before) as f64 / elapsed;
            costs[way].processor.push(program.as_secs_f64());
            costs[way].others.push(machine.saturating_sub(program).as_secs_f64() / elapsed);
            costs[way].kept.push(beside / alone);
        }
    }
    Ok(costs)
}

/// Simulates a program that trains on the host: arithmetic on data that fits the cache, until `stop`.
fn train(stop: &AtomicBool, done: &AtomicU64) {
    let (a, mut sums) = ([1.000_001_f32; 4096], [0.0_f32; 16]);
    while !stop.load(Ordering::Relaxed) {
        for lanes in black_box(&a).as_chunks::<16>().0 {
            sums.iter_mut().zip(lanes).for_each(|(sum, x)| *sum += x * x);
        }
        black_box(&mut sums);
        done.fetch_add(1, Ordering::Relaxed);
    }
}

/// Makes a gibibyte of these kinds in the given shares, and says how each part is coded.
fn gibibyte(kinds: &[Kind], chosen: &[Choice], parts: &[(usize, usize)]) -> (Aligned, Vec<(usize, Scheme)>) {
    let shares: usize = parts.iter().map(|(_, share)| share).sum();
    let mut raw = Aligned::zeroed(BYTES);
    let (mut ends, mut end, mut sum) = (Vec::new(), 0, 0);
    for &(kind, share) in parts {
        sum += share;
        let begin = std::mem::replace(&mut end, BYTES / BLOCK * sum / shares * BLOCK);
        let bytes = &kinds[kind].bytes;
        for piece in raw[begin..end].chunks_mut(bytes.len()) {
            piece.copy_from_slice(&bytes[..piece.len()]);
        }
        ends.push((end, chosen[kind].alone));
    }
    (raw, ends)
}
