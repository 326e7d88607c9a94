//! A chunk in flight: its copies are queued, or are being queued, and may not have ended.

use super::kernel_set::Told;
use crate::mutant::{self, Mutant};
use crate::plan::Chunk;
use smallvec::SmallVec;
use std::time::Instant;

/// A chunk whose copies may not have ended.
pub(super) struct InFlightChunk {
    pub chunk: Chunk,
    /// The completion event behind the last copy; `u64::MAX` while copies are being queued.
    pub event: u64,
    pub origins: Origins,
    /// When the stager began and ended queueing its copies. None unless the save is traced.
    pub queued: Option<(Instant, Instant)>,
}

/// The memory from which one device's part of a chunk is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// Live memory, because the device had not told F.
    Live,
    /// The late copy of the part.
    Slot,
    /// No memory: the device has no part of the chunk, or the part has arrived and is kept.
    Nothing,
}

/// The origins by device of the save. Empty if no device has kernels for the save.
pub(super) type Origins = SmallVec<[Origin; 2]>;

impl InFlightChunk {
    /// True if a part that may be copied late is copied from live memory.
    pub fn is_live(&self) -> bool {
        self.origins.contains(&Origin::Live)
    }

    /// The lowest F told by the devices whose parts are copied from live memory.
    pub fn first(&self, told: &Told) -> Option<usize> {
        if mutant::on(Mutant::LatchEarly) {
            // None of these devices had told F when the chunk was queued.
            return None;
        }
        let live = self.origins.iter().zip(told).filter(|(origin, _)| **origin == Origin::Live);
        live.filter_map(|(_, told)| *told).min()
    }
}
