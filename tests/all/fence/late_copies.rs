//! After a fence tensors may be written, however late the copies are made.

use crate::fixtures::executor::{Buffer, LONG, eventually, fixture, one, pattern};
use ashore::{Capture, Detect, Fence, StateDict};
use std::sync::Arc;
use std::time::Duration;

#[test]
fn tensors_written_right_after_the_fence_are_saved_as_they_were() {
    let fixture = fixture(|b| b.detect(Detect::Never));
    let sizes = [1, 4095, 4096, 4097, 9000, 20_000];
    let buffers: Vec<_> = sizes.iter().map(|&n| Buffer::new(pattern(0, n))).collect();
    for step in 0..200_u64 {
        let mut state = StateDict::new();
        for (i, (buffer, &n)) in buffers.iter().zip(&sizes).enumerate() {
            buffer.fill(&pattern(step * 10 + i as u64, n));
            state.tensor_captured(i.to_string(), buffer.source(), Capture::AtFence).unwrap();
        }
        let save = fixture.executor.save(step, state).unwrap();
        fixture.executor.fence().unwrap();
        for (buffer, &n) in buffers.iter().zip(&sizes) {
            buffer.fill(&vec![0xEE; n]);
        }
        save.wait(LONG).unwrap();
        let checkpoint = fixture.checkpoint(step).unwrap();
        for (i, &n) in sizes.iter().enumerate() {
            assert_eq!(
                checkpoint.read(&i.to_string()).unwrap(),
                pattern(step * 10 + i as u64, n),
                "step {step} tensor {i}"
            );
        }
        fixture.storage.remove(&ashore::id::step_name(step)).unwrap();
    }
    fixture.slabs_returned();
}

#[test]
fn the_fence_returns_only_when_the_last_copy_from_live_memory_has_ended() {
    let fixture = fixture(|b| b);
    fixture.device.hold();
    let save = fixture.executor.save(1, one("t", Arc::new(pattern(1, 30_000)))).unwrap();
    std::thread::scope(|scope| {
        let fence = scope.spawn(|| {
            fixture.executor.fence().unwrap();
            (fixture.device.copied(), fixture.device.queued())
        });
        for _ in 0..8 {
            assert!(!fence.is_finished());
            let before = fixture.device.copied();
            fixture.device.allow(1);
            eventually("a copy", || fixture.device.copied() > before);
        }
        fixture.device.release();
        assert_eq!(fence.join().unwrap(), (8, 8));
    });
    save.wait(LONG).unwrap();
}

#[test]
fn shared_sources_are_dropped_when_the_fence_returns() {
    let fixture = fixture(|b| b);
    let mut tensor = Arc::new(pattern(1, 10_000));
    for step in 1..50 {
        let save = fixture.executor.save(step, one("t", tensor.clone())).unwrap();
        fixture.executor.fence().unwrap();
        Arc::get_mut(&mut tensor).expect("the only reference").fill(step as u8);
        drop(save);
    }
    drop(tensor);
    fixture.executor.shutdown(LONG).unwrap();
}

#[test]
fn awaiting_staged_is_a_fence() {
    let fixture = fixture(|b| b);
    let buffer = Buffer::new(pattern(1, 9000));
    for step in 1..20 {
        buffer.fill(&pattern(step, 9000));
        let save = fixture.executor.save(step, one("t", buffer.source())).unwrap();
        save.staged().wait(LONG).unwrap();
        buffer.fill(&pattern(99, 9000));
        save.wait(LONG).unwrap();
        assert_eq!(fixture.checkpoint(step).unwrap().read("t").unwrap(), pattern(step, 9000));
    }
}

#[test]
fn a_snapshot_at_save_needs_no_fence() {
    let fixture = fixture(|b| b);
    let buffer = Buffer::new(pattern(1, 9000));
    let options = ashore::SaveOptions::default().snapshot(ashore::Snapshot::AtSave);
    let save = fixture.executor.save_with(1, one("t", buffer.source()), options).unwrap();
    buffer.fill(&pattern(2, 9000));
    save.wait(LONG).unwrap();
    assert_eq!(fixture.checkpoint(1).unwrap().read("t").unwrap(), pattern(1, 9000));
}

#[test]
fn a_scope_ends_only_when_nothing_borrowed_is_read_any_more_even_when_it_panics() {
    let fixture = fixture(|b| b);
    for step in 1..50 {
        let mut tensor = pattern(step, 9000);
        let save = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let saved = fixture.executor.scope(ashore::Fence::host(), |scope| {
                let mut state = StateDict::new();
                state.tensor("t", &tensor[..]).unwrap();
                let save = scope.save(step, state).unwrap();
                if step % 3 == 0 {
                    std::mem::forget(save);
                    panic!("a training step that fails");
                }
                save
            });
            saved.unwrap()
        }));
        assert_eq!(fixture.device.copied(), fixture.device.queued());
        tensor.fill(0xEE);
        drop(tensor);
        if let Ok(save) = save {
            save.wait(LONG).unwrap();
        }
        eventually("durable", || fixture.checkpoint(step).is_ok());
        assert_eq!(fixture.checkpoint(step).unwrap().read("t").unwrap(), pattern(step, 9000));
    }
}

#[test]
fn a_state_many_times_the_arena_goes_through_it() {
    let fixture = fixture(|b| b.arena(2 * 4096));
    let tensor = Arc::new(pattern(3, 2_000_000));
    let save = fixture.executor.save(1, one("t", tensor.clone())).unwrap();
    fixture.executor.fence().unwrap();
    save.wait(LONG).unwrap();
    assert_eq!(fixture.checkpoint(1).unwrap().read("t").unwrap(), *tensor);
    assert_eq!(fixture.executor.arena().report().slabs, 2);
}

#[test]
fn an_idle_fence_does_not_wait() {
    let fixture = fixture(|b| b.fence_timeout(Duration::ZERO));
    fixture.executor.fence().unwrap();
}

/// Host memory has no stream in which its writer could wait before it writes or frees it.
#[test]
fn fences_on_streams_wait_on_the_host_for_copies_from_host_memory() {
    let fixture = fixture(|b| b);
    for scoped in [true, false] {
        fixture.device.hold();
        let (step, before) = (u64::from(scoped), fixture.device.copied());
        let bytes = pattern(1, 9000);
        std::thread::scope(|scope| {
            let fence = scope.spawn(|| {
                if scoped {
                    let mut state = StateDict::new();
                    state.tensor("t", &bytes[..]).unwrap();
                    _ = fixture.executor.scope(Fence::on(&[]), |scope| scope.save(step, state)).unwrap().unwrap();
                } else {
                    _ = fixture.executor.save(step, one("t", Arc::new(bytes.clone()))).unwrap();
                    fixture.executor.fence_on(&[]).unwrap();
                }
                fixture.device.copied() - before
            });
            std::thread::sleep(Duration::from_millis(20));
            assert!(!fence.is_finished(), "scoped {scoped}");
            fixture.device.release();
            assert_eq!(fence.join().unwrap(), 3);
        });
    }
    fixture.slabs_returned();
}
