//! The end of a save: its commit, and the reports to the catalog in an order that retention relies on.
//!
//! An attempt is announced before its publish can make it visible. So no prune in this process counts or
//! deletes it before its outcome is known. The catalog and the count of compared saves get the outcome before
//! the future resolves.

use super::again::try_again;
use super::destination::Elsewhere;
use super::history::History;
use crate::catalog::Catalog;
use crate::checkpoint::replaceable;
use crate::commit::{Concluded, Ending};
use crate::completion::Calls;
use crate::error::ErrorKind;
use crate::guard::{self, guarded};
use crate::memory::AlignedBuffer;
use crate::outcome::{Outcome, Phase};
use crate::staging::Stager;
use crate::storage::{Storage, Writing};
use crate::telemetry::Work;
use crate::tiers::Behind;
use crate::writer::Task;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The remains of a save that must be tidied up.
pub(super) enum Leftover {
    /// A durable step: the replaced copy and the owner record are left.
    Published { name: String, attempt: Arc<dyn Writing> },
    /// A checkpoint that became durable in a directory beside the root, in `storage`. Dead processes may have
    /// left files there.
    Elsewhere { storage: Arc<dyn Storage> },
    /// A failed attempt that could not be deleted.
    Failed { attempt: Arc<dyn Writing> },
    /// Remains that only a sweep can find.
    Unknown,
}

impl Leftover {
    /// The name of the step that was published, if there is one.
    pub fn published(&self) -> Option<&str> {
        match self {
            Self::Published { name, .. } => Some(name),
            Self::Elsewhere { .. } | Self::Failed { .. } | Self::Unknown => None,
        }
    }
}

/// The state that the committer needs to end saves.
pub(super) struct Committing {
    pub stager: Arc<Stager>,
    pub storage: Arc<dyn Storage>,
    pub elsewhere: Arc<Elsewhere>,
    pub catalog: Arc<Catalog>,
    /// Number of durable saves whose staged bytes were compared with the digests taken at `save`.
    pub compared: Arc<AtomicU64>,
    pub behind: Option<Arc<Behind>>,
    pub history: Arc<History>,
    /// Memory for tables, reused from save to save.
    pub table: AlignedBuffer,
}

/// Ends the save of `task` by `commit`. A panic of the storage fails the save, not the thread.
pub(super) fn conclude(
    committing: &mut Committing,
    task: &Task,
    commit: impl FnOnce(Ending<'_>) -> Concluded,
) -> Option<Leftover> {
    let Committing { stager, storage, elsewhere, catalog, compared, behind, history, table } = committing;
    let (request, ticket) = (&task.request, &task.request.ticket);
    let attempt = ticket.attempt();
    let span = tracing::info_span!("commit", step = ticket.step, attempt = %attempt);
    let _entered = span.enter();
    let began = ticket.traced_now();
    // The catalog contains only steps of the root.
    let catalog = request.parent.is_none().then_some(&*catalog);
    let mut storage = storage.clone();
    let concluded = guarded("the storage panicked during a commit", || {
        if let Some(parent) = &request.parent {
            match elsewhere.at(request, parent, false) {
                Ok(there) => storage = there,
                Err(error) => {
                    ticket.fail(error);
                }
            }
        }
        if let Some(Err(busy)) = catalog.map(|catalog| catalog.announce(&request.name, attempt)) {
            ticket.fail(busy);
        }
        let path = storage.describe(&request.name);
        if request.overwrite
            && let Err(foreign) = replaceable(storage.as_ref(), &request.name)
        {
            ticket.fail(foreign);
        }
        Ok(commit(Ending { request, attempt: task.begun(), receipts: task.receipts(), path, table }))
    });
    ticket.trace(Work::Commit, began);
    let panicked = concluded.is_err();
    let concluded = concluded.unwrap_or_else(|panic| {
        let publishing = ticket.phase() >= Phase::Publishing;
        Concluded::Doubtful(if publishing { panic.with_kind(ErrorKind::Indeterminate) } else { panic })
    });
    let name = request.name.clone();
    let (outcome, left) = match concluded {
        Concluded::Durable(committed, published) => {
            catalog.inspect(|catalog| catalog.acknowledge(attempt));
            if !ticket.digests_missing.load(Ordering::Relaxed) {
                compared.fetch_add(1, Ordering::Relaxed);
            }
            // This comes before the future resolves: the next save may begin at once.
            if request.parent.is_none() && history.is_on() {
                guard::attempt("remember the files of a step", || {
                    let receipts = task.receipts()?;
                    history.durable(request, receipts, task.older(), storage.as_ref());
                    Ok(())
                });
            }
            if let Some(behind) = behind {
                behind.durable(ticket, catalog.map(|_| &*name));
            }
            let left = match catalog {
                Some(_) => Leftover::Published { name, attempt: published },
                None => {
                    // This comes before the future resolves: the program may move the parent then.
                    guard::attempt("delete what a checkpoint has replaced", || published.settle());
                    Leftover::Elsewhere { storage }
                }
            };
            (Ok(Outcome::Durable(committed)), Some(left))
        }
        Concluded::Doubtful(why) => {
            catalog.inspect(|catalog| catalog.doubt(attempt));
            (Err(why), panicked.then_some(Leftover::Unknown))
        }
        Concluded::Failed { why, left } => {
            let why = match behind {
                Some(behind) if catalog.is_some() => behind.of_save(why),
                _ => why,
            };
            catalog.inspect(|catalog| catalog.withdraw(attempt));
            let unknown = || task.begin_failed().then_some(Leftover::Unknown);
            let left = left.map(|attempt| Leftover::Failed { attempt }).or_else(unknown);
            if try_again(task, stager, &why) {
                return left;
            }
            (Err(why), left)
        }
    };
    // This comes before the future resolves: the program may count its state as free then.
    drop(task.take_kept());
    ticket.finish(outcome).into_iter().for_each(Calls::here);
    left
}
