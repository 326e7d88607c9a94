//! The stager's end of a device: its queue of copies, and what cannot be let go of before the device has ended.

use super::capture_pool::Allocation;
use super::enqueue::InFlightChunk;
use super::fence::InFlightSaves;
use super::late_copy::LateCopy;
use crate::device::{CopyQueue, Queued};
use crate::guard::{dropped, guarded};
use crate::state::StateDict;
use crate::ticket::Ticket;
use std::collections::VecDeque;
use std::mem::forget;
use std::sync::Arc;
use std::time::Instant;

/// The device's end of the stager.
#[derive(Default)]
pub(super) struct DeviceState {
    pub queue: Option<Box<dyn CopyQueue>>,
    pub deferred: Vec<DeferredRelease>,
    /// The queue panicked while nothing but [`DeviceState::recover`] used it: it tells nothing any more.
    pub broken: bool,
}

/// Slabs and sources of a save that has ended, while a device may still use them.
pub(super) struct DeferredRelease {
    pub in_flight: VecDeque<InFlightChunk>,
    pub state: StateDict<'static>,
    pub allocation: Option<Allocation>,
    /// What may still read sources in streams of the program.
    pub queued: Vec<Arc<dyn Queued>>,
    /// Copies may be running.
    pub late: bool,
    /// Still to be released.
    pub ticket: Option<Arc<Ticket>>,
    /// Kernels of its fence may be to come.
    pub late_copy: Option<Arc<LateCopy>>,
}

impl DeviceState {
    /// Releases what is deferred and no longer in use.
    pub fn recover(&mut self, saves: &InFlightSaves) {
        let Self { queue, deferred, broken } = self;
        let mut ended = None;
        let mut quiet = || *ended.get_or_insert_with(|| ended_now(queue, broken));
        let over = |p: &mut DeferredRelease| {
            p.queued.extract_if(.., |queued| is_over(queued)).for_each(dropped);
            p.queued.is_empty() && !p.late_copy.as_ref().is_some_and(|a| a.pending()) && (!p.late || quiet())
        };
        for DeferredRelease { in_flight, state, allocation, ticket, .. } in deferred.extract_if(.., over) {
            dropped((in_flight, state, allocation));
            ticket.iter().for_each(|ticket| saves.release(ticket));
        }
        if self.broken {
            self.leak(saves, |deferred| deferred.late);
        }
    }

    /// Leaks what is deferred, of this kind, and may still be in use.
    pub fn give_up(&mut self, saves: &InFlightSaves, which: impl Fn(&DeferredRelease) -> bool) {
        self.recover(saves);
        self.leak(saves, which);
    }

    /// Gives up the queue, and what only it could have told of; the next save gets another.
    pub fn lose(&mut self, saves: &InFlightSaves) {
        self.give_up(saves, |deferred| deferred.late);
        dropped(self.queue.take());
        self.broken = false;
    }

    fn leak(&mut self, saves: &InFlightSaves, which: impl Fn(&DeferredRelease) -> bool) {
        for deferred in self.deferred.extract_if(.., |deferred| which(deferred)) {
            deferred.ticket.iter().for_each(|ticket| saves.release(ticket));
            forget(deferred);
        }
    }
}

impl Drop for DeviceState {
    fn drop(&mut self) {
        forget(std::mem::take(&mut self.deferred));
        dropped(self.queue.take());
    }
}

/// Whether all copies of the queue have ended; false when it panics, which breaks it.
fn ended_now(queue: &mut Option<Box<dyn CopyQueue>>, broken: &mut bool) -> bool {
    let Some(queue) = queue.as_mut().filter(|_| !*broken) else { return false };
    guarded("a device panicked", || Ok(queue.quiesce(Instant::now()))).unwrap_or_else(|error| {
        tracing::error!(error = format_args!("{error:#}"), "the queue of copies is given up");
        *broken = true;
        false
    })
}

/// Whether a device does nothing any more that it queued at a `save`; a panic is no yes.
pub(super) fn is_over(queued: &Arc<dyn Queued>) -> bool {
    guarded("a device panicked", || Ok(queued.over())).unwrap_or(false)
}
