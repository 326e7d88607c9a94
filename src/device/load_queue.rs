//! The queue of copies of a restore from slabs to devices.
//!
//! # Safety argument
//! The contract of an asynchronous copy, without a body.

use super::Point;
use crate::error::Result;
use std::time::Instant;

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
