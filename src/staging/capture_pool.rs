//! The capture pool: device memory for captured tensors. Each save has one allocation in it.
//!
//! A save keeps its allocation until no copy from it is queued, no kernel of a fence will read it, and all
//! queued writes to it are done. Kept allocations do not overlap, and the program knows no address in the
//! pool.

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
    /// No copy or kernel will read it any more.
    over: bool,
    /// Queued work that writes it.
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

    /// The longest free part of the pool: its begin and length. It is the whole pool when no save has an
    /// allocation, so that saves get the same addresses again and the device's lists stay the same.
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
    /// True if nothing reads the allocation and all queued writes to it are done. A save may fail before its
    /// tensors are captured.
    fn free(&mut self) -> bool {
        self.writing.retain(|queued| !queued.over());
        self.over && self.writing.is_empty()
    }
}

/// The part of the pool that one save has; dropping this frees it.
pub(crate) struct Allocation {
    pool: Arc<CapturePool>,
    begin: u64,
}

impl Allocation {
    /// Allocates from the begin of a free part up to `end`. Only one save at a time allocates.
    pub(super) fn take(pool: &Arc<CapturePool>, begin: u64, end: u64) -> Self {
        let over = mutant::on(Mutant::RoomEarly);
        lock(&pool.allocations).push(Taken { begin, end, over, writing: Vec::new() });
        Self { pool: pool.clone(), begin }
    }

    /// Keeps the allocation until `queued` has run.
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
