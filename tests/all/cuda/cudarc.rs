//! Tensors of cudarc are sources and targets. Each test runs in a process whose loader finds the driver, as
//! cudarc looks for it.

use super::loader::with_driver;
use super::program::{Fixture, Gpu, fixture};
use crate::fixtures::executor::{LONG, eventually};
use crate::fixtures::log::LogLines;
use ashore::adapters::cudarc::{CudaTarget, CudaTensor};
use ashore::{Capture, Dtype, ErrorKind, Fence, Source, StateDict, Targets};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream};
use half::bf16;
use std::sync::Arc;
use std::time::Duration;

/// An executor, and cudarc on the same device, with a stream of its own.
fn both() -> (Fixture, Arc<CudaContext>, Arc<CudaStream>) {
    // Nothing is captured at save: these tests are about memory that is read until the fence.
    let fixture = fixture(|b| b.gather(0));
    let context = CudaContext::new(fixture.gpu.ordinal as usize).unwrap();
    let stream = context.new_stream().unwrap();
    (fixture, context, stream)
}

/// Lags that are long compared to the host's work in between.
fn slow(gpu: &Gpu) {
    gpu.set("lag_us", 300);
}

/// A state of one tensor, `t`, which the save reads at the fence and not before.
fn one<'a>(source: impl Source + 'a) -> StateDict<'a> {
    let mut state = StateDict::new();
    state.tensor_captured("t", source, Capture::AtFence).unwrap();
    state
}

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| i as f32 / 3.0).collect()
}

#[test]
fn cuda_slices_of_cudarc_come_back_bit_for_bit() {
    with_driver!(cuda_slices_of_cudarc_come_back_bit_for_bit);
    let (fixture, context, stream) = both();
    let halves: Vec<_> = (0..5000).map(|i| bf16::from_f32(i as f32)).collect();
    let shared = Arc::new(stream.clone_htod(&numbers(6000)).unwrap());
    let (pairs, bytes) = (stream.clone_htod(&[1_i64, -2]).unwrap(), stream.clone_htod(&[7_u8; 4]).unwrap());
    let (tail, default) = (stream.clone_htod(&halves).unwrap(), context.default_stream());
    let pool = Arc::new(stream.clone_htod(bytemuck::cast_slice::<f32, u8>(&numbers(100))).unwrap());
    let empty = default.clone_htod(&[0.5_f64; 100]).unwrap();
    let save = fixture.executor.scope(Fence::on(&[(&stream).into()]), |scope| {
        let mut state = StateDict::new();
        state.tensor("shared", CudaTensor::new(shared.clone(), [20, 300]).unwrap()).unwrap();
        state.tensor("part", CudaTensor::part(shared.clone(), 1000..1006, [2, 3]).unwrap()).unwrap();
        let pooled = CudaTensor::part_with_dtype(pool.clone(), Dtype::F32, 40..80, [5, 2]).unwrap();
        state.tensor("pooled", pooled).unwrap();
        state.tensor("lent", CudaTensor::new(&pairs, [2]).unwrap()).unwrap();
        state.tensor("given", CudaTensor::with_dtype(bytes, Dtype::F8_E4M3, [2, 2]).unwrap()).unwrap();
        state.tensor("view", CudaTensor::new(tail.slice(4000..), [1000]).unwrap()).unwrap();
        state.tensor("view.part", CudaTensor::part(tail.slice(10..20), 3..5, [2]).unwrap()).unwrap();
        state.tensor("default stream", CudaTensor::new(&empty, [100]).unwrap()).unwrap();
        scope.save(1, state)
    });
    save.unwrap().unwrap().wait(LONG).unwrap();
    let checkpoint = fixture.checkpoint(1).unwrap();
    assert_eq!(checkpoint.read_as::<f32>("shared").unwrap(), numbers(6000));
    assert_eq!(checkpoint.read_as::<f32>("part").unwrap(), numbers(6000)[1000..1006]);
    assert_eq!(checkpoint.read_as::<f32>("pooled").unwrap(), numbers(100)[10..20]);
    assert_eq!(checkpoint.read_as::<i64>("lent").unwrap(), [1, -2]);
    assert_eq!(checkpoint.read("given").unwrap(), [7; 4]);
    assert_eq!(checkpoint.read_as::<bf16>("view").unwrap(), halves[4000..]);
    assert_eq!(checkpoint.read_as::<bf16>("view.part").unwrap(), halves[13..15]);
    assert_eq!(checkpoint.read_as::<f64>("default stream").unwrap(), [0.5; 100]);
    assert_eq!(checkpoint.tensors().unwrap().find(|t| t.name == "shared").unwrap().shape, [20, 300]);
}

#[test]
fn cuda_slices_that_another_stream_of_cudarc_wrote_are_read_after_that() {
    with_driver!(cuda_slices_that_another_stream_of_cudarc_wrote_are_read_after_that);
    let (fixture, context, stream) = both();
    slow(&fixture.gpu);
    let writer = context.new_stream().unwrap();
    let mut slice = Arc::new(stream.alloc_zeros::<u8>(9000).unwrap());
    for step in 1..=20_u64 {
        let next = writer.clone_htod(&[step as u8; 9000]).unwrap();
        writer.memcpy_dtod(&next, Arc::get_mut(&mut slice).unwrap()).unwrap();
        let tensor = CudaTensor::new(slice.clone(), [9000]).unwrap();
        let save = fixture.executor.save(step, one(tensor)).unwrap();
        fixture.executor.fence().unwrap();
        save.wait(LONG).unwrap();
        assert_eq!(fixture.checkpoint(step).unwrap().read("t").unwrap(), [step as u8; 9000]);
    }
}

#[test]
fn cuda_slices_that_are_shared_cannot_be_written_before_their_copies_have_ended() {
    with_driver!(cuda_slices_that_are_shared_cannot_be_written_before_their_copies_have_ended);
    let (fixture, _context, stream) = both();
    let Some(fake) = fixture.gpu.fake() else { return };
    let to_host = 1;
    let mut slice = Arc::new(stream.clone_htod(&[5_u8; 9000]).unwrap());
    fake.set("hold", to_host);
    let save = fixture.executor.save(1, one(CudaTensor::new(slice.clone(), [9000]).unwrap())).unwrap();
    fixture.executor.fence_on(&[stream.as_ref().into()]).unwrap();
    assert!(Arc::get_mut(&mut slice).is_none());
    fake.set("hold", 0);
    fixture.executor.fence().unwrap();
    assert!(Arc::get_mut(&mut slice).is_some());
    // The program drops its own reference first: the stager drops the last one.
    fake.set("hold", to_host);
    let second = fixture.executor.save(2, one(CudaTensor::new(slice.clone(), [9000]).unwrap())).unwrap();
    drop(slice);
    let held = fake.live();
    fake.set("hold", 0);
    fixture.executor.fence().unwrap();
    for (step, save) in [(1, save), (2, second)] {
        save.wait(LONG).unwrap();
        assert_eq!(fixture.checkpoint(step).unwrap().read("t").unwrap(), [5; 9000]);
    }
    stream.synchronize().unwrap();
    assert!(held.bytes >= fake.live().bytes + 9000, "{held:?} {:?}", fake.live());
}

#[test]
fn cuda_streams_of_cudarc_that_write_after_a_scope_wait_though_the_fence_did_not_name_them() {
    with_driver!(cuda_streams_of_cudarc_that_write_after_a_scope_wait_though_the_fence_did_not_name_them);
    let (fixture, context, stream) = both();
    slow(&fixture.gpu);
    fixture.gpu.set("reuse", 1);
    let writer = context.new_stream().unwrap();
    for step in 1..=20_u64 {
        let mut slice: CudaSlice<u8> = stream.alloc_zeros(13_000).unwrap();
        stream.memcpy_htod(&[step as u8; 13_000], &mut slice).unwrap();
        let save = fixture
            .executor
            .scope(Fence::on(&[]), |scope| scope.save(step, one(CudaTensor::new(&slice, [13_000]).unwrap())));
        if step % 2 == 0 {
            writer.memset_zeros(&mut slice).unwrap();
        } else {
            // The next owner of the memory writes it at once.
            drop(slice);
            let mut next: CudaSlice<u8> = stream.alloc_zeros(13_000).unwrap();
            writer.memset_zeros(&mut next).unwrap();
        }
        save.unwrap().unwrap().wait(LONG).unwrap();
        assert_eq!(fixture.checkpoint(step).unwrap().read("t").unwrap(), [step as u8; 13_000]);
    }
}

/// A scope made the stream of a slice wait that it owned and had already dropped: the driver takes such a
/// handle for an address. The scope makes the streams of its tensors wait at its end.
#[test]
fn cuda_streams_of_cudarc_live_until_the_scope_ends_that_makes_them_wait() {
    with_driver!(cuda_streams_of_cudarc_live_until_the_scope_ends_that_makes_them_wait);
    let (fixture, context, _) = both();
    let stream = context.new_stream().unwrap();
    let (slice, lives) = (stream.clone_htod(&[1_u8; 9000]).unwrap(), Arc::downgrade(&stream));
    drop(stream);
    let ended = fixture.executor.scope(Fence::on(&[]), |scope| {
        let save = scope.save(1, one(CudaTensor::new(slice, [9000]).unwrap())).unwrap();
        save.wait(LONG).unwrap();
        assert!(lives.upgrade().is_some(), "the stream went with the slice");
    });
    ended.unwrap();
    assert!(lives.upgrade().is_none(), "the scope holds on to the stream");
}

/// Restores into slices needed unsafe code, with an address that the program had to keep right.
#[test]
fn cuda_slices_of_cudarc_are_restored_into() {
    with_driver!(cuda_slices_of_cudarc_are_restored_into);
    let (fixture, context, stream) = both();
    slow(&fixture.gpu);
    let (whole, part) = (numbers(6000), numbers(100));
    let mut state = StateDict::new();
    state.tensor("whole", Arc::new(whole.clone())).unwrap().tensor("part", Arc::new(part.clone())).unwrap();
    fixture.executor.save(1, state).unwrap().wait(LONG).unwrap();
    let checkpoint = fixture.executor.checkpoint(1).unwrap();
    let (mut one, mut other) = (stream.alloc_zeros::<f32>(6000).unwrap(), stream.alloc_zeros::<f32>(300).unwrap());
    // Another stream's work on it comes first.
    context.new_stream().unwrap().memset_zeros(&mut one).unwrap();
    let mut view = other.slice_mut(100..200);
    let targets = Targets::new().device("whole", CudaTarget::new(&mut one).unwrap());
    checkpoint.read_into(targets.device("part", CudaTarget::new(&mut view).unwrap()).strict()).unwrap();
    assert_eq!(stream.clone_dtoh(&one).unwrap(), whole);
    assert_eq!(stream.clone_dtoh(&other).unwrap(), [vec![0.0; 100], part, vec![0.0; 100]].concat());

    let mut integers = stream.alloc_zeros::<i32>(100).unwrap();
    let targets = Targets::new().device("part", CudaTarget::new(&mut integers).unwrap());
    let error = checkpoint.read_into(targets).unwrap_err();
    assert!(error.kind() == ErrorKind::Invalid && error.message().contains("I32"), "{error}");
    let mut each = context.per_thread_stream().alloc_zeros::<u8>(10).unwrap();
    assert_eq!(CudaTarget::new(&mut each).unwrap_err().kind(), ErrorKind::Invalid);
}

/// Memory that a restore borrows may be freed as soon as the call has returned, `Deadline` or not.
#[test]
fn cuda_restore_into_a_borrowed_slice_returns_when_nothing_writes_there_any_more() {
    const TO_DEVICE: u64 = 2;
    with_driver!(cuda_restore_into_a_borrowed_slice_returns_when_nothing_writes_there_any_more);
    let (fixture, _context, stream) = both();
    let Some(fake) = fixture.gpu.fake() else { return };
    let heard = LogLines::default();
    tracing::subscriber::set_global_default(heard.clone()).unwrap();
    fixture.executor.save(1, one(Arc::new(numbers(6000)))).unwrap().wait(LONG).unwrap();
    let checkpoint = fixture.executor.checkpoint(1).unwrap().with_timeout(Duration::from_millis(10));
    let mut slice = stream.alloc_zeros::<f32>(6000).unwrap();
    stream.synchronize().unwrap();
    fake.set("hold", TO_DEVICE);
    std::thread::scope(|scope| {
        let restore = scope.spawn(|| {
            let target = CudaTarget::new(&mut slice).unwrap();
            checkpoint.read_into(Targets::new().device("t", target))
        });
        let said = || heard.0.lock().unwrap().iter().any(|line| line.contains("copies to borrowed device memory"));
        eventually("its patience is over", said);
        assert!(!restore.is_finished(), "it has returned while copies write to what it had borrowed");
        fake.set("hold", 0);
        assert_eq!(restore.join().unwrap().unwrap_err().kind(), ErrorKind::Deadline);
    });
    assert_eq!(stream.clone_dtoh(&slice).unwrap(), numbers(6000));
    drop(slice);
    assert_eq!(fake.sticky(), 0);
}

#[test]
fn cuda_slices_that_cannot_be_read_are_refused() {
    with_driver!(cuda_slices_that_cannot_be_read_are_refused);
    let (fixture, context, stream) = both();
    let refused = |result: Result<CudaTensor<CudaSlice<u8>>, ashore::Error>, what: &str| {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.to_string().contains(what), "{error}");
    };
    let slice = || stream.alloc_zeros::<u8>(10).unwrap();
    refused(CudaTensor::part(slice(), 8..11, [3]), "part=8..11 elements=10");
    #[expect(clippy::reversed_empty_ranges, reason = "a caller's mistake")]
    refused(CudaTensor::part(slice(), 3..2, [0]), "part=3..2");
    let each = context.per_thread_stream();
    refused(CudaTensor::new(each.alloc_zeros::<u8>(10).unwrap(), [10]), "in the per-thread default stream");
    let error = StateDict::new().tensor("t", CudaTensor::new(slice(), [11]).unwrap()).err().unwrap();
    assert!(error.to_string().contains("expected_bytes=11 found_bytes=10"), "{error}");

    #[expect(unsafe_code, reason = "a context that cudarc believes to be none of the primary ones")]
    // SAFETY: the context is alive, and forgotten below, so that no drop destroys it.
    let own = unsafe { CudaContext::from_raw_context(context.ordinal(), context.cu_device(), context.cu_ctx()) };
    let own = own.unwrap();
    refused(CudaTensor::new(own.default_stream().alloc_zeros::<u8>(10).unwrap(), [10]), "not of a primary context");
    std::mem::forget(own);

    let Some(fake) = fixture.gpu.fake() else { return };
    fake.fault("cuStreamWaitEvent:1:2");
    let error = CudaTensor::new(slice(), [10]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Device);
    assert!(error.to_string().contains("CUDA_ERROR_OUT_OF_MEMORY"), "{error}");
}
