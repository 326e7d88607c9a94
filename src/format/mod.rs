//! The format on disk: safetensors shards, the manifest that makes them a checkpoint, and the tables of
//! tensors, files and rows. `docs/format.md` specifies the format.

pub mod agreement;
mod cells;
pub mod columns;
pub mod entries;
pub mod header;
pub mod index;
pub mod invariants;
pub mod manifest;
mod page;
mod part;
pub mod seal;
pub mod shard;
pub mod split;
pub mod table;
pub mod template;
pub(crate) mod tiling;
pub(crate) mod unique;
pub mod v1;
