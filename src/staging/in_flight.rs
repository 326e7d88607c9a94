//! The saves in flight: saves whose sources may still be read, and saves that have not ended.

use crate::error::{Error, ErrorKind};
use crate::mutant::{self, Mutant};
use crate::sync::{Mutex, lock};
use crate::ticket::Ticket;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long the stager sleeps when no save has a deadline.
const IDLE: Duration = Duration::from_secs(3600);

/// The next deadline, and the number of saves that had been added when it was determined.
pub(crate) struct Due {
    pub next: Instant,
    added: u64,
}

/// All saves that have not ended.
#[derive(Default)]
pub(crate) struct InFlightSaves {
    tickets: Mutex<Vec<Arc<Ticket>>>,
    /// Saves whose sources may still be read.
    reading: AtomicUsize,
    /// How many saves were ever added.
    added: AtomicU64,
}

impl InFlightSaves {
    /// Adds a save. Its sources may be read from then on.
    pub fn add(&self, ticket: Arc<Ticket>) {
        if ticket.listed.swap(true, Ordering::AcqRel) {
            return; // already listed as a deferred save
        }
        self.reading.fetch_add(1, Ordering::AcqRel);
        lock(&self.tickets).push(ticket);
        self.added.fetch_add(1, Ordering::AcqRel);
    }

    /// Counts another read of the sources of a save that was added before.
    pub fn add_again(&self) {
        self.reading.fetch_add(1, Ordering::AcqRel);
    }

    /// Records that the sources of `ticket` are dropped. Called once for each time that the save was added.
    pub fn release(&self, ticket: &Ticket) {
        ticket.release();
        self.reading.fetch_sub(1, Ordering::AcqRel);
    }

    /// Saves that have not ended.
    pub fn unfinished(&self) -> Vec<Arc<Ticket>> {
        lock(&self.tickets).iter().filter(|t| !t.done.is_complete()).cloned().collect()
    }

    /// Removes saves that have ended and are staged, and returns the first unobserved error.
    pub fn unobserved(&self) -> Option<Error> {
        let mut tickets = lock(&self.tickets);
        let mut error = None;
        tickets.retain(|t| {
            let Some(result) = t.done.get() else { return true };
            let mut seen = true;
            if let Err(e) = result
                && !t.observed.load(Ordering::Acquire)
            {
                seen = error.is_none();
                if seen {
                    t.observed.store(true, Ordering::Release);
                    error = Some(e);
                }
            }
            // A fence still needs a save whose sources are read.
            !seen || !t.staged.is_complete()
        });
        error
    }

    /// A save of writable sources that no fence has covered yet. A failed save does not count: it is never
    /// published, whatever it reads.
    pub fn unfenced(&self) -> Option<Arc<Ticket>> {
        lock(&self.tickets)
            .iter()
            .find(|t| {
                let unread = t.failed() || t.staged.is_complete() || t.fenced.load(Ordering::Acquire);
                t.extent().writable && !unread
            })
            .cloned()
    }

    /// Resolves saves whose deadline has passed, and returns the next deadline.
    pub fn expire(&self, now: Instant) -> Due {
        // Read before the list, so that a save that is added in between counts as not examined.
        let added = self.added.load(Ordering::Acquire);
        let unfinished = self.unfinished();
        let due = |t: &Ticket| t.deadline + t.grace;
        for ticket in unfinished.iter().filter(|t| due(t) <= now) {
            let phase = ticket.phase();
            let late = Error::new(ErrorKind::Deadline, format!("the save deadline passed phase={phase:?}"));
            ticket.hand_over(ticket.give_up(late));
        }
        let next = unfinished.iter().map(|t| due(t)).filter(|d| *d > now).min();
        Due { next: next.unwrap_or(now + IDLE), added }
    }

    /// True if [`expire`](Self::expire) has to run again: `due` has passed, or a save was added that may be
    /// due earlier.
    pub fn is_due(&self, due: &Due, now: Instant) -> bool {
        due.next <= now || self.has_grown(due)
    }

    /// True if a save was added since `due` was determined.
    pub fn has_grown(&self, due: &Due) -> bool {
        self.added.load(Ordering::Acquire) != due.added
    }

    /// The saves that a fence waits for: their sources may still be read, and the program may write these
    /// sources after the fence. If there is no such save, this costs one atomic load.
    pub fn reading(&self) -> Vec<Arc<Ticket>> {
        if self.reading.load(Ordering::Acquire) == 0 || mutant::on(Mutant::Fence) {
            return Vec::new();
        }
        lock(&self.tickets).iter().filter(|t| !t.extent().kept && !t.staged.is_complete()).cloned().collect()
    }
}
