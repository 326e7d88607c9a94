//! The future that `execute_save` returns.

use super::engine::results;
use super::plan::{self, Metadata, SavePlan, StorageMeta};
use super::queue::Record;
use crate::compat::overdue::Cell;
use crate::completion::{Completion, Waiter, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::outcome::{Committed, Outcome};
use crate::save::Save;
use crate::sync::{Arc as CellArc, Mutex, lock};
use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// A future of the checkpoint's metadata; None when the overlap policy did not begin the save. For tasks of any runtime and for
/// threads.
///
/// Dropping it detaches: the save goes on, and an error that nobody saw comes out of the next call.
#[must_use = "dropping the future detaches the save; keep it to learn when the checkpoint is durable"]
pub struct CheckpointFuture(Inner);

enum Inner {
    /// The engine has it.
    Engine { save: Save, planned: Box<Planned>, handed: Option<Arc<HandedOver>> },
    /// A thread of the executor carries it out.
    Queued { record: Arc<Record>, done: Waiter<Result<Option<Metadata>>> },
}

/// What was planned, for the metadata.
#[derive(Clone)]
pub(super) struct Planned {
    pub plan: SavePlan,
    pub metadata: Metadata,
}

impl Planned {
    pub fn finish(&self, committed: &Committed) -> Metadata {
        // What was written, whatever the planner said of it before its last word.
        let written = plan::metadata(std::slice::from_ref(&self.plan));
        let state_dict_metadata = written.map(|written| written.state_dict_metadata).unwrap_or_default();
        let mut metadata = Metadata { state_dict_metadata, ..self.metadata.clone() };
        metadata.storage_data = results(&self.plan, committed);
        let (checkpoint_id, save_id) = (committed.path.clone(), Some(committed.attempt.to_string()));
        metadata.storage_meta = Some(StorageMeta { checkpoint_id, save_id });
        metadata
    }

    fn outcome(&self, outcome: Result<Outcome>) -> Result<Option<Metadata>> {
        Ok(outcome?.committed().map(|committed| self.finish(&committed)))
    }
}

impl CheckpointFuture {
    pub(super) fn engine(save: Save, planned: Planned, handed: Option<Arc<HandedOver>>) -> Self {
        Self(Inner::Engine { save, planned: Box::new(planned), handed })
    }

    pub(super) fn queued(record: Arc<Record>) -> Self {
        let done = Waiter::new(record.done.clone());
        Self(Inner::Queued { record, done })
    }

    /// Blocks the thread until the save has ended: torch's `result()`.
    ///
    /// # Errors
    /// How the save failed; `Deadline` when it has not ended after `timeout`: it goes on then, and can be waited for again.
    pub fn result(&self, timeout: Duration) -> Result<Option<Metadata>> {
        match &self.0 {
            Inner::Engine { save, planned, .. } => planned.outcome(save.wait(timeout)),
            Inner::Queued { record, done } => {
                record.alive()?;
                let late = || Error::new(ErrorKind::Deadline, format!("the save has not ended waited={timeout:?}"));
                let result = done.cell().wait(deadline_after(timeout)).ok_or_else(late)?;
                record.observe();
                result
            }
        }
    }

    /// How the save ended, if it has: torch's `done()`, and the result with it.
    pub fn try_result(&self) -> Option<Result<Option<Metadata>>> {
        match &self.0 {
            Inner::Engine { save, planned, .. } => Some(planned.outcome(save.try_get()?)),
            Inner::Queued { record, done } => {
                let result = done.cell().get()?;
                record.observe();
                Some(result)
            }
        }
    }

    /// A future of the moment when nothing more is read from the state: torch's `AsyncSaveResponse.staging_completion`. It fails
    /// when staging fails.
    pub fn staging_completion(&self) -> impl Future<Output = Result<()>> + Send + 'static + use<> {
        let staged = match &self.0 {
            Inner::Engine { save, handed, .. } => Ok((save.clone(), handed.clone())),
            Inner::Queued { record, .. } => Err((record.clone(), Waiter::new(record.staged.clone()))),
        };
        async move {
            match staged {
                Ok((save, handed)) => staging(save, handed).await,
                Err((record, staged)) => {
                    record.alive()?;
                    staged.await
                }
            }
        }
    }

    /// Cancels the save, which resolves to `Cancelled` at once. False when it is too late: it has ended or is being published.
    pub fn cancel(&self) -> bool {
        match &self.0 {
            Inner::Engine { save, .. } => save.cancel(),
            Inner::Queued { record, .. } => record.cancel(),
        }
    }
}

/// Which saves a writer process has been handed.
#[derive(Debug, Default)]
pub(super) struct HandedOver(Mutex<HashMap<Attempt, Cell<()>>>);

impl HandedOver {
    fn cell(&self, attempt: Attempt) -> Cell<()> {
        lock(&self.0).entry(attempt).or_insert_with(|| CellArc::new(Completion::new())).clone()
    }

    pub fn done(&self, attempt: Attempt) {
        self.cell(attempt).complete(Ok(()));
    }

    pub fn forget(&self, attempt: Attempt) {
        lock(&self.0).remove(&attempt);
    }
}

/// Staged, and handed over where there is a writer process.
pub(super) async fn staging(mut save: Save, handed: Option<Arc<HandedOver>>) -> Result<()> {
    save.staged().await?;
    let Some(handed) = handed else { return Ok(()) };
    let mut handed = Waiter::new(handed.cell(save.attempt()));
    std::future::poll_fn(|cx| match Pin::new(&mut handed).poll(cx) {
        // It may have ended without: forgotten by now, or failed.
        Poll::Pending => Pin::new(&mut save).poll(cx).map(|ended| ended.map(drop)),
        handed => handed,
    })
    .await
}

impl Future for CheckpointFuture {
    type Output = Result<Option<Metadata>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Inner::Engine { save, planned, .. } => {
                let outcome = ready!(Pin::new(save).poll(cx));
                Poll::Ready(planned.outcome(outcome))
            }
            Inner::Queued { record, done } => {
                record.alive()?;
                let result = ready!(Pin::new(done).poll(cx));
                record.observe();
                Poll::Ready(result)
            }
        }
    }
}

impl fmt::Debug for CheckpointFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Inner::Engine { save, .. } => write!(f, "CheckpointFuture({save:?})"),
            Inner::Queued { record, .. } => write!(f, "CheckpointFuture(ended={})", record.done.is_complete()),
        }
    }
}
