//! The stager's end of a device: its queue of copies, and what cannot be let go of before the device has ended.

use super::aside::Aside;
use super::enqueue::Flying;
use super::fence::Flights;
use super::gather::Region;
use crate::device::{CopyQueue, Queued};
use crate::state::StateDict;
use crate::ticket::Ticket;
use std::collections::VecDeque;
use std::mem::forget;
use std::sync::Arc;
use std::time::Instant;

/// The device's end of the stager.
#[derive(Default)]
pub(super) struct Line {
    pub queue: Option<Box<dyn CopyQueue>>,
    pub parked: Vec<Parked>,
}

/// Slabs and sources of a save that has ended, while a device may still use them.
pub(super) struct Parked {
    pub flying: VecDeque<Flying>,
    pub state: StateDict<'static>,
    pub region: Option<Region>,
    /// What may still read sources in streams of the program.
    pub queued: Vec<Arc<dyn Queued>>,
    /// Copies may be running.
    pub late: bool,
    /// Still to be released.
    pub ticket: Option<Arc<Ticket>>,
    /// Kernels of its fence may be to come.
    pub aside: Option<Arc<Aside>>,
}

impl Line {
    /// Sends home what is parked and no longer in use.
    pub fn recover(&mut self, flights: &Flights) {
        let Self { queue, parked } = self;
        let mut ended = None;
        let mut quiet = || *ended.get_or_insert_with(|| queue.as_mut().is_some_and(|q| q.quiesce(Instant::now())));
        let over = |p: &mut Parked| {
            p.queued.retain(|queued| !queued.over());
            p.queued.is_empty() && !p.aside.as_ref().is_some_and(|a| a.pending()) && (!p.late || quiet())
        };
        for Parked { flying, state, region, ticket, .. } in parked.extract_if(.., over) {
            dropped((flying, state, region));
            ticket.iter().for_each(|ticket| flights.release(ticket));
        }
    }

    /// Leaks what is parked, of this kind, and may still be in use.
    pub fn give_up(&mut self, flights: &Flights, which: impl Fn(&Parked) -> bool) {
        self.recover(flights);
        for parked in self.parked.extract_if(.., |parked| which(parked)) {
            parked.ticket.iter().for_each(|ticket| flights.release(ticket));
            forget(parked);
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        forget(std::mem::take(&mut self.parked));
    }
}

/// Drops what holds sources of users, whose panics must end neither the stager nor a call of `save`.
pub(crate) fn dropped<T>(sources: T) {
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(sources))).is_err() {
        tracing::error!("a source panicked when it was dropped");
    }
}
