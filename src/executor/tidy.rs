//! What is done after a commit is durable and reported, and off its path: the replaced copy, the hint, retention, the sweep.
//!
//! Nothing here can fail a save. The committer waits when [`LAG`] saves wait to be tidied up, so what has not been deleted yet is
//! bounded. What fails is tried again after later saves, and once more when the executor ends.

use super::ending::Left;
use crate::catalog::{Catalog, Retention};
use crate::error::{Error, Result};
use crate::id::parse_step_name;
use crate::storage::Storage;
use crossbeam_channel::Receiver;
use std::iter::once;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// So many saves may wait to be tidied up while as many are in hand; an attempt holds three descriptors until then.
pub(super) const LAG: usize = 16;

/// The thread: sweeps once, then tidies up after saves until the committer is gone. Saves that came meanwhile share one hint, one
/// prune and one sweep.
pub(super) fn run(leavings: &Receiver<Left>, storage: &dyn Storage, catalog: &Catalog, retention: &Retention) {
    let mut tidy = Tidy { storage, catalog, retention, owed: Vec::new(), unpruned: false, unswept: true };
    tidy.work();
    while let Ok(first) = leavings.recv() {
        tidy.take(once(first).chain(leavings.try_iter()).take(LAG));
        tidy.work();
    }
    if tidy.owes() {
        tidy.work();
    }
}

struct Tidy<'a> {
    storage: &'a dyn Storage,
    catalog: &'a Catalog,
    retention: &'a Retention,
    /// Attempts that are over and still on the medium, at most [`LAG`] after each round of work.
    owed: Vec<Left>,
    /// Steps have come since the last prune that succeeded.
    unpruned: bool,
    /// Something is left that only a sweep can remove.
    unswept: bool,
}

impl Tidy<'_> {
    fn take(&mut self, batch: impl Iterator<Item = Left>) {
        let before = self.owed.len();
        self.owed.extend(batch);
        let names = self.owed.iter().skip(before).filter_map(Left::published);
        // What lies beside the steps is not the latest of them.
        if let Some(newest) = names.filter(|name| parse_step_name(name).is_some()).last() {
            attempt("write the hint", || self.storage.hint(newest));
        }
        self.unpruned |= self.owed.iter().skip(before).any(|left| left.published().is_some());
    }

    fn owes(&self) -> bool {
        !self.owed.is_empty() || self.unpruned || self.unswept
    }

    fn work(&mut self) {
        let unswept = &mut self.unswept;
        self.owed.retain(|left| match left {
            Left::Published { attempt: step, .. } => !attempt("delete the replaced copy", || step.settle()),
            Left::Failed { attempt: failed } => !attempt("delete a failed attempt", || failed.abandon()),
            Left::Unknown => {
                *unswept = true;
                false
            }
        });
        let most = self.owed.len().saturating_sub(LAG);
        if self.owed.drain(..most).count() > 0 {
            *unswept = true;
        }
        if self.unpruned {
            let pruned = || self.catalog.prune(self.retention, false).map(drop);
            self.unpruned = !self.retention.is_unlimited() && !attempt("prune", pruned);
        }
        if self.unswept {
            let mut all = false;
            // An attempt that looks alive may be one whose last thread is just letting go of it.
            attempt("sweep", || self.storage.sweep().map(|swept| all = swept.left.is_empty()));
            self.unswept = !all;
        }
    }
}

/// Does it; false, and a warning, when it fails.
fn attempt(what: &str, run: impl FnOnce() -> Result<()>) -> bool {
    let done = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err(Error::internal("the storage panicked")));
    if let Err(error) = &done {
        tracing::warn!(%error, "could not {what}");
    }
    done.is_ok()
}
