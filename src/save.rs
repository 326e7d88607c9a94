//! The handle of a save.

mod durable_in;

pub use durable_in::DurableIn;

use crate::completion::{Waiter, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::outcome::{Outcome, Progress};
use crate::storage::Storage;
use crate::ticket::Ticket;
use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// When the bytes of a whole save are captured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Snapshot {
    /// At the fence at the latest. Each tensor is captured as its own [`Capture`](crate::Capture) says.
    #[default]
    AtFence,
    /// Before `save` returns, for programs that cannot call a fence. If there are host tensors, `save` waits
    /// until they are staged.
    AtSave,
}

/// Options of one save.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct SaveOptions {
    /// Replace the step if it exists. The old checkpoint stays complete until the new one replaces it.
    pub overwrite: bool,
    /// When the bytes are captured.
    pub snapshot: Snapshot,
    /// The identity of the attempt. None: a new one.
    pub attempt: Option<Attempt>,
    /// The directory name. None: [`step_name`](crate::id::step_name) of the step. If the name is not that of
    /// a step, the checkpoint lies beside the steps, and is never listed and never pruned.
    pub name: Option<String>,
    /// The directory that the checkpoint becomes, instead of a step of the root. None: a step of the root.
    /// See [`SaveOptions::directory`].
    pub directory: Option<PathBuf>,
    /// How long after the call the save fails if it is not durable. None: the settings' `save_timeout`, which
    /// is also the maximum.
    pub timeout: Option<Duration>,
    /// How often a save that failed for a transient reason ([`Error::is_transient`]) is retried. Default: 0.
    ///
    /// Each retry is a new attempt at the step. All attempts share the deadline. The save keeps its position
    /// in the queue. The save keeps its state dict until it has ended, and no fence waits for that. So a
    /// tensor that the program can write, or that is borrowed for a scope, is `Invalid`.
    ///
    /// `Invalid` with several ranks; `docs/scale.md` explains the reason. There the program saves again, on
    /// all ranks.
    pub retries: u32,
    /// How long a failed save waits before the first retry; doubled after each further failure. Default: 0.
    /// If the wait would pass the deadline, the save fails.
    pub backoff: Duration,
    /// The storage that the checkpoint is written to, instead of the executor's.
    pub(crate) storage: Option<Arc<dyn Storage>>,
    /// This is the last save of an executor that accepts no further saves.
    pub(crate) last: bool,
}

impl SaveOptions {
    /// Replaces the step if it exists.
    pub fn overwrite(mut self) -> Self {
        self.overwrite = true;
        self
    }

    /// Sets when the bytes are captured.
    pub fn snapshot(mut self, snapshot: Snapshot) -> Self {
        self.snapshot = snapshot;
        self
    }

    /// Sets the attempt, for programs that compare checkpoints byte by byte.
    pub fn attempt(mut self, attempt: Attempt) -> Self {
        self.attempt = Some(attempt);
        self
    }

    /// Sets the directory name. [`parse_step_name`](crate::id::parse_step_name) must return the step for it,
    /// or None.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Publishes the checkpoint as the directory `path`, which may be anywhere. It is not a step of the root:
    /// it is never listed, never pruned, and never the `latest` one. For programs whose framework chooses the
    /// paths of checkpoints.
    ///
    /// The directory must not exist, or must be empty; with [`SaveOptions::overwrite`] it may be a checkpoint
    /// of this library. Its parent is created if it is missing. Until the save ends, the attempt lies beside
    /// the directory under a hidden name. One rename then gives it the name of the directory. When the future
    /// resolves, the directory and all names of its path are durable, and nothing hidden is left. The remains
    /// of a killed process are deleted after the next save into the same parent.
    ///
    /// A call of `save` waits while another save to the same directory, or to the same name in the root, is
    /// under way. So the directory contains the state that was saved last.
    ///
    /// The save is `Invalid` with [`SaveOptions::name`], with several ranks, if the storage is not a local
    /// directory, or if the directory would be a step of the root.
    ///
    /// ```
    /// use ashore::{Checkpoint, CheckpointExecutor, SaveOptions, StateDict};
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let executor = CheckpointExecutor::builder(dir.path().join("root")).arena(16 << 20).chunk(1 << 20).build()?;
    /// let path = dir.path().join("epoch=3.ckpt");
    /// let mut state = StateDict::new();
    /// state.tensor("weights", vec![1.0_f32; 4])?;
    /// let save = executor.save_with(3, state, SaveOptions::default().directory(&path))?;
    /// save.wait(std::time::Duration::from_secs(60))?;
    /// assert_eq!(Checkpoint::open(&path)?.read_as::<f32>("weights")?, [1.0; 4]);
    /// assert!(executor.latest()?.is_none()); // the root has no step
    /// # Ok::<(), ashore::Error>(())
    /// ```
    pub fn directory(mut self, path: impl Into<PathBuf>) -> Self {
        self.directory = Some(path.into());
        self
    }

    /// Retries the save up to `times` times when it fails for a transient reason, first after `backoff`. See
    /// [`SaveOptions::retries`].
    pub fn retry(mut self, times: u32, backoff: Duration) -> Self {
        (self.retries, self.backoff) = (times, backoff);
        self
    }

    pub(crate) fn last(mut self) -> Self {
        self.last = true;
        self
    }

    /// Sets after how long the save fails if it is not durable.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }
}

/// A save in progress: a future of its outcome. Await it in any async runtime, or wait for it in a thread.
/// Clones refer to the same save.
///
/// Wakers are called with no lock held and may poll at once. [`Save::on_done`] calls a function instead.
///
/// Dropping the handle detaches the save, which goes on. The next `save` or `shutdown` reports an error that
/// was not observed.
#[must_use = "dropping the handle detaches the save; keep it to learn when the checkpoint is durable"]
pub struct Save {
    ticket: Arc<Ticket>,
    done: Waiter<Result<Outcome>>,
}

impl Save {
    pub(crate) fn new(ticket: Arc<Ticket>) -> Self {
        let done = Waiter::new(ticket.done.clone());
        Self { ticket, done }
    }

    /// The outcome, if the save has ended without an error.
    pub(crate) fn ended(&self) -> Option<Outcome> {
        self.ticket.done.get().and_then(Result::ok)
    }

    /// The step being saved.
    pub fn step(&self) -> u64 {
        self.ticket.step
    }

    /// The current attempt; the latest if the save was retried.
    pub fn attempt(&self) -> Attempt {
        self.ticket.attempt()
    }

    /// Blocks the thread until the save has ended.
    ///
    /// # Errors
    /// The error of the save. `Deadline` when the save has not ended after `timeout`; it goes on, and can be
    /// waited for again. A save that missed its own deadline has failed with `Deadline`, too:
    /// [`Save::try_get`] is None only for a save that has not ended. `Invalid`, at once, in a function given
    /// to [`Save::on_done`] or in a waker, when the save has not ended.
    pub fn wait(&self, timeout: Duration) -> Result<Outcome> {
        self.ticket.alive()?;
        if !self.ticket.done.is_complete() {
            self.ticket.may_wait()?;
        }
        match self.done.cell().wait(deadline_after(timeout)) {
            Some(result) => self.observe(result),
            None => Err(self.late("the save has not ended", timeout)),
        }
    }

    /// Returns the result of the save, or None if the save has not ended.
    pub fn try_get(&self) -> Option<Result<Outcome>> {
        self.done.cell().get().map(|result| self.observe(result))
    }

    /// Returns a future that resolves when no tensor of this save will be read any more and its sources are
    /// dropped. Then the program may write the tensors: awaiting this future counts as a fence.
    pub fn staged(&self) -> Staged {
        Staged { ticket: self.ticket.clone(), staged: Waiter::new(self.ticket.staged.clone()) }
    }

    /// True when no tensor of this save will be read any more. This call does not mark an error of the save
    /// as observed.
    pub fn is_staged(&self) -> bool {
        self.ticket.staged.is_complete()
    }

    /// The progress of the save.
    pub fn progress(&self) -> Progress {
        self.ticket.progress()
    }

    /// Cancels the save, which resolves to `Cancelled` at once. Its attempt is deleted, and its tensors are
    /// free when [`Save::staged`] resolves. Returns false if the save has ended, or if its publish has begun.
    pub fn cancel(&self) -> bool {
        let cancelled = Error::new(ErrorKind::Cancelled, "the save was cancelled");
        if self.ticket.alive().is_err() || !self.ticket.fail_as(cancelled.clone(), true) {
            return false;
        }
        // `give_up` returns None if the save's threads have already ended it as cancelled.
        self.ticket.hand_over(self.ticket.give_up(cancelled));
        true
    }

    /// Calls `f` with the outcome of the save.
    ///
    /// The committer calls `f`. If the save is given up or superseded, the executor's call thread calls it,
    /// because the committer may hang in the storage. If the save has already ended, the thread that calls
    /// `on_done` calls `f` at once. A shutdown calls `f` for the saves that it gives up itself. A shutdown
    /// returns after all of these calls have run, unless one of them takes half a second longer than the
    /// deadline.
    ///
    /// No lock is held during the call. Commits and other calls wait while `f` runs, so `f` should only pass
    /// on its argument. A panic in `f` is logged. An error that `f` receives counts as observed.
    ///
    /// `f` may read the state of the save and of the executor, begin a save, and drop the last owner of the
    /// executor, whose saves go on. `f` cannot wait for work of its own thread: `wait` of a save that has not
    /// ended, a fence, a scope, `Snapshot::AtSave` and `shutdown` return `Invalid` at once, and a save that
    /// would wait for space returns `Busy` at once. The same holds for wakers. Other waits for this executor,
    /// such as `block_on` of a save, hang. A poll cannot be refused there, because a waker may poll its task
    /// at once, and the task then awaits the next save.
    ///
    /// ```
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let executor = ashore::CheckpointExecutor::builder(dir.path()).arena(16 << 20).chunk(1 << 20).build()?;
    /// # let mut state = ashore::StateDict::new();
    /// # state.tensor("weights", vec![1.0_f32; 4])?;
    /// let (send, ended) = std::sync::mpsc::channel();
    /// executor.save(1, state)?.on_done(move |outcome| send.send(outcome).unwrap());
    /// assert_eq!(ended.recv().unwrap()?.committed().unwrap().step, 1);
    /// # Ok::<(), ashore::Error>(())
    /// ```
    pub fn on_done(&self, f: impl FnOnce(Result<Outcome>) + Send + 'static) {
        if let Err(forked) = self.ticket.alive() {
            return f(Err(forked));
        }
        self.ticket.observed.store(true, Ordering::Release);
        self.ticket.done.on_value(Box::new(f));
    }

    /// True when the save has failed, and no handle or call has returned its error.
    pub(crate) fn is_unseen(&self) -> bool {
        !self.ticket.observed.load(Ordering::Acquire) && matches!(self.done.cell().get(), Some(Err(_)))
    }

    /// Polls whether the save has ended. Does not mark its error as observed.
    pub(crate) fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        Pin::new(&mut self.done).poll(cx).map(drop)
    }

    fn observe(&self, result: Result<Outcome>) -> Result<Outcome> {
        self.ticket.observed.store(true, Ordering::Release);
        result
    }

    fn late(&self, what: &str, timeout: Duration) -> Error {
        let phase = self.ticket.phase();
        Error::new(ErrorKind::Deadline, format!("{what} waited={timeout:?} phase={phase:?}"))
            .with_step(self.ticket.step)
    }
}

impl Clone for Save {
    fn clone(&self) -> Self {
        Self::new(self.ticket.clone())
    }
}

impl Future for Save {
    type Output = Result<Outcome>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.ticket.alive()?;
        let result = ready!(Pin::new(&mut self.done).poll(cx));
        Poll::Ready(self.observe(result))
    }
}

impl fmt::Debug for Save {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Save(step {}, {:?})", self.ticket.step, self.ticket.phase())
    }
}

/// A future of staging, from [`Save::staged`]. An error that it returns counts as observed.
#[must_use = "a future does nothing unless it is awaited or waited for"]
pub struct Staged {
    ticket: Arc<Ticket>,
    staged: Waiter<Result<()>>,
}

impl Staged {
    /// Blocks the thread until the save is staged.
    ///
    /// # Errors
    /// The error of the save, whose sources are then dropped, too. `Deadline` when the save is not staged
    /// after `timeout`. `Invalid`, at once, in a function given to [`Save::on_done`] or in a waker, when the
    /// save is not staged.
    pub fn wait(&self, timeout: Duration) -> Result<()> {
        self.ticket.alive()?;
        if !self.ticket.staged.is_complete() {
            self.ticket.may_wait()?;
        }
        match self.staged.cell().wait(deadline_after(timeout)) {
            Some(result) => self.observe(result),
            None => Err(Error::new(ErrorKind::Deadline, format!("the save is not staged waited={timeout:?}"))
                .with_step(self.ticket.step)),
        }
    }

    fn observe(&self, result: Result<()>) -> Result<()> {
        if result.is_err() {
            self.ticket.observed.store(true, Ordering::Release);
        }
        result
    }
}

impl Future for Staged {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.ticket.alive()?;
        let result = ready!(Pin::new(&mut self.staged).poll(cx));
        Poll::Ready(self.observe(result))
    }
}

impl fmt::Debug for Staged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Staged(step {})", self.ticket.step)
    }
}

/// A future that resolves when the tensors of all saves may be written, from
/// [`CheckpointExecutor::fenced`](crate::CheckpointExecutor::fenced). It does not report the results of the
/// saves; their own futures do.
#[must_use = "a future does nothing unless it is awaited"]
pub struct Fenced {
    reading: Result<Vec<Staged>>,
}

impl Fenced {
    pub(crate) fn new(reading: Result<Vec<Arc<Ticket>>>) -> Self {
        let staged = |ticket: Arc<Ticket>| Staged { staged: Waiter::new(ticket.staged.clone()), ticket };
        Self { reading: reading.map(|tickets| tickets.into_iter().map(staged).collect()) }
    }
}

impl Future for Fenced {
    /// `Invalid` in a forked child.
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let reading = self.reading.as_mut().map_err(|error| error.clone())?;
        while let Some(next) = reading.last_mut() {
            next.ticket.alive()?;
            // Whether it failed or not, nothing reads its tensors any more.
            let _ = ready!(Pin::new(&mut next.staged).poll(cx));
            reading.pop();
        }
        Poll::Ready(Ok(()))
    }
}

impl fmt::Debug for Fenced {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let left = self.reading.as_ref().map_or(0, Vec::len);
        write!(f, "Fenced({left} saves)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call_thread::CallThread;
    use crate::completion::Signal;
    use crate::ticket::Issue;
    use std::sync::atomic::AtomicBool;
    use std::time::Instant;

    /// Records whether the ticket had failed and was observed when the ticket dropped this, like a wait
    /// guard.
    struct Witness(Arc<AtomicBool>, std::sync::Weak<Ticket>);

    impl Drop for Witness {
        fn drop(&mut self) {
            let seen =
                self.1.upgrade().is_some_and(|ticket| ticket.failed() && ticket.observed.load(Ordering::Acquire));
            self.0.store(seen, Ordering::Release);
        }
    }

    /// A cancelled save used to fail its ticket before it marked the ticket as observed. A `save` of another
    /// thread in between was refused with the `Cancelled` error of this save.
    #[test]
    fn a_cancelled_save_is_never_a_failure_that_was_not_seen() {
        let (now, signal) = (Instant::now(), Arc::new(Signal::default()));
        let calls = Arc::new(CallThread::new(signal.clone()));
        let (attempt, deadline) = (Attempt::new(), now + Duration::from_secs(60));
        let issue = Issue { step: 1, attempt, deadline, grace: Duration::ZERO };
        let (ticket, seen) = (Arc::new(Ticket::new(issue, now, signal, calls)), Arc::new(AtomicBool::new(false)));
        ticket.keep_wait_guard(Arc::new(Witness(seen.clone(), Arc::downgrade(&ticket))));
        assert!(Save::new(ticket).cancel());
        assert!(seen.load(Ordering::Acquire));
    }
}
