//! Kernels of a device: they capture, digest and gather tensors, and make late copies.
//!
//! Work that the kernels queue in the program's streams reads the tensors later. Each piece of work reports
//! when it has run, and the stager keeps its sources until then. `staging/late_copy.rs` has the states of a
//! late copy; the device keeps no such state.

use super::{Dependency, Pieces};
use crate::digest::Digest;
use crate::error::Result;
use crate::state::DeviceStream;
use std::any::Any;
use std::fmt::{self, Debug};
use std::ops::Range;
use std::sync::Arc;

/// Requested amounts of device memory, in bytes.
#[derive(Debug)]
pub(crate) struct KernelMemory {
    /// Ordinal of the device whose kernels are loaded. None means the executor's device.
    pub ordinal: Option<u32>,
    /// The size of a chunk.
    pub chunk: usize,
    /// Size of the capture pool. With 0 nothing is gathered.
    pub gather: u64,
    /// Size of the scratch for late copies.
    pub scratch: u64,
    /// The program's own memory for the scratch, if the program hands it in.
    pub given: Option<ProgramMemory>,
}

/// Device memory that the program hands in. It is dropped when nothing on the device can use it any more.
pub(crate) struct ProgramMemory {
    /// Ordinal of the device.
    pub ordinal: u32,
    /// Its start address.
    pub address: u64,
    /// Keeps the memory allocated.
    pub keep_alive: Box<dyn Any + Send + Sync>,
}

impl Debug for ProgramMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LentMemory(cuda:{}, {:#x})", self.ordinal, self.address)
    }
}

/// Kernels of one device, with their own device memory. They gather small and strided tensors, so that these
/// need not cross the bus one by one. They digest tensors. At a fence they make late copies of the data that
/// has not left the device, so that no thread waits.
pub(crate) trait Kernels: Send + Sync + Debug {
    /// Ordinal of the device.
    fn ordinal(&self) -> u32;

    /// Address range of the capture pool.
    fn capture_memory(&self) -> Range<u64>;

    /// The addresses of the slots of the scratch.
    ///
    /// # Errors
    /// The reason there is no scratch.
    fn slots(&self) -> Result<&[u64]>;

    /// Queues a copy of `pieces` in `stream`; each `to` is an address in the capture pool. `queued` receives
    /// the queued work, also on failure. This work reads the tensors until it has run.
    ///
    /// # Errors
    /// `Device`; `Invalid` for a stream that is being captured into a graph.
    fn capture(&self, stream: DeviceStream, pieces: &Pieces, queued: &mut Vec<Arc<dyn Queued>>) -> Result<()>;

    /// Queues digests of `pieces` in `stream`, one per chunk. `queued` is as in [`Kernels::capture`].
    ///
    /// # Errors
    /// As [`Kernels::capture`].
    fn digest(
        &self,
        stream: DeviceStream,
        pieces: &Pieces,
        queued: &mut Vec<Arc<dyn Queued>>,
    ) -> Result<Arc<dyn Digests>>;

    /// Prepares the late copy of the `number`-th save, counted from 1. `base` is the watermark before its
    /// first chunk. Returns None when the device tracks too many saves already.
    ///
    /// # Errors
    /// `Device`.
    fn late_copy(&self, number: u64, base: u64, pieces: &Pieces) -> Result<Option<Box<dyn DeviceLateCopy>>>;
}

/// Work that was queued in a stream of the program.
pub(crate) trait Queued: Send + Sync {
    /// True when the work has run, or never will because the device is lost.
    fn over(&self) -> bool;
}

/// Digests that were queued on a device.
pub(crate) trait Digests: Send + Sync {
    /// Returns the digest of each chunk, in order.
    ///
    /// # Errors
    /// `Device`, also when the digests did not arrive in time.
    fn take(&self) -> Result<Vec<Digest>>;
}

/// A device's part of one save. It is dropped only when no copy of the save is queued any more.
pub(crate) trait DeviceLateCopy: Send + Sync {
    /// Queues, in the stream of copies, a gather of the pieces of `chunk` into the layout that they have in
    /// their slab. Returns the device address that corresponds to the first byte of the slab, valid until the
    /// next call.
    ///
    /// # Errors
    /// `Device`.
    fn gather(&self, chunk: usize) -> Result<u64>;

    /// Queues, in the stream of copies, a store of the watermark: this device's parts of `watermark` chunks,
    /// counted over all saves, have left the device.
    ///
    /// # Errors
    /// `Device`.
    fn publish(&self, watermark: u64) -> Result<()>;

    /// Refuses streams, of any device, that are being captured into a graph.
    ///
    /// # Errors
    /// `Invalid`; `Device`.
    fn refuse_captures(&self, streams: &[DeviceStream]) -> Result<()>;

    /// Queues the kernels of a fence in `stream`, or in a stream of ours where the fence has no stream of
    /// this device. They run behind the part of `dependency` on this device and, if `behind_copies`, behind
    /// all copies of this device queued so far. They latch F from the watermark, make late copies of this
    /// device's parts of the chunks from F on, and report F. `slots` are the slots of the last chunks, 0 for
    /// a chunk without a part here. Called once per save, unless it fails.
    ///
    /// # Errors
    /// `Device`, `Invalid`: nothing was queued.
    fn launch(
        &self,
        stream: Option<DeviceStream>,
        dependency: &Dependency,
        behind_copies: bool,
        slots: &[u64],
    ) -> Result<Launch>;

    /// Checks that the device can still report F.
    ///
    /// # Errors
    /// `Device`: the device is lost.
    fn check(&self) -> Result<()>;
}

/// What [`DeviceLateCopy::launch`] queued.
pub(crate) struct Launch {
    /// The queued kernels, possibly not all of them.
    pub kernels: Arc<dyn FenceKernels>,
    /// Ok if all kernels were queued.
    pub queued: Result<()>,
}

/// The queued kernels of a fence. Dropping the last reference waits until they have run.
pub(crate) trait FenceKernels: Send + Sync {
    /// Makes `streams` wait for the kernels.
    ///
    /// # Errors
    /// `Device`, or `Invalid`, as [`Device::order`].
    fn follow(&self, streams: &[DeviceStream]) -> Result<()>;

    /// True when the kernels have run, or never will because the device is lost.
    fn over(&self) -> bool;

    /// F, once the device has reported it: the device's parts of the chunks before F had left it, and its
    /// parts of the chunks from F on are in their slots. The call loads from memory and makes no driver call.
    fn latched(&self) -> Option<usize>;
}
