//! The task of one save: its attempt, its files, its receipts.

use super::older::{Older, OlderFile};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::guard::{dropped, guarded};
use crate::memory::{AlignedBuffer, Slab};
use crate::plan::{Chunk, Made, Receipts, Request, Segment, Sink};
use crate::settings::IoMode;
use crate::state::StateDict;
use crate::storage::{Adopted, FileWriting, Writing};
use crate::sync::{Mutex, lock};
use crate::telemetry::Work as Traced;
use crossbeam_channel::Sender;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// A message to the writers: a chunk and its save.
pub(crate) type Work = (Arc<Task>, Chunk);

/// Begins the attempt of a save in storage.
pub(crate) trait Begin: Send + Sync + std::fmt::Debug {
    fn begin(&self, request: &Request) -> Result<Arc<dyn Writing>>;
}

/// The state that a save keeps for a retry.
#[derive(Debug)]
pub(crate) struct RetryState {
    pub state: StateDict<'static>,
    /// How many retries are left.
    pub left: u32,
    /// How long the next retry waits.
    pub backoff: Duration,
}

impl Drop for RetryState {
    fn drop(&mut self) {
        dropped(std::mem::take(&mut self.state));
    }
}

/// A save in the hands of the writers. See the module.
#[derive(Debug)]
pub(crate) struct Task {
    pub request: Request,
    kept: Mutex<Option<RetryState>>,
    older: Option<Older>,
    destination: Arc<dyn Begin>,
    attempt: OnceLock<Result<Arc<dyn Writing>>>,
    shards: Vec<Shard>,
    /// The receipt of each chunk that was written.
    receipts: Vec<OnceLock<Receipt>>,
    /// Number of chunks that the writers have not finished, plus one until the stager ends the save.
    present: AtomicUsize,
    /// When the last byte was written, in nanoseconds since the save began.
    last_byte: AtomicU64,
    work: Sender<Work>,
    ended: Sender<Arc<Task>>,
}

#[derive(Debug)]
struct Receipt {
    segments: Vec<Digest>,
    whole: Digest,
    /// True if the chunk is as predicted and was not written.
    unchanged: bool,
}

#[derive(Debug)]
struct Shard {
    file: OnceLock<Result<Arc<dyn FileWriting>>>,
    chunks_left: AtomicUsize,
    /// Set once the shard is durable.
    sealed: OnceLock<Made>,
}

impl Task {
    /// Makes a task whose chunks go to the writers through `work`. `ended` receives the task when its last
    /// chunk is done.
    pub fn new(
        request: Request,
        kept: Option<RetryState>,
        older: Option<Older>,
        destination: Arc<dyn Begin>,
        work: Sender<Work>,
        ended: Sender<Arc<Task>>,
    ) -> Self {
        let shard =
            |chunks| Shard { file: OnceLock::new(), chunks_left: AtomicUsize::new(chunks), sealed: OnceLock::new() };
        Self {
            kept: Mutex::new(kept),
            older,
            destination,
            attempt: OnceLock::new(),
            shards: request.plan.shards.iter().map(|s| shard(s.chunks.len())).collect(),
            receipts: request.plan.chunks.iter().map(|_| OnceLock::new()).collect(),
            present: AtomicUsize::new(1),
            last_byte: AtomicU64::new(0),
            work,
            ended,
            request,
        }
    }

    /// Makes the task of another attempt at the same save. That attempt writes everything.
    pub fn again(&self, request: Request, kept: RetryState) -> Self {
        Self::new(request, Some(kept), None, self.destination.clone(), self.work.clone(), self.ended.clone())
    }

    /// Returns the attempt. The first call begins it.
    fn attempt(&self) -> Result<Arc<dyn Writing>> {
        // A panic is kept like any error: the storage may have created files before it.
        let begin = || {
            guarded("the storage panicked when an attempt was begun", || {
                let attempt = self.destination.begin(&self.request)?;
                attempt.expires(self.request.ticket.deadline);
                Ok(attempt)
            })
        };
        self.attempt.get_or_init(begin).clone()
    }

    /// The older files from which the attempt may adopt files.
    pub fn older(&self) -> Option<&Older> {
        self.older.as_ref()
    }

    /// Returns the attempt, if it has begun.
    pub fn begun(&self) -> Option<Arc<dyn Writing>> {
        self.attempt.get()?.as_ref().ok().cloned()
    }

    /// Takes the state kept for a retry, if the save may be retried.
    pub fn take_kept(&self) -> Option<RetryState> {
        lock(&self.kept).take()
    }

    /// Whether the begin of the attempt failed in a way that may have left files.
    pub fn begin_failed(&self) -> bool {
        matches!(self.attempt.get(), Some(Err(error)) if error.kind() != ErrorKind::Conflict)
    }

    fn file(&self, shard: usize) -> Result<Arc<dyn FileWriting>> {
        let plan = &self.request.plan.shards[shard];
        let file = &self.shards[shard].file;
        file.get_or_init(|| self.attempt()?.create(&plan.name, plan.length)).clone()
    }

    /// Digests a chunk once, writes it, and hands its slab to the storage, which returns the slab.
    pub(super) fn write(&self, chunk: Chunk) -> Result<()> {
        if self.request.ticket.failed() {
            return Ok(());
        }
        let Chunk { index, lease, digests } = chunk;
        let plan = &self.request.plan.chunks[index];
        let slab = Slab::new(lease, plan.length.next_multiple_of(crate::ALIGNMENT))?;
        let bytes = slab.as_ref();
        let planned = &self.request.plan.segments[plan.segments.clone()];
        let times = &self.request.ticket.times;
        let (arrived, digested) = (Instant::now(), digests.is_none());
        let segments = digests.unwrap_or_else(|| {
            let mut at = 0;
            let digest = |segment: &Segment| {
                at += segment.length;
                Digest::of(&bytes[at - segment.length..at])
            };
            planned.iter().map(digest).collect()
        });
        let began = Instant::now();
        if digested {
            times.digest.add(began - arrived);
        }
        let predicted = |older: &Older| older.prediction.agrees(&self.request.plan, index, &segments);
        let unchanged = self.older.as_ref().is_some_and(predicted);
        let ticket = &self.request.ticket;
        if ticket.is_traced() && digested {
            ticket.trace_part(Traced::Digest, (arrived, began), Some(index), plan.length as u64);
        }
        if !unchanged {
            times.write_at.first(began.saturating_duration_since(ticket.began));
            self.file(plan.shard)?.write_slab(plan.offset, slab)?;
            let ended = Instant::now();
            times.write.add(ended - began);
            if ticket.is_traced() {
                ticket.trace_part(Traced::Write, (began, ended), Some(index), plan.length as u64);
            }
        }
        let whole = Digest::concat(segments.iter().zip(planned).map(|(digest, s)| (*digest, s.length as u64)));
        self.receipts[index]
            .set(Receipt { segments, whole, unchanged })
            .map_err(|_| Error::internal("a chunk was written twice"))?;
        self.request.ticket.bytes_written.fetch_add(plan.length as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Seals the shard of chunk `index` if this was the shard's last chunk.
    pub(super) fn seal_if_last(&self, index: usize) -> Result<()> {
        let number = self.request.plan.chunks[index].shard;
        let shard = &self.shards[number];
        if shard.chunks_left.fetch_sub(1, Ordering::AcqRel) != 1 || self.request.ticket.failed() {
            return Ok(());
        }
        let nanos = u64::try_from(self.request.ticket.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.last_byte.fetch_max(nanos, Ordering::AcqRel);
        self.request.ticket.times.written.last(Duration::from_nanos(nanos));
        let began = self.request.ticket.traced_now();
        let made = self.make_of_older(number)?;
        if matches!(made, Made::Written | Made::Refused) {
            self.file(number)?.seal()?;
        }
        if let Some(began) = began {
            self.request.ticket.trace_part(Traced::Seal, (began, Instant::now()), Some(number), 0);
        }
        shard.sealed.set(made).map_err(|_| Error::internal("a shard was sealed twice"))
    }

    /// Makes the part of a shard whose chunks were not written, out of the older file.
    fn make_of_older(&self, number: usize) -> Result<Made> {
        let Some(older) = &self.older else { return Ok(Made::Written) };
        let chunks = self.request.plan.shards[number].chunks.clone();
        let unchanged = |chunk: &usize| self.receipts[*chunk].get().is_some_and(|receipt| receipt.unchanged);
        let missing: Vec<usize> = chunks.clone().filter(unchanged).collect();
        if missing.is_empty() {
            return Ok(Made::Written);
        }
        let older = older.file(number)?;
        // After any error here, the next save does not use this file again: it writes a new one.
        let made = self.make_of(older, number, missing);
        made.inspect_err(|_| older.damaged.store(true, Ordering::Release))
    }

    fn make_of(&self, older: &OlderFile, number: usize, missing: Vec<usize>) -> Result<Made> {
        let chunks = &self.request.plan.shards[number].chunks;
        let mut made = Made::Written;
        if missing.len() == chunks.len() {
            made = match older.adopt(&self.request, number, self.attempt()?.as_ref())? {
                Adopted::Cloned => return Ok(Made::Cloned),
                Adopted::Linked => return Ok(Made::Linked(older.filled)),
                Adopted::Refused(_) => Made::Refused,
            };
        }
        let mut bytes = AlignedBuffer::new(0);
        for chunk in missing {
            if let Some(why) = self.request.ticket.failure() {
                return Err(why);
            }
            let receipt = self.receipts[chunk].get().ok_or_else(|| Error::internal("a chunk was not digested"))?;
            let to = self.file(number)?;
            older.copy(&self.request, &self.request.plan.chunks[chunk], &receipt.segments, to.as_ref(), &mut bytes)?;
        }
        Ok(made)
    }

    /// Records that one chunk, or the stager, is done with this save. The last one hands the save to the
    /// committer.
    pub(super) fn leave(self: &Arc<Self>) {
        if self.present.fetch_sub(1, Ordering::AcqRel) == 1 {
            // The committer lives until every task has ended. If the committer is gone, no receiver is left
            // to tell.
            let _ = self.ended.send(self.clone());
        }
    }

    /// Returns the receipts of the written bytes.
    ///
    /// # Errors
    /// `Internal` unless exactly the planned bytes were written and every shard is sealed.
    pub fn receipts(&self) -> Result<Receipts> {
        let Request { ticket, plan, .. } = &self.request;
        let mut digests = Vec::with_capacity(plan.segments.len());
        let mut chunks = Vec::with_capacity(plan.chunks.len());
        for (receipt, chunk) in self.receipts.iter().zip(&plan.chunks) {
            let written = receipt.get().filter(|receipt| receipt.segments.len() == chunk.segments.len());
            let written = written.ok_or_else(|| Error::internal("a chunk that was planned was not written"))?;
            digests.extend_from_slice(&written.segments);
            chunks.push(written.whole);
        }
        let written = ticket.bytes_written.load(Ordering::Acquire);
        if written != plan.length || self.shards.iter().any(|s| s.sealed.get().is_none()) {
            return Err(Error::internal(format!("not all bytes are sealed planned={} written={written}", plan.length)));
        }
        // An adopted shard was not opened.
        let direct = |s: &Shard| match s.file.get() {
            Some(file) => matches!(file, Ok(file) if file.mode() == IoMode::Direct),
            None => true,
        };
        let mode = if self.shards.iter().all(direct) { IoMode::Direct } else { IoMode::Buffered };
        let made = self.shards.iter().filter_map(|shard| shard.sealed.get().copied()).collect();
        Ok(Receipts {
            digests,
            chunks,
            made,
            mode,
            last_byte: Duration::from_nanos(self.last_byte.load(Ordering::Acquire)),
        })
    }
}

/// Drops files and attempts, which are code of the storage, one by one: a second panic during the unwinding
/// of the first would abort the process. Any thread can be the last owner.
impl Drop for Task {
    fn drop(&mut self) {
        self.shards.iter_mut().for_each(|shard| dropped(shard.file.take()));
        dropped(self.attempt.take());
    }
}

impl Sink for Task {
    fn accept(self: Arc<Self>, chunk: Chunk) {
        #[cfg(mutants)]
        let chunk = if crate::mutant::on(crate::mutant::Mutant::SlabEarly) { chunk.early() } else { chunk };
        self.present.fetch_add(1, Ordering::AcqRel);
        if let Err(refused) = self.work.send((self.clone(), chunk)) {
            drop(refused);
            self.request.ticket.fail(Error::new(ErrorKind::Cancelled, "the writers have stopped"));
            self.leave();
        }
    }

    fn end(self: Arc<Self>) {
        self.leave();
    }
}
