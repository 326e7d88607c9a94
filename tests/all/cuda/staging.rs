//! Copies from GPUs: which bytes arrive, in which order, and when memory may be written again.

use super::program::{COPIES, Fixture, Gpu, Stream, Tensor, at_fence, fixture, real, rig_on};
use crate::fixtures::executor::{Buffer, LONG, one, pattern};
use ashore::compat::torch::{AsyncCheckpointExecutor, ExecuteOptions, ThreadExecutor};
use ashore::{Capture, DeviceStream, ErrorKind, Fence, Save, StateDict};
use std::sync::Arc;
use std::time::Duration;

/// Lags that are long compared to the host's work in between.
fn slow(gpu: &Gpu) {
    gpu.set("lag_us", 300);
}

#[test]
fn cuda_tensors_come_back_bit_for_bit_beside_those_of_the_host() {
    let fixture = fixture(|b| b.files(2));
    assert!(fixture.executor.arena().report().pinned.is_ok());
    assert!(fixture.executor.device().name.starts_with("cuda:"));
    let streams = [fixture.gpu.stream(), fixture.gpu.stream()];
    let sizes = [0, 1, 3, 100, 4095, 4096, 4097, 20_000, 70_000];
    let tensors: Vec<_> = sizes.iter().map(|&n| fixture.gpu.tensor(&pattern(n as u64, n))).collect();
    let raw = Buffer::new(pattern(7, 6000));
    let mut state = StateDict::new();
    for (i, tensor) in tensors.iter().enumerate() {
        state.tensor(format!("gpu.{i}"), tensor.source(streams[i % 2])).unwrap();
        state.tensor(format!("host.{i}"), Arc::new(pattern(i as u64, 3000))).unwrap();
    }
    state.tensor("raw", raw.source()).unwrap();
    let save = fixture.executor.save(1, state).unwrap();
    fixture.executor.fence().unwrap();
    save.wait(LONG).unwrap();
    let checkpoint = fixture.checkpoint(1).unwrap();
    checkpoint.verify().unwrap();
    for (i, &n) in sizes.iter().enumerate() {
        assert_eq!(checkpoint.read(&format!("gpu.{i}")).unwrap(), pattern(n as u64, n));
        assert_eq!(checkpoint.read(&format!("host.{i}")).unwrap(), pattern(i as u64, 3000));
    }
    assert_eq!(checkpoint.read("raw").unwrap(), pattern(7, 6000));
}

#[test]
fn cuda_copies_wait_for_what_every_producer_had_queued() {
    let fixture = fixture(|b| b);
    slow(&fixture.gpu);
    let streams: Vec<_> = (0..3).map(|_| fixture.gpu.stream()).collect();
    let tensors: Vec<_> = (0..3).map(|_| fixture.gpu.tensor(&[0; 9000])).collect();
    for step in 1..=20 {
        let mut state = StateDict::new();
        for (i, (stream, tensor)) in streams.iter().zip(&tensors).enumerate() {
            stream.fill(tensor, 0xEE);
            stream.fill(tensor, step as u8);
            state.tensor(i.to_string(), tensor.source(*stream)).unwrap();
        }
        let save = fixture.executor.save(step, state).unwrap();
        fixture.executor.fence().unwrap();
        save.wait(LONG).unwrap();
        for i in 0..3 {
            assert_eq!(fixture.checkpoint(step).unwrap().read(&i.to_string()).unwrap(), [step as u8; 9000]);
        }
    }
}

/// Saves tensors that two streams write again as soon as `fence` has returned; the save must have the bytes
/// from before.
pub fn write_right_after(fixture: &Fixture, fence: impl Fn(&[DeviceStream])) {
    let (producer, writer) = (fixture.gpu.stream(), fixture.gpu.stream());
    let tensors = [5000, 9000, 100].map(|n| fixture.gpu.tensor(&vec![0; n]));
    for step in 1..=20_u64 {
        let mut state = StateDict::new();
        for (i, tensor) in tensors.iter().enumerate() {
            producer.fill(tensor, step as u8);
            state.tensor_captured(i.to_string(), tensor.source(producer), Capture::AtFence).unwrap();
        }
        let save = fixture.executor.save(step, state).unwrap();
        fence(&[writer.0, producer.0]);
        for tensor in &tensors {
            writer.fill(tensor, 0xEE);
            producer.fill(tensor, 0xDD);
        }
        save.wait(LONG).unwrap();
        writer.wait();
        for (i, tensor) in tensors.iter().enumerate() {
            let read = fixture.checkpoint(step).unwrap().read(&i.to_string()).unwrap();
            assert_eq!(read, vec![step as u8; tensor.0.len], "step {step} tensor {i}");
        }
    }
}

#[test]
fn cuda_streams_that_write_after_a_fence_wait_on_the_gpu() {
    for host in [true, false] {
        let fixture = fixture(|b| b);
        slow(&fixture.gpu);
        write_right_after(&fixture, |streams| {
            if host { fixture.executor.fence() } else { fixture.executor.fence_on(streams) }.unwrap();
        });
    }
}

#[test]
fn cuda_saves_follow_each_other_while_the_host_runs_ahead() {
    let fixture = fixture(|b| b.overlap(ashore::Overlap::Queue(8)).arena(64 * 4096));
    slow(&fixture.gpu);
    let stream = fixture.gpu.stream();
    let tensor = fixture.gpu.tensor(&[0; 9000]);
    let saves: Vec<_> = (1..=8_u64)
        .map(|step| {
            stream.fill(&tensor, step as u8);
            let save = fixture.executor.save(step, at_fence(tensor.source(stream))).unwrap();
            fixture.executor.fence_on(&[stream.0]).unwrap();
            save
        })
        .collect();
    for (save, step) in saves.into_iter().zip(1_u64..) {
        save.wait(LONG).unwrap();
        assert_eq!(fixture.checkpoint(step).unwrap().read("t").unwrap(), [step as u8; 9000]);
    }
}

#[test]
fn cuda_memory_is_given_back_when_its_copies_have_ended_and_not_before() {
    let fixture = fixture(|b| b);
    slow(&fixture.gpu);
    fixture.gpu.set("reuse", 1);
    let (stream, other) = (fixture.gpu.stream(), fixture.gpu.stream());
    for step in 1..=20_u64 {
        let tensor = stream.tensor(9000);
        stream.fill(&tensor, step as u8);
        let save = fixture.executor.save(step, at_fence(tensor.source(stream))).unwrap();
        fixture.executor.fence_on(&[stream.0]).unwrap();
        drop(tensor);
        // The next owner of the memory writes it at once.
        let next = other.tensor(9000);
        other.fill(&next, 0xEE);
        save.wait(LONG).unwrap();
        assert_eq!(fixture.checkpoint(step).unwrap().read("t").unwrap(), [step as u8; 9000]);
    }
}

#[test]
fn cuda_memory_that_is_borrowed_may_be_written_and_freed_right_after_the_scope() {
    let fixture = fixture(|b| b);
    slow(&fixture.gpu);
    fixture.gpu.set("reuse", 1);
    let (stream, other) = (fixture.gpu.stream(), fixture.gpu.stream());
    for step in 1..=20_u64 {
        let tensor = stream.tensor(9000);
        stream.fill(&tensor, step as u8);
        let save = fixture.executor.scope(Fence::on(&[stream.0]), |scope| {
            let mut state = StateDict::new();
            state.tensor("t", tensor.lent(stream)).unwrap();
            scope.save(step, state)
        });
        stream.fill(&tensor, 0xEE);
        drop(tensor);
        let next = other.tensor(9000);
        other.fill(&next, 0xDD);
        save.unwrap().unwrap().wait(LONG).unwrap();
        assert_eq!(fixture.checkpoint(step).unwrap().read("t").unwrap(), [step as u8; 9000]);
    }
}

#[test]
fn cuda_tensors_of_several_devices_go_into_one_save() {
    let (fixture, second) = (fixture(|b| b), Gpu::take());
    if second.ordinal == fixture.gpu.ordinal {
        return;
    }
    slow(&second);
    let (mine, theirs) = (fixture.gpu.stream(), second.stream());
    let (near, far) = (fixture.gpu.tensor(&[1; 9000]), second.tensor(&[0; 9000]));
    second.enter();
    theirs.fill(&far, 2);
    let mut state = StateDict::new();
    state.tensor("near", near.source(mine)).unwrap().tensor("far", far.source(theirs)).unwrap();
    let save = fixture.executor.save(1, state).unwrap();
    fixture.executor.fence_on(&[mine.0, theirs.0]).unwrap();
    theirs.fill(&far, 0xEE);
    fixture.gpu.enter();
    mine.fill(&near, 0xEE);
    save.wait(LONG).unwrap();
    assert_eq!(fixture.checkpoint(1).unwrap().read("near").unwrap(), [1; 9000]);
    assert_eq!(fixture.checkpoint(1).unwrap().read("far").unwrap(), [2; 9000]);
}

/// A fence on a stream that is being captured is refused, unless a real GPU has staged the save by now: then
/// no stream has to wait.
pub fn refused_or_staged(save: &Save, fenced: ashore::Result<()>) {
    match fenced {
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
            assert!(error.to_string().contains("captured"), "{error}");
        }
        Ok(()) => assert!(real() && save.staged().wait(Duration::ZERO).is_ok()),
    }
}

#[test]
fn cuda_capture_of_a_graph_is_refused_and_not_broken() {
    let fixture = fixture(|b| b);
    let (stream, captured) = (fixture.gpu.stream(), fixture.gpu.stream());
    let tensor = fixture.gpu.tensor(&[5; 4000]);
    fixture.gpu.set("hold", COPIES);
    let save = fixture.executor.save(1, at_fence(tensor.source(stream))).unwrap();
    fixture.executor.fence_on(&[stream.0]).unwrap();
    captured.capture(|| {
        let error = fixture.executor.save(2, one("t", tensor.source(captured))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains("captured"), "{error}");
        refused_or_staged(&save, fixture.executor.fence_on(&[captured.0]));
        fixture.gpu.set("hold", 0);
        // The stager asks for its events meanwhile.
        save.wait(LONG).unwrap();
    });
    fixture.executor.fence().unwrap();
    assert_eq!(fixture.checkpoint(1).unwrap().read("t").unwrap(), [5; 4000]);
}

#[test]
fn cuda_arena_that_cannot_be_pinned_is_reported_and_works() {
    let gpu = Gpu::take();
    let Some(fake) = gpu.fake() else { return };
    fake.fault("cuMemHostRegister_v2:0:2");
    let fixture = rig_on(gpu, |b| b);
    assert_eq!(fixture.executor.arena().report().slabs, 4);
    let why = fixture.executor.arena().report().pinned.clone().unwrap_err();
    assert!(why.contains("cuMemHostRegister_v2"), "{why}");
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(3, 30_000)));
    fixture.executor.save(1, at_fence(tensor.source(stream))).unwrap().wait(LONG).unwrap();
    assert_eq!(fixture.checkpoint(1).unwrap().read("t").unwrap(), pattern(3, 30_000));
}

#[test]
fn cuda_arena_of_which_only_a_part_can_be_pinned_is_smaller() {
    for (refused, slabs) in [(1, 8), (2, 4)] {
        let gpu = Gpu::take();
        let Some(fake) = gpu.fake() else { return };
        (1..=refused).for_each(|nth| fake.fault(&format!("cuMemHostRegister_v2:{nth}:2")));
        let fixture = rig_on(gpu, |b| b.arena(16 * 4096));
        let report = fixture.executor.arena().report().clone();
        assert_eq!((report.slabs, report.bytes, report.pinned), (slabs, slabs as u64 * 4096, Ok(())));
        let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(3, 90_000)));
        fixture.executor.save(1, at_fence(tensor.source(stream))).unwrap().wait(LONG).unwrap();
        assert_eq!(fixture.checkpoint(1).unwrap().read("t").unwrap(), pattern(3, 90_000));
    }
}

#[test]
fn cuda_tensors_are_refused_by_an_executor_on_the_host() {
    let host = crate::fixtures::executor::fixture(|b| b);
    let gpu = Gpu::take();
    let (stream, tensor) = (gpu.stream(), gpu.tensor(&[1; 100]));
    let error = host.executor.save(1, at_fence(tensor.source(stream))).unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Invalid, Some(1)));
    assert!(error.to_string().contains("cuda:"), "{error}");
}

#[test]
fn cuda_tensors_written_without_any_fence_are_not_followed_by_a_save() {
    let fixture = fixture(|b| b);
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&[1; 9000]));
    fixture.gpu.set("hold", COPIES);
    let save = fixture.executor.save(1, at_fence(tensor.source(stream))).unwrap();
    let error = fixture.executor.save(2, at_fence(tensor.source(stream))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
    fixture.gpu.set("hold", 0);
    fixture.executor.fence_on(&[stream.0]).unwrap();
    let second = fixture.executor.save(2, at_fence(tensor.source(stream))).unwrap();
    save.wait(LONG).unwrap();
    second.wait(LONG).unwrap();
}

#[test]
fn cuda_executor_gives_back_all_that_it_took_but_the_context() {
    let gpu = Gpu::take();
    let Some(fake) = gpu.fake() else { return };
    let (stream, tensor) = (gpu.stream(), gpu.tensor(&[1; 30_000]));
    let before = fake.live();
    let device = gpu.device();
    let Fixture { executor, gpu, .. } = rig_on(gpu, |b| b.made_device(device));
    assert_ne!(gpu.fake().unwrap().live(), before);
    for step in 1..5 {
        executor.save(step, at_fence(tensor.source(stream))).unwrap().wait(LONG).unwrap();
    }
    executor.shutdown(LONG).unwrap();
    drop(executor);
    let _: (&Tensor, &Stream) = (&tensor, &stream);
    assert_eq!(gpu.fake().unwrap().live(), before);
}

#[test]
fn cuda_tensors_are_not_quietly_captured_at_the_fence_when_they_were_to_be_at_save() {
    let fixture = fixture(|b| b.gather(0));
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 100)));
    let mut state = StateDict::new();
    state.tensor_captured("t", tensor.source(stream), Capture::AtSave).unwrap();
    let error = fixture.executor.save(1, state).unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Invalid, Some(1)));
    assert!(error.to_string().contains("tensor=\"t\"") && error.to_string().contains("at save"), "{error}");
    assert_eq!(Arc::strong_count(&tensor.0), 1);
    fixture.executor.save(1, at_fence(tensor.source(stream))).unwrap().wait(LONG).unwrap();
}

/// A retry must find the same state, but a stream may write device memory without asking.
#[test]
fn cuda_tensors_are_not_kept_for_a_second_try() {
    let Fixture { executor, gpu, .. } = fixture(|b| b);
    let (stream, tensor) = (gpu.stream(), gpu.tensor(&pattern(1, 100)));
    let executor = ThreadExecutor::new(Arc::new(executor)).unwrap().retry(1);
    let options = ExecuteOptions::new().checkpoint_id("step-00000001");
    let error = executor.execute_save(at_fence(tensor.source(stream)).into(), options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.to_string().contains("tensor=\"t\""), "{error}");
}

/// The stager drops the owners of tensors, which may leave it without a current context.
#[test]
fn cuda_saves_go_on_after_a_source_has_taken_the_context_away() {
    struct Rude;
    impl Drop for Rude {
        fn drop(&mut self) {
            Gpu::leave();
        }
    }
    let fixture = fixture(|b| b);
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 30_000)));
    for step in 1..10 {
        let mut state = at_fence(tensor.source(stream));
        for name in ["a", "b"] {
            state.tensor_captured(name, tensor.kept_by(stream, (tensor.clone(), Rude)), Capture::AtFence).unwrap();
        }
        fixture.executor.save(step, state).unwrap().wait(LONG).unwrap();
        assert_eq!(fixture.checkpoint(step).unwrap().read("t").unwrap(), pattern(1, 30_000));
    }
}
