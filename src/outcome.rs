//! What a program learns of a save: how far it is, and how it ended.

use crate::id::Attempt;
use crate::settings::IoMode;
use std::path::PathBuf;
use std::time::Duration;

/// How a save ended, when it did not fail.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// The checkpoint is durable.
    Durable(Committed),
    /// Not begun, by [`Overlap::Skip`](crate::Overlap::Skip): the save of step `by` was unfinished.
    Skipped {
        /// The step that was in the way.
        by: u64,
    },
    /// Not begun, by [`Overlap::Latest`](crate::Overlap::Latest): step `by` took its place.
    Superseded {
        /// The step that took its place.
        by: u64,
    },
}

impl Outcome {
    /// The commit, if there was one.
    pub fn committed(self) -> Option<Committed> {
        match self {
            Outcome::Durable(committed) => Some(committed),
            _ => None,
        }
    }
}

/// A durable checkpoint, and what it cost. Times count from the call of `save`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Committed {
    /// The step.
    pub step: u64,
    /// The attempt that was published.
    pub attempt: Attempt,
    /// Where it is.
    pub path: PathBuf,
    /// Bytes of tensors.
    pub bytes: u64,
    /// How long `save` and fences held up their callers for this save.
    pub blocked: Duration,
    /// When no live source was read any more; the same as `durable` where kernels of a fence still ran then.
    pub staged: Duration,
    /// When the commit was durable.
    pub durable: Duration,
    /// From the last byte written to durable: syncs of files, manifest, publish, syncs of directories.
    pub tail: Duration,
    /// How bytes reached the medium.
    pub mode: IoMode,
    /// Tensors that were to be captured at `save` by default and were left to the fence, because the budget was used up.
    pub over_budget: usize,
    /// Chunks that a fence copied aside on the GPU, and that the save read from there instead of from the tensors.
    pub late_chunks: usize,
}

/// How far a save is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// The phase.
    pub phase: Phase,
    /// Bytes of tensors to save.
    pub bytes: u64,
    /// Bytes staged so far, file headers included.
    pub staged: u64,
    /// Bytes written so far, file headers included.
    pub written: u64,
}

/// The phase of a save.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Phase {
    /// Behind earlier saves.
    Waiting,
    /// Sources are being read.
    Staging,
    /// All is copied, and bytes are on their way. Sources are free when [`Save::staged`](crate::Save::staged) resolves.
    Writing,
    /// Everything is written; the name is being given.
    Publishing,
    /// Ended, well or not.
    Ended,
}
