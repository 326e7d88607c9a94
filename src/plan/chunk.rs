//! The one value that stager and writer exchange.

use crate::digest::Digest;
use crate::memory::Lease;
use std::sync::Arc;

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

#[cfg(feature = "mutants")]
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
