//! Devices: how bytes get from where a tensor lives into a slab.
//!
//! **Consistency.** A queue is first-in first-out: marks are reached in order, and a mark is reached only when every copy
//! before it has ended. **Completion.** [`CopyQueue::reached`] is the watermark, a count that never falls. **Cancellation.**
//! Copies cannot be taken back: whoever queues one keeps source and slab until its mark is reached. **Failure.** Errors are
//! sticky; after one, no mark need ever be reached.
//!
//! What the devices of this crate do with addresses as numbers is for it alone:
//! ```compile_fail,E0432
//! use ashore::internal::device::{Kernels, LentMemory, DeviceLateCopy};
//! ```

mod auto;
mod copy_queue;
#[cfg(all(feature = "cuda", not(any(loom, miri))))]
mod cuda;
mod host;
mod kernels;
mod load_queue;
mod pieces;
mod selection;
mod waits;

pub use auto::choose;
pub(crate) use auto::choose_later;
pub use copy_queue::CopyQueue;
#[cfg(all(feature = "cuda", not(any(loom, miri))))]
pub use cuda::Cuda;
pub use host::Host;
pub(crate) use kernels::{DeviceLateCopy, Digests, FenceKernels, KernelMemory, Kernels, Launch, LentMemory, Queued};
pub(crate) use load_queue::LoadQueue;
pub(crate) use pieces::{Piece, Pieces, View};
pub use selection::DeviceReport;
pub(crate) use waits::{Hold, Waits};

use crate::error::{Error, ErrorKind, Result};
use crate::memory::Register;
pub use crate::settings::DeviceChoice;
use crate::state::DeviceStream;
use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

/// A kind of device, shared by all threads.
pub trait Device: Register + Send + Sync + Debug {
    /// Its name in messages: `host`, `cuda:0`.
    fn name(&self) -> String;

    /// Whether it is known which device it is.
    #[doc(hidden)]
    fn is_settled(&self) -> bool {
        true
    }

    /// Called by `save`, in its thread, before anything else is asked for tensors of these streams, where [`Device::is_settled`] was not
    /// true at start: decides which device it is, and says what that one calls itself.
    ///
    /// # Errors
    /// `Unavailable` for a device that is not there; `Device`. It is not settled then.
    #[doc(hidden)]
    fn settle(&self, _streams: &[DeviceStream]) -> Result<String> {
        Ok(self.name())
    }

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
