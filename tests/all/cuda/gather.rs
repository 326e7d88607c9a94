//! What the device does at `save`: small tensors are captured, strided ones packed, and the rest digested.

use super::program::{COPIES, Gpu, at_fence, fixture, rig_on};
use crate::fixtures::executor::{LONG, eventually, pattern};
use ashore::{
    Capture, Detect, DeviceStream, Dtype, ErrorKind, Fence, Layout, MemoryLocation, Overlap, Phase, Source, StateDict,
};
use std::sync::Arc;

#[test]
fn cuda_tensors_captured_at_save_may_be_written_at_once() {
    let fixture = fixture(|b| b);
    fixture.gpu.set("lag_us", 200);
    let streams = [fixture.gpu.stream(), fixture.gpu.stream()];
    let sizes = [1, 2, 15, 16, 17, 1000, 4095, 4097, 20_000];
    for step in 1..=8_u64 {
        let bytes = |i: usize| pattern(step + i as u64, sizes[i]);
        let tensors: Vec<_> = (0..sizes.len()).map(|i| fixture.gpu.tensor(&bytes(i))).collect();
        let mut state = StateDict::new();
        for (i, tensor) in tensors.iter().enumerate() {
            let capture = [Capture::AtSave, Capture::AtFence][usize::from(step % 2 == 0 && i == 8)];
            state.tensor_captured(i.to_string(), tensor.source(streams[i % 2]), capture).unwrap();
        }
        let save = fixture.executor.save(step, state).unwrap();
        tensors[..8].iter().enumerate().for_each(|(i, t)| streams[i % 2].fill(t, 0xEE));
        fixture.executor.fence_on(&[streams[0].0]).unwrap();
        streams[0].fill(&tensors[8], 0xEE);
        save.wait(LONG).unwrap();
        let checkpoint = fixture.checkpoint(step).unwrap();
        for i in 0..sizes.len() {
            assert_eq!(checkpoint.read(&i.to_string()).unwrap(), bytes(i), "step {step} tensor {i}");
        }
        streams.iter().for_each(|stream| stream.wait());
        eventually("sources are dropped", || tensors.iter().all(|t| Arc::strong_count(&t.0) == 1));
    }
}

#[test]
fn cuda_small_tensors_are_captured_while_there_is_room_and_then_left_to_the_fence() {
    let fixture = fixture(|b| b.gather(10_000));
    let stream = fixture.gpu.stream();
    let tensors: Vec<_> = (0..4).map(|i| fixture.gpu.tensor(&pattern(i, 4000))).collect();
    let state = || {
        let mut state = StateDict::new();
        tensors.iter().enumerate().for_each(|(i, t)| _ = state.tensor(i.to_string(), t.source(stream)).unwrap());
        state
    };
    let save = fixture.executor.save(1, state()).unwrap();
    fixture.executor.fence().unwrap();
    let ashore::Outcome::Durable(committed) = save.wait(LONG).unwrap() else { panic!("not durable") };
    assert_eq!(committed.over_budget, 2);
    let mut asked = state();
    asked.tensor_captured("asked", tensors[3].source(stream), Capture::AtSave).unwrap();
    let ashore::Outcome::Durable(committed) = fixture.executor.save(2, asked).unwrap().wait(LONG).unwrap() else {
        panic!("not durable")
    };
    assert_eq!(committed.over_budget, 3, "what was asked for comes first");
    let large = fixture.gpu.tensor(&pattern(9, 10_001));
    let mut state = StateDict::new();
    state.tensor_captured("large", large.source(stream), Capture::AtSave).unwrap();
    let error = fixture.executor.save(3, state).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let named = ["tensor=\"large\"", "gather=10000", "bytes=10001", "free=10000"];
    assert!(named.iter().all(|name| error.to_string().contains(name)), "{error}");
    assert_eq!(Arc::strong_count(&large.0), 1);
}

#[test]
fn cuda_captured_tensors_need_no_fence_before_the_next_save() {
    let fixture = fixture(|b| b.overlap(Overlap::Queue(3)));
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&[0; 9000]));
    fixture.gpu.set("hold", COPIES);
    let mut saves = Vec::new();
    for step in 1..=4 {
        stream.fill(&tensor, step as u8);
        let mut state = StateDict::new();
        state.tensor("t", tensor.source(stream)).unwrap();
        saves.push(fixture.executor.save(step, state).unwrap());
        // The tensor is captured now, and has not left the GPU.
        stream.wait();
    }
    stream.fill(&tensor, 0xEE);
    stream.wait();
    fixture.gpu.set("hold", 0);
    for (save, step) in saves.into_iter().zip(1..) {
        save.wait(LONG).unwrap();
        assert_eq!(fixture.checkpoint(step).unwrap().read("t").unwrap(), vec![step as u8; 9000]);
    }
}

#[test]
fn cuda_room_of_a_save_that_was_cancelled_is_not_written_late() {
    let fixture = fixture(|b| b.gather(8192).detect(Detect::Never));
    let Some(fake) = fixture.gpu.fake() else { return };
    let (slow, quick) = (fixture.gpu.stream(), fixture.gpu.stream());
    let (old, new) = (fixture.gpu.tensor(&[1; 8000]), fixture.gpu.tensor(&[2; 8000]));
    let state = |tensor: &super::program::Tensor, stream, capture| {
        let mut state = StateDict::new();
        state.tensor_captured("t", tensor.source(stream), capture).unwrap();
        state
    };
    // The program's work keeps its stream busy for longer than anything here.
    fake.set("hold", 4);
    let cancelled = fixture.executor.save(1, state(&old, slow, Capture::AtSave)).unwrap();
    assert!(cancelled.cancel());
    _ = cancelled.wait(LONG);
    let error = fixture.executor.save(2, state(&new, quick, Capture::AtSave)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("free=192"), "{error}");
    fake.set("hold", 0);
    slow.wait();
    eventually("the room is free", || fixture.executor.save(3, state(&new, quick, Capture::AtSave)).is_ok());
    fixture.executor.fence().unwrap();
}

#[test]
fn cuda_strided_tensors_are_saved_packed() {
    // Four chunks of scratch, or none: captured tensors are copied late, too, and cut where chunks end.
    for slots in [0, 4] {
        let fixture = fixture(|b| b.scratch(slots * 4096));
        fixture.gpu.set("lag_us", 100);
        let (stream, bytes) = (fixture.gpu.stream(), pattern(5, 40_000));
        let cases: [(u64, Dtype, &[usize], &[i64]); 7] = [
            (0, Dtype::F32, &[50, 60], &[4, 200]),
            (0, Dtype::U16, &[100], &[6]),
            (39_996, Dtype::I32, &[2000], &[-4]),
            (8, Dtype::F64, &[3, 7, 5], &[0, 40, 8]),
            (3, Dtype::U8, &[9, 1000], &[2001, 2]),
            (0, Dtype::F32, &[2, 3, 4, 5], &[240, 80, 20, 4]),
            (0, Dtype::BF16, &[20, 1, 30], &[2, 77, 40]),
        ];
        let packed = |(at, dtype, shape, strides): &(u64, Dtype, &[usize], &[i64])| {
            let item = dtype.bitsize() / 8;
            let mut out = Vec::new();
            for mut n in 0..shape.iter().product::<usize>() {
                let mut from = *at as i64;
                for (size, stride) in shape.iter().zip(*strides).rev() {
                    from += (n % size) as i64 * stride;
                    n /= size;
                }
                out.extend_from_slice(&bytes[from as usize..][..item]);
            }
            out
        };
        for (step, capture) in [(1, Capture::AtSave), (2, Capture::AtFence), (3, Capture::AtFence)] {
            let tensor = fixture.gpu.tensor(&bytes);
            let mut state = StateDict::new();
            for (i, (at, dtype, shape, strides)) in cases.iter().enumerate() {
                let source = tensor.strided(stream, *at, *dtype, shape, strides);
                state.tensor_captured(i.to_string(), source, capture).unwrap();
            }
            state.tensor("host", Arc::new(pattern(3, 5000))).unwrap();
            let save = fixture.executor.save(step, state).unwrap();
            fixture.executor.fence_on(&[stream.0]).unwrap();
            stream.fill(&tensor, 0xEE);
            save.wait(LONG).unwrap();
            let checkpoint = fixture.checkpoint(step).unwrap();
            for (i, case) in cases.iter().enumerate() {
                assert_eq!(
                    checkpoint.read(&i.to_string()).unwrap(),
                    packed(case),
                    "slots {slots} step {step} case {i}"
                );
            }
            assert_eq!(checkpoint.read("host").unwrap(), pattern(3, 5000));
            stream.wait();
        }
    }
}

#[test]
fn cuda_tensors_that_no_kernel_can_pack_are_refused_by_name() {
    let fixture = fixture(|b| b);
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&[0; 1000]));
    let mut state = StateDict::new();
    let few = state.tensor("few", tensor.strided(stream, 0, Dtype::F32, &[2, 3], &[4])).map(drop).unwrap_err();
    assert!(few.to_string().contains("tensor=\"few\"") && few.to_string().contains("strides=[4]"), "{few}");
    let (shape, strides) = ([2; 9], [3, 7, 11, 1, 5, 13, 2, 17, 19]);
    state.tensor("many", tensor.strided(stream, 0, Dtype::U8, &shape, &strides)).unwrap();
    let many = fixture.executor.save(1, state).unwrap_err();
    assert_eq!(many.kind(), ErrorKind::Invalid);
    assert!(many.to_string().contains("tensor=\"many\""), "{many}");
    assert_eq!(Arc::strong_count(&tensor.0), 1);
}

#[test]
fn cuda_kernels_that_get_bytes_wrong_or_are_refused_gather_nothing() {
    for fault in ["cuModuleLoadData:1:222", "cuLaunchKernel:2:1", "cuLaunchKernel:3:1", "cuMemAlloc_v2:2:2"] {
        let gpu = Gpu::take();
        let Some(fake) = gpu.fake() else { return };
        fake.fault(fault);
        let fixture = rig_on(gpu, |b| b);
        let why = fixture.executor.device().gather.clone().unwrap_err();
        assert!(why.contains(fault.split(':').next().unwrap()), "{why}");
        let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 3000)));
        let mut state = StateDict::new();
        state.tensor("t", tensor.strided(stream, 0, Dtype::U8, &[1000], &[3])).unwrap();
        let error = fixture.executor.save(1, state).unwrap_err();
        assert!(error.to_string().contains("tensor=\"t\"") && error.to_string().contains(&why), "{error}");
        let mut state = StateDict::new();
        state.tensor("t", tensor.source(stream)).unwrap();
        let save = fixture.executor.save(1, state).unwrap();
        fixture.executor.fence_on(&[stream.0]).unwrap();
        stream.fill(&tensor, 0xEE);
        save.wait(LONG).unwrap();
        assert_eq!(fixture.checkpoint(1).unwrap().read("t").unwrap(), pattern(1, 3000));
        stream.wait();
    }
}

#[test]
fn cuda_small_tensors_cross_the_bus_together_and_their_list_only_once() {
    let fixture = fixture(|b| b.chunk(64 << 10).arena(256 << 10).detect(Detect::Never));
    let Some(fake) = fixture.gpu.fake() else { return };
    let stream = fixture.gpu.stream();
    let tensors: Vec<_> = (0..300).map(|i| fixture.gpu.tensor(&pattern(i, 1000))).collect();
    let (mut copies, mut lists) = (Vec::new(), Vec::new());
    for step in 1..=3 {
        let mut state = StateDict::new();
        for (i, tensor) in tensors.iter().enumerate() {
            state.tensor_captured(format!("{i:03}"), tensor.source(stream), Capture::AtFence).unwrap();
        }
        let save = fixture.executor.save(step, state).unwrap();
        fixture.executor.fence().unwrap();
        save.wait(LONG).unwrap();
        copies.push(fake.calls("cuMemcpyDtoHAsync_v2"));
        lists.push(fake.calls("cuMemcpyHtoDAsync_v2"));
        for i in 0..300 {
            assert_eq!(fixture.checkpoint(step).unwrap().read(&format!("{i:03}")).unwrap(), pattern(i, 1000));
        }
    }
    assert!(copies[2] - copies[1] <= 6, "{copies:?}");
    assert_eq!((lists[1], lists[2]), (lists[0], lists[0]));
}

#[test]
fn cuda_tensors_written_before_the_fence_are_found_out_by_the_first_saves() {
    let fixture = fixture(|b| b.gather(4096));
    fixture.gpu.set("lag_us", 2000);
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 200_000)));
    let save = fixture.executor.save(1, at_fence(tensor.source(stream))).unwrap();
    stream.fill(&tensor, 0xEE);
    fixture.executor.fence_on(&[stream.0]).unwrap();
    let error = save.wait(LONG).unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Invalid, Some(1)));
    assert!(error.to_string().contains("tensor=\"t\""), "{error}");
    assert!(fixture.checkpoint(1).is_err());
    stream.wait();
    fixture.gpu.set("lag_us", 0);
    // After two compared saves nothing is digested any more.
    for step in 2..=4 {
        let before = fixture.gpu.fake().map_or(0, |fake| fake.calls("cuMemsetD8Async"));
        fixture.executor.save(step, at_fence(tensor.source(stream))).unwrap().wait(LONG).unwrap();
        let digested = fixture.gpu.fake().map_or(step < 4, |fake| fake.calls("cuMemsetD8Async") > before);
        assert_eq!(digested, step < 4, "step {step}");
    }
}

#[test]
fn cuda_strided_tensors_of_another_device_are_refused_by_name() {
    let fixture = fixture(|b| b);
    let other = Gpu::take();
    let (stream, tensor) = (other.stream(), other.tensor(&pattern(1, 6000)));
    if stream.0.ordinal() == fixture.gpu.ordinal {
        return;
    }
    let mut state = StateDict::new();
    state.tensor("far", tensor.strided(stream, 0, Dtype::U8, &[3000], &[2])).unwrap();
    let error = fixture.executor.save(1, state).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let named = [format!("device=cuda:{}", other.ordinal), "tensor=\"far\"".to_owned()];
    assert!(named.iter().all(|name| error.to_string().contains(name)), "{error}");
}

/// A superseded save keeps its tensors until the kernels that read them have run.
#[test]
fn cuda_tensors_of_a_save_that_never_begins_are_kept_until_the_gpu_has_read_them() {
    const KERNELS: u64 = 8;
    let fixture = fixture(|b| b.overlap(Overlap::Latest));
    let Some(fake) = fixture.gpu.fake() else { return };
    let stream = fixture.gpu.stream();
    let tensors: Vec<_> = (0..5).map(|i| fixture.gpu.tensor(&[i as u8; 3000])).collect();
    fake.set("hold", KERNELS);
    let mut saves = Vec::new();
    for (tensor, step) in tensors.iter().zip(1..) {
        let mut state = StateDict::new();
        state.tensor("t", tensor.source(stream)).unwrap();
        let save = fixture.executor.save(step, state).unwrap();
        if step == 1 {
            // From then on each save supersedes the one before.
            eventually("the first is being staged", || save.progress().phase == Phase::Staging);
        }
        saves.push(save);
    }
    let superseded = saves.remove(2);
    assert!(matches!(superseded.wait(LONG), Ok(ashore::Outcome::Superseded { .. })));
    assert_eq!(Arc::strong_count(&tensors[2].0), 2, "the GPU has not read it yet");
    fake.set("hold", 0);
    eventually("the source is dropped", || Arc::strong_count(&tensors[2].0) == 1);
    for save in saves {
        save.wait(LONG).unwrap();
    }
}

/// The capture pool gives up an allocation that may still be written, and reuses the rest.
#[test]
fn cuda_capture_that_fails_does_not_take_the_room_from_later_saves() {
    let fixture = fixture(|b| b.gather(16 << 10).detect(Detect::Never));
    let Some(fake) = fixture.gpu.fake() else { return };
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 4000)));
    let state = || {
        let mut state = StateDict::new();
        state.tensor_captured("t", tensor.source(stream), Capture::AtSave).unwrap();
        state
    };
    fake.fault("cuLaunchKernel:1:1");
    assert_eq!(fixture.executor.save(1, state()).unwrap_err().kind(), ErrorKind::Device);
    for step in 2..20 {
        fixture.executor.save(step, state()).unwrap().wait(LONG).unwrap();
        assert_eq!(fixture.checkpoint(step).unwrap().read("t").unwrap(), pattern(1, 4000));
    }
}

/// The save of borrowed tensors was refused after the first kernel that reads them was queued, and the scope
/// ended while it ran.
#[test]
fn cuda_scope_waits_for_kernels_of_a_save_that_was_refused() {
    const KERNELS: u64 = 8;
    let fixture = fixture(|b| b);
    let Some(fake) = fixture.gpu.fake() else { return };
    let (first, second) = (fixture.gpu.stream(), fixture.gpu.stream());
    let (one, two) = (fixture.gpu.tensor(&pattern(1, 3000)), fixture.gpu.tensor(&pattern(2, 3000)));
    fake.set("hold", KERNELS);
    let [tried, ended] = [const { std::sync::atomic::AtomicBool::new(false) }; 2];
    std::thread::scope(|threads| {
        second.capture(|| {
            let mut state = StateDict::new();
            state.tensor("one", one.source(first)).unwrap();
            state.tensor("two", two.source(second)).unwrap();
            let (fixture, one, tried, ended) = (&fixture, &one, &tried, &ended);
            threads.spawn(move || {
                fixture.gpu.enter();
                let refused = fixture.executor.scope(Fence::host(), |scope| {
                    let saved = scope.save(1, state);
                    tried.store(true, std::sync::atomic::Ordering::Release);
                    saved
                });
                assert_eq!(refused.unwrap().unwrap_err().kind(), ErrorKind::Invalid);
                assert_eq!(Arc::strong_count(&one.0), 1, "still to be read");
                ended.store(true, std::sync::atomic::Ordering::Release);
            });
            eventually("the save was refused", || tried.load(std::sync::atomic::Ordering::Acquire));
            // Time for a scope that does not wait to end.
            std::thread::sleep(std::time::Duration::from_millis(30));
        });
        assert!(!ended.load(std::sync::atomic::Ordering::Acquire));
        fake.set("hold", 0);
    });
    fixture.executor.save(1, at_fence(one.source(first))).unwrap().wait(LONG).unwrap();
}

/// Each of the two fits the capture pool, both do not: waiting for memory would never end.
#[test]
fn cuda_captures_that_never_fit_together_are_refused_for_good() {
    let fixture = fixture(|b| b.gather(16 << 10).detect(Detect::Never));
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 10_000)));
    let mut state = StateDict::new();
    for name in ["a", "b"] {
        state.tensor_captured(name, tensor.source(stream), Capture::AtSave).unwrap();
    }
    let error = fixture.executor.save(1, state).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
}

/// A tensor whose source panics when it is asked for its address.
struct Broken(DeviceStream<'static>);

#[expect(unsafe_code, reason = "a source that breaks its promise")]
// SAFETY: no pointer is handed out.
unsafe impl Source for Broken {
    fn layout(&self) -> Layout {
        Layout::new(Dtype::U8, [3000])
    }

    fn location(&self) -> MemoryLocation {
        MemoryLocation::Device { bytes: 3000, stream: self.0 }
    }

    fn read(&self, _: &mut dyn FnMut(*const u8)) {
        panic!("on purpose");
    }
}

/// The panic unwound through `save`, and dropped memory that the kernels of other streams still read.
#[test]
fn cuda_source_that_panics_at_save_frees_nothing_that_a_kernel_still_reads() {
    const KERNELS: u64 = 8;
    let fixture = fixture(|b| b);
    let Some(fake) = fixture.gpu.fake() else { return };
    let (first, second) = (fixture.gpu.stream(), fixture.gpu.stream());
    let tensor = fixture.gpu.tensor(&pattern(1, 3000));
    fake.set("hold", KERNELS);
    let mut state = StateDict::new();
    state.tensor("one", tensor.source(first)).unwrap();
    state.tensor("two", Broken(second.0)).unwrap();
    assert_eq!(fixture.executor.save(1, state).unwrap_err().kind(), ErrorKind::Internal);
    assert_eq!(Arc::strong_count(&tensor.0), 2, "the GPU has not read it yet");
    fake.set("hold", 0);
    eventually("the source is dropped", || Arc::strong_count(&tensor.0) == 1);
    fixture.executor.save(1, at_fence(tensor.source(first))).unwrap().wait(LONG).unwrap();
}

/// A driver error while tensors were captured lost their allocation of the capture pool for good.
#[test]
fn cuda_room_comes_back_after_a_capture_that_the_driver_refused() {
    let fixture = fixture(|b| b.gather(64 << 10).detect(Detect::Never));
    let Some(fake) = fixture.gpu.fake() else { return };
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 30_000)));
    let state = || {
        let mut state = StateDict::new();
        state.tensor_captured("t", tensor.source(stream), Capture::AtSave).unwrap();
        state
    };
    for step in 1..=5 {
        fake.fault("cuLaunchKernel:1:1");
        let error = fixture.executor.save(step, state()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Device, "{error}");
        eventually("the source is dropped", || Arc::strong_count(&tensor.0) == 1);
    }
    fixture.executor.save(6, state()).unwrap().wait(LONG).unwrap();
    assert_eq!(fixture.checkpoint(6).unwrap().read("t").unwrap(), pattern(1, 30_000));
}
