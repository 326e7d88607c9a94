//! `CheckpointManager`: decides when to save and what to keep, and lists the steps.

use super::args::CompositeArgs;
use super::decision::DecisionContext;
use super::follower::{Follower, METRICS, TIME, infos, metrics, time};
use super::options::CheckpointManagerOptions;
use super::state::ManagerState;
use crate::catalog::Catalog;
use crate::checkpoint::Checkpoint;
use crate::compat::background::Background;
use crate::compat::ending::{first, shut_down_last};
use crate::completion::deadline_after;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::CheckpointExecutor;
use crate::mutant::{self, Mutant};
use crate::outcome::Outcome;
use crate::save::{Save, SaveOptions, Snapshot};
use crate::settings::OnUnseenError;
use crate::state::{Layout, StateDict};
use crate::sync::lock;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

/// Saves steps of a run by its policies, and lists the existing ones: Orbax's class of that name.
///
/// ```
/// use ashore::compat::orbax::{CheckpointManager, CheckpointManagerOptions, FixedIntervalPolicy, LatestN};
/// use ashore::{CheckpointExecutor, StateDict};
/// use std::{sync::Arc, time::Duration};
/// # fn train(root: &std::path::Path, last: u64) -> ashore::Result<(Vec<f32>, Vec<u64>)> {
/// let engine = CheckpointExecutor::builder(root).arena(16 << 20).chunk(1 << 20).build()?;
/// let options = CheckpointManagerOptions::new()
///     .save_decision_policy(FixedIntervalPolicy(10))
///     .preservation_policy(LatestN(2));
/// let manager = CheckpointManager::new(Arc::new(engine), options)?;
/// let (first, mut weights) = match manager.latest_step()? {
///     Some(step) => (step + 1, manager.restore(Some(step))?.read_as::<f32>("weights")?),
///     None => (0, vec![0.0; 4]),
/// };
/// for step in first..=last {
///     weights[0] += 1.0;
///     if manager.should_save(step) {
///         let mut state = StateDict::new();
///         state.tensor("weights", Arc::new(weights.clone()))?; // as this step has left them
///         manager.save(step, state)?;
///     }
/// }
/// manager.wait_until_finished(Duration::from_secs(60))?;
/// assert_eq!(manager.latest_step()?, Some(last / 10 * 10)); // a folder of this name is in `root`
/// # let steps = manager.all_steps()?;
/// manager.close(Duration::from_secs(60))?;
/// # Ok((weights, steps))
/// # }
/// # let (whole, restarted) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
/// # for last in [12, 25] { train(restarted.path(), last)?; }
/// # let (weights, steps) = train(whole.path(), 40)?;
/// # assert_eq!((steps.as_slice(), &train(restarted.path(), 40)?.0), ([30, 40].as_slice(), &weights));
/// # assert!(whole.path().join("40").is_dir());
/// # Ok::<(), ashore::Error>(())
/// ```
///
/// The executor's settings decide whether saves overlap and how failures are reported. The next `save`,
/// `check_for_errors`, `wait_until_finished` or `close` returns an error that no call has returned. Dropping
/// the manager waits for saves under way, at most for the executor's `shutdown_timeout`; errors are then only
/// logged.
#[derive(Debug)]
pub struct CheckpointManager {
    catalog: Catalog,
    /// None: the manager is read-only.
    writer: Option<Writer>,
    options: CheckpointManagerOptions,
    shared: Arc<ManagerState>,
}

#[derive(Debug)]
struct Writer {
    executor: Arc<CheckpointExecutor>,
    /// Waits for the saves to end.
    thread: Background<Save>,
}

/// The facts about a step that need no tensors: Orbax's `StepMetadata`.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct StepMetadata {
    /// The time at which the step was saved.
    pub time: SystemTime,
    /// The metrics that the step was saved with.
    pub metrics: Option<serde_json::Value>,
    checkpoint: Checkpoint,
}

impl StepMetadata {
    /// The metadata `key` of the saved state: Orbax's `custom_metadata`.
    ///
    /// # Errors
    /// As [`Checkpoint::metadata`].
    pub fn custom<T: DeserializeOwned>(&self, key: &str) -> Result<T> {
        self.checkpoint.metadata(key)
    }
}

impl CheckpointManager {
    /// Saves with `executor`, below its root.
    ///
    /// # Errors
    /// When the root cannot be read; `Invalid` for names under which steps are not found again; `Busy` when
    /// no thread is available.
    pub fn new(executor: Arc<CheckpointExecutor>, options: CheckpointManagerOptions) -> Result<Self> {
        options.name_of(0)?;
        let catalog = executor.catalog().clone();
        let shared = ManagerState::of(steps(&catalog)?);
        let follower = Follower {
            catalog: catalog.clone(),
            failed: executor.settings().on_unseen_error,
            shared: shared.clone(),
            preservation: options.preservation.clone(),
        };
        let thread = Background::start("ashore-manager", move |saves| follower.run(saves))?;
        let writer = Some(Writer { executor, thread });
        Ok(Self { catalog, writer, options, shared })
    }

    /// Reads the steps below `root`, and writes nothing: `should_save` is false, and `save` saves nothing.
    ///
    /// # Errors
    /// `NotFound` when there is no such directory.
    pub fn read_only(root: impl AsRef<Path>, options: CheckpointManagerOptions) -> Result<Self> {
        Ok(Self { catalog: Catalog::open(root)?, writer: None, options, shared: ManagerState::of(BTreeSet::new()) })
    }

    /// Whether the manager is read-only.
    pub fn is_read_only(&self) -> bool {
        self.writer.is_none()
    }

    /// Whether `step` is to be saved: it is newer than every step that exists or is being saved, and the
    /// policy selects it.
    pub fn should_save(&self, step: u64) -> bool {
        let context = {
            let progress = lock(&self.shared.progress);
            DecisionContext {
                latest_step: progress.steps.last().max(progress.saving.keys().next_back()).copied(),
                last_save: progress.last_save,
                is_saving: !progress.saving.is_empty(),
                reached_preemption: self.reached_preemption(),
            }
        };
        !self.is_read_only()
            && context.latest_step.is_none_or(|latest| latest < step)
            && self.options.decision.should_save(step, &context)
    }

    /// Saves `state` as `step`, if [`should_save`](Self::should_save) is true. Returns at once whether it is
    /// being saved.
    ///
    /// # Errors
    /// The error of an earlier save that no call has returned; as [`CheckpointExecutor::save`].
    pub fn save(&self, step: u64, state: StateDict<'static>) -> Result<bool> {
        self.save_with(step, state, None::<&()>, false)
    }

    /// Saves items as one step: [`save`](Self::save) of a composite.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn save_items(&self, step: u64, items: CompositeArgs) -> Result<bool> {
        self.save(step, items.into_state())
    }

    /// [`save`](Self::save) with metrics, for policies and [`best_step`](Self::best_step). With `force` the
    /// policy is not asked.
    ///
    /// # Errors
    /// As [`save`](Self::save); `Conflict` when the step exists, even with `force`; `Invalid` for metrics
    /// that cannot be kept exactly, for a state that has metadata under the name of the metrics, and for
    /// `force` on a read-only manager.
    pub fn save_with(
        &self,
        step: u64,
        state: StateDict<'static>,
        metrics: Option<&(impl Serialize + ?Sized)>,
        force: bool,
    ) -> Result<bool> {
        self.save_as(step, state, metrics, force, SaveOptions::default())
    }

    /// [`save_with`](Self::save_with) with the engine's options.
    ///
    /// # Errors
    /// As [`save_with`](Self::save_with).
    pub fn save_as(
        &self,
        step: u64,
        mut state: StateDict<'static>,
        metrics: Option<&(impl Serialize + ?Sized)>,
        force: bool,
        mut options: SaveOptions,
    ) -> Result<bool> {
        let Some(Writer { executor, thread }) = &self.writer else {
            let refused = Error::invalid("a manager that only reads cannot save").with_step(step);
            return if force { Err(refused) } else { Ok(false) };
        };
        match executor.settings().on_unseen_error {
            OnUnseenError::NextCall => self.check_for_errors()?,
            OnUnseenError::Warn => {}
        }
        if !force && !self.should_save(step) {
            return Ok(false);
        }
        let there = {
            let progress = lock(&self.shared.progress);
            progress.steps.contains(&step) || progress.saving.contains_key(&step)
        };
        if there && !options.overwrite {
            return Err(Error::new(ErrorKind::Conflict, "the step exists already").with_step(step));
        }
        if let Some(metrics) = metrics {
            state.metadata(METRICS, metrics)?;
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        state.metadata(TIME, &u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))?;
        if options.name.is_none() {
            options.name = Some(self.options.name_of(step)?);
        }
        if self.options.snapshot == Snapshot::AtSave {
            options.snapshot = Snapshot::AtSave;
        }
        options.retries = options.retries.max(self.options.retries);
        let save = executor.save_with(step, state, options)?;
        if let Some(Ok(Outcome::Skipped { .. })) = save.try_get() {
            return Ok(false);
        }
        {
            let mut progress = lock(&self.shared.progress);
            *progress.saving.entry(step).or_default() += 1;
            progress.last_save = Some(Instant::now());
        }
        thread.send(save)?;
        Ok(true)
    }

    /// Reports that the machine will be preempted, for policies that ask.
    pub fn preempt(&self) {
        self.shared.preempted.store(true, Ordering::Release);
    }

    /// Whether the machine will be preempted.
    pub fn reached_preemption(&self) -> bool {
        self.shared.preempted.load(Ordering::Acquire)
    }

    /// The existing durable steps, oldest first. A read-only manager reads them from the medium. Other
    /// managers return the steps that they know. Orbax includes a step that is being saved; here only
    /// [`should_save`](Self::should_save) counts such a step before it is durable.
    ///
    /// # Errors
    /// When the root cannot be read.
    pub fn all_steps(&self) -> Result<Vec<u64>> {
        if self.is_read_only() {
            return Ok(steps(&self.catalog)?.into_iter().collect());
        }
        Ok(lock(&self.shared.progress).steps.iter().copied().collect())
    }

    /// Reads the steps from the medium again, for roots that other programs write to.
    ///
    /// # Errors
    /// When the root cannot be read.
    pub fn reload(&self) -> Result<()> {
        let found = steps(&self.catalog)?;
        lock(&self.shared.progress).steps = found;
        Ok(())
    }

    /// The newest durable step. Unlike Orbax, it ignores a step that is being saved.
    ///
    /// # Errors
    /// As [`all_steps`](Self::all_steps).
    pub fn latest_step(&self) -> Result<Option<u64>> {
        Ok(self.all_steps()?.last().copied())
    }

    /// The best step by the option `best`. Without that option, the newest step. None when no step has a
    /// metric.
    ///
    /// # Errors
    /// When the root cannot be read.
    pub fn best_step(&self) -> Result<Option<u64>> {
        let Some(best) = &self.options.best else { return self.latest_step() };
        let infos = infos(&self.catalog, &self.catalog.list()?);
        Ok(best.ranking(&infos).first().map(|&index| infos[index].step))
    }

    /// The metrics that a step was saved with.
    ///
    /// # Errors
    /// As [`Catalog::checkpoint`].
    pub fn metrics(&self, step: u64) -> Result<Option<serde_json::Value>> {
        Ok(metrics(&self.catalog.checkpoint(step)?))
    }

    /// The facts about a step that need no tensors.
    ///
    /// # Errors
    /// As [`Catalog::checkpoint`].
    pub fn metadata(&self, step: u64) -> Result<StepMetadata> {
        let checkpoint = self.catalog.checkpoint(step)?;
        Ok(StepMetadata { time: time(&checkpoint), metrics: metrics(&checkpoint), checkpoint })
    }

    /// The tensors of a step, by name, with dtype and shape. Names of a composite begin with the name of the
    /// item and a dot.
    ///
    /// # Errors
    /// As [`Catalog::checkpoint`].
    pub fn item_metadata(&self, step: u64) -> Result<BTreeMap<String, Layout>> {
        let checkpoint = self.catalog.checkpoint(step)?;
        Ok(checkpoint.tensors()?.map(|it| (it.name.to_owned(), Layout::new(it.dtype, it.shape))).collect())
    }

    /// The checkpoint of `step`; None means the newest.
    ///
    /// # Errors
    /// `NotFound` when there is no such step. Another step is never returned instead.
    pub fn restore(&self, step: Option<u64>) -> Result<Checkpoint> {
        match step {
            Some(step) => self.catalog.checkpoint(step),
            None => self.catalog.latest()?.ok_or_else(|| Error::new(ErrorKind::NotFound, "there is no checkpoint yet")),
        }
    }

    /// Deletes a step.
    ///
    /// # Errors
    /// `Invalid` on a read-only manager, and for the newest durable step; `NotFound` when the step does not
    /// exist.
    pub fn delete(&self, step: u64) -> Result<()> {
        if self.is_read_only() {
            return Err(Error::invalid("a manager that only reads cannot delete").with_step(step));
        }
        self.catalog.checkpoint(step)?;
        let pruned = self.catalog.prune_chosen(|_| BTreeSet::from([step]))?;
        if pruned.removed.is_empty() {
            return Err(Error::invalid("the newest durable step is not deleted").with_step(step));
        }
        lock(&self.shared.progress).steps.remove(&step);
        Ok(())
    }

    /// True while a save is under way.
    pub fn is_saving_in_progress(&self) -> bool {
        !lock(&self.shared.progress).saving.is_empty()
    }

    /// Waits until no save is under way and unkept steps have been deleted.
    ///
    /// # Errors
    /// The error of a save that no call has returned; `Deadline` after `timeout`.
    pub fn wait_until_finished(&self, timeout: Duration) -> Result<()> {
        let look = || lock(&self.shared.progress).saving.is_empty().then_some(());
        if self.shared.changed.wait_until(deadline_after(timeout), look).is_none() {
            return Err(Error::new(ErrorKind::Deadline, format!("saves have not ended waited={timeout:?}")));
        }
        self.check_for_errors()
    }

    /// Returns the error of a save that no call has returned, once.
    ///
    /// # Errors
    /// That error.
    pub fn check_for_errors(&self) -> Result<()> {
        lock(&self.shared.progress).errors.pop_front().map_or(Ok(()), Err)
    }
}

impl CheckpointManager {
    /// Waits for saves under way, their retries and pending deletions, and ends the manager. The executor
    /// continues, unless this manager was its last owner: it is then shut down by the same deadline.
    ///
    /// # Errors
    /// The first error that no call has returned; others are logged. `Deadline` after `timeout`.
    pub fn close(mut self, timeout: Duration) -> Result<()> {
        let ended = self.end(timeout);
        let errors = std::mem::take(&mut lock(&self.shared.progress).errors);
        first(ended.err().into_iter().chain(errors))
    }

    fn end(&mut self, timeout: Duration) -> Result<()> {
        let Some(Writer { executor, mut thread }) = self.writer.take() else { return Ok(()) };
        if !thread.origin().is_ours() {
            return Ok(());
        }
        let late = || Error::new(ErrorKind::Deadline, format!("saves have not ended waited={timeout:?}"));
        let deadline = deadline_after(timeout);
        let ended = thread.close(deadline).then_some(()).ok_or_else(late);
        shut_down_last(executor, ended, deadline)
    }
}

impl Drop for CheckpointManager {
    fn drop(&mut self) {
        let Some(writer) = &self.writer else { return };
        let (parents, timeout) = (!writer.thread.origin().is_ours(), writer.executor.settings().shutdown_timeout);
        let timeout = if mutant::on(Mutant::ManagerDrop) { Duration::ZERO } else { timeout };
        if let Err(error) = self.end(timeout) {
            tracing::error!(error = format_args!("{error:#}"), "a manager was dropped before its saves had ended");
        }
        if parents {
            return;
        }
        for error in lock(&self.shared.progress).errors.drain(..) {
            error.log_unseen();
        }
    }
}

fn steps(catalog: &Catalog) -> Result<BTreeSet<u64>> {
    Ok(catalog.list()?.into_iter().map(|entry| entry.step).collect())
}
