//! Which device an executor copies with, and the report of why it is that and what it can do.

use super::{Device, Kernels};
use crate::error::Result;
use std::fmt;
use std::sync::Arc;

/// The device of an executor, and why it is that.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DeviceReport {
    /// Its name: `host`, `cuda:0`; `auto` until it is known which GPU it is.
    pub name: String,
    /// Why it was chosen, or what it is.
    pub why: String,
    /// How much small state the device can gather at `save`, in bytes; or why it does not: small tensors cross the bus one by one
    /// then and are taken at the fence, and strided ones are refused.
    pub gather: Result<u64, String>,
    /// How many chunks a fence can copy late on the device; or why it waits for copies to the host instead.
    pub scratch: Result<usize, String>,
    /// How many fences may be pending whose waits end when their saves have failed; or why streams wait for events, whatever
    /// becomes of the saves.
    pub memory_waits: Result<usize, String>,
    /// That the copies of a chunk are queued in one call; or why each is a call of its own.
    pub batch: Result<(), String>,
    /// The embedded kernels: [`KERNELS`](crate::KERNELS).
    pub kernels: &'static str,
}

impl DeviceReport {
    pub(crate) fn new(device: &dyn Device, why: String) -> Self {
        let unknown = || "not looked for".to_owned();
        Self {
            name: device.name(),
            why,
            gather: Err(unknown()),
            scratch: Err(unknown()),
            memory_waits: Err(unknown()),
            batch: Err(unknown()),
            kernels: crate::KERNELS,
        }
    }

    /// Takes note of the kernels that there are, or of why there are none.
    pub(crate) fn found(&mut self, kernels: &Result<Arc<dyn Kernels>>) {
        match kernels {
            Ok(kernels) => {
                let (room, none) = (kernels.room(), "no memory was asked for setting=gather");
                self.gather = if room.is_empty() { Err(none.into()) } else { Ok(room.end - room.start) };
                self.scratch = kernels.slots().map(<[u64]>::len).map_err(|why| format!("{why:#}"));
            }
            Err(why) => {
                let why = format!("{why:#}");
                (self.gather, self.scratch) = (Err(why.clone()), Err(why));
            }
        }
    }
}

impl fmt::Display for DeviceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.why)
    }
}
