//! Devices copy bytes from a tensor's memory location into a slab.
//!
//! **Consistency.** A queue is first in, first out. Its marks, the completion events, are reached in order,
//! each only when every copy before it has ended.
//! **Completion.** [`CopyQueue::reached`] is the watermark, a count that never falls.
//! **Cancellation.** Copies cannot be cancelled. The caller that queues a copy keeps its source and slab
//! until the copy's mark is reached.
//! **Failure.** Errors are sticky. After an error, a mark may never be reached.
//!
//! The kernel interfaces are private to this crate, because they use addresses as numbers:
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
pub use copy_queue::{CopyQueue, CopyTime};
#[cfg(all(feature = "cuda", not(any(loom, miri))))]
pub use cuda::Cuda;
pub use host::Host;
#[cfg(any(test, all(feature = "cuda", not(any(loom, miri)))))]
pub(crate) use kernels::Launch;
pub(crate) use kernels::{DeviceLateCopy, Digests, FenceKernels, KernelMemory, Kernels, ProgramMemory, Queued};
pub(crate) use load_queue::{LoadQueue, RowLayout};
pub(crate) use pieces::{Piece, Pieces, View};
pub use selection::DeviceReport;
pub(crate) use waits::{WaitGuard, Waits};

use crate::error::{Error, ErrorKind, Result};
use crate::memory::Register;
pub use crate::settings::DeviceChoice;
use crate::state::DeviceStream;
use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

/// A device that copies tensors, shared by all threads.
pub trait Device: Register + Send + Sync + Debug {
    /// The device's name in messages: `host`, `cuda:0`.
    fn name(&self) -> String;

    /// True once a concrete device is chosen.
    #[doc(hidden)]
    fn is_settled(&self) -> bool {
        true
    }

    /// Chooses the concrete device for tensors of these streams, and returns its description. If
    /// [`Device::is_settled`] was false at start, `save` calls this first, in its own thread.
    ///
    /// # Errors
    /// `Unavailable` for a missing device; `Device`. The device then stays unsettled.
    #[doc(hidden)]
    fn settle(&self, _streams: &[DeviceStream]) -> Result<String> {
        Ok(self.name())
    }

    /// Creates a copy queue, in the thread that will use it.
    ///
    /// # Errors
    /// `Device` when no queue is available.
    fn queue(&self) -> Result<Box<dyn CopyQueue>>;

    /// Makes a dependency on all work that is in `streams` now, for [`CopyQueue::wait`]. `save` calls it in
    /// its own thread.
    ///
    /// # Errors
    /// `Invalid` for streams of an unknown device, and for a stream that is being captured into a graph;
    /// `Device`.
    fn behind(&self, streams: &[DeviceStream]) -> Result<Dependency> {
        Err(self.unknown(streams))
    }

    /// Makes later work in `streams` wait for all copies queued so far. A fence calls it in its own thread. A
    /// device with streams copies from host memory before [`CopyQueue::copy`] returns, so no stream waits for
    /// those copies.
    ///
    /// # Errors
    /// As [`Device::behind`].
    fn order(&self, streams: &[DeviceStream]) -> Result<()> {
        if streams.is_empty() { Ok(()) } else { Err(self.unknown(streams)) }
    }

    /// Loads the kernels, with the given amounts of device memory. Called once, at start.
    ///
    /// # Errors
    /// The reason there are no kernels.
    #[doc(hidden)]
    #[expect(private_interfaces, reason = "for the devices of this crate")]
    fn kernels(&self, _memory: KernelMemory) -> Result<Arc<dyn Kernels>> {
        Err(Error::new(ErrorKind::Unavailable, "this device has no kernels"))
    }

    /// Creates stream waits that the host can end. Called at most once, at start.
    ///
    /// # Errors
    /// The reason there are no such waits.
    #[doc(hidden)]
    #[expect(private_interfaces, reason = "for the devices of this crate")]
    fn waits(&self) -> Result<Arc<dyn Waits>> {
        Err(Error::new(ErrorKind::Unavailable, "this device has no memory-waits"))
    }

    /// Creates a queue of copies to devices, in the thread that will use it.
    ///
    /// # Errors
    /// `Unavailable` when the device supports no such queue; `Device`.
    #[doc(hidden)]
    #[expect(private_interfaces, reason = "for the devices of this crate")]
    fn loads(&self) -> Result<Box<dyn LoadQueue>> {
        Err(Error::new(
            ErrorKind::Unavailable,
            format!("copies to this device are not supported device={}", self.name()),
        ))
    }

    /// Checks that the copy queues can queue many copies in one call ([`CopyQueue::batch`]). Called once, at
    /// start, if batching is requested.
    ///
    /// # Errors
    /// The reason they cannot.
    fn batches(&self) -> Result<()> {
        Err(Error::new(ErrorKind::Unavailable, format!("this device cannot batch copies device={}", self.name())))
    }

    /// The error for streams of an unknown device.
    fn unknown(&self, streams: &[DeviceStream]) -> Error {
        let ordinal = streams.first().map_or(0, |stream| stream.ordinal);
        let name = self.name();
        Error::invalid(format!("this executor cannot read tensors of a GPU executor={name} tensors=cuda:{ordinal}"))
    }
}

/// A dependency on work in streams, in the form of the device that made it.
pub type Dependency = Arc<dyn Any + Send + Sync>;
