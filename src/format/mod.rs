//! What is on disk: safetensors shards, and the manifest that makes them a checkpoint. `docs/format.md` is the specification.

mod header;
pub mod invariants;
pub mod manifest;
pub mod shard;
mod template;
mod unique;
