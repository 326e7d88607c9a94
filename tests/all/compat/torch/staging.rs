//! The executor consumes staging that is still under way as tensors arrive, and never waits for it without a
//! deadline.

use crate::compat::{engine, files, state};
use crate::fixtures::executor::{LONG, eventually, pattern};
use ashore::compat::torch::{AsyncCheckpointExecutor, ExecuteOptions, Stage, Staging, ThreadExecutor};
use ashore::{Checkpoint, Dtype, Error, ErrorKind, Layout, RawHost, StateDict};
use std::sync::Arc;
use std::time::Duration;

const LEN: usize = 50_000;

fn executor(root: &std::path::Path) -> ThreadExecutor {
    ThreadExecutor::new(Arc::new(engine(root).build().unwrap())).unwrap()
}

fn to(id: &str) -> ExecuteOptions {
    ExecuteOptions::new().checkpoint_id(id)
}

/// Eight tensors to come, each larger than the arena.
fn channel() -> (Stage, Staging) {
    let mut there = StateDict::new();
    there.value("epoch", &7).unwrap();
    Staging::channel(there, (0..8).map(|i| (format!("t{i}"), Layout::new(Dtype::U8, [LEN])))).unwrap()
}

#[test]
fn a_state_larger_than_the_arena_is_written_as_it_comes() {
    let root = tempfile::tempdir().unwrap();
    let executor = executor(root.path());
    let (mut stage, staging) = channel();
    let future = executor.execute_save(staging.into(), to("step-1")).unwrap();
    let arena = executor.executor().arena();
    assert!(arena.report().bytes < LEN as u64);
    for i in 0..8 {
        assert!(future.try_result().is_none());
        stage.deliver(&format!("t{i}"), Arc::new(pattern(i, LEN))).unwrap();
        // The executor writes arrived tensors while the rest is still to come: all slabs are returned.
        eventually("written as it comes", || arena.free() >= arena.report().slabs - 2);
    }
    assert_eq!(stage.missing().count(), 0);
    future.result(LONG).unwrap().unwrap();
    let checkpoint = Checkpoint::open(root.path().join("step-1")).unwrap();
    for i in 0..8 {
        assert_eq!(checkpoint.read(&format!("t{i}")).unwrap(), pattern(i, LEN));
    }
    assert_eq!(checkpoint.value::<u32>("epoch").unwrap(), 7);
}

#[test]
fn tensors_may_come_in_any_order() {
    let root = tempfile::tempdir().unwrap();
    let executor = executor(root.path());
    let (mut stage, staging) = channel();
    let future = executor.execute_save(staging.into(), to("step-1")).unwrap();
    for i in (0..8).rev() {
        stage.deliver(&format!("t{i}"), pattern(i, LEN)).unwrap();
    }
    future.result(LONG).unwrap().unwrap();
    assert_eq!(Checkpoint::open(root.path().join("step-1")).unwrap().read("t7").unwrap(), pattern(7, LEN));
}

#[test]
fn a_staging_that_fails_or_ends_early_or_brings_something_else_fails_the_save() {
    let root = tempfile::tempdir().unwrap();
    let executor = executor(root.path());
    type Spoil = fn(Stage) -> ErrorKind;
    let spoils: [Spoil; 5] = [
        |stage| {
            drop(stage);
            ErrorKind::Cancelled
        },
        |stage| {
            stage.fail(Error::new(ErrorKind::Device, "the copy failed"));
            ErrorKind::Device
        },
        |mut stage| {
            assert_eq!(stage.deliver("t0", vec![1_u8; 3]).unwrap_err().kind(), ErrorKind::Invalid);
            ErrorKind::Invalid
        },
        |mut stage| {
            assert_eq!(stage.deliver("t0", vec![1_i8; LEN]).unwrap_err().kind(), ErrorKind::Invalid);
            ErrorKind::Invalid
        },
        |mut stage| {
            assert_eq!(stage.deliver("t9", vec![1_u8; LEN]).unwrap_err().kind(), ErrorKind::NotFound);
            let bytes = Arc::new(vec![0_u8; LEN]);
            #[expect(unsafe_code, reason = "a source that can be written")]
            // SAFETY: the bytes are kept alive, and nothing writes them.
            let raw = unsafe { RawHost::new(bytes.as_ptr(), LEN as u64, Dtype::U8, [LEN], bytes.clone()) };
            assert_eq!(stage.deliver("t0", raw).unwrap_err().kind(), ErrorKind::Invalid);
            ErrorKind::Invalid
        },
    ];
    for spoil in spoils {
        let (stage, staging) = channel();
        let future = executor.execute_save(staging.into(), to("step-1")).unwrap();
        let kind = spoil(stage);
        assert_eq!(future.result(LONG).unwrap_err().kind(), kind);
        eventually("the attempt is gone", || files(root.path()).is_empty());
    }
    executor.execute_save(state(1).into(), to("step-2")).unwrap().result(LONG).unwrap().unwrap();
}

#[test]
fn a_staging_that_never_ends_ends_at_the_deadline() {
    let root = tempfile::tempdir().unwrap();
    let executor = executor(root.path());
    let soon = |id| to(id).timeout(Duration::from_millis(30));
    let (stage, staging) = channel();
    let stream = executor.execute_save(staging.into(), soon("step-1")).unwrap();
    let whole = executor.execute_save(Staging::future(std::future::pending()).into(), soon("step-2")).unwrap();
    for future in [stream, whole] {
        assert_eq!(future.result(LONG).unwrap_err().kind(), ErrorKind::Deadline);
    }
    drop(stage);
    executor.execute_save(state(1).into(), to("step-3")).unwrap().result(LONG).unwrap().unwrap();
    assert_eq!(executor.executor().catalog().list().unwrap().len(), 1);
}

#[test]
fn a_staging_future_is_waited_for_on_a_thread_and_its_failure_is_that_of_the_save() {
    let root = tempfile::tempdir().unwrap();
    let executor = executor(root.path());
    let good = executor.execute_save(Staging::future(async { Ok(state(4)) }).into(), to("step-1")).unwrap();
    ashore::testing::block_on(good.staging_completion()).unwrap();
    assert!(good.result(LONG).unwrap().is_some());
    let failing = Staging::future(async { Err(Error::new(ErrorKind::Device, "the copy failed")) });
    let bad = executor.execute_save(failing.into(), to("step-2")).unwrap();
    assert_eq!(ashore::testing::block_on(bad.staging_completion()).unwrap_err().kind(), ErrorKind::Device);
    assert_eq!(bad.result(LONG).unwrap_err().kind(), ErrorKind::Device);
    let panics = Staging::future(async { panic!("on purpose") });
    let bad = executor.execute_save(panics.into(), to("step-3")).unwrap();
    assert_eq!(bad.result(LONG).unwrap_err().kind(), ErrorKind::Internal);
    assert_eq!(Checkpoint::open(root.path().join("step-1")).unwrap().value::<u64>("epoch").unwrap(), 4);
}
