//! The ticket: the state of one save that all stages share. This state is the save's identity, phase,
//! progress, first failure and completions.
//!
//! **Completion.** `staged` resolves when no live source will be read any more and the sources are dropped,
//! however the save ended. `done` resolves once.
//! **Failure.** The first error wins. Once the publish has begun, a failure can no longer undo the save:
//! `fail` is refused, and a deadline that passes then is `Indeterminate`.

mod ending;
mod source_gate;
mod traced;

use crate::call_thread::CallThread;
use crate::completion::{Calls, Completion, Signal};
use crate::error::{Error, ErrorKind, Result};
use crate::fork::ForkGuard;
use crate::id::Attempt;
use crate::outcome::{Outcome, Phase, Progress, Promoted};
use crate::own_threads;
use crate::state::DeviceStream;
use crate::sync::{self, Mutex, lock};
use crate::telemetry::{SaveTrace, Telemetry, Times};
use source_gate::SourceGate;
use std::any::Any;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// See the module.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub step: u64,
    /// The latest attempt of a save that is retried.
    attempt: Mutex<Attempt>,
    pub began: Instant,
    pub deadline: Instant,
    /// How long after the deadline the stager waits for another thread to end the save.
    pub grace: Duration,
    /// The contents of the save, once they are known.
    extent: OnceLock<Extent>,
    /// True once the state of a deferred save is claimed, so that no other save supersedes this one, or once
    /// another save has superseded it.
    pub awaited: AtomicBool,
    /// True once all ranks save this save, so that no other save supersedes it, or once another save has
    /// superseded it.
    pub agreed: AtomicBool,
    /// True if the save is in the list of saves in flight.
    pub listed: AtomicBool,
    /// How many chunks have been queued. Once all are queued, nothing more is read on the host.
    pub queued: AtomicUsize,
    /// Notified when one more chunk is queued, or when no more will be queued.
    pub moved: Signal,
    /// A thread waits until this many chunks are queued. Until then more copies than usual may be in flight.
    pub needed: AtomicUsize,
    /// True if later writers wait for this save's copies.
    pub fenced: AtomicBool,
    pub sources: SourceGate,
    pub staged: sync::Arc<Completion<Result<()>>>,
    pub done: sync::Arc<Completion<Result<Outcome>>>,
    pub bytes_staged: AtomicU64,
    pub late_chunks: AtomicUsize,
    pub bytes_written: AtomicU64,
    pub staged_nanos: AtomicU64,
    pub blocked_nanos: AtomicU64,
    pub times: Times,
    /// A device did not make the requested digests, so a forgotten fence would not be detected.
    pub digests_missing: AtomicBool,
    /// Some handle or call has seen how the save ended.
    pub observed: AtomicBool,
    /// The end of the promotion to each tier behind the first, with the name of the tier.
    promotions: OnceLock<Vec<Promotion>>,
    state: Mutex<State>,
    /// Wait guards. Streams wait for the save's copies while the ticket keeps them.
    wait_guards: Mutex<Vec<Arc<dyn Any + Send + Sync>>>,
    signal: Arc<Signal>,
    calls: Arc<CallThread>,
    /// The telemetry that is told how the save ended. Unset if there is none.
    telemetry: OnceLock<Arc<Telemetry>>,
    /// The trace of what the save's threads do. Unset unless saves are traced.
    trace: OnceLock<SaveTrace>,
    /// The process that created the ticket. In a forked child the save never makes progress.
    origin: ForkGuard,
}

/// The end of a promotion. The thread of the tier sets it.
#[derive(Clone, Debug)]
pub(crate) struct Promotion {
    pub tier: Arc<str>,
    pub done: sync::Arc<Completion<Result<Promoted>>>,
}

/// How far a save is, and whether it failed.
#[derive(Debug)]
enum State {
    Running(Phase),
    /// The save failed in this phase. The phase is `Ended` once the save's threads are done with it.
    Failed {
        phase: Phase,
        error: Error,
    },
    Ended,
}

impl State {
    fn phase(&self) -> Phase {
        match self {
            Self::Running(phase) | Self::Failed { phase, .. } => *phase,
            Self::Ended => Phase::Ended,
        }
    }
}

/// The identity and deadline of a new ticket.
pub(crate) struct Issue {
    pub step: u64,
    pub attempt: Attempt,
    pub deadline: Instant,
    pub grace: Duration,
}

/// The directory and name of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// The directory that gets the checkpoint. None means the root of the executor.
    pub parent: Option<PathBuf>,
    pub name: String,
}

/// The contents of a save.
#[derive(Debug, Default)]
pub(crate) struct Extent {
    pub chunks: usize,
    /// The streams that wrote the device tensors.
    pub streams: Vec<DeviceStream<'static>>,
    pub bytes: u64,
    /// Some source can be written while it is read, so a later save without a fence in between is refused.
    pub writable: bool,
    pub over_budget: usize,
    /// Nothing can write the sources, and they are kept until the save has ended, for another attempt. Also
    /// true while there are no sources.
    pub kept: bool,
    pub place: Place,
}

/// The extent of a save whose state has not arrived. A fence has nothing to wait for.
static NOTHING_YET: Extent = Extent {
    chunks: 0,
    streams: Vec::new(),
    bytes: 0,
    writable: false,
    over_budget: 0,
    kept: true,
    place: Place { parent: None, name: String::new() },
};

impl Ticket {
    /// Creates a ticket. `signal` wakes the stager. `calls` runs functions that no other thread may call.
    pub fn new(issue: Issue, began: Instant, signal: Arc<Signal>, calls: Arc<CallThread>) -> Self {
        let Issue { step, attempt, deadline, grace } = issue;
        let zero = || AtomicU64::new(0);
        Self {
            step,
            attempt: Mutex::new(attempt),
            began,
            deadline,
            grace,
            extent: OnceLock::new(),
            awaited: AtomicBool::new(false),
            agreed: AtomicBool::new(false),
            listed: AtomicBool::new(false),
            queued: AtomicUsize::new(0),
            moved: Signal::default(),
            needed: AtomicUsize::new(0),
            fenced: AtomicBool::new(false),
            sources: SourceGate::new(),
            staged: sync::Arc::new(Completion::new()),
            done: sync::Arc::new(Completion::new()),
            bytes_staged: zero(),
            late_chunks: AtomicUsize::new(0),
            bytes_written: zero(),
            staged_nanos: zero(),
            blocked_nanos: zero(),
            times: Times::default(),
            digests_missing: AtomicBool::new(false),
            observed: AtomicBool::new(false),
            promotions: OnceLock::new(),
            state: Mutex::new(State::Running(Phase::Waiting)),
            wait_guards: Mutex::new(Vec::new()),
            signal,
            calls,
            telemetry: OnceLock::new(),
            trace: OnceLock::new(),
            origin: ForkGuard::new(),
        }
    }

    /// The contents of the save. Empty while they are not known.
    pub fn extent(&self) -> &Extent {
        self.extent.get().unwrap_or(&NOTHING_YET)
    }

    /// Whether the state of the save has not arrived yet.
    pub fn is_deferred(&self) -> bool {
        self.extent.get().is_none()
    }

    /// Sets the contents of the save. Called once.
    pub fn begin(&self, extent: Extent) {
        let known = self.extent.set(extent);
        debug_assert!(known.is_ok(), "a save began twice");
    }

    /// Sets the tiers behind the first one. Called at most once.
    pub fn promote_to(&self, tiers: impl Iterator<Item = Arc<str>>) {
        let promotion = |tier| Promotion { tier, done: sync::Arc::new(Completion::new()) };
        let known = self.promotions.set(tiers.map(promotion).collect());
        debug_assert!(known.is_ok(), "a save got its tiers twice");
    }

    /// The tiers that will have the step. Empty for a save that is no step of the root.
    pub fn promotions(&self) -> &[Promotion] {
        self.promotions.get().map_or(&[], Vec::as_slice)
    }

    pub fn attempt(&self) -> Attempt {
        *lock(&self.attempt)
    }

    pub fn phase(&self) -> Phase {
        lock(&self.state).phase()
    }

    pub fn progress(&self) -> Progress {
        Progress {
            // A waiter is woken before the phase changes, and may ask for the phase at once.
            phase: if self.done.is_complete() { Phase::Ended } else { self.phase() },
            bytes: self.extent().bytes,
            staged: self.bytes_staged.load(Ordering::Relaxed),
            written: self.bytes_written.load(Ordering::Relaxed),
        }
    }

    /// Moves forward to `phase`. Returns false when the save has failed or is not before that phase.
    pub fn enter(&self, phase: Phase) -> bool {
        let mut state = lock(&self.state);
        let forward = matches!(*state, State::Running(before) if before < phase);
        if forward {
            *state = State::Running(phase);
        }
        forward
    }

    pub fn failed(&self) -> bool {
        matches!(*lock(&self.state), State::Failed { .. })
    }

    pub fn failure(&self) -> Option<Error> {
        match &*lock(&self.state) {
            State::Failed { error, .. } => Some(error.clone()),
            State::Running(_) | State::Ended => None,
        }
    }

    /// Fails the save, unless it failed before or its publish has begun. Returns whether this call failed it.
    pub fn fail(&self, error: Error) -> bool {
        self.fail_as(error, false)
    }

    /// Fails the save as [`Ticket::fail`] does. `seen` means that the caller knows of the failure, so that no
    /// other thread may find the failure unobserved in between.
    pub fn fail_as(&self, error: Error, seen: bool) -> bool {
        let failed = self.fail_with(&mut lock(&self.state), error, seen);
        if failed {
            self.tell_failed();
        }
        failed
    }

    fn fail_with(&self, state: &mut State, error: Error, seen: bool) -> bool {
        let (phase, first) = match state {
            State::Running(phase) => (*phase, true),
            // A cancellation or the deadline replaces a transient error, because the save would otherwise be
            // retried.
            State::Failed { phase, error: there } => {
                (*phase, self.extent().kept && there.is_transient() && !error.is_transient())
            }
            State::Ended => return false,
        };
        if !first || phase >= Phase::Promised {
            return false;
        }
        if seen {
            self.observed.store(true, Ordering::Release);
        }
        *state = State::Failed { phase, error: error.with_step(self.step) };
        true
    }

    fn tell_failed(&self) {
        self.drop_wait_guards();
        self.signal.notify();
        self.moved.notify();
    }

    /// Begins `attempt`, after an attempt that failed with a transient error and left nothing behind. Returns
    /// false for a save that has been given up.
    pub fn try_again(&self, attempt: Attempt) -> bool {
        let mut state = lock(&self.state);
        let lasts = matches!(&*state, State::Failed { error, .. } if !error.is_transient());
        if lasts || self.done.is_complete() {
            return false;
        }
        *lock(&self.attempt) = attempt;
        self.times.tries.fetch_add(1, Ordering::Relaxed);
        for count in [&self.queued, &self.needed, &self.late_chunks] {
            count.store(0, Ordering::Release);
        }
        for bytes in [&self.bytes_staged, &self.bytes_written] {
            bytes.store(0, Ordering::Release);
        }
        self.sources.renew();
        *state = State::Running(Phase::Waiting);
        true
    }

    /// Fails the save with `why` and resolves it at once, whatever blocks its threads. Returns None when the
    /// save had ended.
    pub fn give_up(&self, why: Error) -> Option<Calls<Result<Outcome>>> {
        loop {
            // Fail first: streams that wait for the save's copies then continue before `done` resolves.
            if self.fail_with(&mut lock(&self.state), why.clone(), false) {
                self.tell_failed();
            }
            // The end is set under this lock too. After that, the save is not retried.
            let state = lock(&self.state);
            let error = match &*state {
                // Another attempt began meanwhile.
                State::Running(phase) if *phase < Phase::Promised => continue,
                State::Failed { error, .. } => error.clone(),
                // The result of the publish is not known yet.
                State::Running(_) | State::Ended => {
                    let why = "the save was given up when its publish could no longer be stopped";
                    Error::new(ErrorKind::Indeterminate, why).with_step(self.step)
                }
            };
            let line = self.line(&Err(error.clone()));
            let calls = self.done.put(Err(error));
            drop(state);
            self.tell(line, calls.is_some());
            self.signal.notify();
            return calls;
        }
    }

    /// Ends the save. Returns None when the save had been given up.
    pub fn finish(&self, result: Result<Outcome>) -> Option<Calls<Result<Outcome>>> {
        // A save that could have been retried may have been cancelled meanwhile, or its deadline may have
        // passed.
        let last = |e: Error| match self.failure() {
            Some(last) if self.extent().kept && e.is_transient() => last,
            _ => e,
        };
        let result = result.map_err(|e| last(e).with_step(self.step));
        let staged = result.as_ref().map(|_| ()).map_err(Clone::clone);
        let line = self.line(&result);
        let calls = self.done.put(result);
        self.tell(line, calls.is_some());
        if self.extent().kept && self.sources.is_dropped() {
            self.staged.complete(staged);
        }
        let mut state = lock(&self.state);
        match &mut *state {
            State::Failed { phase, .. } => *phase = Phase::Ended,
            running => *running = State::Ended,
        }
        drop(state);
        self.signal.notify();
        calls
    }

    /// Wakes tasks in this thread, and makes the call thread call the functions, because these would delay
    /// the stager, a `save` or a `cancel`.
    pub fn hand_over(&self, calls: Option<Calls<Result<Outcome>>>) {
        calls.into_iter().for_each(|calls| self.calls.hand(calls));
    }

    /// Refuses any use of the save in a forked child.
    pub fn alive(&self) -> Result<()> {
        let alive = self.origin.check("a save of the parent cannot be waited for in a forked child");
        alive.map_err(|forked| forked.with_step(self.step))
    }

    /// Refuses a wait in a thread of the executor, because that thread may be the one that has to end the
    /// save.
    pub fn may_wait(&self) -> Result<()> {
        if !own_threads::is_one_of(&self.signal) {
            return Ok(());
        }
        let why = "a thread of the executor cannot wait for a save: wait in another thread, or await it in a task";
        Err(Error::invalid(why).with_step(self.step))
    }

    /// Records that no live source will be read any more and that the sources are dropped.
    pub fn release(&self) {
        let nanos = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.staged_nanos.store(nanos, Ordering::Relaxed);
        self.sources.set_dropped();
        // If the save failed, another attempt may read its sources, until the save has ended.
        if !self.extent().kept || !self.failed() || self.done.is_complete() {
            self.staged.complete(self.failure().map_or(Ok(()), Err));
        }
        self.drop_wait_guards();
        self.signal.notify();
        self.moved.notify();
    }

    /// Keeps a wait guard until the save has failed or is staged.
    pub fn keep_wait_guard(&self, guard: Arc<dyn Any + Send + Sync>) {
        lock(&self.wait_guards).push(guard);
        // The thread that fails or releases the save sets that state before it drops the guards. It may have
        // missed this guard.
        if self.failed() || self.staged.is_complete() {
            self.drop_wait_guards();
        }
    }

    fn drop_wait_guards(&self) {
        let wait_guards = std::mem::take(&mut *lock(&self.wait_guards));
        drop(wait_guards);
    }

    /// Counts one more queued chunk.
    pub fn advance(&self) {
        self.queued.fetch_add(1, Ordering::Release);
        self.moved.notify();
    }

    /// Waits until all chunks are queued, or no more will be queued. Returns false at the deadline.
    pub fn wait_queued(&self, deadline: Instant) -> bool {
        self.wait_until_queued(self.extent().chunks, deadline)
    }

    /// Waits until the first `count` chunks are queued, or no more will be queued. Returns false at the
    /// deadline.
    pub fn wait_until_queued(&self, count: usize, deadline: Instant) -> bool {
        if self.needed.fetch_max(count, Ordering::AcqRel) < count {
            self.signal.notify();
        }
        let queued = || {
            let all = self.queued.load(Ordering::Acquire) >= count;
            (all || self.failed() || self.staged.is_complete()).then_some(())
        };
        self.moved.wait_until(deadline, queued).is_some()
    }

    /// Asks the stager to drop the sources: nothing more is queued from them.
    pub fn request_release(&self) {
        self.sources.request_release();
        self.signal.notify();
    }
}
