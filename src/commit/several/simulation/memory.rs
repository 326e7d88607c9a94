//! Measures the memory of each rank of a simulation. All ranks share one heap.

use peak_alloc::PeakAlloc;
use std::cell::Cell;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

thread_local! {
    /// Bytes that the simulation itself has allocated in this turn of a rank.
    static OUTSIDE: Cell<isize> = const { Cell::new(0) };
}

/// Runs a part of the simulation itself. Its memory does not count for the rank that called it.
pub(super) fn outside<T>(part: impl FnOnce() -> T) -> T {
    let before = taken();
    let result = part();
    OUTSIDE.set(OUTSIDE.get() + taken() - before);
    result
}

/// Bytes that this process has allocated from the heap.
pub(super) fn taken() -> isize {
    MEMORY.current_usage() as isize
}

/// The highest number of bytes allocated at once since the last reset.
pub(super) fn most_taken() -> isize {
    MEMORY.peak_usage() as isize
}

pub(super) fn reset_most_taken() {
    MEMORY.reset_peak_usage();
}

/// The memory of each rank: its present bytes, and the highest number of bytes so far.
pub(super) struct Meter {
    held: Vec<isize>,
    pub most: Vec<isize>,
    before: isize,
}

impl Meter {
    pub fn new(ranks: usize) -> Self {
        Self { held: vec![0; ranks], most: vec![0; ranks], before: 0 }
    }

    pub fn turn(&mut self, who: usize, begins: bool) {
        if begins {
            OUTSIDE.set(0);
            reset_most_taken();
            self.before = taken();
            return;
        }
        let outside = OUTSIDE.get();
        let most = self.held[who] + most_taken() - self.before - outside.max(0);
        self.most[who] = self.most[who].max(most);
        self.held[who] += taken() - self.before - outside;
    }
}
