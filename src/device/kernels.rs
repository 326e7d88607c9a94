//! What a device can do with kernels of its own: capture, digest and gather tensors, and make late copies of them.
//!
//! What these queue in streams of the program reads the tensors later: each says when it has run, and the stager keeps sources until
//! then. The states of a late copy are those of `staging/late_copy.rs`; the device keeps none.

use super::{Pieces, Point};
use crate::digest::Digest;
use crate::error::Result;
use crate::state::DeviceStream;
use std::any::Any;
use std::fmt::{self, Debug};
use std::ops::Range;
use std::sync::Arc;

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
