//! The stager: a thread, a queue of saves, and the staging of one save. How long sources and slabs are kept is in the safety argument of
//! `enqueue`.

use super::capture::Captured;
use super::capture_pool::Allocation;
use super::device_state::{DeferredRelease, DeviceState, is_over};
use super::enqueue::{InFlightChunk, enqueue};
use super::fence::InFlightSaves;
use super::late_copy::LateCopy;
use super::scratch::Scratch;
use crate::call_thread::CallThread;
use crate::completion::Signal;
use crate::device::{Device, Point, Queued};
use crate::error::{Error, ErrorKind, Result};
use crate::format::shard::Stamp;
use crate::guard::{dropped, guarded};
use crate::memory::Arena;
use crate::mutant::{self, Mutant};
use crate::plan::{Chunk, From, Plan, Sink};
use crate::state::{DeviceStream, StateDict};
use crate::sync::{Mutex, lock};
use crate::ticket::{Phase, Ticket};
use crate::tries;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

/// Copies in flight at once: copy engines are first-in first-out, and whatever else wants to cross the bus waits behind them.
const WINDOW: usize = 2;
/// How often the watermark is looked at while copies are in flight.
const POLL: Duration = Duration::from_micros(40);
/// How often what is deferred is looked at while there is nothing else to do.
const LOOK: Duration = Duration::from_micros(500);
/// How long a failed device is given to end its copies.
const QUIESCE: Duration = Duration::from_secs(10);
/// How long a device is waited for at a time, while saves may fall due.
const SLICE: Duration = Duration::from_millis(5);

/// A save to be staged.
pub(crate) struct Job {
    pub ticket: Arc<Ticket>,
    pub plan: Arc<Plan>,
    pub state: StateDict<'static>,
    pub captured: Captured,
    /// Behind the work that wrote tensors of devices.
    pub behind: Option<Point>,
    /// How its chunks can be put together and copied late on the device.
    pub late_copy: Option<Arc<LateCopy>>,
    /// What the device did at `save`.
    pub allocation: Option<Allocation>,
    pub queued: Vec<Arc<dyn Queued>>,
    /// The sources are only lent: they may be freed as soon as the save is released.
    pub borrowed: bool,
    pub sink: Arc<dyn Sink>,
}

impl Job {
    /// Whether a tensor is in the memory of this device.
    pub fn lies_on(&self, tensor: usize, ordinal: u32) -> bool {
        let tensor = self.state.tensors.get_index(tensor);
        tensor.and_then(|(_, tensor)| tensor.place.stream()).is_some_and(|stream| stream.ordinal == ordinal)
    }
}

impl std::fmt::Debug for Stager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stager({:?}, {})", self.arena, self.device.name())
    }
}

/// A save that can be copied late, and whether its sources are borrowed.
type Copyable = (Arc<Ticket>, Arc<LateCopy>, bool);

/// The stager's queue and what it works with.
pub(crate) struct Stager {
    pub signal: Arc<Signal>,
    pub calls: Arc<CallThread>,
    pub arena: Arena,
    pub saves: InFlightSaves,
    pub device: Arc<dyn Device>,
    /// Where late copies are made, if the device can do that.
    pub scratch: Option<Scratch>,
    /// Saves that can be, until they are staged.
    late_copies: Mutex<Vec<Copyable>>,
    jobs: Mutex<VecDeque<Job>>,
    /// What is left of saves that will not be staged, while a device may still read it.
    left: Mutex<Vec<DeferredRelease>>,
    /// How many saves may be under way at once; the others wait and can be taken back.
    at_most: Option<usize>,
    /// Copies of a chunk are queued in one call.
    batch: bool,
    stopped: AtomicBool,
    /// The thread has ended, or is about to; written under the lock of `left`.
    ended: AtomicBool,
}

impl Stager {
    pub fn new(
        signal: Arc<Signal>,
        arena: Arena,
        device: Arc<dyn Device>,
        scratch: Option<Scratch>,
        at_most: Option<usize>,
        batch: bool,
    ) -> Self {
        let (saves, jobs, late_copies) = (InFlightSaves::default(), Mutex::new(VecDeque::new()), Mutex::default());
        let calls = Arc::new(CallThread::new(signal.clone()));
        let (left, stopped, ended) = (Mutex::default(), AtomicBool::new(false), AtomicBool::new(false));
        Self { signal, calls, arena, saves, device, scratch, late_copies, jobs, left, at_most, batch, stopped, ended }
    }

    /// Takes a save, to be staged after those before it.
    pub fn push(&self, job: Job) {
        if let Some(late_copy) = &job.late_copy {
            let mut late_copies = lock(&self.late_copies);
            late_copies.retain(|(ticket, ..)| !ticket.staged.is_complete());
            late_copies.push((job.ticket.clone(), late_copy.clone(), job.borrowed));
        }
        self.saves.add(job.ticket.clone());
        lock(&self.jobs).push_back(job);
        self.signal.notify();
    }

    /// Takes back the newest save that has not begun to stage.
    pub fn take_waiting(&self) -> Option<Job> {
        lock(&self.jobs).pop_back()
    }

    /// Drops the sources of a save that will not be staged, when no device reads them any more.
    pub fn discard(&self, job: Job) {
        let Job { ticket, state, allocation, queued, late_copy, .. } = job;
        // Kernels of a fence may be to come. Where there are none, there will be none.
        let late_copy = late_copy.filter(|late_copy| late_copy.withdraw());
        if late_copy.is_none() {
            self.forget(&ticket);
        }
        self.park(DeferredRelease {
            state,
            allocation,
            queued,
            ticket: Some(ticket),
            in_flight: VecDeque::new(),
            late: false,
            late_copy,
        });
    }

    /// No fence has to know of this save any more.
    fn forget(&self, ticket: &Arc<Ticket>) {
        lock(&self.late_copies).retain(|(t, ..)| !Arc::ptr_eq(t, ticket));
    }

    /// Ends a save that did not become a job, and drops its sources when no device reads them any more.
    pub fn refuse(
        &self,
        ticket: Arc<Ticket>,
        why: Error,
        state: StateDict<'static>,
        allocation: Option<Allocation>,
        queued: Vec<Arc<dyn Queued>>,
    ) {
        ticket.observed.store(true, Ordering::Release);
        ticket.fail(why.clone());
        self.saves.add(ticket.clone());
        // There is no handle yet that anything could wait for.
        drop(ticket.finish(Err(why)));
        self.leave(state, allocation, queued, ticket);
    }

    fn leave(
        &self,
        state: StateDict<'static>,
        allocation: Option<Allocation>,
        queued: Vec<Arc<dyn Queued>>,
        ticket: Arc<Ticket>,
    ) {
        let (in_flight, late, ticket, late_copy) = (VecDeque::new(), false, Some(ticket), None);
        self.park(DeferredRelease { state, allocation, queued, ticket, in_flight, late, late_copy });
    }

    fn park(&self, deferred: DeferredRelease) {
        if deferred.late_copy.is_none() && deferred.queued.iter().all(is_over) {
            let DeferredRelease { state, allocation, ticket, .. } = deferred;
            dropped((state, allocation));
            ticket.iter().for_each(|ticket| self.saves.release(ticket));
        } else {
            let mut left = lock(&self.left);
            if self.ended.load(Ordering::Acquire) {
                drop(left);
                let mut device_state = DeviceState::default();
                device_state.deferred.push(deferred);
                return self.clear(device_state);
            }
            left.push(deferred);
            drop(left);
            self.signal.notify();
        }
    }

    /// See [`CheckpointExecutor::fence_on`](crate::CheckpointExecutor::fence_on).
    pub fn fence_on(&self, streams: &[DeviceStream], patience: Duration) -> Result<()> {
        let late_copy = |ticket: &Arc<Ticket>, deadline| match (&self.scratch, self.late_copy(ticket)) {
            // What is lent is fenced once, at the end of its scope; until then streams wait for it as if there were no scratch.
            (Some(scratch), Some((late_copy, lent))) if !lent || late_copy.launched() => {
                scratch.fence(ticket, &late_copy, streams, deadline)
            }
            _ => Ok(false),
        };
        self.saves.fence_on(patience, late_copy, || self.saves.order(self.device.as_ref(), streams))
    }

    fn late_copy(&self, ticket: &Arc<Ticket>) -> Option<(Arc<LateCopy>, bool)> {
        let late_copies = lock(&self.late_copies);
        late_copies.iter().find(|(t, ..)| Arc::ptr_eq(t, ticket)).map(|(_, late_copy, lent)| (late_copy.clone(), *lent))
    }

    /// Waits until borrowed sources of these saves are dropped, with `streams` and those that made them ordered after whatever still
    /// reads them.
    pub fn freeze_on(&self, tickets: &[Arc<Ticket>], streams: &[DeviceStream], patience: Duration) -> Result<()> {
        let with = |owners: &[DeviceStream<'static>]| {
            let mut all = [streams, owners].concat();
            all.sort_unstable();
            all.dedup();
            all
        };
        let late_copy = |ticket: &Arc<Ticket>, deadline| match (&self.scratch, self.late_copy(ticket)) {
            (Some(scratch), Some((late_copy, _))) => {
                scratch.freeze(ticket, &late_copy, &with(&ticket.streams), deadline)
            }
            _ => Ok(false),
        };
        let order = || {
            let owners: Vec<_> = tickets.iter().flat_map(|t| &t.streams).copied().collect();
            self.device.order(&with(&owners))
        };
        InFlightSaves::freeze_on(tickets, patience, late_copy, order, |ticket| self.let_go(ticket))
    }

    /// Drops the sources of a save, of which nothing is queued from live memory any more.
    fn let_go(&self, ticket: &Arc<Ticket>) {
        // First: the stager may take the save out of the queue meanwhile.
        ticket.let_go();
        let mut jobs = lock(&self.jobs);
        let waiting = jobs.iter_mut().find(|job| Arc::ptr_eq(&job.ticket, ticket));
        let state = waiting.map(|job| std::mem::take(&mut job.state));
        drop(jobs);
        match state {
            Some(state) => {
                dropped(state);
                ticket.dropped.complete(());
            }
            // The stager sees to that next, or ends the save.
            None => _ = ticket.dropped.wait_forever(),
        }
    }

    /// Lets the thread end once its queue is empty.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.signal.notify();
    }

    /// The thread.
    pub fn run(&self) {
        let (mut device_state, mut sharp) = (DeviceState::default(), false);
        loop {
            let next = self.wait(&mut device_state, || {
                let under_way = || self.saves.unfinished().iter().filter(|t| t.phase() > Phase::Waiting).count();
                if self.at_most.is_some_and(|most| under_way() >= most) {
                    return None;
                }
                let job = lock(&self.jobs).pop_front();
                match job {
                    Some(job) => Some(Some(job)),
                    None => self.stopped.load(Ordering::Acquire).then_some(None),
                }
            });
            match next {
                Some(job) => {
                    tries::sharpen(&mut sharp);
                    self.stage(job, &mut device_state);
                }
                None => break,
            }
        }
        let mut left = lock(&self.left);
        self.ended.store(true, Ordering::Release);
        device_state.deferred.append(&mut left);
        drop(left);
        self.clear(device_state);
    }

    /// Sends home what is deferred when no device uses it any more; leaks what a device does not let go of.
    fn clear(&self, mut device_state: DeviceState) {
        let patience = Instant::now() + QUIESCE;
        while !device_state.deferred.is_empty() && Instant::now() < patience {
            device_state.recover(&self.saves);
            std::thread::sleep(POLL);
        }
        device_state.give_up(&self.saves, |_| true);
    }

    /// Sends home what is left of saves that have ended or were taken back, and is no longer in use.
    fn recover(&self, device_state: &mut DeviceState) {
        while let Some(job) = self.take_failed() {
            self.stage(job, device_state);
        }
        device_state.deferred.append(&mut lock(&self.left));
        device_state.recover(&self.saves);
    }

    /// Takes a save out of the queue that has failed there: what it holds need not wait for the saves before
    /// it.
    fn take_failed(&self) -> Option<Job> {
        let mut jobs = lock(&self.jobs);
        let at = jobs.iter().position(|job| job.ticket.failed())?;
        jobs.remove(at)
    }

    /// Waits for `look`, while saves that are due expire.
    fn wait<T>(&self, device_state: &mut DeviceState, mut look: impl FnMut() -> Option<T>) -> T {
        loop {
            self.recover(device_state);
            let now = Instant::now();
            let due = self.saves.expire(now);
            let until = if device_state.deferred.is_empty() { due.next } else { due.next.min(now + LOOK) };
            let again = || {
                let failed = || lock(&self.jobs).iter().any(|job| job.ticket.failed());
                self.saves.has_grown(&due) || !lock(&self.left).is_empty() || failed()
            };
            let mut news = || look().map(Some).or_else(|| again().then_some(None));
            if let Some(Some(found)) = self.signal.wait_until(until, &mut news) {
                return found;
            }
        }
    }

    /// Stages one save, and gives everything back however it ends.
    fn stage(&self, mut job: Job, device_state: &mut DeviceState) {
        let mut in_flight = VecDeque::new();
        let copied = guarded("a source panicked while it was read", || {
            if !job.ticket.enter(Phase::Staging) {
                return Ok(());
            }
            if !job.ticket.let_go.load(Ordering::Acquire) {
                job.plan.check(&job.state)?;
            }
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
            if let (Some(point), Some(queue)) = (&job.behind, &mut device_state.queue)
                && !mutant::on(Mutant::ProducerWait)
            {
                queue.wait(point)?;
            }
            self.copy(&mut job, device_state, &mut in_flight)
        });
        let failed = copied.as_ref().err().map(Error::kind);
        if let Err(error) = copied {
            job.ticket.fail(error);
        }
        let mut ended = (in_flight.is_empty() && failed.is_none()) || self.quiesce(device_state);
        while job.borrowed && !ended {
            // Whoever lent the memory may free it once this save is released: there is no giving up here.
            ended = self.quiesce(device_state);
        }
        let Job { ticket, state, captured, sink, late_copy, allocation, queued, .. } = job;
        drop(captured);
        ticket.enter(Phase::Writing);
        // Kernels of a fence may still read what has left the device by now, and others the list of what was to be gathered.
        let late_copy = late_copy.inspect(|late_copy| late_copy.end()).filter(|l| !ended || l.pending());
        if late_copy.is_none() {
            // Otherwise a fence must still find it: whoever follows its kernels need not wait for copies of later saves.
            self.forget(&ticket);
        }
        if ended && late_copy.is_none() && queued.iter().all(is_over) {
            dropped((in_flight, state, allocation));
            self.saves.release(&ticket);
        } else {
            if !ended {
                tracing::error!(
                    step = ticket.step,
                    slabs = in_flight.len(),
                    "a device is late; slabs wait for their copies"
                );
                self.saves.release(&ticket);
            }
            let (late, ticket) = (!ended, ended.then_some(ticket));
            // Nothing is copied into slabs any more: they need not wait for kernels.
            let in_flight = if late { in_flight } else { VecDeque::new() };
            device_state.deferred.push(DeferredRelease {
                in_flight,
                state,
                allocation,
                queued,
                late,
                ticket,
                late_copy,
            });
        }
        if failed == Some(ErrorKind::Device) || device_state.broken {
            // What is deferred is lost with the queue that could have told when its copies end.
            device_state.lose(&self.saves);
        }
        sink.end();
    }

    /// Waits until no copy is running any more, while saves that are due expire. False when that takes too long.
    fn quiesce(&self, device_state: &mut DeviceState) -> bool {
        let Some(queue) = &mut device_state.queue else { return true };
        let deadline = Instant::now() + QUIESCE;
        loop {
            let now = Instant::now();
            self.saves.expire(now);
            let slice = deadline.min(now + SLICE);
            match guarded("a device panicked", || Ok(queue.quiesce(slice))) {
                Ok(true) => return true,
                Ok(false) if now < deadline => {}
                _ => return false,
            }
        }
    }

    /// Copies all chunks, in order, `WINDOW` at a time, and hands over each when its mark is reached.
    fn copy(
        &self,
        job: &mut Job,
        device_state: &mut DeviceState,
        in_flight: &mut VecDeque<InFlightChunk>,
    ) -> Result<()> {
        let (ticket, plan) = (job.ticket.clone(), job.plan.clone());
        let stamp = Stamp::new(ticket.step, ticket.attempt);
        let (mut next, mut due) = (0, self.saves.expire(Instant::now()));
        let waker = Waker::from(self.signal.clone());
        let late_copy = job.late_copy.clone();
        loop {
            let now = Instant::now();
            if self.saves.is_due(&due, now) {
                due = self.saves.expire(now);
            }
            if device_state.broken {
                return Err(Error::new(ErrorKind::Device, "the queue of copies panicked"));
            }
            let queue = device_state.queue.as_mut().ok_or_else(|| Error::internal("a stager without a queue"))?;
            let reached = queue.reached()?;
            while in_flight.front().is_some_and(|f| f.mark <= reached) {
                let Some(InFlightChunk { chunk, live, latched, .. }) = in_flight.pop_front() else { break };
                if let (Some(scratch), Some(late_copy)) = (&self.scratch, &job.late_copy) {
                    // Read after the mark: whatever the device tells later, this copy was made before it.
                    let latched = if mutant::on(Mutant::LatchEarly) { latched } else { late_copy.latched() };
                    if live && latched.is_some_and(|f| f <= chunk.index) && !mutant::on(Mutant::Discard) {
                        if ticket.failed() {
                            break;
                        }
                        in_flight.push_back(InFlightChunk { chunk, mark: u64::MAX, live: false, latched });
                        enqueue(job, &stamp, queue.as_mut(), in_flight.back_mut().expect("just pushed"))?;
                        continue;
                    }
                    if !live {
                        ticket.late_chunks.fetch_add(1, Ordering::Relaxed);
                    }
                    scratch.hand_over(late_copy, chunk.index);
                }
                ticket.bytes_staged.fetch_add(plan.chunks[chunk.index].length as u64, Ordering::Relaxed);
                job.sink.clone().accept(chunk);
            }
            let asked_to_let_go = || ticket.let_go.load(Ordering::Acquire) && !ticket.dropped.is_complete();
            if asked_to_let_go() {
                dropped(std::mem::take(&mut job.state));
                ticket.dropped.complete(());
            }
            if ticket.failed() || (next == plan.chunks.len() && in_flight.is_empty()) {
                return Ok(());
            }
            let latched = late_copy.as_ref().and_then(|late_copy| late_copy.latched());
            if latched.is_some() && !job.state.is_empty() && !in_flight.iter().any(|f| f.live) {
                // The rest is read from slots.
                dropped(std::mem::take(&mut job.state));
                ticket.dropped.complete(());
            }
            let room = next < plan.chunks.len()
                && (in_flight.len() < WINDOW || next < ticket.needed.load(Ordering::Acquire))
                && self.arena.free() > 0
                && ready(job, next, &waker)?;
            let may = latched.is_some() || !late_copy.as_ref().is_some_and(|late_copy| late_copy.frozen());
            // Kept until the chunk is queued: a freeze waits for one that was decided.
            let decided = late_copy.as_ref().filter(|_| room && latched.is_none()).map(|late_copy| late_copy.decide());
            let room = room && may && !matches!(decided, Some(None));
            if let Some(lease) = room.then(|| self.arena.try_lease()).flatten() {
                // In `in_flight` before the first copy: whatever happens from here on, the slab does not go home too early.
                let (chunk, live) = (Chunk { index: next, lease, digests: None }, latched.is_none());
                in_flight.push_back(InFlightChunk { chunk, mark: u64::MAX, live, latched });
                enqueue(job, &stamp, queue.as_mut(), in_flight.back_mut().expect("just pushed"))?;
                next += 1;
                ticket.advance();
                if mutant::on(Mutant::SourceEarly) && next == plan.chunks.len() {
                    job.state = StateDict::new();
                    ticket.release();
                }
                continue;
            }
            drop(decided);
            let news = || ticket.failed() || asked_to_let_go();
            if let (Some(late_copy), false) = (&late_copy, may) {
                // What is left is in slots, or nowhere: a device that is lost never tells F.
                late_copy.check()?;
            }
            if may && in_flight.is_empty() && device_state.deferred.is_empty() {
                let go_on = || news() || (self.arena.free() > 0 && !matches!(ready(job, next, &waker), Ok(false)));
                self.wait(device_state, || go_on().then_some(()));
            } else {
                self.signal.wait_until(now + POLL, || news().then_some(()));
                self.recover(device_state);
            }
        }
    }
}

/// Whether all bytes of the chunk `index` are there to be read.
fn ready(job: &Job, index: usize, waker: &Waker) -> Result<bool> {
    let Some(chunk) = job.plan.chunks.get(index) else { return Ok(true) };
    for segment in &job.plan.segments[chunk.segments.clone()] {
        let From::Tensor(tensor) = segment.from else { continue };
        // Once sources are dropped, what is left of them is in slots.
        let Some((_, tensor)) = job.state.tensors.get_index(tensor) else { continue };
        match tensor.source.poll_ready(segment.at..segment.at + segment.length as u64, waker) {
            Poll::Ready(there) => there?,
            Poll::Pending => return Ok(false),
        }
    }
    Ok(true)
}
