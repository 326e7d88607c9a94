//! What a save costs the thread that trains: making the state dict, `save` itself, and letting go of the sources.
//!
//! Storage is in memory and states are small, so that the figures are those of the calling thread. `save` is measured with the
//! structure cached, as in every save but the first; the pipeline behind it is idle when it is called.

use ashore::storage::{Memory, Storage};
use ashore::{CheckpointExecutor, HostTensor, Overlap, StateDict};
use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use std::sync::Arc;
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_secs(600);

fn names(tensors: usize) -> Vec<String> {
    (0..tensors).map(|i| format!("model.layers.{}.mlp.experts.{}.weight", i / 64, i % 64)).collect()
}

fn state(names: &[String], data: &Arc<Vec<f32>>) -> StateDict<'static> {
    let mut state = StateDict::with_capacity(names.len());
    for name in names {
        state.tensor(name.as_str(), HostTensor::new(data.clone(), [16, 4])).expect("a good tensor");
    }
    state
}

fn save(c: &mut Criterion) {
    let data = Arc::new(vec![1.0_f32; 64]);
    for tensors in [900, 40_000] {
        let names = names(tensors);
        c.bench_with_input(BenchmarkId::new("state_dict", tensors), &names, |b, names| {
            b.iter_batched(|| (), |()| state(names, &data), BatchSize::PerIteration);
        });
        c.bench_with_input(BenchmarkId::new("release", tensors), &names, |b, names| {
            b.iter_batched(|| state(names, &data), drop, BatchSize::PerIteration);
        });
        c.bench_with_input(BenchmarkId::new("save", tensors), &names, |b, names| {
            let storage: Arc<dyn Storage> = Arc::new(Memory::new());
            let builder =
                CheckpointExecutor::builder("in memory").storage(storage.clone()).arena(64 << 20).chunk(1 << 20);
            let executor = builder.overlap(Overlap::Block).build().expect("an executor");
            let mut step = 0;
            let mut one = || {
                let state = state(names, &data);
                let began = Instant::now();
                let save = executor.save(step, state).expect("a save");
                let took = began.elapsed();
                save.wait(LONG).expect("durable");
                storage.remove(&ashore::id::step_name(step)).expect("removed");
                step += 1;
                took
            };
            one();
            b.iter_custom(|n| (0..n).map(|_| one()).sum());
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = save
}
criterion_main!(benches);
