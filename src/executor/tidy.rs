//! What is done after a commit is durable and reported, and off its path: the hint, the replaced copy, retention, the sweep.
//!
//! Nothing here can fail a save. What is left undone is done after a later save, or by the next process.

use super::ending::Left;
use crate::catalog::{Catalog, Retention};
use crate::error::{Error, Result};
use crate::id::parse_step_name;
use crate::storage::Storage;
use crossbeam_channel::Receiver;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The thread: sweeps once, then tidies up after each save until the committer is gone; sweeps again when something was left.
pub(super) fn run(leavings: &Receiver<Left>, storage: &dyn Storage, catalog: &Catalog, retention: &Retention) {
    let mut clean = attempt("sweep", || storage.sweep().map(drop));
    for Left { name, published } in leavings {
        if let Some(step) = published {
            clean &= attempt("delete the replaced copy", || step.attempt.settle());
            // What lies beside the steps is not the latest of them.
            if parse_step_name(&name).is_some() {
                attempt("write the hint", || storage.hint(&name));
            }
            if !retention.is_unlimited() {
                attempt("prune", || catalog.prune(retention, false).map(drop));
            }
        } else {
            clean = false;
        }
        if !clean {
            clean = attempt("sweep", || storage.sweep().map(drop));
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
