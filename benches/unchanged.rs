//! The cost of frozen tensors, and the cost of looking for them in a run that has none.
//!
//! `cargo bench --bench unchanged [-- DIR [MIB]]` saves states of MIB MiB (1024 by default) into DIR, by
//! default a new directory in the system's temporary directory. In each round, the executors under comparison
//! save one after the other, and the bench prints a line for each. The last lines are medians of the rounds.

mod fixtures;

use ashore::internal::digest::Digest;
use ashore::{CheckpointExecutor, Committed, Overlap, StateDict};
use fixtures::LONG;
use rustix::time::{ClockId, clock_gettime};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

const ROUNDS: usize = 7;

/// One tensor in `PART` is trained.
const PART: usize = 20;

struct Model(Vec<Arc<Vec<f32>>>);

impl Model {
    /// Creates `tensors` tensors of `bytes` bytes in total.
    fn new(tensors: usize, bytes: usize) -> Self {
        let len = bytes / tensors / 4;
        Self((0..tensors).map(|i| Arc::new((0..len).map(|j| (i * 7 + j) as f32).collect())).collect())
    }

    /// Changes the tensors for which `trains` is true.
    fn train(&mut self, step: u64, trains: impl Fn(usize) -> bool) {
        for (_, tensor) in self.0.iter_mut().enumerate().filter(|(i, _)| trains(*i)) {
            *tensor = Arc::new(tensor.iter().map(|weight| weight + step as f32).collect());
        }
    }

    fn state(&self, frozen: impl Fn(usize) -> bool) -> StateDict<'static> {
        let mut state = StateDict::new();
        for (i, tensor) in self.0.iter().enumerate() {
            let name = format!("layers.{i:03}.weight");
            state.tensor(&name, tensor.clone()).expect("a tensor");
            if frozen(i) {
                state.frozen(&name).expect("a declaration");
            }
        }
        state
    }
}

/// Seconds of CPU time of this process.
fn cpu() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn executor(root: &Path, links: bool) -> CheckpointExecutor {
    let builder = CheckpointExecutor::builder(root).overlap(Overlap::Block).files(4).keep_last(2);
    builder.links(links).build().expect("an executor")
}

fn save(executor: &CheckpointExecutor, step: u64, state: StateDict<'static>) -> (Committed, f64) {
    let began = cpu();
    let saved = executor.save(step, state).expect("a save").wait(LONG).expect("durable");
    (saved.committed().expect("durable"), cpu() - began)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The last 19 of 20 parts are frozen. One executor knows this, the other writes everything.
fn frozen(root: &Path, bytes: usize) {
    let (on, off) = (executor(&root.join("on"), true), executor(&root.join("off"), false));
    let mut model = Model::new(300, bytes);
    let still = |i: usize| !i.is_multiple_of(PART);
    let (mut shared, mut full) = (Vec::new(), Vec::new());
    for round in 0..=ROUNDS as u64 {
        model.train(round, |i| !still(i));
        let began = Instant::now();
        let digests = model.0.iter().filter(|tensor| Digest::of(bytemuck::cast_slice(tensor)) != Digest::EMPTY).count();
        let digest = began.elapsed();
        assert_eq!(digests, 300);
        let (with, with_cpu) = save(&on, round, model.state(still));
        let (without, without_cpu) = save(&off, round, model.state(still));
        if round == 0 {
            continue;
        }
        println!(
            "frozen round={round} written={:.4} of full, durable {:?} beside {:?}, digests alone {digest:?}, \
             cpu {with_cpu:.3} beside {without_cpu:.3} s",
            with.written_bytes as f64 / without.written_bytes as f64,
            with.durable,
            without.durable,
        );
        shared.push((with, with_cpu, digest));
        full.push((without, without_cpu));
    }
    let seconds = |durations: Vec<Duration>| median(durations.iter().map(Duration::as_secs_f64).collect());
    let durable = seconds(shared.iter().map(|(saved, ..)| saved.durable).collect());
    let whole = seconds(full.iter().map(|(saved, _)| saved.durable).collect());
    let digest = seconds(shared.iter().map(|(.., digest)| *digest).collect());
    let spent = median(shared.iter().map(|(_, cpu, _)| *cpu).collect());
    let (saved, ..) = &shared[0];
    let gigabytes = bytes as f64 / 1e9;
    println!("frozen: cloned {} linked {} refused {}", saved.cloned_bytes, saved.linked_bytes, saved.refused_files);
    println!("frozen: durable {durable:.4} s, goal {:.4} s, full {whole:.4} s", 0.05 * whole + digest + 0.02);
    println!(
        "frozen: cpu {:.4} s/GB, of a full save {:.4}",
        spent / gigabytes,
        median(full.iter().map(|(_, cpu)| *cpu).collect()) / gigabytes
    );
}

/// Nothing is frozen. One executor looks for frozen tensors, the other does not.
fn trained(root: &Path, bytes: usize) {
    let (on, off) = (executor(&root.join("looks"), true), executor(&root.join("does not"), false));
    let mut model = Model::new(300, bytes);
    let (mut durable, mut spent) = (Vec::new(), Vec::new());
    for round in 0..=2 * ROUNDS as u64 {
        model.train(round, |_| true);
        let (with, with_cpu, without, without_cpu);
        if round % 2 == 0 {
            (with, with_cpu) = save(&on, round, model.state(|_| false));
            (without, without_cpu) = save(&off, round, model.state(|_| false));
        } else {
            (without, without_cpu) = save(&off, round, model.state(|_| false));
            (with, with_cpu) = save(&on, round, model.state(|_| false));
        }
        if round > 0 {
            durable.push(with.durable.as_secs_f64() / without.durable.as_secs_f64());
            spent.push(with_cpu / without_cpu);
        }
    }
    println!("trained: durable {:.3} of a run that does not look, cpu {:.3}", median(durable), median(spent));
}

/// A LoRA layout without any declaration of frozen tensors. Prints the bytes that 200 saves write, in full
/// saves.
fn learned(root: &Path) {
    let executor =
        CheckpointExecutor::builder(root.join("learned")).files(8).keep_last(2).build().expect("an executor");
    let mut model = Model::new(300, 300 << 17);
    let (mut written, full) = (0, 300_u64 << 17);
    for step in 1..=200 {
        model.train(step, |i| i.is_multiple_of(PART));
        written += save(&executor, step, model.state(|_| false)).0.written_bytes;
    }
    println!("learned: 200 saves wrote {:.2} full saves", written as f64 / full as f64);
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|argument| !argument.starts_with("--"));
    let given = arguments.next().map(PathBuf::from);
    let bytes = arguments.next().map_or(1024, |mib| mib.parse().expect("a number of MiB")) << 20;
    let temporary = tempfile::tempdir_in(given.unwrap_or_else(std::env::temp_dir)).expect("a directory");
    learned(temporary.path());
    frozen(temporary.path(), bytes);
    trained(temporary.path(), bytes);
}
