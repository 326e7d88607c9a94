//! `DeviceChoice::Auto` takes the device of the tensors, of the current context or of the rank, and none
//! where none is needed. Each test runs in a process whose loader finds the driver.

use super::loader::{Found, pass, path_of, with_driver};
use super::program::{Gpu, left_out, real};
use crate::fixtures::executor::{LONG, pattern};
use ashore::id::step_name;
use ashore::internal::device::choose;
use ashore::storage::{Memory, Storage};
use ashore::{
    Builder, Capture, Checkpoint, CheckpointExecutor, DeviceChoice, Dtype, ErrorKind, RawDevice, StateDict, Targets,
};
use std::sync::Arc;

/// An executor with `DeviceChoice::Auto`.
struct Left {
    executor: CheckpointExecutor,
    storage: Arc<dyn Storage>,
}

impl Left {
    fn new(change: impl FnOnce(Builder) -> Builder) -> Self {
        let storage: Arc<dyn Storage> = Arc::new(Memory::new());
        let builder = CheckpointExecutor::builder("in memory").storage(storage.clone()).arena(4 * 4096).chunk(4096);
        let executor = change(builder.gather(64 << 10).shutdown_timeout(LONG)).build().unwrap();
        Self { executor, storage }
    }

    fn name(&self) -> &str {
        &self.executor.device().name
    }

    /// Saves `state`, and reads `t` of it.
    fn saved(&self, step: u64, state: StateDict<'static>) -> Vec<u8> {
        let save = self.executor.save(step, state).unwrap();
        self.executor.fence().unwrap();
        save.wait(LONG).unwrap();
        self.read(step)
    }

    fn read(&self, step: u64) -> Vec<u8> {
        Checkpoint::from_storage(self.storage.clone(), &step_name(step)).unwrap().read("t").unwrap()
    }
}

fn on_host(bytes: Vec<u8>) -> StateDict<'static> {
    let mut state = StateDict::new();
    state.tensor("t", Arc::new(bytes)).unwrap();
    state
}

fn one(source: RawDevice, capture: Capture) -> StateDict<'static> {
    let mut state = StateDict::new();
    state.tensor_captured("t", source, capture).unwrap();
    state
}

/// How often a context of the device was requested, memory pinned for it, or memory allocated on it.
fn touched(gpu: &Gpu) -> u64 {
    let fake = gpu.fake().unwrap();
    ["cuDevicePrimaryCtxRetain", "cuMemHostRegister_v2", "cuMemAlloc_v2"].iter().map(|call| fake.calls(call)).sum()
}

/// Two devices, neither with a current context; None on a real one.
fn two() -> Option<(Gpu, Gpu)> {
    if real() {
        left_out();
        return None;
    }
    let both = (Gpu::take(), Gpu::take());
    Gpu::leave();
    Some(both)
}

#[test]
fn cuda_device_that_is_left_open_is_that_of_the_first_tensor_and_none_before() {
    with_driver!(cuda_device_that_is_left_open_is_that_of_the_first_tensor_and_none_before);
    let Some((first, second)) = two() else { return };
    let before = (touched(&first), touched(&second));
    let left = Left::new(|b| b.batch(true).memory_waits(true));
    assert_eq!(left.name(), "auto");
    // Neither saves from the host nor fences touch a device.
    let stream = second.stream();
    Gpu::leave();
    for step in 1..=3 {
        assert_eq!(left.saved(step, on_host(pattern(step, 20_000))), pattern(step, 20_000));
        left.executor.fence_on(&[stream.0]).unwrap();
    }
    assert_eq!((touched(&first), touched(&second), left.name()), (before.0, before.1, "auto"));

    second.set("lag_us", 300);
    let (small, large) = (second.tensor(&pattern(4, 500)), second.tensor(&pattern(5, 30_000)));
    Gpu::leave();
    let before = touched(&first);
    // Only kernels of the right device can do this.
    assert_eq!(left.saved(4, one(small.source(stream), Capture::AtSave)), pattern(4, 500));
    let transposed = small.strided(stream, 0, Dtype::U8, &[25, 20], &[1, 25]);
    let expected: Vec<_> = (0..500).map(|i| pattern(4, 500)[i / 20 + i % 20 * 25]).collect();
    assert_eq!(left.saved(5, one(transposed, Capture::AtFence)), expected);
    for step in 6..9 {
        assert_eq!(left.saved(step, one(large.source(stream), Capture::AtFence)), pattern(5, 30_000));
        assert_eq!(left.saved(step + 10, on_host(pattern(step, 20_000))), pattern(step, 20_000));
    }
    let report = left.executor.device();
    assert_eq!(report.name, format!("cuda:{}", second.ordinal));
    assert!(report.gather.is_ok() && report.batch.is_ok() && report.memory_waits.is_ok(), "{report:?}");
    assert_eq!((touched(&first), second.fake().unwrap().calls("cuMemHostRegister_v2")), (before, 1));
    drop(left);
    assert_eq!(second.fake().unwrap().calls("cuMemHostUnregister"), 1);
}

#[test]
fn cuda_device_that_is_left_open_is_that_of_the_current_context() {
    with_driver!(cuda_device_that_is_left_open_is_that_of_the_current_context);
    let Some((first, second)) = two() else { return };
    let before = touched(&first);
    second.enter();
    let left = Left::new(|b| b);
    let report = left.executor.device();
    assert_eq!(report.name, format!("cuda:{}", second.ordinal));
    assert!(report.why.contains("current context") && report.gather.is_ok(), "{report:?}");
    assert_eq!(choose(DeviceChoice::Auto).unwrap().1.name, report.name);
    assert_eq!(touched(&first), before);
}

#[test]
fn cuda_device_that_is_left_open_is_that_of_a_target_that_is_restored_first() {
    with_driver!(cuda_device_that_is_left_open_is_that_of_a_target_that_is_restored_first);
    let Some((first, second)) = two() else { return };
    let (left, before) = (Left::new(|b| b), touched(&first));
    left.saved(1, on_host(pattern(1, 20_000)));
    let (stream, tensor) = (second.stream(), second.tensor(&[0; 20_000]));
    Gpu::leave();
    let newest = left.executor.latest().unwrap().unwrap();
    newest.read_into(Targets::new().device("t", tensor.target(stream))).unwrap();
    second.enter();
    assert_eq!(tensor.read(), pattern(1, 20_000));
    Gpu::leave();
    assert_eq!(left.saved(2, one(tensor.source(stream), Capture::AtSave)), pattern(1, 20_000));
    assert_eq!((left.name().to_owned(), touched(&first)), (format!("cuda:{}", second.ordinal), before));
}

#[test]
fn cuda_device_that_is_left_open_among_several_is_that_of_the_rank() {
    const RANK: &str = "LOCAL_RANK";
    if std::env::var_os(RANK).is_none() {
        let variables = &[(RANK, "9"), ("FAKECUDA_DEVICES", "4")];
        let here = path_of!(cuda_device_that_is_left_open_among_several_is_that_of_the_rank);
        return pass(here, &Found { variables, ..Found::default() });
    }
    let Some((first, second)) = two() else { return };
    let left = Left::new(|b| b);
    let report = left.executor.device();
    assert!(report.name == "auto" && report.why.contains("likely cuda:1, LOCAL_RANK=9"), "{report}");
    let tensors = [&first, &second].map(|gpu| (gpu.tensor(&pattern(1, 500)), gpu.stream()));
    Gpu::leave();
    let mut state = StateDict::new();
    for (name, (tensor, stream)) in ["s", "t"].into_iter().zip(&tensors) {
        state.tensor_captured(name, tensor.source(*stream), Capture::AtFence).unwrap();
    }
    assert_eq!((left.saved(1, state), left.name()), (pattern(1, 500), "cuda:1"));
    // Where the choice cannot wait for a tensor, the rank decides at once.
    let (_, chosen) = choose(DeviceChoice::Auto).unwrap();
    assert!(chosen.name == "cuda:1" && chosen.why.contains("LOCAL_RANK=9"), "{chosen}");
}

#[test]
fn cuda_device_that_cannot_be_used_when_it_is_chosen_fails_that_save_alone() {
    with_driver!(cuda_device_that_cannot_be_used_when_it_is_chosen_fails_that_save_alone);
    let Some((_, second)) = two() else { return };
    let left = Left::new(|b| b.batch(true));
    let (stream, tensor) = (second.stream(), second.tensor(&pattern(1, 9000)));
    Gpu::leave();
    second.fake().unwrap().fault("cuDevicePrimaryCtxRetain:1:2");
    let state = || one(tensor.source(stream), Capture::AtFence);
    let refused = left.executor.save(1, state()).and_then(|save| save.wait(LONG).map(drop)).unwrap_err();
    assert!(refused.kind() == ErrorKind::Device && refused.to_string().contains("out of memory"), "{refused}");
    assert_eq!(left.name(), "auto");
    // An arena that cannot be pinned is used unpinned.
    second.fake().unwrap().fault("cuMemHostRegister_v2:1:2");
    assert_eq!(left.saved(2, state()), pattern(1, 9000));
    let report = left.executor.device();
    assert_eq!(report.batch, Err("the arena is not pinned".into()), "{report:?}");
}
