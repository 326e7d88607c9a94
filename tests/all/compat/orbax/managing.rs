//! `CheckpointManager`: saving, steps, metrics, errors, reading only.

use crate::compat::{Gate, drop_in_a_child, engine, files, refusing_attempts, state};
use crate::fixtures::executor::{Buffer, LONG, eventually, one};
use crate::fixtures::log::LogLines;
use ashore::compat::orbax::{
    BestN, CheckpointInfo, CheckpointManager, CheckpointManagerOptions, CompositeArgs, Item, LatestN,
};
use ashore::testing::LateDevice;
use ashore::{Attempt, Catalog, Dtype, ErrorKind, OnUnseenError, Overlap, SaveOptions, Snapshot};
use serde_json::json;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

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
    let unkept = manager.save_with(11, state(3), Some(&Some(None::<u8>)), false).unwrap_err();
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
    let options = SaveOptions::default().attempt(Attempt::new()).name("5");
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let manager = manager(theirs.path(), Options::new());
    assert!(manager.save_as(5, state(1), None::<&()>, false, options.clone()).unwrap());
    manager.wait_until_finished(LONG).unwrap();
    // The one thing that the manager adds.
    let (mut same, saved) = (state(1), manager.metadata(5).unwrap().custom::<u64>("init_timestamp_nsecs").unwrap());
    same.metadata("init_timestamp_nsecs", &saved).unwrap();
    let plain = engine(ours.path()).build().unwrap();
    plain.save_with(5, same, options).unwrap().wait(LONG).unwrap();
    assert_eq!(files(ours.path()), files(theirs.path()));
}

/// A manager over a storage that refuses the first few attempts.
fn flaky(refusals: usize, failed: OnUnseenError, options: Options) -> CheckpointManager {
    let engine = engine("in memory".as_ref())
        .storage(Arc::new(refusing_attempts(refusals)))
        .on_unseen_error(failed)
        .build()
        .unwrap();
    CheckpointManager::new(Arc::new(engine), options).unwrap()
}

#[test]
fn a_failed_save_is_an_error_of_the_next_call_once() {
    let next = flaky(2, OnUnseenError::NextCall, Options::new());
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
    let warns = flaky(1, OnUnseenError::Warn, Options::new());
    warns.save(1, state(1)).unwrap();
    eventually("it has ended", || !warns.is_saving_in_progress());
    warns.save(2, state(1)).unwrap();
    warns.wait_until_finished(LONG).unwrap();
    assert_eq!(warns.all_steps().unwrap(), [2]);
}

#[test]
fn a_failure_that_may_pass_is_tried_again() {
    let retries = flaky(2, OnUnseenError::NextCall, Options::new().retry(2));
    retries.save(1, state(7)).unwrap();
    retries.wait_until_finished(LONG).unwrap();
    assert_eq!(retries.restore(Some(1)).unwrap().value::<u64>("epoch").unwrap(), 7);
    let written = one("counter", Buffer::new(vec![0; 10]).source());
    assert!(retries.save(2, written).unwrap_err().to_string().contains("counter"));
}

/// The manager's thread that follows saves held the last `Arc` of the executor, and `main` did not wait for
/// that thread: the last save of a program was lost, and so were pending retries and deletions.
#[test]
fn a_manager_that_is_dropped_waits_for_its_saves_their_retries_and_what_is_deleted() {
    let root = tempfile::tempdir().unwrap();
    let engine = Arc::new(engine(root.path()).overlap(Overlap::Queue(8)).build().unwrap());
    let manager = CheckpointManager::new(engine.clone(), Options::new().preservation_policy(LatestN(1))).unwrap();
    for step in 1..=4 {
        assert!(manager.save(step, state(step)).unwrap());
    }
    drop(manager);
    let left: Vec<u64> = Catalog::open(root.path()).unwrap().list().unwrap().iter().map(|entry| entry.step).collect();
    assert_eq!((left, Arc::strong_count(&engine)), (vec![4], 1));

    let retries = flaky(2, OnUnseenError::NextCall, Options::new().retry(2));
    retries.save(1, state(7)).unwrap();
    retries.close(LONG).unwrap();
    let fails = flaky(1, OnUnseenError::NextCall, Options::new());
    fails.save(1, state(7)).unwrap();
    assert_eq!(fails.close(LONG).unwrap_err().kind(), ErrorKind::Unavailable);
}

#[test]
#[cfg_attr(miri, ignore = "forks")]
fn a_manager_that_a_forked_child_drops_goes_on_in_the_parent() {
    let (root, device) = (tempfile::tempdir().unwrap(), LateDevice::default());
    let engine = engine(root.path()).made_device(Arc::new(device.clone())).shutdown_timeout(LONG).build().unwrap();
    let manager = CheckpointManager::new(Arc::new(engine), Options::new()).unwrap();
    device.hold();
    assert!(manager.save(1, state(1)).unwrap());
    drop_in_a_child(&manager);
    device.release();
    manager.wait_until_finished(LONG).unwrap();
    assert_eq!(manager.all_steps().unwrap(), [1]);
}

/// A retry dropped the options of its save: it went to another path, and did not overwrite.
#[test]
fn a_retry_has_the_options_of_the_save() {
    let retries = flaky(1, OnUnseenError::NextCall, Options::new().retry(1));
    let options = SaveOptions::default().name("ckpt-5").attempt(Attempt::new());
    assert!(retries.save_as(5, state(1), None::<&()>, false, options).unwrap());
    retries.wait_until_finished(LONG).unwrap();
    assert_eq!(retries.restore(Some(5)).unwrap().name(), "ckpt-5");
}

#[test]
fn steps_are_named_as_orbax_names_them_and_found_under_any_known_name() {
    let names = |options: Options| {
        let root = tempfile::tempdir().unwrap();
        let manager = manager(root.path(), options);
        manager.save(5, state(1)).unwrap();
        manager.close(LONG).unwrap();
        let reader = CheckpointManager::read_only(root.path(), Options::new()).unwrap();
        assert_eq!(reader.all_steps().unwrap(), [5]);
        reader.restore(Some(5)).unwrap().name().to_owned()
    };
    assert_eq!(names(Options::new()), "5");
    assert_eq!(names(Options::new().step_format(Some("step"), None)), "step_5");
    assert_eq!(names(Options::new().step_format(None, Some(4))), "0005");
    assert_eq!(names(Options::new().step_format(Some("iter"), Some(7))), "iter_0000005");
    assert_eq!(names(Options::new().step_name(|step| format!("ckpt-{step}"))), "ckpt-5");
    let root = tempfile::tempdir().unwrap();
    for lost in [Options::new().step_format(Some("weights"), None), Options::new().step_name(|_| "7".into())] {
        let engine = Arc::new(engine(root.path()).build().unwrap());
        assert_eq!(CheckpointManager::new(engine, lost).unwrap_err().kind(), ErrorKind::Invalid);
    }
    // A step exists even under another name.
    let engine = Arc::new(engine(root.path()).build().unwrap());
    engine.save(5, state(1)).unwrap().wait(LONG).unwrap();
    let manager = CheckpointManager::new(engine, Options::new()).unwrap();
    assert!(!manager.save(5, state(2)).unwrap());
    assert_eq!(manager.save_with(5, state(2), None::<&()>, true).unwrap_err().kind(), ErrorKind::Conflict);
}

#[test]
fn with_a_snapshot_at_save_the_tensors_may_be_written_when_save_returns() {
    let root = tempfile::tempdir().unwrap();
    let manager = manager(root.path(), Options::new().snapshot(Snapshot::AtSave));
    let buffer = Buffer::new(vec![1; 10_000]);
    for step in 1..=3_u8 {
        assert!(manager.save(step.into(), one("t", buffer.source())).unwrap());
        buffer.fill(&[step + 1; 10_000]);
    }
    manager.wait_until_finished(LONG).unwrap();
    for step in 1..=3_u8 {
        assert_eq!(manager.restore(Some(step.into())).unwrap().read("t").unwrap(), vec![step; 10_000]);
    }
}

#[test]
fn the_metadata_of_a_step_is_read_without_its_tensors() {
    let root = tempfile::tempdir().unwrap();
    let manager = manager(root.path(), Options::new());
    let before = SystemTime::now();
    manager.save_with(1, state(1), Some(&json!({ "loss": 0.5 })), false).unwrap();
    manager.wait_until_finished(LONG).unwrap();
    let metadata = manager.metadata(1).unwrap();
    assert!(metadata.time >= before - Duration::from_secs(1) && metadata.time <= SystemTime::now());
    assert_eq!(metadata.metrics.as_ref().unwrap()["loss"], 0.5);
    assert_eq!(metadata.custom::<String>("run").unwrap(), "a test");
    let tensors = manager.item_metadata(1).unwrap();
    assert_eq!(tensors.keys().collect::<Vec<_>>(), ["model.bias", "model.weights"]);
    assert_eq!((tensors["model.bias"].dtype, &tensors["model.bias"].shape[..]), (Dtype::F32, &[7][..]));
    assert_eq!(manager.metadata(2).unwrap_err().kind(), ErrorKind::NotFound);
}

/// The manager forgot the second save of a step when it saw the end of the first.
#[test]
fn two_saves_of_one_step_are_two_saves_under_way() {
    let (root, device, gate) = (tempfile::tempdir().unwrap(), LateDevice::default(), Arc::new(Gate::default()));
    let engine = engine(root.path()).made_device(Arc::new(device.clone())).build().unwrap();
    let held = gate.clone();
    let options = Options::new().preservation_policy(move |steps: &[CheckpointInfo]| {
        held.pass();
        vec![true; steps.len()]
    });
    let manager = CheckpointManager::new(Arc::new(engine), options).unwrap();
    assert!(manager.save(1, state(1)).unwrap());
    gate.reached();
    device.hold();
    assert!(manager.save_as(1, state(2), None::<&()>, true, SaveOptions::default().overwrite()).unwrap());
    gate.open();
    let unfinished = manager.wait_until_finished(Duration::from_millis(200)).unwrap_err();
    assert_eq!(unfinished.kind(), ErrorKind::Deadline);
    assert!(manager.is_saving_in_progress());
    device.release();
    manager.wait_until_finished(LONG).unwrap();
    assert_eq!(manager.restore(Some(1)).unwrap().value::<u64>("epoch").unwrap(), 2);
}

/// After its own timeout, a manager with the last `Arc` of an executor also waited for the executor's
/// `shutdown_timeout`.
#[test]
fn a_manager_closes_within_its_deadline() {
    let (root, device) = (tempfile::tempdir().unwrap(), LateDevice::default());
    let patience = Duration::from_secs(20);
    let engine = engine(root.path()).made_device(Arc::new(device.clone())).shutdown_timeout(patience).build().unwrap();
    let manager = CheckpointManager::new(Arc::new(engine), Options::new()).unwrap();
    device.hold();
    assert!(manager.save(1, state(1)).unwrap());
    let began = Instant::now();
    let late = manager.close(Duration::from_millis(1)).unwrap_err();
    assert!(late.kind() == ErrorKind::Deadline && began.elapsed() < patience / 2, "{late} {:?}", began.elapsed());
    device.release();
    assert!(Catalog::open(root.path()).unwrap().list().unwrap().is_empty());
}

/// Of several failed saves, `close` reported one, and nothing reported the others.
#[test]
fn errors_that_close_does_not_return_are_logged() {
    let device = LateDevice::default();
    let builder =
        engine("in memory".as_ref()).storage(Arc::new(refusing_attempts(2))).made_device(Arc::new(device.clone()));
    let engine = builder.overlap(Overlap::Queue(2)).build().unwrap();
    let manager = CheckpointManager::new(Arc::new(engine), Options::new()).unwrap();
    device.hold();
    for step in [1, 2] {
        assert!(manager.save(step, state(step)).unwrap());
    }
    device.release();
    let heard = LogLines::default();
    let error = tracing::subscriber::with_default(heard.clone(), || manager.close(LONG)).unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Unavailable, Some(1)));
    let lines = heard.0.lock().unwrap();
    assert!(
        lines.iter().any(|line| line.contains("no call has returned its error") && line.contains("step=2")),
        "{lines:?}"
    );
}
