//! The threads of an executor, and how they end.
//!
//! **Ownership.** The threads are in their own `Arc`, which lives as long as saves do: while the executor is
//! dropped, and after that if one of the threads was its last owner.
//! **Locks.** No lock of this module is held while code of the program runs. So a source that hangs in `save`
//! does not block a shutdown.

use super::ranks::Called;
use crate::completion::{Calls, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::own_threads;
use crate::save::Save;
use crate::staging::Stager;
use crate::sync::{Mutex, MutexGuard, lock};
use crate::thread::spawn;
use crate::tiers::Behind;
use crate::writer::{Pool, Task};
use crossbeam_channel::Sender;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The time that threads have to end after the deadline. Saves that failed at the deadline end as soon as
/// their threads see that.
const JOIN_GRACE: Duration = Duration::from_millis(500);

/// The threads of one executor. See the module.
#[derive(Debug)]
pub(crate) struct Threads {
    stager: Arc<Stager>,
    /// The sending ends. None before the start and after a shutdown.
    channels: Mutex<Option<Channels>>,
    /// Handles of threads that have not been joined.
    handles: Mutex<Vec<JoinHandle<()>>>,
    /// The call thread and the telemetry thread. They end after the others, each of which may still send them
    /// work.
    last: Mutex<Vec<JoinHandle<()>>>,
    /// Set when no save begins any more.
    closed: AtomicBool,
    /// The tiers behind the root, whose threads end last.
    behind: OnceLock<Arc<Behind>>,
    /// The timeout of the last shutdown that the program requested.
    timeout: Mutex<Option<Duration>>,
}

/// The sending ends that keep the threads alive.
#[derive(Debug)]
pub(super) struct Channels {
    pub pool: Pool,
    pub commits: Commits,
}

/// The channel to the committer.
#[derive(Debug)]
pub(super) enum Commits {
    /// The committer receives saves that have ended.
    Alone(Sender<Arc<Task>>),
    /// The committer receives every call of `save`.
    Several(Sender<Called>),
}

impl Threads {
    pub(super) fn new(stager: Arc<Stager>) -> Self {
        Self {
            stager,
            channels: Mutex::default(),
            handles: Mutex::default(),
            last: Mutex::default(),
            closed: AtomicBool::new(false),
            behind: OnceLock::new(),
            timeout: Mutex::default(),
        }
    }

    /// Takes ownership of the started threads.
    pub(super) fn keep(&self, channels: Channels, handles: Vec<JoinHandle<()>>, last: Vec<JoinHandle<()>>) {
        *lock(&self.channels) = Some(channels);
        *lock(&self.handles) = handles;
        *lock(&self.last) = last;
    }

    /// The tiers behind the root.
    pub(crate) fn behind(&self) -> Option<&Arc<Behind>> {
        self.behind.get()
    }

    /// Takes ownership of the promotion threads.
    pub(super) fn keep_behind(&self, behind: Arc<Behind>) {
        let _ = self.behind.set(behind);
    }

    /// Returns the sending ends, which stay while the guard is held. Hold it only to hand over a save.
    pub(super) fn channels(&self) -> MutexGuard<'_, Option<Channels>> {
        lock(&self.channels)
    }

    /// Closes admission: later saves are skipped.
    pub fn close_admission(&self) {
        self.closed.store(true, Ordering::Release);
    }

    pub(super) fn admission_is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Returns the saves under way, in the order of calls.
    pub fn unfinished(&self) -> Vec<Save> {
        self.stager.saves.unfinished().into_iter().map(Save::new).collect()
    }

    /// Whether the calling thread is one of these threads.
    pub(crate) fn are_here(&self) -> bool {
        own_threads::is_one_of(&self.stager.signal)
    }

    /// [`close`](Self::close) at the program's request. The drop waits no longer than this timeout.
    ///
    /// # Errors
    /// As [`close`](Self::close); `Invalid` in a thread of the executor.
    pub(crate) fn shut_down(&self, timeout: Duration) -> Result<()> {
        if self.are_here() {
            let why = "a thread of the executor cannot shut it down: call `shutdown` from another thread";
            return Err(Error::invalid(why));
        }
        *lock(&self.timeout) = Some(timeout);
        self.close(timeout)
    }

    /// Stops taking saves, waits for saves in flight, and ends the threads. Any number of threads may call
    /// it. Each waits for the remaining work.
    ///
    /// # Errors
    /// The first error of a save that no handle and no call has returned. `Deadline` if saves had not ended
    /// by the deadline.
    pub(super) fn close(&self, timeout: Duration) -> Result<()> {
        let channels = lock(&self.channels).take();
        let deadline = deadline_after(timeout);
        let late = self.wait_for_saves(timeout, deadline);
        self.stager.stop();
        drop(channels);
        join(&self.handles, deadline.max(Instant::now() + JOIN_GRACE));
        let unpromoted = self.behind.get().and_then(|behind| behind.close(deadline).err());
        self.stager.calls.close();
        self.stager.telemetry.close();
        join(&self.last, deadline.max(Instant::now() + JOIN_GRACE));
        let mut unseen = std::iter::from_fn(|| self.stager.saves.unobserved());
        let first = unseen.next().or(late).or(unpromoted);
        unseen.for_each(|error| error.log_unseen());
        first.map_or(Ok(()), Err)
    }

    /// [`close`](Self::close) for the drop of the executor. One of these threads would wait for itself.
    /// There, another thread closes, and this call returns at once.
    pub(super) fn close_dropped(self: &Arc<Self>, timeout: Duration) {
        let timeout = lock(&self.timeout).map_or(timeout, |asked| asked.min(timeout));
        if !self.are_here() {
            return log(self.close(timeout));
        }
        let threads = self.clone();
        if let Err(error) = spawn("ashore-close".into(), move || log(threads.close(timeout))) {
            tracing::error!(error = format_args!("{error:#}"), "no thread waits for the saves of a dropped executor");
            // Saves in flight continue. The threads end after the last of them.
            self.stager.stop();
            drop(lock(&self.channels).take());
        }
    }

    /// Waits for saves in flight, and gives up saves that have not ended by the deadline. Returns the error
    /// of the first of these.
    fn wait_for_saves(&self, timeout: Duration, deadline: Instant) -> Option<Error> {
        let mut late = None;
        for ticket in self.stager.saves.unfinished() {
            if ticket.done.wait(deadline).is_none() {
                let what = format!("the executor was shut down before a save ended timeout={timeout:?}");
                let cancelled = Error::new(ErrorKind::Cancelled, what.clone());
                // This call returns the first such error itself, so no other call may return it.
                let failed = ticket.fail_as(cancelled.clone(), true);
                let calls = ticket.give_up(cancelled);
                if failed || calls.is_some() {
                    ticket.observed.store(true, Ordering::Release);
                    calls.into_iter().for_each(Calls::here);
                    tracing::error!(step = ticket.step, what);
                    late.get_or_insert(Error::new(ErrorKind::Deadline, what).with_step(ticket.step));
                }
            }
        }
        late
    }
}

/// Joins the threads that end by `deadline`. A later call may join the others. A thread that hangs in the
/// storage, or in a function of the program, may never end.
fn join(handles: &Mutex<Vec<JoinHandle<()>>>, deadline: Instant) {
    loop {
        let mut handles = lock(handles);
        for ended in handles.extract_if(.., |thread| thread.is_finished()) {
            let _ = ended.join();
        }
        if handles.is_empty() {
            return;
        }
        if Instant::now() >= deadline {
            for thread in handles.iter() {
                tracing::error!(thread = thread.thread().name(), "a thread hangs: the shutdown goes on without it");
            }
            return;
        }
        drop(handles);
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Logs the error of a shutdown that has no caller to return it to.
fn log(closed: Result<()>) {
    if let Err(error) = closed {
        error.log_unseen();
    }
}
