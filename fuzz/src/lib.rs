//! What the fuzz targets share: an allocator that counts, so that a small input that takes much memory fails.
//!
//! # Safety argument
//! The allocator below passes every call on to the system's, unchanged; it only adds up sizes.
#![expect(unsafe_code, reason = "a counting allocator; argument above")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: passes on to the system allocator, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(NOW.fetch_add(layout.size(), Relaxed) + layout.size(), Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Runs `f` on an input of `len` bytes, and panics when it takes more memory at once than such an input
/// may.
pub fn bounded<T>(len: usize, f: impl FnOnce() -> T) -> T {
    let before = NOW.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = f();
    let used = PEAK.load(Relaxed) - before;
    // A node of a JSON object takes hundreds of bytes for the shortest of texts.
    let limit = (64 << 10) + 512 * len;
    assert!(used <= limit, "{used} bytes of memory for {len} bytes of input, more than {limit}");
    result
}
