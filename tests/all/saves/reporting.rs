//! No error is lost: the next `save` or `shutdown` reports an unseen one, once.

use crate::fixtures::executor::{Fixture, LONG, eventually, fixture, one, pattern};
use ashore::ErrorKind;
use std::sync::Arc;

fn fail_and_forget(fixture: &Fixture) {
    fixture.device.fail_when_queued(1);
    let save = fixture.executor.save(1, one("t", Arc::new(pattern(1, 5000)))).unwrap();
    let progress = || save.progress().phase == ashore::Phase::Ended;
    eventually("it fails", progress);
    drop(save);
    fixture.device.heal();
}

#[test]
fn the_next_save_returns_an_unseen_error_once() {
    let fixture = fixture(|b| b);
    fail_and_forget(&fixture);
    let state = || one("t", Arc::new(pattern(2, 5000)));
    let error = fixture.executor.save(2, state()).unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Device, Some(1)));
    fixture.executor.save(2, state()).unwrap().wait(LONG).unwrap();
    fixture.executor.shutdown(LONG).unwrap();
}

#[test]
fn shutdown_returns_an_unseen_error() {
    let fixture = fixture(|b| b);
    fail_and_forget(&fixture);
    assert_eq!(fixture.executor.shutdown(LONG).unwrap_err().kind(), ErrorKind::Device);
}

#[test]
fn an_error_that_was_seen_is_not_reported_again() {
    let fixture = fixture(|b| b);
    fixture.device.fail_when_queued(1);
    let save = fixture.executor.save(1, one("t", Arc::new(pattern(1, 5000)))).unwrap();
    save.wait(LONG).unwrap_err();
    fixture.executor.shutdown(LONG).unwrap();
}

#[test]
fn dropping_the_executor_waits_for_saves_in_flight() {
    let fixture = fixture(|b| b);
    let save = fixture.executor.save(1, one("t", Arc::new(pattern(1, 50_000)))).unwrap();
    drop(save);
    let storage = fixture.storage.clone();
    drop(fixture);
    assert_eq!(storage.list().unwrap(), ["step-00000001"]);
}

#[test]
fn shutdown_fails_what_is_unfinished_at_its_deadline() {
    let fixture = fixture(|b| b);
    fixture.device.hold();
    let save = fixture.executor.save(1, one("t", Arc::new(pattern(1, 50_000)))).unwrap();
    let device = fixture.device.clone();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            eventually("queued", || device.queued() > 0);
            std::thread::sleep(std::time::Duration::from_millis(100));
            device.release();
        });
        let error = fixture.executor.shutdown(std::time::Duration::from_millis(50)).unwrap_err();
        assert_eq!((error.kind(), error.step()), (ErrorKind::Deadline, Some(1)));
        assert_eq!(save.wait(LONG).unwrap_err().kind(), ErrorKind::Cancelled);
    });
    assert!(fixture.storage.list().unwrap().is_empty());
}
