//! The stager: a thread, a queue of saves, and the copying of one save.
//!
//! # Safety argument
//! A copy is queued inside [`Source::read`](crate::state::Source::read), under the ticket's `live` lock, from bytes that the
//! source keeps allocated until it is dropped, to a slab whose lease sits in `flying`. Both stay until the mark behind the
//! copy is reached: `flying` is emptied by marks only, the state dict is dropped after `flying` is empty, and when a device
//! failed in a way that leaves copies running (`quiesce` says no) both are forgotten instead of dropped.
#![expect(unsafe_code, reason = "asynchronous copies from sources into slabs; argument above")]

use super::capture::Captured;
use super::fence::Flights;
use crate::completion::Signal;
use crate::device::{CopyQueue, Device};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{Arena, Lease};
use crate::mutant::{self, Mutant};
use crate::plan::{Chunk, From, Plan, Sink};
use crate::state::StateDict;
use crate::sync::{Mutex, lock};
use crate::ticket::{Phase, Ticket};
use std::collections::VecDeque;
use std::mem::forget;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Copies in flight at once: copy engines are first-in first-out, and whatever else wants to cross the bus waits behind them.
const WINDOW: usize = 2;
/// How often the watermark is looked at while copies are in flight.
const POLL: Duration = Duration::from_micros(40);
/// How long a failed device is given to end its copies.
const QUIESCE: Duration = Duration::from_secs(10);
/// How long the stager sleeps when nothing has a deadline.
const IDLE: Duration = Duration::from_secs(3600);

/// A save to be staged.
pub(crate) struct Job {
    pub ticket: Arc<Ticket>,
    pub plan: Arc<Plan>,
    pub state: StateDict<'static>,
    pub captured: Captured,
    pub sink: Arc<dyn Sink>,
}

impl std::fmt::Debug for Stager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stager({:?}, {})", self.arena, self.device.name())
    }
}

/// The stager's queue and what it works with.
pub(crate) struct Stager {
    pub signal: Arc<Signal>,
    pub arena: Arena,
    pub flights: Flights,
    pub device: Arc<dyn Device>,
    jobs: Mutex<VecDeque<Job>>,
    /// One save at a time: the next begins when the one before has ended.
    serial: bool,
    stopped: AtomicBool,
}

impl Stager {
    pub fn new(signal: Arc<Signal>, arena: Arena, device: Arc<dyn Device>, serial: bool) -> Self {
        let (flights, jobs) = (Flights::default(), Mutex::new(VecDeque::new()));
        Self { signal, arena, flights, device, jobs, serial, stopped: AtomicBool::new(false) }
    }

    /// Takes a save, to be staged after those before it.
    pub fn push(&self, job: Job) {
        self.flights.add(job.ticket.clone());
        lock(&self.jobs).push_back(job);
        self.signal.notify();
    }

    /// Takes back the newest save that has not begun to stage.
    pub fn take_waiting(&self) -> Option<Job> {
        lock(&self.jobs).pop_back()
    }

    /// Lets the thread end once its queue is empty.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.signal.notify();
    }

    /// The thread.
    pub fn run(&self) {
        let mut queue = None;
        loop {
            let next = self.wait(|| {
                if self.serial && self.flights.unfinished().iter().any(|t| t.phase() > Phase::Waiting) {
                    return None;
                }
                let job = lock(&self.jobs).pop_front();
                match job {
                    Some(job) => Some(Some(job)),
                    None => self.stopped.load(Ordering::Acquire).then_some(None),
                }
            });
            match next {
                Some(job) => self.stage(job, &mut queue),
                None => return,
            }
        }
    }

    /// Waits for `look`, while saves that are due expire.
    fn wait<T>(&self, mut look: impl FnMut() -> Option<T>) -> T {
        loop {
            let now = Instant::now();
            let until = self.flights.expire(now).unwrap_or(now + IDLE);
            if let Some(found) = self.signal.wait_until(until, &mut look) {
                return found;
            }
        }
    }

    /// Stages one save, and gives everything back however it ends.
    pub fn stage(&self, mut job: Job, queue: &mut Option<Box<dyn CopyQueue>>) {
        let mut flying = VecDeque::new();
        let copied = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            if !job.ticket.enter(Phase::Staging) {
                return Ok(());
            }
            job.plan.check(&job.state)?;
            if queue.is_none() {
                *queue = Some(self.device.queue()?);
            }
            let queue = queue.as_mut().expect("made just above");
            self.copy(&mut job, queue.as_mut(), &mut flying)
        }));
        let copied = copied.unwrap_or_else(|_| Err(Error::internal("a source panicked while it was read")));
        let failure = copied.err();
        let mut known = true;
        if !flying.is_empty() || failure.is_some() {
            known = queue.as_mut().is_none_or(|q| q.quiesce(Instant::now() + QUIESCE));
        }
        if let Some(error) = failure {
            if error.kind() == ErrorKind::Device {
                *queue = None;
            }
            job.ticket.fail(error);
        }
        let Job { ticket, state, captured, sink, .. } = job;
        if known {
            drop((flying, state));
        } else {
            tracing::error!(
                step = ticket.step,
                slabs = flying.len(),
                "a device left copies running; slabs are given up"
            );
            forget((flying, state));
        }
        drop(captured);
        ticket.enter(Phase::Writing);
        self.flights.release(&ticket);
        sink.end();
    }

    /// Copies all chunks, in order, `WINDOW` at a time, and hands over each when its mark is reached.
    fn copy(&self, job: &mut Job, queue: &mut dyn CopyQueue, flying: &mut VecDeque<Flying>) -> Result<()> {
        let (ticket, plan) = (job.ticket.clone(), job.plan.clone());
        let headers: Vec<_> = plan.shards.iter().map(|s| s.header.stamp(ticket.step, ticket.attempt)).collect();
        let mut next = 0;
        loop {
            let reached = queue.reached()?;
            while flying.front().is_some_and(|f| f.mark <= reached) {
                let Some(Flying { chunk, .. }) = flying.pop_front() else { break };
                ticket.bytes_staged.fetch_add(plan.chunks[chunk.index].length as u64, Ordering::Relaxed);
                job.sink.clone().accept(chunk);
            }
            if ticket.failed() || (next == plan.chunks.len() && flying.is_empty()) {
                return Ok(());
            }
            let room = next < plan.chunks.len() && flying.len() < WINDOW;
            if let Some(lease) = room.then(|| self.arena.try_lease()).flatten() {
                flying.push_back(enqueue(job, &plan, next, lease, &headers, queue)?);
                next += 1;
                if mutant::on(Mutant::SourceEarly) && next == plan.chunks.len() {
                    job.state = StateDict::new();
                    self.flights.release(&ticket);
                }
                continue;
            }
            if flying.is_empty() {
                self.wait(|| (self.arena.free() > 0 || ticket.failed()).then_some(()));
            } else {
                self.flights.expire(Instant::now());
                self.signal.wait_until(Instant::now() + POLL, || ticket.failed().then_some(()));
            }
        }
    }
}

/// A chunk whose copies may not have ended.
struct Flying {
    chunk: Chunk,
    mark: u64,
}

/// Queues the copies of one chunk, and the mark behind them.
fn enqueue(
    job: &Job,
    plan: &Plan,
    index: usize,
    mut lease: Lease,
    headers: &[Vec<u8>],
    queue: &mut dyn CopyQueue,
) -> Result<Flying> {
    let chunk = &plan.chunks[index];
    let mut digests = Some(Vec::with_capacity(chunk.segments.len()));
    let (base, mut at) = (lease.as_mut_ptr(), 0);
    let mut copied = Ok(());
    for segment in &plan.segments[chunk.segments.clone()] {
        let to = base.wrapping_add(at);
        at += segment.length;
        let begin = segment.at as usize;
        let ours = match segment.from {
            From::Header => headers[chunk.shard].get(begin..begin + segment.length),
            From::Tensor(tensor) => job.captured.get(tensor).and_then(|b| b.get(begin..begin + segment.length)),
        };
        let digest = match (ours, segment.from) {
            (Some(bytes), _) => {
                // SAFETY: `to` is inside the leased slab, and no queued copy writes this part of it.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
                Ok(Some(Digest::of(bytes)))
            }
            (None, From::Tensor(tensor)) => read(job, tensor, begin, segment.length, to, queue),
            (None, From::Header) => Err(Error::internal("a header is shorter than planned")),
        };
        match digest {
            Ok(Some(digest)) => digests.iter_mut().for_each(|d| d.push(digest)),
            Ok(None) => digests = None,
            Err(error) => {
                copied = Err(error);
                break;
            }
        }
    }
    let tail = at.next_multiple_of(crate::ALIGNMENT) - at;
    // SAFETY: a chunk is no longer than its slab, whose size is a multiple of the alignment; no copy writes beyond `at`.
    unsafe { std::ptr::write_bytes(base.wrapping_add(at), 0, tail) };
    let marked = copied.and_then(|()| queue.mark());
    if marked.is_err() && !queue.quiesce(Instant::now() + QUIESCE) {
        forget(lease);
        return Err(marked.expect_err("checked"));
    }
    Ok(Flying { chunk: Chunk { index, lease, digests }, mark: marked? })
}

/// Queues the copy of a segment from live memory.
fn read(
    job: &Job,
    tensor: usize,
    begin: usize,
    length: usize,
    to: *mut u8,
    queue: &mut dyn CopyQueue,
) -> Result<Option<Digest>> {
    let (name, source) = job.state.tensors.get_index(tensor).map(|(n, t)| (n, &t.source)).expect("checked by the plan");
    let _live = lock(&job.ticket.live);
    if let Some(error) = job.ticket.failure() {
        return Err(error);
    }
    let mut digest = None;
    source.read(&mut |from| {
        // SAFETY: the source hands out all its bytes and keeps them until it is dropped, the slab is leased and its part at
        // `to` has `length` bytes; both stay until the mark behind this copy is reached.
        digest = Some(unsafe { queue.copy(from.wrapping_add(begin), to, length) });
    });
    let nothing = || Error::new(ErrorKind::Invalid, format!("a source did not hand out its bytes tensor={name:?}"));
    digest.unwrap_or_else(|| Err(nothing()))
}
