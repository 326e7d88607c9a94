//! The mapping under the slabs: anonymous, with huge pages if available, prefaulted in parallel on the
//! device's NUMA node, locked if allowed.
//!
//! # Safety argument
//! A mapping is private, anonymous, and leased only in disjoint slabs; `Drop` unmaps it when neither the
//! arena nor a lease is left. Prefaulting writes zeros over zeros before the first lease. Under Miri, which
//! has no such mappings, an aligned allocation stands in.
#![expect(unsafe_code, reason = "mapping, locking and prefaulting memory; argument above")]

use super::limit;
use super::node::Node;
use super::slab::{Lease, Pool};
use crate::completion::Signal;
use crate::error::{Error, Result};
use crate::sync::{Mutex, lock};
use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

/// Registers memory with a device, so that the device copies to it asynchronously.
pub trait Register {
    /// Registers the memory of an arena until the returned value is dropped, which happens before the memory
    /// is unmapped.
    ///
    /// # Errors
    /// `Device` when the memory cannot be pinned.
    fn register(&self, pages: Pages<'_>) -> Result<Box<dyn Any + Send + Sync>>;

    /// The NUMA node closest to the device.
    ///
    /// # Errors
    /// The reason why any node is as good.
    fn node(&self) -> Result<Node, String> {
        Err("the device has no NUMA node of its own".into())
    }
}

/// The memory of an arena. Devices and the kernel get its address, so only an arena can create one:
/// ```compile_fail,E0451
/// let pages = ashore::memory::Pages { base: 0x1000 as *mut u8, len: 4096, mapping: Default::default() };
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Pages<'m> {
    base: *mut u8,
    len: usize,
    mapping: PhantomData<&'m ()>,
}

impl Pages<'_> {
    /// `len` bytes at `base`.
    ///
    /// # Safety
    /// The bytes stay mapped until the value that a registration returned is dropped.
    pub(crate) unsafe fn new(base: *mut u8, len: usize) -> Self {
        Self { base, len, mapping: PhantomData }
    }

    /// The address of the first byte.
    pub fn base(&self) -> *mut u8 {
        self.base
    }

    /// The number of bytes.
    pub fn size(&self) -> usize {
        self.len
    }
}

/// The actual properties of the arena.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct ArenaReport {
    /// Bytes mapped.
    pub bytes: u64,
    /// Slabs, each of one chunk.
    pub slabs: usize,
    /// The kernel accepted the request for huge pages.
    pub huge_pages: bool,
    /// The device's NUMA node, whose CPUs touched the memory first; or the reason why CPUs of any node did.
    pub node: Result<u32, String>,
    /// Ok if the memory is locked; the error is the reason why not. Not fatal: the kernel may page it out.
    pub locked: Result<(), String>,
    /// Ok if the memory is registered with the device and the storage; the error is the reason why not. Not
    /// fatal: copies are slower then.
    pub pinned: Result<(), String>,
}

/// The arena.
pub struct Arena {
    pool: Arc<Pool>,
    report: ArenaReport,
}

impl Arena {
    /// Maps `bytes` (rounded down to whole slabs), faults them in with all cores, locks and registers them.
    /// If registration fails, it tries a half and a quarter: a smaller arena only waits more for writers, but
    /// copies to unpinned memory are slow and block the thread that queues them.
    ///
    /// # Errors
    /// `Invalid` when the memory is not available.
    pub(crate) fn new(bytes: u64, slab: u64, register: &dyn Register, home: Arc<Signal>) -> Result<Self> {
        if !cfg!(miri) {
            limit::check(bytes)?;
        }
        let take = |bytes| Self::quietly(bytes, slab, register, home.clone());
        let mut arena = take(bytes)?;
        if let Err(reason) = arena.report.pinned.clone() {
            for part in [2, 4].into_iter().filter(|part| bytes / part >= 2 * slab) {
                // Dropped first: the machine may not have memory for both.
                drop(arena);
                arena = take(bytes / part)?;
                if arena.report.pinned.is_ok() {
                    let pinned = arena.report.bytes;
                    tracing::warn!(%reason, bytes, pinned, "the arena is smaller than requested, because more could not be pinned");
                    return Ok(arena);
                }
            }
            if arena.report.bytes < bytes / slab * slab {
                drop(arena);
                arena = take(bytes)?;
            }
        }
        if let Err(reason) = &arena.report.locked {
            tracing::warn!(%reason, bytes, "the arena is not locked in memory");
        }
        if let Err(reason) = &arena.report.pinned {
            tracing::warn!(%reason, bytes, "the arena is not pinned: copies from devices are slow and hold up the stager");
        }
        Ok(arena)
    }

    /// [`Arena::new`] without limit check and fallback: the report says what is missing.
    ///
    /// # Errors
    /// Those of [`Arena::new`].
    pub(crate) fn quietly(bytes: u64, slab: u64, register: &dyn Register, home: Arc<Signal>) -> Result<Self> {
        let too_big = || Error::invalid(format!("the arena does not fit the address space arena={bytes}"));
        let slab = usize::try_from(slab).map_err(|_| too_big())?;
        let slabs = usize::try_from(bytes).map_err(|_| too_big())? / slab;
        let mut mapping = Mapping::new(slabs * slab)?;
        let huge_pages = mapping.prepare();
        let node = mapping.prefault(register.node());
        let locked = mapping.lock();
        // SAFETY: the mapping drops its registration before it unmaps them.
        let registered = register.register(unsafe { Pages::new(mapping.base, mapping.len) });
        let pinned = registered.map(|registration| mapping.registration = Some(registration));
        let pinned = pinned.map_err(|error| format!("{error:#}"));
        let report = ArenaReport { bytes: (slabs * slab) as u64, slabs, huge_pages, node, locked, pinned };
        Ok(Self { pool: Arc::new(Pool::new(mapping, slab, home)), report })
    }

    /// Leases a slab, if one is free.
    pub(crate) fn try_lease(&self) -> Option<Lease> {
        self.pool.try_lease()
    }

    /// The number of free slabs.
    pub fn free(&self) -> usize {
        self.pool.free()
    }

    /// The actual properties of the arena.
    pub fn report(&self) -> &ArenaReport {
        &self.report
    }
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arena({} of {} slabs free)", self.free(), self.report.slabs)
    }
}

/// The memory itself.
pub(super) struct Mapping {
    base: *mut u8,
    len: usize,
    registration: Option<Box<dyn Any + Send + Sync>>,
}

// SAFETY: the mapping is plain memory, reached only through leases, which own disjoint parts of it.
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

    /// Touches every page from all cores, so that no save waits for a page fault. The cores are those of
    /// `node` if there is one, because a page is allocated on the node that touches it first. The threads end
    /// with start-up.
    fn prefault(&mut self, node: Result<Node, String>) -> Result<u32, String> {
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
                        // SAFETY: a valid exclusive reference; volatile, so that the store of a zero is not
                        // left out.
                        unsafe { std::ptr::write_volatile(&mut page[0], 0) };
                    }
                };
                // If no thread can start, the first save faults in the missing pages.
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
    pub(super) fn new(len: usize) -> Result<Self> {
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
            return Err(Error::invalid(format!("the arena cannot be mapped arena={len}")).with_source(error));
        }
        Ok(Self { base: base.cast(), len, registration: None })
    }

    /// Keeps the mapping out of forked children, where device transfers would corrupt it, and asks for huge
    /// pages.
    fn prepare(&self) -> bool {
        // SAFETY: advice on our own mapping.
        unsafe {
            libc::madvise(self.base.cast(), self.len, libc::MADV_DONTFORK);
            libc::madvise(self.base.cast(), self.len, libc::MADV_HUGEPAGE) == 0
        }
    }

    fn lock(&self) -> Result<(), String> {
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

    pub(super) fn new(len: usize) -> Result<Self> {
        // SAFETY: the size is not zero: an arena holds at least two chunks.
        Ok(Self { base: unsafe { std::alloc::alloc_zeroed(Self::layout(len)) }, len, registration: None })
    }

    fn prepare(&self) -> bool {
        false
    }

    fn lock(&self) -> Result<(), String> {
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
mod tests {
    use super::*;
    use crate::device::Host;

    fn arena(bytes: u64, slab: u64) -> Arena {
        Arena::new(bytes, slab, &Host, Arc::default()).unwrap()
    }

    #[test]
    fn every_slab_is_lent_once_and_comes_home() {
        let arena = arena(4 * 8192 + 4096, 8192);
        let mut leases: Vec<_> = std::iter::from_fn(|| arena.try_lease()).collect();
        assert_eq!((leases.len(), arena.free()), (4, 0));
        for (i, lease) in leases.iter_mut().enumerate() {
            assert_eq!(lease.as_mut_ptr() as usize % crate::ALIGNMENT, 0);
            lease.bytes_mut().fill(i as u8 + 1);
        }
        for (i, lease) in leases.iter().enumerate() {
            assert!(lease.bytes().iter().all(|&b| b == i as u8 + 1));
        }
        drop(leases.pop());
        assert_eq!(arena.free(), 1);
    }

    #[test]
    fn a_lease_keeps_the_memory_alive_and_wakes_whoever_waits() {
        let home = Arc::new(Signal::default());
        let arena = Arena::new(2 * 4096, 4096, &Host, home.clone()).unwrap();
        let leases = [arena.try_lease().unwrap(), arena.try_lease().unwrap()];
        std::thread::scope(|scope| {
            scope.spawn(move || drop(leases));
            let far = std::time::Instant::now() + std::time::Duration::from_secs(60);
            let mut lease = home.wait_until(far, || arena.try_lease()).unwrap();
            drop(arena);
            lease.bytes_mut()[4095] = 7;
            assert_eq!(lease.bytes()[4095], 7);
        });
    }

    #[test]
    #[cfg(not(miri))]
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

    #[test]
    #[cfg_attr(miri, ignore = "the interpreter aborts where a machine refuses")]
    fn an_arena_beyond_the_address_space_is_refused() {
        let error = Arena::new(1 << 62, 1 << 20, &Host, Arc::default()).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Invalid);
    }
}
