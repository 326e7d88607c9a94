//! Durability of a save in a tier behind the first tier.

use super::Save;
use crate::completion::{Waiter, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::outcome::{Outcome, Promoted};
use crate::ticket::Ticket;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

impl Save {
    /// Returns a future that resolves when the step is also durable in the tier `tier`. The save itself is a
    /// future of durability in the first tier only.
    ///
    /// The future fails with the save's own error; with `Cancelled` if the save did not begin, if retention
    /// deleted the step, or if the tier does not want the step any more; with `Conflict` if another session
    /// owns the tier, or if the tier has another attempt at the step; with `Deadline` if the executor was
    /// shut down first. While the tier is unreachable, the future waits.
    pub fn durable_in(&self, tier: &str) -> DurableIn {
        let promotion = self.ticket.promotions().iter().find(|promotion| *promotion.tier == *tier);
        DurableIn {
            tier: tier.to_owned(),
            ticket: self.ticket.clone(),
            done: Waiter::new(self.ticket.done.clone()),
            promoted: promotion.map(|promotion| Waiter::new(promotion.done.clone())),
        }
    }
}

/// A future of durability in a tier, from [`Save::durable_in`]. An error that it returns counts as observed.
#[must_use = "a future does nothing unless it is awaited or waited for"]
pub struct DurableIn {
    tier: String,
    ticket: Arc<Ticket>,
    done: Waiter<Result<Outcome>>,
    promoted: Option<Waiter<Result<Promoted>>>,
}

impl DurableIn {
    /// Blocks the thread until the step is durable in the tier.
    ///
    /// # Errors
    /// As [`Save::durable_in`]. `Deadline` when the step is not durable in the tier after `timeout`: the
    /// promotion continues, and can be waited for again. `Invalid`, at once, for a tier that the executor
    /// does not have, and for a call in a function given to [`Save::on_done`] or in a waker.
    pub fn wait(&self, timeout: Duration) -> Result<Promoted> {
        self.ticket.alive()?;
        let promoted = self.promoted.as_ref().ok_or_else(|| self.unknown())?;
        if !promoted.cell().is_complete() {
            self.ticket.may_wait()?;
        }
        let deadline = deadline_after(timeout);
        let late = |what: &str| {
            let what = format!("{what} waited={timeout:?} tier={:?}", self.tier);
            Error::new(ErrorKind::Deadline, what).with_step(self.ticket.step)
        };
        let saved = self.done.cell().wait(deadline).ok_or_else(|| late("the save has not ended"))?;
        self.in_first_tier(saved)?;
        promoted.cell().wait(deadline).ok_or_else(|| late("the step is not durable in the tier yet"))?
    }

    /// Returns true if a wait would return at once. This does not observe an error of the save.
    pub fn is_done(&self) -> bool {
        let Some(promoted) = &self.promoted else { return true };
        let failed = || self.done.cell().get().is_some_and(|saved| !matches!(saved, Ok(Outcome::Durable(_))));
        promoted.cell().is_complete() || failed()
    }

    /// Returns an error if the save is not durable in the first tier.
    fn in_first_tier(&self, saved: Result<Outcome>) -> Result<()> {
        if saved.is_err() {
            self.ticket.observed.store(true, Ordering::Release);
        }
        match saved? {
            Outcome::Durable(_) => Ok(()),
            Outcome::Skipped { by } | Outcome::Superseded { by } => {
                let what = format!("the save did not begin, so there is nothing to promote by={by}");
                Err(Error::new(ErrorKind::Cancelled, what).with_step(self.ticket.step))
            }
        }
    }

    fn unknown(&self) -> Error {
        let why = "the executor of this process promotes to no tier of this name; of several ranks, rank 0 promotes";
        Error::invalid(format!("{why} tier={:?}", self.tier)).with_step(self.ticket.step)
    }
}

impl Future for DurableIn {
    type Output = Result<Promoted>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.ticket.alive()?;
        if self.promoted.is_none() {
            return Poll::Ready(Err(self.unknown()));
        }
        let saved = ready!(Pin::new(&mut self.done).poll(cx));
        self.in_first_tier(saved)?;
        match &mut self.promoted {
            Some(promoted) => Pin::new(promoted).poll(cx),
            None => Poll::Pending,
        }
    }
}

impl fmt::Debug for DurableIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DurableIn(step {}, {:?})", self.ticket.step, self.tier)
    }
}
