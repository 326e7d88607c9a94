//! The first save of a structure. In it, `save` plans every file offset, header and manifest, and its cost
//! must be linear.

mod fixtures;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fixtures::{LONG, builder, names, null, state};
use std::sync::Arc;
use std::time::Instant;

fn plan(c: &mut Criterion) {
    let mut group = c.benchmark_group("plan");
    let data = Arc::new(vec![1.0_f32; 16]);
    for tensors in [1_000, 10_000, 100_000] {
        let names = names(tensors);
        let executor = builder(Arc::new(null::Sink::default())).build().expect("an executor");
        let mut step = 0;
        let mut one = || {
            // Each save leaves out a different tensor, so that it cannot reuse the plan of the last save.
            let without = step as usize % names.len();
            let kept = [&names[..without], &names[without + 1..]].concat();
            let state = state(&kept, &data);
            let began = Instant::now();
            let save = executor.save(step, state).expect("a save");
            let took = began.elapsed();
            save.wait(LONG).expect("done");
            step += 1;
            took
        };
        group.throughput(Throughput::Elements(tensors as u64));
        group.bench_function(BenchmarkId::from_parameter(tensors), |b| b.iter_custom(|n| (0..n).map(|_| one()).sum()));
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = plan
}
criterion_main!(benches);
