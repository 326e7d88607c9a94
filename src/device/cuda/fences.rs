//! The kernels of fences, and their memory: cells, lists of slots and the watermark.
//!
//! The kernels and their structures are in `kernels/late_copy.cu`. The copy stream writes the watermark
//! behind the copies that it counts. The kernels report F to the host in pinned memory.
//!
//! # Safety argument
//! Lists of slots and cells are pinned memory that belongs to one save at a time. The host resets a cell only
//! while no kernel uses it. Lists and cells return to their pools only when the kernels of the save have run
//! (`late_copy`). The owner of [`Fences`] drops it only when its kernels have run (`loaded`).
#![expect(unsafe_code, reason = "kernels over memory that outlives them; argument above")]

use super::driver::{Address, FunctionHandle, Memory, Module, Stream, StreamHandle};
use super::gpu::Gpu;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Mutex, lock};
use std::mem::forget;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Maximum number of saves tracked at once.
const SAVES: usize = 32;
const BLOCK: u32 = 256;
const GRID: u32 = 512;
/// Value of a cell until the kernels report F.
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
pub(super) struct Latch {
    pub fence: u64,
    pub watermark: u64,
    pub base: u64,
    pub save: u64,
    pub chunks: u32,
    pub unused: u32,
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
    /// A stream for fences that name no stream of this device.
    own: Stream,
    // Declared before the memory that its kernels use, and so dropped first.
    _module: Module,
    /// One `FencePlace` per save, followed by the watermark.
    places: Memory,
    /// One cell per save. The kernels report F in it.
    cells: Memory,
    free: Mutex<Vec<usize>>,
    /// Lists of slots that ended saves returned.
    lists: Mutex<Vec<Memory>>,
}

impl Fences {
    /// Allocates memory and tests the kernels, so that a driver that refuses them or runs them wrongly fails
    /// at start.
    pub fn new(gpu: &Arc<Gpu>, module: Module) -> Result<Self> {
        let fences = Self {
            latch: module.function(c"fence_latch")?,
            copy: module.function(c"late_copy")?,
            publish: module.function(c"fence_publish")?,
            own: gpu.context.stream()?,
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

    /// Runs a fence with nothing to copy, in the copy stream, and then fills all `places` with zeros.
    fn try_out(&self, gpu: &Arc<Gpu>) -> Result<()> {
        gpu.copies.zero(&self.places)?;
        // SAFETY: the address is aligned. The memory lives as long as `self`, which its owner drops only
        // after the stream has ended.
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

    /// The stream of the kernels of a fence that names no stream of this device.
    pub fn own(&self) -> StreamHandle {
        self.own.handle()
    }

    fn place(&self, index: usize) -> Address {
        self.places.address() + (index * size_of::<FencePlace>()) as u64
    }

    pub fn watermark(&self) -> Address {
        self.place(SAVES)
    }

    fn cell_at(&self, index: usize) -> Address {
        self.cells.address() + (index * size_of::<u64>()) as u64
    }

    fn cell(&self, index: usize) -> &AtomicU64 {
        // SAFETY: the address is aligned, inside the cells, which live as long as `self`, and used only as an
        // atomic.
        unsafe { AtomicU64::from_ptr(self.cells.pointer().add(index * size_of::<u64>()).cast()) }
    }

    fn latch_of(&self, index: usize) -> Latch {
        Latch { fence: self.place(index), watermark: self.watermark(), base: 0, save: 0, chunks: 0, unused: 0 }
    }

    /// Queues the three kernels. `list` has the addresses of pieces, views, begins and slots, and the first
    /// chunk with a slot.
    pub fn queue(
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
        // SAFETY: the structures are those of the kernels. Places, cells, scratch and lists outlive the
        // kernels.
        unsafe {
            gpu.context.launch(self.latch, stream, 1, 1, latch)?;
            gpu.context.launch(self.copy, stream, GRID, BLOCK, &copy)?;
            gpu.context.launch(self.publish, stream, 1, 1, &Publish { fence, to: self.cell_at(index) })
        }
    }

    /// Takes a list of at least `len` bytes from the pool, or allocates one.
    pub fn list(&self, gpu: &Arc<Gpu>, len: usize) -> Result<Memory> {
        let mut lists = lock(&self.lists);
        if let Some(at) = lists.iter().position(|list| list.len() >= len) {
            return Ok(lists.swap_remove(at));
        }
        drop(lists);
        gpu.context.pinned(len.next_power_of_two().max(4096))
    }
}

/// The fence of one save, before its kernels are queued.
pub(super) struct Fence {
    pub cell: Arc<Cell>,
    pub latch: Latch,
}

/// The cell in which the kernels report F of one save, held until no kernel uses it.
pub(super) struct Cell {
    pub fences: Arc<Fences>,
    pub index: usize,
}

impl Cell {
    pub fn latched(&self) -> Option<usize> {
        let latched = self.fences.cell(self.index).load(Ordering::Acquire);
        usize::try_from(latched).ok().filter(|_| latched != UNKNOWN)
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        lock(&self.fences.free).push(self.index);
    }
}

/// A list of slots, which returns to its pool when dropped.
pub(super) struct List {
    pub fences: Arc<Fences>,
    pub memory: Option<Memory>,
}

impl Drop for List {
    fn drop(&mut self) {
        lock(&self.fences.lists).extend(self.memory.take());
    }
}

impl Fence {
    pub fn new(fences: &Arc<Fences>, number: u64, base: u64, chunks: u32) -> Option<Self> {
        let index = lock(&fences.free).pop()?;
        fences.cell(index).store(UNKNOWN, Ordering::Release);
        let latch = Latch { base, save: number, chunks, ..fences.latch_of(index) };
        Some(Self { cell: Arc::new(Cell { fences: fences.clone(), index }), latch })
    }
}
