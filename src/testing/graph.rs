//! Tests of the behaviour that every graph [`Checkpointer`] must have, one named test per behaviour.
//!
//! ```
//! use ashore::compat::graph::InMemory;
//! use std::sync::Arc;
//! ashore::testing::graph::run(|| Arc::new(InMemory::new()));
//! ashore::testing::graph::run_pruning(|| Arc::new(InMemory::new()));
//! ```

use super::block_on;
use crate::compat::graph::{ActiveSnapshot, Checkpointer, Prune};
use crate::error::ErrorKind;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;

/// A state whose values are easily lost: non-finite floats, numeric keys, absent values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Distinguishes samples.
    pub seed: u64,
    /// Floats, compared bit for bit.
    pub scores: Vec<Bits>,
    /// Keys that JSON does not support.
    pub visits: BTreeMap<i64, String>,
    /// May be absent.
    pub next: Option<Box<Sample>>,
    /// `Some(None)` cannot be saved: it would be restored as `None`.
    pub option: Option<Option<u8>>,
}

/// A float that equals only floats with the same bits.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bits(pub f64);

impl PartialEq for Bits {
    fn eq(&self, other: &Self) -> bool {
        self.0.to_bits() == other.0.to_bits()
    }
}

impl Sample {
    /// Makes the sample of a seed.
    pub fn new(seed: u64) -> Self {
        let next = (seed > 0).then(|| Box::new(Self { next: None, ..Self::new(0) }));
        let scores = [f64::NAN, f64::NEG_INFINITY, -0.0, 0.1 + seed as f64, f64::from_bits(0x7ff0_0000_0000_0001)];
        let visits = BTreeMap::from([(-5, "$f64".into()), (7, format!("node {seed}"))]);
        Self { seed, scores: scores.map(Bits).to_vec(), visits, next, option: Some(Some(1)) }
    }
}

/// A behaviour: its name, and a function that panics if an empty checkpointer lacks it.
pub type Behaviour = (&'static str, fn(&dyn Checkpointer<Sample>));

/// Every behaviour of a checkpointer.
pub const BEHAVIOURS: &[Behaviour] = &[
    ("a state comes back as it was", a_state_comes_back),
    ("what was never saved is none, not an error", what_was_never_saved_is_none),
    ("a step that is missing is never another step", a_missing_step_is_none),
    ("the latest is the highest step, as a number", the_latest_is_the_highest_number),
    ("steps are listed in ascending order, each once", steps_are_listed_in_order),
    ("a state is replaced whole, and alone", a_state_is_replaced),
    ("an active set needs no state and is not listed", an_active_set_needs_no_state),
    ("an active set is replaced and leaves the state alone", an_active_set_is_replaced),
    ("runs know nothing of each other", runs_are_apart),
    ("a state that cannot be kept is refused and changes nothing", what_cannot_be_kept_is_refused),
    ("a future that is never polled does nothing", an_unpolled_save_does_nothing),
    ("many tasks may save at once", many_tasks_save_at_once),
];

/// Tests every behaviour, each on a new checkpointer without runs.
///
/// # Panics
/// When a behaviour is missing; its name is printed first.
pub fn run<C: Checkpointer<Sample> + 'static>(mut checkpointer: impl FnMut() -> Arc<C>) {
    for (name, behaviour) in BEHAVIOURS {
        println!("behaviour: {name}");
        behaviour(&*checkpointer());
    }
}

/// Tests every behaviour of [`Prune`].
///
/// # Panics
/// When a prune deletes what it must keep, or keeps what it must delete.
pub fn run_pruning<C: Checkpointer<Sample> + Prune + 'static>(mut checkpointer: impl FnMut() -> Arc<C>) {
    for (keep_last, kept) in
        [(0, &[][..]), (1, &[30][..]), (2, &[7, 30][..]), (3, &[2, 7, 30][..]), (9, &[2, 7, 30][..])]
    {
        println!("behaviour: a prune keeps the last {keep_last}");
        let checkpointer = checkpointer();
        let (run, other) = (Uuid::new_v4(), Uuid::new_v4());
        for step in [2, 7, 30] {
            save(&*checkpointer, run, step, step);
            save(&*checkpointer, other, step, step);
        }
        for step in [1, 7, 31] {
            block_on(checkpointer.save_active(run, step, &tasks(step))).unwrap();
        }
        block_on(checkpointer.prune(run, keep_last)).unwrap();
        block_on(checkpointer.prune(Uuid::new_v4(), keep_last)).unwrap();
        assert_eq!(list(&*checkpointer, run), kept);
        assert_eq!(list(&*checkpointer, other), [2, 7, 30]);
        assert_eq!(load(&*checkpointer, run, None).map(|s| s.seed), kept.last().copied());
        let oldest =
            if keep_last == 0 { u64::MAX } else { kept.first().copied().filter(|_| keep_last <= 3).unwrap_or(0) };
        for step in [1, 7, 31] {
            let expected = if step >= oldest { tasks(step) } else { Vec::new() };
            assert_eq!(active(&*checkpointer, run, step), expected, "step {step}");
        }
        save(&*checkpointer, run, 1, 1);
        assert!(list(&*checkpointer, run).starts_with(&[1]), "a run goes on after a prune");
    }
}

type Checked<'a> = &'a dyn Checkpointer<Sample>;

#[track_caller]
fn save(checkpointer: Checked<'_>, run: Uuid, step: u64, seed: u64) {
    block_on(checkpointer.save(run, step, &Sample::new(seed))).unwrap();
}

#[track_caller]
fn load(checkpointer: Checked<'_>, run: Uuid, step: Option<u64>) -> Option<Sample> {
    block_on(checkpointer.load(run, step)).unwrap()
}

#[track_caller]
fn list(checkpointer: Checked<'_>, run: Uuid) -> Vec<u64> {
    block_on(checkpointer.list(run)).unwrap()
}

#[track_caller]
fn active(checkpointer: Checked<'_>, run: Uuid, step: u64) -> Vec<ActiveSnapshot> {
    block_on(checkpointer.load_active(run, step)).unwrap()
}

fn tasks(seed: u64) -> Vec<ActiveSnapshot> {
    let payload = Some(serde_json::json!({"$f64": [seed, null, "text"], "deep": {"x": -1.5}}));
    let sent = ActiveSnapshot { node_name: format!("node {seed}"), payload };
    vec![ActiveSnapshot { node_name: "plain".into(), payload: None }, sent]
}

fn a_state_comes_back(checkpointer: Checked<'_>) {
    let run = Uuid::new_v4();
    save(checkpointer, run, 3, 3);
    assert_eq!(load(checkpointer, run, Some(3)), Some(Sample::new(3)));
    assert_eq!(load(checkpointer, run, None), Some(Sample::new(3)));
}

fn what_was_never_saved_is_none(checkpointer: Checked<'_>) {
    let run = Uuid::new_v4();
    assert_eq!((load(checkpointer, run, None), load(checkpointer, run, Some(0))), (None, None));
    assert_eq!((list(checkpointer, run), active(checkpointer, run, 0)), (vec![], vec![]));
}

fn a_missing_step_is_none(checkpointer: Checked<'_>) {
    let run = Uuid::new_v4();
    save(checkpointer, run, 3, 3);
    for step in [0, 2, 4, 30, u64::MAX] {
        assert_eq!(load(checkpointer, run, Some(step)), None, "step {step}");
    }
}

fn the_latest_is_the_highest_number(checkpointer: Checked<'_>) {
    let run = Uuid::new_v4();
    for step in [u64::MAX, 9, 100_000_000, 0] {
        save(checkpointer, run, step, step / 2);
    }
    assert_eq!(load(checkpointer, run, None), Some(Sample::new(u64::MAX / 2)));
}

fn steps_are_listed_in_order(checkpointer: Checked<'_>) {
    let run = Uuid::new_v4();
    for step in [10, 9, u64::MAX, 0, 10, 100_000_000] {
        save(checkpointer, run, step, 1);
    }
    assert_eq!(list(checkpointer, run), [0, 9, 10, 100_000_000, u64::MAX]);
}

fn a_state_is_replaced(checkpointer: Checked<'_>) {
    let run = Uuid::new_v4();
    block_on(checkpointer.save_active(run, 3, &tasks(3))).unwrap();
    save(checkpointer, run, 3, 1);
    save(checkpointer, run, 3, 2);
    assert_eq!(load(checkpointer, run, Some(3)), Some(Sample::new(2)));
    assert_eq!(active(checkpointer, run, 3), tasks(3));
}

fn an_active_set_needs_no_state(checkpointer: Checked<'_>) {
    let run = Uuid::new_v4();
    block_on(checkpointer.save_active(run, 4, &tasks(4))).unwrap();
    assert_eq!(active(checkpointer, run, 4), tasks(4));
    assert_eq!((list(checkpointer, run), load(checkpointer, run, None)), (vec![], None));
    save(checkpointer, run, 3, 3);
    assert_eq!(load(checkpointer, run, None), Some(Sample::new(3)));
    assert_eq!((load(checkpointer, run, Some(4)), active(checkpointer, run, 3)), (None, vec![]));
}

fn an_active_set_is_replaced(checkpointer: Checked<'_>) {
    let run = Uuid::new_v4();
    save(checkpointer, run, 3, 3);
    for set in [tasks(1), Vec::new(), tasks(2)] {
        block_on(checkpointer.save_active(run, 3, &set)).unwrap();
        assert_eq!(active(checkpointer, run, 3), set);
    }
    assert_eq!(load(checkpointer, run, Some(3)), Some(Sample::new(3)));
}

fn runs_are_apart(checkpointer: Checked<'_>) {
    let (one, two) = (Uuid::new_v4(), Uuid::new_v4());
    save(checkpointer, one, 1, 1);
    save(checkpointer, two, 2, 2);
    assert_eq!((list(checkpointer, one), list(checkpointer, two)), (vec![1], vec![2]));
    assert_eq!(load(checkpointer, one, None), Some(Sample::new(1)));
}

fn what_cannot_be_kept_is_refused(checkpointer: Checked<'_>) {
    let run = Uuid::new_v4();
    save(checkpointer, run, 3, 3);
    let unkept = Sample { option: Some(None), ..Sample::new(4) };
    for step in [3, 4] {
        let error = block_on(checkpointer.save(run, step, &unkept)).expect_err("an option that holds nothing");
        assert_eq!((error.kind(), error.step()), (ErrorKind::Invalid, Some(step)));
    }
    assert_eq!((list(checkpointer, run), load(checkpointer, run, None)), (vec![3], Some(Sample::new(3))));
}

fn an_unpolled_save_does_nothing(checkpointer: Checked<'_>) {
    let run = Uuid::new_v4();
    drop(checkpointer.save(run, 3, &Sample::new(3)));
    assert_eq!(list(checkpointer, run), [] as [u64; 0]);
}

fn many_tasks_save_at_once(checkpointer: Checked<'_>) {
    let run = Uuid::new_v4();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || (0..3).for_each(|step| save(checkpointer, run, step, step * 10 + thread)));
        }
    });
    assert_eq!(list(checkpointer, run), [0, 1, 2]);
    let last = load(checkpointer, run, None).unwrap();
    assert_eq!(last, Sample::new(last.seed));
    assert_eq!(last.seed / 10, 2);
}
