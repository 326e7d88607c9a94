//! Handlers: each saves one kind of item.

use super::args::CompositeArgs;
use super::future::CommitFuture;
use super::path::PathAwaitingCreation;
use super::signals::{HandlerAwaitableSignal, OperationId, Signals};
use crate::compat::checkpoint_path::CheckpointPath;
use crate::completion::deadline_after;
use crate::error::{Error, Result};
use crate::executor::CheckpointExecutor;
use crate::id::Attempt;
use crate::save::{SaveOptions, Snapshot};
use crate::state::StateDict;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Saves in the background: Orbax's interface of that name.
pub trait AsyncCheckpointHandler: Send + Sync {
    /// The type of item that it saves.
    type Item: Send;

    /// Begins to save `item` as the checkpoint `directory`, and returns the futures of its commit.
    ///
    /// # Errors
    /// Errors that can be detected at once; the futures return all others.
    fn async_save(&self, directory: &Path, item: Self::Item, args: SaveArgs) -> Result<Vec<CommitFuture>>;
}

/// A handler that can begin before the path of the checkpoint is known.
pub trait DeferredPathAsyncCheckpointHandler: AsyncCheckpointHandler {
    /// [`AsyncCheckpointHandler::async_save`] to a path that may not be known yet. The handler does not touch
    /// the path before the futures have received the signals of their operation.
    ///
    /// # Errors
    /// As [`AsyncCheckpointHandler::async_save`]; `Invalid` for an item that the program can write while the
    /// item waits.
    fn async_save_deferred(&self, directory: SavePath, item: Self::Item, args: SaveArgs) -> Result<Vec<CommitFuture>>;
}

/// The path of a checkpoint: Orbax's `epath.Path | PathAwaitingCreation`.
#[derive(Clone, Debug)]
pub enum SavePath {
    /// This path.
    Known(PathBuf),
    /// A path that is not known yet.
    Deferred(PathAwaitingCreation),
}

/// The options of one save.
#[derive(Clone, Debug)]
pub struct SaveArgs {
    force: bool,
    attempt: Option<Attempt>,
    operation: Option<(Signals, OperationId)>,
    timeout: Duration,
    snapshot: Snapshot,
}

impl Default for SaveArgs {
    fn default() -> Self {
        let (timeout, snapshot) = (Duration::from_secs(1200), Snapshot::AtFence);
        Self { force: false, attempt: None, operation: None, timeout, snapshot }
    }
}

impl SaveArgs {
    /// Replaces an existing checkpoint, which stays whole until the new one is durable. Without `force` an
    /// existing checkpoint is a `Conflict`.
    #[must_use]
    pub fn force(mut self, force: bool) -> Self {
        self.force = force;
        self
    }

    /// Sets the attempt, for programs that compare checkpoints byte by byte.
    #[must_use]
    pub fn attempt(mut self, attempt: Attempt) -> Self {
        self.attempt = Some(attempt);
        self
    }

    /// Sets the operation whose signals the futures wait for. Their errors reach this operation, too.
    #[must_use]
    pub fn operation(mut self, signals: &Signals, id: OperationId) -> Self {
        self.operation = Some((signals.clone(), id));
        self
    }

    /// Sets after how long a deferred save fails if it is not durable. The default is 20 minutes.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Sets when the tensors are read. By default they are read until the next fence. [`Snapshot::AtSave`]
    /// does what Orbax does.
    #[must_use]
    pub fn snapshot(mut self, snapshot: Snapshot) -> Self {
        self.snapshot = snapshot;
        self
    }

    /// The step that `directory` names, and how it is saved.
    fn target(&self, executor: &CheckpointExecutor, directory: &Path) -> Result<(u64, SaveOptions)> {
        let target = CheckpointPath::of(executor, directory)?;
        let Self { force: overwrite, attempt, snapshot, .. } = *self;
        let options = SaveOptions { overwrite, attempt, snapshot, ..SaveOptions::default() };
        Ok((target.step, target.options(options)))
    }
}

/// Saves a state dict: Orbax's handler of that name.
///
/// ```
/// use ashore::compat::orbax::{AsyncCheckpointHandler, SaveArgs, StandardCheckpointHandler};
/// use ashore::{Checkpoint, CheckpointExecutor, StateDict};
/// use std::{sync::Arc, time::Duration};
/// # let dir = tempfile::tempdir().unwrap();
/// # let root = dir.path();
/// let executor = CheckpointExecutor::builder(root).arena(16 << 20).chunk(1 << 20).build()?;
/// let handler = StandardCheckpointHandler::new(Arc::new(executor));
/// let mut state = StateDict::new();
/// state.tensor("weights", Arc::new(vec![0.5_f32; 4]))?;
/// for future in handler.async_save(&root.join("100"), state, SaveArgs::default())? {
///     future.result(Duration::from_secs(60))?;
/// }
/// assert_eq!(Checkpoint::open(root.join("100"))?.read_as::<f32>("weights")?, [0.5; 4]);
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct StandardCheckpointHandler {
    executor: Arc<CheckpointExecutor>,
}

impl StandardCheckpointHandler {
    /// Saves with `executor`, below its root.
    pub fn new(executor: Arc<CheckpointExecutor>) -> Self {
        Self { executor }
    }

    fn deferred(
        &self,
        path: PathAwaitingCreation,
        state: StateDict<'static>,
        mut args: SaveArgs,
    ) -> Result<CommitFuture> {
        state.settled()?;
        args.snapshot = Snapshot::AtFence; // the program cannot write the state: nothing has to wait for copies
        let Some((signals, id)) = args.operation.clone() else {
            return Err(Error::invalid("a deferred save needs an operation: set `operation`"));
        };
        let waits = signals.contract(id);
        if !waits.contains(&HandlerAwaitableSignal::StepDirectoryCreation) {
            return Err(Error::invalid(format!(
                "the contract of a deferred save must contain this signal signal={}",
                HandlerAwaitableSignal::StepDirectoryCreation
            )));
        }
        // A thread that waits for a path does not keep the executor alive: dropping the program's last `Arc`
        // waits for saves.
        let (executor, timeout) = (Arc::downgrade(&self.executor), args.timeout);
        let deadline = deadline_after(timeout);
        CommitFuture::contracted(&signals, id, &[], timeout, move || {
            let path = path.path()?;
            CheckpointExecutor::save_when_room(&executor, deadline, state, |executor| args.target(executor, &path))
        })
    }
}

impl AsyncCheckpointHandler for StandardCheckpointHandler {
    type Item = StateDict<'static>;

    fn async_save(&self, directory: &Path, item: Self::Item, args: SaveArgs) -> Result<Vec<CommitFuture>> {
        let (step, options) = args.target(&self.executor, directory)?;
        Ok(vec![CommitFuture::of(self.executor.save_with(step, item, options)?)])
    }
}

impl DeferredPathAsyncCheckpointHandler for StandardCheckpointHandler {
    fn async_save_deferred(&self, directory: SavePath, item: Self::Item, args: SaveArgs) -> Result<Vec<CommitFuture>> {
        match directory {
            SavePath::Known(path) => self.async_save(&path, item, args),
            SavePath::Deferred(path) => Ok(vec![self.deferred(path, item, args)?]),
        }
    }
}

/// Saves several items as one step: Orbax's handler of that name. Each item gets a future. All these futures
/// are of the same commit.
#[derive(Clone, Debug)]
pub struct CompositeCheckpointHandler {
    standard: StandardCheckpointHandler,
}

impl CompositeCheckpointHandler {
    /// Saves with `executor`, below its root.
    pub fn new(executor: Arc<CheckpointExecutor>) -> Self {
        Self { standard: StandardCheckpointHandler::new(executor) }
    }
}

impl AsyncCheckpointHandler for CompositeCheckpointHandler {
    type Item = CompositeArgs;

    fn async_save(&self, directory: &Path, item: Self::Item, args: SaveArgs) -> Result<Vec<CommitFuture>> {
        let items = item.item_names().len();
        let commit = self.standard.async_save(directory, item.into_state(), args)?;
        Ok(commit.iter().cycle().take(items).cloned().collect())
    }
}

impl DeferredPathAsyncCheckpointHandler for CompositeCheckpointHandler {
    fn async_save_deferred(&self, directory: SavePath, item: Self::Item, args: SaveArgs) -> Result<Vec<CommitFuture>> {
        let items = item.item_names().len();
        let commit = self.standard.async_save_deferred(directory, item.into_state(), args)?;
        Ok(commit.iter().cycle().take(items).cloned().collect())
    }
}
