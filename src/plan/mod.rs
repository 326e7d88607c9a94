//! The plan: the file and offset of every byte of a save, computed before anything is copied.
//!
//! A plan depends on the structure of a state dict alone (names, dtypes, shapes, in order), so it is kept as
//! long as the structure stays the same. Values that change from save to save (step, attempt, digests) have
//! fixed offsets in it.

mod chunk;
mod save;

pub(crate) use chunk::{Chunk, DeferredDigests, Receipts, Request, Sink};
pub(crate) use save::{Plan, Planned, Segment, SegmentSource, Shape, Shard};
