//! The format on disk: safetensors shards, and the manifest that makes them a checkpoint. `docs/format.md`
//! specifies it.

pub mod header;
pub mod invariants;
pub mod manifest;
pub mod shard;
mod template;
mod unique;
