//! No error is lost: the next `save` or `shutdown` reports an unseen one, once.

use crate::rig::{LONG, Rig, eventually, one, pattern, rig};
use ashore::ErrorKind;
use std::sync::Arc;

fn fail_and_forget(rig: &Rig) {
    rig.device.fail_when_queued(1);
    let save = rig.executor.save(1, one("t", Arc::new(pattern(1, 5000)))).unwrap();
    let progress = || save.progress().phase == ashore::Phase::Ended;
    eventually("it fails", progress);
    drop(save);
    rig.device.heal();
}

#[test]
fn the_next_save_reports_an_error_that_nobody_saw_once() {
    let rig = rig(|b| b);
    fail_and_forget(&rig);
    let state = || one("t", Arc::new(pattern(2, 5000)));
    let error = rig.executor.save(2, state()).unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Device, Some(1)));
    rig.executor.save(2, state()).unwrap().wait(LONG).unwrap();
    rig.executor.shutdown(LONG).unwrap();
}

#[test]
fn shutdown_reports_an_error_that_nobody_saw() {
    let rig = rig(|b| b);
    fail_and_forget(&rig);
    assert_eq!(rig.executor.shutdown(LONG).unwrap_err().kind(), ErrorKind::Device);
}

#[test]
fn an_error_that_was_seen_is_not_reported_again() {
    let rig = rig(|b| b);
    rig.device.fail_when_queued(1);
    let save = rig.executor.save(1, one("t", Arc::new(pattern(1, 5000)))).unwrap();
    save.wait(LONG).unwrap_err();
    rig.executor.shutdown(LONG).unwrap();
}

#[test]
fn dropping_the_executor_waits_for_saves_in_flight() {
    let rig = rig(|b| b);
    let save = rig.executor.save(1, one("t", Arc::new(pattern(1, 50_000)))).unwrap();
    drop(save);
    let storage = rig.storage.clone();
    drop(rig);
    assert_eq!(storage.list().unwrap(), ["step-00000001"]);
}

#[test]
fn shutdown_fails_what_is_unfinished_at_its_deadline() {
    let rig = rig(|b| b);
    rig.device.hold();
    let save = rig.executor.save(1, one("t", Arc::new(pattern(1, 50_000)))).unwrap();
    let device = rig.device.clone();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            eventually("queued", || device.queued() > 0);
            std::thread::sleep(std::time::Duration::from_millis(100));
            device.release();
        });
        let error = rig.executor.shutdown(std::time::Duration::from_millis(50)).unwrap_err();
        assert_eq!((error.kind(), error.step()), (ErrorKind::Deadline, Some(1)));
        assert_eq!(save.wait(LONG).unwrap_err().kind(), ErrorKind::Cancelled);
    });
    assert!(rig.storage.list().unwrap().is_empty());
}
