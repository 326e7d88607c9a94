//! What is on disk: safetensors shards, and the manifest that makes them a checkpoint. `docs/format.md` is the specification.

pub mod manifest;
