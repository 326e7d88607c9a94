//! The future that `execute_save` returns.

use super::plan::{self, Metadata, SavePlan, StorageMeta, WriteItem, WriteResult};
use super::saved;
use crate::completion::Waiter;
use crate::error::Result;
use crate::outcome::{Committed, Outcome};
use crate::save::Save;
use crate::storage::Storage;
use crate::storage::process::HandedOver;
use serde_json::Value;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// A future of the checkpoint's metadata. It resolves to None when the overlap policy did not begin the save.
/// Tasks of any runtime and threads can wait for it.
///
/// Dropping it detaches: the save continues, and the next call returns an error that no call has returned.
///
/// The metadata of a step that the engine has saved with several ranks is read from the tables of that step.
/// `NotFound` then means that the step was durable, and has been deleted or replaced since.
#[must_use = "dropping the future detaches the save; keep it to learn when the checkpoint is durable"]
pub struct CheckpointFuture {
    save: Save,
    told: Told,
    handed: Option<Arc<HandedOver>>,
}

/// The source of the metadata, set before the save ends successfully.
pub(super) type Told = Arc<OnceLock<Written>>;

/// What the save writes, or has written.
pub(super) enum Written {
    /// The engine writes this plan.
    Planned(SavePlan, Metadata),
    /// A storage writer of the program has written the state, and returned this metadata.
    Users(Metadata),
    /// The engine writes the step with several ranks. The tables of the step list its contents. The value is
    /// the data of the planner.
    Together(Arc<dyn Storage>, Option<Value>),
}

impl Written {
    fn metadata(&self, committed: &Committed) -> Result<Metadata> {
        let (plan, planned) = match self {
            Self::Users(metadata) => return Ok(metadata.clone()),
            Self::Together(storage, planner_data) => return saved::metadata(storage, committed, planner_data.clone()),
            Self::Planned(plan, metadata) => (plan, metadata),
        };
        // Describes the final plan: `finish_plan` may change what the planner said before.
        let written = plan::metadata(std::slice::from_ref(plan));
        let state_dict_metadata = written.map(|written| written.state_dict_metadata).unwrap_or_default();
        let (checkpoint_id, save_id) = (committed.path.clone(), Some(committed.attempt.to_string()));
        Ok(Metadata {
            state_dict_metadata,
            storage_data: results(plan, committed),
            storage_meta: Some(StorageMeta { checkpoint_id, save_id }),
            ..planned.clone()
        })
    }
}

/// The write results of the committed items.
pub(super) fn results(plan: &SavePlan, committed: &Committed) -> Vec<WriteResult> {
    let data = serde_json::json!({ "path": committed.path.to_string_lossy(), "attempt": committed.attempt });
    let result = |item: &WriteItem| WriteResult {
        fqn: item.fqn.clone(),
        size_in_bytes: item.bytes(),
        storage_data: data.clone(),
    };
    plan.items.iter().map(result).collect()
}

impl CheckpointFuture {
    pub(super) fn new(save: Save, told: Told, handed: Option<Arc<HandedOver>>) -> Self {
        Self { save, told, handed }
    }

    fn metadata(&self, outcome: Result<Outcome>) -> Result<Option<Metadata>> {
        let committed = outcome?.committed();
        committed.and_then(|committed| Some(self.told.get()?.metadata(&committed))).transpose()
    }

    /// Blocks the thread until the save has ended: torch's `result()`.
    ///
    /// # Errors
    /// The failure of the save; `Deadline` when it has not ended after `timeout`: the save continues, and can
    /// be waited for again.
    pub fn result(&self, timeout: Duration) -> Result<Option<Metadata>> {
        self.metadata(self.save.wait(timeout))
    }

    /// The result of the save, if it has ended: torch's `done()` and `result()`.
    pub fn try_result(&self) -> Option<Result<Option<Metadata>>> {
        Some(self.metadata(self.save.try_get()?))
    }

    /// A future that resolves when nothing more is read from the state: torch's
    /// `AsyncSaveResponse.staging_completion`. It fails when staging fails.
    pub fn staging_completion(&self) -> impl Future<Output = Result<()>> + Send + 'static + use<> {
        staging(self.save.clone(), self.handed.clone())
    }

    /// Cancels the save, which then resolves to `Cancelled` at once. False when it has ended or is being
    /// published.
    pub fn cancel(&self) -> bool {
        self.save.cancel()
    }
}

/// Resolves when the state is staged and, if there is a writer process, handed over to it.
async fn staging(mut save: Save, handed: Option<Arc<HandedOver>>) -> Result<()> {
    save.staged().await?;
    let Some(handed) = handed else { return Ok(()) };
    let mut handed = Waiter::new(handed.cell(save.attempt()));
    std::future::poll_fn(|cx| match Pin::new(&mut handed).poll(cx) {
        // The save may have ended without being handed over: it failed, or `forget` removed its entry.
        Poll::Pending => Pin::new(&mut save).poll(cx).map(|ended| ended.map(drop)),
        handed => handed,
    })
    .await
}

impl Future for CheckpointFuture {
    type Output = Result<Option<Metadata>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let outcome = ready!(Pin::new(&mut self.save).poll(cx));
        Poll::Ready(self.metadata(outcome))
    }
}

impl fmt::Debug for CheckpointFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CheckpointFuture({:?})", self.save)
    }
}
