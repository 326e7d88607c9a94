//! Orbax: asynchronous handlers, deferred paths with their signals, and the manager of steps.
//!
//! | in Orbax | here |
//! |---|---|
//! | `AsyncCheckpointHandler.async_save(directory, ...)` | [`AsyncCheckpointHandler::async_save`] |
//! | `DeferredPathAsyncCheckpointHandler` | [`DeferredPathAsyncCheckpointHandler`], which takes a [`SavePath`] |
//! | `PathAwaitingCreation`, `DeferredPath` | [`PathAwaitingCreation`], [`DeferredPath`] |
//! | `HandlerAwaitableSignal`, operation ids | [`HandlerAwaitableSignal`], [`OperationId`], [`Signals`] |
//! | `Future`, `CommitFuture` | [`CommitFuture`] |
//! | `StandardCheckpointHandler` | [`StandardCheckpointHandler`] |
//! | `CompositeCheckpointHandler`, `args.Composite` | [`CompositeCheckpointHandler`], [`CompositeArgs`], [`Item`] |
//! | `CheckpointManager` and its options | [`CheckpointManager`], [`CheckpointManagerOptions`] |
//! | save decision policies | [`SaveDecisionPolicy`] and its implementations |
//! | preservation policies | [`PreservationPolicy`] and its implementations |
//!
//! **One step, one commit.** The items of a composite are the tensors and values of one state dict. Their
//! names begin with the name of the item and a dot. All items are committed, or none.
//! **Paths.** A path names the future directory of the checkpoint: a step of the executor's root, or a
//! directory elsewhere ([`SaveOptions::directory`](crate::SaveOptions::directory)). Only the engine makes
//! that directory, atomically. **Errors** reach every waiter for a signal at once.
//! **Overwriting.** With `force` the old step stays whole until the new one is durable.
//!
//! Differences, and what to do about them:
//!
//! | in Orbax | here |
//! |---|---|
//! | `async_save` and `save` return when the tensors have been copied to the host | they return at once and read the tensors until the *fence*: call [`fence`](crate::CheckpointExecutor::fence) before the program writes them, or select [`Snapshot::AtSave`](crate::Snapshot::AtSave) with [`SaveArgs::snapshot`] or [`CheckpointManagerOptions::snapshot`] |
//! | a step is a directory of directories, one for each item | a step is one directory; the items are prefixes of names in it, and [`Item`] reads them. A handler gets the directory of the step, not that of an item |
//! | steps are named `5`, or as `step_prefix`, `step_format_fixed_length` and `step_name_format` say | the same: [`CheckpointManagerOptions::step_format`], [`CheckpointManagerOptions::step_name`]; names that no catalog would find again are `Invalid` |
//! | `all_steps` and `latest_step` include a step that is still being saved | they include only durable steps |
//! | `max_to_keep`, `keep_period`, `keep_time_interval` | preservation policies, as Orbax itself recommends |
//! | a save that is cancelled sends its signals | it fails its operation: waiters for a signal get `Cancelled` at once, and never treat the save as done |
//! | `close` | [`CheckpointManager::close`]; dropping the manager also waits, and logs errors |

mod args;
mod decision;
mod follower;
mod future;
mod handler;
mod options;
mod path;
mod preservation;
mod signals;
mod state;
mod steps;

pub use args::{CompositeArgs, Item};
pub use decision::{
    AnySavePolicy, ContinuousCheckpointingPolicy, DecisionContext, FixedIntervalPolicy, InitialSavePolicy,
    PreemptionCheckpointingPolicy, SaveDecisionPolicy, SpecificStepsPolicy,
};
pub use future::CommitFuture;
pub use handler::{
    AsyncCheckpointHandler, CompositeCheckpointHandler, DeferredPathAsyncCheckpointHandler, SaveArgs, SavePath,
    StandardCheckpointHandler,
};
pub use options::CheckpointManagerOptions;
pub use path::{DeferredPath, PathAwaitingCreation};
pub use preservation::{
    AnyPreservationPolicy, BestN, CheckpointInfo, CustomSteps, EveryNSeconds, EveryNSteps, EveryNStepsClosest,
    LatestDuration, LatestN, PreservationPolicy, PreserveAll,
};
pub use signals::{HandlerAwaitableSignal, OperationId, Signals};
pub use steps::{CheckpointManager, StepMetadata};
