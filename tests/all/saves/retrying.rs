//! The engine retries saves under one handle, with one deadline.

use crate::compat::{refusing_attempts, refusing_publishes};
use crate::fixtures::executor::{Buffer, Fixture, LONG, eventually, fixture, one, pattern};
use crate::fixtures::hooked::Hooked;
use ashore::{Attempt, ErrorKind, Fence, Overlap, Phase, SaveOptions, StateDict};
use std::sync::Arc;
use std::time::{Duration, Instant};

const LEN: usize = 30_000;

fn flaky(storage: Hooked, overlap: Overlap) -> Fixture {
    let storage = Arc::new(storage);
    let fixture = fixture(|b| b.storage(storage.clone()).overlap(overlap));
    Fixture { storage, ..fixture }
}

fn state(bytes: &Arc<Vec<u8>>) -> StateDict<'static> {
    let mut state = one("t", bytes.clone());
    state.value("epoch", &7).unwrap().metadata("run", "a test").unwrap();
    state
}

fn retry(times: u32) -> SaveOptions {
    SaveOptions::default().retry(times, Duration::ZERO)
}

/// Longer than a test waits for anything else, and shorter than the save deadline.
const BACKOFF: Duration = Duration::from_secs(600);

#[test]
fn a_save_is_tried_again_as_a_new_attempt_and_its_handle_tells_of_the_last() {
    let (bytes, first) = (Arc::new(pattern(1, LEN)), Attempt::new());
    for storage in [refusing_attempts(2), refusing_publishes(2)] {
        let fixture = flaky(storage, Overlap::Queue(1));
        let save = fixture.executor.save_with(1, state(&bytes), retry(2).attempt(first)).unwrap();
        let committed = save.wait(LONG).unwrap().committed().unwrap();
        assert_eq!(Arc::strong_count(&bytes), 1, "what was kept is free when the save has ended");
        let checkpoint = fixture.checkpoint(1).unwrap();
        assert!(committed.attempt != first);
        assert_eq!((save.attempt(), checkpoint.attempt()), (committed.attempt, committed.attempt));
        assert_eq!(checkpoint.read("t").unwrap(), *bytes);
        assert_eq!(checkpoint.value::<u32>("epoch").unwrap(), 7);
        assert_eq!(checkpoint.metadata::<String>("run").unwrap(), "a test");
        assert!(checkpoint.verify().unwrap().is_sound());
        save.staged().wait(LONG).unwrap();
        fixture.executor.shutdown(LONG).unwrap();
    }
}

#[test]
fn a_save_fails_with_its_last_error_when_its_retries_are_used_up() {
    let bytes = Arc::new(pattern(1, LEN));
    let fixture = flaky(refusing_attempts(3), Overlap::Queue(1));
    let save = fixture.executor.save_with(1, state(&bytes), retry(2)).unwrap();
    assert_eq!(save.wait(LONG).unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(Arc::strong_count(&bytes), 1);
    assert_eq!(save.staged().wait(LONG).unwrap_err().kind(), ErrorKind::Unavailable);
    // The next call returns an unseen failure, once.
    let fixture = flaky(refusing_attempts(2), Overlap::Queue(1));
    drop(fixture.executor.save_with(1, state(&bytes), retry(1)).unwrap());
    eventually("it has ended", || Arc::strong_count(&bytes) == 1);
    assert_eq!(fixture.executor.shutdown(LONG).unwrap_err().kind(), ErrorKind::Unavailable);
}

#[test]
fn a_failure_that_will_not_pass_is_not_tried_again() {
    let (bytes, fixture) = (Arc::new(pattern(1, LEN)), flaky(refusing_attempts(0), Overlap::Queue(1)));
    fixture.executor.save(1, state(&bytes)).unwrap().wait(LONG).unwrap();
    let first = Attempt::new();
    let save = fixture.executor.save_with(1, state(&bytes), retry(5).attempt(first)).unwrap();
    assert_eq!(save.wait(LONG).unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(save.attempt(), first);
}

#[test]
fn writable_and_borrowed_sources_are_not_kept_for_a_retry() {
    let fixture = flaky(refusing_attempts(0), Overlap::Queue(1));
    let written = one("counter", Buffer::new(vec![0; 100]).source());
    let error = fixture.executor.save_with(1, written, retry(1)).unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Invalid, Some(1)));
    assert!(error.to_string().contains("counter"), "{error}");
    let bytes = pattern(1, LEN);
    let borrowed = fixture.executor.scope(Fence::host(), |scope| {
        let mut state = StateDict::new();
        state.tensor("t", &bytes[..])?;
        scope.save_with(1, state, retry(1))
    });
    assert_eq!(borrowed.unwrap().unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn a_save_waits_before_it_is_tried_again_and_holds_up_neither_others_nor_a_fence() {
    let bytes = Arc::new(pattern(1, LEN));
    let fixture = flaky(refusing_attempts(1), Overlap::Queue(1));
    let options = SaveOptions::default().retry(1, BACKOFF);
    let save = fixture.executor.save_with(1, state(&bytes), options).unwrap();
    eventually("it waits", || fixture.executor.arena().free() == 4 && save.progress().phase == Phase::Waiting);
    fixture.executor.save(2, state(&bytes)).unwrap().wait(LONG).unwrap();
    let began = Instant::now();
    fixture.executor.fence().unwrap();
    assert!(began.elapsed() < BACKOFF / 2 && save.try_get().is_none());
    // It is unfinished: its step is taken.
    assert_eq!(fixture.executor.save(1, state(&bytes)).unwrap_err().kind(), ErrorKind::Conflict);
    assert!(save.cancel() && !save.cancel());
    assert_eq!(save.wait(LONG).unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(save.staged().wait(LONG).unwrap_err().kind(), ErrorKind::Cancelled);
    eventually("what was kept is free", || Arc::strong_count(&bytes) == 1);
    fixture.executor.shutdown(LONG).unwrap();
    assert!(fixture.checkpoint(1).is_err() && fixture.checkpoint(2).is_ok());
}

#[test]
fn a_save_that_is_tried_again_keeps_its_place_and_later_ones_wait_for_it() {
    let bytes = Arc::new(pattern(1, LEN));
    let fixture = flaky(refusing_attempts(1), Overlap::Block);
    let options = SaveOptions::default().retry(1, BACKOFF);
    let save = fixture.executor.save_with(1, state(&bytes), options).unwrap();
    let soon = SaveOptions::default().timeout(Duration::from_millis(20));
    assert_eq!(fixture.executor.save_with(2, state(&bytes), soon).unwrap_err().kind(), ErrorKind::Busy);
    assert!(save.cancel());
}

#[test]
fn all_attempts_share_one_deadline() {
    let bytes = Arc::new(pattern(1, LEN));
    let fixture = flaky(refusing_attempts(usize::MAX), Overlap::Queue(1));
    let began = Instant::now();
    // A wait beyond the deadline is not begun: the error is the last failure, not the passed deadline.
    let options = SaveOptions::default().retry(u32::MAX, Duration::from_millis(1)).timeout(Duration::from_millis(100));
    let save = fixture.executor.save_with(1, state(&bytes), options).unwrap();
    let kind = save.wait(LONG).unwrap_err().kind();
    assert!(matches!(kind, ErrorKind::Unavailable | ErrorKind::Deadline), "{kind:?}");
    assert!(began.elapsed() < LONG / 2);
    let long = SaveOptions::default().retry(1, BACKOFF).timeout(Duration::from_secs(500));
    let save = fixture.executor.save_with(1, state(&bytes), long).unwrap();
    assert_eq!(save.wait(LONG).unwrap_err().kind(), ErrorKind::Unavailable);
}

#[test]
fn a_shutdown_waits_for_retries_and_gives_up_those_that_are_late() {
    let bytes = Arc::new(pattern(1, LEN));
    let fixture = flaky(refusing_attempts(1), Overlap::Queue(1));
    let options = SaveOptions::default().retry(1, Duration::from_millis(20));
    drop(fixture.executor.save_with(1, state(&bytes), options).unwrap());
    fixture.executor.shutdown(LONG).unwrap();
    assert!(fixture.checkpoint(1).is_ok());

    let fixture = flaky(refusing_attempts(1), Overlap::Queue(1));
    drop(fixture.executor.save_with(1, state(&bytes), SaveOptions::default().retry(1, BACKOFF)).unwrap());
    let began = Instant::now();
    assert_eq!(fixture.executor.shutdown(Duration::from_millis(20)).unwrap_err().kind(), ErrorKind::Deadline);
    drop(fixture.executor);
    assert!(began.elapsed() < LONG / 2);
    eventually("what was kept is free", || Arc::strong_count(&bytes) == 1);
}

/// Each attempt fails and each save is cancelled at some moment: none ends as something else, or not at all.
#[test]
fn a_save_that_is_cancelled_between_attempts_is_cancelled() {
    let bytes = Arc::new(pattern(1, LEN));
    let fixture = flaky(refusing_attempts(usize::MAX), Overlap::Queue(1));
    for round in 0..300_u32 {
        let save = fixture.executor.save_with(1, state(&bytes), retry(u32::MAX)).unwrap();
        std::thread::sleep(Duration::from_micros(u64::from(round % 20) * 10));
        assert!(save.cancel());
        assert_eq!(save.wait(LONG).unwrap_err().kind(), ErrorKind::Cancelled);
        assert_eq!(save.staged().wait(LONG).unwrap_err().kind(), ErrorKind::Cancelled);
    }
    fixture.slabs_returned();
    fixture.executor.shutdown(LONG).unwrap();
    assert_eq!(Arc::strong_count(&bytes), 1);
}
