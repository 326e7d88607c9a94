//! The threads of an executor, and how they end.
//!
//! **Ownership.** They are in an `Arc` of their own, which lives as long as saves do: while the executor is being
//! dropped, and after that where one of the threads was its last owner. **Locks.** None of those here is held
//! while code of the program runs, so a source that hangs in `save` does not hang a shutdown.

use crate::completion::{Calls, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::own_threads;
use crate::save::Save;
use crate::staging::Stager;
use crate::sync::{Mutex, MutexGuard, lock};
use crate::thread::spawn;
use crate::writer::{Pool, Task};
use crossbeam_channel::Sender;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What is left to threads to end after the deadline: saves that failed at it end as soon as theirs see it.
const GRACE: Duration = Duration::from_millis(500);

/// See the module.
#[derive(Debug)]
pub(crate) struct Threads {
    stager: Arc<Stager>,
    /// None before the start, and once shut down.
    lines: Mutex<Option<Lines>>,
    /// Of threads that were not seen to end.
    handles: Mutex<Vec<JoinHandle<()>>>,
    /// The call thread, which ends after them: any of them may hand calls over.
    calling: Mutex<Vec<JoinHandle<()>>>,
    /// No save is begun any more.
    closed: AtomicBool,
    /// How long the program was ready to wait when it last shut the executor down itself.
    timeout: Mutex<Option<Duration>>,
}

/// The sending ends that keep the threads alive.
#[derive(Debug)]
pub(super) struct Lines {
    pub pool: Pool,
    pub ended: Sender<Arc<Task>>,
}

impl Threads {
    pub(super) fn new(stager: Arc<Stager>) -> Self {
        Self {
            stager,
            lines: Mutex::default(),
            handles: Mutex::default(),
            calling: Mutex::default(),
            closed: AtomicBool::new(false),
            timeout: Mutex::default(),
        }
    }

    /// Takes charge of threads that have been started.
    pub(super) fn keep(&self, lines: Lines, handles: Vec<JoinHandle<()>>, calling: JoinHandle<()>) {
        *lock(&self.lines) = Some(lines);
        *lock(&self.handles) = handles;
        *lock(&self.calling) = vec![calling];
    }

    /// The sending ends, which stay while the guard is held: only for the moment in which a save is handed over.
    pub(super) fn lines(&self) -> MutexGuard<'_, Option<Lines>> {
        lock(&self.lines)
    }

    /// Begins no save any more; those that are asked for are skipped.
    pub fn close_admission(&self) {
        self.closed.store(true, Ordering::Release);
    }

    pub(super) fn admission_is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// The saves under way, in the order of calls.
    pub fn unfinished(&self) -> Vec<Save> {
        self.stager.saves.unfinished().into_iter().map(Save::new).collect()
    }

    /// Whether the calling thread is one of these.
    pub(super) fn are_here(&self) -> bool {
        own_threads::is_one_of(&self.stager.signal)
    }

    /// As [`close`](Self::close), when the program asks for it. The drop waits no longer than the program did.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn shut_down(&self, timeout: Duration) -> Result<()> {
        if self.are_here() {
            let why = "a thread of the executor cannot shut it down: call `shutdown` from another thread";
            return Err(Error::invalid(why));
        }
        *lock(&self.timeout) = Some(timeout);
        self.close(timeout)
    }

    /// Takes no more saves, waits for those in flight, ends the threads. Any number of threads may call it; each
    /// waits for what is left.
    ///
    /// # Errors
    /// The first error of a save that nobody has seen. `Deadline` when saves were unfinished at the deadline.
    pub(super) fn close(&self, timeout: Duration) -> Result<()> {
        let lines = lock(&self.lines).take();
        let deadline = deadline_after(timeout);
        let late = self.wait_for_saves(timeout, deadline);
        self.stager.stop();
        drop(lines);
        join(&self.handles, deadline.max(Instant::now() + GRACE));
        self.stager.calls.close();
        join(&self.calling, deadline.max(Instant::now() + GRACE));
        let mut unseen = std::iter::from_fn(|| self.stager.saves.unobserved());
        let first = unseen.next().or(late);
        unseen.for_each(|error| {
            tracing::error!(error = format_args!("{error:#}"), "a save failed, and no call has returned its error")
        });
        first.map_or(Ok(()), Err)
    }

    /// As [`close`](Self::close), for the drop of the executor. One of these threads would wait for itself: another
    /// closes then, and this returns at once.
    pub(super) fn close_dropped(self: &Arc<Self>, timeout: Duration) {
        let timeout = lock(&self.timeout).map_or(timeout, |asked| asked.min(timeout));
        if !self.are_here() {
            return log(self.close(timeout));
        }
        let threads = self.clone();
        if let Err(error) = spawn("ashore-close".into(), move || log(threads.close(timeout))) {
            tracing::error!(error = format_args!("{error:#}"), "no thread waits for the saves of a dropped executor");
            // Saves in flight go on, and the threads end after the last of them.
            self.stager.stop();
            drop(lock(&self.lines).take());
        }
    }

    /// Waits for saves in flight, and gives up those that are unfinished at the deadline. Returns what is to be said
    /// of the first of these.
    fn wait_for_saves(&self, timeout: Duration, deadline: Instant) -> Option<Error> {
        let mut late = None;
        for ticket in self.stager.saves.unfinished() {
            if ticket.done.wait(deadline).is_none() {
                let what = format!("the executor was shut down before a save ended timeout={timeout:?}");
                let cancelled = Error::new(ErrorKind::Cancelled, what.clone());
                // This call says so itself, of the first one; no other may.
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

/// Joins the threads that end until `deadline`; a later call may join the others. A thread that hangs in the storage, or in a
/// function of the program, never ends.
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
                tracing::error!(thread = thread.thread().name(), "a thread hangs and is left behind");
            }
            return;
        }
        drop(handles);
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Says what nobody asked for.
fn log(closed: Result<()>) {
    if let Err(error) = closed {
        tracing::error!(error = format_args!("{error:#}"), "a save failed, and no call has returned its error");
    }
}
