//! The queue of copies from tensors into slabs.
//!
//! # Safety argument
//! Contracts of asynchronous copies, and one body that copies nothing: it refuses.

use super::Point;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use std::time::Instant;

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
