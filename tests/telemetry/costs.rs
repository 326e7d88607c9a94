//! What the run log, a trace and metrics cost, measured in interleaved pairs. Ignored by default: it
//! measures, and decides nothing.
//! `cargo test --release --test telemetry costs -- --ignored --nocapture --test-threads 1`

use super::metrics::recorder;
use super::{LONG, state};
use ashore::{Builder, CheckpointExecutor, Detect};
use std::path::Path;
use std::time::{Duration, Instant};

/// How many pairs of blocks there are, and how many saves a block has.
const PAIRS: u64 = 100;
const SAVES: u64 = 10;
/// Tensors of 5 chunks, of which the header is another one.
const CHUNK: u64 = 64 << 10;

fn built(root: &Path, change: impl FnOnce(Builder) -> Builder) -> CheckpointExecutor {
    let builder = CheckpointExecutor::builder(root).arena(16 * CHUNK).chunk(CHUNK).keep_last(2).detect(Detect::Never);
    change(builder.run_log(false)).build().unwrap()
}

/// The CPU time of all threads of this process.
#[expect(unsafe_code, reason = "a clock of the C library")]
fn cpu() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one structure.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &raw mut time) }, 0);
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec as u32)
}

/// Of one block: the CPU time, the time of all calls of `save`, and the time until all steps were durable.
fn block(executor: &CheckpointExecutor, first: u64) -> [f64; 3] {
    let (began, mut calls, mut durable) = (cpu(), Duration::ZERO, Duration::ZERO);
    for step in first..first + SAVES {
        let state = state(5 * CHUNK as usize);
        let called = Instant::now();
        let save = executor.save(step, state).unwrap();
        calls += called.elapsed();
        executor.fence().unwrap();
        durable += save.wait(LONG).unwrap().committed().unwrap().durable;
    }
    [cpu() - began, calls, durable].map(|time| time.as_secs_f64() * 1e6 / SAVES as f64)
}

/// Saves with both in turn, and prints for each time the medians, and the median and middle half of the
/// differences and ratios of pairs.
fn compare(what: &str, with: &CheckpointExecutor, without: &CheckpointExecutor) {
    let mut pairs = Vec::new();
    for pair in 0..PAIRS {
        let first = 1 + pair * SAVES;
        // The one that comes first changes from pair to pair.
        let (a, b) = if pair % 2 == 0 {
            let a = block(with, first);
            (a, block(without, first))
        } else {
            let b = block(without, first);
            (block(with, first), b)
        };
        pairs.push((a, b));
    }
    for (i, time) in ["CPU time", "call of save", "until durable"].into_iter().enumerate() {
        let quartiles = |of: &dyn Fn(f64, f64) -> f64| {
            let mut all: Vec<f64> = pairs.iter().map(|(a, b)| of(a[i], b[i])).collect();
            all.sort_by(f64::total_cmp);
            [all.len() / 4, all.len() / 2, all.len() * 3 / 4].map(|at| all[at])
        };
        let ([_, on, _], [_, off, _]) = (quartiles(&|a, _| a), quartiles(&|_, b| b));
        let ([low, middle, high], [least, ratio, most]) = (quartiles(&|a, b| a - b), quartiles(&|a, b| a / b));
        println!(
            "{what}, {time} of a save: on {on:.1} us, off {off:.1} us; difference {middle:.1} us ({low:.1} to \
             {high:.1}), ratio {ratio:.3} ({least:.3} to {most:.3})"
        );
    }
}

fn measured(what: &str, change: impl FnOnce(Builder, &Path) -> Builder) -> tempfile::TempDir {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let without = built(&folder.path().join("off"), |builder| builder);
    let with = built(&folder.path().join("on"), |builder| change(builder, folder.path()));
    compare(what, &with, &without);
    with.shutdown(LONG).unwrap();
    without.shutdown(LONG).unwrap();
    folder
}

#[test]
#[ignore = "measures"]
fn costs_of_nothing_in_pairs() {
    measured("nothing", |builder, _| builder);
}

#[test]
#[ignore = "measures"]
fn costs_of_the_run_log_in_pairs() {
    let folder = measured("run log", |builder, _| builder.run_log(true));
    let log = &ashore::internal::run_log::runs(&folder.path().join("on")).unwrap()[0];
    println!("run log: {} bytes a save", std::fs::metadata(log).unwrap().len() / (PAIRS * SAVES));
}

#[test]
#[ignore = "measures"]
fn costs_of_a_trace_in_pairs() {
    let folder = measured("trace", |builder, folder| builder.trace(folder.join("trace.json").to_str().unwrap()));
    let text = std::fs::read_to_string(folder.path().join("trace.json")).unwrap();
    let (lines, saves) = (text.lines().count() as u64, PAIRS * SAVES);
    let with_chunks = text.lines().filter(|line| line.contains("\"name\":\"seal\"")).count();
    println!(
        "trace: {} events and {} bytes a save; {with_chunks} of {saves} saves chunk by chunk",
        lines / saves,
        text.len() as u64 / saves
    );
}

/// An executor takes the recorder that is there when it is built.
#[test]
#[ignore = "measures"]
fn costs_of_metrics_in_pairs() {
    measured("metrics", |builder, _| {
        recorder();
        builder
    });
}
