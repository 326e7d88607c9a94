//! The format on disk: safetensors shards, and the manifest that makes them a checkpoint. `docs/format.md`
//! specifies it.

pub mod agreement;
pub mod entries;
pub mod header;
pub mod invariants;
pub mod manifest;
pub mod seal;
pub mod shard;
pub mod template;
mod unique;
