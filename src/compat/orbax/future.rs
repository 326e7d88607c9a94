//! Commit futures.

use super::signals::{HandlerAwaitableSignal, OperationId, Signals};
use crate::compat::ending::end_by;
use crate::completion::{Calls, Cell, Completion, Waiter, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::fork::ForkGuard;
use crate::guard::guarded;
use crate::outcome::Outcome;
use crate::save::Save;
use crate::sync::{Arc as CellArc, Mutex, lock};
use crate::thread::spawn;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

/// A future of a commit: Orbax's `Future` protocol, and a future for any runtime.
///
/// The commit is already under way; waiting does not start it. Clones refer to the same commit. Dropping them
/// does not stop the commit.
#[derive(Clone)]
pub struct CommitFuture(Inner);

#[derive(Clone)]
enum Inner {
    Save(Save),
    Contracted { shared: Arc<Contracted>, done: Waiter<Result<Outcome>> },
}

/// A commit that waits for the signals in its contract.
///
/// It is not a deferred save of the engine. A deferred save has a step and a position among other saves from
/// the call on. This commit learns its step, and the executor that `begin` saves with, only from its signals,
/// and takes no room among the saves before that.
struct Contracted {
    done: Cell<Outcome>,
    /// The save once it has begun. `done` is set under this lock if the commit is cancelled before that.
    begun: Mutex<Option<Save>>,
    signals: Signals,
    origin: ForkGuard,
}

impl CommitFuture {
    pub(super) fn of(save: Save) -> Self {
        Self(Inner::Save(save))
    }

    /// Makes a commit that waits, on its own thread, for the signals in the contract of `id`, then starts a
    /// save with `begin`, and sends `sends` when that save is durable. An error reaches every waiter for a
    /// signal of the save.
    ///
    /// # Errors
    /// `Invalid` for a zero timeout; `Busy` when no thread is available.
    pub fn contracted(
        signals: &Signals,
        id: OperationId,
        sends: &[HandlerAwaitableSignal],
        timeout: Duration,
        begin: impl FnOnce() -> Result<Save> + Send + 'static,
    ) -> Result<Self> {
        if timeout.is_zero() {
            return Err(Error::invalid(format!("the timeout of a commit must not be zero timeout={timeout:?}")));
        }
        let origin = ForkGuard::new();
        let done: Cell<Outcome> = CellArc::new(Completion::new());
        let shared =
            Arc::new(Contracted { done: done.clone(), begun: Mutex::default(), signals: signals.clone(), origin });
        let (commit, contract, sends) = (shared.clone(), signals.contract(id), sends.to_vec());
        spawn("ashore-deferred".into(), move || {
            let run = || commit.run(id, &contract, deadline_after(timeout), begin);
            let ended = guarded("a save panicked", run);
            match &ended {
                Ok(_) => sends.into_iter().for_each(|signal| commit.signals.send(id, signal)),
                Err(error) => commit.signals.fail(id, error),
            }
            commit.done.complete(ended);
        })?;
        Ok(Self(Inner::Contracted { shared, done: Waiter::new(done) }))
    }

    /// Waits for the commit on this thread.
    ///
    /// # Errors
    /// The failure of the commit; `Deadline` when it has not ended after `timeout`: the commit continues, and
    /// can be waited for again.
    pub fn result(&self, timeout: Duration) -> Result<Outcome> {
        match &self.0 {
            Inner::Save(save) => save.wait(timeout),
            Inner::Contracted { shared, done } => {
                shared.alive()?;
                let late = || Error::new(ErrorKind::Deadline, format!("the commit has not ended waited={timeout:?}"));
                done.cell().wait(deadline_after(timeout)).ok_or_else(late)?
            }
        }
    }

    /// Cancels the commit. Returns false when it is too late.
    pub fn cancel(&self) -> bool {
        match &self.0 {
            Inner::Save(save) => save.cancel(),
            Inner::Contracted { shared, .. } => shared.cancel(),
        }
    }
}

impl Contracted {
    fn alive(&self) -> Result<()> {
        self.origin.check("a commit of the parent cannot be waited for in a forked child")
    }

    fn cancel(&self) -> bool {
        if self.alive().is_err() {
            return false;
        }
        let begun = lock(&self.begun);
        if let Some(save) = begun.clone() {
            drop(begun);
            // The thread of the commit sees how the save ends.
            return save.cancel();
        }
        let calls = self.done.put(Err(cancelled()));
        drop(begun);
        let first = calls.map(Calls::here).is_some();
        self.signals.wake();
        first
    }

    fn run(
        &self,
        id: OperationId,
        contract: &[HandlerAwaitableSignal],
        deadline: Instant,
        begin: impl FnOnce() -> Result<Save>,
    ) -> Result<Outcome> {
        // Never zero, because a timeout of zero is refused. The wait itself detects a deadline that has
        // passed.
        let left = || deadline.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        for signal in contract {
            self.signals.wait_or(id, *signal, left(), || self.done.is_complete())?;
        }
        if self.done.is_complete() {
            return Err(cancelled());
        }
        // Takes no lock: `begin` may wait for memory, and `cancel` must not wait for it.
        let save = begin()?;
        let mut begun = lock(&self.begun);
        if self.done.is_complete() {
            drop(begun);
            save.cancel();
            return Err(cancelled());
        }
        *begun = Some(save.clone());
        drop(begun);
        end_by(&save, deadline, deadline, "the deadline of its commit")
    }
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "the save was cancelled")
}

impl Future for CommitFuture {
    type Output = Result<Outcome>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Inner::Save(save) => Pin::new(save).poll(cx),
            Inner::Contracted { shared, done } => {
                shared.alive()?;
                Poll::Ready(ready!(Pin::new(done).poll(cx)))
            }
        }
    }
}

impl fmt::Debug for CommitFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Inner::Save(save) => write!(f, "CommitFuture({save:?})"),
            Inner::Contracted { shared, .. } => write!(f, "CommitFuture(ended={})", shared.done.is_complete()),
        }
    }
}
