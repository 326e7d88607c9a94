//! The executor of the same process: the engine's threads, and one for what has to be waited for.

use super::AsyncCheckpointExecutor;
use super::drive::{self, Ranks, complete};
use super::engine::EngineWriter;
use super::future::{CheckpointFuture, HandedOver, Planned, staging};
use super::options::ExecuteOptions;
use super::plan::Metadata;
use super::planner::{DefaultSavePlanner, SavePlanner};
use super::queue::{Queue, Record};
use super::staging::{Coming, Inner, StagedState};
use super::writer::StorageWriter;
use crate::compat::unseen::first;
use crate::completion::{Waiter, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::CheckpointExecutor;
use crate::outcome::Outcome;
use crate::save::Save;
use crate::settings::OnUnseenError;
use crate::state::StateDict;
use crate::sync::{Arc as CellArc, Mutex, lock};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

/// Saves on the threads of a [`CheckpointExecutor`]: torch's `_ThreadBasedAsyncCheckpointExecutor`, for as many saves as one
/// likes.
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
    /// That of the queue's thread, which may hold it for as long as a save takes.
    queued: Arc<Mutex<DefaultSavePlanner>>,
    queue: Queue,
    retries: u32,
    handed: Option<Arc<HandedOver>>,
}

impl ThreadExecutor {
    /// Saves by `executor`, whose settings say how saves overlap, when they are overdue and what becomes of failures.
    ///
    /// # Errors
    /// `Busy` when there are no threads to be had.
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

    /// Tries a save that failed for a reason that may pass (`Busy`, `NoSpace`, `Unavailable`) up to `times` times more, until its
    /// deadline. Its state is kept until it has ended, beyond fences, so one that the program can write is `Invalid`.
    #[must_use]
    pub fn retry(mut self, times: u32) -> Self {
        self.retries = times;
        self
    }

    /// A future's staging is complete when the state was handed over.
    pub(super) fn handing_over(mut self, handed: Arc<HandedOver>) -> Self {
        self.handed = Some(handed);
        self
    }

    /// The engine.
    pub fn executor(&self) -> &Arc<CheckpointExecutor> {
        &self.executor
    }

    /// Waits for the saves under way; shuts the engine down, too, when nobody else has it.
    ///
    /// # Errors
    /// The first error that no call has returned; others are logged. `Deadline` when saves were
    /// unfinished, which have failed then; `Indeterminate` when one was being published, which may become
    /// durable.
    pub fn close(mut self, timeout: Duration) -> Result<()> {
        let until = deadline_after(timeout);
        let closed = self.queue.close(timeout);
        let executor = self.executor.clone();
        drop(self);
        let shutdown = |engine: CheckpointExecutor| engine.shutdown(until.saturating_duration_since(Instant::now()));
        let shut = Arc::into_inner(executor).map_or(Ok(()), shutdown);
        first(closed.err().into_iter().chain(shut.err()))
    }

    /// Plans and submits at once, in the calling thread: nothing has to be waited for.
    fn submit(
        &self,
        state: StateDict<'static>,
        mut writer: EngineWriter,
        options: ExecuteOptions,
    ) -> Result<CheckpointFuture> {
        let id = options.checkpoint_id.as_deref();
        let deadline = deadline_after(self.executor.settings().save_timeout);
        let plan = |planner: &mut dyn SavePlanner| {
            let (plan, metadata) = drive::plan(&state, planner, &mut writer, id, &Ranks::Alone, deadline)?;
            let state = drive::resolve(planner, &plan, state)?;
            plan.fits(&state)?;
            Ok((plan, metadata, state))
        };
        let planned = match options.planner {
            Some(mut planner) => plan(planner.as_mut()),
            None => plan(&mut *lock(&self.planner)),
        };
        match planned {
            Ok((plan, metadata, state)) => {
                let save = writer.submit(state)?;
                self.queue.remember(&save);
                Ok(CheckpointFuture::engine(save, Planned { plan, metadata }, self.handed.clone()))
            }
            Err(error) => Ok(CheckpointFuture::queued(self.queue.failed(error))),
        }
    }
}

impl AsyncCheckpointExecutor for ThreadExecutor {
    fn execute_save(&self, state: StagedState, mut options: ExecuteOptions) -> Result<CheckpointFuture> {
        let settings = self.executor.settings();
        let ranks = options.ranks()?;
        let timeout = options.timeout.map_or(settings.save_timeout, |d| d.min(settings.save_timeout));
        let deadline = deadline_after(timeout);
        if let Some(error) = self.queue.unobserved() {
            match settings.on_unseen_error {
                OnUnseenError::NextCall => return Err(error),
                OnUnseenError::Warn => tracing::error!(
                    error = format_args!("{error:#}"),
                    "a save failed, and no call has returned its error"
                ),
            }
        }
        let writer = match options.storage_writer.take() {
            Some(writer) => Writer::Users(writer),
            None if !matches!(ranks, Ranks::Alone) => {
                let what = "the engine commits for one rank so far: several need a storage_writer of their own";
                return Err(Error::invalid(what));
            }
            None => {
                let writer = EngineWriter::new(self.executor.clone()).overwrite(!options.keep_existing);
                let mut writer = writer.attempt(options.attempt).timeout(timeout);
                writer.handed = self.handed.clone();
                Writer::Engine(writer)
            }
        };
        let state = match state {
            StagedState::Ready(state) => Inner::Stream(state),
            StagedState::Pending(staging) => staging.0,
        };
        // Read after this call has returned, where no fence of the engine knows of it.
        let unfenced = self.retries > 0 || matches!(writer, Writer::Users(_));
        if let (Inner::Stream(state), true) = (&state, unfenced) {
            state.settled()?;
        }
        match (state, writer, self.retries) {
            (Inner::Stream(state), Writer::Engine(writer), 0) => self.submit(state, writer, options),
            (state, writer, retries) => {
                let planner = options.planner.map_or_else(|| Planner::Kept(self.queued.clone()), Planner::Users);
                let job = Job { state, planner, writer, ranks, retries, deadline, id: options.checkpoint_id };
                let record = self.queue.push(settings.overlap, deadline, Box::new(move |record| job.run(record)))?;
                Ok(CheckpointFuture::queued(record))
            }
        }
    }
}

impl Drop for ThreadExecutor {
    fn drop(&mut self) {
        if let Err(error) = self.queue.close(self.executor.settings().shutdown_timeout) {
            tracing::error!(error = format_args!("{error:#}"), "a save failed, and no call has returned its error");
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
    Users(Box<dyn StorageWriter>),
}

enum Planner {
    Kept(Arc<Mutex<DefaultSavePlanner>>),
    Users(Box<dyn SavePlanner>),
}

/// A save that the queue's thread carries out.
struct Job {
    state: Inner,
    planner: Planner,
    writer: Writer,
    ranks: Ranks,
    retries: u32,
    deadline: Instant,
    id: Option<PathBuf>,
}

impl Job {
    fn run(self, record: &Record) -> Result<Option<Metadata>> {
        let Self { state, mut planner, mut writer, ranks, mut retries, deadline, id } = self;
        let mut next = match state {
            Inner::Stream(state) => state,
            Inner::Whole(coming) => wait_for(coming, record, deadline)?,
        };
        loop {
            let (now, kept) = if retries > 0 {
                let (now, kept) = next.split()?;
                (now, Some(kept))
            } else {
                (next, None)
            };
            let saved = match &mut planner {
                Planner::Kept(kept) => {
                    once(now, &mut *lock(kept), &mut writer, id.as_deref(), &ranks, deadline, record)
                }
                Planner::Users(users) => {
                    once(now, users.as_mut(), &mut writer, id.as_deref(), &ranks, deadline, record)
                }
            };
            match (saved, kept) {
                (Err(error), Some(kept)) if error.is_transient() && Instant::now() < deadline => {
                    tracing::warn!(error = format_args!("{error:#}"), retries, "a save failed and is tried again");
                    retries -= 1;
                    next = kept;
                }
                (saved, _) => return saved,
            }
        }
    }
}

/// The staged state, when it comes; an error when the save ends before.
fn wait_for(mut coming: Coming, record: &Record, deadline: Instant) -> Result<StateDict<'static>> {
    let mut ended = Waiter::new(CellArc::clone(&record.done));
    let first = std::future::poll_fn(move |cx| {
        if Pin::new(&mut ended).poll(cx).is_ready() {
            return Poll::Ready(Err(Error::new(ErrorKind::Cancelled, "the save ended before its state was staged")));
        }
        coming.as_mut().poll(cx)
    });
    complete(first, deadline)
}

/// One try.
fn once(
    state: StateDict<'static>,
    planner: &mut dyn SavePlanner,
    writer: &mut Writer,
    id: Option<&Path>,
    ranks: &Ranks,
    deadline: Instant,
    record: &Record,
) -> Result<Option<Metadata>> {
    let engine = match writer {
        Writer::Engine(engine) => engine,
        Writer::Users(writer) => {
            let (plan, metadata) = drive::plan(&state, planner, writer.as_mut(), id, ranks, deadline)?;
            let state = drive::resolve(planner, &plan, state);
            return drive::write(state, &plan, metadata, writer.as_mut(), ranks, deadline).map(Some);
        }
    };
    let (plan, metadata) = drive::plan(&state, planner, engine, id, ranks, deadline)?;
    let state = drive::resolve(planner, &plan, state)?;
    plan.fits(&state)?;
    let save = Arc::new(engine.submit(state)?);
    if !record.hand_over(&save) {
        return Err(Error::new(ErrorKind::Cancelled, "the save was cancelled"));
    }
    let left = || deadline.saturating_duration_since(Instant::now()) + GRACE;
    let staged = staging(Save::clone(&save), engine.handed.clone());
    if complete(staged, deadline + GRACE).is_ok() {
        record.staged.complete(Ok(()));
    }
    match save.wait(left())? {
        Outcome::Durable(committed) => Ok(Some(Planned { plan, metadata }.finish(&committed))),
        Outcome::Skipped { .. } | Outcome::Superseded { .. } => Ok(None),
    }
}

/// The engine ends a save at its deadline; this is how much later that may be seen.
const GRACE: Duration = Duration::from_secs(1);
