//! Opens a step and reads it completely, with every byte checked, from storage in memory. This is the cost of
//! a restore without the disk.

mod fixtures;

use ashore::storage::{Memory, Storage};
use ashore::{Checkpoint, Targets};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use fixtures::{LONG, builder, names, state};
use std::sync::Arc;

const BYTES: usize = 64 << 20;

fn restore(c: &mut Criterion) {
    for tensors in [4, 4_096, 40_000] {
        let (names, data) = (names(tensors), Arc::new(vec![1.0_f32; BYTES / 4 / tensors]));
        let storage: Arc<dyn Storage> = Arc::new(Memory::new());
        let executor = builder(storage.clone()).build().expect("an executor");
        executor.save(1, state(&names, &data)).expect("a save").wait(LONG).expect("durable");
        let open = || Checkpoint::from_storage(storage.clone(), &ashore::id::step_name(1)).expect("a checkpoint");

        let mut group = c.benchmark_group("restore");
        group.throughput(Throughput::Elements(tensors as u64));
        group.bench_function(BenchmarkId::new("open", tensors), |b| b.iter(open));
        group.throughput(Throughput::Bytes((data.len() * 4 * tensors) as u64));
        let checkpoint = open();
        let mut to: Vec<Vec<f32>> = names.iter().map(|_| vec![1.0; data.len()]).collect();
        group.bench_function(BenchmarkId::new("read", tensors), |b| {
            b.iter(|| {
                let targets = names.iter().zip(&mut to).fold(Targets::new(), |all, (name, to)| all.elements(name, to));
                checkpoint.read_into(targets).expect("restored");
            });
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = restore
}
criterion_main!(benches);
