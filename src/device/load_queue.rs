//! The queue of copies of a restore from slabs to devices.
//!
//! # Safety argument
//! This file states the contract of an asynchronous copy, without a body.

use super::Dependency;
use crate::error::Result;
use std::time::Instant;

/// Rows of `width` bytes that one copy moves. The starts of the rows are `from_pitch` apart in host memory
/// and `to_pitch` apart on the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowLayout {
    pub width: usize,
    pub height: usize,
    pub from_pitch: usize,
    pub to_pitch: u64,
}

impl RowLayout {
    /// The longest distance between rows that every GPU supports.
    pub const PITCH_MAX: usize = i32::MAX as usize;
}

/// A queue of copies from host memory to devices, separate from the queues of saves. Copies to one device run
/// in order.
pub(crate) trait LoadQueue {
    /// Makes everything queued from now on wait for `dependency`, which [`Device::behind`] made.
    ///
    /// # Errors
    /// `Device`, sticky.
    fn wait(&mut self, dependency: &Dependency) -> Result<()>;

    /// Queues a copy of `rows` to the address `to` of device `ordinal`.
    ///
    /// # Safety
    /// Every row from `from` on stays readable and unchanged, and every row from `to` on writable on that
    /// device, until a later mark is reached or the queue is quiescent.
    ///
    /// # Errors
    /// `Device`; the copy may still be queued.
    #[expect(unsafe_code, reason = "the contract of an asynchronous copy; the restore, its one caller, keeps it")]
    unsafe fn load(&mut self, ordinal: u32, from: *const u8, to: u64, rows: RowLayout) -> Result<()>;

    /// Makes a completion event behind the copies so far.
    ///
    /// # Errors
    /// `Device`.
    fn event(&mut self) -> Result<Dependency>;

    /// True when all copies before this mark have ended.
    ///
    /// # Errors
    /// `Device`: the copies failed, or their state is unknown now.
    fn has_reached(&mut self, event: &Dependency) -> Result<bool>;

    /// Waits, after a failure, until no copy queued so far can touch memory any more. Returns false when the
    /// queue cannot know that by `deadline`.
    fn quiesce(&mut self, deadline: Instant) -> bool;
}
