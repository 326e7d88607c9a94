//! torch's distributed checkpointing: `_AsyncCheckpointExecutor.execute_save`, with its planners and storage
//! writers.
//!
//! | in torch | here |
//! |---|---|
//! | `_AsyncCheckpointExecutor.execute_save` | [`AsyncCheckpointExecutor::execute_save`] |
//! | `staging_future_or_state_dict` | [`StagedState`]: `Ready`, or `Pending` with a [`Staging`] |
//! | `checkpoint_id`, `storage_writer`, `planner`, `process_group`, `no_dist`, `use_collectives` | methods of [`ExecuteOptions`] |
//! | the future, and `AsyncSaveResponse` | [`CheckpointFuture`] of [`Metadata`]; [`CheckpointFuture::staging_completion`] |
//! | `SavePlanner`, `DefaultSavePlanner` | [`SavePlanner`], [`DefaultSavePlanner`] |
//! | `StorageWriter`, `FileSystemWriter` | [`StorageWriter`], [`EngineWriter`] |
//! | `_ThreadBasedAsyncCheckpointExecutor` | [`ThreadExecutor`] |
//! | `_ProcessBasedAsyncCheckpointExecutor` | [`ProcessExecutor`], and `ashore writer`, which [serves](serve) it |
//!
//! **The order of a save** is torch's: `reset`, `storage_meta`, `set_up_planner`, `set_up_storage_writer`,
//! `create_local_plan`, `prepare_local_plan` on every rank; `create_global_plan`, `prepare_global_plan` on
//! the coordinator; `finish_plan`, `write_data` on every rank; `finish` on the coordinator. **Failure.** A
//! failure in staging, in the planner, in the writer or on any rank fails the future of every rank.
//! **Completion.** The future resolves when the checkpoint is durable. **Deadlines.** Every future ends by
//! its deadline; the default is that of the engine's settings. **Overlap** follows the engine's settings. An
//! executor can be used for any number of saves. A save that the policy did not begin resolves to None.
//!
//! **Several ranks.** The engine commits for one rank so far. A process group of one rank is the same as no
//! group. A larger group needs a [`StorageWriter`] of the program, which then writes and commits; planning,
//! the exchange of plans, and the failure of all ranks when one fails work for any number of ranks. A larger
//! group with the engine as the writer is `Invalid`.

mod drive;
mod engine;
mod future;
mod group;
mod options;
mod plan;
mod planner;
mod process;
mod queue;
mod staging;
mod thread;
mod writer;

pub use crate::storage::process::serve;
pub use engine::EngineWriter;
pub use future::CheckpointFuture;
pub use group::{ProcessGroup, ThreadGroup};
pub use options::ExecuteOptions;
pub use plan::{
    ChunkStorageMetadata, Metadata, SavePlan, StorageMeta, StorageMetadata, TensorStorageMetadata, WriteItem,
    WriteKind, WriteResult,
};
pub use planner::{DefaultSavePlanner, SavePlanner};
pub use process::{ProcessBuilder, ProcessExecutor};
pub use staging::{Stage, StagedState, Staging};
pub use thread::ThreadExecutor;
pub use writer::{StorageWriter, WriteFuture};

use crate::error::Result;

/// Saves staged states in the background: torch's `_AsyncCheckpointExecutor`.
pub trait AsyncCheckpointExecutor: Send + Sync {
    /// Saves `state`; the future resolves when the checkpoint is durable.
    ///
    /// # Errors
    /// `Invalid` for options that contradict each other, that the executor cannot carry out, or that do not
    /// say where the checkpoint goes. Errors of the overlap policy. `Invalid` for tensors that the program
    /// may write, if the save has retries or a storage writer of the program: those are read after the call
    /// has returned, and no fence covers them. The future returns all later errors.
    fn execute_save(&self, state: StagedState, options: ExecuteOptions) -> Result<CheckpointFuture>;
}
