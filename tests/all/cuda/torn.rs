//! No snapshot is torn: in thousands of saves the tensors are written, freed and reused as early as a program
//! may. Every byte must be that of its step.

use super::program::{Fixture, Gpu, Stream, Tensor, rig_on};
use crate::fixtures::executor::LONG;
use ashore::{Capture, Detect, Dtype, Fence, SaveOptions, Snapshot, StateDict};
use proptest::prelude::Rng as _;
use proptest::test_runner::{RngAlgorithm, TestRng};
use std::collections::BTreeMap;
use std::sync::Arc;

/// How a trial waits until it may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Case {
    /// The host waits.
    Host,
    /// The producer's stream waits on the GPU.
    Producer,
    /// Another stream waits and writes.
    Other,
    /// Two streams wait, one after the other.
    Twice,
    /// The host waits for `staged`.
    Staged,
    /// `save` itself waits.
    AtSave,
    /// The program frees the memory after the fence; another stream allocates it and writes it.
    Freed,
    /// Borrowed memory, written and freed after the end of a scope that waits on the host.
    ScopeOnHost,
    /// Borrowed memory of a scope whose streams wait on the GPU.
    ScopeOnStream,
}

const CASES: [Case; 9] = [
    Case::Host,
    Case::Producer,
    Case::Other,
    Case::Twice,
    Case::Staged,
    Case::AtSave,
    Case::Freed,
    Case::ScopeOnHost,
    Case::ScopeOnStream,
];

/// A save that is not checked yet, and what each tensor must hold.
type Open = (ashore::Save, Case, Vec<(usize, u8)>);

/// One program: many saves on one executor.
struct Program {
    fixture: Fixture,
    streams: [Stream; 3],
    random: TestRng,
    step: u64,
    open: Vec<Open>,
    counts: BTreeMap<Case, usize>,
}

impl Program {
    fn new(seed: u8, slabs: u64, slots: u64, batch: bool, waits: bool) -> Self {
        let gpu = Gpu::take();
        gpu.set("seed", u64::from(seed) + 1);
        gpu.set("reuse", 1);
        let streams = [gpu.stream(), gpu.stream(), gpu.stream()];
        let fixture = rig_on(gpu, |b| {
            let b = b.arena(slabs * 4096).scratch(slots * 4096).detect(Detect::Never);
            b.overlap(ashore::Overlap::Queue(3)).batch(batch).memory_waits(waits)
        });
        let random = TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32]);
        Self { fixture, streams, random, step: 0, open: Vec::new(), counts: BTreeMap::new() }
    }

    fn below(&mut self, bound: usize) -> usize {
        self.random.next_u32() as usize % bound
    }

    fn trial(&mut self) {
        self.step += 1;
        let (step, case) = (self.step, CASES[self.below(CASES.len())]);
        *self.counts.entry(case).or_default() += 1;
        let lag = [0, 0, 20, 100, 300][self.below(5)];
        self.fixture.gpu.set("lag_us", lag);
        self.fixture.gpu.set("jitter_us", lag / 2);
        let producer = self.streams[self.below(2)];
        let other = self.streams[2];
        let value = (step % 200) as u8 + 1;
        let sizes: Vec<_> = (0..1 + self.below(4)).map(|_| [1, 100, 4096, 5000, 12_000][self.below(5)]).collect();
        let tensors: Vec<_> = sizes.iter().map(|&n| producer.tensor(n)).collect();
        for tensor in &tensors {
            producer.fill(tensor, value);
        }
        // Some are captured at `save`, most are left to the fence; of some only every second byte is saved.
        let kinds: Vec<_> = sizes.iter().map(|_| self.below(8)).collect();
        let at_save = |i: usize| kinds[i] < 3;
        let state = |tensors: &[Tensor]| {
            let lent = matches!(case, Case::ScopeOnHost | Case::ScopeOnStream);
            let mut state = StateDict::new();
            for (i, tensor) in tensors.iter().enumerate() {
                let source = match kinds[i] {
                    2 | 3 if !lent => tensor.strided(producer, 0, Dtype::U8, &[sizes[i] / 2], &[2]),
                    _ if lent => tensor.lent(producer),
                    _ => tensor.source(producer),
                };
                let capture = if at_save(i) { Capture::AtSave } else { Capture::AtFence };
                state.tensor_captured(i.to_string(), source, capture).unwrap();
            }
            // In the last chunk a host tensor leaves nothing to copy late.
            let host = if step % 4 == 0 { "host" } else { "+host" };
            state.tensor(host, Arc::new(vec![value; 3000])).unwrap();
            state
        };
        let executor = &self.fixture.executor;
        let scoped = |fence: Fence<'_>| executor.scope(fence, |s| s.save(step, state(&tensors))).unwrap().unwrap();
        let write = |stream: Stream, value: u8| tensors.iter().for_each(|t| stream.fill(t, value));
        let half = |i: usize| matches!(kinds[i], 2 | 3) && !matches!(case, Case::ScopeOnHost | Case::ScopeOnStream);
        let lens: Vec<_> = (0..sizes.len()).map(|i| if half(i) { sizes[i] / 2 } else { sizes[i] }).collect();
        let save = match case {
            Case::ScopeOnHost => scoped(Fence::host()),
            Case::ScopeOnStream => scoped(Fence::on(&[producer.0])),
            Case::AtSave => {
                let options = SaveOptions::default().snapshot(Snapshot::AtSave);
                executor.save_with(step, state(&tensors), options).unwrap()
            }
            _ => executor.save(step, state(&tensors)).unwrap(),
        };
        if !matches!(case, Case::AtSave | Case::ScopeOnHost | Case::ScopeOnStream) {
            // Before any fence.
            tensors.iter().enumerate().filter(|(i, _)| at_save(*i)).for_each(|(_, t)| producer.fill(t, 0xBB));
        }
        match case {
            Case::Host => executor.fence().unwrap(),
            Case::Producer | Case::Freed => executor.fence_on(&[producer.0]).unwrap(),
            Case::Other => executor.fence_on(&[other.0]).unwrap(),
            Case::Twice => {
                executor.fence_on(&[producer.0]).unwrap();
                executor.fence_on(&[other.0]).unwrap();
            }
            Case::Staged => save.staged().wait(LONG).unwrap(),
            Case::AtSave | Case::ScopeOnHost | Case::ScopeOnStream => {}
        }
        match case {
            Case::Other => write(other, 0xEE),
            Case::Twice => {
                write(producer, 0xEE);
                write(other, 0xDD);
            }
            Case::Freed => {}
            _ => write(producer, 0xEE),
        }
        if matches!(case, Case::Other | Case::Twice) {
            // Freed in the producer's stream, which must not overtake the writer, as in real programs.
            other.wait();
        }
        drop(tensors);
        if matches!(case, Case::Freed | Case::ScopeOnHost | Case::ScopeOnStream) {
            let next: Vec<_> = sizes.iter().map(|&n| other.tensor(n)).collect();
            next.iter().for_each(|tensor| other.fill(tensor, 0xCC));
        }
        self.open.push((save, case, lens.into_iter().map(|n| (n, value)).collect()));
        if self.open.len() > self.below(3) {
            self.check();
        }
    }

    /// Compares the saved bytes with the expected ones.
    fn check(&mut self) {
        for (save, case, expected) in self.open.drain(..) {
            let step = save.step();
            save.wait(LONG).unwrap();
            let checkpoint = self.fixture.checkpoint(step).unwrap();
            for (i, (len, value)) in expected.iter().enumerate() {
                let bytes = checkpoint.read(&i.to_string()).unwrap();
                let wrong = bytes.iter().filter(|b| *b != value).count();
                let found = bytes.iter().find(|b| *b != value);
                let at = || format!("step {step} {case:?} tensor {i} expected {value:#x} found {found:x?}");
                assert_eq!((bytes.len(), wrong), (*len, 0), "{}", at());
            }
            let host = if step % 4 == 0 { "host" } else { "+host" };
            assert!(checkpoint.read(host).unwrap().iter().all(|b| *b == expected[0].1));
            self.fixture.storage.remove(&ashore::id::step_name(step)).unwrap();
        }
    }
}

#[test]
fn cuda_snapshots_are_never_torn() {
    const TRIALS: usize = 2080;
    let counts = std::thread::scope(|scope| {
        let ways =
            [(2, 0, true, false), (2, 2, false, true), (4, 64, true, false), (16, 5, false, false), (4, 0, true, true)];
        let mut seed = 0;
        let programs = ways.map(|(slabs, slots, batch, waits)| {
            seed += 1;
            scope.spawn(move || {
                let mut program = Program::new(seed, slabs, slots, batch, waits);
                for _ in 0..TRIALS {
                    program.trial();
                }
                program.check();
                // A copy from freed memory would be a sticky error.
                assert_eq!(program.fixture.gpu.fake().map_or(0, |fake| fake.sticky()), 0);
                let kernels = program.fixture.gpu.fake().map(|fake| fake.calls("cuLaunchKernel"));
                assert!(kernels.is_none_or(|n| if slots == 0 { n > 800 } else { n > 2400 }), "{kernels:?}");
                for (call, made) in [("cuMemcpyBatchAsync_v2", batch), ("cuStreamWaitValue32_v2", waits)] {
                    let calls = program.fixture.gpu.fake().map(|fake| fake.calls(call));
                    assert!(calls.is_none_or(|n| if made { n > 100 } else { n == 0 }), "{call} {calls:?}");
                }
                program.counts
            })
        });
        programs.map(|p| p.join().unwrap())
    });
    let mut all = BTreeMap::new();
    counts.iter().flatten().for_each(|(case, n)| *all.entry(*case).or_insert(0) += n);
    let total: usize = all.values().sum();
    assert!(total >= 10_000 && CASES.iter().all(|case| all[case] >= 1000), "{all:?}");
}
