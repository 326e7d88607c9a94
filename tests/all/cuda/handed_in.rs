//! The program provides the memory for late copies.

use super::program::{COPIES, Gpu, at_fence, rig_on};
use crate::fixtures::executor::{LONG, eventually, pattern};
use ashore::{CheckpointExecutor, DeviceChoice, ErrorKind};
use std::sync::Arc;
use std::time::Duration;

const KERNELS: u64 = 8;

/// Nine chunks: as many as the state has.
const BYTES: usize = 9 * 4096;

#[test]
fn cuda_memory_that_was_handed_in_takes_what_is_set_aside_and_is_let_go_at_the_end() {
    let gpu = Gpu::take();
    let before = gpu.fake().map(|fake| (fake.live().bytes, fake.live().blocks));
    let scratch = gpu.tensor(&[0; BYTES]);
    let ordinal = gpu.ordinal;
    let fixture = rig_on(gpu, |b| scratch.scratch_of(b, ordinal, BYTES as u64));
    assert_eq!((fixture.executor.device().scratch.clone(), fixture.executor.settings().scratch), (Ok(9), BYTES as u64));
    assert_eq!(Arc::strong_count(&scratch.0), 2);
    let (stream, bytes) = (fixture.gpu.stream(), pattern(1, 30_000));
    let tensor = fixture.gpu.tensor(&bytes);
    fixture.gpu.set("hold", COPIES);
    let save = fixture.executor.save(1, at_fence(tensor.source(stream))).unwrap();
    fixture.executor.fence_on(&[stream.0]).unwrap();
    stream.fill(&tensor, 0xEE);
    // Nothing had left the GPU when its kernels ran.
    stream.wait();
    fixture.gpu.set("hold", 0);
    save.wait(LONG).unwrap();
    assert_eq!(fixture.checkpoint(1).unwrap().read("t").unwrap(), bytes);
    if fixture.gpu.fake().is_some() {
        // Some slot holds the last chunk, byte for byte.
        let last = &bytes[bytes.len() - 1000..];
        assert!(scratch.read().windows(last.len()).any(|found| found == last));
    }
    let (executor, gpu) = (fixture.executor, fixture.gpu);
    executor.shutdown(LONG).unwrap();
    drop(executor);
    eventually("the memory is released", || Arc::strong_count(&scratch.0) == 1);
    drop((scratch, tensor));
    // The kernels' other memory is freed right after it, in the thread that drops the last reference.
    eventually("all is given back", || gpu.fake().map(|fake| (fake.live().bytes, fake.live().blocks)) == before);
}

#[test]
fn cuda_memory_that_was_handed_in_is_kept_until_no_kernel_will_write_it() {
    let gpu = Gpu::take();
    if gpu.fake().is_none() {
        return;
    }
    let (scratch, ordinal) = (gpu.tensor(&[0; BYTES]), gpu.ordinal);
    let patience = Duration::from_millis(20);
    let fixture = rig_on(gpu, |b| scratch.scratch_of(b, ordinal, BYTES as u64).shutdown_timeout(patience));
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 30_000)));
    fixture.gpu.set("hold", COPIES | KERNELS);
    let save = fixture.executor.save(1, at_fence(tensor.source(stream))).unwrap();
    fixture.executor.fence_on(&[stream.0]).unwrap();
    let (executor, gpu) = (fixture.executor, fixture.gpu);
    std::thread::scope(|threads| {
        let end = threads.spawn(|| drop(executor));
        save.wait(LONG).unwrap_err();
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(Arc::strong_count(&scratch.0), 2);
        gpu.set("hold", 0);
        end.join().unwrap();
    });
    eventually("the memory is released", || Arc::strong_count(&scratch.0) == 1);
    assert_eq!(gpu.fake().map(|fake| fake.sticky()), Some(0));
}

#[test]
fn cuda_memory_that_cannot_be_the_scratch_is_refused_by_name() {
    let gpu = Gpu::take();
    let (scratch, ordinal) = (gpu.tensor(&[0; BYTES]), gpu.ordinal);
    let builder = || CheckpointExecutor::builder("none").arena(4 * 4096).chunk(4096);
    let on_gpu = || builder().made_device(gpu.device());
    for (builder, named) in [
        (scratch.scratch_of(on_gpu(), ordinal + 1, BYTES as u64), "memory=cuda:"),
        (scratch.scratch_of(builder().device(DeviceChoice::Host), ordinal, BYTES as u64), "device=host"),
        (scratch.scratch_of(on_gpu(), ordinal, 4095), "scratch=4095"),
        (scratch.scratch_of(on_gpu(), ordinal, 0), "scratch=0"),
    ] {
        let error = builder.storage(Arc::new(ashore::storage::Memory::new())).build().unwrap_err();
        assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains(named), "{error}");
        assert!(error.to_string().contains("scratch"), "{error}");
    }
    assert_eq!(Arc::strong_count(&scratch.0), 1);
}
