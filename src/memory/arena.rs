//! The arena: a memory mapping that is registered with the device, and its slabs.
//!
//! # Safety argument
//! A registration belongs to the mapping, which drops the registration before it unmaps the memory.
#![expect(unsafe_code, reason = "registering the mapping; argument above")]

use super::limit;
use super::mapping::Mapping;
use super::node::Node;
use super::slab::{Lease, Pool};
use crate::completion::Signal;
use crate::error::{Error, Result};
use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

/// Registers memory with a device, so that the device can copy to it asynchronously.
pub trait Register {
    /// Registers the memory of an arena until the returned value is dropped. The arena drops that value
    /// before it unmaps the memory.
    ///
    /// # Errors
    /// `Device` when the memory cannot be pinned.
    fn register(&self, pages: Pages<'_>) -> Result<Box<dyn Any + Send + Sync>>;

    /// The NUMA node closest to the device.
    ///
    /// # Errors
    /// The reason why all nodes are equally good.
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
    /// Describes `len` bytes at `base`.
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
    /// The device's NUMA node, whose CPUs touched the memory first, or the reason why CPUs of any node
    /// touched it.
    pub node: Result<u32, String>,
    /// Ok if the memory is locked. The error is the reason it is not; this is not fatal: the kernel may page
    /// it out.
    pub locked: Result<(), String>,
    /// Ok if the memory is registered with the device and the storage. The error is the reason it is not;
    /// this is not fatal, but copies are slower.
    pub pinned: Result<(), String>,
}

/// The arena.
pub struct Arena {
    pool: Arc<Pool>,
    report: ArenaReport,
}

impl Arena {
    /// Maps `bytes` (rounded down to whole slabs), faults the pages in with all cores, locks them and
    /// registers them. If registration fails, it tries a half and then a quarter of the size. With a smaller
    /// arena saves only wait more for writers, but copies to unpinned memory are slow and block the thread
    /// that queues them.
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
                // Dropped first, because the machine may not have memory for both arenas.
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

    /// [`Arena::new`] without limit check and fallback. The report says what is missing.
    ///
    /// # Errors
    /// As [`Arena::new`].
    pub(crate) fn quietly(bytes: u64, slab: u64, register: &dyn Register, home: Arc<Signal>) -> Result<Self> {
        let too_big = || Error::invalid(format!("the arena does not fit the address space arena={bytes}"));
        let slab = usize::try_from(slab).map_err(|_| too_big())?;
        let slabs = usize::try_from(bytes).map_err(|_| too_big())? / slab;
        let mut mapping = Mapping::new(slabs * slab)?;
        let huge_pages = mapping.prepare();
        let node = mapping.prefault(register.node());
        let locked = mapping.lock();
        // SAFETY: the mapping drops its registration before it unmaps these pages.
        let registered = register.register(unsafe { Pages::new(mapping.pointer(), mapping.len()) });
        let pinned = registered.map(|registration| mapping.keep(registration));
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

#[cfg(test)]
mod tests {
    use super::super::slab::Slab;
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
    fn a_slab_that_was_handed_over_comes_home_when_its_last_reader_drops_it() {
        let arena = arena(2 * 8192, 8192);
        let mut lease = arena.try_lease().unwrap();
        lease.bytes_mut()[..3].copy_from_slice(&[1, 2, 3]);
        assert_eq!(Slab::new(arena.try_lease().unwrap(), 8193).unwrap_err().kind(), crate::ErrorKind::Internal);
        let slab = Arc::new(Slab::new(lease, 3).unwrap());
        let reader = slab.clone();
        drop(slab);
        assert_eq!((reader.as_ref().as_ref(), arena.free()), (&[1, 2, 3][..], 1));
        std::thread::spawn(move || drop(reader)).join().unwrap();
        assert_eq!(arena.free(), 2);
    }

    #[test]
    #[cfg_attr(miri, ignore = "the interpreter aborts where a machine refuses")]
    fn an_arena_beyond_the_address_space_is_refused() {
        let error = Arena::new(1 << 62, 1 << 20, &Host, Arc::default()).unwrap_err();
        assert_eq!(error.kind(), crate::ErrorKind::Invalid);
    }
}
