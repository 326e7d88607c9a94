//! `execute_save` and its future: results, options, paths, overlap.

use crate::compat::{engine, files, state};
use crate::fixtures::executor::{LONG, one, pattern};
use ashore::compat::torch::{
    AsyncCheckpointExecutor, EngineWriter, ExecuteOptions, StagedState, Staging, StorageMetadata, StorageWriter,
    ThreadExecutor, ThreadGroup,
};
use ashore::testing::{LateDevice, block_on};
use ashore::{Attempt, Checkpoint, ErrorKind, Overlap, SaveOptions};
use std::sync::Arc;
use std::time::Duration;

fn to(id: impl Into<std::path::PathBuf>) -> ExecuteOptions {
    ExecuteOptions::new().checkpoint_id(id)
}

#[test]
fn the_future_is_of_the_metadata_of_a_durable_checkpoint() {
    let root = tempfile::tempdir().unwrap();
    let executor: Box<dyn AsyncCheckpointExecutor> =
        Box::new(ThreadExecutor::new(Arc::new(engine(root.path()).build().unwrap())).unwrap());
    let future = executor.execute_save(state(3).into(), to(root.path().join("step-7"))).unwrap();
    block_on(future.staging_completion()).unwrap();
    let metadata = block_on(future).unwrap().unwrap();
    let names: Vec<_> = metadata.state_dict_metadata.keys().map(String::as_str).collect();
    assert_eq!(names, ["epoch", "model.bias", "model.weights"]);
    let StorageMetadata::Tensor(weights) = &metadata.state_dict_metadata["model.weights"] else { panic!() };
    assert_eq!((&weights.size[..], weights.chunks.len()), (&[20_000][..], 1));
    assert_eq!(metadata.state_dict_metadata["epoch"], StorageMetadata::Bytes);
    assert_eq!(metadata.storage_data.len(), 3);
    let meta = metadata.storage_meta.unwrap();
    let checkpoint = Checkpoint::open(&meta.checkpoint_id).unwrap();
    assert_eq!((checkpoint.step(), Some(checkpoint.attempt().to_string())), (7, meta.save_id));
    assert_eq!(checkpoint.read("model.weights").unwrap(), pattern(3, 20_000));
}

#[test]
fn a_save_through_the_face_leaves_the_bytes_that_the_engine_leaves() {
    let attempt = Attempt::new();
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let plain = engine(ours.path()).build().unwrap();
    plain.save_with(5, state(1), SaveOptions::default().attempt(attempt).name("step-5")).unwrap().wait(LONG).unwrap();
    let executor = ThreadExecutor::new(Arc::new(engine(theirs.path()).build().unwrap())).unwrap();
    executor.execute_save(state(1).into(), to("step-5").attempt(attempt)).unwrap().result(LONG).unwrap().unwrap();
    assert_eq!(files(ours.path()), files(theirs.path()));
    assert_eq!(files(ours.path()).len(), 3);

    // Through the engine as a storage writer, on the executor's own thread, it is the same path.
    let third = tempfile::tempdir().unwrap();
    let writer = EngineWriter::new(Arc::new(engine(third.path()).build().unwrap())).attempt(Some(attempt));
    let future = executor.execute_save(state(1).into(), to("step-5").storage_writer(writer)).unwrap();
    future.result(LONG).unwrap().unwrap();
    assert_eq!(files(ours.path()), files(third.path()));
}

#[test]
fn an_executor_is_used_again_and_again_and_replaces_as_torch_does() {
    let root = tempfile::tempdir().unwrap();
    let executor = ThreadExecutor::new(Arc::new(engine(root.path()).build().unwrap())).unwrap();
    for seed in 0..5 {
        let future = executor.execute_save(state(seed).into(), to(root.path().join("7"))).unwrap();
        future.result(LONG).unwrap().unwrap();
        assert!(future.try_result().is_some() && !future.cancel());
    }
    let seen: u64 = Checkpoint::open(root.path().join("7")).unwrap().value("epoch").unwrap();
    assert_eq!(seen, 4);
    let refused = executor.execute_save(state(9).into(), to("7").overwrite(false)).unwrap();
    assert_eq!(refused.result(LONG).unwrap_err().kind(), ErrorKind::Conflict);
    executor.close(LONG).unwrap();
}

#[test]
fn groups_and_places_that_are_none_are_invalid_and_change_nothing() {
    let root = tempfile::tempdir().unwrap();
    let executor = ThreadExecutor::new(Arc::new(engine(root.path()).build().unwrap())).unwrap();
    let alone = || ThreadGroup::new(1).remove(0);
    let error = executor
        .execute_save(state(1).into(), to("step-1").process_group(ThreadGroup::new(2).remove(0)))
        .expect_err("a group that the engine does not save with");
    assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("engine_ranks=1"), "{error}");
    // Each save finds its path in its turn, and the future returns errors of it as torch's does.
    let places = [(ExecuteOptions::new(), "checkpoint_id"), (to("/"), "name"), (to(".hidden"), "hidden")];
    for (options, named) in places {
        let shown = format!("{options:?}");
        let error = executor.execute_save(state(1).into(), options).unwrap().result(LONG).expect_err(&shown);
        assert_eq!(error.kind(), ErrorKind::Invalid, "{shown}");
        assert!(error.to_string().contains(named), "{shown}: {error}");
    }
    assert!(files(root.path()).is_empty());
    // Alone, no parameter changes anything, as in torch: not even two that seem to contradict each other.
    for (step, options) in [
        to("6").process_group(alone()).no_dist(true),
        to("7").process_group(ThreadGroup::new(2).remove(1)).no_dist(true),
        to("8").no_dist(true).use_collectives(false),
        to("9").use_collectives(false),
        to("1").process_group(alone()),
        to("2").process_group(alone()).use_collectives(false),
        to("3").process_group(alone()).use_collectives(true),
        to("4").no_dist(true).use_collectives(true),
        to("5").use_collectives(true),
    ]
    .into_iter()
    .enumerate()
    {
        executor.execute_save(state(step as u64).into(), options).unwrap().result(LONG).unwrap().unwrap();
    }
    assert_eq!(executor.executor().catalog().list().unwrap().len(), 9);
}

#[test]
fn overlapping_saves_follow_the_policy_of_the_engine() {
    let root = tempfile::tempdir().unwrap();
    let device = LateDevice::default();
    let build = engine(root.path()).made_device(Arc::new(device.clone())).overlap(Overlap::Skip).build().unwrap();
    let executor = ThreadExecutor::new(Arc::new(build)).unwrap();
    device.hold();
    let first = executor.execute_save(state(1).into(), to("1")).unwrap();
    let second = executor.execute_save(state(2).into(), to("2")).unwrap();
    assert!(second.result(LONG).unwrap().is_none());
    device.release();
    first.result(LONG).unwrap().unwrap();

    // Saves that wait for a staging future count, too.
    let pending = || StagedState::Pending(Staging::future(std::future::pending()));
    let waits = executor.execute_save(pending(), to("3")).unwrap();
    assert!(executor.execute_save(pending(), to("4")).unwrap().result(LONG).unwrap().is_none());
    assert!(waits.cancel() && !waits.cancel());
    assert_eq!(waits.result(LONG).unwrap_err().kind(), ErrorKind::Cancelled);
    executor.execute_save(one("t", vec![1_u8]).into(), to("5")).unwrap().result(LONG).unwrap().unwrap();
    executor.close(LONG).unwrap();
}

#[test]
fn a_queue_that_is_full_is_busy_at_the_deadline() {
    let root = tempfile::tempdir().unwrap();
    let executor = ThreadExecutor::new(Arc::new(engine(root.path()).overlap(Overlap::Block).build().unwrap())).unwrap();
    let pending = || StagedState::Pending(Staging::future(std::future::pending()));
    let first = executor.execute_save(pending(), to("1")).unwrap();
    let soon = to("2").timeout(Duration::from_millis(20));
    assert_eq!(executor.execute_save(pending(), soon).unwrap_err().kind(), ErrorKind::Busy);
    assert!(first.cancel());
}

#[test]
fn a_checkpoint_id_may_be_any_path_and_one_of_no_step_is_beside_the_steps() {
    let (root, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let engine = Arc::new(engine(root.path()).build().unwrap());
    let executor = ThreadExecutor::new(engine.clone()).unwrap();
    let outside = [root.path().join("deeper/step-1"), other.path().join("step-1"), other.path().join("last.ckpt")];
    let in_root = ["weights", "epoch=3-step=100", "checkpoint_7"].map(|id| root.path().join(id));
    for id in in_root.iter().chain(&outside) {
        let future = executor.execute_save(state(1).into(), to(id)).unwrap();
        let place = future.result(LONG).unwrap().unwrap().storage_meta.unwrap().checkpoint_id;
        assert!(place.ends_with(id) && Checkpoint::open(&place).unwrap().verify().unwrap().is_sound());
    }
    assert!(engine.catalog().list().unwrap().is_empty());
    let writer = EngineWriter::new(engine);
    assert!(writer.validate_checkpoint_id("weights".as_ref()) && writer.validate_checkpoint_id("step-1".as_ref()));
    assert!(writer.validate_checkpoint_id(&outside[1]) && !writer.validate_checkpoint_id("/".as_ref()));
}

/// The executor checked for space and reserved it under two locks: two callers at once both got it.
#[test]
fn of_concurrent_callers_one_takes_the_last_place() {
    let root = tempfile::tempdir().unwrap();
    let build = engine(root.path()).overlap(Overlap::Skip).build().unwrap();
    let executor = ThreadExecutor::new(Arc::new(build)).unwrap();
    let pending = || StagedState::Pending(Staging::future(std::future::pending()));
    for _ in 0..100 {
        let together = std::sync::Barrier::new(4);
        let futures: Vec<_> = std::thread::scope(|scope| {
            let call = || {
                together.wait();
                executor.execute_save(pending(), to("1")).unwrap()
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(call)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let waiting = futures.iter().filter(|future| future.try_result().is_none()).count();
        assert_eq!(waiting, 1);
        futures.iter().filter(|future| future.try_result().is_none()).for_each(|future| assert!(future.cancel()));
    }
}

/// A forked child that dropped an executor waited for saves of the parent's threads, for as long as a
/// shutdown may take.
#[test]
#[cfg_attr(miri, ignore = "forks")]
fn an_executor_that_a_forked_child_drops_goes_on_in_the_parent() {
    let root = tempfile::tempdir().unwrap();
    let build = engine(root.path()).shutdown_timeout(LONG).build().unwrap();
    let executor = ThreadExecutor::new(Arc::new(build)).unwrap();
    let waits = Staging::future(std::future::pending());
    let pending = executor.execute_save(waits.into(), to("1")).unwrap();
    crate::compat::drop_in_a_child(&executor);
    assert!(pending.cancel());
    let future = executor.execute_save(Staging::future(async { Ok(state(2)) }).into(), to("2")).unwrap();
    future.result(LONG).unwrap().unwrap();
}

/// `close`, and a drop, waited only for the saves of their own thread: where the program also had the engine,
/// the saves that the engine got directly were still under way when they returned.
#[test]
fn an_executor_that_ends_waits_for_its_saves_though_the_engine_goes_on() {
    let (root, device) = (tempfile::tempdir().unwrap(), LateDevice::default());
    let engine = Arc::new(engine(root.path()).made_device(Arc::new(device.clone())).build().unwrap());
    let begin = |step: u64| {
        let executor = ThreadExecutor::new(engine.clone()).unwrap();
        device.hold();
        drop(executor.execute_save(state(step).into(), to(step.to_string())).unwrap());
        executor
    };
    assert_eq!(begin(1).close(Duration::from_millis(1)).unwrap_err().kind(), ErrorKind::Deadline);
    device.release();

    let executor = begin(2);
    let (dropped, wait) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        // Released when the executor is gone, which must wait, or a moment later.
        let held = &device;
        scope.spawn(move || {
            let _ = wait.recv_timeout(Duration::from_millis(100));
            held.release();
        });
        drop(executor);
        assert!(engine.checkpoint(2).is_ok());
        let _ = dropped.send(());
    });
    assert_eq!(engine.catalog().list().unwrap().len(), 1, "the save that was late has failed");
}

/// Saves that wait for their state were admitted by a queue of the executor's own, which knew nothing of
/// those that the engine had.
#[test]
fn saves_whose_state_is_yet_to_come_have_their_place_among_all_saves_of_the_engine() {
    let root = tempfile::tempdir().unwrap();
    let pending = || StagedState::Pending(Staging::future(std::future::pending()));
    let build = |overlap| Arc::new(engine(root.path()).overlap(overlap).build().unwrap());

    let engine = build(Overlap::Skip);
    let executor = ThreadExecutor::new(engine.clone()).unwrap();
    let waits = executor.execute_save(pending(), to("1")).unwrap();
    assert!(executor.execute_save(state(2).into(), to("2")).unwrap().result(LONG).unwrap().is_none());
    assert!(engine.save(3, state(3)).unwrap().wait(LONG).unwrap().committed().is_none());
    engine.fence().unwrap(); // of which nothing is read yet
    assert_eq!(engine.shutdown(Duration::from_millis(5)).unwrap_err().kind(), ErrorKind::Deadline);
    assert_eq!(waits.result(LONG).unwrap_err().kind(), ErrorKind::Cancelled);
    executor.close(LONG).unwrap();

    // The newest takes the place of one whose turn has not come, not of one whose state is waited for.
    let executor = ThreadExecutor::new(build(Overlap::Latest)).unwrap();
    let (polled, was_polled) = std::sync::mpsc::channel();
    let first = std::future::poll_fn(move |_| {
        let _ = polled.send(());
        std::task::Poll::Pending
    });
    let first = executor.execute_save(Staging::future(first).into(), to("4")).unwrap();
    was_polled.recv_timeout(LONG).unwrap();
    let second = executor.execute_save(pending(), to("5")).unwrap();
    let third = executor.execute_save(Staging::future(async { Ok(state(6)) }).into(), to("6")).unwrap();
    assert!(second.result(LONG).unwrap().is_none() && first.try_result().is_none());
    assert!(first.cancel());
    third.result(LONG).unwrap().unwrap();

    // Of two of one step that overlap, the one that begins later is refused.
    let executor = ThreadExecutor::new(build(Overlap::Queue(4))).unwrap();
    let (stage, staging) =
        Staging::channel(ashore::StateDict::new(), [("t".into(), ashore::Layout::new(ashore::Dtype::U8, [3]))])
            .unwrap();
    let direct = executor.execute_save(staging.into(), to("7")).unwrap();
    let late = executor.execute_save(Staging::future(async { Ok(state(7)) }).into(), to("7")).unwrap();
    assert_eq!(late.result(LONG).unwrap_err().kind(), ErrorKind::Conflict);
    drop(stage);
    assert_eq!(direct.result(LONG).unwrap_err().kind(), ErrorKind::Cancelled);
    executor.close(LONG).unwrap();
}
