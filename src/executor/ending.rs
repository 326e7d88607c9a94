//! The end of a save: its commit, and what the catalog learns of it, in an order that retention can rely on.
//!
//! An attempt is announced before its publish can make it visible, so that no prune in this process counts it or deletes it
//! before its outcome is known; and the catalog, and the count of saves that were compared, know the outcome before the
//! future tells the caller.

use crate::catalog::Catalog;
use crate::checkpoint::replaceable;
use crate::commit::{self, Concluded, Ending, Published};
use crate::completion::Calls;
use crate::error::{Error, ErrorKind};
use crate::memory::AlignedBuffer;
use crate::storage::Storage;
use crate::ticket::{Outcome, Phase};
use crate::writer::Task;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

/// Something to tidy up.
pub(super) struct Left {
    pub name: String,
    /// None: a failed save left an attempt that only a sweep can remove.
    pub published: Option<Published>,
}

/// Ends the save of `task`; a panic of the storage fails the save, not the thread.
pub(super) fn conclude(
    task: &Task,
    storage: &dyn Storage,
    catalog: &Catalog,
    compared: &AtomicU64,
    manifest: &mut AlignedBuffer,
) -> Option<Left> {
    let (request, ticket) = (&task.request, &task.request.ticket);
    if let Err(busy) = catalog.announce(&request.name, ticket.attempt) {
        ticket.fail(busy);
    }
    let concluded = catch_unwind(AssertUnwindSafe(|| {
        let path = storage.describe(&request.name);
        if let (true, Err(foreign)) = (request.overwrite, replaceable(storage, &request.name)) {
            ticket.fail(foreign);
        }
        commit::conclude(Ending { request, attempt: task.begun(), receipts: task.receipts(), path, manifest })
    }));
    let concluded = concluded.unwrap_or_else(|_| {
        let publishing = ticket.phase() >= Phase::Publishing;
        let kind = if publishing { ErrorKind::Indeterminate } else { ErrorKind::Internal };
        Concluded::Doubtful(Error::new(kind, "the storage panicked during a commit"))
    });
    let name = request.name.clone();
    let (outcome, left) = match concluded {
        Concluded::Durable(committed, published) => {
            catalog.acknowledge(ticket.attempt);
            if !ticket.blind.load(Ordering::Relaxed) {
                compared.fetch_add(1, Ordering::Relaxed);
            }
            (Ok(Outcome::Durable(committed)), Some(Left { name, published: Some(published) }))
        }
        Concluded::Doubtful(why) => {
            catalog.doubt(ticket.attempt);
            (Err(why), None)
        }
        Concluded::Failed { why, swept } => {
            catalog.withdraw(ticket.attempt);
            (Err(why), (!swept).then_some(Left { name, published: None }))
        }
    };
    ticket.finish(outcome).into_iter().for_each(Calls::here);
    left
}
