//! A save detects a forgotten fence, and does not publish.

use crate::fixtures::executor::{Buffer, LONG, fixture, one, pattern};
use ashore::{Detect, ErrorKind};
use std::sync::Arc;

#[test]
fn a_tensor_written_without_a_fence_fails_the_save_and_is_named() {
    let fixture = fixture(|b| b);
    let buffer = Buffer::new(pattern(1, 9000));
    fixture.device.hold();
    let save = fixture.executor.save(1, one("layer.weight", buffer.source())).unwrap();
    buffer.fill(&pattern(2, 9000));
    fixture.device.release();
    let error = save.wait(LONG).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("layer.weight"), "{error}");
    assert!(fixture.checkpoint(1).is_err());
}

#[test]
fn only_the_first_two_saves_are_watched_unless_all_are_wanted() {
    for (detect, found) in [(Detect::First, false), (Detect::All, true), (Detect::Never, false)] {
        let fixture = fixture(|b| b.detect(detect));
        let buffer = Buffer::new(pattern(1, 9000));
        for step in 1..=2 {
            let save = fixture.executor.save(step, one("t", buffer.source())).unwrap();
            fixture.executor.fence().unwrap();
            save.wait(LONG).unwrap();
        }
        fixture.device.hold();
        let save = fixture.executor.save(3, one("t", buffer.source())).unwrap();
        buffer.fill(&pattern(2, 9000));
        fixture.device.release();
        let ended = save.wait(LONG);
        assert_eq!(ended.is_err(), found, "{detect:?}: {ended:?}");
    }
}

#[test]
fn a_second_save_of_writable_tensors_without_a_fence_is_refused() {
    let fixture = fixture(|b| b);
    let buffer = Buffer::new(pattern(1, 9000));
    fixture.device.hold();
    let first = fixture.executor.save(1, one("t", buffer.source())).unwrap();
    let error = fixture.executor.save(2, one("t", buffer.source())).unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Invalid, Some(2)));
    assert!(error.message().contains("fence"), "{error}");
    fixture.device.release();
    fixture.executor.fence().unwrap();
    first.wait(LONG).unwrap();
    fixture.executor.save(2, one("t", buffer.source())).unwrap().wait(LONG).unwrap();
}

#[test]
fn safe_sources_need_no_fence_between_saves() {
    let fixture = fixture(|b| b);
    fixture.device.hold();
    let saves: Vec<_> =
        (1..=2).map(|i| fixture.executor.save(i, one("t", Arc::new(pattern(i, 9000)))).unwrap()).collect();
    fixture.device.release();
    for (save, step) in saves.into_iter().zip(1..) {
        save.wait(LONG).unwrap();
        assert_eq!(fixture.checkpoint(step).unwrap().read("t").unwrap(), pattern(step, 9000));
    }
}
