//! Save decision policies: whether this step is saved.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// The facts that a policy decides on.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct DecisionContext {
    /// The newest step that exists or is being saved.
    pub latest_step: Option<u64>,
    /// When the last save of this manager began.
    pub last_save: Option<Instant>,
    /// Whether a save is under way.
    pub is_saving: bool,
    /// Whether the machine will be preempted:
    /// [`CheckpointManager::reached_preemption`](super::CheckpointManager::reached_preemption).
    pub reached_preemption: bool,
}

/// Decides whether a step is saved. Any `Fn(u64, &DecisionContext) -> bool` is one: Orbax's `should_save_fn`.
///
/// ```
/// use ashore::compat::orbax::*;
/// let now = DecisionContext::default(); // no step yet, no save under way
/// assert!(FixedIntervalPolicy(100).should_save(200, &now));
/// assert!(!SpecificStepsPolicy([1, 10].into()).should_save(200, &now));
/// assert!(InitialSavePolicy.should_save(200, &now));
/// assert!(ContinuousCheckpointingPolicy::default().should_save(200, &now));
/// assert!(!PreemptionCheckpointingPolicy.should_save(200, &now));
/// let late = |step: u64, _: &DecisionContext| step > 1000;
/// assert!(!late.should_save(200, &now));
/// ```
pub trait SaveDecisionPolicy: Send + Sync {
    /// True when `step` is to be saved.
    fn should_save(&self, step: u64, context: &DecisionContext) -> bool;
}

impl<F: Fn(u64, &DecisionContext) -> bool + Send + Sync> SaveDecisionPolicy for F {
    fn should_save(&self, step: u64, context: &DecisionContext) -> bool {
        self(step, context)
    }
}

/// Saves the steps that are multiples of this interval. An interval of 0 saves no step.
#[derive(Clone, Copy, Debug)]
pub struct FixedIntervalPolicy(pub u64);

impl SaveDecisionPolicy for FixedIntervalPolicy {
    fn should_save(&self, step: u64, _: &DecisionContext) -> bool {
        self.0 > 0 && step.is_multiple_of(self.0)
    }
}

/// Saves these steps.
#[derive(Clone, Debug, Default)]
pub struct SpecificStepsPolicy(pub BTreeSet<u64>);

impl SaveDecisionPolicy for SpecificStepsPolicy {
    fn should_save(&self, step: u64, _: &DecisionContext) -> bool {
        self.0.contains(&step)
    }
}

/// Saves as often as possible: whenever no save is under way and the minimum interval has passed.
#[derive(Clone, Copy, Debug, Default)]
pub struct ContinuousCheckpointingPolicy {
    /// The minimum time from the start of one save to the start of the next.
    pub minimum_interval: Duration,
}

impl SaveDecisionPolicy for ContinuousCheckpointingPolicy {
    fn should_save(&self, _: u64, context: &DecisionContext) -> bool {
        !context.is_saving && context.last_save.is_none_or(|last| last.elapsed() >= self.minimum_interval)
    }
}

/// Saves when the machine will be preempted.
#[derive(Clone, Copy, Debug, Default)]
pub struct PreemptionCheckpointingPolicy;

impl SaveDecisionPolicy for PreemptionCheckpointingPolicy {
    fn should_save(&self, _: u64, context: &DecisionContext) -> bool {
        context.reached_preemption
    }
}

/// Saves when there is no checkpoint yet.
#[derive(Clone, Copy, Debug, Default)]
pub struct InitialSavePolicy;

impl SaveDecisionPolicy for InitialSavePolicy {
    fn should_save(&self, _: u64, context: &DecisionContext) -> bool {
        context.latest_step.is_none()
    }
}

/// Saves when any of these policies does.
///
/// ```
/// use ashore::compat::orbax::{AnySavePolicy, CheckpointManagerOptions, FixedIntervalPolicy, InitialSavePolicy};
/// let policy = AnySavePolicy(vec![Box::new(FixedIntervalPolicy(100)), Box::new(InitialSavePolicy)]);
/// let options = CheckpointManagerOptions::new().save_decision_policy(policy);
/// ```
pub struct AnySavePolicy(pub Vec<Box<dyn SaveDecisionPolicy>>);

impl SaveDecisionPolicy for AnySavePolicy {
    fn should_save(&self, step: u64, context: &DecisionContext) -> bool {
        self.0.iter().any(|policy| policy.should_save(step, context))
    }
}

impl std::fmt::Debug for AnySavePolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AnySavePolicy({})", self.0.len())
    }
}
