//! Decides which steps to keep. Deletes nothing itself.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Which steps to keep. If neither field is set, all steps are kept.
///
/// ```
/// use ashore::Retention;
/// let retention = Retention::last(2).every(100);
/// assert_eq!(retention.plan([90, 100, 110, 120, 130], [110, 120])?, [90]);
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Retention {
    /// Keep this many of the newest durable steps, and every newer step. At least 1. None: keep all steps.
    pub keep_last: Option<usize>,
    /// Also keep older steps that are multiples of this number. At least 1. None: keep no older step. Needs
    /// `keep_last`.
    pub keep_every: Option<u64>,
}

impl Retention {
    /// Keeps the `n` newest durable steps.
    pub const fn last(n: usize) -> Self {
        Self { keep_last: Some(n), keep_every: None }
    }

    /// Also keeps older steps that are multiples of `n`.
    pub const fn every(mut self, n: u64) -> Self {
        self.keep_every = Some(n);
        self
    }

    /// True when all steps are kept.
    pub fn is_unlimited(&self) -> bool {
        self.keep_last.is_none()
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// `Invalid`, naming the setting that is 0 or missing.
    pub fn check(&self) -> Result<()> {
        match (self.keep_last, self.keep_every) {
            (Some(0), _) => Err(Error::invalid("keep at least one step, or leave it unset to keep all keep_last=0")),
            (_, Some(0)) => Err(Error::invalid("no step is a multiple of 0: leave it unset keep_every=0")),
            (None, Some(every)) => {
                let why = "nothing is deleted without keep_last: set both, or neither";
                Err(Error::invalid(format!("{why} keep_every={every}")))
            }
            _ => Ok(()),
        }
    }

    /// Returns which of `steps` to delete, in ascending order. `durable` are the steps known to be durable.
    ///
    /// Only durable steps count, so each deleted step is older than `keep_last` steps that survive a crash.
    /// The newest durable step and all newer steps are never deleted.
    ///
    /// # Errors
    /// As [`Retention::check`].
    pub fn plan(
        &self,
        steps: impl IntoIterator<Item = u64>,
        durable: impl IntoIterator<Item = u64>,
    ) -> Result<Vec<u64>> {
        self.check()?;
        let Some(keep_last) = self.keep_last else { return Ok(Vec::new()) };
        let steps: BTreeSet<u64> = steps.into_iter().collect();
        let durable: BTreeSet<u64> = durable.into_iter().filter(|step| steps.contains(step)).collect();
        let Some(&oldest_kept) = durable.iter().rev().nth(keep_last - 1) else { return Ok(Vec::new()) };
        let kept_for_good = |step: u64| self.keep_every.is_some_and(|every| step.is_multiple_of(every));
        Ok(steps.range(..oldest_kept).copied().filter(|&step| !kept_for_good(step)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn zero_is_refused_and_nothing_set_keeps_everything() {
        for (keep_last, keep_every, named) in [(Some(0), None, "keep_last=0"), (Some(1), Some(0), "keep_every=0")] {
            let refused = Retention { keep_last, keep_every }.plan([1, 2], [1, 2]).unwrap_err();
            assert_eq!(refused.kind(), crate::ErrorKind::Invalid);
            assert!(refused.message().contains(named), "{refused}");
        }
        assert!(Retention::default().plan([1, 2], [1, 2]).unwrap().is_empty());
        let every = Retention { keep_last: None, keep_every: Some(10) }.plan([1, 2], [1, 2]).unwrap_err();
        assert!(every.message().contains("nothing is deleted without keep_last"), "it once kept everything: {every}");
    }

    #[test]
    fn steps_are_compared_as_numbers() {
        let one = Retention { keep_last: Some(1), keep_every: None };
        assert_eq!(one.plan([10_000, 9_000, 900], [9_000, 10_000]).unwrap(), [900, 9_000]);
    }

    #[test]
    fn a_step_that_is_not_durable_saves_no_room_for_itself() {
        let two = Retention { keep_last: Some(2), keep_every: None };
        assert_eq!(two.plan([1, 2, 3, 4, 5], [1, 2, 4]).unwrap(), [1], "3 and 5 do not count");
        assert!(two.plan([1, 2, 3, 4, 5], [4]).unwrap().is_empty(), "too few are durable");
        assert!(two.plan([1, 2], [3, 4]).unwrap().is_empty(), "a missing step does not count");
    }

    proptest! {
        #[test]
        fn every_deleted_step_is_older_than_the_survivors_that_replace_it(
            steps in prop::collection::btree_map(0_u64..50, any::<bool>(), 0..30),
            keep_last in prop::option::of(1_usize..5), keep_every in prop::option::of(1_u64..12),
        ) {
            prop_assume!(keep_last.is_some() || keep_every.is_none());
            let durable: BTreeSet<u64> = steps.iter().filter(|(_, durable)| **durable).map(|(step, _)| *step).collect();
            let gone = Retention { keep_last, keep_every }.plan(steps.keys().copied(), durable.clone()).unwrap();
            let kept: BTreeSet<u64> = steps.keys().copied().filter(|step| !gone.contains(step)).collect();
            prop_assert!(gone.is_sorted() && gone.iter().all(|step| steps.contains_key(step)));
            prop_assert!(durable.last().is_none_or(|newest| kept.contains(newest)));
            for &step in &gone {
                prop_assert!(durable.range(step + 1..).filter(|&&newer| kept.contains(&newer)).count() >= keep_last.unwrap());
                prop_assert!(keep_every.is_none_or(|every| step % every != 0));
            }
            if let Some(n) = keep_last && durable.len() >= n {
                let counted = kept.iter().filter(|&&step| keep_every.is_none_or(|every| step % every != 0));
                let newer = |step: u64| durable.range(step + 1..).count();
                prop_assert!(counted.copied().all(|step| newer(step) < n), "no more is kept than requested");
            } else {
                prop_assert!(gone.is_empty());
            }
        }
    }
}
