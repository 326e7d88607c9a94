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
//! | save decision policies | [`SaveDecisionPolicy`] and those that come with it |
//! | preservation policies | [`PreservationPolicy`] and those that come with it |
//!
//! **One step, one commit.** The items of a composite are the tensors and values of one state dict, under names that begin with
//! that of the item and a dot; all of them are committed, or none. **Paths.** A path is where the checkpoint will be, in the root
//! of the executor. The engine makes the directory, whole and at once; nobody makes it before. **Errors** reach whoever waits for
//! a signal, at once. **Overwriting.** With `force` the old step stays whole until the new one is durable.
//!
//! What differs, and what to do about it:
//!
//! | in Orbax | here |
//! |---|---|
//! | `async_save` and `save` return when the tensors have been copied to the host | they return at once and read the tensors until the *fence*: call [`fence`](crate::CheckpointExecutor::fence) before the program writes them, or ask for [`Snapshot::AtSave`](crate::Snapshot::AtSave) by [`SaveArgs::snapshot`] or [`CheckpointManagerOptions::snapshot`] |
//! | a step is a directory of directories, one for each item | a step is one directory; the items are names in it, [`Item`] reads them. A handler is given the directory of the step, not that of an item |
//! | steps are named `5`, or as `step_prefix`, `step_format_fixed_length` and `step_name_format` say | the same: [`CheckpointManagerOptions::step_format`], [`CheckpointManagerOptions::step_name`]; names that no catalog would find again are `Invalid` |
//! | `all_steps` and `latest_step` tell of a step that is still being saved | they tell of durable steps |
//! | `max_to_keep`, `keep_period`, `keep_time_interval` | preservation policies, as Orbax itself recommends |
//! | a save that is cancelled sends its signals | it fails its operation: what waits for a signal gets `Cancelled` at once, and never takes the save for done |
//! | `close` | [`CheckpointManager::close`]; dropping the manager waits, too, and logs errors |

mod args;
mod decision;
mod follower;
mod future;
mod handler;
mod options;
mod path;
mod preservation;
mod signals;
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
