use crate::fixtures::executor::{LONG, one};
use ashore::catalog::{Best, Candidate};
use ashore::storage::{Memory, Storage};
use ashore::{Builder, Catalog, CheckpointExecutor, PruneOptions, Retention};
use std::sync::Arc;

/// Saves steps 1, 2, ... with these losses; None: a step without one.
fn saved(losses: &[Option<f64>], change: impl FnOnce(Builder) -> Builder) -> (Memory, Vec<u64>) {
    let storage = Memory::new();
    let builder =
        CheckpointExecutor::builder("in memory").storage(Arc::new(storage.clone())).arena(4 * 4096).chunk(4096);
    let executor = change(builder).build().unwrap();
    for (step, loss) in (1..).zip(losses) {
        let mut state = one("x", vec![step as u8; 64]);
        if let Some(loss) = loss {
            state.metadata("loss", loss).unwrap();
        }
        executor.save(step, state).unwrap().wait(LONG).unwrap();
    }
    executor.shutdown(LONG).unwrap();
    let steps = left(&storage);
    (storage, steps)
}

fn left(storage: &Memory) -> Vec<u64> {
    let mut steps: Vec<_> = storage.list().unwrap().iter().filter_map(|n| ashore::id::parse_step_name(n)).collect();
    steps.sort_unstable();
    steps
}

const LOSSES: [Option<f64>; 7] = [Some(0.5), Some(0.1), Some(f64::NAN), Some(0.3), None, Some(0.1), Some(0.9)];

#[test]
fn the_best_stay_beside_the_newest() {
    assert_eq!(saved(&LOSSES, |b| b.keep_last(1).preserve(Best::lowest("loss", 2))).1, [2, 6, 7]);
    assert_eq!(saved(&LOSSES, |b| b.preserve(Best::lowest("loss", 1))).1, [6, 7], "of equal ones the newer");
    assert_eq!(saved(&LOSSES, |b| b.keep_last(2).preserve(Best::highest("loss", 2))).1, [1, 6, 7]);
    assert_eq!(saved(&LOSSES, |b| b.preserve(Best::lowest("accuracy", 2))).1, [7], "no step has that metric");
}

#[test]
fn any_function_is_a_policy_and_one_that_panics_deletes_nothing() {
    let even = |steps: &[Candidate]| steps.iter().map(|step| step.entry.step % 2 == 0).collect::<Vec<_>>();
    assert_eq!(saved(&LOSSES, |b| b.preserve(even)).1, [2, 4, 6, 7]);
    let broken = |_: &[Candidate]| -> Vec<bool> { panic!("on purpose") };
    assert_eq!(saved(&LOSSES, |b| b.preserve(broken)).1.len(), LOSSES.len());
    assert_eq!(
        saved(&LOSSES, |b| b.preserve(|_: &[Candidate]| Vec::new())).1.len(),
        LOSSES.len(),
        "what is missing is kept"
    );
}

#[test]
fn a_catalog_prunes_by_a_policy_too() {
    let (storage, all) = saved(&LOSSES, |b| b);
    assert_eq!(all.len(), LOSSES.len());
    let catalog = Catalog::over(Arc::new(storage.clone()));
    let retention = Retention::last(2);
    catalog.prune_by(&retention, &Best::lowest("loss", 1), PruneOptions::new()).unwrap();
    assert_eq!(left(&storage), [6, 7]);
}
