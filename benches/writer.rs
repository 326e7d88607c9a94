//! Digests, writes and commits 64 MiB that are already in the arena, until they are durable in a directory
//! under `target`. `ashore bench write` compares the same work with the limit of the disk alone; this bench
//! compares the engines from change to change.

mod fixtures;

use ashore::{CheckpointExecutor, Engine, Overlap};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fixtures::{LONG, names, null, state};
use std::sync::Arc;

const BYTES: usize = 64 << 20;

fn writer(c: &mut Criterion) {
    let mut group = c.benchmark_group("writer");
    group.throughput(Throughput::Bytes(BYTES as u64));
    let (names, data) = (names(4), Arc::new(vec![1.0_f32; BYTES / 16]));
    for engine in [Engine::Pwrite, Engine::Uring] {
        let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
        let builder = CheckpointExecutor::builder(root.path()).arena(128 << 20).overlap(Overlap::Block).keep_last(1);
        let executor = builder.engine(engine).made_device(Arc::new(null::Absent)).build().expect("an executor");
        let mut step = 0;
        let mut one = || {
            step += 1;
            let save = executor.save(step, state(&names, &data)).expect("a save");
            save.wait(LONG).expect("done").committed().expect("durable").durable
        };
        one();
        group.bench_function(BenchmarkId::from_parameter(executor.engine()), |b| {
            b.iter_custom(|n| (0..n).map(|_| one()).sum());
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = writer
}
criterion_main!(benches);
