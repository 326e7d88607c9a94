//! Deferred releases: memory and sources of a save that has ended, or will not be staged, kept while a device
//! may still use them.

use super::capture_pool::Allocation;
use super::in_flight::InFlightSaves;
use super::in_flight_chunk::InFlightChunk;
use super::late_copy::LateCopy;
use crate::device::Queued;
use crate::guard::{dropped, guarded};
use crate::state::StateDict;
use crate::ticket::Ticket;
use std::collections::VecDeque;
use std::mem::forget;
use std::sync::Arc;

/// A release that waits for a device.
pub(super) enum DeferredRelease {
    /// Waits for kernels in streams of the program, which may read the sources. Then the save is released.
    /// Its copies have ended already.
    BehindKernels { kept: KeptForRelease, ticket: Arc<Ticket> },
    /// Waits for copies from the sources into slabs that a device did not end in time. The save is released
    /// already.
    BehindCopies { kept: KeptForRelease, chunks: VecDeque<InFlightChunk> },
}

/// Sources, memory and queued work that a device may still use.
pub(super) struct KeptForRelease {
    pub state: StateDict<'static>,
    /// Device memory of the captured tensors.
    pub allocation: Option<Allocation>,
    /// Work in streams of the program that may still read sources.
    pub queued: Vec<Arc<dyn Queued>>,
    /// Set while kernels of its fence may still run.
    pub late_copy: Option<Arc<LateCopy>>,
}

impl KeptForRelease {
    /// True if kernels may still use the kept objects.
    pub fn in_use(&mut self) -> bool {
        self.queued.extract_if(.., |queued| is_over(queued)).for_each(dropped);
        !self.queued.is_empty() || self.late_copy.as_ref().is_some_and(|late_copy| late_copy.pending())
    }

    /// True if the objects can be released at once: there is no late copy, and all queued work is over. Does
    /// not ask the fence.
    pub fn is_free(&self) -> bool {
        self.late_copy.is_none() && self.queued.iter().all(is_over)
    }

    /// Drops objects of the program. A panic in a drop does not end the thread.
    pub fn release(self) {
        let Self { state, allocation, .. } = self;
        dropped((state, allocation));
    }
}

impl DeferredRelease {
    pub fn waits_for_copies(&self) -> bool {
        matches!(self, Self::BehindCopies { .. })
    }

    pub fn kept(&mut self) -> &mut KeptForRelease {
        match self {
            Self::BehindKernels { kept, .. } | Self::BehindCopies { kept, .. } => kept,
        }
    }

    /// Releases the kept objects, which nothing uses any more.
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

    /// Leaks the kept objects, because a device may use them for ever, and releases a save that is not
    /// released yet.
    pub fn leak(self, saves: &InFlightSaves) {
        if let Self::BehindKernels { ticket, .. } = &self {
            saves.release(ticket);
        }
        forget(self);
    }
}

/// True if the work that a device queued at a `save` is over. False if the device panics.
fn is_over(queued: &Arc<dyn Queued>) -> bool {
    guarded("a device panicked", || Ok(queued.over())).unwrap_or(false)
}
