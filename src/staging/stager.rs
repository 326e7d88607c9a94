//! The stager: a thread, and a queue of saves, which it stages one after the other.

use super::capture::Captured;
use super::capture_pool::Allocation;
use super::deferred::{DeferredRelease, Kept};
use super::device_state::DeviceState;
use super::in_flight::InFlightSaves;
use super::late_copy::LateCopy;
use super::scratch::Scratch;
use crate::call_thread::CallThread;
use crate::completion::Signal;
use crate::device::{Device, Point, Queued, Waits};
use crate::error::Error;
use crate::memory::Arena;
use crate::outcome::Phase;
use crate::plan::{Plan, Sink};
use crate::state::StateDict;
use crate::sync::{Mutex, lock};
use crate::ticket::Ticket;
use crate::tries;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// How often the watermark is looked at while copies are in flight.
pub(super) const POLL: Duration = Duration::from_micros(40);
/// How often deferred releases are looked at while there is nothing else to do.
const LOOK: Duration = Duration::from_micros(500);
/// How long a failed device is given to end its copies.
pub(super) const QUIESCE: Duration = Duration::from_secs(10);

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
    /// The sources may be freed as soon as the save is released.
    pub borrowed: bool,
    /// It is not staged before then: after a failure the save waits before it is tried again.
    pub not_before: Option<Instant>,
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

/// The late copy of a save, until that is staged, and whether its sources are borrowed.
type Fenceable = (Arc<Ticket>, Arc<LateCopy>, bool);

/// The stager's queue and what it works with.
pub(crate) struct Stager {
    pub signal: Arc<Signal>,
    pub calls: Arc<CallThread>,
    pub arena: Arena,
    pub saves: InFlightSaves,
    pub device: Arc<dyn Device>,
    /// Where late copies are made, if the device can do that.
    pub scratch: OnceLock<Scratch>,
    /// How streams wait at a fence, if not for events.
    pub waits: OnceLock<Arc<dyn Waits>>,
    late_copies: Mutex<Vec<Fenceable>>,
    jobs: Mutex<VecDeque<Job>>,
    /// Of saves that will not be staged, until the thread takes them over.
    deferred: Mutex<Vec<DeferredRelease>>,
    /// How many saves may be under way at once; the others wait and can be taken back.
    at_most: Option<usize>,
    /// Copies of a chunk are queued in one call.
    pub(super) batch: bool,
    stopped: AtomicBool,
    /// The thread has ended, or is about to; written under the lock of `deferred`.
    ended: AtomicBool,
}

impl Stager {
    pub fn new(
        signal: Arc<Signal>,
        arena: Arena,
        device: Arc<dyn Device>,
        at_most: Option<usize>,
        batch: bool,
    ) -> Self {
        let (saves, jobs, late_copies) = (InFlightSaves::default(), Mutex::new(VecDeque::new()), Mutex::default());
        let (deferred, stopped, ended) = (Mutex::default(), AtomicBool::new(false), AtomicBool::new(false));
        let calls = Arc::new(CallThread::new(signal.clone()));
        let (scratch, waits) = (OnceLock::new(), OnceLock::new());
        Self {
            signal,
            calls,
            arena,
            saves,
            device,
            scratch,
            waits,
            late_copies,
            jobs,
            deferred,
            at_most,
            batch,
            stopped,
            ended,
        }
    }

    /// What the device offers, once, at start or when it has been chosen.
    pub fn offer(&self, scratch: Option<Scratch>, waits: Option<Arc<dyn Waits>>) {
        if let Some(scratch) = scratch {
            _ = self.scratch.set(scratch);
        }
        if let Some(waits) = waits {
            _ = self.waits.set(waits);
        }
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

    /// Takes a save for another attempt, to be staged before those that came after it. Hands the job back when the thread has
    /// been told to end.
    pub fn push_again(&self, job: Job) -> Option<Job> {
        let mut jobs = lock(&self.jobs);
        if self.stopped.load(Ordering::Acquire) {
            return Some(job);
        }
        self.saves.add_again();
        jobs.push_front(job);
        drop(jobs);
        self.signal.notify();
        None
    }

    /// Takes back the newest save that has not begun to stage.
    pub fn take_waiting(&self) -> Option<Job> {
        lock(&self.jobs).pop_back()
    }

    /// Takes the sources out of a save that has not begun to stage.
    pub(super) fn take_sources(&self, ticket: &Arc<Ticket>) -> Option<StateDict<'static>> {
        let mut jobs = lock(&self.jobs);
        let waiting = jobs.iter_mut().find(|job| Arc::ptr_eq(&job.ticket, ticket));
        waiting.map(|job| std::mem::take(&mut job.state))
    }

    /// Drops the sources of a save that will not be staged, when no device reads them any more.
    pub fn discard(&self, job: Job) {
        let Job { ticket, state, allocation, queued, late_copy, .. } = job;
        // Kernels of a fence may be to come. Where there are none, there will be none.
        let late_copy = late_copy.filter(|late_copy| late_copy.withdraw());
        if late_copy.is_none() {
            self.forget(&ticket);
        }
        self.defer(Kept { state, allocation, queued, late_copy }, ticket);
    }

    /// Ends a save that did not become a job, but for the future that a deferred one has, and drops its sources when no device
    /// reads them any more.
    pub fn refuse(
        &self,
        ticket: Arc<Ticket>,
        why: Error,
        state: StateDict<'static>,
        allocation: Option<Allocation>,
        queued: Vec<Arc<dyn Queued>>,
    ) {
        // There is no handle yet that could tell of it, unless there was one before the state.
        let seen = !ticket.listed.load(Ordering::Acquire);
        ticket.fail_as(why.clone(), seen);
        self.saves.add(ticket.clone());
        if seen {
            drop(ticket.finish(Err(why)));
        }
        self.defer(Kept { state, allocation, queued, late_copy: None }, ticket);
    }

    /// Releases a save, now or when no kernel uses what is kept of it.
    fn defer(&self, kept: Kept, ticket: Arc<Ticket>) {
        if kept.is_free() {
            kept.release();
            self.saves.release(&ticket);
            return;
        }
        let release = DeferredRelease::BehindKernels { kept, ticket };
        let mut deferred = lock(&self.deferred);
        if self.ended.load(Ordering::Acquire) {
            drop(deferred);
            let mut device_state = DeviceState::default();
            device_state.deferred.push(release);
            return self.clear(device_state);
        }
        deferred.push(release);
        drop(deferred);
        self.signal.notify();
    }

    /// The late copy of a save that is not staged yet, and whether its sources are borrowed.
    pub(super) fn late_copy(&self, ticket: &Arc<Ticket>) -> Option<(Arc<LateCopy>, bool)> {
        let late_copies = lock(&self.late_copies);
        let found = late_copies.iter().find(|(known, ..)| Arc::ptr_eq(known, ticket));
        found.map(|(_, late_copy, borrowed)| (late_copy.clone(), *borrowed))
    }

    /// No fence has to know of the late copy of this save any more.
    pub(super) fn forget(&self, ticket: &Arc<Ticket>) {
        lock(&self.late_copies).retain(|(known, ..)| !Arc::ptr_eq(known, ticket));
    }

    /// Lets the thread end once its queue is empty.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.signal.notify();
    }

    /// The thread.
    pub fn run(&self) {
        let (mut device_state, mut sharp) = (DeviceState::default(), false);
        while let Some(job) = self.wait(&mut device_state, || self.next_job()) {
            tries::sharpen(&mut sharp);
            self.stage(job, &mut device_state);
        }
        let mut deferred = lock(&self.deferred);
        self.ended.store(true, Ordering::Release);
        device_state.deferred.append(&mut deferred);
        drop(deferred);
        self.clear(device_state);
    }

    /// The next save, or that there will be none; None while neither can be said.
    fn next_job(&self) -> Option<Option<Job>> {
        let under_way = || self.saves.unfinished().iter().filter(|t| t.phase() > Phase::Waiting).count();
        if self.at_most.is_some_and(|most| under_way() >= most) {
            return None;
        }
        // Before the queue: what is not in it then will not come into it any more.
        let stopped = self.stopped.load(Ordering::Acquire);
        let mut jobs = lock(&self.jobs);
        let now = Instant::now();
        match jobs.iter().position(|job| job.not_before.is_none_or(|begins| begins <= now)) {
            Some(at) => jobs.remove(at).map(Some),
            None => (stopped && jobs.is_empty()).then_some(None),
        }
    }

    /// Releases what no device uses any more; leaks what a device does not let go of.
    fn clear(&self, mut device_state: DeviceState) {
        let patience = Instant::now() + QUIESCE;
        while !device_state.deferred.is_empty() && Instant::now() < patience {
            device_state.recover(&self.saves);
            std::thread::sleep(POLL);
        }
        device_state.give_up(&self.saves, |_| true);
    }

    /// Releases what is left of saves that have ended or were taken back, and is no longer in use.
    pub(super) fn recover(&self, device_state: &mut DeviceState) {
        while let Some(job) = self.take_failed() {
            self.stage(job, device_state);
        }
        device_state.deferred.append(&mut lock(&self.deferred));
        device_state.recover(&self.saves);
    }

    /// Takes a save out of the queue that has failed there: what it holds need not wait for the saves before
    /// it.
    fn take_failed(&self) -> Option<Job> {
        let mut jobs = lock(&self.jobs);
        let at = jobs.iter().position(|job| job.ticket.failed())?;
        jobs.remove(at)
    }

    /// Until when the first of the saves waits that are tried again.
    fn delayed_until(&self) -> Option<Instant> {
        lock(&self.jobs).iter().filter_map(|job| job.not_before).min()
    }

    /// Waits for `look`, while saves that are due expire.
    pub(super) fn wait<T>(&self, device_state: &mut DeviceState, mut look: impl FnMut() -> Option<T>) -> T {
        loop {
            self.recover(device_state);
            let now = Instant::now();
            let due = self.saves.expire(now);
            let delayed = self.delayed_until();
            let next = delayed.filter(|begins| *begins > now).map_or(due.next, |begins| begins.min(due.next));
            let until = if device_state.deferred.is_empty() { next } else { next.min(now + LOOK) };
            let again = || {
                let failed = || lock(&self.jobs).iter().any(|job| job.ticket.failed());
                let grown = self.saves.has_grown(&due) || self.delayed_until() != delayed;
                grown || !lock(&self.deferred).is_empty() || failed()
            };
            let mut news = || look().map(Some).or_else(|| again().then_some(None));
            if let Some(Some(found)) = self.signal.wait_until(until, &mut news) {
                return found;
            }
        }
    }
}
