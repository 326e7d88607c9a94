//! `CheckpointManager`: when to save, what to keep, and what there is.

use super::args::CompositeArgs;
use super::decision::{DecisionContext, FixedIntervalPolicy, SaveDecisionPolicy};
use super::preservation::{BestN, CheckpointInfo, PreservationPolicy, PreserveAll};
use crate::catalog::{Catalog, Entry};
use crate::checkpoint::Checkpoint;
use crate::completion::{Signal, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::CheckpointExecutor;
use crate::save::{Save, SaveOptions};
use crate::settings::Failed;
use crate::state::StateDict;
use crate::sync::{Mutex, lock};
use crate::ticket::Outcome;
use crate::writer::spawn;
use crossbeam_channel::{Receiver, Sender, unbounded};
use serde::Serialize;
use std::collections::{BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// The metadata under which metrics are kept.
const METRICS: &str = "metrics";

/// How a [`CheckpointManager`] goes about it.
#[must_use]
pub struct CheckpointManagerOptions {
    decision: Box<dyn SaveDecisionPolicy>,
    preservation: Arc<dyn PreservationPolicy>,
    best: Option<BestN>,
    retries: u32,
}

impl Default for CheckpointManagerOptions {
    fn default() -> Self {
        Self { decision: Box::new(FixedIntervalPolicy(1)), preservation: Arc::new(PreserveAll), best: None, retries: 0 }
    }
}

impl CheckpointManagerOptions {
    /// Saves every step, keeps all.
    pub fn new() -> Self {
        Self::default()
    }

    /// Which steps are saved.
    pub fn save_decision_policy(mut self, policy: impl SaveDecisionPolicy + 'static) -> Self {
        self.decision = Box::new(policy);
        self
    }

    /// Which steps are kept. The executor's own retention should be left unset then.
    pub fn preservation_policy(mut self, policy: impl PreservationPolicy + 'static) -> Self {
        self.preservation = Arc::new(policy);
        self
    }

    /// What [`CheckpointManager::best_step`] goes by: Orbax's `best_fn` and `best_mode`.
    pub fn best(mut self, best: BestN) -> Self {
        self.best = Some(best);
        self
    }

    /// Tries a save that failed for a reason that may pass up to `times` times more. Its state is kept until it has ended, beyond
    /// fences, so one that the program can write is `Invalid`.
    pub fn retry(mut self, times: u32) -> Self {
        self.retries = times;
        self
    }
}

impl std::fmt::Debug for CheckpointManagerOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CheckpointManagerOptions").field("best", &self.best).field("retries", &self.retries).finish()
    }
}

/// Saves steps of a run by its policies, and knows which there are: Orbax's class of that name.
///
/// ```
/// use ashore::compat::orbax::{CheckpointManager, CheckpointManagerOptions, FixedIntervalPolicy, LatestN};
/// use ashore::{CheckpointExecutor, StateDict};
/// use std::{sync::Arc, time::Duration};
/// # let dir = tempfile::tempdir().unwrap();
/// let engine = CheckpointExecutor::builder(dir.path()).arena(16 << 20).chunk(1 << 20).build()?;
/// let options = CheckpointManagerOptions::new()
///     .save_decision_policy(FixedIntervalPolicy(10))
///     .preservation_policy(LatestN(2));
/// let manager = CheckpointManager::new(Arc::new(engine), options)?;
/// for step in 0..=40 {
///     if manager.should_save(step) {
///         let mut state = StateDict::new();
///         state.tensor("weights", Arc::new(vec![step as f32; 4]))?;
///         manager.save(step, state)?;
///     }
/// }
/// manager.wait_until_finished(Duration::from_secs(60))?;
/// assert_eq!(manager.all_steps()?, [30, 40]);
/// # Ok::<(), ashore::Error>(())
/// ```
///
/// Whether saves overlap, and what becomes of failures, is as the executor's settings say; an error that nobody saw comes out of
/// the next `save`, `check_for_errors` or `wait_until_finished`.
#[derive(Debug)]
pub struct CheckpointManager {
    catalog: Catalog,
    /// None: read only.
    writer: Option<Writer>,
    options: CheckpointManagerOptions,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Writer {
    executor: Arc<CheckpointExecutor>,
    flights: Sender<Flight>,
}

#[derive(Debug, Default)]
struct Shared {
    progress: Mutex<Progress>,
    changed: Signal,
    preempted: AtomicBool,
}

#[derive(Debug, Default)]
struct Progress {
    /// Steps that are there, as far as this manager knows.
    steps: BTreeSet<u64>,
    saving: BTreeSet<u64>,
    last_save: Option<Instant>,
    errors: VecDeque<Error>,
}

/// A save under way.
#[derive(Debug)]
struct Flight {
    step: u64,
    save: Save,
    kept: Option<StateDict<'static>>,
    retries: u32,
    deadline: Instant,
}

impl CheckpointManager {
    /// Saves by `executor`, below its root.
    ///
    /// # Errors
    /// When the root cannot be read; `Busy` when there is no thread to be had.
    pub fn new(executor: Arc<CheckpointExecutor>, options: CheckpointManagerOptions) -> Result<Self> {
        let catalog = executor.catalog().clone();
        let shared = Arc::new(Shared::default());
        lock(&shared.progress).steps = steps(&catalog)?;
        let (flights, coming) = unbounded();
        let follower =
            Follower { executor: executor.clone(), shared: shared.clone(), preservation: options.preservation.clone() };
        spawn("ashore-manager".into(), move || follower.run(&coming))?;
        Ok(Self { catalog, writer: Some(Writer { executor, flights }), options, shared })
    }

    /// Reads the steps below `root`, and writes nothing: `should_save` is false, `save` saves nothing.
    ///
    /// # Errors
    /// `NotFound` when there is no such directory.
    pub fn read_only(root: impl AsRef<Path>, options: CheckpointManagerOptions) -> Result<Self> {
        Ok(Self { catalog: Catalog::open(root)?, writer: None, options, shared: Arc::default() })
    }

    /// Whether it only reads.
    pub fn is_read_only(&self) -> bool {
        self.writer.is_none()
    }

    /// Whether `step` is to be saved: it is newer than every step that is there or being saved, and the policy wants it.
    pub fn should_save(&self, step: u64) -> bool {
        let context = {
            let progress = lock(&self.shared.progress);
            DecisionContext {
                latest_step: progress.steps.last().max(progress.saving.last()).copied(),
                last_save: progress.last_save,
                is_saving: !progress.saving.is_empty(),
                reached_preemption: self.reached_preemption(),
            }
        };
        !self.is_read_only()
            && context.latest_step.is_none_or(|latest| latest < step)
            && self.options.decision.should_save(step, &context)
    }

    /// Saves `state` as `step`, if [`should_save`](Self::should_save) says so. Returns at once, and whether it is being saved.
    ///
    /// # Errors
    /// The error of an earlier save that nobody has seen; as [`CheckpointExecutor::save`].
    pub fn save(&self, step: u64, state: StateDict<'static>) -> Result<bool> {
        self.save_with(step, state, None::<&()>, false)
    }

    /// Saves items as one step: [`save`](Self::save) of a composite.
    ///
    /// # Errors
    /// As there.
    pub fn save_items(&self, step: u64, items: CompositeArgs) -> Result<bool> {
        self.save(step, items.into_state())
    }

    /// [`save`](Self::save), with metrics, which policies and [`best_step`](Self::best_step) look at. With `force` the policy is
    /// not asked.
    ///
    /// # Errors
    /// As there; `Conflict` when the step is there, with `force`, too; `Invalid` for metrics that cannot be kept exactly, for a
    /// state with metadata of that name, and for `force` when it only reads.
    pub fn save_with(
        &self,
        step: u64,
        state: StateDict<'static>,
        metrics: Option<&(impl Serialize + ?Sized)>,
        force: bool,
    ) -> Result<bool> {
        self.save_as(step, state, metrics, force, SaveOptions::default())
    }

    /// [`save_with`](Self::save_with), with the engine's options.
    ///
    /// # Errors
    /// As there.
    pub fn save_as(
        &self,
        step: u64,
        mut state: StateDict<'static>,
        metrics: Option<&(impl Serialize + ?Sized)>,
        force: bool,
        options: SaveOptions,
    ) -> Result<bool> {
        let Some(Writer { executor, flights }) = &self.writer else {
            let refused = Error::invalid("a manager that only reads cannot save").with_step(step);
            return if force { Err(refused) } else { Ok(false) };
        };
        match executor.settings().failed {
            Failed::NextCall => self.check_for_errors()?,
            Failed::Warn => {}
        }
        if !force && !self.should_save(step) {
            return Ok(false);
        }
        let there = {
            let progress = lock(&self.shared.progress);
            progress.steps.contains(&step) || progress.saving.contains(&step)
        };
        if there && !options.overwrite {
            return Err(Error::new(ErrorKind::Conflict, "the step is there already").with_step(step));
        }
        if let Some(metrics) = metrics {
            state.metadata(METRICS, metrics)?;
        }
        let retries = self.options.retries;
        let (state, kept) = if retries > 0 {
            let (state, kept) = state.split()?;
            (state, Some(kept))
        } else {
            (state, None)
        };
        let deadline = deadline_after(executor.settings().save_deadline);
        let save = executor.save_with(step, state, options)?;
        if let Some(Ok(Outcome::Skipped { .. })) = save.try_get() {
            return Ok(false);
        }
        {
            let mut progress = lock(&self.shared.progress);
            progress.saving.insert(step);
            progress.last_save = Some(Instant::now());
        }
        let gone = |_| Error::internal("the thread of a manager has ended");
        flights.send(Flight { step, save, kept, retries, deadline }).map_err(gone)?;
        Ok(true)
    }

    /// Says that the machine will be taken away, for policies that ask.
    pub fn preempt(&self) {
        self.shared.preempted.store(true, Ordering::Release);
    }

    /// Whether the machine will be taken away.
    pub fn reached_preemption(&self) -> bool {
        self.shared.preempted.load(Ordering::Acquire)
    }

    /// The steps that are there, oldest first: those that this manager knows; from the medium when it only reads.
    ///
    /// # Errors
    /// When the root cannot be read.
    pub fn all_steps(&self) -> Result<Vec<u64>> {
        if self.is_read_only() {
            return Ok(steps(&self.catalog)?.into_iter().collect());
        }
        Ok(lock(&self.shared.progress).steps.iter().copied().collect())
    }

    /// Looks at the medium again, where somebody else may have written.
    ///
    /// # Errors
    /// When the root cannot be read.
    pub fn reload(&self) -> Result<()> {
        let found = steps(&self.catalog)?;
        lock(&self.shared.progress).steps = found;
        Ok(())
    }

    /// The newest step that is there.
    ///
    /// # Errors
    /// As [`all_steps`](Self::all_steps).
    pub fn latest_step(&self) -> Result<Option<u64>> {
        Ok(self.all_steps()?.last().copied())
    }

    /// The step that is best, by what the options say; the newest when they say nothing, None when no step has a metric.
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

    /// The checkpoint of `step`, or the newest for None.
    ///
    /// # Errors
    /// `NotFound` when there is none: never another step.
    pub fn restore(&self, step: Option<u64>) -> Result<Checkpoint> {
        match step {
            Some(step) => self.catalog.checkpoint(step),
            None => self.catalog.latest()?.ok_or_else(|| Error::new(ErrorKind::NotFound, "there is no checkpoint yet")),
        }
    }

    /// Deletes a step.
    ///
    /// # Errors
    /// `Invalid` when it only reads, and for the newest durable step; `NotFound` when it is not there.
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

    /// Waits until no save is under way and what is not kept has gone.
    ///
    /// # Errors
    /// The error of a save that nobody has seen; `Deadline` after `timeout`.
    pub fn wait_until_finished(&self, timeout: Duration) -> Result<()> {
        let look = || lock(&self.shared.progress).saving.is_empty().then_some(());
        if self.shared.changed.wait_until(deadline_after(timeout), look).is_none() {
            return Err(Error::new(ErrorKind::Deadline, format!("saves have not ended waited={timeout:?}")));
        }
        self.check_for_errors()
    }

    /// Returns the error of a save that nobody has seen, once.
    ///
    /// # Errors
    /// That one.
    pub fn check_for_errors(&self) -> Result<()> {
        lock(&self.shared.progress).errors.pop_front().map_or(Ok(()), Err)
    }
}

impl Drop for CheckpointManager {
    fn drop(&mut self) {
        for error in lock(&self.shared.progress).errors.drain(..) {
            tracing::error!(%error, "a save failed and nobody saw it");
        }
    }
}

/// The thread that follows saves to their end.
struct Follower {
    executor: Arc<CheckpointExecutor>,
    shared: Arc<Shared>,
    preservation: Arc<dyn PreservationPolicy>,
}

impl Follower {
    fn run(&self, coming: &Receiver<Flight>) {
        // Saves run ahead of this thread, so that a policy may delete a step before its turn comes here.
        let mut deleted = BTreeSet::new();
        for flight in coming {
            let step = flight.step;
            let ended = self.follow(flight);
            let durable = matches!(ended, Ok(Outcome::Durable(_)));
            if durable && !deleted.remove(&step) {
                lock(&self.shared.progress).steps.insert(step);
            }
            if durable {
                deleted.extend(self.preserve());
            }
            let mut progress = lock(&self.shared.progress);
            progress.saving.remove(&step);
            match ended {
                Err(error) if self.executor.settings().failed == Failed::Warn => {
                    tracing::error!(%error, "a save failed and nobody saw it");
                }
                Err(error) => progress.errors.push_back(error),
                Ok(_) => {}
            }
            drop(progress);
            self.shared.changed.notify();
        }
    }

    /// How the save ends, tried again as often as it may be.
    fn follow(&self, flight: Flight) -> Result<Outcome> {
        let Flight { step, mut save, mut kept, mut retries, deadline } = flight;
        loop {
            let patience = deadline.saturating_duration_since(Instant::now()) + Duration::from_secs(1);
            let ended = save.wait(patience);
            let next = match (&ended, kept.take()) {
                (Err(error), Some(state)) if retries > 0 && may_pass(error) && Instant::now() < deadline => {
                    tracing::warn!(%error, retries, "a save failed and is tried again");
                    state
                }
                _ => return ended,
            };
            retries -= 1;
            let (now, later) = next.split()?;
            kept = Some(later);
            save = self.executor.save_with(step, now, SaveOptions::default())?;
        }
    }

    /// Deletes what the policy does not keep, and returns what of it is still to be followed.
    fn preserve(&self) -> Vec<u64> {
        let catalog = self.executor.catalog();
        let chosen = |entries: &[Entry]| {
            let infos = infos(catalog, entries);
            let keep = self.preservation.should_preserve(&infos);
            let kept = |i: usize| keep.get(i).copied().unwrap_or(true);
            infos.iter().enumerate().filter(|(i, _)| !kept(*i)).map(|(_, info)| info.step).collect()
        };
        let pruned = catch_unwind(AssertUnwindSafe(|| catalog.prune_chosen(chosen)));
        match pruned {
            Ok(Ok(pruned)) => {
                let mut progress = lock(&self.shared.progress);
                let Progress { steps, saving, .. } = &mut *progress;
                let removed = pruned.removed.iter().map(|entry| entry.step);
                return removed.filter(|step| !steps.remove(step) && saving.contains(step)).collect();
            }
            Ok(Err(error)) => tracing::warn!(%error, "steps that are not kept could not be deleted"),
            Err(_) => tracing::error!("a preservation policy panicked; all steps are kept"),
        }
        Vec::new()
    }
}

fn may_pass(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Busy | ErrorKind::NoSpace | ErrorKind::Unavailable)
}

fn steps(catalog: &Catalog) -> Result<BTreeSet<u64>> {
    Ok(catalog.list()?.into_iter().map(|entry| entry.step).collect())
}

fn metrics(checkpoint: &Checkpoint) -> Option<serde_json::Value> {
    checkpoint.metadata(METRICS).ok()
}

fn infos(catalog: &Catalog, entries: &[Entry]) -> Vec<CheckpointInfo> {
    let time = |entry: &Entry| std::fs::metadata(&entry.path).and_then(|meta| meta.modified());
    let info = |entry: &Entry| CheckpointInfo {
        step: entry.step,
        time: time(entry).unwrap_or(SystemTime::UNIX_EPOCH),
        metrics: catalog.checkpoint(entry.step).ok().and_then(|checkpoint| metrics(&checkpoint)),
    };
    entries.iter().map(info).collect()
}
