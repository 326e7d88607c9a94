//! The report of which device an executor uses for copies, why, and what that device can do.

use super::{Device, Kernels};
use crate::error::Result;
use std::fmt;
use std::sync::Arc;

/// The device of an executor, why it was chosen, and its capabilities.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DeviceReport {
    /// The device's name: `host`, `cuda:0`; `auto` until the GPU is known.
    pub name: String,
    /// Why the device was chosen, or its description.
    pub why: String,
    /// Size of the capture pool, in bytes. The error is the reason there is no pool. Without one, small
    /// tensors cross the bus one by one and are read at the fence, and strided tensors are refused.
    pub gather: Result<u64, String>,
    /// Number of chunks that a fence can copy late on this device. The error is the reason the fence waits
    /// for copies to the host instead.
    pub scratch: Result<usize, String>,
    /// Maximum number of pending fences whose stream waits end if their saves fail. The error is the reason
    /// streams wait for events instead, even if the saves fail.
    pub memory_waits: Result<usize, String>,
    /// Ok if one call queues the copies of a chunk. The error is the reason it does not.
    pub batch: Result<(), String>,
    /// The embedded kernels: [`KERNELS`](crate::KERNELS).
    pub kernels: &'static str,
}

impl DeviceReport {
    pub(crate) fn new(device: &dyn Device, why: String) -> Self {
        let unknown = || "not checked yet".to_owned();
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

    /// Records the capabilities of `kernels`, or the reason there are no kernels.
    pub(crate) fn found(&mut self, kernels: &Result<Arc<dyn Kernels>>) {
        match kernels {
            Ok(kernels) => {
                let (capture_memory, none) = (kernels.capture_memory(), "no memory was requested setting=gather");
                self.gather = if capture_memory.is_empty() {
                    Err(none.into())
                } else {
                    Ok(capture_memory.end - capture_memory.start)
                };
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
