//! Lists of pieces in device memory, in the layout that kernels read. A new list is uploaded once.
//!
//! Programs save the same tensors again and again. So the last few lists are kept, and a new list is first
//! compared with them.
//!
//! # Safety argument
//! The host writes a table in pinned memory, not shared yet, before it queues the copy to the device. That
//! copy ends before any kernel reads the table, because the launching code makes the stream wait for the
//! copy. Both memories stay as long as the table, and the launching code keeps the table until the kernel has
//! run. Memory is reused for another list only when the copy to it has ended.
#![expect(unsafe_code, reason = "writes tables in pinned memory; argument above")]

use super::driver::{Address, Memory, Stream, StreamHandle};
use super::gpu::Gpu;
use super::pooled_event::PooledEvent;
use crate::device::{Piece, Pieces, View};
use crate::error::{Error, Result};
use crate::sync::{Mutex, lock};
use std::mem::forget;
use std::sync::Arc;

/// Maximum bytes of an entry. One block of a kernel works on an entry, so longer pieces are cut.
const PIECE: u64 = 64 << 10;
/// Number of lists kept.
const KEPT: usize = 6;
const DIMS: usize = View::DIMS;

/// `struct Piece` in `kernel.h`.
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

/// `struct View` in `kernel.h`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Strides {
    shape: [u64; DIMS],
    stride: [i64; DIMS],
    dims: u32,
    item: u32,
}

/// One list on the device.
pub(super) struct Table {
    pieces: Pieces,
    /// Index of the first entry of each chunk, and the end of the last chunk.
    pub starts: Vec<u32>,
    /// Length of each entry in bytes.
    pub lengths: Vec<u32>,
    both: Option<BufferPair>,
    pool: Arc<Pool>,
    views: u64,
    begins: u64,
    /// An event behind the copy to the device. Present as long as `both` is present.
    ready: Option<PooledEvent>,
}

/// Two buffers of the same bytes: one pinned on the host, one on the device.
struct BufferPair {
    pinned: Memory,
    device: Memory,
}

/// Buffers of dropped tables, each with the event after which it is free.
#[derive(Default)]
struct Pool(Mutex<Vec<(BufferPair, PooledEvent)>>);

/// The lists of one device.
pub(super) struct Tables {
    gpu: Arc<Gpu>,
    /// A stream of its own, so that a list does not wait behind copies of tensors, and kernels do not wait
    /// for such copies.
    stream: Stream,
    kept: Mutex<Vec<Arc<Table>>>,
    pool: Arc<Pool>,
}

impl Tables {
    pub fn new(gpu: Arc<Gpu>) -> Result<Self> {
        let stream = gpu.context.stream()?;
        Ok(Self { gpu, stream, kept: Mutex::default(), pool: Arc::default() })
    }

    /// Returns the table of this list: a kept one, or a new one. The context must be current.
    pub fn of(&self, pieces: &Pieces) -> Result<Arc<Table>> {
        let mut kept = lock(&self.kept);
        if let Some(at) = kept.iter().rposition(|table| table.pieces == *pieces) {
            let table = kept.remove(at);
            kept.push(table.clone());
            return Ok(table);
        }
        let table = Arc::new(self.make(pieces)?);
        if kept.len() == KEPT {
            kept.remove(0);
        }
        kept.push(table.clone());
        Ok(table)
    }

    fn make(&self, pieces: &Pieces) -> Result<Table> {
        let mut part = PIECE;
        let count = |part: u64| pieces.list.iter().map(|piece| piece.bytes.div_ceil(part)).sum::<u64>();
        // Larger entries for very large states, so that the list stays small.
        while count(part) > 1 << 20 && part < 1 << 30 {
            part *= 2;
        }
        let too_long = || Error::invalid("a save has too many pieces for the device's kernels");
        let count = usize::try_from(count(part)).ok().filter(|&n| u32::try_from(n).is_ok()).ok_or_else(too_long)?;
        let views = count * size_of::<Entry>();
        let begins = views + pieces.views.len() * size_of::<Strides>();
        let ready = self.gpu.event()?;
        let both = self.capture_memory(begins + (pieces.chunks + 1) * size_of::<u32>())?;
        let (starts, lengths) = fill(&both.pinned, pieces, part, views, begins)?;
        let bytes = begins + starts.len() * size_of::<u32>();
        // SAFETY: neither memory is reused or freed before the copy has ended.
        let queued = unsafe { self.stream.copy_to_device(both.pinned.pointer(), both.device.address(), bytes) };
        if let Err(error) = queued.and_then(|()| ready.record(self.stream.handle())) {
            // The copy may still be queued; only the stream tells when it has ended.
            if !self.gpu.settle(&self.stream) {
                forget(both);
            }
            return Err(error);
        }
        let (pool, pieces, (views, begins)) = (self.pool.clone(), pieces.clone(), (views as u64, begins as u64));
        Ok(Table { pieces, starts, lengths, both: Some(both), pool, views, begins, ready: Some(ready) })
    }

    /// Takes buffers of at least `len` bytes from the pool, or allocates them.
    fn capture_memory(&self, len: usize) -> Result<BufferPair> {
        let mut pool = lock(&self.pool.0);
        let free = |ready: &PooledEvent| ready.is_reached().unwrap_or(false);
        if let Some(at) = pool.iter().position(|(both, ready)| both.device.len() >= len && free(ready)) {
            return Ok(pool.swap_remove(at).0);
        }
        drop(pool);
        // Buffers that are too small stay in the pool for smaller lists: freeing memory may wait for the
        // whole device. There are few sizes, because all are powers of two.
        let len = len.next_power_of_two().max(4096);
        Ok(BufferPair { pinned: self.gpu.context.pinned(len)?, device: self.gpu.context.memory(len)? })
    }
}

/// Writes a list in the layout that kernels read. Returns the first entry of each chunk, and the length of
/// every entry.
fn fill(to: &Memory, pieces: &Pieces, part: u64, views: usize, begins: usize) -> Result<(Vec<u32>, Vec<u32>)> {
    let entries: *mut Entry = to.pointer().cast();
    let (mut starts, mut lengths) = (Vec::with_capacity(pieces.chunks + 1), Vec::new());
    for piece in &pieces.list {
        starts.resize(starts.len().max(piece.chunk + 1), lengths.len() as u32);
        let Piece { from, skip, to, view, chunk, .. } = *piece;
        for done in (0..piece.bytes).step_by(part as usize) {
            let bytes = part.min(piece.bytes - done) as u32;
            let flat = if view.is_none() { done } else { 0 };
            let entry = Entry {
                from: from + flat,
                to: to + done,
                skip: skip + done - flat,
                bytes,
                view: view.map_or(0, |view| view + 1),
                chunk: chunk as u32,
                unused: 0,
            };
            // SAFETY: the memory begins with space for as many entries as were counted.
            unsafe { entries.add(lengths.len()).write(entry) };
            lengths.push(bytes);
        }
    }
    starts.resize(pieces.chunks + 1, lengths.len() as u32);
    for (i, View { item, dims }) in pieces.views.iter().enumerate() {
        let mut strides = Strides { shape: [1; DIMS], stride: [0; DIMS], dims: dims.len() as u32, item: *item };
        if dims.len() > DIMS || *item == 0 || !part.is_multiple_of(u64::from(*item)) {
            return Err(Error::invalid(format!(
                "the kernels do not support such a tensor dims={} item={item}",
                dims.len()
            )));
        }
        for (d, &(size, stride)) in dims.iter().enumerate() {
            (strides.shape[d], strides.stride[d]) = (size, stride);
        }
        // SAFETY: behind the entries, aligned, with space for all views.
        unsafe { to.pointer().add(views).cast::<Strides>().add(i).write(strides) };
    }
    // SAFETY: behind the views, aligned to four bytes, with space for one more than there are chunks.
    unsafe { to.pointer().add(begins).cast::<u32>().copy_from_nonoverlapping(starts.as_ptr(), starts.len()) };
    Ok((starts, lengths))
}

impl Table {
    /// Makes `stream` wait until the list is on the device.
    pub fn arrive(&self, stream: StreamHandle) -> Result<()> {
        match &self.ready {
            Some(ready) if !ready.is_reached()? => ready.make_wait(stream),
            _ => Ok(()),
        }
    }

    fn at(&self, offset: u64) -> Address {
        self.both.as_ref().map_or(0, |both| both.device.address() + offset)
    }

    pub fn pieces(&self) -> Address {
        self.at(0)
    }

    pub fn views(&self) -> Address {
        self.at(self.views)
    }

    pub fn begins(&self) -> Address {
        self.at(self.begins)
    }

    pub fn chunks(&self) -> usize {
        self.pieces.chunks
    }
}

impl Drop for Tables {
    fn drop(&mut self) {
        let _entered = self.gpu.context.enter();
        if !self.gpu.settle(&self.stream) {
            tracing::error!("a copy to the device did not end; its memory is leaked");
            forget((std::mem::take(&mut *lock(&self.kept)), std::mem::take(&mut *lock(&self.pool.0))));
        }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        lock(&self.pool.0).extend(self.both.take().zip(self.ready.take()));
    }
}
