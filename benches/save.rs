//! The cost of a save for the training thread: making the state dict, `save` itself, and releasing the
//! sources.
//!
//! Storage is in memory and states are small, so that the figures are those of the calling thread. `save`
//! runs with the structure cached, as in every save except the first, and with an idle pipeline.

mod fixtures;

use ashore::storage::{Memory, Storage};
use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use fixtures::{LONG, builder, names, state};
use std::sync::Arc;
use std::time::Instant;

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
            let executor = builder(storage.clone()).build().expect("an executor");
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
