//! torch's distributed checkpointing: `_AsyncCheckpointExecutor.execute_save`, with its planners and storage writers.
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
//! **The order of a save** is torch's: `reset`, `storage_meta`, `set_up_planner`, `set_up_storage_writer`, `create_local_plan`,
//! `prepare_local_plan` on every rank; `create_global_plan`, `prepare_global_plan` on the coordinator; `finish_plan`,
//! `write_data` on every rank; `finish` on the coordinator. **Failure.** Whatever fails, staging, planner, writer, any rank,
//! fails the future of every rank. **Completion.** The future resolves when the checkpoint is durable. **Deadlines.** Every
//! future ends by its deadline, that of the engine's settings unless another is given. **Overlap** is as the engine's settings
//! say, and executors are used as often as one likes; a save that the policy did not begin resolves to None.
//!
//! **Several ranks.** The engine commits for one rank so far. A process group of one is the same as none. A larger one needs a
//! [`StorageWriter`] of the user's own, which then writes and commits; planning, the exchange of plans, and the failure of all
//! ranks when one fails work for any number. With the engine as the writer it is `Invalid`.

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

/// Takes staged states and saves them in the background: torch's `_AsyncCheckpointExecutor`.
pub trait AsyncCheckpointExecutor: Send + Sync {
    /// Saves `state`; the future resolves when the checkpoint is durable.
    ///
    /// # Errors
    /// `Invalid` for options that contradict each other, that the executor cannot carry out, or that name no place; whatever the
    /// overlap policy says; and for tensors that the program may write, with retries or a storage writer of the user's own: those
    /// are read after the call has returned, where no fence knows of it. Everything that happens later comes out of the future.
    fn execute_save(&self, state: StagedState, options: ExecuteOptions) -> Result<CheckpointFuture>;
}
