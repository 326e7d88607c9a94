//! The features of an executor's device beyond copies. They are determined at start, or, if the GPU is not
//! known then, by the first save of a tensor in GPU memory.

use crate::device::{Device, DeviceReport, KernelMemory, ProgramMemory, Waits};
use crate::error::{Error, Result};
use crate::settings::Settings;
use crate::staging::{Scratch, Stager};
use crate::state::DeviceStream;
use crate::sync::{Mutex, lock};
use std::sync::{Arc, OnceLock};

/// The largest chunk that does not delay the program's own reads from a device: the device makes copies in
/// order, with two chunks in flight at a time.
const FOREGROUND: u64 = 16 << 20;

/// The reports and open requests for the device of an executor. See the module.
#[derive(Debug)]
pub(super) struct Equipment {
    /// The report made at start.
    first: DeviceReport,
    /// The report of the device that was chosen later.
    later: OnceLock<DeviceReport>,
    /// The request to that device, until it is known.
    open: Mutex<Option<Wish>>,
}

/// The request of an executor to its device.
#[derive(Debug)]
pub(super) struct Wish {
    chunk: u64,
    gather: u64,
    scratch: u64,
    memory_waits: bool,
    batch: bool,
    given: Option<ProgramMemory>,
    /// The reason why the arena is not pinned.
    unpinned: Option<String>,
}

impl Wish {
    pub fn new(settings: &Settings, given: Option<ProgramMemory>, pinned: &Result<(), String>) -> Self {
        let Settings { chunk, gather, scratch, memory_waits, batch, .. } = *settings;
        Self { chunk, gather, scratch, memory_waits, batch, given, unpinned: pinned.clone().err() }
    }

    /// Requests the features from the device, and writes the refused ones into `report`.
    fn fulfil(self, device: &dyn Device, report: &mut DeviceReport) -> Offer {
        let (is_gpu, at_most) = (device.name() != "host", FOREGROUND);
        if is_gpu && self.chunk > at_most {
            tracing::warn!(chunk = self.chunk, at_most, device = %report, "chunks are large: reads of the program from the device wait for two chunks");
        }
        let Self { chunk, gather, scratch, given, .. } = self;
        // A program that provides memory of one device is not made to give more than that.
        let elsewhere = if given.is_some() { 0 } else { scratch };
        let kernels = device.kernels(KernelMemory { ordinal: None, chunk: chunk as usize, gather, scratch, given });
        report.found(&kernels);
        if let (Err(reason), true) = (&report.gather, is_gpu) {
            tracing::warn!(%reason, device = %report, "no kernels: small tensors are not gathered, and fences wait");
        }
        let not_asked = || Error::invalid("not asked for setting=memory_waits");
        let waits = if self.memory_waits { device.waits() } else { Err(not_asked()) };
        report.memory_waits = waits.as_ref().map(|waits| waits.at_once()).map_err(|error| format!("{error:#}"));
        if let (Err(reason), true) = (&report.memory_waits, self.memory_waits && is_gpu) {
            tracing::warn!(%reason, device = %report, "no memory-waits: streams wait for events at fences");
        }
        report.batch = match (self.batch, &self.unpinned) {
            (false, _) => Err("not asked for setting=batch".into()),
            (true, Some(_)) => Err("the arena is not pinned".into()),
            (true, None) => device.batches().map_err(|error| format!("{error:#}")),
        };
        if let (Err(reason), true) = (&report.batch, self.batch && is_gpu) {
            tracing::warn!(%reason, device = %report, "copies from the device are not batched: each is one call");
        }
        Offer {
            scratch: kernels.ok().map(|kernels| Scratch::new(kernels, chunk as usize, elsewhere)),
            waits: waits.ok(),
            batch: report.batch.is_ok(),
        }
    }
}

/// The features that the stager gets.
#[derive(Default)]
pub(super) struct Offer {
    pub scratch: Option<Scratch>,
    pub waits: Option<Arc<dyn Waits>>,
    pub batch: bool,
}

impl Equipment {
    /// Requests everything at once if the device is known, otherwise later.
    pub fn of(device: &dyn Device, mut report: DeviceReport, wish: Wish) -> (Self, Offer) {
        let (offer, open) = if device.is_settled() {
            (wish.fulfil(device, &mut report), None)
        } else {
            // A device that is chosen later queues copies in one call only where it can.
            let batch = wish.batch && wish.unpinned.is_none();
            (Offer { batch, ..Offer::default() }, Some(wish))
        };
        (Self { first: report, later: OnceLock::new(), open: Mutex::new(open) }, offer)
    }

    /// Makes the open request, once tensors of these streams are saved.
    ///
    /// # Errors
    /// `Unavailable`, `Device`: the device of the streams cannot be used.
    pub fn complete(&self, stager: &Stager, streams: &[DeviceStream]) -> Result<()> {
        let mut open = lock(&self.open);
        if open.is_none() {
            return Ok(());
        }
        let device = stager.device.as_ref();
        let why = device.settle(streams)?;
        if let Some(wish) = open.take() {
            let mut report = DeviceReport::new(device, format!("{why}, of the first tensor of a GPU"));
            let Offer { scratch, waits, .. } = wish.fulfil(device, &mut report);
            stager.offer(scratch, waits);
            _ = self.later.set(report);
        }
        Ok(())
    }

    pub fn report(&self) -> &DeviceReport {
        self.later.get().unwrap_or(&self.first)
    }
}
