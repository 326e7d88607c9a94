//! The executor in the same process. It uses the engine's threads, and one thread for saves that must wait.

use super::AsyncCheckpointExecutor;
use super::engine::EngineWriter;
use super::future::{CheckpointFuture, Told};
use super::job::{Job, Planner, Writer};
use super::options::{ExecuteOptions, Who};
use super::planner::DefaultSavePlanner;
use super::queue::Queue;
use super::staging::{Inner, StagedState};
use super::turn::{Turn, planned};
use crate::compat::checkpoint_path::CheckpointPath;
use crate::compat::ending::shut_down_last;
use crate::completion::deadline_after;
use crate::error::{Error, Result};
use crate::executor::CheckpointExecutor;
use crate::save::Save;
use crate::state::StateDict;
use crate::storage::process::HandedOver;
use crate::sync::{Mutex, lock};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Saves on the threads of a [`CheckpointExecutor`]: torch's `_ThreadBasedAsyncCheckpointExecutor`, for any
/// number of saves.
///
/// ```
/// use ashore::compat::torch::{AsyncCheckpointExecutor, ExecuteOptions, ThreadExecutor};
/// use ashore::{CheckpointExecutor, StateDict};
/// use std::{sync::Arc, time::Duration};
/// # let dir = tempfile::tempdir().unwrap();
/// # let root = dir.path();
/// let engine = CheckpointExecutor::builder(root).arena(16 << 20).chunk(1 << 20).build()?;
/// let executor = ThreadExecutor::new(Arc::new(engine))?;
/// let mut state = StateDict::new();
/// state.tensor("weights", Arc::new(vec![0.5_f32; 4]))?;
/// let options = ExecuteOptions::new().checkpoint_id(root.join("step-100"));
/// let future = executor.execute_save(state.into(), options)?;
/// let metadata = future.result(Duration::from_secs(60))?.expect("nothing else was being saved");
/// assert!(metadata.state_dict_metadata.contains_key("weights"));
/// executor.close(Duration::from_secs(60))?;
/// # Ok::<(), ashore::Error>(())
/// ```
pub struct ThreadExecutor {
    executor: Arc<CheckpointExecutor>,
    planner: Mutex<DefaultSavePlanner>,
    /// The planner of the queue's thread, which may lock it for as long as a save takes.
    queued: Arc<Mutex<DefaultSavePlanner>>,
    queue: Queue,
    retries: u32,
    handed: Option<Arc<HandedOver>>,
}

impl ThreadExecutor {
    /// Saves with `executor`. Its settings decide how saves overlap, when they are overdue and how failures
    /// are reported.
    ///
    /// # Errors
    /// `Busy` when no thread is available.
    pub fn new(executor: Arc<CheckpointExecutor>) -> Result<Self> {
        Ok(Self {
            executor,
            planner: Mutex::default(),
            queued: Arc::default(),
            queue: Queue::start()?,
            retries: 0,
            handed: None,
        })
    }

    /// Makes the engine retry a save up to `times` times after a failure that may be temporary: see
    /// [`SaveOptions::retries`](crate::SaveOptions::retries). A storage writer of the program is called once.
    #[must_use]
    pub fn retry(mut self, times: u32) -> Self {
        self.retries = times;
        self
    }

    /// Makes the staging of a future complete only when the state was handed over.
    pub(super) fn handing_over(mut self, handed: Arc<HandedOver>) -> Self {
        self.handed = Some(handed);
        self
    }

    /// The engine.
    pub fn executor(&self) -> &Arc<CheckpointExecutor> {
        &self.executor
    }

    /// Waits for the saves under way, and shuts the engine down if it has no other owner.
    ///
    /// # Errors
    /// The first error that no call has returned; others are logged. `Deadline` when saves were unfinished:
    /// they then fail. `Indeterminate` when a save was being published: it may still become durable.
    pub fn close(mut self, timeout: Duration) -> Result<()> {
        let until = deadline_after(timeout);
        let closed = self.queue.close(timeout);
        let executor = self.executor.clone();
        drop(self);
        shut_down_last(executor, closed, until)
    }

    fn future(&self, save: Save, told: &Told) -> CheckpointFuture {
        self.queue.remember(&save);
        CheckpointFuture::new(save, told.clone(), self.handed.clone())
    }

    /// Plans and submits in the calling thread: such a save does not have to wait.
    fn submit(
        &self,
        state: StateDict<'static>,
        mut writer: EngineWriter,
        options: ExecuteOptions,
        who: Who,
    ) -> Result<CheckpointFuture> {
        let (id, told, places) = (options.checkpoint_id.as_deref(), Told::default(), options.places());
        let planned = match (who, options.planner) {
            (Who::Alone, Some(mut planner)) => planned(state, planner.as_mut(), &mut writer, id, &told),
            (Who::Alone, None) => planned(state, &mut *lock(&self.planner), &mut writer, id, &told),
            (Who::Gather | Who::PerRank, mut planner) => {
                let turn = Turn::new(&self.executor, who, self.step(id), options.timeout);
                self.queue.idle(turn.deadline).map_err(|error| self.refused(turn.step, places, error))?;
                turn.planned(Ok(state), planner.as_deref_mut(), &mut writer, id, &told)
            }
        };
        let save = match planned {
            Ok(state) => writer.submit(state)?,
            Err(error) => self.executor.failed(self.step(id), error),
        };
        Ok(self.future(save, &told))
    }

    /// The step of a save to `id`, or 0 if it is unknown.
    fn step(&self, id: Option<&Path>) -> u64 {
        id.and_then(|id| CheckpointPath::of(&self.executor, id).ok()).map_or(0, |path| path.step)
    }

    /// Fails this call on the other ranks, too, in all places that it takes.
    fn refused(&self, step: u64, places: usize, error: Error) -> Error {
        (0..places).for_each(|_| self.executor.refused(step, &error));
        error
    }
}

impl AsyncCheckpointExecutor for ThreadExecutor {
    fn execute_save(&self, state: StagedState, mut options: ExecuteOptions) -> Result<CheckpointFuture> {
        let (step, places) = (self.step(options.checkpoint_id.as_deref()), options.places());
        let refused = |error| self.refused(step, places, error);
        let who = options.who(self.executor.member()).map_err(refused)?;
        let writer = match options.storage_writer.take() {
            Some(writer) => Writer::Users(writer),
            None => {
                let writer = EngineWriter::new(self.executor.clone()).overwrite(!options.keep_existing);
                Writer::Engine(writer.retry(self.retries).attempt(options.attempt).timeout(options.timeout))
            }
        };
        let state = match state {
            StagedState::Ready(state) => Inner::Stream(state),
            StagedState::Pending(staging) => staging.0,
        };
        let (state, writer) = match (state, writer) {
            (Inner::Stream(state), Writer::Engine(writer)) => return self.submit(state, writer, options, who),
            later => later,
        };
        if let Inner::Stream(state) = &state {
            // The state is read after this call has returned, and no fence of the engine covers it.
            state.settled().map_err(refused)?;
        }
        let (save, deferred) = match self.executor.member() {
            None => self.executor.defer(step, options.attempt, options.timeout)?,
            // If each rank decided by itself which saves overlap, ranks could decide differently. So such
            // saves only queue.
            Some(_) => self.executor.stand_in(step, options.timeout).map(|(s, d)| (s, Some(d))).map_err(refused)?,
        };
        let told = Told::default();
        let future = self.future(save, &told);
        if let Some(deferred) = deferred {
            let planner = options.planner.map_or_else(|| Planner::Kept(self.queued.clone()), Planner::Users);
            let (executor, timeout, id) = (self.executor.clone(), options.timeout, options.checkpoint_id);
            let deadline = self.executor.deadline(timeout);
            let job = Job { executor, state, planner, writer, who, step, deadline, id, told };
            self.queue.push(deferred, move |deferred| job.run(deferred));
        }
        Ok(future)
    }
}

impl Drop for ThreadExecutor {
    fn drop(&mut self) {
        if let Err(error) = self.queue.close(self.executor.settings().shutdown_timeout) {
            error.log_unseen();
        }
    }
}

impl std::fmt::Debug for ThreadExecutor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ThreadExecutor({:?})", self.executor)
    }
}
