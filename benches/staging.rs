//! Copies and digests 64 MiB of host memory into the arena, until the stager has dropped the sources. The
//! staged chunks are dropped.

mod fixtures;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fixtures::{LONG, builder, names, null, state};
use std::sync::Arc;

const BYTES: usize = 64 << 20;

fn staging(c: &mut Criterion) {
    let mut group = c.benchmark_group("staging");
    group.throughput(Throughput::Bytes(BYTES as u64));
    for tensors in [4, 4_096, 65_536] {
        let (names, data) = (names(tensors), Arc::new(vec![1.0_f32; BYTES / 4 / tensors]));
        let executor = builder(Arc::new(null::Sink::default())).build().expect("an executor");
        let mut step = 0;
        let mut one = || {
            step += 1;
            let save = executor.save(step, state(&names, &data)).expect("a save");
            save.wait(LONG).expect("done").committed().expect("durable").staged
        };
        one();
        group.bench_function(BenchmarkId::new("tensors", tensors), |b| b.iter_custom(|n| (0..n).map(|_| one()).sum()));
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = staging
}
criterion_main!(benches);
