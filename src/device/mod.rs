//! Devices: how bytes get from where a tensor lives into a slab.
//!
//! **Consistency.** A queue is first-in first-out: marks are reached in order, and a mark is reached only when every copy
//! before it has ended. **Completion.** [`CopyQueue::reached`] is the watermark, a count that never falls. **Cancellation.**
//! Copies cannot be taken back: whoever queues one keeps source and slab until its mark is reached. **Failure.** Errors are
//! sticky; after one, no mark need ever be reached.
//!
//! What the devices of this crate do with addresses as numbers is for it alone:
//! ```compile_fail,E0603
//! use ashore::internal::device::{Kernels, LentMemory, DeviceLateCopy};
//! ```
//!
//! # Safety argument
//! Contracts of asynchronous copies, and one body that copies nothing: it refuses.

#[cfg(all(feature = "cuda", not(any(loom, miri))))]
mod cuda;
mod host;

#[cfg(all(feature = "cuda", not(any(loom, miri))))]
pub use cuda::Cuda;
pub use host::Host;

use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::Register;
pub use crate::settings::DeviceChoice;
use crate::state::DeviceStream;
use smallvec::SmallVec;
use std::any::Any;
use std::fmt::{self, Debug};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// A kind of device, shared by all threads.
pub trait Device: Register + Send + Sync + Debug {
    /// Its name in messages: `host`, `cuda:0`.
    fn name(&self) -> String;

    /// A queue of copies, made in the thread that will use it.
    ///
    /// # Errors
    /// `Device` when there is none to be had.
    fn queue(&self) -> Result<Box<dyn CopyQueue>>;

    /// Called by `save`, in its thread: the point behind everything that is in `streams` now, for [`CopyQueue::wait`].
    ///
    /// # Errors
    /// `Invalid` for streams of a device that it knows nothing of, and for one that is being captured into a graph; `Device`.
    fn behind(&self, streams: &[DeviceStream]) -> Result<Point> {
        Err(self.unknown(streams))
    }

    /// Called by a fence, in its thread: whatever comes to `streams` later waits for all copies that have been queued so far. A
    /// device with streams copies from host memory before [`CopyQueue::copy`] returns: nobody waits for that in a stream.
    ///
    /// # Errors
    /// As [`Device::behind`].
    fn order(&self, streams: &[DeviceStream]) -> Result<()> {
        if streams.is_empty() { Ok(()) } else { Err(self.unknown(streams)) }
    }

    /// Called once, at start: kernels that use so much memory of the device.
    ///
    /// # Errors
    /// Why there are none.
    #[doc(hidden)]
    #[expect(private_interfaces, reason = "for the devices of this crate")]
    fn kernels(&self, _memory: KernelMemory) -> Result<Arc<dyn Kernels>> {
        Err(Error::new(ErrorKind::Unavailable, "this device has none"))
    }

    /// Called at most once, at start: waits of streams that the host can end.
    ///
    /// # Errors
    /// Why there are none.
    #[doc(hidden)]
    #[expect(private_interfaces, reason = "for the devices of this crate")]
    fn waits(&self) -> Result<Arc<dyn Waits>> {
        Err(Error::new(ErrorKind::Unavailable, "this device has none"))
    }

    /// A queue of copies to devices, made in the thread that will use it.
    ///
    /// # Errors
    /// `Unavailable` when it makes none; `Device`.
    #[doc(hidden)]
    #[expect(private_interfaces, reason = "for the devices of this crate")]
    fn loads(&self) -> Result<Box<dyn LoadQueue>> {
        Err(Error::new(ErrorKind::Unavailable, format!("nothing is copied to this device device={}", self.name())))
    }

    /// Called once, at start, where it is asked for: whether its queues can queue many copies in one call
    /// ([`CopyQueue::batch`]).
    ///
    /// # Errors
    /// Why they cannot.
    fn batches(&self) -> Result<()> {
        Err(Error::new(ErrorKind::Unavailable, format!("this device makes each copy by itself device={}", self.name())))
    }

    /// The error for streams of a device that it knows nothing of.
    fn unknown(&self, streams: &[DeviceStream]) -> Error {
        let ordinal = streams.first().map_or(0, |stream| stream.ordinal);
        let name = self.name();
        Error::invalid(format!("this executor cannot read tensors of a GPU executor={name} tensors=cuda:{ordinal}"))
    }
}

/// A point in streams, as the device that made it knows it.
pub type Point = Arc<dyn Any + Send + Sync>;

/// How a tensor lies whose elements do not lie together: row-major over its dimensions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    /// Bytes of an element.
    pub item: u32,
    /// Size and stride, in bytes, of each dimension, outermost first; at most [`View::DIMS`].
    pub dims: SmallVec<[(u64, i64); 4]>,
}

impl View {
    /// The most dimensions that a kernel knows.
    pub const DIMS: usize = 8;
}

/// Part of a tensor, and where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Where it is on the device; with a view, where the tensor is.
    pub from: u64,
    /// With a view, how many bytes of the packed tensor come before it.
    pub skip: u64,
    /// Where it goes: in the slot of its chunk, or an address.
    pub to: u64,
    /// How long it is.
    pub bytes: u64,
    /// How the tensor lies, by the number of its view; None for bytes that lie together.
    pub view: Option<u32>,
    /// The chunk, or whatever else pieces are put together by. They come in this order.
    pub chunk: usize,
}

/// Parts of tensors in the memory of one device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pieces {
    /// The parts.
    pub list: Vec<Piece>,
    /// How tensors lie that do not lie together.
    pub views: Vec<View>,
    /// How many chunks there are, some of which may have no piece.
    pub chunks: usize,
}

/// What is asked for of a device's own memory, in bytes.
#[derive(Debug)]
pub(crate) struct KernelMemory {
    /// The size of a chunk.
    pub chunk: usize,
    /// For what is captured at `save`; with 0 nothing is gathered.
    pub gather: u64,
    /// For the late copies of fences.
    pub scratch: u64,
    /// Where that is, if the program has memory of its own for it.
    pub lent: Option<LentMemory>,
}

/// Memory of a device that a program has handed in. Dropped when nothing on the device will use it any more.
pub(crate) struct LentMemory {
    /// The device.
    pub ordinal: u32,
    /// Where it begins.
    pub address: u64,
    /// What keeps it allocated.
    pub keep_alive: Box<dyn Any + Send + Sync>,
}

impl Debug for LentMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LentMemory(cuda:{}, {:#x})", self.ordinal, self.address)
    }
}

/// What a device does with kernels of its own, in memory of its own: it gathers small and strided tensors, so that they need not
/// cross the bus one by one; it digests tensors; and at a fence it makes late copies of what has not left it, so that no thread waits.
pub(crate) trait Kernels: Send + Sync + Debug {
    /// The device.
    fn ordinal(&self) -> u32;

    /// Where captured tensors may be put.
    fn room(&self) -> Range<u64>;

    /// The addresses of the slots of the scratch.
    ///
    /// # Errors
    /// Why there are none.
    fn slots(&self) -> Result<&[u64]>;

    /// Queues in `stream`: copy `pieces`, whose `to` are addresses in the room. What was queued is added to
    /// `queued` also where that fails: it reads the tensors until it has run.
    ///
    /// # Errors
    /// `Device`; `Invalid` for a stream that is being captured into a graph.
    fn capture(&self, stream: DeviceStream, pieces: &Pieces, queued: &mut Vec<Arc<dyn Queued>>) -> Result<()>;

    /// Queues in `stream`: digest `pieces`, all those of a chunk as one. `queued` as there.
    ///
    /// # Errors
    /// As [`Kernels::capture`].
    fn digest(
        &self,
        stream: DeviceStream,
        pieces: &Pieces,
        queued: &mut Vec<Arc<dyn Queued>>,
    ) -> Result<Arc<dyn Digests>>;

    /// The late copy of a save, the `number`-th from 1, with these tensors; `base` is what the watermark will be before its first chunk.
    /// None when there is no room for it now.
    ///
    /// # Errors
    /// `Device`.
    fn late_copy(&self, number: u64, base: u64, pieces: &Pieces) -> Result<Option<Box<dyn DeviceLateCopy>>>;
}

/// What a device offers whose streams can wait for a number in memory.
pub(crate) trait Waits: Send + Sync + Debug {
    /// How many fences may be pending.
    fn at_once(&self) -> usize;

    /// As [`Device::order`], but the waits also end when the last clone of what is returned is dropped, by a store to memory and
    /// without a call of the driver. None when too many are pending: nothing was queued.
    ///
    /// # Errors
    /// As [`Device::order`]; nothing waits then.
    fn order(&self, streams: &[DeviceStream]) -> Result<Option<Hold>>;
}

/// While it lives, streams wait.
pub(crate) type Hold = Arc<dyn Any + Send + Sync>;

/// Something that was queued in a stream of the program.
pub(crate) trait Queued: Send + Sync {
    /// True when it has run, or never will because the device is lost.
    fn over(&self) -> bool;
}

/// Digests that a device was asked for.
pub(crate) trait Digests: Send + Sync {
    /// Of each chunk, in order.
    ///
    /// # Errors
    /// `Device`, also when they are not there yet.
    fn take(&self) -> Result<Vec<Digest>>;
}

/// One save, as a device knows it that offers [`Kernels`]. Dropped only when no copy of the save is queued any more.
pub(crate) trait DeviceLateCopy: Send + Sync {
    /// Queues, with the copies: put the pieces of `chunk` together as they will lie in its slab. The address that stands for the
    /// first byte of the slab, until the next call.
    ///
    /// # Errors
    /// `Device`.
    fn gather(&self, chunk: usize) -> Result<u64>;

    /// Queues, with the copies: `watermark` chunks of all saves have left the device.
    ///
    /// # Errors
    /// `Device`.
    fn publish(&self, watermark: u64) -> Result<()>;

    /// Queues in the first of `streams`, behind `point`, and behind all copies queued so far if `behind_copies`: decide F from the
    /// watermark, make late copies of the chunks from F on, tell F. The other streams wait for that. `slots` are those of the last
    /// chunks. Once for a save, unless it fails.
    ///
    /// # Errors
    /// `Device`, `Invalid`: nothing was queued.
    fn launch(&self, streams: &[DeviceStream], point: &Point, behind_copies: bool, slots: &[u64]) -> Result<Launch>;

    /// Makes sure that F can still be told.
    ///
    /// # Errors
    /// `Device`: the device is lost.
    fn check(&self) -> Result<()>;
}

/// What was queued by [`DeviceLateCopy::launch`].
pub(crate) struct Launch {
    /// The kernels, or some of them.
    pub kernels: Arc<dyn FenceKernels>,
    /// That all of them were queued, and that all streams wait for them; or why not.
    pub queued: Result<()>,
}

/// Kernels of a fence that were queued. The last owner waits until they have run.
pub(crate) trait FenceKernels: Send + Sync {
    /// Makes `streams` wait for them.
    ///
    /// # Errors
    /// `Device`, or `Invalid`, as [`Device::order`].
    fn follow(&self, streams: &[DeviceStream]) -> Result<()>;

    /// True when they have run, or never will because the device is lost.
    fn over(&self) -> bool;

    /// F, once the device has told it: chunks before it had left the device, those from it on lie in their slots. A load from memory.
    fn latched(&self) -> Option<usize>;
}

/// The device of an executor, and why it is that.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DeviceReport {
    /// Its name: `host`, `cuda:0`.
    pub name: String,
    /// Why it was chosen, or what it is.
    pub why: String,
    /// How much small state the device can gather at `save`, in bytes; or why it does not: small tensors cross the bus one by one
    /// then and are taken at the fence, and strided ones are refused.
    pub gather: Result<u64, String>,
    /// How many chunks a fence can copy late on the device; or why it waits for copies to the host instead.
    pub scratch: Result<usize, String>,
    /// How many fences may be pending whose waits end when their saves have failed; or why streams wait for events, whatever
    /// becomes of the saves.
    pub memory_waits: Result<usize, String>,
    /// That the copies of a chunk are queued in one call; or why each is a call of its own.
    pub batch: Result<(), String>,
    /// The embedded kernels: [`KERNELS`](crate::KERNELS).
    pub kernels: &'static str,
}

impl DeviceReport {
    pub(crate) fn new(device: &dyn Device, why: String) -> Self {
        let unknown = || "not looked for".to_owned();
        Self {
            name: device.name(),
            why,
            gather: Err(unknown()),
            scratch: Err(unknown()),
            memory_waits: Err(unknown()),
            batch: Err(unknown()),
            kernels: crate::KERNELS,
        }
    }

    /// Takes note of the kernels that there are, or of why there are none.
    pub(crate) fn found(&mut self, kernels: &Result<Arc<dyn Kernels>>) {
        match kernels {
            Ok(kernels) => {
                let (room, none) = (kernels.room(), "no memory was asked for setting=gather");
                self.gather = if room.is_empty() { Err(none.into()) } else { Ok(room.end - room.start) };
                self.scratch = kernels.slots().map(<[u64]>::len).map_err(|why| format!("{why:#}"));
            }
            Err(why) => {
                let why = format!("{why:#}");
                (self.gather, self.scratch) = (Err(why.clone()), Err(why));
            }
        }
    }
}

impl fmt::Display for DeviceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.why)
    }
}

/// The device that `choice` comes to on this machine.
///
/// # Errors
/// `Unavailable` or `Device`, naming what is missing, for a GPU that was asked for and is not to be had.
pub fn choose(choice: DeviceChoice) -> Result<(Arc<dyn Device>, DeviceReport)> {
    let host = |why: String| -> (Arc<dyn Device>, DeviceReport) { (Arc::new(Host), DeviceReport::new(&Host, why)) };
    match choice {
        DeviceChoice::Host => Ok(host("as asked for".into())),
        DeviceChoice::Cuda(ordinal) => cuda_device(ordinal),
        DeviceChoice::Auto => Ok(cuda_device(0).unwrap_or_else(|error| {
            let why = format!("{error:#}");
            // Not a field `error`: a machine without a GPU has none.
            tracing::info!(reason = %why, "no GPU: tensors are copied by the host");
            host(why)
        })),
    }
}

#[cfg(all(feature = "cuda", not(any(loom, miri))))]
fn cuda_device(ordinal: u32) -> Result<(Arc<dyn Device>, DeviceReport)> {
    let device = Cuda::new(ordinal)?;
    let report = DeviceReport::new(&device, device.describe().to_owned());
    tracing::info!(device = %report, "tensors are copied by a GPU");
    Ok((Arc::new(device), report))
}

#[cfg(not(all(feature = "cuda", not(any(loom, miri)))))]
fn cuda_device(ordinal: u32) -> Result<(Arc<dyn Device>, DeviceReport)> {
    Err(Error::new(ErrorKind::Unavailable, format!("built without the feature cuda device=cuda:{ordinal}")))
}

/// A first-in first-out queue of copies into slabs.
pub trait CopyQueue {
    /// Queues a copy of `len` bytes. The digest of the bytes, where the copy was made by this thread and is done; None when
    /// it comes later, and the bytes are to be digested by whoever reads them from the slab.
    ///
    /// # Safety
    /// `from` stays readable, and `to` writable and otherwise untouched, until a later mark is reached.
    ///
    /// # Errors
    /// `Device`, sticky.
    #[expect(unsafe_code, reason = "the contract of an asynchronous copy; the stager, its one caller, keeps it")]
    unsafe fn copy(&mut self, from: *const u8, to: *mut u8, len: usize) -> Result<Option<Digest>>;

    /// Everything queued from now on comes after `point`.
    ///
    /// # Errors
    /// `Device`, sticky.
    fn wait(&mut self, _point: &Point) -> Result<()> {
        Ok(())
    }

    /// Queues a copy of `len` bytes from the memory of device `ordinal`.
    ///
    /// # Safety
    /// As [`CopyQueue::copy`], but that it is the device which can read `from`.
    ///
    /// # Errors
    /// `Device`, sticky; `Invalid` for a device that it knows nothing of.
    #[expect(unsafe_code, reason = "as for `copy`")]
    unsafe fn fetch(&mut self, ordinal: u32, _from: *const u8, _to: *mut u8, _len: usize) -> Result<()> {
        Err(Error::new(ErrorKind::Invalid, format!("no copies from this device device=cuda:{ordinal}")))
    }

    /// From now on what is fetched may be held back until [`CopyQueue::flush`], or the next mark, and queued in one call there.
    fn batch(&mut self) {}

    /// Queues what is held back. Not to be called after a failure: [`CopyQueue::quiesce`] drops it.
    ///
    /// # Errors
    /// `Device`, sticky.
    fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    /// Queues a mark behind the copies so far, and returns its number: 1, 2, 3, ...
    ///
    /// # Errors
    /// `Device`, sticky.
    fn mark(&mut self) -> Result<u64>;

    /// The number of the last mark reached; never falls.
    ///
    /// # Errors
    /// `Device`, sticky.
    fn reached(&mut self) -> Result<u64>;

    /// Waits, after a failure, until no copy queued so far will touch memory any more; what is held back never will. False when
    /// that cannot be known by `deadline`: sources and slabs are then given up, never reused.
    fn quiesce(&mut self, deadline: Instant) -> bool;
}

/// A queue of copies from host memory to devices, beside those of saves. What it queues to one device runs in order.
pub(crate) trait LoadQueue {
    /// Everything queued from now on comes after `point`, which [`Device::behind`] made.
    ///
    /// # Errors
    /// `Device`, sticky.
    fn wait(&mut self, point: &Point) -> Result<()>;

    /// Queues a copy of `len` bytes to the address `to` of device `ordinal`.
    ///
    /// # Safety
    /// `from` stays readable and unchanged, and `to` writable on that device, until a later mark is reached or the queue is
    /// quiescent.
    ///
    /// # Errors
    /// `Device`; the copy may have been queued all the same.
    #[expect(unsafe_code, reason = "the contract of an asynchronous copy; the restore, its one caller, keeps it")]
    unsafe fn load(&mut self, ordinal: u32, from: *const u8, to: u64, len: usize) -> Result<()>;

    /// A point behind the copies so far.
    ///
    /// # Errors
    /// `Device`.
    fn mark(&mut self) -> Result<Point>;

    /// Whether all copies before this mark have ended.
    ///
    /// # Errors
    /// `Device`: they have failed, or that cannot be known now.
    fn has_reached(&mut self, mark: &Point) -> Result<bool>;

    /// Waits, after a failure, until no copy queued so far will touch memory any more. False when that cannot be known by
    /// `deadline`.
    fn quiesce(&mut self, deadline: Instant) -> bool;
}
