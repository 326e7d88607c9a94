//! The kernels of one fence, on all devices of its save.

use super::planned::{OnOneDevice, Planned};
use crate::device::FenceKernels;
use crate::error::{ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::state::DeviceStream;
use smallvec::SmallVec;
use std::sync::Arc;

/// F of each device of a save, as far as it is told.
pub(super) type Told = SmallVec<[Option<usize>; 2]>;

/// The queued kernels, which tell F of their devices. Dropping the set waits until the kernels have run.
pub(super) struct KernelSet {
    /// The kernels of the first devices of the save. A driver has refused the kernels of the others.
    kernels: SmallVec<[Arc<dyn FenceKernels>; 2]>,
    /// The number of devices of the save.
    devices: usize,
}

impl KernelSet {
    /// Makes each device of the save queue its kernels, in the first of `streams` that belongs to the device
    /// or else in a stream of ours. Then makes `streams` wait for the kernels of all devices. `slots` has the
    /// addresses of the slots by device. `behind` says for a device and its first chunk with a slot whether
    /// the kernels come behind all copies queued so far. The second value is Ok if everything was queued.
    ///
    /// # Errors
    /// Nothing was queued.
    pub fn launch(
        save: &Planned,
        streams: &[DeviceStream],
        slots: &[Vec<u64>],
        behind: impl Fn(&OnOneDevice, usize) -> bool,
    ) -> Result<(Self, Result<()>)> {
        let mut set = Self { kernels: SmallVec::new(), devices: save.devices.len() };
        if let Some(on) = save.devices.first() {
            // Check before anything is queued, so that a refusal leaves nothing queued.
            on.device.refuse_captures(streams)?;
        }
        for (on, slots) in save.devices.iter().zip(slots) {
            let behind = behind(on, save.chunks - slots.len());
            let launched = match on.device.launch(on.own(streams), &save.dependency, behind, slots) {
                Ok(launch) => {
                    set.kernels.push(launch.kernels);
                    launch.queued
                }
                Err(error) if set.kernels.is_empty() => return Err(error),
                Err(error) => Err(error),
            };
            if let Err(error) = launched {
                return Ok((set, Err(error.with_kind(ErrorKind::Device))));
            }
        }
        let followed = set.kernels.iter().zip(&save.devices).try_for_each(|(kernels, on)| {
            let others = streams.iter().filter(|stream| Some(**stream) != on.own(streams));
            let others = others.filter(|stream| stream.ordinal == on.ordinal || !mutant::on(Mutant::OwnKernels));
            kernels.follow(&others.copied().collect::<SmallVec<[DeviceStream; 8]>>())
        });
        Ok((set, followed.map_err(|error| error.with_kind(ErrorKind::Device))))
    }

    /// Makes `streams` wait for the kernels of all devices.
    ///
    /// # Errors
    /// As [`FenceKernels::follow`].
    pub fn follow(&self, streams: &[DeviceStream]) -> Result<()> {
        self.kernels.iter().try_for_each(|kernels| kernels.follow(streams))
    }

    /// True if all kernels have run, or never will.
    pub fn over(&self) -> bool {
        // Ask all kernels, because asking detects a lost device.
        self.kernels.iter().filter(|kernels| !kernels.over()).count() == 0
    }

    /// F of each device that has told it.
    pub fn told(&self) -> Told {
        (0..self.devices).map(|index| self.kernels.get(index)?.latched()).collect()
    }
}
