//! The rounds of several ranks under a seeded simulation: production code over simulated messages, names and
//! time.
//!
//! Each rank is a thread, and one thread runs at a time: at every message and every operation on the storage
//! the seed decides which one goes on, whether it dies there, and when a message arrives. Time is virtual. A
//! run is reproduced by its seed: `ASHORE_SIMULATION_SEED=7 cargo test several::simulation`.

mod jobs;
mod medium;
mod messages;
mod scheduler;

use jobs::{Plan, run};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Runs `count` seeds with plans by `plan`, two at a time, and prints how saves ended.
fn simulate(count: u64, plan: impl Fn(u64) -> Plan + Sync) -> BTreeMap<String, u64> {
    let (next, outcomes) = (AtomicU64::new(0), Mutex::new(BTreeMap::<String, u64>::new()));
    let seeds = match std::env::var("ASHORE_SIMULATION_SEED") {
        Ok(seed) => seed.parse().map_or(0..0, |seed: u64| seed..seed + 1),
        Err(_) => 0..count,
    };
    next.store(seeds.start, Ordering::Relaxed);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(seed) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|seed| *seed < seeds.end) {
                    for (outcome, times) in run(seed, &plan(seed)) {
                        *outcomes.lock().unwrap_or_else(PoisonError::into_inner).entry(outcome).or_default() += times;
                    }
                }
            });
        }
    });
    let outcomes = outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!("{outcomes:#?}");
    outcomes
}

/// 0 torn, 0 acknowledged lost, 0 failures that became durable, 0 waits past the deadline: each panics with
/// its seed. And every outcome is seen, so that the seeds say something.
#[test]
fn ranks_that_die_and_messages_that_are_lost_tear_nothing() {
    let outcomes = simulate(number("ASHORE_SIMULATION_SEEDS", 2_000), Plan::any);
    if std::env::var("ASHORE_SIMULATION_SEED").is_err() {
        for outcome in ["durable", "deadline", "indeterminate", "conflict", "invalid", "died"] {
            assert!(outcomes.contains_key(outcome), "{outcome} was never seen");
        }
    }
}

/// Without faults every rank of every save ends durable.
#[test]
fn calm_ranks_end_durable() {
    let outcomes = simulate(200, Plan::calm);
    assert_eq!(outcomes.keys().collect::<Vec<_>>(), ["durable"]);
}

#[test]
#[ignore = "minutes: 1,000 seeds of 1,000 ranks, 20 of 10,000"]
fn many_ranks_that_die_and_messages_that_are_lost_tear_nothing() {
    simulate(number("ASHORE_SIMULATION_SEEDS", 1_000), |seed| Plan { world: 1_000, ..Plan::any(seed) });
    simulate(20, |seed| Plan { world: 10_000, ..Plan::any(seed) });
}
