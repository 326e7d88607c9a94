//! A state over two GPUs of one process is fenced like that of one: each GPU copies late, within its memory,
//! what has not left it, and no stream waits for the bus.

use super::program::{COPIES, Fixture, Gpu, Stream, Tensor, at_fence, rig_on};
use crate::fixtures::executor::{LONG, eventually, pattern};
use ashore::{Builder, Capture, Detect, ErrorKind, Fence, Save, StateDict};
use proptest::prelude::Rng as _;
use proptest::test_runner::{RngAlgorithm, TestRng};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The setting of a simulated device that keeps kernels from beginning.
const KERNELS: u64 = 8;
/// Longer than the kernels of a fence take.
const SOON: Duration = Duration::from_millis(25);
/// Slots for all chunks of the states here, on each GPU.
const ROOM: u64 = 16 * 4096;

/// Tensors, each on one of the GPUs, and their bytes at the save.
type Tensors = Vec<(usize, Tensor, Vec<u8>)>;

/// Two simulated GPUs; the first is that of the executor.
struct Pair {
    fixture: Fixture,
    second: Gpu,
    streams: [Stream; 2],
    /// One test at a time has two devices, so that none waits for one that another such test has.
    _alone: MutexGuard<'static, ()>,
}

impl Pair {
    /// With `handed_in`, memory of the first is the scratch.
    fn take(handed_in: bool, change: impl FnOnce(Builder) -> Builder) -> Option<Self> {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let first = Gpu::take();
        first.fake()?;
        let second = Gpu::take();
        let (memory, ordinal) = (handed_in.then(|| first.tensor(&[0; ROOM as usize])), first.ordinal);
        let fixture = rig_on(first, |b| match memory {
            Some(memory) => memory.scratch_of(change(b.detect(Detect::Never)), ordinal, ROOM),
            None => change(b.detect(Detect::Never)),
        });
        let streams = [fixture.gpu.stream(), second.stream()];
        Some(Self { fixture, second, streams, _alone: alone })
    }

    /// The same, after a save that has equipped both GPUs.
    fn equipped(change: impl FnOnce(Builder) -> Builder) -> Option<Self> {
        let pair = Self::take(false, change)?;
        let tensors = pair.tensors(0, &[(0, 100), (1, 100)]);
        pair.save(0, &tensors).wait(LONG).unwrap();
        Some(pair)
    }

    fn gpu(&self, at: usize) -> &Gpu {
        if at == 0 { &self.fixture.gpu } else { &self.second }
    }

    fn fake(&self, at: usize) -> &fakecuda::Device {
        self.gpu(at).fake().expect("checked by `take`")
    }

    fn hold(&self, first: u64, second: u64) {
        self.fake(0).set("hold", first);
        self.fake(1).set("hold", second);
    }

    /// Tensors on these GPUs, of these lengths.
    fn tensors(&self, seed: u64, sizes: &[(usize, usize)]) -> Tensors {
        let bytes = |(i, &(at, len)): (usize, &(usize, usize))| (at, pattern(seed * 100 + i as u64, len));
        let bytes = sizes.iter().enumerate().map(bytes);
        bytes.map(|(at, bytes)| (at, self.gpu(at).tensor(&bytes), bytes)).collect()
    }

    fn state(&self, tensors: &[(usize, Tensor, Vec<u8>)]) -> StateDict<'static> {
        let mut state = StateDict::new();
        for (i, (at, tensor, _)) in tensors.iter().enumerate() {
            let source = tensor.source(self.streams[*at]);
            state.tensor_captured(i.to_string(), source, Capture::AtFence).unwrap();
        }
        state
    }

    fn save(&self, step: u64, tensors: &[(usize, Tensor, Vec<u8>)]) -> Save {
        self.fixture.executor.save(step, self.state(tensors)).unwrap()
    }

    fn fence(&self, on: &[usize]) -> ashore::Result<()> {
        self.fixture.executor.fence_on(&on.iter().map(|&at| self.streams[at].0).collect::<Vec<_>>())
    }

    /// Overwrites the tensors of one GPU in its stream.
    fn overwrite(&self, at: usize, tensors: &[(usize, Tensor, Vec<u8>)]) {
        self.gpu(at).enter();
        tensors.iter().filter(|(of, ..)| *of == at).for_each(|(_, tensor, _)| self.streams[at].fill(tensor, 0xEE));
    }

    /// Waits until what is in the stream of one GPU has run.
    fn wait_on(&self, at: usize) {
        self.gpu(at).enter();
        self.streams[at].wait();
    }

    fn wait(&self) {
        [0, 1].into_iter().for_each(|at| self.wait_on(at));
    }

    fn check(&self, step: u64, tensors: &[(usize, Tensor, Vec<u8>)]) {
        let checkpoint = self.fixture.checkpoint(step).unwrap();
        for (i, (at, _, bytes)) in tensors.iter().enumerate() {
            assert!(checkpoint.read(&i.to_string()).unwrap() == *bytes, "step {step} tensor {i} of gpu {at}");
        }
    }

    fn copies(&self, at: usize) -> u64 {
        self.fake(at).calls("cuMemcpyDtoHAsync_v2")
    }
}

/// Chunks of one GPU alone, and chunks that both share: 7 of 4 KiB after that of the header.
const MIXED: [(usize, usize); 4] = [(0, 9000), (1, 9000), (0, 3000), (1, 5000)];

#[test]
fn cuda_streams_of_two_gpus_go_on_before_anything_has_left_either() {
    let Some(pair) = Pair::equipped(|b| b.scratch(ROOM)) else { return };
    for step in 1..=20_u64 {
        let tensors = pair.tensors(step, &MIXED);
        pair.hold(COPIES, COPIES);
        let save = pair.save(step, &tensors);
        pair.fence(&[0, 1]).unwrap();
        pair.overwrite(0, &tensors);
        pair.overwrite(1, &tensors);
        pair.wait();
        assert_ne!(save.progress().phase, ashore::Phase::Ended);
        pair.hold(0, 0);
        let committed = save.wait(LONG).unwrap().committed().unwrap();
        assert_eq!(committed.late_chunks, 7);
        pair.check(step, &tensors);
        eventually("the sources are dropped", || {
            tensors.iter().all(|(_, tensor, _)| Arc::strong_count(&tensor.0) == 1)
        });
    }
    assert_eq!([pair.fake(0).sticky(), pair.fake(1).sticky()], [0, 0]);
}

/// After the fence that stream, and what the program orders behind it, may write the tensors of both.
#[test]
fn cuda_stream_of_one_gpu_waits_at_a_fence_for_the_kernels_of_both() {
    let Some(pair) = Pair::equipped(|b| b.scratch(ROOM)) else { return };
    for (step, alone) in (1..=10_u64).zip([0, 1].into_iter().cycle()) {
        let tensors = pair.tensors(step, &MIXED);
        pair.fake(alone).set("hold", COPIES);
        pair.fake(1 - alone).set("hold", COPIES | KERNELS);
        let save = pair.save(step, &tensors);
        pair.fence(&[alone]).unwrap();
        pair.overwrite(alone, &tensors);
        std::thread::scope(|threads| {
            let stream = threads.spawn(|| pair.wait_on(alone));
            std::thread::sleep(SOON);
            assert!(!stream.is_finished(), "the kernels of the other GPU have not run");
            pair.hold(COPIES, COPIES);
            stream.join().unwrap();
        });
        pair.overwrite(1 - alone, &tensors);
        pair.wait();
        pair.hold(0, 0);
        save.wait(LONG).unwrap();
        pair.check(step, &tensors);
    }
}

#[test]
fn cuda_part_of_a_chunk_is_copied_again_only_where_its_gpu_asks_for_it() {
    let Some(pair) = Pair::equipped(|b| b.scratch(ROOM)) else { return };
    let mut step = 0;
    for first in [0, 1] {
        let second = 1 - first;
        // A busy machine may run kernels or copies too late for what is to be seen.
        let seen = (0..50).any(|tries| {
            step += 1;
            let moment = Duration::from_millis(5 << (tries / 8));
            // One chunk that both share, in two parts.
            let tensors = pair.tensors(step, &[(0, 2000), (1, 2000)]);
            let before = [pair.copies(0), pair.copies(1)];
            pair.hold(COPIES, COPIES);
            let save = pair.save(step, &tensors);
            eventually("both parts are on their way", || [0, 1].iter().all(|&at| pair.copies(at) == before[at] + 1));
            // The first GPU tells F before its part has left; the part of the second leaves before its
            // kernels run.
            pair.fake(second).set("hold", KERNELS | COPIES);
            pair.fence(&[0, 1]).unwrap();
            pair.overwrite(0, &tensors);
            pair.overwrite(1, &tensors);
            std::thread::sleep(moment);
            pair.fake(second).set("hold", KERNELS);
            pair.fake(first).set("hold", 0);
            std::thread::sleep(moment);
            pair.hold(0, 0);
            let late = save.wait(LONG).unwrap().committed().unwrap().late_chunks;
            pair.wait();
            pair.check(step, &tensors);
            late == 1 && [0, 1].map(|at| pair.copies(at) - before[at]) == [2 - first as u64, 2 - second as u64]
        });
        assert!(seen, "gpu {first}");
    }
}

#[test]
fn cuda_host_waits_at_a_fence_for_what_the_scratch_of_one_gpu_does_not_hold() {
    // 8 chunks have a part on the first GPU, the last of them and two more on the second. Slots of each,
    // slabs of the arena, and whether the fence returns while nothing leaves the GPUs.
    for (slots, slabs, returns) in
        [(8, 2, true), (6, 2, true), (5, 2, false), (3, 5, true), (3, 4, false), (2, 8, true), (2, 7, false)]
    {
        let patience = Duration::from_millis(if returns { 20_000 } else { 30 });
        let change = |b: Builder| b.arena(slabs * 4096).scratch(slots * 4096).fence_timeout(patience);
        let Some(pair) = Pair::equipped(change) else { return };
        let tensors = pair.tensors(1, &[(0, 30_000), (1, 9000)]);
        pair.hold(COPIES, COPIES);
        let save = pair.save(1, &tensors);
        assert_eq!(pair.fence(&[0, 1]).is_ok(), returns, "{slots} slots, {slabs} slabs");
        pair.overwrite(0, &tensors);
        pair.overwrite(1, &tensors);
        // Streams that go on too early would show.
        std::thread::sleep(SOON / 5);
        pair.hold(0, 0);
        assert_eq!(save.wait(LONG).is_ok(), returns);
        pair.wait();
        if returns {
            pair.check(1, &tensors);
        }
    }
}

#[test]
fn cuda_slots_of_both_gpus_come_back_however_a_save_ends() {
    // As many slots as the parts of each GPU need; with one fewer the fence would wait for ever.
    let Some(pair) = Pair::equipped(|b| b.arena(2 * 4096).scratch(6 * 4096)) else { return };
    for step in 1..=24_u64 {
        let tensors = pair.tensors(step, &[(0, 9000), (1, 9000), (0, 9000), (1, 2000)]);
        pair.hold(COPIES, COPIES);
        let save = pair.save(step, &tensors);
        pair.fence(&[0, 1]).unwrap();
        if step % 3 == 0 {
            assert!(save.cancel());
        }
        pair.overwrite(0, &tensors);
        pair.overwrite(1, &tensors);
        pair.wait();
        pair.hold(0, 0);
        assert_eq!(save.wait(LONG).is_ok(), step % 3 != 0);
        _ = save.staged().wait(LONG);
        eventually("the sources are dropped", || {
            tensors.iter().all(|(_, tensor, _)| Arc::strong_count(&tensor.0) == 1)
        });
        if step % 3 != 0 {
            pair.check(step, &tensors);
        }
    }
}

/// Kernels of the first GPU are queued by then: they run, and only then are sources and slots free.
#[test]
fn cuda_late_copy_that_the_second_gpu_refuses_fails_the_save_and_loses_no_slot() {
    let Some(pair) = Pair::equipped(|b| b.scratch(7 * 4096).fence_timeout(LONG / 10)) else { return };
    let refused = [
        "cuMemHostAlloc:1:2",
        "cuLaunchKernel:1:1",
        "cuLaunchKernel:2:1",
        "cuLaunchKernel:3:1",
        "cuStreamWaitEvent:1:1",
    ];
    for (fault, round) in refused.into_iter().zip(0..) {
        for (step, fails) in [(2 * round + 1, true), (2 * round + 2, false)] {
            let tensors = pair.tensors(step, &MIXED);
            let before = [pair.copies(0), pair.copies(1)];
            pair.hold(COPIES, COPIES);
            let save = pair.save(step, &tensors);
            eventually("chunks are on their way", || pair.copies(0) >= before[0] + 2);
            if fails {
                pair.fake(1).fault(fault);
                let error = pair.fence(&[0, 1]).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Device, "{fault}: {error}");
            } else {
                pair.fence(&[0, 1]).unwrap();
                pair.overwrite(0, &tensors);
                pair.overwrite(1, &tensors);
                pair.wait();
            }
            pair.hold(0, 0);
            assert_eq!(save.wait(LONG).is_err(), fails, "{fault}");
            _ = save.staged().wait(LONG);
            eventually("the sources are dropped", || {
                tensors.iter().all(|(_, tensor, _)| Arc::strong_count(&tensor.0) == 1)
            });
            if !fails {
                pair.check(step, &tensors);
            }
        }
    }
    assert_eq!([pair.fake(0).sticky(), pair.fake(1).sticky()], [0, 0]);
}

#[test]
fn cuda_fence_waits_for_copies_where_the_second_gpu_has_no_scratch() {
    for fault in ["cuModuleLoadData:1:222", "cuMemAlloc_v2:1:2"] {
        let Some(pair) = Pair::take(false, |b| b.scratch(ROOM)) else { return };
        waits(&pair, || pair.fake(1).fault(fault));
    }
    // A program that hands in memory of one GPU is not made to give more than that.
    let Some(pair) = Pair::take(true, |b| b) else { return };
    let before = pair.fake(1).live().bytes;
    waits(&pair, || ());
    assert!(pair.fake(1).live().bytes < before + ROOM);
}

/// A save whose fence waits for copies, the first with tensors of both GPUs; and one of the first GPU alone.
fn waits(pair: &Pair, before: impl FnOnce()) {
    pair.fake(0).set("lag_us", 300);
    pair.fake(1).set("lag_us", 300);
    let tensors = pair.tensors(1, &MIXED);
    before();
    let save = pair.save(1, &tensors);
    pair.fence(&[0, 1]).unwrap();
    pair.overwrite(0, &tensors);
    pair.overwrite(1, &tensors);
    assert_eq!(save.wait(LONG).unwrap().committed().unwrap().late_chunks, 0);
    pair.wait();
    pair.check(1, &tensors);
    // A state of the first GPU alone is copied late as ever.
    let near = pair.tensors(2, &[(0, 30_000)]);
    pair.hold(COPIES, 0);
    let save = pair.fixture.executor.save(2, at_fence(near[0].1.source(pair.streams[0]))).unwrap();
    pair.fence(&[0]).unwrap();
    pair.overwrite(0, &near);
    pair.wait_on(0);
    pair.hold(0, 0);
    assert_eq!(save.wait(LONG).unwrap().committed().unwrap().late_chunks, 8);
    assert_eq!(pair.fixture.checkpoint(2).unwrap().read("t").unwrap(), near[0].2);
}

/// Saves, fences, scopes and writes with random lags of both GPUs: every byte must be that of its step.
#[test]
fn cuda_snapshots_of_two_gpus_are_never_torn() {
    let mut random = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let mut below = |bound: usize| random.next_u32() as usize % bound;
    let mut late = 0;
    for (slabs, slots) in [(2, 64), (4, 3), (16, 5)] {
        let change = |b: Builder| b.arena(slabs * 4096).scratch(slots * 4096).overlap(ashore::Overlap::Queue(3));
        let Some(pair) = Pair::equipped(change) else { return };
        let mut open: Vec<(Save, Tensors)> = Vec::new();
        for step in 1..=250_u64 {
            for at in [0, 1] {
                let lag = [0, 0, 20, 100, 300][below(5)];
                pair.fake(at).set("lag_us", lag);
                pair.fake(at).set("jitter_us", lag / 2);
            }
            let sizes: Vec<_> = (0..1 + below(5)).map(|_| (below(2), [1, 100, 4096, 5000, 12_000][below(5)])).collect();
            let tensors = pair.tensors(step, &sizes);
            let on: &[usize] = [&[0, 1][..], &[1, 0], &[0], &[1]][below(4)];
            let save = if below(4) == 0 {
                let streams: Vec<_> = on.iter().map(|&at| pair.streams[at].0).collect();
                let saved = pair.fixture.executor.scope(Fence::on(&streams), |scope| {
                    let mut state = StateDict::new();
                    for (i, (at, tensor, _)) in tensors.iter().enumerate() {
                        let lent = tensor.lent(pair.streams[*at]);
                        state.tensor_captured(i.to_string(), lent, Capture::AtFence).unwrap();
                    }
                    scope.save(step, state)
                });
                saved.unwrap().unwrap()
            } else {
                let save = pair.save(step, &tensors);
                pair.fence(on).unwrap();
                save
            };
            on.iter().for_each(|&at| pair.overwrite(at, &tensors));
            if let [alone] = on {
                pair.wait_on(*alone);
                pair.overwrite(1 - alone, &tensors);
            }
            open.push((save, tensors));
            if open.len() > below(3) {
                // Memory is freed at once, so nothing may be left that writes it.
                pair.wait();
                for (save, tensors) in open.drain(..) {
                    late += save.wait(LONG).unwrap().committed().unwrap().late_chunks;
                    pair.check(save.step(), &tensors);
                    pair.fixture.storage.remove(&ashore::id::step_name(save.step())).unwrap();
                }
            }
        }
        pair.wait();
        for (save, tensors) in open {
            save.wait(LONG).unwrap();
            pair.check(save.step(), &tensors);
        }
        assert_eq!([pair.fake(0).sticky(), pair.fake(1).sticky()], [0, 0]);
    }
    assert!(late > 200, "{late}");
}
