//! Every wait has a deadline: a device that hangs fails the save, not the program.

use crate::fixtures::executor::{Buffer, LONG, eventually, fixture, one, pattern};
use ashore::promise;
use ashore::{Dtype, ErrorKind, Layout, Phase, SaveOptions};
use std::sync::Arc;
use std::time::Duration;

const SHORT: Duration = Duration::from_millis(30);

#[test]
fn a_fence_at_its_deadline_fails_the_save_and_returns_all_slabs() {
    let fixture = fixture(|b| b.fence_timeout(SHORT));
    fixture.device.hold();
    let tensor = Arc::new(pattern(1, 30_000));
    let save = fixture.executor.save(1, one("t", tensor.clone())).unwrap();
    let late = fixture.executor.fence().unwrap_err();
    assert_eq!((late.kind(), late.step()), (ErrorKind::Deadline, Some(1)));
    fixture.device.release();
    assert_eq!(save.wait(LONG).unwrap_err().kind(), ErrorKind::Deadline);
    fixture.slabs_returned();
    fixture.executor.fence().unwrap();
    assert_eq!(Arc::strong_count(&tensor), 1);
    assert!(fixture.checkpoint(1).is_err());
    fixture.executor.save(2, one("t", tensor)).unwrap().wait(LONG).unwrap();
}

#[test]
fn a_writable_tensor_written_after_a_late_fence_is_never_published_torn() {
    let fixture = fixture(|b| b.fence_timeout(SHORT));
    let buffer = Buffer::new(pattern(1, 30_000));
    fixture.device.hold();
    let save = fixture.executor.save(1, one("t", buffer.source())).unwrap();
    fixture.executor.fence().unwrap_err();
    buffer.fill(&pattern(2, 30_000));
    fixture.device.release();
    save.wait(LONG).unwrap_err();
    assert!(fixture.checkpoint(1).is_err());
}

#[test]
fn a_save_that_is_not_durable_at_its_deadline_fails() {
    let fixture = fixture(|b| b.save_timeout(SHORT));
    fixture.device.hold();
    let save = fixture.executor.save(1, one("t", Arc::new(pattern(1, 30_000)))).unwrap();
    let error = save.wait(LONG).unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Deadline, Some(1)));
    fixture.device.release();
    fixture.slabs_returned();
    assert!(fixture.checkpoint(1).is_err());
}

#[test]
fn waiting_for_a_handle_ends_at_its_own_deadline_and_the_save_goes_on() {
    let fixture = fixture(|b| b);
    fixture.device.hold();
    let save = fixture.executor.save(1, one("t", Arc::new(pattern(1, 5000)))).unwrap();
    assert_eq!(save.wait(SHORT).unwrap_err().kind(), ErrorKind::Deadline);
    assert_eq!(save.staged().wait(SHORT).unwrap_err().kind(), ErrorKind::Deadline);
    fixture.device.release();
    save.wait(LONG).unwrap();
}

/// The stager checked a ticket's deadline when it began to wait for the save before it, and then not again:
/// behind a stuck save, one with a deadline of 50 ms failed only when the deadline of the first had passed.
#[test]
fn a_save_behind_one_that_is_stuck_fails_at_its_own_deadline_and_lets_its_sources_go() {
    for promised in [true, false] {
        let fixture = fixture(|b| b);
        let (promise, tensor) = promise(Layout::new(Dtype::U8, [5000]));
        let first = if promised { one("t", tensor) } else { one("t", Arc::new(pattern(1, 5000))) };
        fixture.device.hold();
        let first = fixture.executor.save(1, first).unwrap();
        eventually("the first is being staged", || first.progress().phase == Phase::Staging);
        let waiting = Arc::new(pattern(2, 5000));
        let options = SaveOptions::default().timeout(SHORT);
        let second = fixture.executor.save_with(2, one("t", waiting.clone()), options).unwrap();
        let error = second.wait(LONG / 10).unwrap_err();
        assert!(error.message().starts_with("the save deadline passed"), "{promised}: {error}");
        assert_eq!((error.kind(), error.step()), (ErrorKind::Deadline, Some(2)));
        eventually("the source is dropped", || Arc::strong_count(&waiting) == 1);
        assert!(first.try_get().is_none());
        promise.fulfil(pattern(1, 5000)).unwrap();
        fixture.device.release();
        first.wait(LONG).unwrap();
    }
}
