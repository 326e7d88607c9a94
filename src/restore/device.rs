//! Reading into the memory of devices.
//!
//! **Protocol.** Threads read pieces of up to 8 MiB into slabs of an arena of their own, which the device has pinned, and digest
//! every part. A part whose digest is right is handed over: its bytes are copied to the device by a stream of this thread, which
//! waits for what the program had queued in its streams. While that goes on the thread reads into its second slab. **Completion.**
//! A slab is read into again, and the call returns, when an event behind its copies is reached. **Failure.** Copies that were queued
//! are waited for all the same; where that takes longer than the checkpoint's timeout, slabs are leaked rather than reused, but
//! copies to memory that is borrowed are waited for until they end.
//!
//! # Safety argument
//! Copies read from a slab that is leased until they have ended: `Loader` keeps the lease, and gives it up only for a mark
//! that was reached or a queue that is quiescent; otherwise the lease is forgotten, and with it the mapping stays for ever. A slab is
//! not written while it is kept. They write to memory for which the caller of [`DeviceTarget::new`] vouched until `read_into`
//! returns, which waits for the same marks, within the bounds that were checked against the tensor's length.
#![expect(unsafe_code, reason = "asynchronous copies into memory of a device; argument above")]

use super::piece::{Piece, Space, coalesce, file_at, pass, share_out, worthwhile};
use super::region::Region;
use super::{Share, Wanted, matches};
use crate::checkpoint::Checkpoint;
use crate::completion::deadline_after;
use crate::device::{Device, LoadQueue, Point};
use crate::error::{Error, ErrorKind, Result};
use crate::format::manifest::BLOCK;
use crate::memory::{ALIGNMENT, Arena, Lease};
use crate::mutant::{self, Mutant};
use crate::state::{DeviceStream, Dtype};
use std::collections::VecDeque;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Threads that read for devices, at most: each reads 8 MiB at once.
const LOADERS: usize = 8;
/// Slabs of each: one is read into while the other is copied from.
const SLABS: usize = 2;
/// From this many bytes on a run of a slice is a copy of its own.
const RUN: u64 = 64 << 10;
/// How often an event is looked at.
const POLL: Duration = Duration::from_micros(50);

/// Memory of a device that a tensor is read into: see [`Targets::device`](super::Targets::device). Slices of cudarc are targets
/// without unsafe code: `adapters::cudarc::CudaTarget`.
///
/// ```no_run
/// use ashore::{Checkpoint, DeviceChoice, DeviceStream, DeviceTarget, Targets};
/// # fn restore(address: u64, stream: DeviceStream<'_>) -> ashore::Result<()> {
/// // SAFETY: 4096 bytes were allocated there, and are used in this stream alone.
/// let weights = unsafe { DeviceTarget::new(address, 4096, stream) };
/// let checkpoint = Checkpoint::open("runs/step-00000100")?.with_device(DeviceChoice::Cuda(0))?;
/// checkpoint.read_into(Targets::new().device("weights", weights))?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct DeviceTarget<'t> {
    pub(super) address: u64,
    pub(super) bytes: u64,
    pub(super) stream: DeviceStream<'static>,
    pub(super) dtype: Option<Dtype>,
    /// The memory is borrowed for `'t` and no longer.
    pub(super) borrowed: bool,
    memory: PhantomData<&'t mut ()>,
}

impl DeviceTarget<'_> {
    /// `bytes` bytes at the address `address` of the device of `stream`, in its primary context. They are written after everything
    /// that is queued in `stream` when [`Checkpoint::read_into`] is called, and whatever is queued after it returned sees them.
    ///
    /// # Safety
    /// From the call of `read_into` until it returns the memory is valid for writes of `bytes` bytes on that device, `stream` is
    /// valid, and nothing else reads or writes the memory but what was queued in `stream` before. If the call returns `Deadline`,
    /// copies may still be under way: the memory stays valid until the device has ended all of its work.
    pub unsafe fn new(address: u64, bytes: u64, stream: DeviceStream<'_>) -> Self {
        // SAFETY: the caller promises that it is valid whenever the target is used.
        let stream = unsafe { stream.promised() };
        Self { address, bytes, stream, dtype: None, borrowed: false, memory: PhantomData }
    }

    /// As [`DeviceTarget::new`], for memory that may be gone when `read_into` has returned, whatever it returned: it then waits for
    /// copies as long as they take.
    ///
    /// # Safety
    /// As there, but for what is said of `Deadline`; the caller binds the lifetime to that of the memory and of `stream`.
    #[cfg(feature = "cudarc")]
    pub(crate) unsafe fn borrowed(address: u64, bytes: u64, stream: DeviceStream<'_>, dtype: Dtype) -> Self {
        // SAFETY: passed on.
        let target = unsafe { Self::new(address, bytes, stream) };
        Self { dtype: Some(dtype), borrowed: true, ..target }
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
    pub(super) fn load(
        &self,
        parts: Vec<Wanted<'_, '_>>,
        streams: &[DeviceStream],
        borrowed: bool,
        first: &str,
    ) -> Result<()> {
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
                let mut loader = Loader::new(self, device.as_ref(), &arena, borrowed, &unfinished)?;
                if !mutant::on(Mutant::LoadOrder) {
                    loader.queue.wait(&behind)?;
                }
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
        let why = format!("copies to a device have not ended and still write to its memory timeout={:?}", self.timeout);
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
    timeout: Duration,
    /// Copies go to memory that is borrowed.
    borrowed: bool,
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

impl Slab {
    /// Moves short runs of a part for a device together, to where the part begins. The slab begins with the byte `first`.
    fn pack(&mut self, part: &mut Wanted<'_, '_>, first: u64) -> Result<()> {
        let together = part.region.at(part.place).1;
        if matches!(part.to, Share::Host(_)) || together >= part.to.len() || together >= RUN {
            return Ok(());
        }
        let (bytes, mut to) = (self.0.bytes_mut(), (part.range.start - first) as usize);
        for run in runs(part, first) {
            let len = run.len();
            // Towards the beginning: places in a tensor rise with those in its slice.
            if run.end > bytes.len() || to > run.start {
                return Err(outside());
            }
            bytes.copy_within(run, to);
            to += len;
        }
        (part.region, part.place, part.origin) = (Region::whole(part.to.len()), 0, 0);
        Ok(())
    }
}

/// Where the bytes of a part for a device are in a slab that begins with the byte `first` of the file.
fn runs(part: &Wanted<'_, '_>, first: u64) -> impl Iterator<Item = Range<usize>> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let left = part.to.len().checked_sub(done).filter(|left| *left > 0)?;
        let (source, together) = part.region.at(part.place + done);
        let len = together.min(left);
        done += len;
        let from = (source + part.range.start).wrapping_sub(part.origin + first) as usize;
        Some(from..from.saturating_add(len as usize))
    })
}

fn outside() -> Error {
    Error::internal("a tensor was looked for outside its slab")
}

impl<'l> Loader<'l> {
    fn new(
        checkpoint: &'l Checkpoint,
        device: &dyn Device,
        arena: &'l Arena,
        borrowed: bool,
        unfinished: &'l AtomicBool,
    ) -> Result<Self> {
        let (queue, flights, timeout) = (device.loads()?, VecDeque::with_capacity(SLABS), checkpoint.timeout);
        Ok(Self { checkpoint, arena, queue, flights, timeout, borrowed, unfinished })
    }

    /// Reads a piece, checks it, and hands it over when all of it is right.
    fn bring(&mut self, mut piece: Piece<Wanted<'_, '_>>) -> Result<()> {
        while self.flights.len() >= SLABS {
            if mutant::on(Mutant::LoadReuse) { _ = self.flights.pop_front() } else { self.land()? }
        }
        let slab = self.arena.try_lease().ok_or_else(|| Error::internal("a thread has lost a slab"))?;
        let (checkpoint, mut slab, first) = (self.checkpoint, Slab(slab), piece.pages().start);
        let file = file_at(&checkpoint.opened.files, piece.file)?;
        pass(&mut slab, file, &mut piece).map_err(|e| checkpoint.unread(e, &piece))?;
        let wrong = piece.parts.iter().find(|part| !matches(part.found, part.digest));
        let wrong = wrong.map(|part| checkpoint.wrong(part));
        if let (Some(error), false) = (&wrong, mutant::on(Mutant::LoadEarly)) {
            return Err(error.clone());
        }
        // Runs of a slice become one copy, where no other part is to have the same bytes.
        if piece.parts.is_sorted_by(|one, next| one.range.end <= next.range.start) {
            piece.parts.iter_mut().try_for_each(|part| slab.pack(part, first))?;
        }
        self.flights.push_back(Flight { slab: slab.0, mark: None });
        for part in &piece.parts {
            self.hand_over(part, first).map_err(|e| checkpoint.unloaded(e, part))?;
        }
        let mark = self.queue.mark()?;
        if let Some(flight) = self.flights.back_mut() {
            flight.mark = Some(mark);
        }
        wrong.map_or(Ok(()), Err)
    }

    /// Queues the copies of a part whose digest is right, from the youngest slab, which begins with the byte `first` of the file.
    fn hand_over(&mut self, part: &Wanted<'_, '_>, first: u64) -> Result<()> {
        let (&Share::Device { ordinal, mut address, .. }, Some(flight)) = (&part.to, self.flights.back()) else {
            return Ok(());
        };
        for run in runs(part, first) {
            let from = flight.slab.bytes().get(run).ok_or_else(outside)?;
            // SAFETY: the slab is among the flights, and stays there until a mark behind this copy is reached; the target was vouched for.
            unsafe { self.queue.load(ordinal, from.as_ptr(), address, from.len())? };
            address += from.len() as u64;
        }
        Ok(())
    }

    /// Waits until the oldest slab is not copied from any more.
    fn land(&mut self) -> Result<()> {
        let Some(mark) = self.flights.front().and_then(|flight| flight.mark.clone()) else {
            return Err(Error::internal("a slab without a mark is waited for"));
        };
        let deadline = Instant::now() + self.timeout;
        while !self.queue.has_reached(&mark)? {
            if Instant::now() >= deadline {
                let why = format!("copies to a device do not end timeout={:?}", self.timeout);
                // Nor will they while this is waited for once more.
                self.timeout = Duration::ZERO;
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
        if self.flights.is_empty() || self.queue.quiesce(deadline_after(self.timeout)) {
            return;
        }
        if self.borrowed {
            tracing::error!(
                "copies to borrowed memory of a device do not end, and are waited for: it may be freed after that"
            );
            if self.queue.quiesce(deadline_after(Duration::MAX)) {
                return;
            }
        }
        tracing::error!(slabs = self.flights.len(), "copies to a device do not end: their memory is given up");
        self.flights.drain(..).for_each(std::mem::forget);
        self.unfinished.store(true, Ordering::Relaxed);
    }
}
