//! The plan: the file and offset of every byte of a save, computed before anything is copied.
//!
//! A plan depends on the structure of a state dict alone (names, dtypes, shapes, in order), so it is kept as
//! long as the structure stays the same. Values that change from save to save (step, attempt, digests) have
//! fixed offsets in it.
//!
//! Several ranks plan together: each describes what it holds ([`Description`]), the descriptions are put
//! together ([`Merge`]), and each rank plans its [`Share`].

mod boxes;
mod chunk;
mod cut;
mod dedup;
mod prediction;
mod save;
#[cfg(test)]
mod tests;
mod whole;

pub use boxes::{BoxOf, Described, Description};
pub(crate) use chunk::{Chunk, DeferredDigests, Made, Receipts, Request, Sink};
pub use dedup::{Merge, share_out};
pub(crate) use prediction::Prediction;
pub(crate) use save::{ChunkPlan, Plan, Planned, Segment, SegmentSource, Shape, Shard};
pub use whole::{Comparison, Part, Replica, Share, Whole, WholeTensor, Written};
