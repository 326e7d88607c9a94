//! What the stages of a save exchange: chunks from stager to writers, receipts from writers to commit, and the request that
//! all of them look at.

use super::save::Plan;
use crate::digest::Digest;
use crate::error::Result;
use crate::memory::Lease;
use crate::settings::IoMode;
use crate::ticket::Ticket;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// One save as it was asked for.
#[derive(Debug)]
pub(crate) struct Request {
    pub ticket: Arc<Ticket>,
    pub plan: Arc<Plan>,
    /// The directory name of the step.
    pub name: String,
    pub overwrite: bool,
    pub values: BTreeMap<String, serde_json::Value>,
    pub metadata: BTreeMap<String, serde_json::Value>,
    /// Digests at `save` of tensors by index in the state dict, to be compared with what was staged.
    pub expected: Vec<(usize, Digest)>,
    /// The same of tensors of devices, which digest them themselves: known once they are staged.
    pub later: Later,
}

/// Digests of tensors, by their index in the state dict.
type Known = Vec<(usize, Digest)>;

/// What a device will have found out when a save is staged.
pub(crate) struct Later(pub Box<dyn Fn() -> Result<Known> + Send + Sync>);

impl std::fmt::Debug for Later {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Later")
    }
}

/// What the writers acknowledge when everything that was planned is written and sealed.
#[derive(Debug)]
pub(crate) struct Receipts {
    /// The digest of every segment, in the order of the plan.
    pub digests: Vec<Digest>,
    /// The digest of every chunk, in the order of the plan.
    pub chunks: Vec<Digest>,
    /// How bytes reached the medium: buffered if any file was.
    pub mode: IoMode,
    /// When the last byte was written, since the save began.
    pub last_byte: Duration,
}

/// A staged chunk on its way to a writer.
#[derive(Debug)]
pub(crate) struct Chunk {
    /// Its index in the plan, which knows shard, offset and length.
    pub index: usize,
    /// The slab that holds it. It goes home when the chunk is written.
    pub lease: Lease,
    /// The digest of each segment; None where the bytes arrived without passing through a processor.
    pub digests: Option<Vec<Digest>>,
}

#[cfg(mutants)]
impl Chunk {
    pub fn early(mut self) -> Self {
        self.lease.go_home_early();
        self
    }
}

/// Where a save's chunks go.
pub(crate) trait Sink: Send + Sync {
    /// Takes a staged chunk. Never blocks: there are no more chunks than slabs.
    fn accept(self: Arc<Self>, chunk: Chunk);

    /// No more chunks will come, because all have or because the save failed. Called once.
    fn end(self: Arc<Self>);
}
