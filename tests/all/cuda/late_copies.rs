//! The GPU copies late, within its memory, what has not left it at the fence; no stream waits for the bus.

use super::program::{COPIES, Gpu, at_fence, fixture, rig_on};
use crate::fixtures::executor::{LONG, eventually, pattern};
use ashore::{Detect, ErrorKind, Outcome, Overlap, Phase, StateDict};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The setting of the simulated device that keeps kernels from beginning.
const KERNELS: u64 = 8;

#[test]
fn cuda_streams_go_on_before_anything_has_left_the_gpu() {
    let fixture = fixture(|b| b.scratch(16 * 4096));
    assert_eq!(fixture.executor.device().scratch, Ok(16));
    let (producer, writer) = (fixture.gpu.stream(), fixture.gpu.stream());
    for step in 1..=20_u64 {
        let bytes = pattern(step, 30_000);
        let tensor = fixture.gpu.tensor(&bytes);
        fixture.gpu.set("hold", COPIES);
        let save = fixture.executor.save(step, at_fence(tensor.source(producer))).unwrap();
        fixture.executor.fence_on(&[writer.0]).unwrap();
        fixture.executor.fence_on(&[producer.0]).unwrap();
        writer.fill(&tensor, 0xEE);
        producer.fill(&tensor, 0xDD);
        writer.wait();
        producer.wait();
        assert_ne!(save.progress().phase, ashore::Phase::Ended);
        fixture.gpu.set("hold", 0);
        let committed = save.wait(LONG).unwrap().committed().unwrap();
        // The first chunk is the header, which needs no device copy: the fence may find that it has left.
        assert!((8..=9).contains(&committed.late_chunks), "{}", committed.late_chunks);
        assert_eq!(fixture.checkpoint(step).unwrap().read("t").unwrap(), bytes, "step {step}");
        assert_eq!(Arc::strong_count(&tensor.0), 1);
    }
}

#[test]
fn cuda_host_waits_at_a_fence_exactly_for_what_neither_scratch_nor_slabs_hold() {
    // Of 8 chunks: slots of the scratch, slabs of the arena, and whether the fence returns while nothing
    // leaves the GPU.
    for (slots, slabs, returns) in
        [(8, 2, true), (6, 2, true), (5, 2, false), (0, 8, true), (0, 7, false), (4, 4, true)]
    {
        let gpu = Gpu::take();
        let patience = Duration::from_millis(if returns { 20_000 } else { 30 });
        let fixture = rig_on(gpu, |b| b.arena(slabs * 4096).scratch(slots * 4096).fence_timeout(patience));
        let Some(fake) = fixture.gpu.fake() else { return };
        fake.set("hold", COPIES);
        let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 30_000)));
        let save = fixture.executor.save(1, at_fence(tensor.source(stream))).unwrap();
        let began = Instant::now();
        let fenced = fixture.executor.fence_on(&[stream.0]);
        assert_eq!(fenced.is_ok(), returns, "{slots} slots, {slabs} slabs: {:?}", began.elapsed());
        stream.fill(&tensor, 0xEE);
        fake.set("hold", 0);
        assert_eq!(save.wait(LONG).is_ok(), returns);
        if returns {
            assert_eq!(fixture.checkpoint(1).unwrap().read("t").unwrap(), pattern(1, 30_000));
        }
    }
}

#[test]
fn cuda_slots_come_back_however_a_save_ends() {
    let fixture = fixture(|b| b.scratch(9 * 4096));
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 30_000)));
    for step in 1..=30_u64 {
        // With a slot for each of the nine chunks the stream continues while no copy ends; with one fewer it
        // would wait for ever.
        fixture.gpu.set("hold", COPIES);
        let save = fixture.executor.save(step, at_fence(tensor.source(stream))).unwrap();
        fixture.executor.fence_on(&[stream.0]).unwrap();
        if step % 3 == 0 {
            assert!(save.cancel());
        }
        stream.wait();
        fixture.gpu.set("hold", 0);
        assert_eq!(save.wait(LONG).is_ok(), step % 3 != 0);
        _ = save.staged().wait(LONG);
        eventually("the source is dropped", || Arc::strong_count(&tensor.0) == 1);
    }
}

#[test]
fn cuda_tensors_of_the_host_may_be_written_after_a_fence_on_streams() {
    let fixture = fixture(|b| b.scratch(16 * 4096));
    fixture.gpu.set("lag_us", 300);
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 9000)));
    for step in 1..=20_u64 {
        let host = crate::fixtures::executor::Buffer::new(pattern(step, 9000));
        let mut state = StateDict::new();
        state.tensor("gpu", tensor.source(stream)).unwrap().tensor("host", host.source()).unwrap();
        let save = fixture.executor.save(step, state).unwrap();
        fixture.executor.fence_on(&[stream.0]).unwrap();
        host.fill(&pattern(99, 9000));
        save.wait(LONG).unwrap();
        assert_eq!(fixture.checkpoint(step).unwrap().read("host").unwrap(), pattern(step, 9000));
        assert_eq!(fixture.checkpoint(step).unwrap().read("gpu").unwrap(), pattern(1, 9000));
    }
}

#[test]
fn cuda_kernels_that_a_driver_refuses_are_reported_and_the_fence_waits() {
    for fault in ["cuModuleLoadData:1:222", "cuModuleGetFunction:2:500", "cuLaunchKernel:1:1", "cuMemAlloc_v2:1:2"] {
        let gpu = Gpu::take();
        let Some(fake) = gpu.fake() else { return };
        fake.fault(fault);
        let fixture = rig_on(gpu, |b| b.scratch(16 * 4096));
        let why = fixture.executor.device().scratch.clone().unwrap_err();
        assert!(why.contains(fault.split(':').next().unwrap()), "{why}");
        // Small tensors are gathered nevertheless.
        assert_eq!(fixture.executor.device().gather, Ok(64 << 10));
        fixture.gpu.set("lag_us", 300);
        let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 30_000)));
        let save = fixture.executor.save(1, at_fence(tensor.source(stream))).unwrap();
        fixture.executor.fence_on(&[stream.0]).unwrap();
        stream.fill(&tensor, 0xEE);
        assert_eq!(save.wait(LONG).unwrap().committed().unwrap().late_chunks, 0);
        assert_eq!(fixture.checkpoint(1).unwrap().read("t").unwrap(), pattern(1, 30_000));
    }
}

#[test]
fn cuda_slots_are_not_given_to_another_save_before_they_are_read() {
    let fixture = fixture(|b| b.scratch(9 * 4096).overlap(ashore::Overlap::Queue(2)).detect(Detect::Never));
    let (stream, one, two) = (fixture.gpu.stream(), pattern(1, 30_000), pattern(2, 30_000));
    let (first, second) = (fixture.gpu.tensor(&one), fixture.gpu.tensor(&two));
    for step in (1..20_u64).step_by(2) {
        fixture.gpu.set("hold", COPIES);
        let save = fixture.executor.save(step, at_fence(first.source(stream))).unwrap();
        fixture.executor.fence_on(&[stream.0]).unwrap();
        // The slots hold all of the first save now, and nothing has read them.
        stream.wait();
        let next = fixture.executor.save(step + 1, at_fence(second.source(stream))).unwrap();
        std::thread::scope(|scope| {
            // Waits for slots, which are returned when the first save has been read.
            let fence = scope.spawn(|| fixture.executor.fence_on(&[stream.0]));
            std::thread::sleep(Duration::from_millis(3));
            fixture.gpu.set("hold", 0);
            fence.join().unwrap().unwrap();
        });
        save.wait(LONG).unwrap();
        next.wait(LONG).unwrap();
        // Its slots are free when the stream has passed the fence.
        stream.wait();
        assert_eq!(fixture.checkpoint(step).unwrap().read("t").unwrap(), one, "step {step}");
        assert_eq!(fixture.checkpoint(step + 1).unwrap().read("t").unwrap(), two, "step {step}");
    }
}

#[test]
fn cuda_fence_does_not_wait_for_a_save_that_may_be_superseded() {
    // Slots for three saves of nine chunks: superseded saves must return theirs.
    let fixture = fixture(|b| b.scratch(27 * 4096).overlap(Overlap::Latest).detect(Detect::Never));
    let Some(fake) = fixture.gpu.fake() else { return };
    let (producer, writer) = (fixture.gpu.stream(), fixture.gpu.stream());
    let save = |step: u64| {
        let tensor = producer.tensor(30_000);
        producer.fill(&tensor, step as u8);
        let save = fixture.executor.save(step, at_fence(tensor.source(producer))).unwrap();
        fixture.executor.fence_on(&[writer.0]).unwrap();
        writer.fill(&tensor, 0xEE);
        (save, tensor)
    };
    for round in 0..5 {
        let first = 10 * round + 1;
        fake.set("hold", COPIES);
        let begun = save(first).0;
        eventually("the first is being staged", || begun.progress().phase == Phase::Staging);
        let mut last = save(first + 1);
        for step in first + 2..first + 8 {
            // Its kernels have not run when the next save supersedes it: its memory must still be there for
            // them.
            fake.set("hold", COPIES | KERNELS);
            let (waiting, tensor) = save(step);
            assert!(matches!(last.0.wait(LONG).unwrap(), Outcome::Superseded { by } if by == step));
            fake.set("hold", COPIES);
            // Not freed in its producer's stream before it was written in the other.
            writer.wait();
            eventually("the source is dropped", || Arc::strong_count(&last.1.0) == 1);
            last = (waiting, tensor);
        }
        fake.set("hold", 0);
        for (save, step) in [(&begun, first), (&last.0, first + 7)] {
            save.wait(LONG).unwrap().committed().unwrap();
            assert_eq!(fixture.checkpoint(step).unwrap().read("t").unwrap(), [step as u8; 30_000], "step {step}");
        }
        writer.wait();
    }
    assert_eq!(fake.sticky(), 0);
}

#[test]
fn cuda_sources_of_a_superseded_save_are_kept_until_its_fence_has_read_them() {
    let fixture = fixture(|b| b.scratch(27 * 4096).overlap(Overlap::Latest).detect(Detect::Never));
    let Some(fake) = fixture.gpu.fake() else { return };
    let (producer, writer) = (fixture.gpu.stream(), fixture.gpu.stream());
    fake.set("hold", COPIES | KERNELS);
    let [first, second, third] = [1, 2, 3].map(|step| {
        let tensor = producer.tensor(30_000);
        let save = fixture.executor.save(step, at_fence(tensor.source(producer))).unwrap();
        if step == 1 {
            eventually("the first is being staged", || save.progress().phase == Phase::Staging);
        }
        fixture.executor.fence_on(&[writer.0]).unwrap();
        (save, tensor)
    });
    second.0.wait(LONG).unwrap();
    std::thread::sleep(Duration::from_millis(2));
    assert_eq!(Arc::strong_count(&second.1.0), 2);
    fake.set("hold", COPIES);
    eventually("the source is dropped", || Arc::strong_count(&second.1.0) == 1);
    fake.set("hold", 0);
    first.0.wait(LONG).unwrap();
    third.0.wait(LONG).unwrap();
    assert_eq!(fake.sticky(), 0);
}

/// Every chunk leaves the GPU before the kernels of the fence run: the commit came first, and reported that
/// staging took no time.
#[test]
fn cuda_save_that_is_durable_before_its_fence_has_run_says_when_it_was_staged() {
    let fixture = fixture(|b| b.scratch(16 * 4096).detect(ashore::Detect::Never));
    let Some(fake) = fixture.gpu.fake() else { return };
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 30_000)));
    fake.set("hold", COPIES);
    let save = fixture.executor.save(1, at_fence(tensor.source(stream))).unwrap();
    fake.set("hold", COPIES | KERNELS);
    fixture.executor.fence_on(&[stream.0]).unwrap();
    fake.set("hold", KERNELS);
    let committed = save.wait(LONG).unwrap().committed().unwrap();
    assert_eq!((committed.staged, committed.late_chunks), (committed.durable, 0));
    fake.set("hold", 0);
    save.staged().wait(LONG).unwrap();
}

/// A driver error before a fence queued anything, or between its kernels, lost the slots of that save for
/// good.
#[test]
fn cuda_slots_come_back_after_a_fence_that_the_driver_refused() {
    let fixture = fixture(|b| b.scratch(9 * 4096).detect(Detect::Never).fence_timeout(LONG / 10));
    let Some(fake) = fixture.gpu.fake() else { return };
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 30_000)));
    let save = |step| {
        fake.set("hold", COPIES);
        let copies = fake.calls("cuMemcpyDtoHAsync_v2");
        let save = fixture.executor.save(step, at_fence(tensor.source(stream))).unwrap();
        eventually("two chunks are on their way", || fake.calls("cuMemcpyDtoHAsync_v2") >= copies + 2);
        save
    };
    let refused = ["cuMemHostAlloc:1:2", "cuStreamWaitEvent:1:1", "cuLaunchKernel:1:1", "cuLaunchKernel:2:1"];
    for (round, fault) in refused.into_iter().chain(["cuLaunchKernel:3:1"]).enumerate() {
        let failed = save(2 * round as u64 + 1);
        fake.fault(fault);
        let error = fixture.executor.fence_on(&[stream.0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Device, "{fault}: {error}");
        fake.set("hold", 0);
        assert_eq!(failed.wait(LONG).unwrap_err().kind(), ErrorKind::Device, "{fault}");
        _ = failed.staged().wait(LONG);
        eventually("the source is dropped", || Arc::strong_count(&tensor.0) == 1);
        // With one slot fewer than its nine chunks the fence would wait for ever.
        let next = save(2 * round as u64 + 2);
        fixture.executor.fence_on(&[stream.0]).unwrap_or_else(|error| panic!("{fault}: {error}"));
        fake.set("hold", 0);
        next.wait(LONG).unwrap();
    }
}

/// An event that could not be recorded counted as reached: sources were freed before the kernels that read
/// them had run.
#[test]
fn cuda_sources_are_kept_while_kernels_are_queued_behind_which_no_event_could_be_recorded() {
    let fixture = fixture(|b| b.arena(2 * 4096).scratch(16 * 4096).detect(Detect::Never));
    let Some(fake) = fixture.gpu.fake() else { return };
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 30_000)));
    fake.set("hold", COPIES | KERNELS);
    let records = || fake.calls("cuEventRecord");
    let before = records();
    let save = fixture.executor.save(1, at_fence(tensor.source(stream))).unwrap();
    // Behind the list of pieces, the producer, and each of as many chunks as there are slabs: the stager
    // waits.
    eventually("two chunks are on their way", || records() == before + 4);
    fake.fault("cuEventRecord:0:1");
    std::thread::scope(|scope| {
        let fence = scope.spawn(|| fixture.executor.fence_on(&[stream.0]));
        eventually("no event can be recorded", || records() > before + 10);
        assert!(save.cancel());
        fake.set("hold", KERNELS);
        let slabs = fixture.executor.arena();
        eventually("nothing is copied any more", || slabs.free() == slabs.report().slabs);
        // Long enough for a wrong early release to show.
        let staged = save.staged().wait(Duration::from_millis(50));
        assert_eq!((staged.unwrap_err().kind(), Arc::strong_count(&tensor.0)), (ErrorKind::Deadline, 2));
        fake.set("hold", 0);
        let error = fence.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("call=cuEventRecord"), "{error}");
    });
    assert_eq!(save.staged().wait(LONG).unwrap_err().kind(), ErrorKind::Cancelled);
    eventually("the source is dropped", || Arc::strong_count(&tensor.0) == 1);
    assert_eq!(fake.sticky(), 0);
}
