//! The driver fails: each call once in turn, at once and later; contexts are lost; work never ends.

use super::program::{COPIES, Gpu, Stream, Tensor, at_fence, fixture};
use crate::fixtures::executor::{LONG, eventually, one, pattern};
use ashore::id::step_name;
use ashore::storage::{Memory, Storage};
use ashore::{
    Builder, Capture, Checkpoint, CheckpointExecutor, Detect, ErrorKind, Fence, RawDevice, Source, StateDict,
};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// The driver calls that ashore makes while it lives; the last of them release resources.
const CALLS: [&str; 35] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
    "cuDeviceGetPCIBusId",
    "cuDevicePrimaryCtxRetain",
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuCtxGetStreamPriorityRange",
    "cuThreadExchangeStreamCaptureMode",
    "cuStreamCreateWithPriority",
    "cuStreamQuery",
    "cuStreamWaitEvent",
    "cuStreamIsCapturing",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuMemHostRegister_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemcpyBatchAsync_v2",
    "cuStreamWriteValue64_v2",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemHostAlloc",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuMemsetD8Async",
    "cuEventDestroy_v2",
    "cuStreamDestroy_v2",
    "cuMemHostUnregister",
    "cuModuleUnload",
    "cuMemFree_v2",
    "cuMemFreeHost",
];

/// Calls that only select a context, or query progress.
const OFTEN: [&str; 4] = ["cuCtxGetCurrent", "cuCtxSetCurrent", "cuThreadExchangeStreamCaptureMode", "cuEventQuery"];

/// The calls of memory waits: some of the above, and their own.
const OF_WAITS: [&str; 12] = [
    "cuCtxGetCurrent",
    "cuStreamCreateWithPriority",
    "cuStreamQuery",
    "cuStreamWaitEvent",
    "cuStreamIsCapturing",
    "cuStreamWaitValue32_v2",
    "cuStreamWriteValue32_v2",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuMemHostAlloc",
    "cuMemFreeHost",
];

type Change = fn(Builder) -> Builder;

/// Makes two saves and fences, and a save of borrowed memory, by an executor of its own; returns the first
/// error, with its kind.
fn train(gpu: &Gpu, stream: Stream, [tensor, lent]: [&Tensor; 2], change: Change) -> ashore::Result<()> {
    let storage: Arc<dyn Storage> = Arc::new(Memory::new());
    let builder =
        CheckpointExecutor::builder("in memory").storage(storage.clone()).made_device(Arc::new(gpu.try_device()?));
    let executor = change(builder.arena(4 * 4096).chunk(4096).shutdown_timeout(LONG)).build()?;
    let mut result = Ok(());
    for step in 1..=3 {
        let tensor = if step < 3 { tensor } else { lent };
        let mut state = at_fence(tensor.source(stream));
        if executor.settings().gather > 0 {
            state.tensor_captured("captured", tensor.source(stream), Capture::AtSave).unwrap();
        }
        // The deadline is far: a driver error must not make the call wait for it.
        let (saved, fenced) = if step < 3 {
            (executor.save(step, state), executor.fence_on(&[stream.0]))
        } else {
            let saved = executor.scope(Fence::on(&[stream.0]), |scope| scope.save(step, state));
            // However the save ended, its sources are released.
            assert_eq!(Arc::strong_count(&lent.0), 1);
            saved.map_or_else(|error| (Err(error.clone()), Err(error)), |saved| (saved, Ok(())))
        };
        let waited = saved.and_then(|save| save.wait(LONG));
        let whole = waited.is_ok();
        result = result.and(fenced).and(waited.map(drop));
        let checkpoint = Checkpoint::from_storage(storage.clone(), &step_name(step));
        assert_eq!(checkpoint.is_ok(), whole, "step {step}");
        if let Ok(checkpoint) = checkpoint {
            assert_eq!(checkpoint.read("t").unwrap(), pattern(1, 9000));
            assert!(checkpoint.read("captured").map_or(executor.settings().gather == 0, |b| b == pattern(1, 9000)));
        }
        executor.fence()?;
    }
    eventually("slabs are returned", || executor.arena().free() == executor.arena().report().slabs);
    let _ = executor.shutdown(LONG);
    drop(executor);
    result
}

#[test]
fn cuda_call_that_fails_once_is_one_clean_error() {
    assert!(each_fails_once(&CALLS, |b| b.gather(24 << 10).scratch(2 * 4096).batch(true)) > 150);
}

#[test]
fn cuda_call_that_fails_once_at_a_memory_wait_is_one_clean_error() {
    assert!(each_fails_once(&OF_WAITS, |b| b.gather(0).memory_waits(true)) > 50);
}

/// How many calls there were to fail.
fn each_fails_once(calls: &[&str], change: Change) -> usize {
    let gpu = Gpu::take();
    let Some(fake) = gpu.fake() else { return usize::MAX };
    let mut tried = 0;
    for &name in calls {
        for (code, late) in [(1, ""), (719, ""), (719, ":async")] {
            for nth in 1.. {
                // Each of these is called for nearly everything: not every one of hundreds.
                if nth > 40 && nth % 17 != 0 && OFTEN.contains(&name) {
                    continue;
                }
                // A sticky error ends only when everything of the device is released.
                fake.reset();
                let (stream, tensor, lent) =
                    (gpu.stream(), gpu.tensor(&pattern(1, 9000)), gpu.tensor(&pattern(1, 9000)));
                let (live, before) = (fake.live(), fake.calls(name));
                fake.fault(&format!("{name}:{nth}:{code}{late}"));
                let result = train(&gpu, stream, [&tensor, &lent], change);
                if fake.sticky() == 0 {
                    // However it was released.
                    stream.wait();
                }
                let at = || format!("{name}:{nth}:{code}{late}");
                assert_eq!(Arc::strong_count(&tensor.0), 1, "{}", at());
                if fake.sticky() == 0 {
                    let given_back = CALLS[CALLS.len() - 6..].contains(&name);
                    let left = fake.live();
                    assert!(given_back || left == live, "{}: {left:?}, not {live:?}", at());
                }
                if fake.calls(name) - before < nth {
                    // The last call came before the fault.
                    assert!(result.is_ok(), "{}: {result:?}", at());
                    break;
                }
                tried += 1;
                if let Err(error) = result {
                    let named = error.to_string();
                    // Without kernels nothing is captured at save, and the report gives the reason.
                    let refused = error.kind() == ErrorKind::Invalid && named.contains("reason=");
                    let failed = matches!(error.kind(), ErrorKind::Device | ErrorKind::Unavailable);
                    assert!(failed || refused, "{}: {error}", at());
                    assert!(named.contains(&format!("code={code}")), "{}: {named}", at());
                    // The first thread that meets a sticky error names it.
                    assert!(code != 1 || named.contains(name), "{}: {named}", at());
                }
            }
        }
    }
    tried
}

#[test]
fn cuda_driver_is_not_called_after_an_error_that_stays() {
    // Digests would reach the host first, and the error with them before `save` has returned.
    let fixture = fixture(|b| b.detect(Detect::Never));
    let Some(fake) = fixture.gpu.fake() else { return };
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 9000)));
    let staged = fixture.executor.save(1, at_fence(tensor.source(stream))).unwrap();
    staged.staged().wait(LONG).unwrap();
    fake.fault("cuMemcpyDtoHAsync_v2:1:700:async");
    let lost = fixture.executor.save(2, at_fence(tensor.source(stream))).unwrap();
    let error = lost.wait(LONG).unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Device, Some(2)));
    assert!(error.to_string().contains("code=700") && error.to_string().contains("call=cu"), "{error}");
    staged.wait(LONG).unwrap();
    let calls = fake.calls("*");
    let error = fixture.executor.save(3, at_fence(tensor.source(stream))).unwrap_err();
    assert!(error.kind() == ErrorKind::Device && error.to_string().contains("code=700"), "{error}");
    fixture.executor.fence_on(&[stream.0]).unwrap();
    fixture.executor.save(4, one("host", Arc::new(pattern(4, 5000)))).unwrap().wait(LONG).unwrap_err();
    fixture.executor.shutdown(LONG).unwrap();
    drop(fixture.executor);
    assert_eq!(fake.calls("*"), calls);
    assert_eq!(Arc::strong_count(&tensor.0), 1);
}

#[test]
fn cuda_work_that_never_ends_fails_the_save_at_its_deadline() {
    let fixture = fixture(|b| b.save_timeout(Duration::from_millis(50)).fence_timeout(Duration::from_millis(50)));
    let Some(fake) = fixture.gpu.fake() else { return };
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 60_000)));
    fake.set("lag_us", 200_000);
    let save = fixture.executor.save(1, at_fence(tensor.source(stream))).unwrap();
    assert_eq!(save.wait(LONG).unwrap_err().kind(), ErrorKind::Deadline);
    fake.set("lag_us", 0);
    eventually("slabs are returned", || fixture.executor.arena().free() == fixture.executor.arena().report().slabs);
    eventually("the source is dropped", || Arc::strong_count(&tensor.0) == 1);
    fixture.executor.save(2, at_fence(tensor.source(stream))).unwrap().wait(LONG).unwrap();
    assert!(fixture.checkpoint(1).is_err());
}

#[test]
fn cuda_driver_that_is_taken_down_first_is_no_error() {
    let fixture = fixture(|b| b);
    let Some(fake) = fixture.gpu.fake() else { return };
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 9000)));
    fixture.executor.save(1, at_fence(tensor.source(stream))).unwrap().wait(LONG).unwrap();
    fake.fault("*:0:4");
    fixture.executor.shutdown(LONG).unwrap();
    drop(fixture.executor);
}

/// Runs `scope` in a thread, because it may never end.
fn ends(scope: impl FnOnce() -> ashore::Error + Send + 'static) -> ashore::Error {
    let (send, ended) = mpsc::channel();
    std::thread::spawn(move || send.send(scope()));
    ended.recv_timeout(LONG).expect("the scope ends")
}

/// The stager took a sticky error that it did not know for "still running": after a reset of the device, or
/// of its connection to MPS, a scope never ended.
#[test]
fn cuda_scope_ends_when_the_driver_refuses_for_good_to_say_how_far_copies_are() {
    for code in [201, 400, 709, 809, 810] {
        let fixture = Arc::new(fixture(|b| b.detect(Detect::Never)));
        if fixture.gpu.fake().is_none() {
            return;
        }
        let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 60_000)));
        let theirs = fixture.clone();
        let error = ends(move || {
            let fake = theirs.gpu.fake().unwrap();
            fake.set("hold", COPIES);
            let copies = fake.calls("cuMemcpyDtoHAsync_v2");
            let save = theirs.executor.scope(Fence::host(), |scope| {
                let save = scope.save(1, at_fence(tensor.lent(stream))).unwrap();
                eventually("copies are queued", || fake.calls("cuMemcpyDtoHAsync_v2") > copies);
                ["cuStreamQuery", "cuEventQuery"].iter().for_each(|call| fake.fault(&format!("{call}:0:{code}")));
                save
            });
            fake.set("hold", 0);
            save.unwrap().wait(LONG).unwrap_err()
        });
        assert_eq!((error.kind(), error.step()), (ErrorKind::Device, Some(1)), "{error}");
        assert!(error.to_string().contains(&format!("code={code}")), "{error}");
        // The context counts as lost: nothing is copied into slabs that a driver may still write.
        let error = fixture.executor.save(2, one("host", Arc::new(pattern(2, 5000)))).unwrap().wait(LONG).unwrap_err();
        assert!(error.kind() == ErrorKind::Device && error.to_string().contains(&format!("code={code}")), "{error}");
    }
}

/// A source that gives its bytes once; the second time it leaves the thread without a context, and panics.
struct Leaves(RawDevice, Arc<AtomicUsize>);

#[expect(unsafe_code, reason = "hands on the promises of the source inside")]
// SAFETY: those of the source inside.
unsafe impl Source for Leaves {
    fn layout(&self) -> ashore::Layout {
        self.0.layout()
    }
    fn location(&self) -> ashore::MemoryLocation {
        self.0.location()
    }
    fn read(&self, copy: &mut dyn FnMut(*const u8)) {
        if self.1.fetch_add(1, Ordering::Relaxed) > 0 {
            Gpu::leave();
            panic!("a source that fails");
        }
        self.0.read(copy);
    }
}

/// Without a current context the driver refused to say whether the first copy had ended, and the stager did
/// not make one current again.
#[test]
fn cuda_copies_are_waited_for_in_a_thread_that_a_source_left_without_a_context() {
    // Without kernels, because for those `save` itself would ask the source for its address.
    let fixture = Arc::new(fixture(|b| b.gather(0)));
    let (stream, tensor) = (fixture.gpu.stream(), fixture.gpu.tensor(&pattern(1, 60_000)));
    let theirs = fixture.clone();
    let error = ends(move || {
        theirs.gpu.enter();
        theirs.gpu.set("hold", COPIES);
        let save = theirs.executor.scope(Fence::host(), |scope| {
            let (mut state, reads) = (StateDict::new(), Arc::new(AtomicUsize::new(0)));
            let source = Leaves(tensor.lent(stream), reads.clone());
            state.tensor_captured("t", source, Capture::AtFence).unwrap();
            let save = scope.save(1, state).unwrap();
            eventually("the source has failed", || reads.load(Ordering::Relaxed) > 1);
            theirs.gpu.set("hold", 0);
            save
        });
        save.unwrap().wait(LONG).unwrap_err()
    });
    assert_eq!(error.kind(), ErrorKind::Internal, "{error}");
    let tensor = fixture.gpu.tensor(&pattern(2, 9000));
    fixture.executor.save(2, at_fence(tensor.source(stream))).unwrap().wait(LONG).unwrap();
}
