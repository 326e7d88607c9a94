//! The queue of copies from tensors into slabs.
//!
//! # Safety argument
//! This file states the contracts of asynchronous copies. Its one unsafe body copies nothing and returns an
//! error.

use super::Dependency;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use smallvec::SmallVec;
use std::time::{Duration, Instant};

/// When a device made its copies of one chunk, on the host's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyTime {
    /// The device.
    pub ordinal: u32,
    /// When the copies began.
    pub begin: Instant,
    /// When the copies ended.
    pub end: Instant,
    /// The maximum error of both times.
    pub error: Duration,
}

/// A first-in first-out queue of copies into slabs.
pub trait CopyQueue {
    /// Queues a copy of `len` bytes. Returns the digest if this thread has already made the copy. Returns
    /// None if the copy ends later: the reader of the slab must then digest the bytes.
    ///
    /// # Safety
    /// `from` stays readable, and `to` writable and otherwise untouched, until a later mark is reached.
    ///
    /// # Errors
    /// `Device`, sticky.
    #[expect(unsafe_code, reason = "the contract of an asynchronous copy; the stager, its one caller, keeps it")]
    unsafe fn copy(&mut self, from: *const u8, to: *mut u8, len: usize) -> Result<Option<Digest>>;

    /// Makes everything queued from now on wait for the dependency `dependency`.
    ///
    /// # Errors
    /// `Device`, sticky.
    fn wait(&mut self, _point: &Dependency) -> Result<()> {
        Ok(())
    }

    /// Queues a copy of `len` bytes from the memory of device `ordinal`.
    ///
    /// # Safety
    /// As [`CopyQueue::copy`], except that only device `ordinal` needs to be able to read `from`.
    ///
    /// # Errors
    /// `Device`, sticky; `Invalid` for an unknown device.
    #[expect(unsafe_code, reason = "as for `copy`")]
    unsafe fn fetch(&mut self, ordinal: u32, _from: *const u8, _to: *mut u8, _len: usize) -> Result<()> {
        Err(Error::new(ErrorKind::Invalid, format!("no copies from this device device=cuda:{ordinal}")))
    }

    /// Allows the queue to hold back later fetches until [`CopyQueue::flush`] or the next mark, which queues
    /// them in one call.
    fn batch(&mut self) {}

    /// Queues the copies that are held back. Must not be called after a failure: [`CopyQueue::quiesce`] drops
    /// these copies.
    ///
    /// # Errors
    /// `Device`, sticky.
    fn flush(&mut self) -> Result<()> {
        Ok(())
    }

    /// Queues a completion event behind the copies so far, and returns the event's number: 1, 2, 3, ...
    ///
    /// # Errors
    /// `Device`, sticky.
    fn event(&mut self) -> Result<u64>;

    /// The number of the last completion event reached. It never falls.
    ///
    /// # Errors
    /// `Device`, sticky.
    fn reached(&mut self) -> Result<u64>;

    /// Turns the measurement of copy times on or off. Called before the first copy of each save.
    fn measure(&mut self, _on: bool) {}

    /// Takes the measured times of the copies for which the completion event `event`, which is reached, is
    /// the first event behind them: one time for each device that copied.
    fn times(&mut self, _event: u64) -> SmallVec<[CopyTime; 1]> {
        SmallVec::new()
    }

    /// Waits, after a failure, until no copy queued so far can touch memory any more, and drops copies that
    /// are held back. Returns false when the queue cannot know that by `deadline`: the caller then leaks
    /// sources and slabs, and never reuses them.
    fn quiesce(&mut self, deadline: Instant) -> bool;
}
