//! The format on disk, and what the reader refuses.

mod golden;
mod hostile_manifest;
mod manifest_damage;
mod seeds;
mod several;
pub mod tables;
mod template;

use ashore::internal::digest::Digest;
use ashore::internal::format::entries::{FileEntry, SliceEntry, TensorEntry, block_count};
use ashore::internal::format::v1::Manifest;
use ashore::{Attempt, Dtype};

/// Where the data of sample files begins.
const DATA: u64 = 4096;

/// A manifest of tensors with these names, dtypes, shapes and lengths in bytes, side by side in one file.
fn manifest(tensors: &[(&str, Dtype, &[usize], u64)]) -> Manifest {
    let mut end = DATA;
    let tensors: Vec<_> = tensors
        .iter()
        .map(|&(name, dtype, shape, length)| {
            let slice = SliceEntry {
                file: 0,
                offset: end,
                length,
                at: vec![0; shape.len()],
                shape: shape.to_vec(),
                digest: Digest::of(name.as_bytes()),
                blocks: (0..block_count(length) as u64).map(Digest::from_bits).collect(),
            };
            end += length;
            TensorEntry { name: name.into(), dtype, shape: shape.to_vec(), slices: vec![slice] }
        })
        .collect();
    let name = "model.safetensors".into();
    let file = FileEntry { name, length: end, data: DATA, header: Digest::of(b"h"), digest: Digest::of(b"f") };
    Manifest {
        format: "ashore".into(),
        version: 1,
        step: 100,
        attempt: Attempt::parse("67e55044-10b1-426f-9247-bb680e5fe0c8").unwrap(),
        world: 1,
        metadata: [("run".into(), "baseline".into())].into(),
        values: [("epoch".into(), 3.into()), ("rates".into(), serde_json::json!({"lr": [0.1, -0.0]}))].into(),
        files: vec![file],
        tensors,
    }
}

/// Two tensors, one with blocks, one of no dimensions.
fn sample() -> Manifest {
    manifest(&[("bias", Dtype::BF16, &[], 2), ("weight", Dtype::F32, &[3 << 20, 1], 12 << 20)])
}
