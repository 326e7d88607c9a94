//! Stages one save. The safety argument of `enqueue` says how long sources and slabs are kept.

use super::deferred::{DeferredRelease, KeptForRelease};
use super::device_state::DeviceState;
use super::enqueue::enqueue;
use super::in_flight::Due;
use super::in_flight_chunk::{InFlightChunk, Origin};
use super::job::Job;
use super::kernel_set::Told;
use super::next_action::{Action, Arrived, View, next_action};
use super::stager::{POLL_INTERVAL, QUIESCE_TIMEOUT, Stager};
use crate::device::CopyTime;
use crate::error::{Error, ErrorKind, Result};
use crate::format::shard::Stamp;
use crate::guard::{dropped, guarded};
use crate::mutant::{self, Mutant};
use crate::outcome::Phase;
use crate::plan::{Chunk, SegmentSource};
use crate::state::StateDict;
use crate::telemetry::Work;
use crate::ticket::Ticket;
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

/// How long the stager waits for a device before it expires due saves again.
const WAIT_SLICE: Duration = Duration::from_millis(5);

impl Stager {
    /// Stages one save, and releases its slabs and sources, whatever the result.
    pub(super) fn stage(&self, mut job: Job, device_state: &mut DeviceState) {
        let mut chunks = VecDeque::new();
        let span = tracing::info_span!("stage", step = job.ticket.step);
        let _entered = span.enter();
        let began = job.ticket.traced_now();
        let copied = guarded("a source panicked while it was read", || {
            if !job.ticket.enter(Phase::Staging) {
                return Ok(());
            }
            job.ticket.times.stage_at.first(job.ticket.began.elapsed());
            if job.ticket.sources.is_live() {
                job.plan.check(&job.state)?;
            }
            self.prepare(&job, device_state)?;
            self.copy(&mut job, device_state, &mut chunks)
        });
        let failed = copied.as_ref().err().map(Error::kind);
        if let Err(error) = copied {
            job.ticket.fail(error);
        }
        let mut ended = (chunks.is_empty() && failed.is_none()) || self.quiesce(device_state);
        while job.borrowed && !ended {
            // The program may free borrowed memory once this save is released, so this wait has no limit.
            ended = self.quiesce(device_state);
        }
        let Job { ticket, state, captured, sink, late_copy, allocation, queued, .. } = job;
        drop(captured);
        ticket.enter(Phase::Writing);
        ticket.trace(Work::Stage, began);
        // Kernels of a fence may still read tensors that have left the device, and gather kernels may still
        // read their list of pieces.
        let late_copy = late_copy.inspect(|late_copy| late_copy.end()).filter(|l| !ended || l.pending());
        if late_copy.is_none() {
            // A fence must still find a late copy that is pending: streams that follow its kernels need not
            // wait for copies of later saves.
            self.forget(&ticket);
        }
        let kept = KeptForRelease { state, allocation, queued, late_copy };
        if !ended {
            let (step, slabs) = (ticket.step, chunks.len());
            tracing::error!(step, slabs, "copies from a device are late; their slabs stay in use");
            self.saves.release(&ticket);
            device_state.deferred.push(DeferredRelease::BehindCopies { kept, chunks });
        } else {
            // No copy writes the slabs any more, and kernels do not use them.
            dropped(chunks);
            if kept.is_free() {
                kept.release();
                self.saves.release(&ticket);
            } else {
                device_state.deferred.push(DeferredRelease::BehindKernels { kept, ticket });
            }
        }
        if failed == Some(ErrorKind::Device) || device_state.broken {
            // Only this queue could tell when deferred copies end. `lose` drops the queue and leaks the
            // memory that these copies use.
            device_state.lose(&self.saves);
        }
        sink.end();
    }

    /// Opens a copy queue if there is none, and makes it wait for the work that wrote the tensors.
    fn prepare(&self, job: &Job, device_state: &mut DeviceState) -> Result<()> {
        device_state.recover(&self.saves);
        if device_state.broken {
            device_state.lose(&self.saves);
        }
        if device_state.queue.is_none() {
            let queue = device_state.queue.insert(self.device.queue()?);
            if self.batch {
                queue.batch();
            }
        }
        if let Some(queue) = &mut device_state.queue {
            queue.measure(job.ticket.is_traced());
        }
        if let (Some(dependency), Some(queue)) = (&job.behind, &mut device_state.queue)
            && !mutant::on(Mutant::ProducerWait)
        {
            queue.wait(dependency)?;
        }
        Ok(())
    }

    /// Waits until no copy runs any more. Expires due saves meanwhile. Returns false after
    /// [`QUIESCE_TIMEOUT`], or if the device panics.
    fn quiesce(&self, device_state: &mut DeviceState) -> bool {
        let Some(queue) = &mut device_state.queue else { return true };
        let deadline = Instant::now() + QUIESCE_TIMEOUT;
        loop {
            let now = Instant::now();
            self.saves.expire(now);
            let slice = deadline.min(now + WAIT_SLICE);
            match guarded("a device panicked", || Ok(queue.quiesce(slice))) {
                Ok(true) => return true,
                Ok(false) if now < deadline => {}
                _ => return false,
            }
        }
    }

    /// Copies all chunks in order, and hands over each chunk when its completion event is reached.
    fn copy(&self, job: &mut Job, device_state: &mut DeviceState, chunks: &mut VecDeque<InFlightChunk>) -> Result<()> {
        let stamp = Stamp::new(job.ticket.step, job.ticket.attempt());
        let (due, waker) = (self.saves.expire(Instant::now()), Waker::from(self.signal.clone()));
        let told = Told::new();
        let mut copying =
            Copying { stager: self, job, device_state, chunks, stamp, waker, due, next: 0, reached: 0, told };
        loop {
            let mut view = copying.look()?;
            let mut action = next_action(&view);
            if matches!(action, Action::Queue { .. }) {
                // Ask sources only if the answer decides, because they may answer slowly.
                view.ready = ready(copying.job, copying.next, &copying.waker)?;
                action = next_action(&view);
            }
            match action {
                Action::HandOver => copying.hand_over(),
                Action::CopyAgain => copying.copy_again()?,
                Action::Discard => drop(copying.chunks.pop_front()),
                Action::ReleaseSources => copying.release_sources(),
                Action::Queue { live } => copying.queue(live)?,
                Action::End => return Ok(()),
                Action::AwaitF => {
                    // A lost device never tells F.
                    copying.job.late_copy.iter().try_for_each(|late_copy| late_copy.check())?;
                    copying.await_copies();
                }
                Action::AwaitCopies => copying.await_copies(),
                Action::AwaitNews => copying.await_news(),
            }
        }
    }
}

/// One save whose chunks are being copied.
struct Copying<'a> {
    stager: &'a Stager,
    job: &'a mut Job,
    device_state: &'a mut DeviceState,
    /// The chunks in flight, oldest first.
    chunks: &'a mut VecDeque<InFlightChunk>,
    stamp: Stamp,
    /// Wakes the stager when bytes of a source are ready.
    waker: Waker,
    due: Due,
    /// The first chunk that was never queued.
    next: usize,
    /// The last completion event that is known to be reached.
    reached: u64,
    /// F of each device that had told it at the last `look`.
    told: Told,
}

impl Copying<'_> {
    /// Collects the state of the save, and expires due saves. Does not ask sources whether bytes are ready.
    fn look(&mut self) -> Result<View> {
        let now = Instant::now();
        if self.stager.saves.is_due(&self.due, now) {
            self.due = self.stager.saves.expire(now);
        }
        if self.device_state.broken {
            return Err(Error::new(ErrorKind::Device, "the queue of copies panicked"));
        }
        let queue = self.device_state.queue.as_mut().ok_or_else(|| Error::internal("a stager without a queue"))?;
        if self.chunks.front().is_none_or(|chunk| chunk.event > self.reached) {
            self.reached = queue.reached()?;
        }
        // Read F after the completion events. If a device tells F later, these copies were made before F.
        let late_copy = self.job.late_copy.as_ref();
        self.told = late_copy.map(|late_copy| late_copy.told()).unwrap_or_default();
        let oldest = self.chunks.front().filter(|chunk| chunk.event <= self.reached);
        let arrived = oldest.map(|oldest| Arrived { chunk: oldest.chunk.index, first: oldest.first(&self.told) });
        let (ticket, job) = (&self.job.ticket, &self.job);
        Ok(View {
            failed: ticket.failed(),
            arrived,
            latched: !self.told.is_empty() && self.told.iter().all(Option::is_some),
            frozen: late_copy.is_some_and(|late_copy| late_copy.frozen()),
            next: self.next,
            chunks: job.plan.chunks.len(),
            in_flight: self.chunks.len(),
            live_in_flight: self.chunks.iter().any(InFlightChunk::is_live),
            needed: ticket.needed.load(Ordering::Acquire),
            slab: self.stager.arena.free() > 0,
            ready: true,
            sources: !job.state.is_empty(),
            release_requested: ticket.sources.release_is_requested(),
            deferred: !self.device_state.deferred.is_empty(),
        })
    }

    /// Queues the next chunk. The parts of devices that have told F come from slots. Does nothing if no slab
    /// is free, or if live memory was frozen meanwhile; the next `look` sees that.
    fn queue(&mut self, live: bool) -> Result<()> {
        let late_copy = self.job.late_copy.clone();
        // Kept until the chunk is queued, because `freeze` waits for a decided chunk.
        let decided = late_copy.as_ref().filter(|_| live).map(|late_copy| late_copy.decide());
        if matches!(decided, Some(None)) {
            return Ok(());
        }
        let Some(lease) = self.stager.arena.try_lease() else { return Ok(()) };
        let origins = late_copy.as_ref().map(|late_copy| late_copy.origins(self.next, &self.told)).unwrap_or_default();
        self.enqueue(InFlightChunk {
            chunk: Chunk { index: self.next, lease, digests: None },
            event: u64::MAX,
            origins,
            queued: None,
        })?;
        self.next += 1;
        self.job.ticket.advance();
        if mutant::on(Mutant::SourceEarly) && self.next == self.job.plan.chunks.len() {
            self.job.state = StateDict::new();
            self.job.ticket.release();
        }
        Ok(())
    }

    /// Copies parts of the oldest chunk again, from their slots into the same slab, which keeps the other
    /// parts.
    fn copy_again(&mut self) -> Result<()> {
        let Some(in_flight) = self.chunks.pop_front() else { return Ok(()) };
        self.trace(&in_flight);
        let InFlightChunk { chunk, origins, .. } = in_flight;
        let written = |(origin, told): (Origin, &Option<usize>)| match (origin, told) {
            (Origin::Live, Some(first)) if *first <= chunk.index => Origin::Slot,
            _ => Origin::Nothing,
        };
        let origins = origins.into_iter().zip(&self.told).map(written).collect();
        self.enqueue(InFlightChunk { chunk, event: u64::MAX, origins, queued: None })
    }

    fn enqueue(&mut self, chunk: InFlightChunk) -> Result<()> {
        let queue = self.device_state.queue.as_mut().ok_or_else(|| Error::internal("a stager without a queue"))?;
        // The chunk is in flight before its first copy is queued, so that no failure returns the slab too
        // early.
        self.chunks.push_back(chunk);
        let chunk = self.chunks.back_mut().ok_or_else(|| Error::internal("no chunk although one was pushed"))?;
        let began = self.job.ticket.traced_now();
        let queued = enqueue(self.job, &self.stamp, queue.as_mut(), chunk);
        chunk.queued = began.map(|began| (began, Instant::now()));
        queued
    }

    /// Adds a chunk that has arrived to the trace of the save, if there is one.
    fn trace(&mut self, chunk: &InFlightChunk) {
        let (Some(queued), Some(queue)) = (chunk.queued, &mut self.device_state.queue) else { return };
        let (ticket, number) = (&self.job.ticket, Some(chunk.chunk.index));
        let bytes = self.job.plan.chunks[chunk.chunk.index].length as u64;
        let times = queue.times(chunk.event);
        let work = if times.is_empty() { Work::Copy } else { Work::Queue };
        ticket.trace_part(work, queued, number, bytes);
        for CopyTime { ordinal, begin, end, error } in times {
            ticket.trace_part(Work::DeviceCopy { ordinal, error }, (begin, end), number, bytes);
        }
    }

    fn hand_over(&mut self) {
        let Some(in_flight) = self.chunks.pop_front() else { return };
        self.trace(&in_flight);
        let InFlightChunk { chunk, origins, .. } = in_flight;
        let (job, ticket) = (&self.job, &self.job.ticket);
        if let (Some(scratch), Some(late_copy)) = (self.stager.scratch.get(), &job.late_copy) {
            if origins.contains(&Origin::Slot) {
                ticket.late_chunks.fetch_add(1, Ordering::Relaxed);
            }
            scratch.hand_over(late_copy, chunk.index);
        }
        ticket.bytes_staged.fetch_add(job.plan.chunks[chunk.index].length as u64, Ordering::Relaxed);
        job.sink.clone().accept(chunk);
    }

    fn release_sources(&mut self) {
        dropped(std::mem::take(&mut self.job.state));
        self.job.ticket.sources.set_dropped();
    }

    /// Sleeps for [`POLL_INTERVAL`], or until the save has news.
    fn await_copies(&mut self) {
        let starved = self.starved();
        let news = || has_news(&self.job.ticket).then_some(());
        self.stager.signal.wait_until(Instant::now() + POLL_INTERVAL, news);
        self.stager.recover(self.device_state);
        self.count(starved);
    }

    /// The time at which the stager began to wait, if it waits for a slab.
    fn starved(&self) -> Option<Instant> {
        let wanted = self.next < self.job.plan.chunks.len() && self.stager.arena.free() == 0;
        wanted.then(Instant::now)
    }

    fn count(&self, starved: Option<Instant>) {
        starved.into_iter().for_each(|began| self.job.ticket.times.arena.add(began.elapsed()));
    }

    /// Sleeps until the save has news, or a slab and the next chunk's bytes are available.
    fn await_news(&mut self) {
        let starved = self.starved();
        let Self { stager, job, device_state, next, waker, .. } = self;
        let bytes = || !matches!(ready(job, *next, waker), Ok(false));
        let news = || has_news(&job.ticket) || (stager.arena.free() > 0 && bytes());
        stager.wait(device_state, || news().then_some(()));
        self.count(starved);
    }
}

/// True if all bytes of the chunk `index` can be read.
fn ready(job: &Job, index: usize, waker: &Waker) -> Result<bool> {
    let Some(chunk) = job.plan.chunks.get(index) else { return Ok(true) };
    for segment in &job.plan.segments[chunk.segments.clone()] {
        let SegmentSource::Tensor(tensor) = segment.source else { continue };
        // After the sources are dropped, the remaining chunks are read from slots.
        let Some((_, tensor)) = job.state.tensors.get_index(tensor).filter(|(_, tensor)| !tensor.is_ready()) else {
            continue;
        };
        match tensor.source.poll_ready(segment.at..segment.at + segment.length as u64, waker) {
            Poll::Ready(there) => there?,
            Poll::Pending => return Ok(false),
        }
    }
    Ok(true)
}

fn has_news(ticket: &Ticket) -> bool {
    ticket.failed() || ticket.sources.release_is_requested()
}
