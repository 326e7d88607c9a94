//! Finding the memory behind an address.

use crate::abi::{INVALID_VALUE, Status};
use crate::device;
use crate::host::{self, InUse};
use crate::work::Spot;

impl Spot {
    pub fn of(address: u64, bytes: u64) -> Status<Self> {
        if let Some(device) = device::holding(address) {
            let block = device.state().heap.find(address, bytes)?;
            return Ok(Spot::Device(device.ordinal, address, block));
        }
        if address == 0 {
            return Err(INVALID_VALUE);
        }
        Ok(host::find(address, bytes).map_or(Spot::Pageable(address), |range| Spot::Pinned(address, range)))
    }

    /// The address to use now, and a guard that keeps it usable. An error when the memory has gone since the
    /// work was enqueued.
    pub fn pointer(self) -> Status<(*mut u8, Option<InUse>)> {
        match self {
            Spot::Device(ordinal, address, block) => {
                let device = device::get(ordinal)?;
                device.state().heap.check(block)?;
                Ok((device.window()?.shadow_of(address), None))
            }
            Spot::Pinned(address, range) => Ok((address as *mut u8, Some(InUse::new(range)?))),
            Spot::Pageable(address) => Ok((address as *mut u8, None)),
        }
    }

    pub fn on_device(self) -> bool {
        matches!(self, Spot::Device(..))
    }
}
