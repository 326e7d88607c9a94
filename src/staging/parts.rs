//! Finds each device's parts of a save's chunks, from plan and state, in the call of `save`.

use super::pieces::Part;
use super::planned::OnOneDevice;
use crate::device::{Kernels, Pieces};
use crate::error::{Error, ErrorKind, Result};
use crate::plan::{Plan, SegmentSource};
use crate::state::{MemoryLocation, StateDict};
use std::sync::Arc;

/// A chunk with more parts of tensors than this is gathered on the device, and one copy transfers it.
const GATHERED_FROM_PIECES: usize = 8;

/// A device with kernels, whose index in the scratch is `place`.
pub(super) struct DeviceKernels {
    pub place: usize,
    pub kernels: Arc<dyn Kernels>,
}

/// The parts of one device.
struct Parts {
    on: DeviceKernels,
    pieces: Pieces,
    /// For each chunk: true if it is gathered.
    gathered: Vec<bool>,
    /// The chunks with a part.
    chunks: Vec<usize>,
    can_gather: bool,
    slotted: bool,
    /// Where the pieces of the present chunk begin.
    begin: usize,
}

/// The parts of all devices of a save.
pub(super) struct PartsOfSave {
    devices: Vec<Parts>,
    /// The index after the last chunk with a host tensor that the stager copies.
    pub host: usize,
}

impl PartsOfSave {
    /// Finds the parts of `devices`. `captured` tells whether a host tensor was captured at `save`.
    ///
    /// # Errors
    /// `Invalid`, naming the tensor, when kernels do not support its layout.
    pub fn find(
        devices: Vec<DeviceKernels>,
        plan: &Plan,
        state: &StateDict<'_>,
        captured: impl Fn(usize) -> bool,
    ) -> Result<Self> {
        let expected = plan.segments.len() / devices.len().max(1);
        let mut devices: Vec<_> = devices.into_iter().map(|on| Parts::new(on, plan.chunks.len(), expected)).collect();
        let mut host = 0;
        for (chunk, planned) in plan.chunks.iter().enumerate() {
            let mut to = 0;
            for segment in &plan.segments[planned.segments.clone()] {
                let bytes = segment.length as u64;
                if let SegmentSource::Tensor(index) = segment.source {
                    let (name, tensor) = state.tensors.get_index(index).expect("checked by the plan");
                    match tensor.location {
                        MemoryLocation::Device { stream, .. } => {
                            let on = devices.iter_mut().find(|parts| parts.on.kernels.ordinal() == stream.ordinal);
                            if let Some(parts) = on {
                                parts.pieces.add(name, tensor, Part { at: segment.at, bytes, to, chunk })?;
                            }
                        }
                        MemoryLocation::Host { .. } if !captured(index) && bytes > 0 => host = chunk + 1,
                        MemoryLocation::Host { .. } => {}
                    }
                }
                to += bytes;
            }
            devices.iter_mut().for_each(|parts| parts.end_chunk(chunk));
        }
        devices.retain(|parts| !parts.pieces.list.is_empty());
        Ok(Self { devices, host })
    }

    /// The number of devices with parts that kernels will read.
    pub fn devices(&self) -> usize {
        self.devices.len()
    }

    /// Makes the devices prepare the late copy of the `number`-th save, whose first chunk is after the
    /// watermark `base`. Devices that refuse are left out, unless a tensor must be gathered.
    ///
    /// # Errors
    /// `Busy` when a device tracks too many saves to gather tensors; `Device`.
    pub fn prepare(self, number: u64, base: u64) -> Result<Vec<OnOneDevice>> {
        let mut prepared = Vec::with_capacity(self.devices.len());
        for Parts { on, pieces, gathered, chunks, .. } in self.devices {
            let strided = pieces.list.iter().any(|piece| piece.view.is_some());
            match on.kernels.late_copy(number, base, &pieces) {
                Ok(Some(device)) => {
                    let (place, ordinal) = (on.place, on.kernels.ordinal());
                    prepared.push(OnOneDevice { place, ordinal, device, gathered, chunks });
                }
                Ok(None) if strided => {
                    let busy = "too many saves are under way for tensors that are to be gathered";
                    return Err(Error::new(ErrorKind::Busy, busy));
                }
                Err(error) if strided => return Err(error),
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(
                        error = format_args!("{error:#}"),
                        device = on.kernels.ordinal(),
                        "a save is neither gathered nor copied late on its device"
                    );
                }
            }
        }
        Ok(prepared)
    }
}

impl Parts {
    fn new(on: DeviceKernels, chunks: usize, expected: usize) -> Self {
        let can_gather = !on.kernels.capture_memory().is_empty();
        let slotted = on.kernels.slots().is_ok_and(|slots| !slots.is_empty());
        let mut pieces = Pieces { chunks, ..Pieces::default() };
        pieces.list.reserve(expected);
        let gathered = vec![false; chunks];
        Self { on, pieces, gathered, chunks: Vec::new(), can_gather, slotted, begin: 0 }
    }

    fn end_chunk(&mut self, chunk: usize) {
        let parts = &self.pieces.list[self.begin..];
        if parts.iter().any(|piece| piece.bytes > 0) {
            self.chunks.push(chunk);
        }
        let strided = parts.iter().any(|piece| piece.view.is_some());
        self.gathered[chunk] = self.can_gather && (parts.len() > GATHERED_FROM_PIECES || strided);
        if !self.gathered[chunk] && !self.slotted {
            // No kernel will read these pieces.
            self.pieces.list.truncate(self.begin);
        }
        self.begin = self.pieces.list.len();
    }
}
