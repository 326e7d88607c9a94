//! The end of a save in the committer, for one rank and for several.

use crate::error::{Error, ErrorKind, Result};
use crate::memory::AlignedBuffer;
use crate::outcome::Committed;
use crate::plan::{Receipts, Request};
use crate::storage::Writing;
use crate::ticket::Ticket;
use std::path::PathBuf;
use std::sync::Arc;

/// A save whose chunks are all done.
pub(crate) struct Ending<'a> {
    pub request: &'a Request,
    /// None when the save failed before it had an attempt.
    pub attempt: Option<Arc<dyn Writing>>,
    pub receipts: Result<Receipts>,
    /// The path of the step.
    pub path: PathBuf,
    /// Memory for the table, reused from save to save.
    pub table: &'a mut AlignedBuffer,
}

/// The result of a save. Its future resolves later, after the step was counted.
pub(crate) enum Concluded {
    /// The step is durable. The replaced copy can be deleted and the `latest` hint updated.
    Durable(Committed, Arc<dyn Writing>),
    /// The step may or may not be durable, so it must not be counted.
    Doubtful(Error),
    /// The step was not published.
    Failed {
        why: Error,
        /// The attempt, if it could not be deleted.
        left: Option<Arc<dyn Writing>>,
    },
}

/// Abandons the attempt of a failed save, and returns the result of the save.
pub(super) fn concluded(ticket: &Ticket, attempt: Option<Arc<dyn Writing>>, committed: Result<Committed>) -> Concluded {
    match (committed, attempt) {
        (Ok(committed), Some(attempt)) => {
            tracing::info!(step = ticket.step, bytes = committed.bytes, durable = ?committed.durable, "durable");
            Concluded::Durable(committed, attempt)
        }
        (Err(error), _) if error.kind() == ErrorKind::Indeterminate => {
            tracing::error!(
                step = ticket.step,
                error = format_args!("{error:#}"),
                "it is unknown whether the step is durable"
            );
            Concluded::Doubtful(error)
        }
        (committed, attempt) => {
            let left = attempt.filter(|attempt| match attempt.abandon() {
                Ok(()) => false,
                Err(error) => {
                    tracing::warn!(
                        step = ticket.step,
                        error = format_args!("{error:#}"),
                        "a failed attempt will be deleted later"
                    );
                    true
                }
            });
            let why = committed.err().unwrap_or_else(|| Error::internal("a commit without an attempt"));
            if why.kind() == ErrorKind::Cancelled {
                tracing::info!(step = ticket.step, reason = format_args!("{why:#}"), "the save was cancelled");
            } else {
                tracing::warn!(step = ticket.step, error = format_args!("{why:#}"), "the save failed");
            }
            Concluded::Failed { why, left }
        }
    }
}
