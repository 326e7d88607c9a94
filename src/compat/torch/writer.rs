//! Storage writers: write and commit.

use super::plan::{Metadata, SavePlan, StorageMeta, WriteResult};
use crate::error::Result;
use crate::state::StateDict;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;

/// A future of what was written.
pub type WriteFuture = Pin<Box<dyn Future<Output = Result<Vec<WriteResult>>> + Send>>;

/// Writes and commits: torch's `StorageWriter`. The engine's storage writer is
/// [`EngineWriter`](super::EngineWriter). A writer of your own replaces both the writing and the commit. To
/// store bytes elsewhere and keep the engine's own commit, see [`Storage`](crate::storage::Storage).
///
/// The methods are called in this order, once per save; some are called on the coordinator only, as their
/// documentation says.
pub trait StorageWriter: Send {
    /// Begins a save to `checkpoint_id`; None means that the writer chooses the place.
    ///
    /// # Errors
    /// Any error fails the save on every rank.
    fn reset(&mut self, checkpoint_id: Option<&Path>) -> Result<()>;

    /// Whether this writer could write to `checkpoint_id`, for programs that choose among several.
    fn validate_checkpoint_id(&self, checkpoint_id: &Path) -> bool {
        let _ = checkpoint_id;
        true
    }

    /// Where this save goes, for planners and for the metadata.
    fn storage_meta(&self) -> Option<StorageMeta> {
        None
    }

    /// Prepares the writer.
    ///
    /// # Errors
    /// As [`reset`](Self::reset).
    fn set_up_storage_writer(&mut self, is_coordinator: bool) -> Result<()>;

    /// Receives the plan of what this rank could write; may change it.
    ///
    /// # Errors
    /// As [`reset`](Self::reset).
    fn prepare_local_plan(&mut self, plan: SavePlan) -> Result<SavePlan>;

    /// On the coordinator: receives the plan of each rank; returns one plan for each.
    ///
    /// # Errors
    /// As [`reset`](Self::reset).
    fn prepare_global_plan(&mut self, plans: Vec<SavePlan>) -> Result<Vec<SavePlan>>;

    /// Writes what `plan` selects of `state`. Resolves to one result for each item.
    ///
    /// # Errors
    /// As [`reset`](Self::reset), also from the future.
    fn write_data(&mut self, plan: &SavePlan, state: StateDict<'static>) -> Result<WriteFuture>;

    /// On the coordinator, when every rank has written: publishes the checkpoint. Until it returns, there is
    /// no checkpoint.
    ///
    /// # Errors
    /// As [`reset`](Self::reset).
    fn finish(&mut self, metadata: &mut Metadata, results: Vec<Vec<WriteResult>>) -> Result<()>;
}
