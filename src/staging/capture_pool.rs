//! Memory of a device for captured tensors, in allocations of saves.
//!
//! An allocation is kept by its save until no copy from it is queued, no kernel of a fence will read it and what is to be written there
//! has been; allocations that are kept do not overlap, and the program knows no address in the pool.

use crate::device::Queued;
use crate::mutant::{self, Mutant};
use crate::sync::{Mutex, lock};
use std::sync::Arc;

/// Memory of the device for captured tensors, in allocations of saves.
pub(crate) struct CapturePool {
    pub(super) start: u64,
    pub(super) len: u64,
    allocations: Mutex<Vec<Taken>>,
}

/// An allocation, from `begin` to `end` of its pool.
struct Taken {
    begin: u64,
    end: u64,
    /// Nobody will read it any more.
    over: bool,
    /// What writes it.
    writing: Vec<Arc<dyn Queued>>,
}

impl std::fmt::Debug for CapturePool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CapturePool({} bytes)", self.len)
    }
}

impl CapturePool {
    pub fn new(memory: std::ops::Range<u64>) -> Arc<Self> {
        Arc::new(Self { start: memory.start, len: memory.end - memory.start, allocations: Mutex::default() })
    }

    /// The longest part that is free: its begin and length. The whole pool when no save needs any: the same addresses again and
    /// again keep the lists of the device the same.
    pub(super) fn span(&self) -> (u64, u64) {
        let mut allocations = lock(&self.allocations);
        allocations.retain_mut(|taken| !taken.free());
        allocations.sort_unstable_by_key(|taken| taken.begin);
        let ends = std::iter::once(0).chain(allocations.iter().map(|taken| taken.end));
        let begins = allocations.iter().map(|taken| taken.begin).chain(std::iter::once(self.len));
        let gaps = ends.zip(begins).map(|(end, begin)| (end, begin - end));
        gaps.max_by_key(|(_, len)| *len).unwrap_or((0, 0))
    }
}

impl Taken {
    /// Nobody reads it, and what was to be written there is: a save may fail before its tensors are captured.
    fn free(&mut self) -> bool {
        self.writing.retain(|queued| !queued.over());
        self.over && self.writing.is_empty()
    }
}

/// Part of the pool, until it is dropped.
pub(crate) struct Allocation {
    pool: Arc<CapturePool>,
    begin: u64,
}

impl Allocation {
    /// From the begin of a part that is free up to `end`. Allocations are taken by one save at a time.
    pub(super) fn take(pool: &Arc<CapturePool>, begin: u64, end: u64) -> Self {
        let over = mutant::on(Mutant::RoomEarly);
        lock(&pool.allocations).push(Taken { begin, end, over, writing: Vec::new() });
        Self { pool: pool.clone(), begin }
    }

    /// Stays until this has run.
    pub(super) fn wait_for(&self, queued: Arc<dyn Queued>) {
        self.change(|taken| taken.writing.push(queued));
    }

    fn change(&self, change: impl FnOnce(&mut Taken)) {
        let mut allocations = lock(&self.pool.allocations);
        allocations.iter_mut().find(|taken| taken.begin == self.begin).map(change);
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.change(|taken| taken.over = true);
    }
}
