//! Late copies: kernels in a stream of the program copy the chunks that have not left the GPU when the stream
//! reaches the fence.
//!
//! The kernels and their structures are in `kernels/late_copy.cu`. The copy stream writes the watermark
//! behind the copies that it counts; the kernels report F to the host in pinned memory.
//!
//! # Safety argument
//! Lists of slots and cells are pinned memory that belongs to one save at a time. The host writes a list
//! before the kernels that read it are queued, and a cell only while no kernel uses it. Both return to their
//! pools, and the table of pieces is released, only when the kernels of the save have run: dropping
//! [`Launched`] waits for that, and after a timeout leaks everything. The addresses of tensors are those of
//! sources, which the stager keeps until F is reported or everything has left the device.
#![expect(unsafe_code, reason = "kernels over memory that outlives them; argument above")]

use super::driver::{Address, FunctionHandle, Memory, Module, StreamHandle};
use super::gpu::{Gpu, POLL_INTERVAL, SETTLE_TIMEOUT};
use super::kernels::Loaded;
use super::pooled_event::{PooledEvent, events_of};
use super::table::Table;
use crate::device::{Dependency, DeviceLateCopy, FenceKernels, Launch};
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::state::DeviceStream;
use crate::sync::{Mutex, lock};
use std::mem::forget;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Maximum number of saves tracked at once.
const SAVES: usize = 32;
const BLOCK: u32 = 256;
const GRID: u32 = 512;
/// Value of a cell until F is reported.
const UNKNOWN: u64 = u64::MAX;

/// The structures below are those of `late_copy.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct FencePlace {
    save: u64,
    latched: u64,
    from: u64,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Latch {
    fence: u64,
    watermark: u64,
    base: u64,
    save: u64,
    chunks: u32,
    unused: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct LateCopy {
    fence: u64,
    pieces: u64,
    views: u64,
    starts: u64,
    slots: u64,
    chunks: u32,
    first: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Publish {
    fence: u64,
    to: u64,
}

/// The kernels of fences on one device, and their memory.
pub(super) struct Fences {
    latch: FunctionHandle,
    copy: FunctionHandle,
    publish: FunctionHandle,
    // Declared, and so dropped, before the memory that its kernels use.
    _module: Module,
    /// One `FencePlace` per save, followed by the watermark.
    places: Memory,
    /// One cell per save, in which the kernels report F.
    cells: Memory,
    free: Mutex<Vec<usize>>,
    /// Lists of slots that ended saves returned.
    lists: Mutex<Vec<Memory>>,
}

impl Fences {
    /// Allocates memory and tests the kernels, so that a driver that refuses or gets something wrong does so
    /// at start.
    pub fn new(gpu: &Arc<Gpu>, module: Module) -> Result<Self> {
        let fences = Self {
            latch: module.function(c"fence_latch")?,
            copy: module.function(c"late_copy")?,
            publish: module.function(c"fence_publish")?,
            _module: module,
            places: gpu.context.memory(SAVES * size_of::<FencePlace>() + size_of::<u64>())?,
            cells: gpu.context.pinned(SAVES * size_of::<u64>())?,
            free: Mutex::new((0..SAVES).rev().collect()),
            lists: Mutex::default(),
        };
        let _entered = gpu.context.enter()?;
        let tried = fences.try_out(gpu);
        if !gpu.settle(&gpu.copies) {
            forget(fences);
            return tried.and(Err(Error::new(ErrorKind::Device, "the kernels of the fence did not end")));
        }
        tried.map(|()| fences)
    }

    /// Runs a fence with nothing to copy, in the copy stream, and zeroes all `places` after it.
    fn try_out(&self, gpu: &Arc<Gpu>) -> Result<()> {
        gpu.copies.zero(&self.places)?;
        // SAFETY: aligned; the memory lives as long as `self`, which its owner drops only after the stream
        // has ended.
        unsafe { gpu.copies.write(self.watermark(), 0) }?;
        self.cell(0).store(UNKNOWN, Ordering::Release);
        let nothing = Latch { save: u64::MAX, ..self.latch_of(0) };
        self.queue(gpu, gpu.copies.handle(), 0, &nothing, (0, 0, 0, 0, 0))?;
        gpu.copies.zero(&self.places)?;
        let settled = gpu.settle(&gpu.copies);
        gpu.context.alive()?;
        if settled && self.cell(0).load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Device, "the kernels of the fence reported a wrong value"))
    }

    fn place(&self, index: usize) -> Address {
        self.places.address() + (index * size_of::<FencePlace>()) as u64
    }

    fn watermark(&self) -> Address {
        self.place(SAVES)
    }

    fn cell_at(&self, index: usize) -> Address {
        self.cells.address() + (index * size_of::<u64>()) as u64
    }

    fn cell(&self, index: usize) -> &AtomicU64 {
        // SAFETY: inside the cells, which live as long as `self`, aligned, and only ever used as atomics.
        unsafe { AtomicU64::from_ptr(self.cells.pointer().add(index * size_of::<u64>()).cast()) }
    }

    fn latch_of(&self, index: usize) -> Latch {
        Latch { fence: self.place(index), watermark: self.watermark(), base: 0, save: 0, chunks: 0, unused: 0 }
    }

    /// Queues the three kernels. `list` has the addresses of pieces, views, begins and slots, and the first
    /// chunk with a slot.
    fn queue(
        &self,
        gpu: &Gpu,
        stream: StreamHandle,
        index: usize,
        latch: &Latch,
        list: (u64, u64, u64, u64, u32),
    ) -> Result<()> {
        let fence = self.place(index);
        let (pieces, views, starts, slots, first) = list;
        let copy = LateCopy { fence, pieces, views, starts, slots, chunks: latch.chunks, first };
        // SAFETY: the structures are those of the kernels; places, cells, scratch and lists outlive the
        // kernels.
        unsafe {
            gpu.context.launch(self.latch, stream, 1, 1, latch)?;
            gpu.context.launch(self.copy, stream, GRID, BLOCK, &copy)?;
            gpu.context.launch(self.publish, stream, 1, 1, &Publish { fence, to: self.cell_at(index) })
        }
    }

    /// Takes a list of at least `len` bytes from the pool, or allocates one.
    fn list(&self, gpu: &Arc<Gpu>, len: usize) -> Result<Memory> {
        let mut lists = lock(&self.lists);
        if let Some(at) = lists.iter().position(|list| list.len() >= len) {
            return Ok(lists.swap_remove(at));
        }
        drop(lists);
        gpu.context.pinned(len.next_power_of_two().max(4096))
    }
}

/// The device's part of one save.
pub(super) struct Save {
    loaded: Arc<Loaded>,
    table: Arc<Table>,
    fence: Option<Fence>,
}

/// The fence of one save before its kernels are queued.
struct Fence {
    cell: Arc<Cell>,
    latch: Latch,
}

/// The cell in which F of one save is reported, until no kernel uses it.
struct Cell {
    fences: Arc<Fences>,
    index: usize,
}

impl Cell {
    fn latched(&self) -> Option<usize> {
        let latched = self.fences.cell(self.index).load(Ordering::Acquire);
        usize::try_from(latched).ok().filter(|_| latched != UNKNOWN)
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        lock(&self.fences.free).push(self.index);
    }
}

/// A list of slots, returned to its pool when dropped.
struct List {
    fences: Arc<Fences>,
    memory: Option<Memory>,
}

impl Drop for List {
    fn drop(&mut self) {
        lock(&self.fences.lists).extend(self.memory.take());
    }
}

impl Fence {
    fn new(fences: &Arc<Fences>, number: u64, base: u64, chunks: u32) -> Option<Self> {
        let index = lock(&fences.free).pop()?;
        fences.cell(index).store(UNKNOWN, Ordering::Release);
        let latch = Latch { base, save: number, chunks, ..fences.latch_of(index) };
        Some(Self { cell: Arc::new(Cell { fences: fences.clone(), index }), latch })
    }
}

impl Save {
    /// None if too many saves are tracked already. The context must be current.
    pub fn new(loaded: &Arc<Loaded>, number: u64, base: u64, table: Arc<Table>) -> Option<Self> {
        let fence = match &loaded.late_copies {
            Ok(slots) => Some(Fence::new(&slots.fences, number, base, u32::try_from(table.chunks()).ok()?)?),
            // The save is gathered, but not copied late.
            Err(_) => None,
        };
        Some(Self { loaded: loaded.clone(), table, fence })
    }

    fn fence(&self) -> Result<&Fence> {
        if let Err(why) = &self.loaded.late_copies {
            return Err(why.clone());
        }
        self.fence.as_ref().ok_or_else(|| Error::internal("a fence on the device for a save that is not copied late"))
    }
}

impl DeviceLateCopy for Save {
    fn gather(&self, chunk: usize) -> Result<u64> {
        // SAFETY: a save is dropped, and its table with it, only when no copy of it is queued any more.
        unsafe { self.loaded.gather(&self.table, chunk) }
    }

    fn publish(&self, watermark: u64) -> Result<()> {
        let (fences, gpu) = (&self.fence()?.cell.fences, &self.loaded.gpu);
        let _entered = gpu.context.enter()?;
        // SAFETY: aligned; the watermark lives as long as the kernels, whose owner waits for the stream
        // before it drops them.
        unsafe { gpu.copies.write(fences.watermark(), watermark) }
    }

    fn launch(
        &self,
        streams: &[DeviceStream],
        dependency: &Dependency,
        behind_copies: bool,
        slots: &[u64],
    ) -> Result<Launch> {
        let (Fence { cell, latch }, gpu, table) = (self.fence()?, &self.loaded.gpu, &self.table);
        let (stream, others) = streams.split_first().ok_or_else(|| Error::internal("a fence without a stream"))?;
        self.loaded.shared.refuse_captures(streams)?;
        let _entered = gpu.context.enter()?;
        let memory = cell.fences.list(gpu, size_of_val(slots))?;
        // SAFETY: large enough for all slots, aligned, and not shared yet.
        unsafe { memory.pointer().cast::<u64>().copy_from_nonoverlapping(slots.as_ptr(), slots.len()) };
        let at = memory.address();
        let list = List { fences: cell.fences.clone(), memory: Some(memory) };
        for event in events_of(dependency)? {
            event.make_wait(stream.into())?;
        }
        table.arrive(stream.into())?;
        let after = gpu.event()?;
        if behind_copies {
            let event = gpu.event()?;
            event.record(gpu.copies.handle())?;
            event.make_wait(stream.into())?;
        }
        let latch = Latch { base: if mutant::on(Mutant::Watermark) { 0 } else { latch.base }, ..*latch };
        let arguments = (table.pieces(), table.views(), table.begins(), at, latch.chunks - slots.len() as u32);
        let (loaded, table) = (self.loaded.clone(), table.clone());
        let mut launched = Launched { whole: false, after, list: Some(list), cell: cell.clone(), table, loaded };
        // From here on something may be queued, even if a later call fails.
        let queued = cell.fences.queue(gpu, stream.into(), cell.index, &latch, arguments);
        let recorded = launched.after.insist(stream.into());
        let queued = queued.and(recorded).and_then(|()| launched.follow(others));
        launched.whole = queued.is_ok();
        let queued = queued.map_err(|error| error.with_kind(ErrorKind::Device));
        Ok(Launch { kernels: Arc::new(launched), queued })
    }

    fn check(&self) -> Result<()> {
        self.loaded.gpu.context.alive()
    }
}

/// The queued kernels of a fence, and what they use.
struct Launched {
    /// True if all of them were queued.
    whole: bool,
    /// An event behind them.
    after: PooledEvent,
    list: Option<List>,
    cell: Arc<Cell>,
    table: Arc<Table>,
    loaded: Arc<Loaded>,
}

impl FenceKernels for Launched {
    fn follow(&self, streams: &[DeviceStream]) -> Result<()> {
        self.loaded.shared.refuse_captures(streams)?;
        self.loaded.shared.make_wait(streams, &self.after)
    }

    fn over(&self) -> bool {
        if self.latched().is_some() {
            return true;
        }
        // The query also detects a lost context; the thread that asks need not have used it before.
        let ended = self.after.is_over();
        self.loaded.gpu.context.lost() || (!self.whole && ended)
    }

    fn latched(&self) -> Option<usize> {
        self.cell.latched()
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        let context = &self.loaded.gpu.context;
        if self.latched().is_some() || context.alive().is_err() {
            return;
        }
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        while !self.after.is_over() && !context.lost() {
            if Instant::now() >= deadline {
                tracing::error!("kernels of a fence did not end; their memory is leaked");
                forget((self.loaded.clone(), self.table.clone(), self.cell.clone(), self.list.take()));
                return;
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }
}
