//! The executor of the same process: the engine's threads, and one thread for saves that must wait.

use super::AsyncCheckpointExecutor;
use super::drive::{self, Ranks, complete};
use super::engine::EngineWriter;
use super::future::{CheckpointFuture, Told, Written};
use super::options::ExecuteOptions;
use super::planner::{DefaultSavePlanner, SavePlanner};
use super::queue::Queue;
use super::staging::{Coming, Inner, StagedState};
use super::writer::StorageWriter;
use crate::compat::checkpoint_path::checkpoint_path;
use crate::compat::ending::shut_down_last;
use crate::completion::deadline_after;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::{CheckpointExecutor, DeferredSave};
use crate::guard::guarded;
use crate::outcome::Outcome;
use crate::save::Save;
use crate::state::StateDict;
use crate::storage::process::HandedOver;
use crate::sync::{Mutex, lock};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

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
    /// The first error that no call has returned; others are logged. `Deadline` when saves were unfinished,
    /// which then fail; `Indeterminate` when one was being published, which may still become durable.
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
    ) -> Result<CheckpointFuture> {
        let (id, told) = (options.checkpoint_id.as_deref(), Told::default());
        let planned = match options.planner {
            Some(mut planner) => planned(state, planner.as_mut(), &mut writer, id, &told),
            None => planned(state, &mut *lock(&self.planner), &mut writer, id, &told),
        };
        let save = match planned {
            Ok(state) => writer.submit(state)?,
            Err(error) => self.executor.failed(self.step(id), error),
        };
        Ok(self.future(save, &told))
    }

    /// The step of a save to `id`, or 0 if it is unknown.
    fn step(&self, id: Option<&Path>) -> u64 {
        id.and_then(|id| checkpoint_path(&self.executor, id).ok()).map_or(0, |(step, _)| step)
    }
}

impl AsyncCheckpointExecutor for ThreadExecutor {
    fn execute_save(&self, state: StagedState, mut options: ExecuteOptions) -> Result<CheckpointFuture> {
        let ranks = options.ranks()?;
        let writer = match options.storage_writer.take() {
            Some(writer) => Writer::Users(writer, ranks),
            None if !matches!(ranks, Ranks::Alone) => {
                let what = "the engine commits for one rank so far: set a storage_writer for several";
                return Err(Error::invalid(what));
            }
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
            (Inner::Stream(state), Writer::Engine(writer)) => return self.submit(state, writer, options),
            later => later,
        };
        if let Inner::Stream(state) = &state {
            // The state is read after this call has returned, and no fence of the engine covers it.
            state.settled()?;
        }
        let step = self.step(options.checkpoint_id.as_deref());
        let (save, deferred) = self.executor.defer(step, options.attempt, options.timeout)?;
        let told = Told::default();
        let future = self.future(save, &told);
        if let Some(deferred) = deferred {
            let planner = options.planner.map_or_else(|| Planner::Kept(self.queued.clone()), Planner::Users);
            let deadline = self.executor.deadline(options.timeout);
            let job = Job { state, planner, writer, deadline, id: options.checkpoint_id, told };
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

enum Writer {
    Engine(EngineWriter),
    Users(Box<dyn StorageWriter>, Ranks),
}

enum Planner {
    Kept(Arc<Mutex<DefaultSavePlanner>>),
    Users(Box<dyn SavePlanner>),
}

/// A save for the queue's thread.
struct Job {
    state: Inner,
    planner: Planner,
    writer: Writer,
    deadline: Instant,
    id: Option<PathBuf>,
    told: Told,
}

impl Job {
    fn run(self, deferred: DeferredSave) {
        let Self { state, mut planner, writer, deadline, id, told } = self;
        let state = match state {
            Inner::Stream(state) => Ok(state),
            Inner::Whole(coming) => guarded("a staging future panicked", || wait_for(coming, &deferred, deadline)),
        };
        let (mut kept, planner): (_, &mut dyn SavePlanner) = match &mut planner {
            Planner::Kept(kept) => (Some(lock(kept)), &mut DefaultSavePlanner::new()),
            Planner::Users(users) => (None, users.as_mut()),
        };
        let planner = kept.as_deref_mut().map_or(planner, |kept| kept);
        match writer {
            Writer::Engine(mut writer) => {
                let state = state.and_then(|state| planned(state, planner, &mut writer, id.as_deref(), &told));
                match state {
                    Ok(state) => writer.begin(deferred, state),
                    Err(error) => deferred.end(Err(error)),
                }
            }
            Writer::Users(mut writer, ranks) => {
                let written = state.and_then(|state| {
                    let writer = writer.as_mut();
                    let (plan, metadata) = drive::plan(&state, planner, writer, id.as_deref(), &ranks, deadline)?;
                    let state = drive::resolve(planner, &plan, state);
                    drive::write(state, &plan, metadata, writer, &ranks, deadline)
                });
                let committed = deferred.elsewhere(id.unwrap_or_default());
                deferred.end(written.map(|metadata| {
                    let _ = told.set(Written::Users(metadata));
                    Outcome::Durable(committed)
                }));
            }
        }
    }
}

/// Plans a save by the engine, and returns the state to save.
fn planned(
    state: StateDict<'static>,
    planner: &mut dyn SavePlanner,
    writer: &mut EngineWriter,
    id: Option<&Path>,
    told: &Told,
) -> Result<StateDict<'static>> {
    let never = Instant::now(); // a single rank waits for no other
    let (plan, metadata) = drive::plan(&state, planner, writer, id, &Ranks::Alone, never)?;
    let state = drive::resolve(planner, &plan, state)?;
    plan.fits(&state)?;
    let _ = told.set(Written::Planned(plan, metadata));
    Ok(state)
}

/// Waits for the staged state; fails when the save ends first.
fn wait_for(mut coming: Coming, deferred: &DeferredSave, deadline: Instant) -> Result<StateDict<'static>> {
    let mut save = deferred.save();
    let first = std::future::poll_fn(move |cx| {
        if save.poll_ended(cx).is_ready() {
            return Poll::Ready(Err(Error::new(ErrorKind::Cancelled, "the save ended before its state was staged")));
        }
        coming.as_mut().poll(cx)
    });
    complete(first, deadline)
}
