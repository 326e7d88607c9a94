//! The thread of a manager that waits for saves to end, and deletes steps that are not kept.

use super::preservation::{CheckpointInfo, PreservationPolicy};
use super::state::{ManagerState, Progress};
use crate::catalog::{self, Catalog};
use crate::checkpoint::Checkpoint;
use crate::guard::guarded;
use crate::outcome::Outcome;
use crate::save::Save;
use crate::settings::OnUnseenError;
use crate::sync::lock;
use crossbeam_channel::Receiver;
use std::collections::BTreeSet;
use std::collections::btree_map::Entry;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// The metadata key of the metrics.
pub(super) const METRICS: &str = "metrics";
/// The metadata key of the time of a save, in nanoseconds since the beginning of 1970: Orbax's name.
pub(super) const TIME: &str = "init_timestamp_nsecs";

/// The thread that waits for saves to end.
///
/// It keeps no executor alive, so that dropping the program's last `Arc` waits for saves.
pub(super) struct Follower {
    pub catalog: Catalog,
    pub failed: OnUnseenError,
    pub shared: Arc<ManagerState>,
    pub preservation: Arc<dyn PreservationPolicy>,
}

impl Follower {
    pub fn run(self, coming: Receiver<Save>) {
        // A save may end before this loop reaches it, so a policy may delete the step before that.
        let mut deleted = BTreeSet::new();
        for save in coming {
            let step = save.step();
            // The save has its own deadline.
            let ended = save.wait(Duration::MAX);
            let durable = matches!(ended, Ok(Outcome::Durable(_)));
            if durable && !deleted.remove(&step) {
                lock(&self.shared.progress).steps.insert(step);
            }
            if durable {
                deleted.extend(self.preserve());
            }
            let mut progress = lock(&self.shared.progress);
            if let Entry::Occupied(mut saves) = progress.saving.entry(step) {
                *saves.get_mut() -= 1;
                if *saves.get() == 0 {
                    saves.remove();
                }
            }
            match ended {
                Err(error) if self.failed == OnUnseenError::Warn => error.log_unseen(),
                Err(error) => progress.errors.push_back(error),
                Ok(_) => {}
            }
            drop(progress);
            self.shared.changed.notify();
        }
    }

    /// Deletes the steps that the policy does not keep. Returns the deleted steps whose save the loop has not
    /// reached yet.
    fn preserve(&self) -> Vec<u64> {
        let catalog = &self.catalog;
        let chosen = |entries: &[catalog::Entry]| {
            let infos = infos(catalog, entries);
            let keep = self.preservation.should_preserve(&infos);
            let kept = |i: usize| keep.get(i).copied().unwrap_or(true);
            infos.iter().enumerate().filter(|(i, _)| !kept(*i)).map(|(_, info)| info.step).collect()
        };
        let pruned = guarded("a preservation policy panicked; all steps are kept", || catalog.prune_chosen(chosen));
        match pruned {
            Ok(pruned) => {
                let mut progress = lock(&self.shared.progress);
                let Progress { steps, saving, .. } = &mut *progress;
                let removed = pruned.removed.iter().map(|entry| entry.step);
                return removed.filter(|step| !steps.remove(step) && saving.contains_key(step)).collect();
            }
            Err(error) => {
                tracing::warn!(error = format_args!("{error:#}"), "steps that are not kept could not be deleted")
            }
        }
        Vec::new()
    }
}

pub(super) fn metrics(checkpoint: &Checkpoint) -> Option<serde_json::Value> {
    checkpoint.metadata(METRICS).ok()
}

/// The time at which a step was saved; for a step that no manager saved, the time of its directory.
pub(super) fn time(checkpoint: &Checkpoint) -> SystemTime {
    if let Ok(nanoseconds) = checkpoint.metadata::<u64>(TIME) {
        return SystemTime::UNIX_EPOCH + Duration::from_nanos(nanoseconds);
    }
    std::fs::metadata(checkpoint.path()).and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}

pub(super) fn infos(catalog: &Catalog, entries: &[catalog::Entry]) -> Vec<CheckpointInfo> {
    let info = |entry: &catalog::Entry| {
        let checkpoint = catalog.checkpoint(entry.step).ok();
        CheckpointInfo {
            step: entry.step,
            time: checkpoint.as_ref().map_or(SystemTime::UNIX_EPOCH, time),
            metrics: checkpoint.as_ref().and_then(metrics),
        }
    };
    entries.iter().map(info).collect()
}
