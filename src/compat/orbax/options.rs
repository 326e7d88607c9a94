//! The options of a manager.

use super::decision::{FixedIntervalPolicy, SaveDecisionPolicy};
use super::preservation::{BestN, PreservationPolicy, PreserveAll};
use crate::error::{Error, Result};
use crate::id::parse_step_name;
use crate::save::Snapshot;
use std::sync::Arc;

/// The policies and options of a [`CheckpointManager`](super::CheckpointManager).
///
/// ```
/// use ashore::CheckpointExecutor;
/// use ashore::compat::orbax::{CheckpointManager, CheckpointManagerOptions, FixedIntervalPolicy, LatestN};
/// use std::sync::Arc;
/// # let root = tempfile::tempdir().unwrap();
/// # let builder = CheckpointExecutor::builder(root.path()).arena(16 << 20).chunk(1 << 20);
/// # let executor = Arc::new(builder.build()?);
/// let options = CheckpointManagerOptions::new()
///     .save_decision_policy(FixedIntervalPolicy(100))
///     .preservation_policy(LatestN(3))
///     .step_format(Some("step"), Some(5));
/// let manager = CheckpointManager::new(executor, options)?;
/// assert!(manager.should_save(200) && !manager.should_save(250));
/// # Ok::<(), ashore::Error>(())
/// ```
#[must_use]
pub struct CheckpointManagerOptions {
    pub(super) decision: Box<dyn SaveDecisionPolicy>,
    pub(super) preservation: Arc<dyn PreservationPolicy>,
    pub(super) best: Option<BestN>,
    pub(super) retries: u32,
    pub(super) snapshot: Snapshot,
    name: Box<dyn Fn(u64) -> String + Send + Sync>,
}

impl Default for CheckpointManagerOptions {
    fn default() -> Self {
        Self {
            decision: Box::new(FixedIntervalPolicy(1)),
            preservation: Arc::new(PreserveAll),
            best: None,
            retries: 0,
            snapshot: Snapshot::AtFence,
            name: Box::new(|step| step.to_string()),
        }
    }
}

impl CheckpointManagerOptions {
    /// Options that save every step and keep every step.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets which steps are saved.
    pub fn save_decision_policy(mut self, policy: impl SaveDecisionPolicy + 'static) -> Self {
        self.decision = Box::new(policy);
        self
    }

    /// Sets which steps are kept. With a policy, leave the executor's own retention unset.
    pub fn preservation_policy(mut self, policy: impl PreservationPolicy + 'static) -> Self {
        self.preservation = Arc::new(policy);
        self
    }

    /// Sets how [`CheckpointManager::best_step`](super::CheckpointManager::best_step) ranks steps: Orbax's
    /// `best_fn` and `best_mode`.
    pub fn best(mut self, best: BestN) -> Self {
        self.best = Some(best);
        self
    }

    /// Retries a save up to `times` times after a failure that may be temporary: see
    /// [`SaveOptions::retries`](crate::SaveOptions::retries).
    pub fn retry(mut self, times: u32) -> Self {
        self.retries = times;
        self
    }

    /// Sets when the tensors are read. Orbax copies them before `save` returns: [`Snapshot::AtSave`]. By
    /// default they are read until the next [`fence`](crate::CheckpointExecutor::fence) of the executor,
    /// which the program must call before it writes them.
    pub fn snapshot(mut self, snapshot: Snapshot) -> Self {
        self.snapshot = snapshot;
        self
    }

    /// Names steps as Orbax does for `step_prefix` and `step_format_fixed_length`: `5` by default, `step_5`
    /// with a prefix, `step_00005` with a prefix and a length.
    pub fn step_format(self, prefix: Option<&str>, fixed_length: Option<usize>) -> Self {
        let prefix = prefix.map(|prefix| format!("{prefix}_")).unwrap_or_default();
        self.step_name(move |step| format!("{prefix}{step:0width$}", width = fixed_length.unwrap_or(0)))
    }

    /// Names steps with `name`: Orbax's `step_name_format`. Existing steps are found under any name that
    /// [`parse_step_name`] accepts.
    pub fn step_name(mut self, name: impl Fn(u64) -> String + Send + Sync + 'static) -> Self {
        self.name = Box::new(name);
        self
    }

    /// The name of a step.
    ///
    /// # Errors
    /// `Invalid` for a name under which the step would not be found again.
    pub(super) fn name_of(&self, step: u64) -> Result<String> {
        let name = (self.name)(step);
        if parse_step_name(&name) == Some(step) {
            return Ok(name);
        }
        let known = "a number, alone or after step_, step-, checkpoint-, ckpt- or iter_";
        Err(Error::invalid(format!("the step would not be found again under this name: use {known} name={name:?}"))
            .with_step(step))
    }
}

impl std::fmt::Debug for CheckpointManagerOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CheckpointManagerOptions").field("best", &self.best).field("retries", &self.retries).finish()
    }
}
