//! Copies a file from a checkpoint through two slabs: one is filled while the other is written.

use super::layout::{File, Layout, Part};
use super::sums::Sums;
use ashore::internal::format::shard::Stamp;
use ashore::memory::AlignedBuffer;
use ashore::storage::{FileReading, FileWriting};
use ashore::{ALIGNMENT, Checkpoint, Error, ErrorKind, Result, Targets};
use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// The length of the buffer of each thread that reads.
const WINDOW: u64 = 2 << 20;

/// The memory of a conversion, and the number of threads that read with it.
#[derive(Debug)]
pub struct Arena {
    slabs: [AlignedBuffer; 2],
    pub threads: usize,
}

impl Arena {
    /// Allocates at most a quarter of `bytes` for the threads that read, and the rest as two slabs.
    ///
    /// # Errors
    /// `Busy` when there is not enough memory.
    pub fn new(bytes: u64) -> Result<Self> {
        let threads = (bytes / 4 / WINDOW).clamp(1, 32);
        let slab = bytes.saturating_sub(threads * WINDOW) / 2 / ALIGNMENT as u64 * ALIGNMENT as u64;
        let none = || Error::new(ErrorKind::Busy, format!("no memory for the arena bytes={bytes}"));
        let make = || AlignedBuffer::try_new(usize::try_from(slab).ok()?);
        let slabs = [make().ok_or_else(none)?, make().ok_or_else(none)?];
        Ok(Self { slabs, threads: threads as usize })
    }
}

/// Part of a box, to read into a range of the slab.
struct Piece {
    part: usize,
    /// The indices in the tensor; None for a box that is the whole tensor and lies in the slab whole.
    slice: Option<Vec<Range<usize>>>,
    to: Range<usize>,
}

/// A slab on its way to the thread that writes.
struct Full {
    slab: AlignedBuffer,
    offset: u64,
    /// The bytes to digest. The bytes before them were carried over from the previous slab.
    fresh: Range<usize>,
    /// The number of bytes to write.
    write: usize,
}

/// Copies all of `file` to `to`, which the caller seals. `written` is called with the number of bytes that
/// were written.
///
/// # Errors
/// Those of the checkpoint and of the file.
pub fn copy<'f>(
    checkpoint: &Checkpoint,
    layout: &Layout,
    (file, stamp): (&'f File, &Stamp),
    to: &dyn FileWriting,
    arena: &mut Arena,
    written: &(dyn Fn(u64) + Sync),
) -> Result<Sums<'f>> {
    let (send, full) = sync_channel::<Full>(1);
    let (back, free) = sync_channel::<AlignedBuffer>(2);
    let slab_size = arena.slabs[0].len();
    for slab in &mut arena.slabs {
        let _ = back.send(std::mem::replace(slab, AlignedBuffer::new(0)));
    }
    let (sums, read, slabs) = std::thread::scope(|scope| {
        let writer = scope.spawn(move || write(file, to, &full, &back, written));
        let mut filling = Filling { checkpoint, layout, file, stamp, send, free: &free, slab_size };
        let read = filling.run();
        drop(filling);
        let sums = writer.join().unwrap_or_else(|_| Err(Error::new(ErrorKind::Internal, "a writer panicked")));
        (sums, read, free.try_iter().collect::<Vec<_>>())
    });
    for (place, slab) in arena.slabs.iter_mut().zip(slabs) {
        *place = slab;
    }
    // Return the writer's error first: if the writer failed, the reader only reports that the writer is gone.
    let sums = sums?;
    read?;
    Ok(sums)
}

fn write<'f>(
    file: &'f File,
    to: &dyn FileWriting,
    full: &Receiver<Full>,
    back: &SyncSender<AlignedBuffer>,
    written: &(dyn Fn(u64) + Sync),
) -> Result<Sums<'f>> {
    let mut sums = Sums::new(file);
    for Full { slab, offset, fresh, write } in full {
        sums.feed(&slab[fresh]);
        to.write_at(offset, &slab[..write])?;
        written(write as u64);
        let _ = back.send(slab);
    }
    Ok(sums)
}

/// The reading half of a copy.
struct Filling<'c> {
    checkpoint: &'c Checkpoint,
    layout: &'c Layout,
    file: &'c File,
    stamp: &'c Stamp,
    send: SyncSender<Full>,
    free: &'c Receiver<AlignedBuffer>,
    slab_size: usize,
}

/// The slab that is being filled.
struct Slab {
    memory: AlignedBuffer,
    /// The slab's offset in the file.
    offset: u64,
    carried: usize,
    length: usize,
    pieces: Vec<Piece>,
}

fn writer_gone() -> Error {
    Error::new(ErrorKind::Cancelled, "the writer has stopped")
}

impl Filling<'_> {
    fn run(&mut self) -> Result<()> {
        let memory = self.free.recv().map_err(|_| writer_gone())?;
        let mut slab = Slab { memory, offset: 0, carried: 0, length: 0, pieces: Vec::new() };
        let (header, mut done) = (usize::try_from(self.file.header.len()).unwrap_or(usize::MAX), 0);
        while done < header {
            let length = (self.slab_size - slab.length).min(header - done);
            let to = &mut slab.memory[slab.length..][..length];
            if !self.file.header.copy(self.stamp, done, to) {
                return Err(Error::new(ErrorKind::Internal, "a header is shorter than it was"));
            }
            (slab.length, done) = (slab.length + length, done + length);
            if slab.length == self.slab_size {
                slab = self.flush(slab, false)?;
            }
        }
        for (number, part) in self.file.parts.iter().enumerate() {
            slab = self.part(slab, number, part)?;
        }
        self.flush(slab, true).map(drop)
    }

    /// Adds a whole box.
    fn part(&mut self, mut slab: Slab, number: usize, part: &Part) -> Result<Slab> {
        let tensor = &self.layout.tensors[part.tensor];
        let (bits, total) = (tensor.dtype.bitsize() as u64, part.shape.iter().map(|dim| *dim as u64).product::<u64>());
        let mut done = 0;
        while done < total {
            let room = self.slab_size - slab.length;
            let rest = part.bytes - done * bits / 8;
            // A small piece of a long box costs as much as one of its blocks, which are checked whole.
            let found = if rest <= room as u64 || room >= self.slab_size / 4 {
                piece(bits, &part.shape, done, room as u64)
            } else {
                None
            };
            let Some((indices, elements)) = found else {
                if slab.length < ALIGNMENT {
                    let why = format!("elements of a tensor cannot be cut to the arena tensor={:?}", tensor.source);
                    return Err(Error::new(ErrorKind::Invalid, format!("{why}; give a larger --arena")));
                }
                slab = self.flush(slab, false)?;
                continue;
            };
            let length = (elements * bits / 8) as usize;
            let whole = elements == total && part.shape == tensor.shape;
            let slice = (!whole)
                .then(|| indices.iter().zip(&part.at).map(|(range, at)| range.start + at..range.end + at).collect());
            slab.pieces.push(Piece { part: number, slice, to: slab.length..slab.length + length });
            (slab.length, done) = (slab.length + length, done + elements);
        }
        Ok(slab)
    }

    /// Reads the pieces of a slab and passes the slab to the writer; returns the next slab.
    fn flush(&mut self, mut slab: Slab, last: bool) -> Result<Slab> {
        let mut targets = Targets::new();
        let mut rest = &mut slab.memory[..];
        let mut at = 0;
        for Piece { part, slice, to } in slab.pieces.drain(..) {
            let (_, after) = rest.split_at_mut(to.start - at);
            let (memory, after) = after.split_at_mut(to.len());
            (rest, at) = (after, to.end);
            let name = &self.layout.tensors[self.file.parts[part].tensor].source;
            targets = match slice {
                None => targets.bytes(name, memory),
                Some(slice) => targets.slice(name, &slice, memory),
            };
        }
        self.checkpoint.read_into(targets)?;
        let write = if last { slab.length } else { slab.length / ALIGNMENT * ALIGNMENT };
        let Slab { memory, offset, carried, length, pieces } = slab;
        let mut next = if last { None } else { Some(self.free.recv().map_err(|_| writer_gone())?) };
        if let Some(next) = &mut next {
            next[..length - write].copy_from_slice(&memory[write..length]);
        }
        let full = Full { slab: memory, offset, fresh: carried..length, write };
        self.send.send(full).map_err(|_| writer_gone())?;
        let memory = next.unwrap_or_else(|| AlignedBuffer::new(0));
        Ok(Slab { memory, offset: offset + write as u64, carried: length - write, length: length - write, pieces })
    }
}

/// Returns the longest part of a box of `shape` that begins at element `done`, has at most `most` bytes, and
/// whose elements lie side by side: its indices in the box, and the number of its elements. None if no
/// element fits.
fn piece(bits: u64, shape: &[usize], done: u64, most: u64) -> Option<(Vec<Range<usize>>, u64)> {
    if shape.is_empty() {
        return (bits.div_ceil(8) <= most).then(|| (Vec::new(), 1));
    }
    let mut stride: u64 = shape.iter().map(|dim| *dim as u64).product();
    let mut indices: Vec<Range<usize>> = Vec::with_capacity(shape.len());
    for (dim, &extent) in shape.iter().enumerate() {
        stride /= extent as u64;
        let index = (done / stride % extent as u64) as usize;
        let left = extent - index;
        // Elements smaller than a byte are cut where bytes end.
        let unit = 8 / (1 << (stride * bits).trailing_zeros().min(3));
        let fit = (most.saturating_mul(8) / (stride * bits)).min(left as u64);
        let fit = fit - fit % unit;
        if done.is_multiple_of(stride) && fit > 0 {
            indices.push(index..index + fit as usize);
            indices.extend(shape[dim + 1..].iter().map(|&extent| 0..extent));
            return Some((indices, fit * stride));
        }
        indices.push(index..index + 1);
    }
    None
}

/// Reads a file that an earlier run wrote, and returns its digests; None if its length or its header is not
/// as expected.
///
/// # Errors
/// When it cannot be read.
pub fn check<'f>(
    reading: &dyn FileReading,
    (file, stamp): (&'f File, &Stamp),
    arena: &mut Arena,
    read: &dyn Fn(u64),
) -> Result<Option<Sums<'f>>> {
    if reading.len() != file.length {
        return Ok(None);
    }
    let [slab, other] = &mut arena.slabs;
    let (mut sums, mut at) = (Sums::new(file), 0);
    while at < file.length {
        let length = (file.length - at).min(slab.len() as u64) as usize;
        let bytes = &mut slab[..length];
        reading.read_at(at, bytes)?;
        let header = file.header.len().saturating_sub(at).min(length as u64) as usize;
        let expected = &mut other[..header];
        if !file.header.copy(stamp, at.min(file.header.len()) as usize, expected) || *expected != bytes[..header] {
            return Ok(None);
        }
        sums.feed(bytes);
        read(length as u64);
        at += length as u64;
    }
    Ok(Some(sums))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pieces of every size follow each other without a gap, and each is one run of elements.
    #[test]
    fn pieces_cover_a_box_in_order() {
        let shapes: [&[usize]; 6] = [&[], &[7], &[3, 4], &[2, 3, 4], &[1, 5, 1, 3], &[6, 1]];
        for (shape, bits) in shapes.into_iter().flat_map(|shape| [8, 16, 64].map(|bits| (shape, bits))) {
            let total: u64 = shape.iter().map(|dim| *dim as u64).product();
            for most in bits / 8..=total * bits / 8 + 3 {
                let mut done = 0;
                while done < total {
                    let (indices, elements) = piece(bits, shape, done, most).unwrap();
                    let first = indices.iter().zip(shape).fold(0, |at, (range, dim)| at * dim + range.start) as u64;
                    let last = indices.iter().zip(shape).fold(0, |at, (range, dim)| at * dim + range.end - 1) as u64;
                    assert_eq!((first, last + 1), (done, done + elements), "{shape:?} {most} {indices:?}");
                    assert_eq!(indices.iter().map(Range::len).product::<usize>() as u64, elements);
                    assert!(elements * bits / 8 <= most);
                    done += elements;
                }
                assert_eq!(done, total);
            }
            assert_eq!(piece(bits, shape, 0, bits / 8 - 1), None);
        }
    }

    #[test]
    fn pieces_of_half_bytes_end_where_bytes_end() {
        let indices = |found: Option<(Vec<Range<usize>>, u64)>| found.map(|(indices, _)| indices);
        assert_eq!(indices(piece(4, &[3, 8], 0, 5)), Some(vec![0..1, 0..8]));
        assert_eq!(indices(piece(4, &[3, 8], 8, 3)), Some(vec![1..2, 0..6]));
        assert_eq!(indices(piece(6, &[8, 2], 0, 5)), Some(vec![0..2, 0..2]), "two rows are three bytes");
        assert_eq!(indices(piece(6, &[8, 2], 0, 2)), None);
    }
}
