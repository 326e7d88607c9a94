//! The project's kernels, compiled for the CPU from the same source. They are found by name.
//!
//! A kernel gets its addresses as numbers and calls [`fakecuda_at`] to get the bytes. It may touch memory
//! that was allocated or pinned when it began to run.

use crate::abi::{ILLEGAL_ADDRESS, Status};
use crate::host::{self, InUse};
use crate::memory::{Block, Window};
use std::cell::{Cell, RefCell};

/// # Safety
/// The argument is the kernel's structure; grid and block have three numbers each.
type Run = unsafe extern "C" fn(argument: *const u8, grid: *const u32, block: *const u32, backwards: u32);

/// A compiled kernel. It takes one structure by value.
pub struct Kernel {
    name: &'static str,
    /// The size of the structure.
    bytes: &'static u64,
    run: Run,
}

impl Kernel {
    /// The size of the kernel's argument.
    pub fn bytes(&self) -> usize {
        *self.bytes as usize
    }
}

/// A launch as it was enqueued.
pub struct Launch {
    pub kernel: &'static Kernel,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub argument: Vec<u8>,
}

macro_rules! kernel {
    ($name:ident, $bytes:ident, $run:ident) => {{
        // SAFETY: `KERNEL` in the shim declares these symbols so.
        unsafe extern "C" {
            static $bytes: u64;
            fn $run(argument: *const u8, grid: *const u32, block: *const u32, backwards: u32);
        }
        // SAFETY: a constant of the compiled kernels; `build.rs` takes its name from the kernels that it
        // found there.
        Kernel { name: stringify!($name), bytes: unsafe { &$bytes }, run: $run }
    }};
}

/// Finds the kernel of this name.
pub fn find(name: &str) -> Option<&'static Kernel> {
    static KERNELS: std::sync::OnceLock<Vec<Kernel>> = std::sync::OnceLock::new();
    let all = KERNELS.get_or_init(|| include!(concat!(env!("OUT_DIR"), "/kernels.rs")).into());
    all.iter().find(|k| k.name == name)
}

/// A range that a running kernel may touch, and the offset from its device addresses to its bytes.
#[derive(Clone, Copy)]
struct Reach {
    start: u64,
    bytes: u64,
    offset: u64,
}

thread_local! {
    static REACH: RefCell<Vec<Reach>> = const { RefCell::new(Vec::new()) };
    static LAST: Cell<Option<Reach>> = const { Cell::new(None) };
    /// A substitute for memory that does not exist. It is not empty if it was needed.
    static NOWHERE: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

impl Launch {
    /// Runs the kernel on this thread, over these blocks of a device and all pinned memory. The kernel's
    /// threads run in rising order, or `backwards`.
    pub fn run(&self, window: &Window, blocks: &[Block], backwards: bool) -> Status {
        let on_device = blocks.iter().map(|b| {
            let offset = (window.shadow_of(b.start) as u64).wrapping_sub(b.start);
            Reach { start: b.start, bytes: b.bytes, offset }
        });
        // Ranges that were released meanwhile are not included.
        let pinned = host::ranges().into_iter().filter_map(|r| Some((r, InUse::new(r).ok()?)));
        let (pinned, _in_use): (Vec<_>, Vec<_>) = pinned.unzip();
        let pinned = pinned.iter().map(|r| Reach { start: r.start, bytes: r.bytes, offset: 0 });
        let mut reach: Vec<_> = on_device.chain(pinned).collect();
        reach.sort_unstable_by_key(|r| r.start);
        REACH.set(reach);
        LAST.set(None);
        NOWHERE.take();
        // Aligned in the same way as the kernel's structure.
        let mut argument = vec![0_u64; self.argument.len().div_ceil(8)];
        for (word, bytes) in argument.iter_mut().zip(self.argument.chunks(8)) {
            let mut whole = [0; 8];
            whole[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_le_bytes(whole);
        }
        // SAFETY: the argument is as long as the kernel's structure, which was checked when the function was
        // found. All other memory that the kernel touches comes from `fakecuda_at`.
        unsafe {
            (self.kernel.run)(argument.as_ptr().cast(), self.grid.as_ptr(), self.block.as_ptr(), backwards.into())
        };
        let failed = !NOWHERE.take().is_empty();
        if failed { Err(ILLEGAL_ADDRESS) } else { Ok(()) }
    }
}

/// Returns the host address of the bytes at a device address, for a kernel that runs on this thread.
// SAFETY: the symbol is this library's own.
#[unsafe(no_mangle)]
extern "C" fn fakecuda_at(address: u64, bytes: u64) -> *mut u8 {
    let holds = |r: &Reach| address >= r.start && bytes <= r.bytes && address - r.start <= r.bytes - bytes;
    let found = LAST.get().filter(holds).or_else(|| {
        REACH.with_borrow(|reach| {
            let after = reach.partition_point(|r| r.start <= address);
            reach[..after].last().copied().filter(holds)
        })
    });
    match found {
        Some(reach) => {
            LAST.set(Some(reach));
            address.wrapping_add(reach.offset) as *mut u8
        }
        // Zero bytes are valid at any address.
        None if bytes == 0 => std::ptr::without_provenance_mut(64),
        None => NOWHERE.with_borrow_mut(|nowhere| {
            // The substitute is longer than any range, but bounded, because a broken kernel may request any
            // length.
            let words = (bytes.min(1 << 30) / 8 + 2) as usize;
            if nowhere.len() < words {
                // Earlier substitutes may still be written, so they are leaked.
                std::mem::take(nowhere).leak();
                nowhere.resize(words, 0);
            }
            nowhere.as_mut_ptr().cast()
        }),
    }
}
