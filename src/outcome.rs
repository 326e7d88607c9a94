//! The progress of a save, and how it ended.

use crate::id::Attempt;
use crate::settings::IoMode;
use std::path::PathBuf;
use std::time::Duration;

/// How a save ended without failing.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// The step is durable.
    Durable(Committed),
    /// The save never began ([`Overlap::Skip`](crate::Overlap::Skip)): the save of step `by` was unfinished.
    Skipped {
        /// The step whose save was unfinished.
        by: u64,
    },
    /// The save never began ([`Overlap::Latest`](crate::Overlap::Latest)): the save of step `by` replaced it.
    Superseded {
        /// The step that replaced it.
        by: u64,
    },
}

impl Outcome {
    /// Returns the committed step, if the save became durable.
    pub fn committed(self) -> Option<Committed> {
        match self {
            Outcome::Durable(committed) => Some(committed),
            _ => None,
        }
    }
}

/// A durable step and its measurements. Times count from the call of `save`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Committed {
    /// The step.
    pub step: u64,
    /// The attempt that was published.
    pub attempt: Attempt,
    /// The directory of the step.
    pub path: PathBuf,
    /// Tensor bytes.
    pub bytes: u64,
    /// How long `save` and fences blocked their callers for this save.
    pub blocked: Duration,
    /// When the last read of a live source ended; equal to `durable` if kernels of a fence still ran then.
    pub staged: Duration,
    /// When the step became durable.
    pub durable: Duration,
    /// Time from the last byte written until durable: fsyncs of files, manifest, publish, fsyncs of
    /// directories.
    pub tail: Duration,
    /// How bytes reached the medium.
    pub mode: IoMode,
    /// Bytes of shards that were written, headers included.
    pub written_bytes: u64,
    /// Bytes of shards that are clones of files of an older step: they share the blocks of the medium.
    pub cloned_bytes: u64,
    /// Bytes of shards that are hard links to files of an older step.
    pub linked_bytes: u64,
    /// Number of unchanged shards that were written because the file system refused to clone or link them.
    pub refused_files: usize,
    /// Tensors that stayed live until the fence, instead of being captured at `save`, because the budget was
    /// used up.
    pub over_budget: usize,
    /// Number of late copies: chunks that a fence copied on the GPU. The save read these copies instead of
    /// the tensors.
    pub late_chunks: usize,
}

/// A step that is also durable in a tier behind the first one.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Promoted {
    /// The name of the tier.
    pub tier: String,
    /// The root of the tier.
    pub root: PathBuf,
    /// The step.
    pub step: u64,
    /// The attempt, the same as in the first tier.
    pub attempt: Attempt,
    /// The path of the copy.
    pub path: PathBuf,
    /// The total length of the files of the copy, in bytes.
    pub bytes: u64,
}

/// The progress of a save.
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
    /// The save waits for earlier saves.
    Waiting,
    /// The stager reads sources.
    Staging,
    /// Every chunk is copied, and writers write them. Sources are free when
    /// [`Save::staged`](crate::Save::staged) resolves.
    Writing,
    /// Only with several ranks: the files of this rank are durable, and rank 0 decides how the save ends.
    Promised,
    /// Every byte is written; the committer publishes the step.
    Publishing,
    /// The save has ended, with or without an error.
    Ended,
}
