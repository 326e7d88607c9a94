//! A flush under way.

use super::catalog::{CheckpointEntry, durable};
use crate::error::Result;
use crate::outcome::Outcome;
use crate::save::Save;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

/// Reports the end of a flush to the session.
type Tell = Box<dyn Fn(&CheckpointEntry, &Result<()>) + Send + Sync>;

/// A future of a row, from [`CheckpointSession::flush_async`](super::CheckpointSession::flush_async). Tasks
/// of any async runtime can await it, and threads can wait for it.
///
/// Dropping it detaches: the commit continues, and the session's next `write` or `flush` returns its error.
#[must_use = "dropping it detaches the flush; keep it to learn when the row is durable"]
pub struct Flush {
    save: Save,
    row: CheckpointEntry,
    tell: Tell,
}

impl Flush {
    pub(super) fn new(
        save: Save,
        row: CheckpointEntry,
        tell: impl Fn(&CheckpointEntry, &Result<()>) + Send + Sync + 'static,
    ) -> Self {
        Self { save, row, tell: Box::new(tell) }
    }

    /// Blocks the thread until the row is durable.
    ///
    /// # Errors
    /// The failure of the commit; the session is then in its state before the call. `Deadline` when the
    /// commit has not ended after `timeout`; it continues.
    pub fn wait(&self, timeout: Duration) -> Result<CheckpointEntry> {
        let result = self.save.wait(timeout);
        if result.is_err() && self.save.try_get().is_none() {
            return result.map(|_| self.row.clone());
        }
        self.settle(result)
    }

    /// The row that is being committed.
    pub fn row(&self) -> &CheckpointEntry {
        &self.row
    }

    fn settle(&self, result: Result<Outcome>) -> Result<CheckpointEntry> {
        let result = durable(result);
        (self.tell)(&self.row, &result);
        result.map(|()| self.row.clone())
    }
}

impl Future for Flush {
    type Output = Result<CheckpointEntry>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let result = ready!(Pin::new(&mut self.save).poll(cx));
        Poll::Ready(self.settle(result))
    }
}

impl fmt::Debug for Flush {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Flush({})", self.row.commit_id)
    }
}
