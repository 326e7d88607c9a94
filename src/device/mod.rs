//! Devices: how bytes get from where a tensor lives into a slab.
//!
//! **Consistency.** A queue is first-in first-out: marks are reached in order, and a mark is reached only when every copy
//! before it has ended. **Completion.** [`CopyQueue::reached`] is the watermark, a count that never falls. **Cancellation.**
//! Copies cannot be taken back: whoever queues one keeps source and slab until its mark is reached. **Failure.** Errors are
//! sticky; after one, no mark need ever be reached.

mod host;

pub use host::Host;

use crate::digest::Digest;
use crate::error::Result;
use crate::memory::Register;
use std::fmt::Debug;
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
