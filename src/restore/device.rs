//! Reading into the memory of devices.
//!
//! **Protocol.** Threads read pieces of up to 8 MiB into slabs of an arena of their own, which the device has pinned, and digest
//! every part. A part whose digest is right is handed over: its bytes are copied to the device by a stream of this thread, which
//! waits for what the program had queued in its streams. While that goes on the thread reads into its second slab. **Completion.**
//! A slab is read into again, and the call returns, when an event behind its copies is reached. **Failure.** Copies that were queued
//! are waited for all the same; where that takes longer than the checkpoint's patience, slabs are leaked rather than reused.
//!
//! # Safety argument
//! Copies read from a slab that is leased until they have ended: `Loader` keeps the lease, and gives it up only for a mark
//! that was reached or a queue that is quiescent; otherwise the lease is forgotten, and with it the mapping stays for ever. A slab is
//! not written while it is kept. They write to memory for which the caller of [`DeviceTarget::new`] vouched until `read_into`
//! returns, which waits for the same marks, within the bounds that were checked against the tensor's length.
#![expect(unsafe_code, reason = "asynchronous copies into memory of a device; argument above")]

use super::piece::{Piece, Space, coalesce, file_at, pass, share_out, worthwhile};
use super::{Share, Wanted, matches};
use crate::checkpoint::Checkpoint;
use crate::device::{Device, LoadQueue, Point};
use crate::error::{Error, ErrorKind, Result};
use crate::format::manifest::BLOCK;
use crate::memory::{ALIGNMENT, Arena, Lease};
use crate::mutant::{self, Mutant};
use crate::state::{DeviceStream, Dtype};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Threads that read for devices, at most: each reads 8 MiB at once.
const LOADERS: usize = 8;
/// Slabs of each: one is read into while the other is copied from.
const SLABS: usize = 2;
/// How often an event is looked at.
const POLL: Duration = Duration::from_micros(50);

/// Memory of a device that a tensor is read into: see [`Targets::device`](super::Targets::device).
#[derive(Clone, Copy, Debug)]
pub struct DeviceTarget {
    pub(super) address: u64,
    pub(super) bytes: u64,
    pub(super) stream: DeviceStream,
    pub(super) dtype: Option<Dtype>,
}

impl DeviceTarget {
    /// `bytes` bytes at the address `address` of the device of `stream`, in its primary context. They are written after everything
    /// that is queued in `stream` when [`Checkpoint::read_into`] is called, and whatever is queued after it returned sees them.
    ///
    /// # Safety
    /// From the call of `read_into` until it returns the memory is valid for writes of `bytes` bytes on that device, `stream` is
    /// valid, and nothing else reads or writes the memory but what was queued in `stream` before. If the call returns `Deadline`,
    /// copies may still be under way: the memory stays valid until the device has ended all of its work.
    pub unsafe fn new(address: u64, bytes: u64, stream: DeviceStream) -> Self {
        Self { address, bytes, stream, dtype: None }
    }

    /// The same, refused for a tensor of another dtype.
    #[must_use]
    pub fn with_dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = Some(dtype);
        self
    }
}

impl Checkpoint {
    /// Fills targets of which some are in device memory, behind everything in `streams`.
    pub(super) fn load(&self, parts: Vec<Wanted<'_, '_>>, streams: &[DeviceStream], first: &str) -> Result<()> {
        let refused = |why: &str, kind| self.place(Error::new(kind, format!("{why} first={first:?}")));
        let Some(device) = &self.device else {
            return Err(refused("a target is in device memory, and no device was given", ErrorKind::Invalid));
        };
        let behind = device.behind(streams);
        let behind = behind.map_err(|e| refused("cannot read into the memory of a device", e.kind()).with_source(e))?;
        let pieces = coalesce(parts, BLOCK);
        let pages = pieces.iter().map(|piece| piece.pages()).map(|pages| pages.end - pages.start);
        let Some(slab) = pages.max() else { return Ok(()) };
        let threads = worthwhile(&pieces, self.threads.min(LOADERS));
        let unfinished = AtomicBool::new(false);
        let all = || {
            // From now on this thread's calls are no business of a capture in another.
            let _relaxed = device.loads()?;
            let arena = pinned(slab, threads * SLABS, device.as_ref())?;
            share_out(pieces, threads, |pieces| {
                let mut loader = Loader::new(self, device.as_ref(), &arena, &unfinished)?;
                loader.queue.wait(&behind)?;
                for piece in pieces {
                    loader.bring(piece)?;
                }
                loader.land_all()
            })
        };
        // Not in the caller's thread: which context is current there is the program's affair.
        let result = thread::scope(|scope| {
            let thread = thread::Builder::new().name("ashore-load".into()).spawn_scoped(scope, all);
            let thread = thread.map_err(|e| Error::io("no thread to read with", e).with_kind(ErrorKind::Busy))?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        let result = result.map_err(|error| self.place(error));
        if !unfinished.into_inner() {
            return result;
        }
        let why =
            format!("copies to a device have not ended and still write to its memory patience={:?}", self.patience);
        let late = self.place(Error::new(ErrorKind::Deadline, why));
        Err(if let Err(error) = result { late.with_source(error) } else { late })
    }
}

/// An arena for one restore, of `slabs` slabs.
fn pinned(slab: u64, slabs: usize, device: &dyn Device) -> Result<Arena> {
    let bytes = slab.saturating_mul(slabs as u64);
    let arena = Arena::quietly(bytes, slab, device, Arc::default())?;
    if let Err(reason) = &arena.report().pinned {
        tracing::warn!(%reason, bytes, "a restore found no pinned memory: its copies to the device hold up its threads");
    }
    Ok(arena)
}

/// One thread's slabs and copies.
struct Loader<'l> {
    checkpoint: &'l Checkpoint,
    arena: &'l Arena,
    queue: Box<dyn LoadQueue>,
    /// Slabs that are copied from, oldest first.
    flights: VecDeque<Flight>,
    patience: Duration,
    /// Set where copies are left behind.
    unfinished: &'l AtomicBool,
}

struct Flight {
    slab: Lease,
    /// Behind its copies; None until it is made.
    mark: Option<Point>,
}

/// A slab that is read into.
struct Slab(Lease);

impl Space for Slab {
    const STEP: u64 = BLOCK + ALIGNMENT as u64;

    fn room(&mut self, offset: u64, len: usize) -> Result<&mut [u8]> {
        let room = usize::try_from(offset).ok().and_then(|offset| self.0.bytes_mut().get_mut(offset..)?.get_mut(..len));
        room.ok_or_else(|| Error::internal(format!("a piece is longer than a slab offset={offset} len={len}")))
    }
}

impl<'l> Loader<'l> {
    fn new(
        checkpoint: &'l Checkpoint,
        device: &dyn Device,
        arena: &'l Arena,
        unfinished: &'l AtomicBool,
    ) -> Result<Self> {
        let (queue, flights, patience) = (device.loads()?, VecDeque::with_capacity(SLABS), checkpoint.patience);
        Ok(Self { checkpoint, arena, queue, flights, patience, unfinished })
    }

    /// Reads a piece, checks it, and hands over what is right.
    fn bring(&mut self, mut piece: Piece<Wanted<'_, '_>>) -> Result<()> {
        while self.flights.len() >= SLABS {
            self.land()?;
        }
        let slab = self.arena.try_lease().ok_or_else(|| Error::internal("a thread has lost a slab"))?;
        let (file, mut slab, first) =
            (file_at(&self.checkpoint.opened.files, piece.file)?, Slab(slab), piece.pages().start);
        pass(&mut slab, file, &mut piece).map_err(|e| self.checkpoint.unread(e, &piece))?;
        self.flights.push_back(Flight { slab: slab.0, mark: None });
        for part in &piece.parts {
            let right = matches(part.found, part.digest);
            if right || mutant::on(Mutant::LoadEarly) {
                self.hand_over(part, first).map_err(|e| self.checkpoint.unloaded(e, part))?;
            }
            if !right {
                return Err(self.checkpoint.wrong(part));
            }
        }
        let mark = self.queue.mark()?;
        if let Some(flight) = self.flights.back_mut() {
            flight.mark = Some(mark);
        }
        Ok(())
    }

    /// Queues the copies of a part whose digest is right. The slab begins with the byte `first` of the file.
    fn hand_over(&mut self, part: &Wanted<'_, '_>, first: u64) -> Result<()> {
        let (Share::Device { ordinal, address, bytes: len }, Some(Flight { slab, .. })) =
            (&part.to, self.flights.back())
        else {
            return Ok(());
        };
        let (mut done, bytes) = (0, slab.bytes());
        while done < *len {
            let (source, together) = part.region.at(part.place + done);
            let run = together.min(len - done);
            let from = (source + part.range.start).checked_sub(part.origin + first);
            let from = from.and_then(|from| bytes.get(from as usize..)?.get(..run as usize));
            let from = from.ok_or_else(|| Error::internal("a tensor was looked for outside its slab"))?;
            // SAFETY: the slab is among the flights, and stays there until a mark behind this copy is reached; the target was vouched for.
            unsafe { self.queue.load(*ordinal, from.as_ptr(), address + done, from.len())? };
            done += run;
        }
        Ok(())
    }

    /// Waits until the oldest slab is not copied from any more.
    fn land(&mut self) -> Result<()> {
        let Some(mark) = self.flights.front().and_then(|flight| flight.mark.clone()) else {
            return Err(Error::internal("a slab without a mark is waited for"));
        };
        let deadline = Instant::now() + self.patience;
        while !self.queue.has_reached(&mark)? {
            if Instant::now() >= deadline {
                let why = format!("copies to a device do not end patience={:?}", self.patience);
                // Nor will they while this is waited for once more.
                self.patience = Duration::ZERO;
                return Err(Error::new(ErrorKind::Deadline, why));
            }
            thread::sleep(POLL);
        }
        self.flights.pop_front();
        Ok(())
    }

    fn land_all(mut self) -> Result<()> {
        if mutant::on(Mutant::LoadWait) {
            self.flights.clear();
        }
        while !self.flights.is_empty() {
            self.land()?;
        }
        Ok(())
    }
}

impl Drop for Loader<'_> {
    fn drop(&mut self) {
        if self.flights.is_empty() || self.queue.quiesce(Instant::now() + self.patience) {
            return;
        }
        tracing::error!(slabs = self.flights.len(), "copies to a device do not end: their memory is given up");
        self.flights.drain(..).for_each(std::mem::forget);
        self.unfinished.store(true, Ordering::Relaxed);
    }
}
