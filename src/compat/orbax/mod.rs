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

mod args;
mod decision;
mod future;
mod handler;
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
pub use path::{DeferredPath, PathAwaitingCreation};
pub use preservation::{
    AnyPreservationPolicy, BestN, CheckpointInfo, CustomSteps, EveryNSeconds, EveryNSteps, LatestN, PreservationPolicy,
    PreserveAll,
};
pub use signals::{HandlerAwaitableSignal, OperationId, Signals};
pub use steps::{CheckpointManager, CheckpointManagerOptions};
