//! What all stages of one save share: who it is, how far it is, whether it failed, and the futures that it resolves.
//!
//! **Completion.** `staged` resolves when no live source will be read any more and the sources are dropped, however the
//! save ended; `done` resolves once. **Failure.** The first error wins. Once the publish has begun, a failure can no longer
//! undo it: `fail` is refused, and a deadline that passes then is `Indeterminate`.

mod source_gate;

use crate::call_thread::CallThread;
use crate::completion::{Calls, Completion, Signal};
use crate::error::{Error, ErrorKind, Result};
use crate::fork::ForkGuard;
use crate::id::Attempt;
use crate::outcome::{Outcome, Phase, Progress};
use crate::own_threads;
use crate::state::DeviceStream;
use crate::sync::{self, Mutex, lock};
use source_gate::SourceGate;
use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// See the module.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub step: u64,
    /// Of a save that is tried again, the latest.
    attempt: Mutex<Attempt>,
    pub began: Instant,
    pub deadline: Instant,
    /// What is saved, once that is known.
    extent: OnceLock<Extent>,
    /// Something waits for the state of this save, so that no other takes its place.
    pub awaited: AtomicBool,
    /// It is in the list of saves.
    pub listed: AtomicBool,
    /// How many chunks have been queued: nothing more is read on the host once all are.
    pub queued: AtomicUsize,
    /// Notified when one more is queued.
    pub moved: Signal,
    /// Somebody waits until this many are queued: more copies than usual may be in flight until then.
    pub needed: AtomicUsize,
    /// A fence has ordered whoever writes after the copies.
    pub fenced: AtomicBool,
    pub sources: SourceGate,
    pub staged: sync::Arc<Completion<Result<()>>>,
    pub done: sync::Arc<Completion<Result<Outcome>>>,
    pub bytes_staged: AtomicU64,
    pub late_chunks: AtomicUsize,
    pub bytes_written: AtomicU64,
    pub staged_nanos: AtomicU64,
    pub blocked_nanos: AtomicU64,
    /// A forgotten fence would not be noticed: a device did not digest what it was asked to.
    pub blind: AtomicBool,
    /// Some handle or call has seen how it ended.
    pub observed: AtomicBool,
    state: Mutex<State>,
    /// While it keeps them, streams wait for its copies.
    holds: Mutex<Vec<Arc<dyn Any + Send + Sync>>>,
    signal: Arc<Signal>,
    calls: Arc<CallThread>,
    /// The process that made it: in a forked child nothing will ever happen to it.
    origin: ForkGuard,
}

/// How far a save is, and whether it failed.
#[derive(Debug)]
enum State {
    Running(Phase),
    /// In this phase; `Ended` once its threads are done with it.
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

/// What a new ticket is for.
pub(crate) struct Issue {
    pub step: u64,
    pub attempt: Attempt,
    pub deadline: Instant,
}

/// What a save saves.
#[derive(Debug, Default)]
pub(crate) struct Extent {
    pub chunks: usize,
    /// The streams that wrote the tensors of devices.
    pub streams: Vec<DeviceStream<'static>>,
    pub bytes: u64,
    /// Some source can be written while it is read: a later save without a fence between is refused.
    pub writable: bool,
    pub over_budget: usize,
    /// Nothing can write the sources, which are kept until the save has ended, for another attempt; or there are none yet.
    pub kept: bool,
}

/// Of a save whose state has not come: there is nothing that a fence could wait for.
static NOTHING_YET: Extent =
    Extent { chunks: 0, streams: Vec::new(), bytes: 0, writable: false, over_budget: 0, kept: true };

impl Ticket {
    /// `signal` wakes the stager; `calls` is where functions are called that no other thread may call.
    pub fn new(issue: Issue, began: Instant, signal: Arc<Signal>, calls: Arc<CallThread>) -> Self {
        let Issue { step, attempt, deadline } = issue;
        let zero = || AtomicU64::new(0);
        Self {
            step,
            attempt: Mutex::new(attempt),
            began,
            deadline,
            extent: OnceLock::new(),
            awaited: AtomicBool::new(false),
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
            blind: AtomicBool::new(false),
            observed: AtomicBool::new(false),
            state: Mutex::new(State::Running(Phase::Waiting)),
            holds: Mutex::new(Vec::new()),
            signal,
            calls,
            origin: ForkGuard::new(),
        }
    }

    /// What is saved: nothing, as long as that is not known.
    pub fn extent(&self) -> &Extent {
        self.extent.get().unwrap_or(&NOTHING_YET)
    }

    /// Its state is yet to come.
    pub fn is_deferred(&self) -> bool {
        self.extent.get().is_none()
    }

    /// Says what is saved. Once.
    pub fn begin(&self, extent: Extent) {
        let known = self.extent.set(extent);
        debug_assert!(known.is_ok(), "a save began twice");
    }

    pub fn attempt(&self) -> Attempt {
        *lock(&self.attempt)
    }

    pub fn phase(&self) -> Phase {
        lock(&self.state).phase()
    }

    pub fn progress(&self) -> Progress {
        Progress {
            // Whoever was waiting is told first, and may ask at once.
            phase: if self.done.is_complete() { Phase::Ended } else { self.phase() },
            bytes: self.extent().bytes,
            staged: self.bytes_staged.load(Ordering::Relaxed),
            written: self.bytes_written.load(Ordering::Relaxed),
        }
    }

    /// Moves from one phase to the next; false when the save has failed or is elsewhere.
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

    /// Fails the save, unless it failed before or its publish has begun. Returns whether it did.
    pub fn fail(&self, error: Error) -> bool {
        self.fail_as(error, false)
    }

    /// The same. `seen`: the caller of this function knows of the failure, and no other thread may find it unseen in between.
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
            // One that may pass does not stand in the way of a cancellation, or the deadline: the save would be tried again.
            State::Failed { phase, error: there } => {
                (*phase, self.extent().kept && there.is_transient() && !error.is_transient())
            }
            State::Ended => return false,
        };
        if !first || phase >= Phase::Publishing {
            return false;
        }
        if seen {
            self.observed.store(true, Ordering::Release);
        }
        *state = State::Failed { phase, error: error.with_step(self.step) };
        true
    }

    fn tell_failed(&self) {
        self.drop_holds();
        self.signal.notify();
        self.moved.notify();
    }

    /// Begins `attempt`, after one that failed for a reason that may pass and of which nothing is left. False for a save that has
    /// been given up.
    pub fn try_again(&self, attempt: Attempt) -> bool {
        let mut state = lock(&self.state);
        let lasts = matches!(&*state, State::Failed { error, .. } if !error.is_transient());
        if lasts || self.done.is_complete() {
            return false;
        }
        *lock(&self.attempt) = attempt;
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

    /// Fails the save with `why` and resolves it at once, whatever its threads hang in. None when it had
    /// ended.
    pub fn give_up(&self, why: Error) -> Option<Calls<Result<Outcome>>> {
        loop {
            // First: streams that wait for its copies go on before its end is told.
            if self.fail_with(&mut lock(&self.state), why.clone(), false) {
                self.tell_failed();
            }
            // Under one lock with the end, after which the save is not tried again.
            let state = lock(&self.state);
            let error = match &*state {
                // Another attempt was begun meanwhile.
                State::Running(phase) if *phase < Phase::Publishing => continue,
                State::Failed { error, .. } => error.clone(),
                // How the publish ends is not known yet.
                State::Running(_) | State::Ended => {
                    let why = "the save was given up while it was being published";
                    Error::new(ErrorKind::Indeterminate, why).with_step(self.step)
                }
            };
            let calls = self.done.put(Err(error));
            drop(state);
            self.signal.notify();
            return calls;
        }
    }

    /// Ends the save. None when it had been given up.
    pub fn finish(&self, result: Result<Outcome>) -> Option<Calls<Result<Outcome>>> {
        // One that might have been tried again was cancelled, or its deadline passed, meanwhile.
        let last = |e: Error| if e.is_transient() { self.failure().unwrap_or(e) } else { e };
        let result = result.map_err(|e| last(e).with_step(self.step));
        let staged = result.as_ref().map(|_| ()).map_err(Clone::clone);
        let calls = self.done.put(result);
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

    /// Wakes tasks in this thread and has the call thread call functions: the stager, a `save` and a `cancel` have other work.
    pub fn hand_over(&self, calls: Option<Calls<Result<Outcome>>>) {
        calls.into_iter().for_each(|calls| self.calls.hand(calls));
    }

    /// Refuses to say anything about the save in a forked child.
    pub fn alive(&self) -> Result<()> {
        let alive = self.origin.check("a save of the parent cannot be waited for in a forked child");
        alive.map_err(|forked| forked.with_step(self.step))
    }

    /// Refuses a wait to a thread of the executor, which may be the one that has to end it.
    pub fn may_wait(&self) -> Result<()> {
        if !own_threads::is_one_of(&self.signal) {
            return Ok(());
        }
        let why = "a thread of the executor cannot wait for a save: wait in another thread, or await it in a task";
        Err(Error::invalid(why).with_step(self.step))
    }

    /// Says that no live source will be read any more and that the sources are dropped.
    pub fn release(&self) {
        let nanos = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.staged_nanos.store(nanos, Ordering::Relaxed);
        self.sources.set_dropped();
        // The sources of one that has failed may be read for another attempt, until it has ended.
        if !self.extent().kept || !self.failed() || self.done.is_complete() {
            self.staged.complete(self.failure().map_or(Ok(()), Err));
        }
        self.drop_holds();
        self.signal.notify();
        self.moved.notify();
    }

    /// Keeps `hold` until the save has failed or is staged.
    pub fn hold(&self, hold: Arc<dyn Any + Send + Sync>) {
        lock(&self.holds).push(hold);
        // Whoever says so first comes for what is there only after he has said it.
        if self.failed() || self.staged.is_complete() {
            self.drop_holds();
        }
    }

    fn drop_holds(&self) {
        let holds = std::mem::take(&mut *lock(&self.holds));
        drop(holds);
    }

    /// One more chunk is queued.
    pub fn advance(&self) {
        self.queued.fetch_add(1, Ordering::Release);
        self.moved.notify();
    }

    /// Waits until all chunks are queued, or none of them will be any more. False at the deadline.
    pub fn wait_queued(&self, deadline: Instant) -> bool {
        self.wait_until_queued(self.extent().chunks, deadline)
    }

    /// The same, for the first `count` chunks.
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

    /// Asks the stager to drop the sources, from which nothing more is queued.
    pub fn request_release(&self) {
        self.sources.request_release();
        self.signal.notify();
    }

    pub fn add_blocked(&self, time: Duration) {
        self.blocked_nanos.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}
