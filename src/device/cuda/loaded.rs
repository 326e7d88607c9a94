//! The loaded kernels of a device, the memory allocated for them at start, and their queued work.
//!
//! `running` keeps work that is queued in streams of the program until it has run.
//!
//! # Safety argument
//! The structures are those of the sources in `kernels/`. The memory that a launch points to, tables
//! included, is kept by `running`, by a save that outlives its launches (`late_copy`), or by `self`, whose
//! owner waits for all launches before it drops the last reference (`kernels`). After a timeout, memory and
//! kernels are leaked, and so is the owner of memory that the program handed in.
#![expect(unsafe_code, reason = "kernels over memory that outlives them; argument above")]

use super::CudaState;
use super::driver::{Address, FunctionHandle, Memory, Module, Stream, StreamHandle};
use super::embedded;
use super::fences::Fences;
use super::gpu::{Gpu, POLL_INTERVAL, SETTLE_TIMEOUT};
use super::pooled_event::PooledEvent;
use super::table::{Table, Tables};
use crate::device::{KernelMemory, ProgramMemory};
use crate::error::{Error, Result};
use crate::sync::{Mutex, lock};
use std::any::Any;
use std::mem::forget;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

const BLOCK: u32 = 256;
const GRID: u32 = 512;
/// Size of the memory that `digest_tables` fills, in bytes.
const DIGEST_TABLES: usize = (8 * 256 + 256 + 40) * 8;

#[derive(Clone, Copy)]
#[repr(C)]
struct Gather {
    pieces: u64,
    views: u64,
    base: u64,
    first: u32,
    count: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct DigestPieces {
    pieces: u64,
    views: u64,
    tables: u64,
    out: u64,
    first: u32,
    count: u32,
}

/// The loaded kernels. The last owner drops them when none of them runs any more.
pub(super) struct Loaded {
    pub shared: Arc<CudaState>,
    pub gpu: Arc<Gpu>,
    pub tables: Tables,
    /// Slots for late copies, or the reason there are none. Tensors are gathered in either case.
    pub late_copies: Result<Slots>,
    gather: FunctionHandle,
    digest: FunctionHandle,
    /// Size of the capture pool, the first part of `capture_memory`; the rest holds one gathered chunk.
    pub captured: u64,
    running: Mutex<Vec<Running>>,
    spare: Spare,
    /// The stream that copies digests to the host, so that no stream of the program waits for that copy.
    pub results: Stream,
    // Declared in drop order: the kernels before the memory that they use.
    modules: [Module; 2],
    pub capture_memory: Option<Memory>,
    digest_tables: Memory,
}

/// The scratch memory, and the kernels of fences.
pub(super) struct Slots {
    // Declared in drop order: the kernels before the memory that they use.
    pub fences: Arc<Fences>,
    pub slots: Vec<Address>,
    _memory: Box<dyn Any + Send + Sync>,
}

impl Slots {
    /// Allocates scratch memory for `count` chunks, unless the program handed it in, and tests the kernels of
    /// fences.
    fn new(gpu: &Arc<Gpu>, chunk: usize, count: usize, given: Option<ProgramMemory>) -> Result<Self> {
        if count == 0 {
            return Err(Error::invalid("no memory was requested setting=scratch"));
        }
        let fences = Arc::new(Fences::new(gpu, gpu.context.module(&embedded::LATE_COPY)?)?);
        let (begin, memory): (_, Box<dyn Any + Send + Sync>) = match given {
            Some(given) => (given.address, given.keep_alive),
            None => {
                let memory = gpu.context.memory(count * chunk)?;
                (memory.address(), Box::new(memory))
            }
        };
        Ok(Self { fences, slots: (0..count).map(|i| begin + (i * chunk) as u64).collect(), _memory: memory })
    }
}

/// Work that was queued in a stream of the program, and the objects that must stay until it has run.
struct Running {
    after: Arc<PooledEvent>,
    _table: Arc<Table>,
    _results: Box<dyn Any + Send + Sync>,
}

impl Loaded {
    /// Allocates device memory, loads the kernels and tests each of them.
    pub fn new(shared: &Arc<CudaState>, memory: KernelMemory) -> Result<Arc<Self>> {
        let KernelMemory { ordinal, chunk, gather, scratch, given } = memory;
        let count = usize::try_from(scratch / chunk as u64).unwrap_or(0);
        if gather == 0 && scratch == 0 {
            return Err(Error::invalid("no device memory was requested for kernels"));
        }
        let gpu = shared.gpu(ordinal.unwrap_or(shared.home))?;
        let late_copies = Slots::new(&gpu, chunk, count, given);
        match &late_copies {
            Err(why) if gather == 0 => return Err(why.clone()),
            Err(why) if scratch > 0 => tracing::warn!(error = %why, "no scratch: fences wait for copies to the host"),
            _ => {}
        }
        let modules = [gpu.context.module(&embedded::GATHER)?, gpu.context.module(&embedded::DIGEST)?];
        let capture_memory = usize::try_from(gather).unwrap_or(usize::MAX).saturating_add(chunk);
        let capture_memory = (gather > 0).then(|| gpu.context.memory(capture_memory)).transpose()?;
        let loaded = Arc::new(Self {
            shared: shared.clone(),
            tables: Tables::new(gpu.clone())?,
            late_copies,
            gather: modules[0].function(c"gather")?,
            digest: modules[1].function(c"digest")?,
            captured: gather,
            running: Mutex::default(),
            spare: Spare::default(),
            results: gpu.context.stream()?,
            capture_memory,
            digest_tables: gpu.context.memory(DIGEST_TABLES)?,
            gpu: gpu.clone(),
            modules,
        });
        let _entered = gpu.context.enter()?;
        let tried = loaded.try_out();
        if !loaded.settle() {
            forget(loaded.clone());
        }
        tried.map(|()| loaded)
    }

    /// Runs `digest_tables` at start, so that a driver that refuses it fails at start.
    fn try_out(&self) -> Result<()> {
        let (gpu, stream) = (&self.gpu, self.gpu.copies.handle());
        let tables = self.modules[1].function(c"digest_tables")?;
        // SAFETY: the structure of this kernel is one address; the tables live as long as `self`.
        unsafe { gpu.context.launch(tables, stream, 32, BLOCK, &self.digest_tables.address()) }
    }

    /// Waits until no kernel runs any more. Returns false after a timeout.
    pub fn settle(&self) -> bool {
        let _entered = self.gpu.context.enter();
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        if !self.gpu.settle(&self.gpu.copies) {
            return false;
        }
        loop {
            self.reap();
            if lock(&self.running).is_empty() || self.gpu.context.lost() {
                return true;
            }
            if Instant::now() >= deadline {
                tracing::error!("kernels did not end; their memory is leaked");
                return false;
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Releases the work that has run.
    fn reap(&self) {
        let mut running = lock(&self.running);
        let ended: Vec<_> = running.extract_if(.., |r| r.after.is_reached().unwrap_or(false)).collect();
        drop(running);
        drop(ended);
    }

    /// Runs `launch`, and keeps the objects that it needs until the queued work has run. Returns an event
    /// behind that work, and whether all of the work was queued. The context must be current.
    ///
    /// # Errors
    /// Nothing was queued.
    pub fn keep(
        &self,
        stream: StreamHandle,
        table: Arc<Table>,
        results: impl Any + Send + Sync,
        launch: impl FnOnce() -> Result<()>,
    ) -> Result<(Arc<PooledEvent>, Result<()>)> {
        self.reap();
        let after = Arc::new(self.gpu.event()?);
        let launched = launch();
        // Part of the work may be queued even if the launch failed.
        let recorded = after.insist(stream);
        let kept = Running { after: after.clone(), _table: table, _results: Box::new(results) };
        match &recorded {
            Ok(()) => lock(&self.running).push(kept),
            // Either none of that work runs any more, or the context is lost.
            Err(_) => drop(kept),
        }
        Ok((after, launched.and(recorded)))
    }

    /// Queues in `stream` a copy of the entries `first..first + count` of `table` to their destinations,
    /// relative to `base`.
    ///
    /// # Safety
    /// The table, and the memory that it points to, stay until the kernel has run.
    pub unsafe fn copy(&self, table: &Table, entries: Range<u32>, base: Address, stream: StreamHandle) -> Result<()> {
        let (first, count) = (entries.start, entries.end - entries.start);
        if count == 0 {
            return Ok(());
        }
        table.arrive(stream)?;
        let gather = Gather { pieces: table.pieces(), views: table.views(), base, first, count };
        // SAFETY: the caller's contract; the structure is that of the kernel.
        unsafe { self.gpu.context.launch(self.gather, stream, GRID.min(count), BLOCK, &gather) }
    }

    /// Takes buffers for `bytes` of digests from the pool, or allocates them.
    pub fn results(&self, bytes: usize) -> Result<Results> {
        let mut spare = lock(&self.spare);
        let fits = spare.iter().position(|(device, _)| device.len() >= bytes).map(|at| spare.swap_remove(at));
        drop(spare);
        // Nothing is freed here, for the reason given in `Tables::capture_memory`.
        let len = bytes.next_power_of_two();
        let make = || Ok((self.gpu.context.memory(len)?, self.gpu.context.pinned(len)?));
        Ok(Results { both: Some(fits.map_or_else(make, Ok)?), spare: self.spare.clone() })
    }

    /// Queues in `stream` digests of all entries of `table`.
    ///
    /// # Safety
    /// The table, the memory that it points to, and `out` stay until the kernel has run.
    pub unsafe fn digest(&self, table: &Table, out: &Memory, stream: StreamHandle) -> Result<()> {
        let (context, count) = (&self.gpu.context, table.lengths.len() as u32);
        table.arrive(stream)?;
        context.zero(out, stream)?;
        let (pieces, views, tables) = (table.pieces(), table.views(), self.digest_tables.address());
        let digest = DigestPieces { pieces, views, tables, out: out.address(), first: 0, count };
        // SAFETY: the caller's contract; the structure is that of the kernel.
        unsafe { context.launch(self.digest, stream, GRID.min(count.max(1)), BLOCK, &digest) }
    }

    /// Queues a gather of one chunk of `table` in the copy stream. Returns the address of the gathered chunk,
    /// valid until the next gather.
    ///
    /// # Safety
    /// The table, and the memory that it points to, stay until the copy stream has reached this gather.
    pub unsafe fn gather(&self, table: &Table, chunk: usize) -> Result<Address> {
        let capture_memory =
            self.capture_memory.as_ref().ok_or_else(|| Error::internal("nothing is gathered on this device"))?;
        let base = capture_memory.address() + self.captured;
        let _entered = self.gpu.context.enter()?;
        let (Some(&first), Some(&end)) = (table.starts.get(chunk), table.starts.get(chunk + 1)) else {
            return Err(Error::internal("no such chunk"));
        };
        // SAFETY: the caller's contract.
        unsafe { self.copy(table, first..end, base, self.gpu.copies.handle()) }?;
        Ok(base)
    }
}

/// Buffers for digests, on the device and on the host.
pub(super) struct Results {
    both: Option<(Memory, Memory)>,
    spare: Spare,
}

type Spare = Arc<Mutex<Vec<(Memory, Memory)>>>;

impl Results {
    pub fn device(&self) -> Result<&Memory> {
        self.both.as_ref().map(|(device, _)| device).ok_or_else(|| Error::internal("no memory for digests"))
    }

    pub fn pinned(&self) -> Result<&Memory> {
        self.both.as_ref().map(|(_, pinned)| pinned).ok_or_else(|| Error::internal("no memory for digests"))
    }
}

impl Drop for Results {
    fn drop(&mut self) {
        // Reuse the buffers for the next save: freeing memory may stall the device.
        lock(&self.spare).extend(self.both.take());
    }
}
