//! The rounds of several ranks under a seeded simulation: production code over simulated messages, names and
//! time.
//!
//! One rank runs at a time. At every message and every operation on the storage, the seed decides which rank
//! goes on, whether it dies there, and when a message arrives. Time is virtual, and each rank has a clock of
//! its own. In half of the seeds the production coordinator carries the messages over a simulated board. In
//! the other half a worse coordinator does. A run is reproduced by its seed: `ASHORE_SIMULATION_SEED=7 cargo
//! test several::simulation`; `just simulate` runs many.

mod jobs;
mod medium;
mod memory;
mod messages;
mod place;
mod scale;
mod scheduler;

use jobs::{By, Plan, Seen, run};
use place::Manners;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

fn quietly(seed: u64, plan: &Plan) -> Seen {
    run(seed, plan, &mut |_, _| ())
}

/// Runs seeds with the plans that `plan` makes, `at_once` seeds at a time, and prints how saves ended.
fn simulate(count: u64, at_once: usize, plan: impl Fn(u64) -> Plan + Sync) -> BTreeMap<String, u64> {
    let (next, outcomes) = (AtomicU64::new(0), Mutex::new(BTreeMap::<String, u64>::new()));
    let seeds = number("ASHORE_SIMULATION_SEED").map_or(0..count, |seed| seed..seed + 1);
    next.store(seeds.start, Ordering::Relaxed);
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some(seed) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|seed| *seed < seeds.end) {
                    for (outcome, times) in quietly(seed, &plan(seed)).outcomes {
                        *outcomes.lock().unwrap_or_else(PoisonError::into_inner).entry(outcome).or_default() += times;
                    }
                }
            });
        }
    });
    let outcomes = outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
    println!("seeds={} seconds={} {outcomes:#?}", seeds.end - seeds.start, started.elapsed().as_secs());
    outcomes
}

/// 0 torn, 0 acknowledged lost, 0 failures that became durable, 0 waits past the deadline. Each of these
/// would panic with its seed. The test also checks that every outcome occurs, so that the seeds are
/// meaningful.
#[test]
fn ranks_that_die_and_messages_that_are_lost_tear_nothing() {
    let outcomes = simulate(number("ASHORE_SIMULATION_SEEDS").unwrap_or(2_000), 2, Plan::any);
    if number("ASHORE_SIMULATION_SEED").is_none() {
        for outcome in ["durable", "deadline", "indeterminate", "conflict", "invalid", "unavailable", "died"] {
            assert!(outcomes.contains_key(outcome), "{outcome} was never seen");
        }
    }
}

/// Without faults every rank of every save ends durable.
#[test]
fn calm_ranks_end_durable() {
    for board in [false, true] {
        let outcomes = simulate(200, 2, |seed| Plan::calm(seed, board));
        assert_eq!(outcomes.keys().collect::<Vec<_>>(), ["durable"]);
    }
}

/// Two runs of a seed do the same operations in the same order.
#[test]
fn a_seed_is_reproduced_by_its_number() {
    for seed in 0..50 {
        let (one, other) = (quietly(seed, &Plan::any(seed)), quietly(seed, &Plan::any(seed)));
        assert_eq!((one.trace, one.outcomes), (other.trace, other.outcomes), "seed={seed}");
    }
}

/// Regression: when ranks met, or in a save, rank 0 read the messages of 1,000 ranks from a slow board, one
/// after another, for seconds beyond its deadline.
#[test]
fn a_slow_board_keeps_no_rank_beyond_its_deadline() {
    for (patience, outcome) in [(100_000, "unmet"), (600_000, "deadline")] {
        for server in [false, true] {
            let by = By::Board(Manners { server, takes: 5_000, ..Manners::PERFECT });
            let plan = Plan { world: 1_000, saves: 1, by, patience, clocks: (0, 0), ..Plan::calm(0, true) };
            let outcomes = quietly(0, &plan).outcomes;
            assert!(outcomes.contains_key(outcome), "{outcomes:?}");
        }
    }
}

#[test]
#[ignore = "minutes: `just simulate`"]
fn a_thousand_ranks_tear_nothing() {
    simulate(number("ASHORE_SIMULATION_SEEDS").unwrap_or(1_000), 2, |seed| Plan::of(seed, 1_000));
}

#[test]
#[ignore = "minutes: `just simulate`"]
fn ten_thousand_ranks_tear_nothing() {
    simulate(number("ASHORE_SIMULATION_SEEDS").unwrap_or(20), 1, |seed| Plan::of(seed, 10_000));
}
