//! Preservation policies: which steps are kept.

use crate::catalog::ranking;
use crate::mutant::{self, Mutant};
use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

/// The facts about a step that policies decide on.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CheckpointInfo {
    /// The step.
    pub step: u64,
    /// The time of the save in the manifest. For a step that no manager saved: the modification time of the
    /// directory, or the beginning of 1970 if there is none.
    pub time: SystemTime,
    /// The metrics that the step was saved with.
    pub metrics: Option<serde_json::Value>,
}

/// Decides which steps are kept. Any `Fn(&[CheckpointInfo]) -> Vec<bool>` is one.
///
/// The newest durable step always stays, and no step is deleted before a newer step is durable.
///
/// ```
/// use ashore::compat::orbax::*;
/// use std::time::Duration;
/// let day = Duration::from_secs(24 * 60 * 60);
/// let kept = AnyPreservationPolicy(vec![
///     Box::new(LatestN(3)),
///     Box::new(LatestDuration(day)),
///     Box::new(EveryNSteps(10_000)),
///     Box::new(EveryNStepsClosest(2_500)),
///     Box::new(EveryNSeconds(3600)),
///     Box::new(CustomSteps([1, 500].into())),
/// ]);
/// let options = CheckpointManagerOptions::new().preservation_policy(kept);
/// let everything = CheckpointManagerOptions::new().preservation_policy(PreserveAll);
/// ```
pub trait PreservationPolicy: Send + Sync {
    /// Returns for each checkpoint, oldest first, whether it is kept. Checkpoints beyond the end of the
    /// result are kept.
    fn should_preserve(&self, checkpoints: &[CheckpointInfo]) -> Vec<bool>;
}

impl<F: Fn(&[CheckpointInfo]) -> Vec<bool> + Send + Sync> PreservationPolicy for F {
    fn should_preserve(&self, checkpoints: &[CheckpointInfo]) -> Vec<bool> {
        self(checkpoints)
    }
}

/// Keeps all steps.
#[derive(Clone, Copy, Debug, Default)]
pub struct PreserveAll;

impl PreservationPolicy for PreserveAll {
    fn should_preserve(&self, checkpoints: &[CheckpointInfo]) -> Vec<bool> {
        vec![true; checkpoints.len()]
    }
}

/// Keeps this many of the newest steps.
#[derive(Clone, Copy, Debug)]
pub struct LatestN(pub usize);

impl PreservationPolicy for LatestN {
    fn should_preserve(&self, checkpoints: &[CheckpointInfo]) -> Vec<bool> {
        (0..checkpoints.len()).map(|i| i + self.0 >= checkpoints.len()).collect()
    }
}

/// Keeps the steps that are multiples of this number. 0 keeps none.
#[derive(Clone, Copy, Debug)]
pub struct EveryNSteps(pub u64);

impl PreservationPolicy for EveryNSteps {
    fn should_preserve(&self, checkpoints: &[CheckpointInfo]) -> Vec<bool> {
        checkpoints.iter().map(|c| self.0 > 0 && c.step.is_multiple_of(self.0)).collect()
    }
}

/// Keeps the step closest to each multiple of this number, and the newer of two equally close steps. 0 keeps
/// none.
#[derive(Clone, Copy, Debug)]
pub struct EveryNStepsClosest(pub u64);

impl PreservationPolicy for EveryNStepsClosest {
    fn should_preserve(&self, checkpoints: &[CheckpointInfo]) -> Vec<bool> {
        let n = self.0;
        let step = |i: usize| checkpoints.get(i).map(|checkpoint| checkpoint.step);
        let keep = |i: usize| {
            let (Some(this), before, after) = (step(i), i.checked_sub(1).and_then(step), step(i + 1)) else {
                return true;
            };
            let (below, above) = (this - this % n, this.checked_next_multiple_of(n));
            // The multiple below this step is closest to this step or to the previous step. The multiple
            // above it is closest to this step or to the next step.
            let before = before.is_none_or(|before| below == this || below > before && this - below <= below - before);
            let after = after.zip(above).is_some_and(|(after, above)| above < after && above - this < after - above);
            before || after
        };
        (0..checkpoints.len()).map(|i| n > 0 && keep(i)).collect()
    }
}

/// Keeps the steps that were saved within this duration.
#[derive(Clone, Copy, Debug)]
pub struct LatestDuration(pub Duration);

impl PreservationPolicy for LatestDuration {
    fn should_preserve(&self, checkpoints: &[CheckpointInfo]) -> Vec<bool> {
        // A time in the future counts as new.
        checkpoints.iter().map(|c| c.time.elapsed().map_or(true, |age| age <= self.0)).collect()
    }
}

/// Keeps the first step, and each step saved at least this many seconds after the previously kept one.
#[derive(Clone, Copy, Debug)]
pub struct EveryNSeconds(pub u64);

impl PreservationPolicy for EveryNSeconds {
    fn should_preserve(&self, checkpoints: &[CheckpointInfo]) -> Vec<bool> {
        let mut kept: Option<SystemTime> = None;
        let mut keep = |time: SystemTime| {
            let due = kept
                .is_none_or(|last| time.duration_since(last).is_ok_and(|since| since >= Duration::from_secs(self.0)));
            if due {
                kept = Some(time);
            }
            due
        };
        checkpoints.iter().map(|checkpoint| keep(checkpoint.time)).collect()
    }
}

/// Keeps these steps.
#[derive(Clone, Debug, Default)]
pub struct CustomSteps(pub BTreeSet<u64>);

impl PreservationPolicy for CustomSteps {
    fn should_preserve(&self, checkpoints: &[CheckpointInfo]) -> Vec<bool> {
        checkpoints.iter().map(|checkpoint| self.0.contains(&checkpoint.step)).collect()
    }
}

type Metric = Box<dyn Fn(&serde_json::Value) -> Option<f64> + Send + Sync>;

/// Keeps the best steps by a metric.
///
/// ```
/// use ashore::compat::orbax::{BestN, CheckpointManagerOptions};
/// let by_loss = BestN::new(Some(2), |metrics| metrics["loss"].as_f64()).reverse(true); // the least loss
/// let options = CheckpointManagerOptions::new().preservation_policy(by_loss);
/// ```
pub struct BestN {
    get_metric: Metric,
    reverse: bool,
    n: Option<usize>,
    keep_checkpoints_without_metrics: bool,
}

impl BestN {
    /// Keeps the `n` steps with the greatest metric, and the newest of steps with equal metrics. None keeps
    /// all steps, and so does an `n` that is not below the number of checkpoints. 0 keeps none. Steps without
    /// a metric are kept.
    pub fn new(
        n: Option<usize>,
        get_metric: impl Fn(&serde_json::Value) -> Option<f64> + Send + Sync + 'static,
    ) -> Self {
        Self { get_metric: Box::new(get_metric), reverse: false, n, keep_checkpoints_without_metrics: true }
    }

    /// Keeps the steps with the least metric instead.
    #[must_use]
    pub fn reverse(mut self, reverse: bool) -> Self {
        self.reverse = reverse;
        self
    }

    /// Sets whether steps without a metric, or with one that is not a number, are kept.
    #[must_use]
    pub fn keep_checkpoints_without_metrics(mut self, keep: bool) -> Self {
        self.keep_checkpoints_without_metrics = keep;
        self
    }

    /// The indices in `checkpoints` of the checkpoints with a metric, best first.
    pub(super) fn ranking(&self, checkpoints: &[CheckpointInfo]) -> Vec<usize> {
        ranking(checkpoints.iter().map(|c| (self.get_metric)(c.metrics.as_ref()?)), self.reverse)
    }
}

impl PreservationPolicy for BestN {
    fn should_preserve(&self, checkpoints: &[CheckpointInfo]) -> Vec<bool> {
        let few = |n: usize| checkpoints.len() <= n && !mutant::on(Mutant::BestFew);
        let Some(n) = self.n.filter(|n| !few(*n)) else { return vec![true; checkpoints.len()] };
        let mut keep = vec![self.keep_checkpoints_without_metrics && n > 0; checkpoints.len()];
        for (rank, index) in self.ranking(checkpoints).into_iter().enumerate() {
            keep[index] = rank < n || mutant::on(Mutant::BestEdge) && rank == n;
        }
        keep
    }
}

impl std::fmt::Debug for BestN {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BestN({:?})", self.n)
    }
}

/// Keeps the steps that any of these policies keeps.
///
/// ```
/// use ashore::compat::orbax::{AnyPreservationPolicy, CheckpointManagerOptions, EveryNSteps, LatestN};
/// let policy = AnyPreservationPolicy(vec![Box::new(LatestN(2)), Box::new(EveryNSteps(1000))]);
/// let options = CheckpointManagerOptions::new().preservation_policy(policy);
/// ```
pub struct AnyPreservationPolicy(pub Vec<Box<dyn PreservationPolicy>>);

impl PreservationPolicy for AnyPreservationPolicy {
    fn should_preserve(&self, checkpoints: &[CheckpointInfo]) -> Vec<bool> {
        let all: Vec<_> = self.0.iter().map(|policy| policy.should_preserve(checkpoints)).collect();
        (0..checkpoints.len()).map(|i| all.iter().any(|keep| keep.get(i).copied().unwrap_or(true))).collect()
    }
}

impl std::fmt::Debug for AnyPreservationPolicy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AnyPreservationPolicy({})", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn for_each_multiple_the_closest_step_is_kept_and_of_two_the_newer() {
        let kept = |n, steps: &[u64]| {
            let time = SystemTime::UNIX_EPOCH;
            let all: Vec<_> = steps.iter().map(|&step| CheckpointInfo { step, time, metrics: None }).collect();
            let keep = EveryNStepsClosest(n).should_preserve(&all);
            steps.iter().zip(keep).filter(|(_, keep)| *keep).map(|(step, _)| *step).collect::<Vec<_>>()
        };
        assert_eq!(kept(1, &[0, 1, 2, 3, 4]), [0, 1, 2, 3, 4]);
        assert_eq!(kept(3, &[0, 1, 2, 4]), [0, 4]);
        assert_eq!(kept(3, &[0, 1, 2, 4, 5, 8, 9, 13, 14, 25]), [0, 4, 5, 9, 13, 14, 25]);
        assert!(kept(0, &[0, 1]).is_empty());
        assert_eq!(kept(10, &[u64::MAX]), [u64::MAX]);
    }
}
