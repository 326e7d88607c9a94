//! Streams wait at a fence for a number in memory, until the copies have ended or the save has failed.

use super::loader::{Found, here, pass, path_of};
use super::program::{COPIES, Fixture, Gpu, Stream, Tensor, at_fence, fixture, left_out, open_device, real, rig_on};
use super::staging::{refused_or_staged, write_right_after};
use crate::fixtures::executor::{LONG, eventually, one, pattern};
use ashore::{Builder, Capture, CheckpointExecutor, ErrorKind, Save, StateDict};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Long enough for a stream that nothing holds up to continue.
const A_WHILE: Duration = Duration::from_millis(5);
const WAIT: &str = "cuStreamWaitValue32_v2";
const WRITE: &str = "cuStreamWriteValue32_v2";

fn waiting(builder: Builder) -> Builder {
    // Short, so that a test that fails while copies are held ends soon.
    builder.memory_waits(true).shutdown_timeout(Duration::from_secs(5))
}

impl Fixture {
    /// Whether the first byte of the tensor has been written by `Stream::fill` with 0xEE.
    fn written(&self, tensor: &Tensor) -> bool {
        self.gpu.fake().is_some_and(|fake| fake.peek(tensor.0.at, 1) == [0xEE])
    }

    /// A save none of whose copies begins, and a stream that waits at its fence and then writes the tensor.
    fn held(&self, step: u64, tensor: &Tensor, stream: Stream) -> Option<Save> {
        self.gpu.fake()?.set("hold", COPIES);
        let save = self.executor.save(step, at_fence(tensor.source(stream))).unwrap();
        self.executor.fence_on(&[stream.0]).unwrap();
        stream.fill(tensor, 0xEE);
        std::thread::sleep(A_WHILE);
        assert!(!self.written(tensor));
        Some(save)
    }

    fn saves_right(&self, step: u64) {
        let (stream, tensor) = (self.gpu.stream(), self.gpu.tensor(&pattern(step, 9000)));
        let save = self.executor.save(step, at_fence(tensor.source(stream))).unwrap();
        self.executor.fence_on(&[stream.0]).unwrap();
        stream.fill(&tensor, 0xEE);
        save.wait(LONG).unwrap();
        assert_eq!(self.checkpoint(step).unwrap().read("t").unwrap(), pattern(step, 9000));
        stream.wait();
    }
}

#[test]
fn cuda_streams_write_after_a_memory_wait_only_what_has_left_the_gpu() {
    let fixture = fixture(waiting);
    assert!(fixture.executor.device().memory_waits.as_ref().is_ok_and(|&n| n > 1));
    fixture.gpu.set("lag_us", 300);
    write_right_after(&fixture, |streams| fixture.executor.fence_on(streams).unwrap());
    if let Some(fake) = fixture.gpu.fake() {
        assert!(fake.calls(WAIT) > 20 && fake.calls(WRITE) > 20);
    }
}

#[test]
fn cuda_streams_are_let_go_when_the_save_fails_although_its_copies_hang() {
    for cancel in [true, false] {
        let deadline = if cancel { LONG } else { Duration::from_millis(40) };
        let fixture = fixture(|b| waiting(b).save_timeout(deadline).fence_timeout(LONG));
        let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 9000)));
        let Some(save) = fixture.held(1, &tensor, stream) else { return };
        assert!(!cancel || save.cancel());
        stream.wait();
        assert!(fixture.written(&tensor));
        let kind = save.wait(LONG).unwrap_err().kind();
        assert_eq!(kind, if cancel { ErrorKind::Cancelled } else { ErrorKind::Deadline });
        // The copies may still begin: their source memory is kept.
        std::thread::sleep(A_WHILE);
        assert!(Arc::strong_count(&tensor.0) > 1);
        fixture.gpu.set("hold", 0);
        eventually("the source is dropped", || Arc::strong_count(&tensor.0) == 1);
        eventually("slabs are returned", || fixture.executor.arena().free() == fixture.executor.arena().report().slabs);
        assert!(fixture.checkpoint(1).is_err());
        if cancel {
            fixture.saves_right(2);
        }
    }
}

#[test]
fn cuda_streams_that_wait_for_an_event_are_not_let_go() {
    let fixture = fixture(|b| b);
    assert!(fixture.executor.device().memory_waits.as_ref().is_err_and(|why| why.contains("setting=memory_waits")));
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 9000)));
    let Some(save) = fixture.held(1, &tensor, stream) else { return };
    assert!(save.cancel());
    std::thread::sleep(A_WHILE);
    assert!(!fixture.written(&tensor));
    fixture.gpu.set("hold", 0);
    stream.wait();
    assert!(fixture.written(&tensor));
    assert_eq!(fixture.gpu.fake().map_or(0, |fake| fake.calls(WAIT) + fake.calls(WRITE)), 0);
}

#[test]
fn cuda_every_fence_of_a_save_lets_its_streams_go_and_later_ones_do_not_wait() {
    let fixture = fixture(waiting);
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 9000)));
    let others: Vec<_> = (0..3).map(|i| (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(i, 100)))).collect();
    let Some(save) = fixture.held(1, &tensor, stream) else { return };
    for (other, mark) in &others[..2] {
        fixture.executor.fence_on(&[other.0, stream.0]).unwrap();
        other.fill(mark, 0xEE);
    }
    std::thread::sleep(A_WHILE);
    assert!(!others.iter().any(|(_, mark)| fixture.written(mark)));
    assert!(save.cancel());
    // The save still reads, in vain.
    let (late, mark) = &others[2];
    fixture.executor.fence_on(&[late.0]).unwrap();
    late.fill(mark, 0xEE);
    for (other, mark) in &others {
        other.wait();
        assert!(fixture.written(mark));
    }
    stream.wait();
    assert!(Arc::strong_count(&tensor.0) > 1);
    fixture.gpu.set("hold", 0);
    fixture.saves_right(2);
}

#[test]
fn cuda_streams_wait_for_an_event_when_too_many_memory_waits_are_pending() {
    let fixture = fixture(waiting);
    let at_once = fixture.executor.device().memory_waits.clone().unwrap();
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 9000)));
    let (late, mark) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(2, 100)));
    let Some(save) = fixture.held(1, &tensor, stream) else { return };
    (1..at_once).for_each(|_| fixture.executor.fence_on(&[stream.0]).unwrap());
    fixture.executor.fence_on(&[late.0]).unwrap();
    late.fill(&mark, 0xEE);
    assert!(save.cancel());
    stream.wait();
    assert!(fixture.written(&tensor) && !fixture.written(&mark));
    fixture.gpu.set("hold", 0);
    late.wait();
    eventually("the source is dropped", || Arc::strong_count(&tensor.0) == 1);
    // All of them were returned and reused more than once.
    let fake = fixture.gpu.fake().unwrap();
    let before = fake.calls(WAIT);
    (0..2 * at_once as u64 + 2).for_each(|i| fixture.saves_right(2 + i));
    assert!(fake.calls(WAIT) > before + at_once as u64);
}

#[test]
fn cuda_streams_of_several_devices_are_let_go() {
    // The executor is dropped first.
    let second = Gpu::take();
    let fixture = fixture(waiting);
    let (Some(fake), Some(other)) = (fixture.gpu.fake(), second.fake()) else { return };
    let (mine, theirs) = (fixture.gpu.stream(), second.stream());
    let (near, far) = (fixture.gpu.tensor(&[0; 5000]), second.tensor(&[0; 5000]));
    for step in 1..=8 {
        let mut state = StateDict::new();
        state.tensor_captured("near", near.source(mine), Capture::AtFence).unwrap();
        state.tensor_captured("far", far.source(theirs), Capture::AtFence).unwrap();
        // Held on one of them only.
        [fake, other][step as usize % 2].set("hold", COPIES);
        let save = fixture.executor.save(step, state).unwrap();
        fixture.executor.fence_on(&[mine.0, theirs.0]).unwrap();
        second.enter();
        theirs.fill(&far, step as u8);
        fixture.gpu.enter();
        mine.fill(&near, step as u8);
        std::thread::sleep(A_WHILE / 5);
        assert_ne!((fake.peek(near.0.at, 1)[0], other.peek(far.0.at, 1)[0]), (step as u8, step as u8));
        let good = step > 4;
        if good {
            [fake, other].iter().for_each(|device| device.set("hold", 0));
        } else {
            assert!(save.cancel());
        }
        mine.wait();
        second.enter();
        theirs.wait();
        fixture.gpu.enter();
        [fake, other].iter().for_each(|device| device.set("hold", 0));
        assert_eq!(save.wait(LONG).is_ok(), good);
        if good {
            let before = step as u8 - 1;
            assert_eq!(fixture.checkpoint(step).unwrap().read("near").unwrap(), [before; 5000]);
            assert_eq!(fixture.checkpoint(step).unwrap().read("far").unwrap(), [before; 5000]);
        }
        _ = save.staged().wait(LONG);
    }
}

#[test]
fn cuda_capture_of_a_graph_is_refused_by_a_memory_wait_and_not_broken() {
    let fixture = fixture(waiting);
    let (stream, captured) = (fixture.gpu.stream(), fixture.gpu.stream());
    let tensor = fixture.gpu.tensor(&[5; 4000]);
    fixture.gpu.set("hold", COPIES);
    let save = fixture.executor.save(1, at_fence(tensor.source(stream))).unwrap();
    let waits = fixture.gpu.fake().map_or(0, |fake| fake.calls(WAIT));
    captured.capture(|| {
        refused_or_staged(&save, fixture.executor.fence_on(&[stream.0, captured.0]));
        assert_eq!(fixture.gpu.fake().map_or(0, |fake| fake.calls(WAIT)), waits);
        fixture.executor.fence_on(&[stream.0]).unwrap();
        fixture.gpu.set("hold", 0);
        save.wait(LONG).unwrap();
    });
    assert_eq!(fixture.checkpoint(1).unwrap().read("t").unwrap(), [5; 4000]);
}

#[test]
fn cuda_streams_are_let_go_although_the_driver_refuses_every_call() {
    let fixture = fixture(waiting);
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 9000)));
    let Some(save) = fixture.held(1, &tensor, stream) else { return };
    // Copies stay held: nothing that is queued behind them runs any more.
    fixture.gpu.fake().unwrap().fault("*:0:4");
    assert_eq!(save.wait(LONG).unwrap_err().kind(), ErrorKind::Device);
    eventually("the stream goes on", || fixture.written(&tensor));
}

#[test]
fn cuda_memory_waits_that_a_driver_refuses_are_reported_and_streams_wait_for_events() {
    for fault in [WAIT, WRITE, "cuMemHostAlloc"].map(|call| format!("{call}:1:801")) {
        let gpu = Gpu::take();
        let Some(fake) = gpu.fake() else { return };
        let before = fake.live();
        fake.fault(&fault);
        let fixture = rig_on(gpu, |b| waiting(b).gather(0));
        let why = fixture.executor.device().memory_waits.clone().unwrap_err();
        assert!(why.contains(fault.split(':').next().unwrap()), "{why}");
        fixture.gpu.set("lag_us", 300);
        let waits = fixture.gpu.fake().unwrap().calls(WAIT);
        (1..5).for_each(|step| fixture.saves_right(step));
        assert_eq!(fixture.gpu.fake().unwrap().calls(WAIT), waits);
        fixture.executor.shutdown(LONG).unwrap();
        drop(fixture.executor);
        assert_eq!(fixture.gpu.fake().unwrap().live().host, before.host);
    }
}

#[test]
fn cuda_driver_without_memory_waits_and_shared_queues_are_named() {
    let path = path_of!(cuda_driver_without_memory_waits_and_shared_queues_are_named);
    const EXPECTED: &str = "ASHORE_TEST_EXPECTED";
    if real() {
        return left_out();
    }
    if !here() {
        for symbol in [&[WAIT], &[WRITE]] {
            pass(path, &Found { without: symbol, variables: &[(EXPECTED, "too old symbol=cuStreamW")] });
        }
        let variables = &[("CUDA_DEVICE_MAX_CONNECTIONS", "1"), (EXPECTED, "CUDA_DEVICE_MAX_CONNECTIONS=\"1\"")];
        return pass(path, &Found { without: &[], variables });
    }
    let device = open_device(Path::new("libcuda.so.1"), 0).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let builder =
        CheckpointExecutor::builder(folder.path()).arena(1 << 20).chunk(1 << 16).made_device(Arc::new(device));
    let executor = builder.memory_waits(true).build().unwrap();
    let (why, expected) = (executor.device().memory_waits.clone().unwrap_err(), std::env::var(EXPECTED).unwrap());
    assert!(why.contains(&expected), "{why}");
    executor.save(1, one("t", pattern(1, 100_000))).unwrap().wait(LONG).unwrap();
}

#[test]
fn cuda_executor_with_memory_waits_gives_back_all_that_it_took() {
    let gpu = Gpu::take();
    let Some(fake) = gpu.fake() else { return };
    let (stream, tensor) = (gpu.stream(), gpu.tensor(&pattern(1, 9000)));
    let before = fake.live();
    let fixture = rig_on(gpu, waiting);
    let Some(save) = fixture.held(1, &tensor, stream) else { return };
    assert!(save.cancel());
    fixture.gpu.set("hold", 0);
    let Fixture { executor, gpu, .. } = fixture;
    executor.shutdown(LONG).unwrap();
    drop(executor);
    assert_eq!(gpu.fake().unwrap().live(), before);
}
