//! What is done after a commit is durable and reported, and off its path: the hint, the replaced copy, retention, the sweep.
//!
//! Nothing here can fail a save. What is left undone is done after a later save, or by the next process.

use crate::catalog::{Catalog, Retention};
use crate::commit::Published;
use crate::error::Result;
use crate::storage::Storage;
use crossbeam_channel::Receiver;

/// The thread: sweeps once, then tidies up after each publication until the committer is gone.
pub(super) fn run(published: &Receiver<Published>, storage: &dyn Storage, catalog: &Catalog, retention: &Retention) {
    match storage.sweep() {
        Ok(swept) if swept.removed.is_empty() => {}
        Ok(swept) => tracing::info!(removed = ?swept.removed, "swept what dead processes left behind"),
        Err(error) => tracing::warn!(%error, "could not sweep"),
    }
    for step in published {
        let report = |what, result: Result<()>| {
            if let Err(error) = result {
                tracing::warn!(%error, "could not {what}");
            }
        };
        report("delete the replaced copy", step.attempt.settle());
        report("write the hint", storage.hint(&step.name));
        catalog.acknowledge(step.id);
        if !retention.is_unlimited() {
            report("prune", catalog.prune(retention, false).map(|_| ()));
        }
    }
}
