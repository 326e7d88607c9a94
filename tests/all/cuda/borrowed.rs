//! Borrowed memory may be written and freed after its scope, which does not wait for the bus where scratch
//! takes late copies of the rest.

use super::program::{COPIES, Fixture, Gpu, Stream, Tensor, at_fence, fixture, rig_on};
use crate::fixtures::executor::{LONG, eventually, pattern};
use ashore::{Capture, Fence, Overlap, Save, StateDict};
use std::sync::Arc;
use std::time::Duration;

/// Longer than the kernels of a fence take.
const SOON: Duration = Duration::from_millis(25);

/// Saves `tensors`, each of its own stream, in a scope that ends after `end`, with a fence on `writers`.
fn scoped(fixture: &Fixture, step: u64, tensors: &[(&Tensor, Stream)], writers: &[Stream], end: impl FnOnce()) -> Save {
    let streams: Vec<_> = writers.iter().map(|stream| stream.0).collect();
    let save = fixture.executor.scope(Fence::on(&streams), |scope| {
        let mut state = StateDict::new();
        for (i, (tensor, stream)) in tensors.iter().enumerate() {
            state.tensor_captured(i.to_string(), tensor.lent(*stream), Capture::AtFence).unwrap();
        }
        let save = scope.save(step, state);
        end();
        save
    });
    save.unwrap().unwrap()
}

#[test]
fn cuda_scope_waits_on_the_host_exactly_for_what_neither_scratch_nor_slabs_hold() {
    // Of 8 chunks: slots of the scratch, slabs of the arena, and whether the scope ends while nothing leaves
    // the GPU.
    for (slots, slabs, ends) in [(8, 2, true), (6, 2, true), (5, 2, false), (0, 8, true), (0, 7, false), (4, 4, true)] {
        let fixture = rig_on(Gpu::take(), |b| b.arena(slabs * 4096).scratch(slots * 4096));
        let Some(fake) = fixture.gpu.fake() else { return };
        fake.set("hold", COPIES);
        let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 30_000)));
        let save = std::thread::scope(|threads| {
            let thread = threads.spawn(|| {
                let saved = fixture
                    .executor
                    .scope(Fence::on(&[stream.0]), |scope| scope.save(1, at_fence(tensor.source(stream))));
                // The state dict is dropped, however much of it is still to be copied.
                assert_eq!(Arc::strong_count(&tensor.0), 1);
                fixture.gpu.enter();
                stream.fill(&tensor, 0xEE);
                saved.unwrap().unwrap()
            });
            if ends {
                eventually("the scope ends", || thread.is_finished());
                // Long enough for a stream that wrongly runs to show.
                std::thread::sleep(SOON);
            } else {
                std::thread::sleep(Duration::from_millis(10));
                assert!(!thread.is_finished(), "{slots} slots, {slabs} slabs");
            }
            fake.set("hold", 0);
            thread.join().unwrap()
        });
        save.wait(LONG).unwrap();
        assert_eq!(fixture.checkpoint(1).unwrap().read("t").unwrap(), pattern(1, 30_000));
    }
}

#[test]
fn cuda_lent_memory_is_written_and_freed_only_behind_what_still_reads_it() {
    let fixture = fixture(|b| b.scratch(24 * 4096).detect(ashore::Detect::Never));
    let Some(fake) = fixture.gpu.fake() else { return };
    let (first, second, writer, other) =
        (fixture.gpu.stream(), fixture.gpu.stream(), fixture.gpu.stream(), fixture.gpu.stream());
    for step in 1..=20_u64 {
        let (value, len) = (step as u8, 30_000);
        let tensors = [(first.tensor(len), first), (second.tensor(len), second)];
        tensors.iter().for_each(|(tensor, stream)| stream.fill(tensor, value));
        // Two chunks are in flight when the scope ends, and cannot be cancelled.
        fake.set("hold", COPIES);
        fake.set("allow", step % 4);
        let lent: Vec<_> = tensors.iter().map(|(tensor, stream)| (tensor, *stream)).collect();
        let copies = || fake.calls("cuMemcpyDtoHAsync_v2");
        let before = copies();
        let save =
            scoped(&fixture, step, &lent, &[writer], || eventually("copies are queued", || copies() >= before + 2));
        let written = if step % 2 == 0 {
            tensors.iter().for_each(|(tensor, _)| writer.fill(tensor, 0xEE));
            Some(tensors)
        } else {
            // Each tensor is written and freed in the stream that made it, and another stream may allocate
            // its memory.
            tensors.iter().for_each(|(tensor, stream)| stream.fill(tensor, 0xEE));
            drop(tensors);
            None
        };
        let next = [other.tensor(len), other.tensor(len)];
        next.iter().for_each(|tensor| other.fill(tensor, 0xDD));
        std::thread::sleep(SOON);
        fake.set("hold", 0);
        fake.set("allow", 0);
        save.wait(LONG).unwrap();
        // No other stream frees it before its writer has written it.
        writer.wait();
        drop(written);
        let checkpoint = fixture.checkpoint(step).unwrap();
        ["0", "1"].iter().for_each(|name| assert_eq!(checkpoint.read(name).unwrap(), vec![value; len], "step {step}"));
    }
    // A copy from freed memory would be a sticky error.
    assert_eq!(fake.sticky(), 0);
}

#[test]
fn cuda_lent_saves_that_have_not_begun_are_set_aside_too() {
    let fixture = fixture(|b| b.arena(9 * 4096).scratch(18 * 4096).overlap(Overlap::Queue(3)));
    let stream = fixture.gpu.stream();
    for step in (1..40_u64).step_by(4) {
        let tensors = [0, 1, 2].map(|i| {
            let tensor = stream.tensor(30_000);
            stream.fill(&tensor, (step + i) as u8);
            tensor
        });
        fixture.gpu.set("hold", COPIES);
        let of = |i: usize| at_fence(tensors[i].lent(stream));
        // Slabs take all of the first save; the stager has not begun the others when their scopes end.
        let both = fixture.executor.scope(Fence::on(&[stream.0]), |scope| {
            let first = scope.save(step, of(0)).unwrap();
            fixture.executor.fence_on(&[stream.0]).unwrap();
            (first, scope.save(step + 1, of(1)).unwrap())
        });
        let third =
            fixture.executor.scope(Fence::on(&[stream.0]), |scope| scope.save(step + 2, of(2))).unwrap().unwrap();
        tensors.iter().for_each(|tensor| stream.fill(tensor, 0xEE));
        drop(tensors);
        fixture.gpu.set("hold", 0);
        let (first, second) = both.unwrap();
        for (save, i) in [(first, 0), (second, 1), (third, 2)] {
            save.wait(LONG).unwrap();
            let bytes = fixture.checkpoint(step + i).unwrap().read("t").unwrap();
            assert_eq!(bytes, vec![(step + i) as u8; 30_000], "step {step}, save {i}");
        }
        // Its slots are free when the stream has passed the fence.
        stream.wait();
    }
    assert!(fixture.gpu.is_well());
}

#[test]
fn cuda_slots_come_back_and_lent_memory_is_let_go_however_a_save_ends() {
    let fixture = fixture(|b| b.scratch(8 * 4096));
    let Some(fake) = fixture.gpu.fake() else { return };
    let stream = fixture.gpu.stream();
    for step in 1..=30_u64 {
        let tensor = fixture.gpu.tensor(&pattern(step, 30_000));
        // With as many slots the scope ends while no copy does; lost slots would add up until it cannot.
        fake.set("hold", COPIES);
        let saved = fixture.executor.scope(Fence::on(&[stream.0]), |scope| {
            let save = scope.save(step, at_fence(tensor.source(stream))).unwrap();
            if step % 3 == 1 {
                assert!(save.cancel());
                fake.set("hold", 0);
            }
            save
        });
        assert_eq!(Arc::strong_count(&tensor.0), 1);
        let save = saved.unwrap();
        assert!(step % 3 != 2 || save.cancel());
        stream.fill(&tensor, 0xEE);
        fake.set("hold", 0);
        assert_eq!(save.wait(LONG).is_ok(), step % 3 == 0);
        _ = save.staged().wait(LONG);
        stream.wait();
    }
    assert_eq!(fake.sticky(), 0);
}

#[test]
fn cuda_scope_whose_stream_is_being_captured_waits_on_the_host() {
    let fixture = fixture(|b| b.scratch(16 * 4096));
    fixture.gpu.set("lag_us", 300);
    let (stream, captured) = (fixture.gpu.stream(), fixture.gpu.stream());
    for step in 1..=5_u64 {
        let tensor = fixture.gpu.tensor(&pattern(step, 30_000));
        let mut save = None;
        captured.capture(|| save = Some(scoped(&fixture, step, &[(&tensor, stream)], &[captured], || ())));
        stream.fill(&tensor, 0xEE);
        save.unwrap().wait(LONG).unwrap();
        stream.wait();
        assert_eq!(fixture.checkpoint(step).unwrap().read("0").unwrap(), pattern(step, 30_000));
    }
}

#[test]
fn cuda_scope_whose_kernels_are_lost_fails_its_save_alone() {
    // The launches of a scope's end, refused, or lost with the device.
    for (nth, code, late) in [(1, 1, ""), (2, 1, ""), (3, 1, ""), (1, 719, ""), (1, 719, ":async"), (2, 719, ":async")]
    {
        let fixture = fixture(|b| b.scratch(16 * 4096).detect(ashore::Detect::Never));
        let Some(fake) = fixture.gpu.fake() else { return };
        let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 30_000)));
        fake.set("hold", COPIES);
        let saved = std::thread::scope(|threads| {
            let thread = threads.spawn(|| {
                fixture.executor.scope(Fence::on(&[stream.0]), |scope| {
                    let save = scope.save(1, at_fence(tensor.source(stream)));
                    fake.fault(&format!("cuLaunchKernel:{nth}:{code}{late}"));
                    save
                })
            });
            // If the host must wait, it waits for the copies in flight.
            std::thread::sleep(Duration::from_millis(3));
            fake.set("hold", 0);
            thread.join().unwrap()
        });
        assert_eq!(Arc::strong_count(&tensor.0), 1);
        let error = saved.unwrap().unwrap().wait(LONG).unwrap_err();
        assert!(error.to_string().contains(&format!("code={code}")), "{nth}:{code}{late}: {error}");
        if code == 1 {
            let save = scoped(&fixture, 2, &[(&tensor, stream)], &[stream], || ());
            save.wait(LONG).unwrap();
            assert_eq!(fixture.checkpoint(2).unwrap().read("0").unwrap(), pattern(1, 30_000));
        }
    }
}
