//! `save` captures small writable tensors, within a budget.

use crate::fixtures::executor::{Buffer, LONG, fixture, pattern};
use ashore::{Capture, ErrorKind, StateDict};

#[test]
fn a_small_writable_tensor_may_change_right_after_save() {
    let fixture = fixture(|b| b);
    let buffer = Buffer::new(pattern(1, 4096));
    fixture.device.hold();
    let mut state = StateDict::new();
    state.tensor("counter", buffer.source()).unwrap();
    let save = fixture.executor.save(1, state).unwrap();
    buffer.fill(&pattern(2, 4096));
    fixture.device.release();
    save.wait(LONG).unwrap();
    assert_eq!(fixture.checkpoint(1).unwrap().read("counter").unwrap(), pattern(1, 4096));
}

#[test]
fn tensors_beyond_the_capture_budget_are_left_to_the_fence_and_reported() {
    let fixture = fixture(|b| b.capture_budget(3000));
    let buffers: Vec<_> = (0..3).map(|i| Buffer::new(pattern(i, 1500))).collect();
    let mut state = StateDict::new();
    for (i, buffer) in buffers.iter().enumerate() {
        state.tensor(i.to_string(), buffer.source()).unwrap();
    }
    let save = fixture.executor.save(1, state).unwrap();
    fixture.executor.fence().unwrap();
    assert_eq!(save.wait(LONG).unwrap().committed().unwrap().over_budget, 1);
    for i in 0..3 {
        assert_eq!(fixture.checkpoint(1).unwrap().read(&i.to_string()).unwrap(), pattern(i, 1500));
    }
}

#[test]
fn a_capture_that_was_asked_for_and_is_not_possible_is_refused_by_name() {
    for (budget, size) in [(1 << 20, 4097), (100, 101)] {
        let fixture = fixture(|b| b.capture_budget(budget));
        let buffer = Buffer::new(pattern(1, size));
        let mut state = StateDict::new();
        state.tensor_captured("scale", buffer.source(), Capture::AtSave).unwrap();
        let error = fixture.executor.save(1, state).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("scale"), "{error}");
        fixture.slabs_returned();
    }
}
