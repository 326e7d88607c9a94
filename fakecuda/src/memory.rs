//! Device memory: a window of addresses that fault on the host, and a shadow behind the window that has the
//! bytes.

use crate::abi::{ILLEGAL_ADDRESS, INVALID_VALUE, OUT_OF_MEMORY, Status};
use crate::settings::POISON;
use std::collections::BTreeMap;

/// Alignment and minimum distance of allocations, so that a copy past the end of an allocation is detected.
const ALIGN: u64 = 512;

/// Maximum size of an allocation that is filled with poison. In larger ones the fill would allocate all their
/// pages.
const POISONED_MAX: u64 = 64 << 20;

/// Two mappings of the same size. They stay until the process ends.
pub struct Window {
    base: u64,
    shadow: u64,
    span: u64,
}

impl Window {
    pub fn new(span: u64) -> Status<Self> {
        let map = |protection| {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            // SAFETY: a fresh anonymous mapping touches no existing memory.
            let at = unsafe { libc::mmap(std::ptr::null_mut(), span as usize, protection, flags, -1, 0) };
            if at == libc::MAP_FAILED { Err(OUT_OF_MEMORY) } else { Ok(at as u64) }
        };
        Ok(Self { base: map(libc::PROT_NONE)?, shadow: map(libc::PROT_READ | libc::PROT_WRITE)?, span })
    }

    pub fn holds(&self, address: u64) -> bool {
        (self.base..self.base + self.span).contains(&address)
    }

    /// Host address of the byte at a device address.
    pub fn shadow_of(&self, address: u64) -> *mut u8 {
        (address - self.base + self.shadow) as *mut u8
    }
}

/// One allocation.
#[derive(Clone, Copy)]
pub struct Block {
    pub start: u64,
    pub bytes: u64,
    /// Never reused. It distinguishes an allocation from a later one at the same address.
    pub id: u64,
    /// A stream will free the allocation; no new work may use it.
    leaving: bool,
}

/// The allocations in a window.
#[derive(Default)]
pub struct Heap {
    blocks: BTreeMap<u64, Block>,
    next: u64,
    ids: u64,
    pub used: u64,
}

impl Heap {
    pub fn allocate(&mut self, window: &Window, bytes: u64, limit: u64, reuse: bool, poison: bool) -> Status<u64> {
        if bytes == 0 {
            return Err(INVALID_VALUE);
        }
        if self.used.saturating_add(bytes) > limit {
            return Err(OUT_OF_MEMORY);
        }
        let from = if reuse { 0 } else { self.next };
        let found = self.gap(window, from, bytes).or_else(|| self.gap(window, 0, bytes));
        let start = found.ok_or(OUT_OF_MEMORY)?;
        self.ids += 1;
        self.blocks.insert(start, Block { start, bytes, id: self.ids, leaving: false });
        self.next = start - window.base + bytes + ALIGN;
        self.used += bytes;
        if poison && bytes <= POISONED_MAX {
            // SAFETY: the block is in the window, so its shadow is mapped; its address is not shared yet.
            unsafe { std::ptr::write_bytes(window.shadow_of(start), POISON, bytes as usize) };
        }
        Ok(start)
    }

    /// Finds the first gap for `bytes` at or after an offset in the window.
    fn gap(&self, window: &Window, from: u64, bytes: u64) -> Option<u64> {
        let apart = |at: u64| (at + ALIGN).next_multiple_of(ALIGN);
        let mut at = (window.base + from).next_multiple_of(ALIGN);
        if let Some(before) = self.blocks.range(..at).next_back() {
            at = at.max(apart(before.1.start + before.1.bytes));
        }
        for block in self.blocks.range(at..).map(|(_, b)| b) {
            if at + bytes + ALIGN <= block.start {
                break;
            }
            at = apart(block.start + block.bytes);
        }
        (at + bytes <= window.base + window.span).then_some(at)
    }

    /// Frees an allocation at once, even if work still uses it.
    pub fn free(&mut self, window: &Window, start: u64) -> Status {
        let block = self.blocks.remove(&start).ok_or(INVALID_VALUE)?;
        self.used -= block.bytes;
        let (first, end) = (start.next_multiple_of(4096), (start + block.bytes) / 4096 * 4096);
        if first < end {
            // SAFETY: whole pages of the shadow that belonged to this block alone. They read as zeros from
            // now on.
            unsafe { libc::madvise(window.shadow_of(first).cast(), (end - first) as usize, libc::MADV_DONTNEED) };
        }
        Ok(())
    }

    /// Marks an allocation as leaving: no new work may use it, but enqueued work may.
    pub fn leave(&mut self, start: u64) -> Status<Block> {
        let block = self.blocks.get_mut(&start).filter(|b| !b.leaving).ok_or(INVALID_VALUE)?;
        block.leaving = true;
        Ok(*block)
    }

    /// Finds the allocation that contains all of this range.
    pub fn find(&self, address: u64, bytes: u64) -> Status<Block> {
        let block = self.blocks.range(..=address).next_back().map(|(_, b)| *b).filter(|b| !b.leaving);
        let block = block.filter(|b| bytes <= b.bytes && address - b.start <= b.bytes - bytes);
        block.ok_or(INVALID_VALUE)
    }

    /// Checks that an allocation still exists.
    pub fn check(&self, block: Block) -> Status {
        let same = self.blocks.get(&block.start).is_some_and(|b| b.id == block.id);
        if same { Ok(()) } else { Err(ILLEGAL_ADDRESS) }
    }

    pub fn blocks(&self) -> impl Iterator<Item = Block> + '_ {
        self.blocks.values().copied()
    }

    pub fn clear(&mut self, window: &Window) {
        let starts: Vec<u64> = self.blocks.keys().copied().collect();
        for start in starts {
            let _ = self.free(window, start);
        }
    }
}
