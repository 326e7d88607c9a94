//! Restores into device memory while the driver fails: each call once in turn, lost contexts, copies that
//! never end.

use super::program::{Gpu, Stream, Tensor};
use super::restoring::{blank, opened, step};
use crate::fixtures::checkpoint::noise;
use crate::fixtures::executor::eventually;
use ashore::storage::{Memory, Storage};
use ashore::{Checkpoint, ErrorKind, Targets};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The driver calls of a restore, including those that find the driver; the last of them release resources.
const CALLS: [&str; 22] = [
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDeviceGet",
    "cuDeviceGetName",
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
    "cuMemcpyHtoDAsync_v2",
    "cuEventDestroy_v2",
    "cuStreamDestroy_v2",
    "cuMemHostUnregister",
];

fn restore(gpu: &Gpu, storage: &Arc<dyn Storage>, stream: Stream, memory: &[Tensor; 2]) -> ashore::Result<()> {
    let checkpoint = Checkpoint::from_storage(storage.clone(), "step")?.with_threads(1);
    let targets = Targets::new().device("a", memory[0].target(stream)).device("b", memory[1].target(stream));
    checkpoint.with_made_device(Arc::new(gpu.try_device()?)).read_into(targets)
}

#[test]
fn cuda_call_that_fails_once_is_one_clean_error_of_a_restore() {
    let gpu = Gpu::take();
    let Some(fake) = gpu.fake() else { return };
    let bytes = [noise(300_000, 1), noise(5000, 2)];
    let memory = Memory::new();
    // Apart, so that there are two pieces.
    step(&[("a", &bytes[0]), ("b", &bytes[1])]).shards(2).publish(&memory, "step");
    let storage: Arc<dyn Storage> = Arc::new(memory);
    let mut tried = 0;
    for name in CALLS {
        for (code, late) in [(1, ""), (719, ""), (719, ":async")] {
            for nth in 1.. {
                // A sticky error ends only when everything of the device is released.
                fake.reset();
                let (stream, memory) = (gpu.stream(), [blank(&gpu, 300_000), blank(&gpu, 5000)]);
                let (live, before) = (fake.live(), fake.calls(name));
                fake.fault(&format!("{name}:{nth}:{code}{late}"));
                let result = restore(&gpu, &storage, stream, &memory);
                let at = || format!("{name}:{nth}:{code}{late}");
                if fake.sticky() == 0 {
                    let given_back = CALLS[CALLS.len() - 3..].contains(&name);
                    assert!(given_back || fake.live() == live, "{}: {:?}, not {live:?}", at(), fake.live());
                    let right = || memory.iter().zip(&bytes).all(|(memory, bytes)| memory.read() == *bytes);
                    assert!(result.is_err() || right(), "{}", at());
                }
                if fake.calls(name) - before < nth {
                    // The last call came before the fault.
                    assert!(result.is_ok(), "{}: {result:?}", at());
                    break;
                }
                tried += 1;
                if let Err(error) = result {
                    assert!(matches!(error.kind(), ErrorKind::Device | ErrorKind::Unavailable), "{}: {error}", at());
                    let named = format!("{error:#}");
                    assert!(named.contains(&format!("code={code}")), "{}: {named}", at());
                    assert!(code != 1 || named.contains(name), "{}: {named}", at());
                }
            }
        }
    }
    assert!(tried > 100, "{tried}");
}

#[test]
fn cuda_driver_is_not_called_after_a_restore_has_met_an_error_that_stays() {
    let gpu = Gpu::take();
    let Some(fake) = gpu.fake() else { return };
    let (bytes, stream) = (noise(30 << 20, 1), gpu.stream());
    let checkpoint = opened(&gpu, &[("t", &bytes)]);
    let memory = blank(&gpu, bytes.len());
    fake.fault("cuMemcpyHtoDAsync_v2:2:700:async");
    let read = || checkpoint.read_into(Targets::new().device("t", memory.target(stream)));
    let error = read().unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Device, Some(7)));
    assert!(format!("{error:#}").contains("code=700"), "{error}");
    let calls = fake.calls("*");
    let error = read().unwrap_err();
    assert!(error.kind() == ErrorKind::Device && format!("{error:#}").contains("code=700"), "{error}");
    // Host tensors do not involve the device.
    assert!(checkpoint.read("t").unwrap() == bytes);
    drop(checkpoint);
    assert_eq!(fake.calls("*"), calls);
}

#[test]
fn cuda_copies_that_never_end_fail_a_restore_when_its_patience_is_over() {
    const TO_DEVICE: u64 = 2;
    let gpu = Gpu::take();
    let Some(fake) = gpu.fake() else { return };
    let (bytes, stream) = (noise(30 << 20, 1), gpu.stream());
    let checkpoint = opened(&gpu, &[("t", &bytes)]);
    let memory = blank(&gpu, bytes.len());
    fake.set("hold", TO_DEVICE);
    let impatient = checkpoint.clone().with_timeout(Duration::from_millis(50));
    let began = Instant::now();
    let error = impatient.read_into(Targets::new().device("t", memory.target(stream))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Deadline);
    assert!(error.to_string().contains("still write") && error.to_string().contains("timeout=50ms"), "{error}");
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    // Their source memory was neither reused nor unpinned: they succeed.
    assert_eq!(fake.live().registered, 1);
    fake.set("hold", 0);
    eventually("the copies end", || fake.live().streams == 2);
    assert_eq!(fake.sticky(), 0);
    checkpoint.read_into(Targets::new().device("t", memory.target(stream))).unwrap();
    assert!(memory.read() == bytes);
}

#[test]
fn cuda_restore_leaves_the_callers_thread_as_it_was() {
    let gpus = [Gpu::take(), Gpu::take()];
    let bytes = noise(5000, 1);
    let checkpoint = opened(&gpus[0], &[("t", &bytes)]);
    let (stream, memory) = (gpus[0].stream(), blank(&gpus[0], 5000));
    for gpu in &gpus {
        gpu.enter();
        checkpoint.read_into(Targets::new().device("t", memory.target(stream))).unwrap();
        assert!(gpu.is_current());
    }
}
