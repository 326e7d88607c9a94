//! A chunk in flight: its copies are queued, or are being queued, and may not have ended.

use crate::plan::Chunk;

/// A chunk whose copies may not have ended.
pub(super) struct InFlightChunk {
    pub chunk: Chunk,
    /// The completion event behind the last copy; `u64::MAX` while copies are being queued.
    pub event: u64,
    /// Copied from live memory, not from its late copy.
    pub live: bool,
    /// F when it was queued.
    pub latched: Option<usize>,
}
