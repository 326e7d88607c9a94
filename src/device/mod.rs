//! Devices: how bytes get from where a tensor lives into a slab.
//!
//! **Consistency.** A queue is first-in first-out: marks are reached in order, and a mark is reached only when every copy
//! before it has ended. **Completion.** [`CopyQueue::reached`] is the watermark, a count that never falls. **Cancellation.**
//! Copies cannot be taken back: whoever queues one keeps source and slab until its mark is reached. **Failure.** Errors are
//! sticky; after one, no mark need ever be reached.
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
use std::any::Any;
use std::fmt::{self, Debug};
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

    /// Called by a fence, in its thread: whatever comes to `streams` later waits for all copies that have been queued so far.
    ///
    /// # Errors
    /// As [`Device::behind`].
    fn order(&self, streams: &[DeviceStream]) -> Result<()> {
        if streams.is_empty() { Ok(()) } else { Err(self.unknown(streams)) }
    }

    /// Called once, at start: late copies with `scratch` bytes of the device, in slots of `chunk` bytes.
    ///
    /// # Errors
    /// Why there are none.
    fn late_copies(&self, _chunk: usize, _scratch: u64) -> Result<Arc<dyn LateCopies>> {
        Err(Error::new(ErrorKind::Unavailable, "this device makes none"))
    }

    /// A queue of copies to devices, made in the thread that will use it.
    ///
    /// # Errors
    /// `Unavailable` when it makes none; `Device`.
    fn loads(&self) -> Result<Box<dyn LoadQueue>> {
        Err(Error::new(ErrorKind::Unavailable, format!("nothing is copied to this device device={}", self.name())))
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

/// Part of a tensor, and where it goes in its chunk.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Where it is on the device.
    pub from: u64,
    /// Where it goes in the slot of its chunk.
    pub to: u64,
    /// How long it is.
    pub bytes: u64,
    /// The chunk. Pieces come in the order of their chunks.
    pub chunk: usize,
}

/// What a device offers so that a fence need not wait for copies to the host: memory of its own, in slots of a chunk each, and
/// kernels that copy aside what has not left the device when a stream comes to the fence.
pub trait LateCopies: Send + Sync + Debug {
    /// The device.
    fn ordinal(&self) -> u32;

    /// The addresses of the slots.
    fn slots(&self) -> &[u64];

    /// Takes note of the device tensors of a save of `chunks` chunks, the `number`-th from 1; `base` is what the watermark will
    /// be before its first chunk. None when there is no room for it now.
    ///
    /// # Errors
    /// `Device`.
    fn note(&self, number: u64, base: u64, chunks: usize, pieces: &[Piece]) -> Result<Option<Box<dyn LateSave>>>;
}

/// One save, as a device knows it that offers [`LateCopies`]. Dropped only when it is not launched, or has told F.
pub trait LateSave: Send + Sync {
    /// Queues in the first of `streams`, behind `point`, and behind all copies queued so far if `behind_copies`: decide F from the
    /// watermark, copy the chunks from F on aside, tell F. The other streams wait for that. `slots` are those of the last
    /// chunks. Once.
    ///
    /// # Errors
    /// `Device`: the slots are lost. `Invalid`: nothing was queued.
    fn launch(&self, streams: &[DeviceStream], point: &Point, behind_copies: bool, slots: &[u64]) -> Result<()>;

    /// Makes `streams` wait for what was launched.
    ///
    /// # Errors
    /// `Device`, or `Invalid`, as [`Device::order`].
    fn follow(&self, streams: &[DeviceStream]) -> Result<()>;

    /// True when the kernels have run, or never will because the device is lost.
    fn over(&self) -> bool;

    /// F, once the device has told it: chunks before it had left the device, those from it on lie in their slots.
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
    /// How many chunks a fence can set aside on the device; or why it waits for copies to the host instead.
    pub scratch: Result<usize, String>,
}

impl DeviceReport {
    pub(crate) fn new(device: &dyn Device, why: String) -> Self {
        Self { name: device.name(), why, scratch: Err("not looked for".into()) }
    }
}

impl fmt::Display for DeviceReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.why)
    }
}

/// What [`Builder::device`](crate::Builder::device) takes: a choice, or a device that somebody made.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Selected {
    /// Looked for when the executor is built.
    Choice(DeviceChoice),
    /// This one.
    Made(Arc<dyn Device>),
}

impl From<DeviceChoice> for Selected {
    fn from(choice: DeviceChoice) -> Self {
        Self::Choice(choice)
    }
}

impl From<Arc<dyn Device>> for Selected {
    fn from(device: Arc<dyn Device>) -> Self {
        Self::Made(device)
    }
}

impl<D: Device + 'static> From<Arc<D>> for Selected {
    fn from(device: Arc<D>) -> Self {
        Self::Made(device)
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
            tracing::info!(%error, "tensors are copied by the host");
            host(error.to_string())
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

    /// Publishes, behind the copies so far, that `watermark` chunks of all saves have left the device.
    ///
    /// # Errors
    /// `Device`, sticky.
    fn publish(&mut self, _watermark: u64) -> Result<()> {
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

    /// Waits, after a failure, until no copy queued so far will touch memory any more. False when that cannot be known by
    /// `deadline`: sources and slabs are then given up, never reused.
    fn quiesce(&mut self, deadline: Instant) -> bool;
}

/// A queue of copies from host memory to devices, beside those of saves. What it queues to one device runs in order.
pub trait LoadQueue {
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
