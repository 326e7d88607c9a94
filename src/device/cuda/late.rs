//! Late copies: what has not left the GPU when a stream comes to the fence is copied aside, by kernels in that stream.
//!
//! The kernels and their structures are in `kernels/late_copy.cu`. The watermark is written by the stream of copies, behind the
//! copies that it speaks of; F is told to the host in pinned memory.
//!
//! # Safety argument
//! Lists of slots and cells are pinned memory that belongs to one save at a time. The host writes a list before the kernels that
//! read it are queued, and a cell only while no kernel knows it. Both go back, and the table of pieces is let go, only when the
//! kernels of the save have run: [`Save`] waits for that when it is dropped, and where that takes too long everything is leaked.
//! The addresses of tensors are those of sources, which the stager keeps until F is told or everything has left the device.
#![expect(unsafe_code, reason = "kernels over memory that outlives them; argument above")]

use super::driver::{Address, Memory, Module};
use super::gpu::{Gpu, Lent, PATIENCE, POLL, events_of};
use super::kernels::Loaded;
use super::table::Table;
use crate::device::{Noted, Point};
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::state::DeviceStream;
use crate::sync::{Mutex, lock};
use std::mem::forget;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

/// Saves that may be known at once.
const SAVES: usize = 32;
const BLOCK: u32 = 256;
const GRID: u32 = 512;
/// What a cell holds until F is told.
const UNKNOWN: u64 = u64::MAX;

/// As in `late_copy.cu`.
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

/// The fences of one device.
pub(super) struct Fences {
    latch: usize,
    copy: usize,
    publish: usize,
    /// A `FencePlace` for each save, then the watermark.
    places: Memory,
    /// Where F is told, one for each save.
    cells: Memory,
    free: Mutex<Vec<usize>>,
    /// Lists of slots of saves that are over.
    lists: Mutex<Vec<Memory>>,
}

impl Fences {
    pub fn new(gpu: &Arc<Gpu>, module: &Module) -> Result<Self> {
        Ok(Self {
            latch: module.function(c"fence_latch")?,
            copy: module.function(c"late_copy")?,
            publish: module.function(c"fence_publish")?,
            places: gpu.context.memory(SAVES * size_of::<FencePlace>() + size_of::<u64>())?,
            cells: gpu.context.pinned(SAVES * size_of::<u64>())?,
            free: Mutex::new((0..SAVES).rev().collect()),
            lists: Mutex::default(),
        })
    }

    /// A fence with nothing to copy, in the stream of copies: what a driver refuses, it refuses now. All places are zero after it.
    pub fn try_out(&self, gpu: &Arc<Gpu>) -> Result<()> {
        gpu.copies.zero(&self.places)?;
        // SAFETY: aligned; the memory lives as long as `self`, whose owner waits for the stream before it lets go.
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
        Err(Error::new(ErrorKind::Device, "the kernels of the fence did not tell what they should"))
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

    /// Queues the three kernels. `list` has the addresses of pieces, views, begins and slots, and the first chunk with a slot.
    fn queue(
        &self,
        gpu: &Gpu,
        stream: usize,
        index: usize,
        latch: &Latch,
        list: (u64, u64, u64, u64, u32),
    ) -> Result<()> {
        let fence = self.place(index);
        let (pieces, views, starts, slots, first) = list;
        let copy = LateCopy { fence, pieces, views, starts, slots, chunks: latch.chunks, first };
        // SAFETY: the structures are those of the kernels; places, cells, scratch and lists outlive the kernels.
        unsafe {
            gpu.context.launch(self.latch, stream, 1, 1, latch)?;
            gpu.context.launch(self.copy, stream, GRID, BLOCK, &copy)?;
            gpu.context.launch(self.publish, stream, 1, 1, &Publish { fence, to: self.cell_at(index) })
        }
    }

    /// A list of at least `len` bytes.
    fn list(&self, gpu: &Arc<Gpu>, len: usize) -> Result<Memory> {
        let mut lists = lock(&self.lists);
        if let Some(at) = lists.iter().position(|list| list.len() >= len) {
            return Ok(lists.swap_remove(at));
        }
        drop(lists);
        gpu.context.pinned(len.next_power_of_two().max(4096))
    }
}

/// Takes note of a save, unless too many are noted already. The context is current.
pub(super) fn note(loaded: &Arc<Loaded>, number: u64, base: u64, table: Arc<Table>) -> Option<Save> {
    let fences = &loaded.fences;
    let chunks = u32::try_from(table.chunks()).ok()?;
    let index = lock(&fences.free).pop()?;
    fences.cell(index).store(UNKNOWN, Ordering::Release);
    let latch = Latch { base, save: number, chunks, ..fences.latch_of(index) };
    let (launched, failed) = (AtomicBool::new(false), AtomicBool::new(false));
    let (list, after) = (Mutex::new(None), Mutex::new(None));
    Some(Save { loaded: loaded.clone(), index, table, list, latch, launched, failed, after })
}

/// One save.
pub(super) struct Save {
    loaded: Arc<Loaded>,
    index: usize,
    table: Arc<Table>,
    /// The slots, once there are some.
    list: Mutex<Option<Memory>>,
    latch: Latch,
    /// Kernels are queued, or some of them.
    launched: AtomicBool,
    /// Not all of them.
    failed: AtomicBool,
    /// Behind the kernels.
    after: Mutex<Option<Lent>>,
}

impl Save {
    fn enqueue(&self, streams: &[DeviceStream], point: &Point, behind_copies: bool, slots: &[u64]) -> Result<()> {
        let Some(stream) = streams.first() else { return Ok(()) };
        let (gpu, fences, table) = (&self.loaded.gpu, &self.loaded.fences, &self.table);
        let list = fences.list(gpu, size_of_val(slots))?;
        // SAFETY: room for all slots, aligned, and known to nobody.
        unsafe { list.pointer().cast::<u64>().copy_from_nonoverlapping(slots.as_ptr(), slots.len()) };
        let at = list.address();
        *lock(&self.list) = Some(list);
        for event in events_of(point)? {
            event.make_wait(stream.handle)?;
        }
        table.arrive(stream.handle)?;
        let after = gpu.event()?;
        if behind_copies {
            let event = gpu.event()?;
            event.record(gpu.copies.handle())?;
            event.make_wait(stream.handle)?;
        }
        self.launched.store(true, Ordering::Release);
        let latch = Latch { base: if mutant::on(Mutant::Watermark) { 0 } else { self.latch.base }, ..self.latch };
        let first = self.latch.chunks - slots.len() as u32;
        let list = (table.pieces(), table.views(), table.begins(), at, first);
        let queued = fences.queue(gpu, stream.handle, self.index, &latch, list);
        // Also where that failed: some of the kernels may be queued. A second try, because nobody else can say when they end.
        let recorded = after.record(stream.handle).or_else(|_| after.record(stream.handle));
        *lock(&self.after) = Some(after);
        queued.and(recorded)?;
        self.follow(&streams[1..])
    }
}

impl Noted for Save {
    fn gather(&self, chunk: usize) -> Result<u64> {
        // SAFETY: a save is dropped, and its table with it, only when no copy of it is queued any more.
        unsafe { self.loaded.gather(&self.table, chunk) }
    }

    fn publish(&self, watermark: u64) -> Result<()> {
        let gpu = &self.loaded.gpu;
        let _entered = gpu.context.enter()?;
        // SAFETY: aligned; the watermark lives as long as the kernels, whose owner waits for the stream before it lets go.
        unsafe { gpu.copies.write(self.loaded.fences.watermark(), watermark) }
    }

    fn launch(&self, streams: &[DeviceStream], point: &Point, behind_copies: bool, slots: &[u64]) -> Result<()> {
        let queue = || {
            self.loaded.shared.refuse_captures(streams)?;
            let _entered = self.loaded.gpu.context.enter()?;
            self.enqueue(streams, point, behind_copies, slots)
        };
        // What was queued cannot be taken back, whatever the driver thinks of a later call.
        let begun = || self.launched.load(Ordering::Acquire);
        let queued = queue().map_err(|error| if begun() { error.with_kind(ErrorKind::Device) } else { error });
        // After `Invalid` nothing was queued, and it may be tried again.
        let failed = queued.as_ref().is_err_and(|error| error.kind() != ErrorKind::Invalid);
        self.failed.store(failed, Ordering::Release);
        queued
    }

    fn follow(&self, streams: &[DeviceStream]) -> Result<()> {
        self.loaded.shared.refuse_captures(streams)?;
        let after = lock(&self.after);
        let event = after.as_ref().ok_or_else(|| Error::internal("a fence that was not launched is followed"))?;
        self.loaded.shared.make_wait(streams, event)
    }

    fn over(&self) -> bool {
        let context = &self.loaded.gpu.context;
        if self.latched().is_some() || context.lost() {
            return true;
        }
        // Asking is also how one learns that the context is lost; threads that ask need not have used it before.
        let reached = |event: &Lent| context.enter().is_ok_and(|_entered| event.is_reached().unwrap_or(false));
        let ended = !self.launched.load(Ordering::Acquire) || lock(&self.after).as_ref().is_some_and(reached);
        context.lost() || (self.failed.load(Ordering::Acquire) && ended)
    }

    fn check(&self) -> Result<()> {
        // Asking is how one learns that the context is lost.
        _ = self.over();
        self.loaded.gpu.context.alive()
    }

    fn latched(&self) -> Option<usize> {
        let latched = self.loaded.fences.cell(self.index).load(Ordering::Acquire);
        usize::try_from(latched).ok().filter(|_| latched != UNKNOWN)
    }
}

impl Drop for Save {
    fn drop(&mut self) {
        let (context, fences) = (&self.loaded.gpu.context, &self.loaded.fences);
        if self.launched.load(Ordering::Acquire) && self.latched().is_none() && context.alive().is_ok() {
            let deadline = Instant::now() + PATIENCE;
            let _entered = context.enter();
            let after = lock(&self.after);
            let over = || after.as_ref().is_some_and(|event| event.is_reached().unwrap_or(false)) || context.lost();
            while !over() {
                if Instant::now() >= deadline {
                    tracing::error!("kernels of a fence did not end; their memory is given up");
                    forget((self.loaded.clone(), self.table.clone(), lock(&self.list).take()));
                    return;
                }
                std::thread::sleep(POLL);
            }
        }
        lock(&fences.lists).extend(lock(&self.list).take());
        lock(&fences.free).push(self.index);
    }
}
