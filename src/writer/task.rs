//! One save on its way to storage: its attempt, its files, its receipts.

use super::pool::{Pool, Work};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::plan::{Chunk, Plan, Sink};
use crate::settings::IoMode;
use crate::state::StateDict;
use crate::storage::{FileWriting, Storage, Writing};
use crate::ticket::Ticket;
use crossbeam_channel::Sender;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Where a save goes.
#[derive(Clone)]
pub(crate) struct Destination {
    pub storage: Arc<dyn Storage>,
    pub name: String,
    pub overwrite: bool,
}

/// See the module.
pub(crate) struct Task {
    pub ticket: Arc<Ticket>,
    pub plan: Arc<Plan>,
    pub to: Destination,
    /// Digests at `save` of tensors by index in the state dict, to be compared with what was staged.
    pub expected: Vec<(usize, Digest)>,
    pub values: BTreeMap<String, serde_json::Value>,
    pub metadata: BTreeMap<String, serde_json::Value>,
    attempt: OnceLock<Result<Arc<dyn Writing>>>,
    shards: Vec<Shard>,
    /// The digests of the segments of each chunk that was written.
    receipts: Vec<OnceLock<Vec<Digest>>>,
    /// Chunks under way, and one for the stager until it ends.
    present: AtomicUsize,
    /// When the last byte was written, in nanoseconds since the save began.
    last_byte: AtomicU64,
    work: Sender<Work>,
    ended: Sender<Arc<Task>>,
}

struct Shard {
    file: OnceLock<Result<Arc<dyn FileWriting>>>,
    chunks_left: AtomicUsize,
    sealed: OnceLock<()>,
}

impl Task {
    /// A task over `pool`; `ended` gets it when its last chunk is done. Takes values and metadata out of `state`.
    pub fn new(
        (ticket, plan): (Arc<Ticket>, Arc<Plan>),
        to: Destination,
        state: &mut StateDict<'_>,
        expected: Vec<(usize, Digest)>,
        pool: &Pool,
        ended: Sender<Arc<Task>>,
    ) -> Self {
        let shard = |chunks| Shard { file: OnceLock::new(), chunks_left: AtomicUsize::new(chunks), sealed: OnceLock::new() };
        Self {
            to,
            expected,
            values: std::mem::take(&mut state.values),
            metadata: std::mem::take(&mut state.metadata),
            attempt: OnceLock::new(),
            shards: plan.shards.iter().map(|s| shard(s.chunks.len())).collect(),
            receipts: plan.chunks.iter().map(|_| OnceLock::new()).collect(),
            present: AtomicUsize::new(1),
            last_byte: AtomicU64::new(0),
            work: pool.sender(),
            ended,
            ticket,
            plan,
        }
    }

    /// The attempt, begun by the first who asks.
    pub fn attempt(&self) -> Result<Arc<dyn Writing>> {
        let Destination { storage, name, overwrite } = &self.to;
        self.attempt.get_or_init(|| storage.begin(name, self.ticket.attempt, *overwrite)).clone()
    }

    /// The attempt, if it was begun.
    pub fn begun(&self) -> Option<Arc<dyn Writing>> {
        self.attempt.get()?.as_ref().ok().cloned()
    }

    fn file(&self, shard: usize) -> Result<Arc<dyn FileWriting>> {
        let plan = &self.plan.shards[shard];
        let file = &self.shards[shard].file;
        file.get_or_init(|| self.attempt()?.create(&plan.name, plan.length)).clone()
    }

    /// Writes a chunk, digested once, and sends its slab home.
    pub(super) fn write(&self, chunk: Chunk) -> Result<()> {
        if self.ticket.failed() {
            return Ok(());
        }
        let Chunk { index, lease, digests } = chunk;
        let plan = &self.plan.chunks[index];
        let bytes = lease.bytes().get(..plan.length.next_multiple_of(crate::ALIGNMENT));
        let bytes = bytes.ok_or_else(|| Error::internal("a chunk is longer than its slab"))?;
        let digests = digests.unwrap_or_else(|| {
            let mut at = 0;
            self.plan.segments[plan.segments.clone()]
                .iter()
                .map(|segment| {
                    at += segment.length;
                    Digest::of(&bytes[at - segment.length..at])
                })
                .collect()
        });
        self.file(plan.shard)?.write_at(plan.offset, bytes)?;
        drop(lease);
        self.receipts[index].set(digests).map_err(|_| Error::internal("a chunk was written twice"))?;
        self.ticket.bytes_written.fetch_add(plan.length as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Seals the shard of chunk `index` when it was the last.
    pub(super) fn seal_if_last(&self, index: usize) -> Result<()> {
        let number = self.plan.chunks[index].shard;
        let shard = &self.shards[number];
        if shard.chunks_left.fetch_sub(1, Ordering::AcqRel) != 1 || self.ticket.failed() {
            return Ok(());
        }
        let nanos = u64::try_from(self.ticket.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.last_byte.fetch_max(nanos, Ordering::AcqRel);
        self.file(number)?.seal()?;
        shard.sealed.set(()).map_err(|()| Error::internal("a shard was sealed twice"))
    }

    /// One chunk, or the stager, is done with this save.
    pub(super) fn leave(self: &Arc<Self>) {
        if self.present.fetch_sub(1, Ordering::AcqRel) == 1 {
            // Received by the committer, which lives until every task is ended; without it there is nobody left to tell.
            let _ = self.ended.send(self.clone());
        }
    }

    /// The digests of all segments in the order of the plan.
    ///
    /// # Errors
    /// `Internal` unless exactly what was planned was written and every shard sealed.
    pub fn receipts(&self) -> Result<Vec<Digest>> {
        let mut all = Vec::with_capacity(self.plan.segments.len());
        for (receipt, plan) in self.receipts.iter().zip(&self.plan.chunks) {
            let digests = receipt.get().filter(|d| d.len() == plan.segments.len());
            all.extend(digests.ok_or_else(|| Error::internal("a chunk that was planned was not written"))?);
        }
        let written = self.ticket.bytes_written.load(Ordering::Acquire);
        if written != self.plan.length || self.shards.iter().any(|s| s.sealed.get().is_none()) {
            return Err(Error::internal(format!("not all bytes are sealed planned={} written={written}", self.plan.length)));
        }
        Ok(all)
    }

    /// How bytes reached the medium: buffered if any file was.
    pub fn mode(&self) -> IoMode {
        let direct = |s: &Shard| matches!(s.file.get(), Some(Ok(file)) if file.mode() == IoMode::Direct);
        if self.shards.iter().all(direct) { IoMode::Direct } else { IoMode::Buffered }
    }

    /// When the last byte had been written, since the save began.
    pub fn last_byte(&self) -> Duration {
        Duration::from_nanos(self.last_byte.load(Ordering::Acquire))
    }
}

impl Sink for Task {
    fn accept(self: Arc<Self>, chunk: Chunk) {
        #[cfg(feature = "mutants")]
        let chunk = if crate::mutant::on(crate::mutant::Mutant::SlabEarly) { chunk.early() } else { chunk };
        self.present.fetch_add(1, Ordering::AcqRel);
        if let Err(refused) = self.work.send((self.clone(), chunk)) {
            drop(refused);
            self.ticket.fail(Error::new(ErrorKind::Cancelled, "the writers have stopped"));
            self.leave();
        }
    }

    fn end(self: Arc<Self>) {
        self.leave();
    }
}
