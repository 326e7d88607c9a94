//! The project's kernels on a device. The constructor tests them, so that a driver that refuses them or runs
//! them wrongly is found before anything is saved.
//!
//! # Safety argument
//! `loaded` keeps the memory that a launch points to. [`Kernels`] waits for all launches before it is
//! dropped; after a timeout it leaks the loaded kernels and their memory. The host reads digests only after
//! the event behind their copy is reached.
#![expect(unsafe_code, reason = "kernels over memory that outlives them; argument above")]

use super::CudaState;
use super::driver::Memory;
use super::gpu::{POLL_INTERVAL, SETTLE_TIMEOUT};
use super::late_copy::Save;
use super::loaded::{Loaded, Results};
use super::pooled_event::PooledEvent;
use super::self_test;
use super::table::Table;
use crate::device::{self, DeviceLateCopy, Digests, Pieces, Queued};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::state::DeviceStream;
use std::fmt;
use std::mem::forget;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// The work queued before an event.
struct Behind(Arc<PooledEvent>);

impl Queued for Behind {
    fn over(&self) -> bool {
        self.0.is_over()
    }
}

/// Digests that were queued.
struct PendingDigests {
    loaded: Arc<Loaded>,
    table: Arc<Table>,
    results: Arc<Results>,
    after: Arc<PooledEvent>,
}

impl Digests for PendingDigests {
    fn take(&self) -> Result<Vec<Digest>> {
        let _entered = self.loaded.gpu.context.enter()?;
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        while !self.after.is_reached()? {
            if Instant::now() >= deadline {
                return Err(Error::new(ErrorKind::Device, "a device did not digest tensors in time"));
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        let lengths = &self.table.lengths;
        // SAFETY: there are as many numbers as entries, written before the event was reached and not after.
        let found =
            unsafe { std::slice::from_raw_parts(self.results.pinned()?.pointer().cast::<u64>(), lengths.len()) };
        let each = found.iter().zip(lengths).map(|(&bits, &len)| (Digest::from_bits(bits), u64::from(len)));
        let each: Vec<_> = each.collect();
        let chunks = self.table.starts.windows(2);
        Ok(chunks.map(|w| Digest::concat(each[w[0] as usize..w[1] as usize].iter().copied())).collect())
    }
}

/// The kernels of an executor. When this is dropped, no more work is queued, and the drop waits for the work
/// that still runs.
pub(super) struct Kernels(Arc<Loaded>);

impl Kernels {
    pub fn new(shared: &Arc<CudaState>, memory: device::KernelMemory) -> Result<Self> {
        let kernels = Self(Loaded::new(shared, memory)?);
        let _entered = kernels.0.gpu.context.enter()?;
        self_test::run(&kernels, &kernels.0.gpu)?;
        drop(_entered);
        Ok(kernels)
    }
}

impl fmt::Debug for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slots = self.0.late_copies.as_ref().map_or(0, |late_copies| late_copies.slots.len());
        write!(f, "Kernels(cuda:{}, {slots} slots)", self.0.gpu.context.ordinal)
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        if self.0.gpu.context.alive().is_ok() && !self.0.settle() {
            forget(self.0.clone());
        }
    }
}

impl device::Kernels for Kernels {
    fn ordinal(&self) -> u32 {
        self.0.gpu.context.ordinal
    }

    fn capture_memory(&self) -> Range<u64> {
        let start = self.0.capture_memory.as_ref().map_or(0, Memory::address);
        start..start + self.0.captured
    }

    fn slots(&self) -> Result<&[u64]> {
        self.0.late_copies.as_ref().map(|late_copies| &late_copies.slots[..]).map_err(Clone::clone)
    }

    fn capture(&self, stream: DeviceStream, pieces: &Pieces, queued: &mut Vec<Arc<dyn Queued>>) -> Result<()> {
        let loaded = &self.0;
        loaded.shared.refuse_captures(&[stream])?;
        let _entered = loaded.gpu.context.enter()?;
        let table = loaded.tables.of(pieces)?;
        let all = 0..table.lengths.len() as u32;
        // SAFETY: `keep` keeps the table. The capture pool lives as long as the kernels. The stager keeps the
        // tensors until the work that is added to `queued` is over.
        let launch = || unsafe { loaded.copy(&table, all, 0, (&stream).into()) };
        let (behind, launched) = loaded.keep((&stream).into(), table.clone(), (), launch)?;
        queued.push(Arc::new(Behind(behind)));
        launched
    }

    fn digest(
        &self,
        stream: DeviceStream,
        pieces: &Pieces,
        queued: &mut Vec<Arc<dyn Queued>>,
    ) -> Result<Arc<dyn Digests>> {
        let loaded = &self.0;
        loaded.shared.refuse_captures(&[stream])?;
        let _entered = loaded.gpu.context.enter()?;
        let table = loaded.tables.of(pieces)?;
        let bytes = (table.lengths.len() * size_of::<u64>()).max(8);
        let results = Arc::new(loaded.results(bytes)?);
        // SAFETY: `keep` keeps the table and the results. The stager keeps the tensors until the work that is
        // added to `queued` is over.
        let launch = || unsafe { loaded.digest(&table, results.device()?, (&stream).into()) };
        let (behind, launched) = loaded.keep((&stream).into(), table.clone(), results.clone(), launch)?;
        queued.push(Arc::new(Behind(behind.clone())));
        launched?;
        loaded.results.wait(&behind)?;
        let (from, to) = (results.device()?.address(), results.pinned()?.pointer());
        let (after, copied) = loaded.keep(loaded.results.handle(), table.clone(), results.clone(), || {
            // SAFETY: the copy is as long as the kernel's output; `keep` keeps both ends.
            unsafe { loaded.results.copy_to_host(from, to, table.lengths.len() * size_of::<u64>()) }
        })?;
        copied?;
        Ok(Arc::new(PendingDigests { loaded: loaded.clone(), table, results, after }))
    }

    fn late_copy(&self, number: u64, base: u64, pieces: &Pieces) -> Result<Option<Box<dyn DeviceLateCopy>>> {
        let _entered = self.0.gpu.context.enter()?;
        let table = self.0.tables.of(pieces)?;
        Ok(Save::new(&self.0, number, base, table).map(|save| Box::new(save) as Box<dyn DeviceLateCopy>))
    }
}
