//! The prediction that files of a save have the same bytes as files of an older step.
//!
//! A file is predicted to be unchanged when all its tensors are predicted to be unchanged. Its tensors are
//! staged and digested like all others, and a chunk whose digests equal those of the older step is not
//! written. If all chunks of a file are unchanged, the file of the older step is adopted. Otherwise the
//! chunks that were not written are copied from the older file.

use super::save::{Plan, Segment, SegmentSource};
use crate::digest::Digest;
use crate::mutant::{self, Mutant};
use std::sync::Arc;

/// The digests and the prediction from an older step of the same plan.
#[derive(Debug)]
pub(crate) struct Prediction {
    /// The digest of every segment, in the order of the plan.
    pub digests: Arc<[Digest]>,
    /// For each shard, whether it is predicted to be unchanged.
    pub shards: Vec<bool>,
}

impl Prediction {
    /// Whether `digests`, of the segments of the chunk `index`, are as predicted. The header is not compared,
    /// because it names the step.
    pub fn agrees(&self, plan: &Plan, index: usize, digests: &[Digest]) -> bool {
        let Some(older) = self.of(plan, index) else { return false };
        let segments = &plan.segments[plan.chunks[index].segments.clone()];
        let same = |(segment, (old, new)): (&Segment, (&Digest, &Digest))| {
            segment.source == SegmentSource::Header || old == new || mutant::on(Mutant::StaleChunk)
        };
        digests.len() == older.len() && segments.iter().zip(older.iter().zip(digests)).all(same)
    }

    /// Returns the older digests of the segments of the chunk `index`, if its shard is predicted to be
    /// unchanged.
    pub fn of(&self, plan: &Plan, index: usize) -> Option<&[Digest]> {
        let chunk = &plan.chunks[index];
        let predicted = self.shards.get(chunk.shard).copied().unwrap_or(false);
        self.digests.get(chunk.segments.clone()).filter(|_| predicted)
    }
}
