//! The data of one save that a fence needs: its devices, and which chunks have parts on them.

use crate::device::{Dependency, DeviceLateCopy};
use crate::state::DeviceStream;
use std::ops::Range;

/// One save as planned in the call of `save`.
pub(super) struct Planned {
    /// The number of its chunks.
    pub chunks: usize,
    /// The devices with kernels that have tensors of the save.
    pub devices: Vec<OnOneDevice>,
    /// The device of each tensor, by index in the state dict; kept after the sources are dropped.
    pub ordinals: Vec<Option<u32>>,
    /// The work that wrote the tensors. Late copies come after this work.
    pub dependency: Dependency,
    /// All devices of the save have slots, so watermarks are used.
    pub slotted: bool,
    /// The watermark of each device before the first chunk of this save.
    pub base: u64,
    /// The first chunk from which on no chunk has a host tensor that is copied. A fence waits until all
    /// chunks before it are queued.
    pub host: usize,
}

/// The parts of a save on one device.
pub(super) struct OnOneDevice {
    /// Index of the device in the scratch.
    pub place: usize,
    pub ordinal: u32,
    pub device: Box<dyn DeviceLateCopy>,
    /// For each chunk: true if it is gathered before it is copied.
    pub gathered: Vec<bool>,
    /// The chunks that have a part here, in order.
    pub chunks: Vec<usize>,
}

impl OnOneDevice {
    /// True if one of these chunks has a part here.
    pub fn has_any(&self, chunks: Range<usize>) -> bool {
        let next = self.chunks.partition_point(|&chunk| chunk < chunks.start);
        self.chunks.get(next).is_some_and(|&chunk| chunk < chunks.end)
    }

    /// The first chunk from which on each part here can have one of `free` slots. Chunks before `from` get
    /// none.
    pub fn first_with_slot(&self, from: usize, free: usize) -> usize {
        let most = self.chunks.len().saturating_sub(free);
        let without = &self.chunks[..self.chunks.partition_point(|&chunk| chunk < from).max(most)];
        without.last().map_or(0, |chunk| chunk + 1)
    }

    /// The first of `streams` that belongs to this device.
    pub fn own<'a>(&self, streams: &[DeviceStream<'a>]) -> Option<DeviceStream<'a>> {
        streams.iter().find(|stream| stream.ordinal == self.ordinal).copied()
    }
}
