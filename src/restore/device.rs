//! Reading into device memory.
//!
//! **Protocol.** Threads read pieces of up to 8 MiB into pinned slabs of a separate arena, and digest every
//! part. When a part's digest matches, the thread's own stream copies its bytes to the device, after the work
//! that the program had queued in its streams. Meanwhile the thread reads into its second slab.
//! **Completion.** A slab is reused, and the call returns, when the completion event after its copies is
//! reached. **Failure.** After an error, too, `read_into` waits for queued copies. If that exceeds the
//! checkpoint's timeout, slabs are leaked rather than reused. Copies to borrowed memory are waited for until
//! they end.
//!
//! # Safety argument
//! Copies read from a slab whose lease `Loader` keeps until they have ended. `Loader` releases the lease only
//! for a completion event that was reached or a queue that is quiescent; otherwise it forgets the lease, and
//! the mapping stays forever. A slab is not written while its lease is kept. Copies write to memory that the
//! caller of [`DeviceTarget::new`] guarantees until `read_into` returns, and `read_into` waits for the same
//! events. Copies stay within bounds that are checked against the tensor's length: a box goes to a region
//! within the target, or to the elements of a box within the target.
#![expect(unsafe_code, reason = "asynchronous copies into memory of a device; argument above")]

use super::piece::{Piece, Space, coalesce, share_out, worthwhile};
use super::region::Region;
use super::share::Share;
use super::strided::{RowCopy, Strides};
use super::wanted::Wanted;
use crate::checkpoint::Checkpoint;
use crate::completion::deadline_after;
use crate::device::{Dependency, Device, LoadQueue, RowLayout};
use crate::error::{Error, ErrorKind, Result};
use crate::format::entries::BLOCK;
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

/// Maximum number of threads that read for devices; each reads 8 MiB at once.
const LOADERS: usize = 8;
/// Slabs per thread: one is read into while the other is copied from.
const SLABS: usize = 2;
/// A run of a slice of at least this many bytes is copied on its own.
const RUN: u64 = 64 << 10;
/// Interval between queries of an event.
const POLL_INTERVAL: Duration = Duration::from_micros(50);

/// Device memory that a tensor is read into: see [`Targets::device`](super::Targets::device). Slices of
/// cudarc are targets without unsafe code: `adapters::cudarc::CudaTarget`.
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
    /// None: the elements are packed.
    pub(super) strides: Option<Strides>,
    /// The memory is borrowed for `'t` only.
    pub(super) borrowed: bool,
    memory: PhantomData<&'t mut ()>,
}

impl DeviceTarget<'_> {
    /// A target of `bytes` bytes at `address` on the device of `stream`, in its primary context. The bytes
    /// are written after all work queued in `stream` when [`Checkpoint::read_into`] is called. Work queued in
    /// `stream` after `read_into` returns sees them.
    ///
    /// # Safety
    /// From the call of `read_into` until it returns the memory is valid for writes of `bytes` bytes on that
    /// device, `stream` is valid, and only work queued in `stream` before the call reads or writes the
    /// memory. If the call returns `Deadline`, copies may still be in progress: the memory stays valid until
    /// the device has ended all of its work.
    pub unsafe fn new(address: u64, bytes: u64, stream: DeviceStream<'_>) -> Self {
        // SAFETY: the caller guarantees that the stream is valid whenever the target is used.
        let stream = unsafe { stream.promised() };
        Self { address, bytes, stream, dtype: None, strides: None, borrowed: false, memory: PhantomData }
    }

    /// A target whose elements are not packed: the element with all indices 0 is at `address`, and `strides`
    /// has the byte distance of neighbours for each dimension, which may be negative. The tensor or slice
    /// must have this dtype and shape. [`Checkpoint::read_into`] refuses any other, and refuses strides by
    /// which elements overlap or dimensions interleave.
    ///
    /// A thread sorts the bytes of 8 MiB into the order in which they lie in the target, so that copies of
    /// rows can transfer them. One copy is enough if the elements of a row are side by side and rows are
    /// evenly apart. Otherwise each index of each further dimension takes one more copy.
    ///
    /// ```no_run
    /// # use ashore::{Checkpoint, DeviceStream, DeviceTarget, Dtype, Targets};
    /// # fn restore(checkpoint: &Checkpoint, address: u64, stream: DeviceStream<'_>) -> ashore::Result<()> {
    /// // SAFETY: a matrix of 64 rows and 16 columns of 4 bytes each is there, and is used in this stream alone.
    /// let transposed = unsafe { DeviceTarget::strided(address, Dtype::F32, [16, 64], [4, 64], stream) };
    /// checkpoint.read_into(Targets::new().device("weights", transposed))?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Safety
    /// The promises of [`DeviceTarget::new`], for the bytes of all elements. Bytes between elements are
    /// neither read nor written.
    pub unsafe fn strided(
        address: u64,
        dtype: Dtype,
        shape: impl AsRef<[usize]>,
        strides: impl AsRef<[i64]>,
        stream: DeviceStream<'_>,
    ) -> Self {
        // SAFETY: the caller of this function gives the same guarantees.
        let target = unsafe { Self::new(address, 0, stream) };
        Self { dtype: Some(dtype), strides: Some(Strides::new(dtype, shape, strides)), ..target }
    }

    /// As [`DeviceTarget::new`], for memory that may be freed as soon as `read_into` returns, whatever it
    /// returns. `read_into` then waits for copies as long as they take.
    ///
    /// # Safety
    /// As for [`DeviceTarget::new`], except for its rule for `Deadline`. The caller binds the lifetime to
    /// that of the memory and of `stream`.
    #[cfg(feature = "cudarc")]
    pub(crate) unsafe fn borrowed(address: u64, bytes: u64, stream: DeviceStream<'_>, dtype: Dtype) -> Self {
        // SAFETY: the caller of this function gives the same guarantees.
        let target = unsafe { Self::new(address, bytes, stream) };
        Self { dtype: Some(dtype), borrowed: true, ..target }
    }

    /// Refuses a tensor of another dtype.
    #[must_use]
    pub fn with_dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = Some(dtype);
        self
    }
}

impl Checkpoint {
    /// Fills targets, of which some are in device memory, after all work in `streams`.
    pub(super) fn load(
        &self,
        parts: Vec<Wanted<'_, '_>>,
        streams: &[DeviceStream],
        borrowed: bool,
        first: &str,
    ) -> Result<()> {
        let refused = |why: &str, kind| self.located(Error::new(kind, format!("{why} first={first:?}")));
        let Some(device) = &self.device else {
            return Err(refused("a target is in device memory, but the checkpoint has no device", ErrorKind::Invalid));
        };
        let behind = device.behind(streams);
        let behind = behind.map_err(|e| refused("cannot read into the memory of a device", e.kind()).with_source(e))?;
        let manner = self.manner();
        let pieces = coalesce(parts, BLOCK, manner.gap);
        let pages = pieces.iter().map(|piece| piece.pages()).map(|pages| pages.end - pages.start);
        let Some(slab) = pages.max() else { return Ok(()) };
        let threads = worthwhile(&pieces, manner.threads.min(LOADERS));
        let unfinished = AtomicBool::new(false);
        let all = || {
            // From here on, calls of this thread do not interfere with a graph capture in another thread.
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
        // Use another thread: the current context of the caller's thread belongs to the program.
        let result = thread::scope(|scope| {
            let thread = thread::Builder::new().name("ashore-load".into()).spawn_scoped(scope, all);
            let thread = thread.map_err(|e| Error::io("no thread to read with", e).with_kind(ErrorKind::Busy))?;
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        let result = result.map_err(|error| self.located(error));
        if !unfinished.into_inner() {
            return result;
        }
        let why =
            format!("copies to a device have not ended and may still write to its memory timeout={:?}", self.timeout);
        let late = self.located(Error::new(ErrorKind::Deadline, why));
        Err(if let Err(error) = result { late.with_source(error) } else { late })
    }
}

/// Allocates an arena of `slabs` slabs for one restore.
fn pinned(slab: u64, slabs: usize, device: &dyn Device) -> Result<Arena> {
    let bytes = slab.saturating_mul(slabs as u64);
    let arena = Arena::quietly(bytes, slab, device, Arc::default())?;
    if let Err(reason) = &arena.report().pinned {
        tracing::warn!(%reason, bytes, "the memory of a restore is not pinned: its copies to the device block its threads");
    }
    Ok(arena)
}

/// The slabs and copies of one thread.
struct Loader<'l> {
    checkpoint: &'l Checkpoint,
    arena: &'l Arena,
    queue: Box<dyn LoadQueue>,
    /// Slabs being copied from, oldest first.
    in_flight: VecDeque<Upload>,
    timeout: Duration,
    /// The bytes of a part that are not side by side in its slab.
    packed: Vec<u8>,
    /// Copies write to borrowed memory.
    borrowed: bool,
    /// Set when copies are still running at return.
    unfinished: &'l AtomicBool,
}

struct Upload {
    slab: Lease,
    /// The completion event after its copies; None until it is recorded.
    event: Option<Dependency>,
}

/// A slab with bytes in the order of their targets, and the copies to these targets, each with the number of
/// its part.
struct Ordered {
    slab: Lease,
    filled: usize,
    copies: Vec<(usize, RowCopy)>,
}

/// A slab that is being read into.
struct Slab(Lease);

impl Space for Slab {
    fn step(&self) -> u64 {
        BLOCK + ALIGNMENT as u64
    }

    fn room(&mut self, offset: u64, len: usize) -> Result<&mut [u8]> {
        let room = usize::try_from(offset).ok().and_then(|offset| self.0.bytes_mut().get_mut(offset..)?.get_mut(..len));
        room.ok_or_else(|| Error::internal(format!("a piece is longer than a slab offset={offset} len={len}")))
    }
}

impl Slab {
    /// Packs short runs of a device part to where the part begins, so that they are side by side. The slab
    /// starts at offset `first` of the file.
    fn pack(&mut self, part: &mut Wanted<'_, '_>, first: u64) -> Result<()> {
        let together = part.region.at(part.place).1;
        if !matches!(part.to, Share::Device { .. }) || together >= part.to.len() || together >= RUN {
            return Ok(());
        }
        let (bytes, mut to) = (self.0.bytes_mut(), (part.range.start - first) as usize);
        for (run, _) in runs(part, first) {
            let len = run.len();
            // Runs only move towards the start: offsets in a tensor rise with those in its slice.
            if run.end > bytes.len() || to > run.start {
                return Err(outside());
            }
            bytes.copy_within(run, to);
            to += len;
        }
        // The first byte of the part stays at `place`, which also determines where the part goes in the
        // target.
        (part.region, part.origin) = (Region::whole(part.place + part.to.len()), part.place);
        Ok(())
    }
}

/// Returns the byte ranges of a device part within a slab that starts at offset `first` of the file, each
/// with its target offset from the share's address.
fn runs(part: &Wanted<'_, '_>, first: u64) -> impl Iterator<Item = (Range<usize>, u64)> {
    let into = if let Share::Device { into, .. } = &part.to { into.as_deref() } else { None };
    let mut done = 0;
    std::iter::from_fn(move || {
        let left = part.to.len().checked_sub(done).filter(|left| *left > 0)?;
        let (source, together) = part.region.at(part.place + done);
        let (to, room) = into.map_or((done, left), |into| into.at(part.place + done));
        let len = together.min(room).min(left);
        done += len;
        let from = (source + part.range.start).wrapping_sub(part.origin + first) as usize;
        Some((from..from.saturating_add(len as usize), to))
    })
}

/// Runs that one copy moves: the place of the first run in the slab and in the target, and the distances to
/// the others.
struct Rows {
    from: usize,
    to: u64,
    layout: RowLayout,
}

impl Rows {
    fn new(from: &Range<usize>, to: u64) -> Self {
        let layout = RowLayout { width: from.len(), height: 1, from_pitch: from.len(), to_pitch: from.len() as u64 };
        Self { from: from.start, to, layout }
    }

    /// Adds a run as the next row. Returns false if the run does not have the same distance as the others.
    fn add(&mut self, from: &Range<usize>, to: u64) -> bool {
        let RowLayout { width, height, from_pitch, to_pitch } = self.layout;
        let ahead = (from.start.checked_sub(self.from), to.checked_sub(self.to));
        let (Some(from_ahead), Some(to_ahead)) = ahead else { return false };
        let follows = if height == 1 {
            self.layout.from_pitch = from_ahead;
            self.layout.to_pitch = to_ahead;
            from_ahead >= width && to_ahead >= width as u64 && from_ahead.max(to_ahead as usize) <= RowLayout::PITCH_MAX
        } else {
            from_ahead == height * from_pitch && to_ahead == height as u64 * to_pitch
        };
        let follows = follows && from.len() == width;
        if follows {
            self.layout.height += 1;
        }
        follows
    }
}

fn outside() -> Error {
    Error::internal("a tensor is outside its slab")
}

impl<'l> Loader<'l> {
    fn new(
        checkpoint: &'l Checkpoint,
        device: &dyn Device,
        arena: &'l Arena,
        borrowed: bool,
        unfinished: &'l AtomicBool,
    ) -> Result<Self> {
        let (queue, in_flight, timeout) = (device.loads()?, VecDeque::with_capacity(SLABS), checkpoint.timeout);
        Ok(Self { checkpoint, arena, queue, in_flight, timeout, packed: Vec::new(), borrowed, unfinished })
    }

    /// Leases a slab. If this thread already has all of its slabs (the `held` ones and those in flight), it
    /// first waits for the copies from the oldest.
    fn lease(&mut self, held: usize) -> Result<Lease> {
        while self.in_flight.len() + held >= SLABS {
            if mutant::on(Mutant::LoadReuse) { _ = self.in_flight.pop_front() } else { self.land()? }
        }
        self.arena.try_lease().ok_or_else(|| Error::internal("a thread has lost a slab"))
    }

    /// Reads a piece, checks it, and queues its copies if every digest matches.
    fn bring(&mut self, mut piece: Piece<Wanted<'_, '_>>) -> Result<()> {
        let slab = self.lease(0)?;
        let (checkpoint, mut slab, first) = (self.checkpoint, Slab(slab), piece.pages().start);
        let wrong = checkpoint.check(&mut slab, &mut piece)?;
        if let (Some(error), false) = (&wrong, mutant::on(Mutant::LoadEarly)) {
            return Err(error.clone());
        }
        // Pack the runs of a slice into one copy, unless another part needs the same bytes.
        if piece.parts.is_sorted_by(|one, next| one.range.end <= next.range.start) {
            piece.parts.iter_mut().try_for_each(|part| slab.pack(part, first))?;
        }
        self.hand_over_strided(&piece.parts, slab.0.bytes(), first)?;
        if piece.parts.iter().any(|part| matches!(part.to, Share::Device { .. })) {
            self.in_flight.push_back(Upload { slab: slab.0, event: None });
            for part in &piece.parts {
                self.hand_over(part, first).map_err(|e| checkpoint.unloaded(e, part))?;
            }
            self.mark()?;
        }
        wrong.map_or(Ok(()), Err)
    }

    /// Copies the bytes of checked parts from the slab `from` to another slab, in the order of their targets
    /// with strides, and queues the copies from that slab.
    fn hand_over_strided(&mut self, parts: &[Wanted<'_, '_>], from: &[u8], first: u64) -> Result<()> {
        let mut ordered: Option<Ordered> = None;
        for (number, part) in parts.iter().enumerate() {
            let Share::DeviceStrided { to, .. } = &part.to else { continue };
            let len = part.to.len() as usize;
            let mut into = match ordered.take() {
                Some(into) if into.slab.bytes().len() - into.filled >= len => into,
                full => {
                    full.map_or(Ok(()), |full| self.send(full, parts))?;
                    Ordered { slab: self.lease(1)?, filled: 0, copies: Vec::new() }
                }
            };
            let mut runs = runs(part, first).map(|(run, _)| from.get(run).ok_or_else(outside)).peekable();
            let packed = match runs.peek() {
                Some(Ok(run)) if run.len() == len => *run,
                _ => {
                    self.packed.clear();
                    for run in runs {
                        self.packed.extend_from_slice(run?);
                    }
                    &self.packed[..]
                }
            };
            let (at, copies) = (into.filled, &mut into.copies);
            let room = into.slab.bytes_mut().get_mut(at..at + len).ok_or_else(outside)?;
            to.arrange(part.place, packed, room, at, |copy| copies.push((number, copy)))?;
            into.filled += len;
            ordered = Some(into);
        }
        ordered.map_or(Ok(()), |last| self.send(last, parts))
    }

    /// Queues the copies from a slab whose bytes are in the order of their targets.
    fn send(&mut self, ordered: Ordered, parts: &[Wanted<'_, '_>]) -> Result<()> {
        self.in_flight.push_back(Upload { slab: ordered.slab, event: None });
        for (part, RowCopy { ordinal, from, to, layout }) in ordered.copies {
            self.copy(ordinal, from, to, layout).map_err(|e| self.checkpoint.unloaded(e, &parts[part]))?;
        }
        self.mark()
    }

    /// Records the completion event of the newest slab.
    fn mark(&mut self) -> Result<()> {
        let event = self.queue.event()?;
        self.in_flight.back_mut().ok_or_else(outside)?.event = Some(event);
        Ok(())
    }

    /// Queues a copy of rows from the newest slab.
    fn copy(&mut self, ordinal: u32, from: usize, to: u64, layout: RowLayout) -> Result<()> {
        let upload = self.in_flight.back().ok_or_else(outside)?;
        let RowLayout { width, height, from_pitch, .. } = layout;
        let end = (from + width).saturating_add((height - 1).saturating_mul(from_pitch));
        let from = upload.slab.bytes().get(from..end).ok_or_else(outside)?.as_ptr();
        // SAFETY: the slab stays in `in_flight` until an event after this copy is reached; the target's
        // creator guarantees its memory.
        unsafe { self.queue.load(ordinal, from, to, layout) }
    }

    /// Queues the copies of a checked part from the newest slab, which starts at offset `first` of the file.
    fn hand_over(&mut self, part: &Wanted<'_, '_>, first: u64) -> Result<()> {
        let Share::Device { ordinal, address, .. } = part.to else { return Ok(()) };
        let mut rows: Option<Rows> = None;
        let mut queue = |rows: Rows| self.copy(ordinal, rows.from, address + rows.to, rows.layout);
        for (from, to) in runs(part, first) {
            if !rows.as_mut().is_some_and(|rows| rows.add(&from, to)) {
                rows.replace(Rows::new(&from, to)).map_or(Ok(()), &mut queue)?;
            }
        }
        rows.map_or(Ok(()), queue)
    }

    /// Waits until the copies from the oldest slab have ended.
    fn land(&mut self) -> Result<()> {
        let Some(event) = self.in_flight.front().and_then(|upload| upload.event.clone()) else {
            return Err(Error::internal("a slab has no completion event"));
        };
        let deadline = Instant::now() + self.timeout;
        while !self.queue.has_reached(&event)? {
            if Instant::now() >= deadline {
                let why = format!("copies to a device have not ended timeout={:?}", self.timeout);
                // Do not wait for these copies a second time.
                self.timeout = Duration::ZERO;
                return Err(Error::new(ErrorKind::Deadline, why));
            }
            thread::sleep(POLL_INTERVAL);
        }
        self.in_flight.pop_front();
        Ok(())
    }

    fn land_all(mut self) -> Result<()> {
        if mutant::on(Mutant::LoadWait) {
            self.in_flight.clear();
        }
        while !self.in_flight.is_empty() {
            self.land()?;
        }
        Ok(())
    }
}

impl Drop for Loader<'_> {
    fn drop(&mut self) {
        if self.in_flight.is_empty() || self.queue.quiesce(deadline_after(self.timeout)) {
            return;
        }
        if self.borrowed {
            tracing::error!(
                "copies to borrowed device memory have not ended; waiting, because the memory may be freed on return"
            );
            if self.queue.quiesce(deadline_after(Duration::MAX)) {
                return;
            }
        }
        tracing::error!(slabs = self.in_flight.len(), "copies to a device have not ended: their host memory is leaked");
        self.in_flight.drain(..).for_each(std::mem::forget);
        self.unfinished.store(true, Ordering::Relaxed);
    }
}
