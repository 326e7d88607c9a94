//! The stager queues the copies of a chunk in one call: the same bytes, fewer calls, and no copy comes too
//! late.

use super::loader::{Found, pass, path_of};
use super::program::{COPIES, Fixture, Gpu, Stream, Tensor, at_fence, fixture, left_out, real, rig_on};
use crate::fixtures::executor::{LONG, eventually, pattern};
use ashore::{Builder, Capture, Detect, Dtype, ErrorKind, Layout, MemoryLocation, Source, StateDict};
use std::sync::Arc;

const BATCH: &str = "cuMemcpyBatchAsync_v2";

/// Small tensors that are not gathered; some are empty.
fn small(gpu: &Gpu) -> Vec<(Tensor, Vec<u8>)> {
    let bytes = (0..300).map(|i| pattern(i, (i as usize * 37) % 900));
    bytes.map(|bytes| (gpu.tensor(&bytes), bytes)).collect()
}

fn state_of(tensors: &[(Tensor, Vec<u8>)], stream: Stream) -> StateDict<'static> {
    let mut state = StateDict::new();
    for (i, (tensor, _)) in tensors.iter().enumerate() {
        state.tensor_captured(format!("{i:03}"), tensor.source(stream), Capture::AtFence).unwrap();
        if i % 100 == 7 {
            state.tensor(format!("{i:03}.host"), Arc::new(pattern(i as u64, 700))).unwrap();
        }
    }
    state
}

fn ungathered(b: Builder) -> Builder {
    b.chunk(16 << 10).arena(64 << 10).gather(0).detect(Detect::Never)
}

/// Saves twice, and checks the saved bytes. Returns the second save's driver calls: single copies and
/// batches.
fn save(fixture: &Fixture, stream: Stream, tensors: &[(Tensor, Vec<u8>)]) -> Option<[u64; 2]> {
    let calls = || fixture.gpu.fake().map(|fake| ["cuMemcpyDtoHAsync_v2", BATCH].map(|name| fake.calls(name)));
    let mut before = None;
    for step in 1..=2 {
        before = calls();
        let save = fixture.executor.save(step, state_of(tensors, stream)).unwrap();
        fixture.executor.fence().unwrap();
        save.wait(LONG).unwrap();
        let checkpoint = fixture.checkpoint(step).unwrap();
        checkpoint.verify().unwrap();
        for (i, (_, bytes)) in tensors.iter().enumerate() {
            assert_eq!(&checkpoint.read(&format!("{i:03}")).unwrap(), bytes, "step {step} tensor {i}");
        }
        assert_eq!(checkpoint.read("107.host").unwrap(), pattern(107, 700));
    }
    let (before, after) = (before?, calls()?);
    Some([0, 1].map(|i| after[i] - before[i]))
}

#[test]
fn cuda_copies_in_batches_bring_the_same_bytes_by_fewer_calls() {
    let mut counted = Vec::new();
    for batch in [false, true] {
        let fixture = fixture(|b| ungathered(b).batch(batch));
        let found = fixture.executor.device().batch.clone();
        // A real driver may be too old.
        assert!(found.is_ok() == batch || (batch && real()), "{found:?}");
        let (stream, tensors) = (fixture.gpu.stream(), small(&fixture.gpu));
        counted.extend(save(&fixture, stream, &tensors));
    }
    let [[copies, none], [single, batches]] = counted[..] else { return };
    assert!(none == 0 && copies > 280, "{counted:?}");
    // 300 tensors of 450 bytes on average, in chunks of 16 KiB.
    assert!((8..12).contains(&batches) && single < 3, "{counted:?}");
}

#[test]
fn cuda_batches_of_several_devices_go_into_one_save() {
    let (fixture, second) = (fixture(|b| ungathered(b).batch(true)), Gpu::take());
    if second.ordinal == fixture.gpu.ordinal {
        return;
    }
    let (mine, theirs) = (fixture.gpu.stream(), second.stream());
    let (near, far) = (small(&fixture.gpu), small(&second));
    let mut state = StateDict::new();
    for i in 0..near.len() {
        let (tensor, stream) = if i % 2 == 0 { (&near[i].0, mine) } else { (&far[i].0, theirs) };
        state.tensor(format!("{i:03}"), tensor.source(stream)).unwrap();
    }
    let save = fixture.executor.save(1, state).unwrap();
    fixture.executor.fence_on(&[mine.0, theirs.0]).unwrap();
    theirs.fill(&far[1].0, 0xEE);
    save.wait(LONG).unwrap();
    let checkpoint = fixture.checkpoint(1).unwrap();
    for (i, (_, bytes)) in near.iter().enumerate() {
        assert_eq!(&checkpoint.read(&format!("{i:03}")).unwrap(), bytes, "tensor {i}");
    }
    let counted = [&fixture.gpu, &second].map(|gpu| gpu.fake().map_or(2, |fake| fake.calls(BATCH)));
    assert!(counted.iter().all(|&n| n > 1), "{counted:?}");
}

/// The watermark comes after the copies that it counts, so that a fence copies late what has not been copied.
#[test]
fn cuda_batches_that_have_not_left_the_gpu_are_set_aside_at_the_fence() {
    let fixture = fixture(|b| b.scratch(16 * 4096).gather(0).batch(true).detect(Detect::Never));
    let Some(fake) = fixture.gpu.fake() else { return };
    let stream = fixture.gpu.stream();
    for step in 1..=20_u64 {
        let tensors: Vec<_> = (0..20).map(|i| fixture.gpu.tensor(&pattern(step + i, 700))).collect();
        fake.set("hold", COPIES);
        let (batches, told) = (fake.calls(BATCH), fake.calls("cuStreamWriteValue64_v2"));
        let mut state = StateDict::new();
        for (i, tensor) in tensors.iter().enumerate() {
            state.tensor_captured(format!("{i:02}"), tensor.source(stream), Capture::AtFence).unwrap();
        }
        let save = fixture.executor.save(step, state).unwrap();
        eventually("two chunks are queued", || fake.calls("cuStreamWriteValue64_v2") >= told + 2);
        assert!(fake.calls(BATCH) > batches);
        fixture.executor.fence_on(&[stream.0]).unwrap();
        tensors.iter().for_each(|tensor| stream.fill(tensor, 0xEE));
        stream.wait();
        fake.set("hold", 0);
        save.wait(LONG).unwrap();
        for i in 0..20 {
            let read = fixture.checkpoint(step).unwrap().read(&format!("{i:02}")).unwrap();
            assert!(read == pattern(step + i, 700), "step {step} tensor {i}");
        }
    }
}

/// A source that claims to have bytes, and gives none.
struct Empty;

#[expect(unsafe_code, reason = "a source that breaks its promise")]
// SAFETY: no pointer is handed out.
unsafe impl Source for Empty {
    fn layout(&self) -> Layout {
        Layout::new(Dtype::U8, [100])
    }

    fn location(&self) -> MemoryLocation {
        MemoryLocation::Host { bytes: 100, writable: false }
    }

    fn read(&self, _: &mut dyn FnMut(*const u8)) {}
}

#[test]
fn cuda_copies_that_were_held_back_when_a_save_failed_are_never_made() {
    let fixture = fixture(|b| b.gather(0).batch(true).detect(Detect::Never));
    let stream = fixture.gpu.stream();
    for step in 1..=20 {
        let tensors: Vec<_> = (0..3).map(|i| fixture.gpu.tensor(&pattern(i, 500))).collect();
        let mut state = StateDict::new();
        tensors.iter().enumerate().for_each(|(i, t)| _ = state.tensor(format!("{i}"), t.source(stream)).unwrap());
        state.tensor("3", Empty).unwrap();
        let before = fixture.gpu.fake().map(|fake| fake.calls(BATCH));
        let error = fixture.executor.save(2 * step, state).unwrap().wait(LONG).unwrap_err();
        assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("tensor=\"3\""), "{error}");
        fixture.executor.fence().unwrap();
        assert_eq!(fixture.gpu.fake().map(|fake| fake.calls(BATCH)), before);
        assert!(tensors.iter().all(|tensor| Arc::strong_count(&tensor.0) == 1));
        // Their memory is freed: a read of it from now on is a sticky error.
        drop(tensors);
        let tensor = fixture.gpu.tensor(&pattern(9, 9000));
        fixture.executor.save(2 * step + 1, at_fence(tensor.source(stream))).unwrap().wait(LONG).unwrap();
        assert_eq!(fixture.checkpoint(2 * step + 1).unwrap().read("t").unwrap(), pattern(9, 9000));
    }
    assert!(fixture.gpu.is_well());
}

#[test]
fn cuda_batches_that_a_driver_refuses_or_gets_wrong_are_reported_and_not_used() {
    for (fault, named) in [
        ("cuMemcpyBatchAsync_v2:1:1", BATCH),
        ("cuMemcpyBatchAsync_v2:1:801", "code=801"),
        ("cuMemHostAlloc:1:2", "cuMemHostAlloc"),
        ("cuMemHostRegister_v2:0:2", "not pinned"),
    ] {
        let gpu = Gpu::take();
        let Some(fake) = gpu.fake() else { return };
        fake.fault(fault);
        let fixture = rig_on(gpu, |b| ungathered(b).batch(true));
        let why = fixture.executor.device().batch.clone().unwrap_err();
        assert!(why.contains(named), "{why}");
        let (stream, tensors) = (fixture.gpu.stream(), small(&fixture.gpu));
        let [copies, batches] = save(&fixture, stream, &tensors).unwrap();
        assert!(copies > 280 && batches == 0, "{copies} {batches}");
    }
    let fixture = fixture(|b| b);
    assert!(fixture.executor.device().batch.clone().unwrap_err().contains("setting=batch"));
    let host = crate::fixtures::executor::fixture(|b| b.batch(true));
    assert!(host.executor.device().batch.clone().unwrap_err().contains("cannot batch"));
}

#[test]
fn cuda_batches_are_made_by_drivers_of_12_8_too_and_older_ones_copy_one_by_one() {
    const EXPECTED: &str = "EXPECTED_BATCH";
    if real() {
        return left_out();
    }
    let here = path_of!(cuda_batches_are_made_by_drivers_of_12_8_too_and_older_ones_copy_one_by_one);
    let Ok(expected) = std::env::var(EXPECTED) else {
        pass(here, &Found { without: &[BATCH], variables: &[(EXPECTED, "first")] });
        pass(here, &Found { without: &[BATCH, "cuMemcpyBatchAsync"], variables: &[(EXPECTED, "none")] });
        return;
    };
    let fixture = fixture(|b| ungathered(b).batch(true));
    match fixture.executor.device().batch.clone() {
        Ok(()) => assert_eq!(expected, "first"),
        Err(why) => assert!(expected == "none" && why.contains("too old symbol=cuMemcpyBatchAsync"), "{why}"),
    }
    save(&fixture, fixture.gpu.stream(), &small(&fixture.gpu));
}
