//! Storage writers: write and commit.

use super::plan::{Metadata, SavePlan, StorageMeta, WriteResult};
use crate::error::Result;
use crate::state::StateDict;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;

/// A future of what was written.
pub type WriteFuture = Pin<Box<dyn Future<Output = Result<Vec<WriteResult>>> + Send>>;

/// Writes and commits: torch's `StorageWriter`. The engine is one, [`EngineWriter`](super::EngineWriter); one of your own replaces
/// both of its parts. For a place where bytes are kept, below the engine's own commit, see [`Storage`](crate::storage::Storage).
///
/// The methods are called in this order, once per save; those that say so on the coordinator only.
pub trait StorageWriter: Send {
    /// A save to `checkpoint_id` begins; None: to wherever the writer writes.
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

    /// Gets ready.
    ///
    /// # Errors
    /// As [`reset`](Self::reset).
    fn set_up_storage_writer(&mut self, is_coordinator: bool) -> Result<()>;

    /// Looks at what this rank could write.
    ///
    /// # Errors
    /// As [`reset`](Self::reset).
    fn prepare_local_plan(&mut self, plan: SavePlan) -> Result<SavePlan>;

    /// On the coordinator: looks at what each rank is to write. As many plans come back.
    ///
    /// # Errors
    /// As [`reset`](Self::reset).
    fn prepare_global_plan(&mut self, plans: Vec<SavePlan>) -> Result<Vec<SavePlan>>;

    /// Writes what `plan` says of `state`. One result for each item.
    ///
    /// # Errors
    /// As [`reset`](Self::reset); those of the future, too.
    fn write_data(&mut self, plan: &SavePlan, state: StateDict<'static>) -> Result<WriteFuture>;

    /// On the coordinator, when every rank has written: makes it a checkpoint. Until it returns there is none.
    ///
    /// # Errors
    /// As [`reset`](Self::reset).
    fn finish(&mut self, metadata: &mut Metadata, results: Vec<Vec<WriteResult>>) -> Result<()>;
}
