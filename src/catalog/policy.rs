//! Policies: keep steps for their contents, whatever their age.

use super::{Catalog, Entry};
use crate::error::{ErrorKind, Result};
use crate::guard::guarded;
use crate::state::decode_value;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};

/// A step, as it is passed to a policy.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Candidate {
    /// The step.
    pub entry: Entry,
    metadata: BTreeMap<String, serde_json::Value>,
}

impl Candidate {
    /// Returns the user metadata under `key`, or None when it is missing or not a `T`.
    pub fn metadata<T: DeserializeOwned>(&self, key: &str) -> Option<T> {
        self.metadata.get(key).and_then(|value| decode_value(value).ok())
    }
}

/// Decides which steps are kept in addition to a [`Retention`](super::Retention). Any `Fn(&[Candidate]) ->
/// Vec<bool>` is a policy.
///
/// A policy only adds to the kept steps. It cannot delete the newest steps that the retention keeps.
pub trait PreservationPolicy: Send + Sync {
    /// Returns, for each step, oldest first, whether to keep it. Steps missing at the end of the result are
    /// kept.
    fn preserves(&self, steps: &[Candidate]) -> Vec<bool>;
}

impl<F: Fn(&[Candidate]) -> Vec<bool> + Send + Sync> PreservationPolicy for F {
    fn preserves(&self, steps: &[Candidate]) -> Vec<bool> {
        self(steps)
    }
}

/// Keeps the best steps by a metric, which is a number in their metadata. Of steps with equal metrics the
/// newer is better. A step whose metric is missing or not a number is never among the best.
///
/// ```
/// use ashore::{CheckpointExecutor, StateDict, catalog::Best};
/// use std::{sync::Arc, time::Duration};
/// # let root = tempfile::tempdir().unwrap();
/// let executor = CheckpointExecutor::builder(root.path()).arena(4 << 20).chunk(1 << 20)
///     .keep_last(1).preserve(Best::lowest("loss", 1)).build()?;
/// for (step, loss) in [(1, 0.5), (2, 0.2), (3, 0.4), (4, 0.3)] {
///     let mut state = StateDict::new();
///     state.tensor("weights", Arc::new(vec![step as f32; 4]))?.metadata("loss", &loss)?;
///     executor.save(step, state)?.wait(Duration::from_secs(60))?;
///     executor.fence()?;
/// }
/// executor.shutdown(Duration::from_secs(60))?;
/// let kept: Vec<u64> = ashore::Catalog::open(root.path())?.list()?.iter().map(|entry| entry.step).collect();
/// assert_eq!(kept, [2, 4]);
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Best {
    metric: String,
    count: usize,
    lowest: bool,
}

impl Best {
    /// The `count` steps with the lowest metadata `metric`.
    pub fn lowest(metric: impl Into<String>, count: usize) -> Self {
        Self { metric: metric.into(), count, lowest: true }
    }

    /// The `count` steps with the highest metadata `metric`.
    pub fn highest(metric: impl Into<String>, count: usize) -> Self {
        Self { metric: metric.into(), count, lowest: false }
    }
}

impl PreservationPolicy for Best {
    fn preserves(&self, steps: &[Candidate]) -> Vec<bool> {
        let ranked = ranking(steps.iter().map(|step| step.metadata(&self.metric)), self.lowest);
        let best: BTreeSet<usize> = ranked.into_iter().take(self.count).collect();
        (0..steps.len()).map(|i| best.contains(&i)).collect()
    }
}

/// Returns the positions of the metrics that are numbers, best first. Of equal metrics the last comes first,
/// because it belongs to the newest step.
pub(crate) fn ranking(metrics: impl Iterator<Item = Option<f64>>, lowest: bool) -> Vec<usize> {
    let number = |(i, metric): (usize, Option<f64>)| Some((i, metric.filter(|metric| !metric.is_nan())?));
    let mut ranked: Vec<(usize, f64)> = metrics.enumerate().filter_map(number).collect();
    let order = |a: f64, b: f64| if lowest { a.total_cmp(&b) } else { b.total_cmp(&a) };
    ranked.sort_by(|(i, a), (j, b)| order(*a, *b).then(j.cmp(i)));
    ranked.into_iter().map(|(i, _)| i).collect()
}

impl Catalog {
    /// Returns the steps that `policy` keeps.
    pub(super) fn spared(&self, policy: &dyn PreservationPolicy, entries: &[Entry]) -> Result<BTreeSet<u64>> {
        let mut candidates = Vec::with_capacity(entries.len());
        for entry in entries {
            let metadata = match self.try_open(entry.step, &entry.name) {
                Ok(Some(checkpoint)) => checkpoint.manifest().metadata.clone(),
                Ok(None) => continue,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            candidates.push(Candidate { entry: entry.clone(), metadata });
        }
        let panicked = "a preservation policy panicked; nothing was deleted";
        let keep = guarded(panicked, || Ok(policy.preserves(&candidates)))
            .map_err(|panic| panic.with_kind(ErrorKind::Invalid))?;
        let kept = |i: usize| keep.get(i).copied().unwrap_or(true);
        Ok(candidates.iter().enumerate().filter(|(i, _)| kept(*i)).map(|(_, step)| step.entry.step).collect())
    }
}
