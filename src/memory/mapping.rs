//! The mapping under the slabs: anonymous, with huge pages if available, prefaulted in parallel on the
//! device's NUMA node, locked if allowed.
//!
//! # Safety argument
//! A mapping is private and anonymous, and is leased only in disjoint slabs. `Drop` unmaps it when neither
//! the arena nor a lease is left. Prefaulting writes zeros over zeros before the first lease. Under Miri,
//! which has no such mappings, an aligned allocation replaces the mapping.
#![expect(unsafe_code, reason = "mapping, locking and prefaulting memory; argument above")]

use super::node::Node;
use crate::error::Result;
use crate::sync::{Mutex, lock};
use std::any::Any;

/// The memory itself.
pub(super) struct Mapping {
    base: *mut u8,
    len: usize,
    registration: Option<Box<dyn Any + Send + Sync>>,
}

// SAFETY: the mapping is plain memory, accessed only through leases, which own disjoint parts of it.
unsafe impl Send for Mapping {}
// SAFETY: the mapping has no method that writes through a shared reference.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub fn pointer(&self) -> *mut u8 {
        self.base
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Keeps the value that a registration returned until just before the memory is unmapped.
    pub fn keep(&mut self, registration: Box<dyn Any + Send + Sync>) {
        self.registration = Some(registration);
    }

    /// Touches every page from all cores, so that no save waits for a page fault. The cores are those of
    /// `node` if there is one, because the kernel allocates a page on the node that touches it first. The
    /// threads end when start-up ends.
    pub fn prefault(&mut self, node: Result<Node, String>) -> Result<u32, String> {
        if cfg!(miri) {
            return Err("not under miri".into());
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = node.as_ref().map_or(cores, Node::processors).min(16);
        let elsewhere = Mutex::new(None);
        let part = self.len.div_ceil(threads).next_multiple_of(super::ALIGNMENT).max(super::ALIGNMENT);
        // SAFETY: the mapping is exclusively ours, no slab has been leased yet, and it is initialised
        // (zeros).
        let all = unsafe { std::slice::from_raw_parts_mut(self.base, self.len) };
        std::thread::scope(|scope| {
            for part in all.chunks_mut(part) {
                let (node, elsewhere) = (node.as_ref(), &elsewhere);
                let touch = move || {
                    if let Ok(Err(error)) = node.map(Node::enter) {
                        *lock(elsewhere) = Some(format!("threads cannot be moved to the node of the device: {error}"));
                    }
                    for page in part.chunks_mut(super::ALIGNMENT) {
                        // SAFETY: a valid exclusive reference; the store is volatile, so that the compiler
                        // does not omit the store of a zero.
                        unsafe { std::ptr::write_volatile(&mut page[0], 0) };
                    }
                };
                // If no thread can be started, the first save faults in the missing pages.
                if let Err(error) = std::thread::Builder::new().spawn_scoped(scope, touch) {
                    tracing::warn!(error = format_args!("{error:#}"), "part of the arena is not faulted in");
                }
            }
        });
        let elsewhere = lock(&elsewhere).take();
        elsewhere.map_or(node.map(|node| node.number), Err)
    }
}

#[cfg(not(miri))]
impl Mapping {
    pub fn new(len: usize) -> Result<Self> {
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            let error = std::io::Error::last_os_error();
            return Err(crate::Error::invalid(format!("the arena cannot be mapped arena={len}")).with_source(error));
        }
        Ok(Self { base: base.cast(), len, registration: None })
    }

    /// Keeps the mapping out of forked children, where device transfers would corrupt it, and requests huge
    /// pages.
    pub fn prepare(&self) -> bool {
        // SAFETY: advice on our own mapping.
        unsafe {
            libc::madvise(self.base.cast(), self.len, libc::MADV_DONTFORK);
            libc::madvise(self.base.cast(), self.len, libc::MADV_HUGEPAGE) == 0
        }
    }

    pub fn lock(&self) -> Result<(), String> {
        // SAFETY: locking our own mapping does not change its content.
        if unsafe { libc::mlock(self.base.cast(), self.len) } == 0 {
            return Ok(());
        }
        Err(format!("{} (RLIMIT_MEMLOCK, `ulimit -l`)", std::io::Error::last_os_error()))
    }

    fn unmap(&mut self) {
        // SAFETY: our own mapping, and no lease exists any more.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

#[cfg(miri)]
impl Mapping {
    fn layout(len: usize) -> std::alloc::Layout {
        std::alloc::Layout::from_size_align(len, super::ALIGNMENT).expect("a test's size")
    }

    pub fn new(len: usize) -> Result<Self> {
        // SAFETY: the size is not zero, because an arena holds at least two chunks.
        Ok(Self { base: unsafe { std::alloc::alloc_zeroed(Self::layout(len)) }, len, registration: None })
    }

    pub fn prepare(&self) -> bool {
        false
    }

    pub fn lock(&self) -> Result<(), String> {
        Err("not under miri".into())
    }

    fn unmap(&mut self) {
        // SAFETY: allocated with this layout in `new`.
        unsafe { std::alloc::dealloc(self.base, Self::layout(self.len)) };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        drop(self.registration.take());
        self.unmap();
    }
}

#[cfg(test)]
#[cfg(not(miri))]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_faulted_in_before_it_is_lent() {
        for pages in [2, 3, 7, 64, 1001] {
            let mut mapping = Mapping::new(pages * 4096).unwrap();
            let resident = |mapping: &Mapping| {
                let mut seen = vec![0_u8; pages];
                // SAFETY: our own mapping, and a byte for each of its pages.
                assert_eq!(unsafe { libc::mincore(mapping.base.cast(), mapping.len, seen.as_mut_ptr()) }, 0);
                seen.iter().filter(|&&page| page & 1 == 1).count()
            };
            assert_eq!(resident(&mapping), 0);
            assert_eq!(mapping.prefault(Err("there is one".into())), Err("there is one".into()));
            assert_eq!(resident(&mapping), pages);
        }
    }
}
