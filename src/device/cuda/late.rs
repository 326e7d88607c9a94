//! Late copies: what has not left the GPU when a stream comes to the fence is copied aside, by kernels in that stream.
//!
//! The kernels and their structures are in `kernels/late_copy.cu`. The watermark is written by the stream of copies, behind the
//! copies that it speaks of; F is told to the host in pinned memory.
//!
//! # Safety argument
//! Tables and cells are pinned memory that belongs to one save at a time. The host writes a table before the kernels that read it
//! are queued, and a cell only while no kernel knows it. Memory goes back, and kernels are unloaded, only when the kernels of every
//! save have run: [`Save`] waits for that when it is dropped, and where that takes too long everything is leaked.
//! The addresses of tensors are those of sources, which the stager keeps until F is told or everything has left the device.
#![expect(unsafe_code, reason = "kernels over memory that outlives them; argument above")]

use super::Shared;
use super::driver::{Address, Memory, Module};
use super::gpu::{Gpu, Lent};
use super::queue::events_of;
use crate::device::{LateCopies, LateSave, Piece, Point};
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::state::DeviceStream;
use crate::sync::{Mutex, lock};
use std::ffi::CStr;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// The kernels, as text that the driver compiles for its device.
const TEXT: &str = concat!(include_str!("../../../kernels/late_copy.ptx"), "\0");
/// Saves that may be known at once.
const SAVES: usize = 32;
/// One block copies a piece.
const PIECE: u64 = 64 << 10;
const BLOCK: u32 = 256;
const GRID: u32 = 512;
/// What a cell holds until F is told.
const UNKNOWN: u64 = u64::MAX;
/// How long kernels are waited for at the end.
const PATIENCE: Duration = Duration::from_secs(10);

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

/// As in `kernel.h`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Entry {
    from: u64,
    to: u64,
    skip: u64,
    bytes: u32,
    view: u32,
    chunk: u32,
    unused: u32,
}

/// See the module. Fields are dropped in order: kernels before the memory that they use.
pub(super) struct Late {
    this: Weak<Late>,
    shared: Arc<Shared>,
    gpu: Arc<Gpu>,
    latch: usize,
    copy: usize,
    publish: usize,
    _module: Module,
    slots: Vec<Address>,
    _scratch: Memory,
    /// A `FencePlace` for each save, then the watermark.
    places: Memory,
    /// Where F is told, one for each save.
    cells: Memory,
    free: Mutex<Vec<usize>>,
    /// Tables of saves that are over.
    tables: Mutex<Vec<Memory>>,
}

impl fmt::Debug for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Late(cuda:{}, {} slots)", self.gpu.context.ordinal, self.slots.len())
    }
}

impl Late {
    /// Takes `scratch` bytes of the device in slots of `chunk` bytes, loads the kernels and runs each of them once.
    pub fn new(shared: &Arc<Shared>, chunk: usize, scratch: u64) -> Result<Arc<Self>> {
        let count = usize::try_from(scratch / chunk as u64).unwrap_or(0);
        if count == 0 {
            return Err(Error::invalid(format!("the scratch holds no chunk scratch={scratch} chunk={chunk}")));
        }
        let gpu = shared.gpu(shared.home)?;
        let text =
            CStr::from_bytes_with_nul(TEXT.as_bytes()).map_err(|_| Error::internal("a zero in a kernel's text"))?;
        let module = gpu.context.module(text)?;
        let [latch, copy, publish] = [c"fence_latch", c"late_copy", c"fence_publish"].map(|name| module.function(name));
        let memory = gpu.context.memory(count * chunk)?;
        let places = gpu.context.memory(SAVES * size_of::<FencePlace>() + size_of::<u64>())?;
        let cells = gpu.context.pinned(SAVES * size_of::<u64>())?;
        let late = Arc::new_cyclic(|this| Self {
            this: this.clone(),
            shared: shared.clone(),
            latch: *latch.as_ref().unwrap_or(&0),
            copy: *copy.as_ref().unwrap_or(&0),
            publish: *publish.as_ref().unwrap_or(&0),
            _module: module,
            slots: (0..count).map(|i| memory.address() + (i * chunk) as u64).collect(),
            _scratch: memory,
            places,
            cells,
            free: Mutex::new((0..SAVES).rev().collect()),
            tables: Mutex::new(Vec::new()),
            gpu,
        });
        latch.and(copy).and(publish)?;
        let _entered = late.gpu.context.enter()?;
        let tried = late.try_out();
        late.settle();
        tried.map(|()| late.clone())
    }

    /// A fence with nothing to copy: what a driver refuses, it refuses now.
    fn try_out(&self) -> Result<()> {
        self.gpu.copies.zero(&self.places)?;
        self.publish(0)?;
        self.cell(0).store(UNKNOWN, Ordering::Release);
        let nothing = Latch { save: u64::MAX, ..self.latch_of(0) };
        self.queue(self.gpu.copies.handle(), 0, &nothing, 0, (0, 0, 0))?;
        self.gpu.copies.zero(&self.places)?;
        self.settle();
        self.gpu.context.alive()?;
        if self.cell(0).load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        Err(Error::new(ErrorKind::Device, "the kernels of the fence did not tell what they should"))
    }

    /// Waits until nothing runs in the stream of copies.
    fn settle(&self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.gpu.context.lost() && !self.gpu.copies.is_idle().unwrap_or(false) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(50));
        }
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

    /// Publishes in the stream of copies.
    pub fn publish(&self, watermark: u64) -> Result<()> {
        // SAFETY: aligned, and lives as long as `self`, who waits for the stream before it goes.
        unsafe { self.gpu.copies.write(self.watermark(), watermark) }
    }

    /// Queues the three kernels. `table` has the addresses of pieces, starts and slots.
    fn queue(&self, stream: usize, index: usize, latch: &Latch, first: u32, table: (u64, u64, u64)) -> Result<()> {
        let (context, fence) = (&self.gpu.context, self.place(index));
        let (pieces, starts, slots) = table;
        let copy = LateCopy { fence, pieces, views: 0, starts, slots, chunks: latch.chunks, first };
        // SAFETY: the structures are those of the kernels; places, cells, scratch and the table outlive the kernels.
        unsafe {
            context.launch(self.latch, stream, 1, 1, latch)?;
            context.launch(self.copy, stream, GRID, BLOCK, &copy)?;
            context.launch(self.publish, stream, 1, 1, &Publish { fence, to: self.cell_at(index) })
        }
    }

    /// A table of at least `len` bytes.
    fn table(&self, len: usize) -> Result<Memory> {
        let mut tables = lock(&self.tables);
        if let Some(at) = tables.iter().position(|t| t.len() >= len) {
            return Ok(tables.swap_remove(at));
        }
        // One that is too small is no use any more: states keep their structure.
        let small = tables.pop();
        drop(tables);
        drop(small);
        self.gpu.context.pinned(len.next_power_of_two().max(4096))
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        let _entered = self.gpu.context.enter();
        self.settle();
    }
}

impl LateCopies for Late {
    fn ordinal(&self) -> u32 {
        self.gpu.context.ordinal
    }

    fn slots(&self) -> &[u64] {
        &self.slots
    }

    fn note(&self, number: u64, base: u64, chunks: usize, pieces: &[Piece]) -> Result<Option<Box<dyn LateSave>>> {
        let Some(late) = self.this.upgrade() else { return Ok(None) };
        let Ok(count) = u32::try_from(chunks) else { return Ok(None) };
        let entries: usize = pieces.iter().map(|p| p.bytes.div_ceil(PIECE) as usize).sum();
        let (starts, slots) = (entries * size_of::<Entry>(), chunks * size_of::<u64>());
        let table = self.table(starts + slots + (chunks + 1) * size_of::<u32>())?;
        let Some(index) = lock(&self.free).pop() else {
            lock(&self.tables).push(table);
            return Ok(None);
        };
        fill(&table, pieces, chunks, starts + slots);
        self.cell(index).store(UNKNOWN, Ordering::Release);
        let latch = Latch { base, save: number, chunks: count, ..self.latch_of(index) };
        let (launched, failed, after) = (AtomicBool::new(false), AtomicBool::new(false), Mutex::new(None));
        let (table, starts, slots) = (Some(table), starts + slots, starts);
        Ok(Some(Box::new(Save { late, index, table, slots, starts, latch, launched, failed, after })))
    }
}

/// Writes pieces and where each chunk's pieces begin into a table.
fn fill(table: &Memory, pieces: &[Piece], chunks: usize, starts: usize) {
    let entries: *mut Entry = table.pointer().cast();
    // SAFETY: within the table, aligned, and nobody else knows it.
    let starts: *mut u32 = unsafe { table.pointer().add(starts).cast() };
    let (mut count, mut chunk) = (0, 0);
    let mut begin = |upto: usize, count: usize| {
        while chunk <= upto {
            // SAFETY: one of `chunks + 1` numbers, within the table.
            unsafe { starts.add(chunk).write(count as u32) };
            chunk += 1;
        }
    };
    for piece in pieces {
        begin(piece.chunk, count);
        for done in (0..piece.bytes).step_by(PIECE as usize) {
            let bytes = PIECE.min(piece.bytes - done) as u32;
            let (from, to) = (piece.from + done, piece.to + done);
            let entry = Entry { from, to, skip: 0, bytes, view: 0, chunk: piece.chunk as u32, unused: 0 };
            // SAFETY: as many entries as were counted, within the table.
            unsafe { entries.add(count).write(entry) };
            count += 1;
        }
    }
    begin(chunks, count);
}

/// One save.
struct Save {
    late: Arc<Late>,
    index: usize,
    /// None once it has been given back.
    table: Option<Memory>,
    /// Offsets in the table.
    slots: usize,
    starts: usize,
    latch: Latch,
    /// Kernels are queued, or some of them.
    launched: AtomicBool,
    /// Not all of them.
    failed: AtomicBool,
    /// Behind the kernels.
    after: Mutex<Option<Lent>>,
}

impl Save {
    fn enqueue(&self, streams: &[DeviceStream], point: &Point, behind_copies: bool, first: u32) -> Result<()> {
        let (late, Some(table)) = (&self.late, &self.table) else { return Err(Error::internal("no table")) };
        let Some(stream) = streams.first() else { return Ok(()) };
        let gpu = &late.gpu;
        for event in events_of(point)? {
            event.make_wait(stream.handle)?;
        }
        if behind_copies {
            let event = gpu.event()?;
            event.record(gpu.copies.handle())?;
            event.make_wait(stream.handle)?;
        }
        self.launched.store(true, Ordering::Release);
        let at = table.address();
        let latch = Latch { base: if mutant::on(Mutant::Watermark) { 0 } else { self.latch.base }, ..self.latch };
        let table = (at, at + self.starts as u64, at + self.slots as u64);
        let queued = late.queue(stream.handle, self.index, &latch, first, table);
        // Also where that failed: some of the kernels may be queued.
        let event = gpu.event()?;
        let recorded = event.record(stream.handle);
        *lock(&self.after) = Some(event);
        queued.and(recorded)?;
        self.follow(&streams[1..])
    }
}

impl LateSave for Save {
    fn launch(&self, streams: &[DeviceStream], point: &Point, behind_copies: bool, slots: &[u64]) -> Result<()> {
        let first = self.latch.chunks as usize - slots.len();
        let Some(table) = &self.table else { return Err(Error::internal("no table")) };
        // SAFETY: room for a slot of every chunk, aligned; the kernels are not queued yet.
        unsafe {
            let to: *mut u64 = table.pointer().add(self.slots).cast();
            std::ptr::copy_nonoverlapping(slots.as_ptr(), to, slots.len());
        }
        let queue = || {
            self.late.shared.refuse_captures(streams)?;
            let _entered = self.late.gpu.context.enter()?;
            self.enqueue(streams, point, behind_copies, first as u32)
        };
        let queued = queue();
        self.failed.store(queued.is_err(), Ordering::Release);
        queued
    }

    fn follow(&self, streams: &[DeviceStream]) -> Result<()> {
        self.late.shared.refuse_captures(streams)?;
        let after = lock(&self.after);
        let event = after.as_ref().ok_or_else(|| Error::internal("a fence that was not launched is followed"))?;
        self.late.shared.make_wait(streams, event)
    }

    fn over(&self) -> bool {
        if self.latched().is_some() || self.late.gpu.context.lost() {
            return true;
        }
        // Asking is also how one learns that the context is lost.
        let reached = |event: &Lent| event.is_reached().unwrap_or(false);
        let ended = !self.launched.load(Ordering::Acquire) || lock(&self.after).as_ref().is_some_and(reached);
        self.late.gpu.context.lost() || (self.failed.load(Ordering::Acquire) && ended)
    }

    fn latched(&self) -> Option<usize> {
        let latched = self.late.cell(self.index).load(Ordering::Acquire);
        usize::try_from(latched).ok().filter(|_| latched != UNKNOWN)
    }
}

impl Drop for Save {
    fn drop(&mut self) {
        let context = &self.late.gpu.context;
        if self.launched.load(Ordering::Acquire) && self.latched().is_none() && context.alive().is_ok() {
            let deadline = Instant::now() + PATIENCE;
            let _entered = context.enter();
            let after = lock(&self.after);
            let over = || after.as_ref().is_some_and(|event| event.is_reached().unwrap_or(false)) || context.lost();
            while !over() {
                if Instant::now() >= deadline {
                    tracing::error!("kernels of a fence did not end; their memory is given up");
                    std::mem::forget((self.late.clone(), self.table.take()));
                    return;
                }
                std::thread::sleep(Duration::from_micros(50));
            }
        }
        lock(&self.late.tables).extend(self.table.take());
        lock(&self.late.free).push(self.index);
    }
}
