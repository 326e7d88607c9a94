//! `CheckpointManager`: saving, steps, metrics, errors, reading only.

use crate::compat::{Flaky, engine, files, state};
use crate::rig::{Buffer, LONG, eventually, one};
use ashore::compat::orbax::{BestN, CheckpointManager, CheckpointManagerOptions, CompositeArgs, Item};
use ashore::{Attempt, ErrorKind, Failed, SaveOptions};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;

type Options = CheckpointManagerOptions;

fn manager(root: &Path, options: Options) -> CheckpointManager {
    CheckpointManager::new(Arc::new(engine(root).build().unwrap()), options).unwrap()
}

#[test]
fn steps_metrics_and_the_best_of_them() {
    let root = tempfile::tempdir().unwrap();
    let best = |reverse| Options::new().best(BestN::new(None, |m| m["accuracy"].as_f64()).reverse(reverse));
    let written = manager(root.path(), best(false));
    assert_eq!((written.latest_step().unwrap(), written.best_step().unwrap()), (None, None));
    assert_eq!(written.restore(None).unwrap_err().kind(), ErrorKind::NotFound);
    for (step, accuracy) in [(1, 0.5), (2, 0.9), (3, 0.7), (4, f64::NAN)] {
        assert!(written.save_with(step, state(step), Some(&json!({ "accuracy": accuracy })), false).unwrap());
        written.wait_until_finished(LONG).unwrap();
    }
    assert_eq!(written.all_steps().unwrap(), [1, 2, 3, 4]);
    assert_eq!((written.latest_step().unwrap(), written.best_step().unwrap()), (Some(4), Some(2)));
    assert_eq!(written.metrics(3).unwrap().unwrap()["accuracy"], 0.7);
    assert_eq!(written.restore(Some(2)).unwrap().value::<u64>("epoch").unwrap(), 2);
    assert_eq!(written.restore(Some(9)).unwrap_err().kind(), ErrorKind::NotFound);
    written.delete(2).unwrap();
    assert_eq!(written.delete(2).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(written.delete(4).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!((written.all_steps().unwrap(), written.best_step().unwrap()), (vec![1, 3, 4], Some(3)));

    // Another manager finds the same, and one that only reads changes nothing.
    assert_eq!(manager(root.path(), best(true)).best_step().unwrap(), Some(1));
    let before = files(root.path());
    let reader = CheckpointManager::read_only(root.path(), best(false)).unwrap();
    assert!(reader.is_read_only() && !reader.should_save(100));
    assert!(!reader.save(100, state(1)).unwrap());
    assert_eq!(reader.save_with(100, state(1), None::<&()>, true).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(reader.delete(1).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!((reader.latest_step().unwrap(), reader.best_step().unwrap()), (Some(4), Some(3)));
    written.save(5, state(5)).unwrap();
    written.wait_until_finished(LONG).unwrap();
    assert_eq!(reader.latest_step().unwrap(), Some(5), "it looks again");
    assert!(before.iter().all(|(name, bytes)| files(root.path()).get(name) == Some(bytes)));
    assert!(CheckpointManager::read_only(root.path().join("missing"), best(false)).is_err());
}

#[test]
fn an_older_step_is_not_saved_and_force_does_not_replace() {
    let root = tempfile::tempdir().unwrap();
    let manager = manager(root.path(), Options::new());
    assert!(manager.save(10, state(1)).unwrap());
    assert!(!manager.save(10, state(2)).unwrap() && !manager.save(9, state(2)).unwrap());
    assert!(manager.save_with(9, state(2), None::<&()>, true).unwrap());
    manager.wait_until_finished(LONG).unwrap();
    let there = manager.save_with(10, state(2), None::<&()>, true).unwrap_err();
    assert_eq!((there.kind(), there.step()), (ErrorKind::Conflict, Some(10)));
    let mut taken = state(3);
    taken.metadata("metrics", &1).unwrap();
    assert_eq!(manager.save_with(11, taken, Some(&1), false).unwrap_err().kind(), ErrorKind::Invalid);
    let unkept = manager.save_with(11, state(3), Some(&u128::MAX), false).unwrap_err();
    assert_eq!(unkept.kind(), ErrorKind::Invalid);
    assert_eq!(manager.all_steps().unwrap(), [9, 10]);
    assert_eq!(manager.restore(Some(10)).unwrap().value::<u64>("epoch").unwrap(), 1);
}

#[test]
fn items_are_saved_as_one_step() {
    let root = tempfile::tempdir().unwrap();
    let manager = manager(root.path(), Options::new());
    let items = CompositeArgs::new().item("model", state(1)).unwrap().item("optimizer", state(2)).unwrap();
    assert!(manager.save_items(1, items).unwrap());
    manager.wait_until_finished(LONG).unwrap();
    let step = manager.restore(None).unwrap();
    assert_eq!(Item::of(&step, "optimizer").unwrap().value::<u64>("epoch").unwrap(), 2);
}

#[test]
fn a_save_through_the_manager_leaves_the_bytes_that_the_engine_leaves() {
    let options = SaveOptions::default().attempt(Attempt::new());
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let plain = engine(ours.path()).build().unwrap();
    plain.save_with(5, state(1), options.clone()).unwrap().wait(LONG).unwrap();
    let manager = manager(theirs.path(), Options::new());
    assert!(manager.save_as(5, state(1), None::<&()>, false, options).unwrap());
    manager.wait_until_finished(LONG).unwrap();
    assert_eq!(files(ours.path()), files(theirs.path()));
}

/// A manager over a storage that refuses the first few attempts.
fn flaky(refusals: usize, failed: Failed, options: Options) -> CheckpointManager {
    let engine = engine("in memory".as_ref()).storage(Arc::new(Flaky::new(refusals))).failed(failed).build().unwrap();
    CheckpointManager::new(Arc::new(engine), options).unwrap()
}

#[test]
fn a_failed_save_is_an_error_of_the_next_call_once() {
    let next = flaky(2, Failed::NextCall, Options::new());
    next.save(1, state(1)).unwrap();
    assert_eq!(next.wait_until_finished(LONG).unwrap_err().kind(), ErrorKind::Unavailable);
    next.check_for_errors().unwrap();
    next.save(2, state(1)).unwrap();
    eventually("it has ended", || !next.is_saving_in_progress());
    let error = next.save(3, state(1)).unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Unavailable, Some(2)));
    next.save(3, state(1)).unwrap();
    next.wait_until_finished(LONG).unwrap();
    assert_eq!(next.all_steps().unwrap(), [3], "a step that failed is not there");
}

#[test]
fn a_failed_save_is_only_logged_where_that_is_the_policy() {
    let warns = flaky(1, Failed::Warn, Options::new());
    warns.save(1, state(1)).unwrap();
    eventually("it has ended", || !warns.is_saving_in_progress());
    warns.save(2, state(1)).unwrap();
    warns.wait_until_finished(LONG).unwrap();
    assert_eq!(warns.all_steps().unwrap(), [2]);
}

#[test]
fn a_failure_that_may_pass_is_tried_again() {
    let retries = flaky(2, Failed::NextCall, Options::new().retry(2));
    retries.save(1, state(7)).unwrap();
    retries.wait_until_finished(LONG).unwrap();
    assert_eq!(retries.restore(Some(1)).unwrap().value::<u64>("epoch").unwrap(), 7);
    let written = one("counter", Buffer::new(vec![0; 10]).source());
    assert!(retries.save(2, written).unwrap_err().to_string().contains("counter"));
}
