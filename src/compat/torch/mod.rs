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
//! the coordinator; `finish_plan`, `write_data` on every rank; `finish` on the coordinator.
//! **Failure.** A failure in staging, in the planner, in the writer or on any rank fails the future of every
//! rank.
//! **Completion.** The future resolves when the checkpoint is durable.
//! **Deadlines.** Every future ends by its deadline; the default is that of the engine's settings.
//! **Overlap** follows the engine's settings. An executor can be used for any number of saves. A save that
//! the policy did not begin resolves to None.
//!
//! **Several ranks.** The ranks are those of the engine, which is built with
//! [`Builder::ranks`](crate::Builder::ranks), for example with [`coordinator`] of a [`ProcessGroup`]. The
//! ranks save one step, with the boxes of all ranks, or no step. An error of one rank is the error of all
//! ranks, and names that rank. All ranks make the same calls in the same order. Ranks exchange plans and
//! results in notes on the storage, so a message has at most a few hundred bytes, however large plans are.
//! The four parameters mean what they mean in torch:
//!
//! | parameter | meaning |
//! |---|---|
//! | `process_group` | none: the ranks of the engine, torch's default group. A group must consist of these ranks |
//! | `no_dist` | this rank alone, as rank 0 and the coordinator; the group is ignored |
//! | `use_collectives` | false: every rank plans on its own. The engine still saves one step |
//! | `is_coordinator` | true on rank 0 of the group, whatever `use_collectives` is, and on a rank that saves alone |
//!
//! The engine itself plans for all ranks and shares replicas out, so that no plan is exchanged unless the
//! program gives a planner. With a planner, rank 0 reads the plans of all ranks. A step has the values of
//! rank 0, and the values that a planner lets other ranks write. To save a value that only another rank has,
//! a planner is needed. A call with a planner waits until all ranks have planned. A call also waits while the
//! staging future of an earlier call has not come. A storage writer of the program is called on each rank,
//! and the overlap policy does not count its saves. [`ProcessExecutor`] saves alone.

mod drive;
mod engine;
mod future;
mod group;
mod job;
mod options;
mod plan;
mod planner;
mod process;
mod queue;
mod saved;
mod staging;
mod thread;
mod travel;
mod turn;
mod writer;

pub use crate::storage::process::serve;
pub use engine::EngineWriter;
pub use future::CheckpointFuture;
pub use group::{ProcessGroup, ThreadGroup, coordinator};
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
    /// may write, if the save has retries or a storage writer of the program: such tensors are read after the
    /// call has returned, and no fence covers them. The future returns all later errors.
    fn execute_save(&self, state: StagedState, options: ExecuteOptions) -> Result<CheckpointFuture>;
}
