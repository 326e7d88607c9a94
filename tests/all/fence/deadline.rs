//! Every wait has a deadline: a device that hangs fails the save, not the program.

use crate::rig::{Buffer, LONG, eventually, one, pattern, rig};
use ashore::promise;
use ashore::{Dtype, ErrorKind, Layout, Phase, SaveOptions};
use std::sync::Arc;
use std::time::Duration;

const SHORT: Duration = Duration::from_millis(30);

#[test]
fn at_the_deadline_of_the_fence_the_save_fails_and_everything_comes_back() {
    let rig = rig(|b| b.fence_timeout(SHORT));
    rig.device.hold();
    let tensor = Arc::new(pattern(1, 30_000));
    let save = rig.executor.save(1, one("t", tensor.clone())).unwrap();
    let late = rig.executor.fence().unwrap_err();
    assert_eq!((late.kind(), late.step()), (ErrorKind::Deadline, Some(1)));
    rig.device.release();
    assert_eq!(save.wait(LONG).unwrap_err().kind(), ErrorKind::Deadline);
    rig.slabs_home();
    rig.executor.fence().unwrap();
    assert_eq!(Arc::strong_count(&tensor), 1);
    assert!(rig.checkpoint(1).is_err());
    rig.executor.save(2, one("t", tensor)).unwrap().wait(LONG).unwrap();
}

#[test]
fn a_writable_tensor_written_after_a_late_fence_is_never_published_torn() {
    let rig = rig(|b| b.fence_timeout(SHORT));
    let buffer = Buffer::new(pattern(1, 30_000));
    rig.device.hold();
    let save = rig.executor.save(1, one("t", buffer.source())).unwrap();
    rig.executor.fence().unwrap_err();
    buffer.fill(&pattern(2, 30_000));
    rig.device.release();
    save.wait(LONG).unwrap_err();
    assert!(rig.checkpoint(1).is_err());
}

#[test]
fn a_save_that_is_not_durable_at_its_deadline_fails() {
    let rig = rig(|b| b.save_timeout(SHORT));
    rig.device.hold();
    let save = rig.executor.save(1, one("t", Arc::new(pattern(1, 30_000)))).unwrap();
    let error = save.wait(LONG).unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Deadline, Some(1)));
    rig.device.release();
    rig.slabs_home();
    assert!(rig.checkpoint(1).is_err());
}

#[test]
fn waiting_for_a_handle_ends_at_its_own_deadline_and_the_save_goes_on() {
    let rig = rig(|b| b);
    rig.device.hold();
    let save = rig.executor.save(1, one("t", Arc::new(pattern(1, 5000)))).unwrap();
    assert_eq!(save.wait(SHORT).unwrap_err().kind(), ErrorKind::Deadline);
    assert_eq!(save.staged().wait(SHORT).unwrap_err().kind(), ErrorKind::Deadline);
    rig.device.release();
    save.wait(LONG).unwrap();
}

/// The stager checked a ticket's deadline when it began to wait for the save before it, and then not again:
/// behind a stuck save, one with a deadline of 50 ms failed only when the deadline of the first had passed.
#[test]
fn a_save_behind_one_that_is_stuck_fails_at_its_own_deadline_and_lets_its_sources_go() {
    for promised in [true, false] {
        let rig = rig(|b| b);
        let (promise, tensor) = promise(Layout::new(Dtype::U8, [5000]));
        let first = if promised { one("t", tensor) } else { one("t", Arc::new(pattern(1, 5000))) };
        rig.device.hold();
        let first = rig.executor.save(1, first).unwrap();
        eventually("the first is being staged", || first.progress().phase == Phase::Staging);
        let waiting = Arc::new(pattern(2, 5000));
        let options = SaveOptions::default().timeout(SHORT);
        let second = rig.executor.save_with(2, one("t", waiting.clone()), options).unwrap();
        let error = second.wait(LONG / 10).unwrap_err();
        assert!(error.message().starts_with("the save deadline passed"), "{promised}: {error}");
        assert_eq!((error.kind(), error.step()), (ErrorKind::Deadline, Some(2)));
        eventually("the source is dropped", || Arc::strong_count(&waiting) == 1);
        assert!(first.try_get().is_none());
        promise.fulfil(pattern(1, 5000)).unwrap();
        rig.device.release();
        first.wait(LONG).unwrap();
    }
}
