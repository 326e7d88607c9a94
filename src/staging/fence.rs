//! The fence on the host: waits until no live source will be read, for every save that still reads.
//!
//! With no save reading it costs one atomic load. At the deadline the saves that still read are failed *before* the fence
//! returns, and one copy that had been decided is waited for: whoever writes after a fence, however it ended, is never
//! raced by a read of the host's.

use crate::completion::deadline_after;
use crate::device::{Device, Hold, Waits};
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::state::DeviceStream;
use crate::sync::{Mutex, lock};
use crate::ticket::Ticket;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How long the stager sleeps when no save has a deadline.
const IDLE: Duration = Duration::from_secs(3600);

/// The next deadline of the saves that there were when it was found.
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
    /// Saves that were ever added.
    added: AtomicU64,
    /// How streams wait at a fence, if not for events.
    pub waits: Option<Arc<dyn Waits>>,
}

impl InFlightSaves {
    /// Adds a save, whose sources may be read from now on.
    pub fn add(&self, ticket: Arc<Ticket>) {
        self.reading.fetch_add(1, Ordering::AcqRel);
        lock(&self.tickets).push(ticket);
        self.added.fetch_add(1, Ordering::AcqRel);
    }

    /// The sources of `ticket` are dropped. Once per ticket that was added.
    pub fn release(&self, ticket: &Ticket) {
        ticket.release();
        self.reading.fetch_sub(1, Ordering::AcqRel);
    }

    /// Saves that have not ended.
    pub fn unfinished(&self) -> Vec<Arc<Ticket>> {
        lock(&self.tickets).iter().filter(|t| !t.done.is_complete()).cloned().collect()
    }

    /// Forgets saves that have ended in every respect, and returns the first error that nobody has seen.
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
            // A fence still has to know of one that is read.
            !seen || !t.staged.is_complete()
        });
        error
    }

    /// A save of writable sources that no fence has covered yet. One that has failed is not published, whatever it reads.
    pub fn unfenced(&self) -> Option<Arc<Ticket>> {
        lock(&self.tickets)
            .iter()
            .find(|t| {
                let unread = t.failed() || t.staged.is_complete() || t.fenced.load(Ordering::Acquire);
                t.writable && !unread
            })
            .cloned()
    }

    /// Resolves saves whose deadline has passed, and returns the next deadline.
    pub fn expire(&self, now: Instant) -> Due {
        // Before the list: a save that comes in between is one that was not looked at.
        let added = self.added.load(Ordering::Acquire);
        let unfinished = self.unfinished();
        for ticket in unfinished.iter().filter(|t| t.deadline <= now) {
            let phase = ticket.phase();
            let late = Error::new(ErrorKind::Deadline, format!("the save deadline passed phase={phase:?}"));
            ticket.hand_over(ticket.give_up(late));
        }
        let next = unfinished.iter().map(|t| t.deadline).filter(|d| *d > now).min();
        Due { next: next.unwrap_or(now + IDLE), added }
    }

    /// Whether it is time to [`expire`](Self::expire) again: `due` has passed, or a save has come that may be
    /// due earlier.
    pub fn is_due(&self, due: &Due, now: Instant) -> bool {
        due.next <= now || self.has_grown(due)
    }

    /// Whether a save was added since `due` was found.
    pub fn has_grown(&self, due: &Due) -> bool {
        self.added.load(Ordering::Acquire) != due.added
    }

    /// Saves whose sources may still be read.
    pub fn reading(&self) -> Vec<Arc<Ticket>> {
        if self.reading.load(Ordering::Acquire) == 0 || mutant::on(Mutant::Fence) {
            return Vec::new();
        }
        lock(&self.tickets).iter().filter(|t| !t.staged.is_complete()).cloned().collect()
    }

    /// Waits until no save reads live sources.
    ///
    /// # Errors
    /// `Deadline`: the saves that still read have been failed, and no copy is begun for them any more. Copies that an
    /// asynchronous device was already making end when their `staged` resolves.
    pub fn fence(&self, patience: Duration) -> Result<()> {
        if self.reading.load(Ordering::Acquire) == 0 || mutant::on(Mutant::Fence) {
            return Ok(());
        }
        let reading: Vec<_> = lock(&self.tickets).iter().filter(|t| !t.staged.is_complete()).cloned().collect();
        let (began, deadline) = (Instant::now(), deadline_after(patience));
        let mut result = Ok(());
        for ticket in &reading {
            result = result.and(staged(ticket, patience, deadline));
            ticket.add_blocked(began.elapsed());
        }
        result
    }

    /// The same, of one save.
    ///
    /// # Errors
    /// As there.
    pub fn fence_one(&self, ticket: &Ticket, patience: Duration) -> Result<()> {
        if mutant::on(Mutant::Fence) {
            return Ok(());
        }
        let began = Instant::now();
        let result = staged(ticket, patience, deadline_after(patience));
        ticket.add_blocked(began.elapsed());
        result
    }

    /// Has `late_copy` fence each save, or waits until all copies of live sources are queued, and then has `order` make whoever
    /// writes wait for them: if that gives a hold, until the saves that keep it have failed at the latest.
    ///
    /// # Errors
    /// `Deadline`, as for `fence`. What `late_copy` and `order` say; other than `Invalid`, the saves that still read have been failed.
    pub fn fence_on(
        &self,
        patience: Duration,
        late_copy: impl Fn(&Arc<Ticket>, Instant) -> Result<bool>,
        order: impl FnOnce() -> Result<Option<Hold>>,
    ) -> Result<()> {
        if self.reading.load(Ordering::Acquire) == 0 || mutant::on(Mutant::Fence) {
            return Ok(());
        }
        let (began, deadline) = (Instant::now(), deadline_after(patience));
        let reading: Vec<_> = lock(&self.tickets).iter().filter(|t| !t.staged.is_complete()).cloned().collect();
        reading.iter().try_for_each(|ticket| ticket.may_wait())?;
        let (mut result, mut waiting, mut refused) = (Ok(()), Vec::new(), Ok(()));
        for ticket in &reading {
            match late_copy(ticket, deadline) {
                Ok(true) => {}
                // Of the host alone: there is no stream for writers to wait in, and a device may copy behind our back.
                Ok(false) if ticket.streams.is_empty() => result = result.and(staged(ticket, patience, deadline)),
                Ok(false) => {
                    waiting.push(ticket);
                    if !ticket.wait_queued(deadline) {
                        result = Err(late(ticket, patience));
                    }
                }
                Err(error) => {
                    refused = Err(error);
                    break;
                }
            }
            if ticket.failed() {
                ticket.freeze();
            }
            ticket.add_blocked(began.elapsed());
        }
        let ordered = refused.and_then(|()| if waiting.is_empty() { Ok(None) } else { order() });
        if let Ok(Some(hold)) = &ordered
            && !mutant::on(Mutant::HoldEarly)
        {
            waiting.iter().for_each(|ticket| ticket.hold(hold.clone()));
        }
        if let Err(error) = ordered {
            if error.kind() != ErrorKind::Invalid {
                reading.iter().filter(|t| !t.staged.is_complete()).for_each(|t| _ = t.fail(error.clone()));
            }
            return result.and(Err(error));
        }
        reading.iter().for_each(|t| t.fenced.store(true, Ordering::Release));
        result
    }

    /// Makes `streams` wait for all copies queued so far; by memory-waits where that can be had, else by events. Not at the end of
    /// a scope: what was borrowed may be freed then, and not before its copies have ended, however the save did.
    pub fn order(&self, device: &dyn Device, streams: &[DeviceStream]) -> Result<Option<Hold>> {
        match self.waits.as_ref().map(|waits| waits.order(streams)) {
            Some(Ok(Some(hold))) => return Ok(Some(hold)),
            Some(Err(error)) if error.kind() == ErrorKind::Invalid => return Err(error),
            Some(Err(error)) => {
                tracing::warn!(error = format_args!("{error:#}"), "no memory-wait: streams wait for events")
            }
            Some(Ok(None)) => tracing::debug!("too many memory-waits are pending: streams wait for events"),
            None => {}
        }
        device.order(streams).map(|()| None)
    }

    /// As [`InFlightSaves::freeze`], but what was queued may still read the memory when it returns, and whoever will write or free it
    /// comes after that. `late_copy` sees to that for a save of which something is still to be queued, where there is room for
    /// late copies; `order` for saves of which nothing is. `let_go` drops the sources of a save.
    pub fn freeze_on(
        tickets: &[Arc<Ticket>],
        patience: Duration,
        late_copy: impl Fn(&Arc<Ticket>, Instant) -> Result<bool>,
        order: impl FnOnce() -> Result<()>,
        let_go: impl Fn(&Arc<Ticket>),
    ) -> Result<()> {
        let (began, deadline) = (Instant::now(), deadline_after(patience));
        let ordered = |ticket: &Arc<Ticket>| {
            ticket.fenced.store(true, Ordering::Release);
            let_go(ticket);
            ticket.add_blocked(began.elapsed());
        };
        let mut left = Vec::new();
        for ticket in tickets.iter().filter(|ticket| !ticket.dropped.is_complete()) {
            match late_copy(ticket, deadline) {
                Ok(true) => {
                    ordered(ticket);
                    continue;
                }
                Ok(false) => {}
                // Nothing was queued, and the host can wait instead.
                Err(error) if error.kind() == ErrorKind::Invalid => {}
                Err(error) => _ = ticket.fail(error),
            }
            left.push(ticket.clone());
        }
        let queued = left.iter().all(|t| !t.streams.is_empty() && t.wait_queued(deadline) && !t.failed());
        if !left.is_empty() && queued && order().is_ok() {
            left.drain(..).for_each(|ticket| ordered(&ticket));
        }
        Self::freeze(&left, deadline.saturating_duration_since(Instant::now()))
    }

    /// Waits until the sources of these saves are dropped, and returns only then: their memory is borrowed. At the deadline
    /// a save is failed, which bounds the wait by the copies already queued; those cannot be taken back.
    pub fn freeze(tickets: &[Arc<Ticket>], patience: Duration) -> Result<()> {
        let (began, deadline) = (Instant::now(), deadline_after(patience));
        let mut result = Ok(());
        for ticket in tickets {
            if ticket.staged.wait(deadline).is_none() {
                result = Err(late(ticket, patience));
                ticket.staged.wait_forever();
            }
            ticket.add_blocked(began.elapsed());
        }
        result
    }
}

/// Waits until no live source of a save is read any more; fails it at the deadline.
fn staged(ticket: &Ticket, patience: Duration, deadline: Instant) -> Result<()> {
    if ticket.staged.is_complete() {
        return Ok(());
    }
    ticket.may_wait()?;
    if ticket.staged.wait(deadline).is_some() {
        return Ok(());
    }
    let late = late(ticket, patience);
    ticket.freeze();
    Err(late)
}

fn late(ticket: &Ticket, patience: Duration) -> Error {
    let progress = ticket.progress();
    let error = Error::new(
        ErrorKind::Deadline,
        format!(
            "the fence waited too long for staging waited={patience:?} staged={} bytes={}",
            progress.staged, progress.bytes
        ),
    )
    .with_step(ticket.step);
    ticket.fail_as(error.clone(), true);
    error
}
