//! What the run log and metrics cost, measured in interleaved pairs. Ignored by default: it measures, and
//! decides nothing. `cargo test --release --test telemetry -- --ignored --nocapture costs`

use super::{LONG, state};
use ashore::{CheckpointExecutor, Detect};
use std::time::{Duration, Instant};

const PAIRS: u64 = 1000;

fn built(root: &std::path::Path, run_log: bool) -> CheckpointExecutor {
    let builder = CheckpointExecutor::builder(root).arena(16 * 4096).chunk(4096).keep_last(2).detect(Detect::Never);
    builder.run_log(run_log).build().unwrap()
}

/// The times of the call of `save`, and until the step is durable.
fn timed(executor: &CheckpointExecutor, step: u64) -> (Duration, Duration) {
    let state = state(20_000);
    let began = Instant::now();
    let save = executor.save(step, state).unwrap();
    let call = began.elapsed();
    executor.fence().unwrap();
    let committed = save.wait(LONG).unwrap().committed().unwrap();
    (call, committed.durable)
}

/// The median, and the middle half, of the differences of pairs in microseconds.
fn shown(what: &str, pairs: &[(Duration, Duration)]) {
    let micros = |time: Duration| time.as_secs_f64() * 1e6;
    let sorted = |of: &dyn Fn(&(Duration, Duration)) -> f64| {
        let mut all: Vec<f64> = pairs.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        [all.len() / 4, all.len() / 2, all.len() * 3 / 4].map(|i| all[i])
    };
    let [_, with, _] = sorted(&|pair| micros(pair.0));
    let [_, without, _] = sorted(&|pair| micros(pair.1));
    let [low, middle, high] = sorted(&|pair| micros(pair.0) - micros(pair.1));
    println!(
        "{what}: with {with:.1} us, without {without:.1} us; difference {middle:.2} us, middle half {low:.2} to {high:.2} us"
    );
}

#[test]
#[ignore = "measures"]
fn costs_of_the_run_log_in_pairs() {
    let (one, two) = (tempfile::tempdir_in("/dev/shm").unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
    let (with, without) = (built(one.path(), true), built(two.path(), false));
    let (mut calls, mut durable) = (Vec::new(), Vec::new());
    for step in 1..=PAIRS {
        let (a, b) = if step % 2 == 0 {
            let a = timed(&with, step);
            (a, timed(&without, step))
        } else {
            let b = timed(&without, step);
            (timed(&with, step), b)
        };
        calls.push((a.0, b.0));
        durable.push((a.1, b.1));
    }
    shown("the call of save", &calls);
    shown("until durable", &durable);
    let log = &ashore::internal::run_log::runs(one.path()).unwrap()[0];
    let length = std::fs::metadata(log).unwrap().len();
    println!("bytes of a line: {}", length / PAIRS);
    assert_eq!(ashore::internal::run_log::runs(two.path()).unwrap().len(), 0);
}
