//! What is kept of a save that has ended, or will not be staged, while a device may still use it.

use super::capture_pool::Allocation;
use super::enqueue::InFlightChunk;
use super::in_flight::InFlightSaves;
use super::late_copy::LateCopy;
use crate::device::Queued;
use crate::guard::{dropped, guarded};
use crate::state::StateDict;
use crate::ticket::Ticket;
use std::collections::VecDeque;
use std::mem::forget;
use std::sync::Arc;

/// A save whose release waits, and for what.
pub(super) enum DeferredRelease {
    /// Kernels in streams of the program, which may read the sources: the save is released behind them. Its copies have ended.
    BehindKernels { kept: Kept, ticket: Arc<Ticket> },
    /// Copies that a device does not end in time, from the sources and into slabs. The save was released without waiting for them.
    BehindCopies { kept: Kept, chunks: VecDeque<InFlightChunk> },
}

/// What a device may still use.
pub(super) struct Kept {
    pub state: StateDict<'static>,
    /// What was captured on the device.
    pub allocation: Option<Allocation>,
    /// What may still read sources in streams of the program.
    pub queued: Vec<Arc<dyn Queued>>,
    /// Kernels of its fence may be to come.
    pub late_copy: Option<Arc<LateCopy>>,
}

impl Kept {
    /// Whether kernels may still use it.
    pub fn in_use(&mut self) -> bool {
        self.queued.extract_if(.., |queued| is_over(queued)).for_each(dropped);
        !self.queued.is_empty() || self.late_copy.as_ref().is_some_and(|late_copy| late_copy.pending())
    }

    /// Whether nothing was queued for it that would have to be asked, or all of that is over; its fence is not asked.
    pub fn is_free(&self) -> bool {
        self.late_copy.is_none() && self.queued.iter().all(is_over)
    }

    /// Drops what users made, whose panics end no thread.
    pub fn release(self) {
        let Self { state, allocation, .. } = self;
        dropped((state, allocation));
    }
}

impl DeferredRelease {
    pub fn waits_for_copies(&self) -> bool {
        matches!(self, Self::BehindCopies { .. })
    }

    pub fn kept(&mut self) -> &mut Kept {
        match self {
            Self::BehindKernels { kept, .. } | Self::BehindCopies { kept, .. } => kept,
        }
    }

    /// Nothing uses it any more.
    pub fn release(self, saves: &InFlightSaves) {
        match self {
            Self::BehindKernels { kept, ticket } => {
                kept.release();
                saves.release(&ticket);
            }
            Self::BehindCopies { kept, chunks } => {
                dropped(chunks);
                kept.release();
            }
        }
    }

    /// Something may use it for ever: it is never freed.
    pub fn leak(self, saves: &InFlightSaves) {
        if let Self::BehindKernels { ticket, .. } = &self {
            saves.release(ticket);
        }
        forget(self);
    }
}

/// Whether a device does nothing any more that it queued at a `save`; a panic is no yes.
fn is_over(queued: &Arc<dyn Queued>) -> bool {
    guarded("a device panicked", || Ok(queued.over())).unwrap_or(false)
}
