//! The plan: the file and offset of every byte of a save, computed before anything is copied.
//!
//! A plan depends only on the structure of a state dict (names, dtypes, shapes, in order). So it is kept as
//! long as the structure stays the same. Values that change from save to save (step, attempt, digests) have
//! fixed offsets in the plan.
//!
//! Several ranks plan together: each rank describes its tensors ([`Description`]), the descriptions are
//! merged ([`Merge`]), and each rank plans its [`Share`].

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
