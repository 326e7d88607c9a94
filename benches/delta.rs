//! The cost of coding and applying a delta, for each byte of the model, on one core, next to a copy of the
//! same bytes in the same run. The model has 64 MiB of bf16 weights. One element in 100 has changed by a unit
//! in the last place, as after one step at a learning rate of 1e-6; or one element in 10 has changed.

use ashore::internal::delta::{Numbers, apply, check, encode};
use ashore::internal::digest::Digest;
use ashore::{Dtype, Form};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};

const BYTES: usize = 64 << 20;

/// Returns weights, and the same weights after an update of one element in `share`, at random places.
fn weights(share: u64) -> (Vec<u8>, Vec<u8>) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let old: Vec<u8> = (0..BYTES / 2).flat_map(|_| (0x3c00 | next() as u16 & 0x83ff).to_le_bytes()).collect();
    let mut new = old.clone();
    for element in new.chunks_exact_mut(2) {
        if next() % share == 0 {
            element[0] ^= 1;
        }
    }
    (old, new)
}

fn delta(c: &mut Criterion) {
    let numbers = Numbers::of(Dtype::BF16);
    for share in [100, 10] {
        let (old, new) = weights(share);
        let digest = Digest::of(&old);
        let patch = encode(&old, &new, numbers, Form::Packed).expect("equal lengths").expect("a change");
        assert_eq!(check(&old, digest, numbers, &patch).expect("sound"), Digest::of(&new));
        let mut memory = old.clone();
        let mut group = c.benchmark_group(format!("delta/1 in {share}"));
        group.throughput(Throughput::Bytes(BYTES as u64));
        group.bench_function("memcpy", |b| b.iter(|| memory.copy_from_slice(&new)));
        group.bench_function("encode", |b| b.iter(|| encode(&old, &new, numbers, Form::Packed).expect("a patch")));
        group.bench_function("check", |b| b.iter(|| check(&old, digest, numbers, &patch).expect("sound")));
        // Applied again and again, because the values of the elements do not affect the time.
        group.bench_function("apply", |b| b.iter(|| apply(&mut memory, numbers, &patch).expect("checked")));
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = delta
}
criterion_main!(benches);
