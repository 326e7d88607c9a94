//! The fence: waits until no save reads live sources, or makes streams wait for the copies that still read
//! them.
//!
//! If no save reads, a fence costs one atomic load. At the deadline the fence fails the saves that still read
//! *before* it returns, and waits for one copy that had been decided. So no read by the host races a write
//! after a fence, whatever the result of the fence.

use super::stager::Stager;
use crate::completion::deadline_after;
use crate::device::WaitGuard;
use crate::error::{Error, ErrorKind, Result};
use crate::guard::dropped;
use crate::mutant::{self, Mutant};
use crate::state::DeviceStream;
use crate::ticket::Ticket;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

impl Stager {
    /// Waits until no save reads live sources.
    ///
    /// # Errors
    /// `Deadline`: the saves that still read have been failed, and no copy is begun for them any more. Copies
    /// that an asynchronous device already makes have ended when their `staged` resolves.
    pub fn fence(&self, patience: Duration) -> Result<()> {
        let reading = self.saves.reading();
        if reading.is_empty() {
            return Ok(());
        }
        let (began, deadline) = (Instant::now(), deadline_after(patience));
        let mut result = Ok(());
        for ticket in &reading {
            result = result.and(wait_until_staged(ticket, patience, deadline));
            ticket.add_fence(began);
        }
        result
    }

    /// Waits until this save reads no live sources.
    ///
    /// # Errors
    /// `Deadline`, as for `fence`.
    pub fn fence_one(&self, ticket: &Ticket, patience: Duration) -> Result<()> {
        if mutant::on(Mutant::Fence) {
            return Ok(());
        }
        let began = Instant::now();
        let result = wait_until_staged(ticket, patience, deadline_after(patience));
        ticket.add_fence(began);
        result
    }

    /// Fences `streams` for each save that still reads. Either the device makes late copies of the save, or
    /// the calling thread waits until all copies of live sources are queued and makes `streams` wait for
    /// them. With a wait guard, `streams` go on at the latest when the saves that keep the guard have failed.
    /// See [`CheckpointExecutor::fence_on`](crate::CheckpointExecutor::fence_on).
    ///
    /// # Errors
    /// `Deadline`, as for `fence`. Errors of the device. Unless the error is `Invalid`, the saves that still
    /// read have been failed.
    pub fn fence_on(&self, streams: &[DeviceStream], patience: Duration) -> Result<()> {
        let reading = self.saves.reading();
        if reading.is_empty() {
            return Ok(());
        }
        let (began, deadline) = (Instant::now(), deadline_after(patience));
        reading.iter().try_for_each(|ticket| ticket.may_wait())?;
        let (mut result, mut waiting, mut refused) = (Ok(()), Vec::new(), Ok(()));
        for ticket in &reading {
            match self.fence_by_late_copy(ticket, streams, deadline) {
                Ok(true) => {}
                // The save has only host tensors. Their writers have no stream that can wait, and a device
                // may still copy the tensors.
                Ok(false) if ticket.extent().streams.is_empty() => {
                    result = result.and(wait_until_staged(ticket, patience, deadline));
                }
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
                ticket.sources.await_read();
            }
            ticket.add_fence(began);
        }
        let ordered = refused.and_then(|()| if waiting.is_empty() { Ok(None) } else { self.order(streams) });
        if let Ok(Some(guard)) = &ordered
            && !mutant::on(Mutant::HoldEarly)
        {
            waiting.iter().for_each(|ticket| ticket.keep_wait_guard(guard.clone()));
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

    /// True if `streams` need not wait for the rest of a save's copies, because the device makes late copies.
    fn fence_by_late_copy(&self, ticket: &Arc<Ticket>, streams: &[DeviceStream], deadline: Instant) -> Result<bool> {
        match (self.scratch.get(), self.late_copy(ticket)) {
            // Borrowed saves use scratch only when their scope ends. Until then streams wait for their
            // copies.
            (Some(scratch), Some((late_copy, borrowed))) if !borrowed || late_copy.launched() => {
                scratch.fence(ticket, &late_copy, streams, deadline)
            }
            _ => Ok(false),
        }
    }

    /// Makes `streams` wait for all copies queued so far, by memory-waits if available, else by events. Not
    /// used at the end of a scope, because borrowed memory may be freed there, which must come after its
    /// copies have ended, even if the save has failed.
    fn order(&self, streams: &[DeviceStream]) -> Result<Option<WaitGuard>> {
        match self.waits.get().map(|waits| waits.order(streams)) {
            Some(Ok(Some(guard))) => return Ok(Some(guard)),
            Some(Err(error)) if error.kind() == ErrorKind::Invalid => return Err(error),
            Some(Err(error)) => {
                tracing::warn!(error = format_args!("{error:#}"), "no memory-wait: streams wait for events")
            }
            Some(Ok(None)) => tracing::debug!("too many memory-waits are pending: streams wait for events"),
            None => {}
        }
        self.device.order(streams).map(|()| None)
    }

    /// Releases the borrowed sources of these saves. Queued copies may still read the sources when this
    /// returns; `streams`, and the streams that wrote the tensors, wait for these copies. A save with chunks
    /// that are not queued yet is frozen, if slots are available. If all chunks of a save are queued, streams
    /// wait for its copies. Otherwise the calling thread waits.
    ///
    /// # Errors
    /// `Deadline`, as for [`freeze`].
    pub fn freeze_on(&self, tickets: &[Arc<Ticket>], streams: &[DeviceStream], patience: Duration) -> Result<()> {
        let (began, deadline) = (Instant::now(), deadline_after(patience));
        let mut left = Vec::new();
        for ticket in tickets.iter().filter(|ticket| !ticket.sources.is_dropped()) {
            match self.freeze_by_late_copy(ticket, streams, deadline) {
                Ok(true) => {
                    self.release_sources(ticket, began);
                    continue;
                }
                Ok(false) => {}
                // Nothing was queued, so the host can wait instead.
                Err(error) if error.kind() == ErrorKind::Invalid => {}
                Err(error) => _ = ticket.fail(error),
            }
            left.push(ticket.clone());
        }
        let queued = left.iter().all(|t| !t.extent().streams.is_empty() && t.wait_queued(deadline) && !t.failed());
        if !left.is_empty() && queued {
            let owners: Vec<_> = tickets.iter().flat_map(|t| &t.extent().streams).copied().collect();
            if self.device.order(&together(streams, &owners)).is_ok() {
                left.drain(..).for_each(|ticket| self.release_sources(&ticket, began));
            }
        }
        freeze(&left, deadline.saturating_duration_since(Instant::now()))
    }

    fn freeze_by_late_copy(&self, ticket: &Arc<Ticket>, streams: &[DeviceStream], deadline: Instant) -> Result<bool> {
        match (self.scratch.get(), self.late_copy(ticket)) {
            (Some(scratch), Some((late_copy, _))) => {
                scratch.freeze(ticket, &late_copy, &together(streams, &ticket.extent().streams), deadline)
            }
            _ => Ok(false),
        }
    }

    /// Drops the sources of a save that queues nothing more from live memory.
    fn release_sources(&self, ticket: &Arc<Ticket>, began: Instant) {
        ticket.fenced.store(true, Ordering::Release);
        // Request first, because the stager may take the save out of the queue meanwhile.
        ticket.request_release();
        match self.take_sources(ticket) {
            Some(state) => {
                dropped(state);
                ticket.sources.set_dropped();
            }
            // The stager drops the sources next, or ends the save.
            None => ticket.sources.wait_until_dropped(),
        }
        ticket.add_fence(began);
    }
}

/// Waits until the sources of these saves are dropped, and returns only then, because their memory is
/// borrowed. At the deadline it fails the saves that still read, which limits the wait to the copies already
/// queued; these cannot be cancelled.
///
/// # Errors
/// `Deadline`.
pub(crate) fn freeze(tickets: &[Arc<Ticket>], patience: Duration) -> Result<()> {
    let (began, deadline) = (Instant::now(), deadline_after(patience));
    let mut result = Ok(());
    for ticket in tickets {
        if ticket.staged.wait(deadline).is_none() {
            result = Err(late(ticket, patience));
            ticket.staged.wait_forever();
        }
        ticket.add_fence(began);
    }
    result
}

/// The streams of both lists, without duplicates.
fn together<'a>(some: &[DeviceStream<'a>], others: &[DeviceStream<'a>]) -> Vec<DeviceStream<'a>> {
    let mut all = [some, others].concat();
    all.sort_unstable();
    all.dedup();
    all
}

/// Waits until no live source of a save is read any more. Fails the save at the deadline.
fn wait_until_staged(ticket: &Ticket, patience: Duration, deadline: Instant) -> Result<()> {
    if ticket.staged.is_complete() {
        return Ok(());
    }
    ticket.may_wait()?;
    if ticket.staged.wait(deadline).is_some() {
        return Ok(());
    }
    let late = late(ticket, patience);
    ticket.sources.await_read();
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
