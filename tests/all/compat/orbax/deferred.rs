//! Deferred saves wait for a path, and for the signal that the path is known, or the reason why it never will
//! be.

use crate::compat::{Gate, describing_after, engine, files, publishing_after, state};
use crate::fixtures::executor::{Buffer, LONG, eventually, one};
use ashore::compat::orbax::{
    AsyncCheckpointHandler, CommitFuture, CompositeArgs, CompositeCheckpointHandler, DeferredPath,
    DeferredPathAsyncCheckpointHandler, HandlerAwaitableSignal, OperationId, SaveArgs, SavePath, Signals,
    StandardCheckpointHandler,
};
use ashore::testing::{LateDevice, block_on};
use ashore::{Checkpoint, Error, ErrorKind, Overlap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const STEP: HandlerAwaitableSignal = HandlerAwaitableSignal::StepDirectoryCreation;
const ITEM: HandlerAwaitableSignal = HandlerAwaitableSignal::ItemDirectoryCreation;

fn handler(root: &Path) -> StandardCheckpointHandler {
    StandardCheckpointHandler::new(Arc::new(engine(root).build().unwrap()))
}

fn operation() -> (Signals, OperationId, SaveArgs) {
    let signals = Signals::new();
    let id = signals.next_operation_id(&[STEP]);
    let args = SaveArgs::default().operation(&signals, id);
    (signals, id, args)
}

#[test]
fn a_path_can_be_joined_and_awaited_before_it_is_known() {
    let deferred = DeferredPath::new();
    let path = deferred.awaiting();
    let item = (&path / "step-1").unwrap().join("model").unwrap();
    assert_eq!(item.path().unwrap_err().kind(), ErrorKind::Busy);
    assert_eq!(item.wait(Duration::from_millis(5)).unwrap_err().kind(), ErrorKind::Deadline);
    for elsewhere in ["/etc", "..", "a/../../b"] {
        assert_eq!(path.join(elsewhere).unwrap_err().kind(), ErrorKind::Invalid, "{elsewhere}");
    }
    let waits = std::thread::spawn({
        let future = item.await_creation();
        move || block_on(future)
    });
    assert!(deferred.set_path("/runs/7") && !deferred.set_path("/runs/8"));
    assert_eq!(waits.join().unwrap().unwrap(), PathBuf::from("/runs/7/step-1/model"));
    assert_eq!(path.path().unwrap(), PathBuf::from("/runs/7"));
    assert_eq!(item.wait(LONG).unwrap(), PathBuf::from("/runs/7/step-1/model"));

    let given_up = DeferredPath::new();
    let path = given_up.awaiting();
    drop(given_up);
    assert_eq!(block_on(path.await_creation()).unwrap_err().kind(), ErrorKind::Cancelled);
    let failed = DeferredPath::new();
    failed.fail(Error::new(ErrorKind::NoSpace, "no room"));
    assert_eq!(failed.awaiting().path().unwrap_err().kind(), ErrorKind::NoSpace);
}

#[test]
fn a_deferred_save_touches_nothing_before_its_signal_and_is_durable_after_it() {
    let root = tempfile::tempdir().unwrap();
    let (handler, deferred, (signals, id, args)) = (handler(root.path()), DeferredPath::new(), operation());
    let path = SavePath::Deferred(deferred.awaiting().join("step-3").unwrap());
    let futures = handler.async_save_deferred(path, state(1), args).unwrap();
    deferred.set_path(root.path());
    // The path is known, but the signal has not come: nothing is saved yet.
    assert_eq!(futures[0].result(Duration::from_millis(10)).unwrap_err().kind(), ErrorKind::Deadline);
    assert!(files(root.path()).is_empty() && crate::fixtures::executor::hidden(root.path()).is_empty());
    signals.send(id, STEP);
    futures[0].result(LONG).unwrap().committed().unwrap();
    block_on(futures[0].clone()).unwrap();
    assert_eq!(Checkpoint::open(root.path().join("step-3")).unwrap().value::<u64>("epoch").unwrap(), 1);
    signals.remove(id);
    assert!(signals.contract(id).is_empty());
    assert_eq!(signals.wait(id, STEP, LONG).unwrap_err().kind(), ErrorKind::NotFound);

    // A save to a known path begins at once.
    let known = SavePath::Known(root.path().join("step-4"));
    handler.async_save_deferred(known, state(2), SaveArgs::default()).unwrap()[0].result(LONG).unwrap();
}

#[test]
fn a_deferred_composite_is_one_commit() {
    let root = tempfile::tempdir().unwrap();
    let handler = CompositeCheckpointHandler::new(Arc::new(engine(root.path()).build().unwrap()));
    let (deferred, (signals, id, args)) = (DeferredPath::new(), operation());
    let items = CompositeArgs::new().item("model", state(1)).unwrap().item("optimizer", state(2)).unwrap();
    let futures = handler.async_save_deferred(SavePath::Deferred(deferred.awaiting()), items, args).unwrap();
    deferred.set_path(root.path().join("8"));
    signals.send(id, STEP);
    assert_eq!(futures.len(), 2);
    for future in futures {
        future.result(LONG).unwrap().committed().unwrap();
    }
    assert_eq!(Checkpoint::open(root.path().join("8")).unwrap().tensors().unwrap().len(), 4);
}

#[test]
fn errors_reach_the_waiters_at_once() {
    let root = tempfile::tempdir().unwrap();
    let handler = handler(root.path());
    let (deferred, (signals, id, args)) = (DeferredPath::new(), operation());
    let futures = handler.async_save_deferred(SavePath::Deferred(deferred.awaiting()), state(1), args).unwrap();
    let waits = std::thread::spawn({
        let signals = signals.clone();
        move || signals.wait(id, ITEM, LONG)
    });
    signals.fail(id, &Error::new(ErrorKind::NoSpace, "the directory cannot be made"));
    assert_eq!(futures[0].result(LONG).unwrap_err().kind(), ErrorKind::NoSpace);
    assert_eq!(waits.join().unwrap().unwrap_err().kind(), ErrorKind::NoSpace);

    // So does the error of the save itself: the path turns out to be none.
    let (deferred, (signals, id, args)) = (DeferredPath::new(), operation());
    let futures = handler.async_save_deferred(SavePath::Deferred(deferred.awaiting()), state(1), args).unwrap();
    deferred.set_path("/");
    signals.send(id, STEP);
    assert_eq!(signals.wait(id, ITEM, LONG).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(futures[0].result(LONG).unwrap_err().kind(), ErrorKind::Invalid);
    assert!(files(root.path()).is_empty());
}

#[test]
fn a_signal_that_never_comes_ends_at_the_deadline_and_a_cancelled_save_never_begins() {
    let root = tempfile::tempdir().unwrap();
    let handler = handler(root.path());
    let (deferred, (signals, id, args)) = (DeferredPath::new(), operation());
    let path = || SavePath::Deferred(deferred.awaiting());
    let soon = args.clone().timeout(Duration::from_millis(20));
    let late = handler.async_save_deferred(path(), state(1), soon).unwrap();
    assert_eq!(late[0].result(LONG).unwrap_err().kind(), ErrorKind::Deadline);

    let (signals2, id2, args2) = operation();
    let futures = handler.async_save_deferred(path(), state(1), args2).unwrap();
    assert!(futures[0].cancel() && !futures[0].cancel());
    assert_eq!(futures[0].result(LONG).unwrap_err().kind(), ErrorKind::Cancelled);
    deferred.set_path(root.path().join("1"));
    signals2.send(id2, STEP);
    assert!(files(root.path()).is_empty());
    assert_eq!(signals.wait(id, STEP, Duration::ZERO).unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn saves_that_cannot_be_deferred_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let (handler, deferred, (_, _, args)) = (handler(root.path()), DeferredPath::new(), operation());
    let path = || SavePath::Deferred(deferred.awaiting());
    let refused = |result: ashore::Result<Vec<CommitFuture>>| {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        error.to_string()
    };
    let written = one("counter", Buffer::new(vec![0; 100]).source());
    assert!(refused(handler.async_save_deferred(path(), written, args.clone())).contains("counter"));
    assert!(refused(handler.async_save_deferred(path(), state(1), SaveArgs::default())).contains("operation"));
    refused(handler.async_save_deferred(path(), state(1), args.timeout(Duration::ZERO)));
    let signals = Signals::new();
    let other = SaveArgs::default().operation(&signals, signals.next_operation_id(&[ITEM]));
    assert!(refused(handler.async_save_deferred(path(), state(1), other)).contains("step_directory_creation"));
    let _ = handler.async_save(&root.path().join("1"), state(1), SaveArgs::default()).unwrap()[0].result(LONG).unwrap();
}

#[test]
fn a_commit_sends_its_own_signals_when_it_is_durable() {
    let root = tempfile::tempdir().unwrap();
    let executor = Arc::new(engine(root.path()).build().unwrap());
    let signals = Signals::new();
    let id = signals.next_operation_id(&[]);
    let begun = Arc::new(AtomicBool::new(false));
    let save = {
        let (executor, begun) = (executor.clone(), begun.clone());
        move || {
            begun.store(true, Ordering::Relaxed);
            executor.save(1, state(1))
        }
    };
    let future = CommitFuture::contracted(&signals, id, &[ITEM], LONG, save).unwrap();
    signals.wait(id, ITEM, LONG).unwrap();
    assert!(begun.load(Ordering::Relaxed) && executor.checkpoint(1).is_ok());
    future.result(LONG).unwrap();
}

/// A deferred save that waited for a path held the executor: a program that dropped its own last `Arc` waited
/// for no save at all.
#[test]
fn a_save_that_waits_for_its_path_does_not_keep_the_executor_alive() {
    let root = tempfile::tempdir().unwrap();
    let engine = Arc::new(engine(root.path()).build().unwrap());
    let (deferred, (signals, id, args)) = (DeferredPath::new(), operation());
    let path = SavePath::Deferred(deferred.awaiting().join("5").unwrap());
    let futures = StandardCheckpointHandler::new(engine.clone()).async_save_deferred(path, state(1), args).unwrap();
    drop(Arc::into_inner(engine).expect("the last one"));
    deferred.set_path(root.path());
    signals.send(id, STEP);
    assert_eq!(futures[0].result(LONG).unwrap_err().kind(), ErrorKind::Cancelled);
}

/// A deferred save was reported as failed by its deadline, though it became durable a moment later.
#[test]
fn a_commit_that_is_being_published_at_its_deadline_is_indeterminate() {
    let gate = Arc::new(Gate::default());
    let engine = engine("in memory".as_ref()).storage(Arc::new(publishing_after(&gate))).build().unwrap();
    let engine = Arc::new(engine);
    let signals = Signals::new();
    let id = signals.next_operation_id(&[]);
    let save = {
        let (engine, gate) = (engine.clone(), gate.clone());
        move || {
            let save = engine.save(1, state(1))?;
            gate.reached();
            Ok(save)
        }
    };
    let future = CommitFuture::contracted(&signals, id, &[ITEM], Duration::from_nanos(1), save).unwrap();
    assert_eq!(future.result(LONG).unwrap_err().kind(), ErrorKind::Indeterminate);
    assert_eq!(signals.wait(id, ITEM, LONG).unwrap_err().kind(), ErrorKind::Indeterminate);
    gate.open();
    engine.shutdown(LONG).unwrap();
    assert!(engine.checkpoint(1).is_ok());
}

/// A deferred save that waited for queue space held the executor: dropping the program's own last `Arc`
/// waited for no save.
#[test]
fn a_save_that_waits_for_room_does_not_keep_the_executor_alive() {
    let (root, device) = (tempfile::tempdir().unwrap(), LateDevice::default());
    let engine = engine(root.path()).made_device(Arc::new(device.clone())).overlap(Overlap::Block).build().unwrap();
    let engine = Arc::new(engine);
    device.hold();
    drop(engine.save(1, state(1)).unwrap());
    let (deferred, (signals, id, args)) = (DeferredPath::new(), operation());
    let path = SavePath::Deferred(deferred.awaiting().join("5").unwrap());
    let futures = StandardCheckpointHandler::new(engine.clone()).async_save_deferred(path, state(1), args).unwrap();
    deferred.set_path(root.path());
    signals.send(id, STEP);
    // Long enough that it waits for queue space by now; if it were slower, the test would find nothing.
    assert_eq!(futures[0].result(Duration::from_millis(100)).unwrap_err().kind(), ErrorKind::Deadline);
    eventually("the program has the only one", || Arc::strong_count(&engine) == 1);
    device.release();
    drop(engine);
    assert!(Checkpoint::open(root.path().join("step-00000001")).is_ok());
}

/// Another save could take the room between the look for room and the save itself. The deferred save then
/// waited for room with a hold on the executor: dropping the program's own last `Arc` waited for no save.
#[test]
fn a_save_whose_room_is_taken_before_it_begins_does_not_keep_the_executor_alive() {
    let (gate, device) = (Arc::new(Gate::default()), LateDevice::default());
    let engine = engine("in memory".as_ref()).storage(Arc::new(describing_after(&gate)));
    let engine = engine.made_device(Arc::new(device.clone())).overlap(Overlap::Block).build().unwrap();
    let engine = Arc::new(engine);
    let (deferred, (signals, id, args)) = (DeferredPath::new(), operation());
    let path = SavePath::Deferred(deferred.awaiting());
    let futures = StandardCheckpointHandler::new(engine.clone()).async_save_deferred(path, state(5), args).unwrap();
    deferred.set_path("5");
    signals.send(id, STEP);
    gate.reached();
    device.hold();
    let first = engine.save(1, state(1)).unwrap();
    gate.open();
    eventually("the program has the only one", || Arc::strong_count(&engine) == 1);
    device.release();
    first.wait(LONG).unwrap();
    futures[0].result(LONG).unwrap().committed().unwrap();
    assert_eq!(engine.checkpoint(5).unwrap().value::<u64>("epoch").unwrap(), 5);
}

/// `cancel` waited for as long as a save waited to begin.
#[test]
fn a_commit_that_begins_can_be_cancelled() {
    let (signals, gate) = (Signals::new(), Arc::new(Gate::default()));
    let id = signals.next_operation_id(&[]);
    let begin = {
        let gate = gate.clone();
        move || {
            gate.pass();
            Err(Error::new(ErrorKind::Busy, "no room"))
        }
    };
    let future = CommitFuture::contracted(&signals, id, &[ITEM], LONG, begin).unwrap();
    gate.reached();
    assert!(future.cancel());
    assert_eq!(future.result(LONG).unwrap_err().kind(), ErrorKind::Cancelled);
    gate.open();
}

/// A commit is cancelled through its save once that has begun, and a save that begins after the commit was
/// cancelled is cancelled, too.
#[test]
fn the_save_of_a_cancelled_commit_is_cancelled_whichever_comes_first() {
    for cancelled_first in [false, true] {
        let (root, device) = (tempfile::tempdir().unwrap(), LateDevice::default());
        let engine = Arc::new(engine(root.path()).made_device(Arc::new(device.clone())).build().unwrap());
        device.hold();
        let (signals, gate) = (Signals::new(), Arc::new(Gate::default()));
        let id = signals.next_operation_id(&[]);
        let begin = {
            let (engine, gate) = (engine.clone(), gate.clone());
            move || {
                gate.pass();
                engine.save(1, state(1))
            }
        };
        let future = CommitFuture::contracted(&signals, id, &[ITEM], LONG, begin).unwrap();
        gate.reached();
        if cancelled_first {
            assert!(future.cancel());
        }
        gate.open();
        eventually("the save has begun", || Arc::strong_count(&engine) == 1);
        assert_eq!(future.cancel(), !cancelled_first);
        assert_eq!(future.result(LONG).unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!(signals.wait(id, ITEM, LONG).unwrap_err().kind(), ErrorKind::Cancelled);
        assert!(!future.cancel());
        device.release();
        Arc::into_inner(engine).unwrap().shutdown(LONG).unwrap();
        assert!(files(root.path()).is_empty());
    }
}
