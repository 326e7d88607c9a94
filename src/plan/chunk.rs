//! Data that the stages of a save exchange: chunks from the stager to the writers, receipts from the writers
//! to the committer, and the request that all of them read.

use super::save::Plan;
use crate::digest::Digest;
use crate::error::Result;
use crate::format::template::FilledFile;
use crate::memory::Lease;
use crate::settings::IoMode;
use crate::ticket::Ticket;
use std::any::Any;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;

/// A save as the program requested it.
#[derive(Debug)]
pub(crate) struct Request {
    pub ticket: Arc<Ticket>,
    pub plan: Arc<Plan>,
    /// The directory name of the step.
    pub name: String,
    /// The directory that contains the checkpoint. None: the root.
    pub parent: Option<PathBuf>,
    /// The storage in that directory, if the program gave one for this save. It is an `Arc<dyn Storage>`, a
    /// type that this layer does not know.
    pub brought: Option<Arc<dyn Any + Send + Sync>>,
    pub overwrite: bool,
    /// The session in which one process saves, and its generation in the root, if tiers are behind the root.
    /// A save of several ranks has the session of the ranks.
    pub session: Option<(Uuid, u64)>,
    pub values: BTreeMap<String, serde_json::Value>,
    pub metadata: BTreeMap<String, serde_json::Value>,
    /// The values of this rank only.
    pub rank_values: BTreeMap<String, serde_json::Value>,
    /// Digests of tensors taken at `save`, by index in the state dict, to compare with the staged bytes.
    pub expected: Vec<(usize, Digest)>,
    /// Digests of tensors in host memory that other ranks write, by the number of the replica. None if this
    /// save does not compare replicas.
    pub replicas: Option<Vec<(u32, Digest)>>,
    /// Expected digests of device tensors. The device computes them, so they are known when the save is
    /// staged.
    pub device_digests: DeferredDigests,
}

/// Digests of tensors, by their index in the state dict.
type Known = Vec<(usize, Digest)>;

/// Digests that a device has computed when a save is staged.
pub(crate) struct DeferredDigests(pub Box<dyn Fn() -> Result<Known> + Send + Sync>);

impl std::fmt::Debug for DeferredDigests {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Later")
    }
}

/// The writers' result, once every planned byte is written and every shard is sealed.
#[derive(Debug)]
pub(crate) struct Receipts {
    /// The digest of every segment, in the order of the plan.
    pub digests: Vec<Digest>,
    /// The digest of every chunk, in the order of the plan.
    pub chunks: Vec<Digest>,
    /// How each shard was made.
    pub made: Vec<Made>,
    /// How bytes reached the medium. Buffered if any file was buffered.
    pub mode: IoMode,
    /// When the last byte was written, from the start of the save.
    pub last_byte: Duration,
}

/// How a shard was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Made {
    /// All changed chunks were written. The rest, if any, was copied from an older file.
    Written,
    /// Nothing had changed, and the storage refused to share the older file. So the file was copied.
    Refused,
    /// The shard shares blocks with the older file, and has its own header.
    Cloned,
    /// The shard is the older file, described by this entry.
    Linked(FilledFile),
}

/// A staged chunk on its way to a writer.
#[derive(Debug)]
pub(crate) struct Chunk {
    /// Its index in the plan, which gives shard, offset and length.
    pub index: usize,
    /// The slab that holds it, returned to the arena when the chunk is written.
    pub lease: Lease,
    /// The digest of each segment. None if a device copied the bytes, so that no CPU read them.
    pub digests: Option<Vec<Digest>>,
}

#[cfg(mutants)]
impl Chunk {
    pub fn early(mut self) -> Self {
        self.lease.return_early();
        self
    }
}

/// Receives a save's chunks.
pub(crate) trait Sink: Send + Sync {
    /// Accepts a staged chunk. Never blocks: there are no more chunks than slabs.
    fn accept(self: Arc<Self>, chunk: Chunk);

    /// Ends the chunks, because all were staged or because the save failed. Called once.
    fn end(self: Arc<Self>);
}
