//! The stager: one thread that stages the saves of a queue, one after the other.

use super::capture_pool::Allocation;
use super::deferred::{DeferredRelease, KeptForRelease};
use super::device_state::DeviceState;
use super::in_flight::InFlightSaves;
use super::job::Job;
use super::late_copy::LateCopy;
use super::scratch::Scratch;
use crate::call_thread::CallThread;
use crate::completion::Signal;
use crate::device::{Device, Queued, Waits};
use crate::error::Error;
use crate::memory::Arena;
use crate::outcome::Phase;
use crate::state::StateDict;
use crate::sync::{Mutex, lock};
use crate::telemetry::Telemetry;
use crate::ticket::Ticket;
use crate::tries;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// How often the stager polls copies in flight.
pub(super) const POLL_INTERVAL: Duration = Duration::from_micros(40);
/// How often an idle stager polls deferred releases.
const DEFERRED_POLL_INTERVAL: Duration = Duration::from_micros(500);
/// How long the stager waits for a failed device to end its copies.
pub(super) const QUIESCE_TIMEOUT: Duration = Duration::from_secs(10);

impl std::fmt::Debug for Stager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Stager({:?}, {})", self.arena, self.device.name())
    }
}

/// A save that is not staged yet, its late copy, and whether its sources are borrowed.
type Fenceable = (Arc<Ticket>, Arc<LateCopy>, bool);

/// The stager's queue, and the memory and device that it uses.
pub(crate) struct Stager {
    pub signal: Arc<Signal>,
    pub calls: Arc<CallThread>,
    pub telemetry: Arc<Telemetry>,
    pub arena: Arena,
    pub saves: InFlightSaves,
    pub device: Arc<dyn Device>,
    /// Memory for late copies. Unset if the device cannot make late copies.
    pub scratch: OnceLock<Scratch>,
    /// Makes streams wait by memory-waits at a fence. Unset if streams wait for events.
    pub waits: OnceLock<Arc<dyn Waits>>,
    late_copies: Mutex<Vec<Fenceable>>,
    jobs: Mutex<VecDeque<Job>>,
    /// Releases of saves that will not be staged, until the thread takes them over.
    deferred: Mutex<Vec<DeferredRelease>>,
    /// How many saves may be under way at once. Other saves wait and can be taken back.
    at_most: Option<usize>,
    /// Copies of a chunk are queued in one call.
    pub(super) batch: bool,
    stopped: AtomicBool,
    /// The thread has ended, or is about to end. Written under the lock of `deferred`.
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
        let telemetry = Arc::new(Telemetry::new());
        let (scratch, waits) = (OnceLock::new(), OnceLock::new());
        Self {
            signal,
            calls,
            telemetry,
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

    /// Sets the abilities of the device. Called once, at start or when the device has been chosen.
    pub fn offer(&self, scratch: Option<Scratch>, waits: Option<Arc<dyn Waits>>) {
        if let Some(scratch) = scratch {
            _ = self.scratch.set(scratch);
        }
        if let Some(waits) = waits {
            _ = self.waits.set(waits);
        }
    }

    /// Adds a save at the end of the queue.
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

    /// Adds a save at the front of the queue, for another attempt. Returns the job when the thread has been
    /// told to end.
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

    /// Removes and returns the newest save whose staging has not begun.
    pub fn take_waiting(&self) -> Option<Job> {
        let mut jobs = lock(&self.jobs);
        let newest = jobs.back()?;
        if newest.ticket.agreed.swap(true, Ordering::AcqRel) { None } else { jobs.pop_back() }
    }

    /// Takes the sources out of a save whose staging has not begun.
    pub(super) fn take_sources(&self, ticket: &Arc<Ticket>) -> Option<StateDict<'static>> {
        let mut jobs = lock(&self.jobs);
        let waiting = jobs.iter_mut().find(|job| Arc::ptr_eq(&job.ticket, ticket));
        waiting.map(|job| std::mem::take(&mut job.state))
    }

    /// Releases a save that will not be staged, and drops its sources when no device reads them any more.
    pub fn discard(&self, job: Job) {
        let Job { ticket, state, allocation, queued, late_copy, .. } = job;
        // Keep the late copy while kernels of a fence may still run. After `withdraw` no fence launches
        // kernels.
        let late_copy = late_copy.filter(|late_copy| late_copy.withdraw());
        if late_copy.is_none() {
            self.forget(&ticket);
        }
        self.defer(KeptForRelease { state, allocation, queued, late_copy }, ticket);
    }

    /// Ends a save that did not become a job, and drops its sources when no device reads them any more. It
    /// does not resolve the future of a deferred save.
    pub fn refuse(
        &self,
        ticket: Arc<Ticket>,
        why: Error,
        state: StateDict<'static>,
        allocation: Option<Allocation>,
        queued: Vec<Arc<dyn Queued>>,
    ) {
        // Only a deferred save already has a handle that reports the failure. Otherwise the caller reports
        // it.
        let seen = !ticket.listed.load(Ordering::Acquire);
        ticket.fail_as(why.clone(), seen);
        self.saves.add(ticket.clone());
        if seen {
            drop(ticket.finish(Err(why)));
        }
        self.defer(KeptForRelease { state, allocation, queued, late_copy: None }, ticket);
    }

    /// Releases a save at once, or when no kernel uses its kept objects any more.
    fn defer(&self, kept: KeptForRelease, ticket: Arc<Ticket>) {
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

    /// Removes the late copy of this save from the list: no fence needs it any more.
    pub(super) fn forget(&self, ticket: &Arc<Ticket>) {
        lock(&self.late_copies).retain(|(known, ..)| !Arc::ptr_eq(known, ticket));
    }

    /// Lets the thread end once its queue is empty.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.signal.notify();
    }

    /// The body of the thread: stages saves until the stager is stopped and its queue is empty.
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

    /// The next save, or `Some(None)` when no more saves will come. `None` while neither is known.
    fn next_job(&self) -> Option<Option<Job>> {
        let under_way = || self.saves.unfinished().iter().filter(|t| t.phase() > Phase::Waiting).count();
        if self.at_most.is_some_and(|most| under_way() >= most) {
            return None;
        }
        // Read before the queue: once the stager is stopped, a queue found empty stays empty.
        let stopped = self.stopped.load(Ordering::Acquire);
        let mut jobs = lock(&self.jobs);
        let now = Instant::now();
        match jobs.iter().position(|job| job.not_before.is_none_or(|begins| begins <= now)) {
            Some(at) => jobs.remove(at).map(Some),
            None => (stopped && jobs.is_empty()).then_some(None),
        }
    }

    /// Releases the objects that no device uses any more. Leaks the objects that a device still uses after
    /// [`QUIESCE_TIMEOUT`].
    fn clear(&self, mut device_state: DeviceState) {
        let patience = Instant::now() + QUIESCE_TIMEOUT;
        while !device_state.deferred.is_empty() && Instant::now() < patience {
            device_state.recover(&self.saves);
            std::thread::sleep(POLL_INTERVAL);
        }
        device_state.give_up(&self.saves, |_| true);
    }

    /// Releases the objects that saves keep after they have ended or were taken back, if no device uses these
    /// objects any more.
    pub(super) fn recover(&self, device_state: &mut DeviceState) {
        while let Some(job) = self.take_failed() {
            self.stage(job, device_state);
        }
        device_state.deferred.append(&mut lock(&self.deferred));
        device_state.recover(&self.saves);
    }

    /// Takes a save that failed in the queue out of the queue, so that its sources and memory need not wait
    /// for earlier saves.
    fn take_failed(&self) -> Option<Job> {
        let mut jobs = lock(&self.jobs);
        let at = jobs.iter().position(|job| job.ticket.failed())?;
        jobs.remove(at)
    }

    /// The earliest time at which a save that waits for another attempt may begin.
    fn delayed_until(&self) -> Option<Instant> {
        lock(&self.jobs).iter().filter_map(|job| job.not_before).min()
    }

    /// Waits until `look` returns a value. Expires due saves meanwhile.
    pub(super) fn wait<T>(&self, device_state: &mut DeviceState, mut look: impl FnMut() -> Option<T>) -> T {
        loop {
            self.recover(device_state);
            let now = Instant::now();
            let due = self.saves.expire(now);
            let delayed = self.delayed_until();
            let next = delayed.filter(|begins| *begins > now).map_or(due.next, |begins| begins.min(due.next));
            let until = if device_state.deferred.is_empty() { next } else { next.min(now + DEFERRED_POLL_INTERVAL) };
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
