//! A policy says what `save` does while earlier saves are unfinished.

use crate::fixtures::executor::{Fixture, LONG, eventually, fixture, one, pattern};
use ashore::{ErrorKind, Outcome, Overlap, Phase, Save, SaveOptions};
use std::sync::Arc;
use std::time::Duration;

fn save(fixture: &Fixture, step: u64) -> ashore::Result<Save> {
    fixture.executor.save(step, one("t", Arc::new(pattern(step, 5000))))
}

#[test]
fn skip_does_not_begin_a_save_while_another_is_unfinished() {
    let fixture = fixture(|b| b.overlap(Overlap::Skip));
    fixture.device.hold();
    let first = save(&fixture, 1).unwrap();
    let second = save(&fixture, 2).unwrap();
    assert!(matches!(second.wait(LONG).unwrap(), Outcome::Skipped { by: 1 }));
    second.staged().wait(LONG).unwrap();
    fixture.device.release();
    first.wait(LONG).unwrap();
    save(&fixture, 3).unwrap().wait(LONG).unwrap().committed().unwrap();
    assert!(fixture.checkpoint(2).is_err());
}

#[test]
fn latest_replaces_a_save_that_waits_by_a_newer_one() {
    let fixture = fixture(|b| b.overlap(Overlap::Latest));
    fixture.device.hold();
    let first = save(&fixture, 1).unwrap();
    eventually("the first is being staged", || first.progress().phase == Phase::Staging);
    let waiting = Arc::new(pattern(2, 5000));
    let second = fixture.executor.save(2, one("t", waiting.clone())).unwrap();
    let third = save(&fixture, 3).unwrap();
    assert!(matches!(second.wait(LONG).unwrap(), Outcome::Superseded { by: 3 }));
    assert_eq!(Arc::strong_count(&waiting), 1);
    fixture.device.release();
    first.wait(LONG).unwrap().committed().unwrap();
    third.wait(LONG).unwrap().committed().unwrap();
    assert!(fixture.checkpoint(2).is_err());
}

/// A save that found the queue full watched only the oldest save, and was `Busy` although a younger one had
/// ended.
#[test]
fn room_in_a_full_queue_comes_from_whichever_save_ends_first() {
    let fixture = fixture(|b| b.overlap(Overlap::Queue(1)));
    fixture.device.hold();
    let first = save(&fixture, 1).unwrap();
    let within = |patience| SaveOptions::default().timeout(patience);
    let state = |step| one("t", Arc::new(pattern(step, 5000)));
    let second = fixture.executor.save_with(2, state(2), within(Duration::from_millis(50))).unwrap();
    let third = fixture.executor.save_with(3, state(3), within(LONG / 10)).unwrap();
    assert_eq!(second.wait(LONG).unwrap_err().kind(), ErrorKind::Deadline);
    assert!(first.try_get().is_none());
    fixture.device.release();
    first.wait(LONG).unwrap();
    third.wait(LONG).unwrap().committed().unwrap();
}

#[test]
fn a_full_queue_waits_for_room_and_is_busy_at_the_deadline() {
    for (overlap, room) in [(Overlap::Block, 1), (Overlap::Queue(0), 1), (Overlap::Queue(2), 3)] {
        let fixture = fixture(|b| b.overlap(overlap).save_timeout(Duration::from_millis(300)));
        fixture.device.hold();
        let saves: Vec<_> = (0..room).map(|step| save(&fixture, step).unwrap()).collect();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| save(&fixture, 10));
            fixture.device.release();
            waits.join().unwrap().unwrap().wait(LONG).unwrap();
        });
        for save in saves {
            save.wait(LONG).unwrap();
        }
    }
}

#[test]
fn saves_in_a_queue_all_become_durable_in_order() {
    let fixture = fixture(|b| b.overlap(Overlap::Queue(100)));
    let saves: Vec<_> = (0..50).map(|step| save(&fixture, step).unwrap()).collect();
    for save in saves {
        assert!(save.wait(LONG).unwrap().committed().is_some());
    }
    for step in 0..50 {
        assert_eq!(fixture.checkpoint(step).unwrap().read("t").unwrap(), pattern(step, 5000));
    }
}

#[test]
fn the_same_step_twice_is_a_conflict_under_way_and_afterwards() {
    let fixture = fixture(|b| b.overlap(Overlap::Queue(5)));
    fixture.device.hold();
    let first = save(&fixture, 1).unwrap();
    assert_eq!(save(&fixture, 1).unwrap_err().kind(), ErrorKind::Conflict);
    fixture.device.release();
    first.wait(LONG).unwrap();
    let error = save(&fixture, 1).unwrap().wait(LONG).unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Conflict, Some(1)));
    let other = one("t", Arc::new(pattern(77, 5000)));
    let again = fixture.executor.save_with(1, other, ashore::SaveOptions::default().overwrite()).unwrap();
    again.wait(LONG).unwrap();
    assert_eq!(fixture.checkpoint(1).unwrap().read("t").unwrap(), pattern(77, 5000));
}

/// `save` held the admission lock while it waited for queue space, and other callers' deadlines did not
/// count.
#[test]
fn a_save_that_waits_for_room_does_not_hold_up_the_deadline_of_another() {
    let fixture = fixture(|b| b.overlap(Overlap::Block));
    fixture.device.hold();
    let first = save(&fixture, 1).unwrap();
    std::thread::scope(|scope| {
        let patient = scope.spawn(|| save(&fixture, 2));
        std::thread::sleep(Duration::from_millis(20));
        let hasty = SaveOptions::default().timeout(Duration::from_millis(20));
        let error = fixture.executor.save_with(3, one("t", Arc::new(pattern(3, 5000))), hasty).unwrap_err();
        assert_eq!((error.kind(), error.step()), (ErrorKind::Busy, Some(3)));
        assert!(!patient.is_finished());
        fixture.device.release();
        patient.join().unwrap().unwrap().wait(LONG).unwrap();
    });
    first.wait(LONG).unwrap();
}
