//! Slabs: equal pieces of the arena, each leased by one owner at a time.
//!
//! # Safety argument
//! The mapping lives as long as any `Arc<Pool>`, and every lease has one. The free list hands out an index
//! again only after it was returned, so two leases never cover the same bytes. A lease therefore owns its
//! slab exclusively, and may move between threads. A device copies into a slab through [`Lease::as_mut_ptr`],
//! and the caller that begins a copy keeps the lease until the copy has ended.
#![expect(unsafe_code, reason = "exclusive slices of one mapping; argument above")]

use super::mapping::Mapping;
use crate::completion::Signal;
use crate::error::{Error, Result};
use crate::sync::{Mutex, lock};
use std::fmt;
use std::sync::Arc;

/// The slabs of an arena and their free list.
pub(super) struct Pool {
    mapping: Mapping,
    slab: usize,
    free: Mutex<Vec<u32>>,
    home: Arc<Signal>,
}

impl Pool {
    /// Divides `mapping` into slabs of `slab` bytes. The pool notifies `home` when a slab is returned.
    pub fn new(mapping: Mapping, slab: usize, home: Arc<Signal>) -> Self {
        let count = u32::try_from(mapping.len() / slab).unwrap_or(u32::MAX);
        Self { mapping, slab, free: Mutex::new((0..count).rev().collect()), home }
    }

    pub fn try_lease(self: &Arc<Self>) -> Option<Lease> {
        let index = lock(&self.free).pop()?;
        Some(Lease {
            pool: self.clone(),
            index,
            #[cfg(mutants)]
            early: false,
        })
    }

    pub fn free(&self) -> usize {
        lock(&self.free).len()
    }

    fn pointer(&self, index: u32) -> *mut u8 {
        self.mapping.pointer().wrapping_add(index as usize * self.slab)
    }
}

/// The right to use a slab. Dropping it returns the slab.
pub struct Lease {
    pool: Arc<Pool>,
    index: u32,
    #[cfg(mutants)]
    early: bool,
}

impl Lease {
    /// The slab's address, a multiple of [`ALIGNMENT`](super::ALIGNMENT), for copies that end before the
    /// lease is dropped.
    pub fn as_mut_ptr(&mut self) -> *mut u8 {
        self.pool.pointer(self.index)
    }

    /// The slab's size in bytes.
    pub fn len(&self) -> usize {
        self.pool.slab
    }

    /// Always false: a slab has bytes.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// The slab's bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the slab lies in the mapping, which is initialised memory; this lease owns it exclusively.
        unsafe { std::slice::from_raw_parts(self.pool.pointer(self.index), self.pool.slab) }
    }

    /// The slab's bytes, writable.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the slab lies in the mapping, and this lease owns it and is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pool.pointer(self.index), self.pool.slab) }
    }
}

/// Breaks the slab's guarantee, to show that the test suite detects it.
#[cfg(mutants)]
impl Lease {
    pub(crate) fn return_early(&mut self) {
        lock(&self.pool.free).insert(0, self.index);
        self.early = true;
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        #[cfg(mutants)]
        if self.early {
            return;
        }
        lock(&self.pool.free).push(self.index);
        self.pool.home.notify();
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lease({})", self.index)
    }
}

/// A slab with the bytes of a chunk, which a storage owns.
///
/// Dropping the slab returns its memory to the arena, and nothing else does. So a storage that has given up
/// waiting for a peer must keep the slab for as long as any thread may still read the bytes.
#[derive(Debug)]
pub struct Slab {
    lease: Lease,
    len: usize,
}

impl Slab {
    /// The first `len` bytes of a leased slab.
    ///
    /// # Errors
    /// `Internal` when the slab is shorter.
    pub(crate) fn new(lease: Lease, len: usize) -> Result<Self> {
        if len > lease.len() {
            return Err(Error::internal(format!("a chunk is longer than its slab bytes={len} slab={}", lease.len())));
        }
        Ok(Self { lease, len })
    }

    /// The number of bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns true when it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl AsRef<[u8]> for Slab {
    fn as_ref(&self) -> &[u8] {
        self.lease.bytes().get(..self.len).unwrap_or_default()
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::thread;
    use std::time::Instant;

    #[test]
    fn a_slab_has_one_owner_at_a_time_and_whoever_waits_for_one_gets_it() {
        loom::model(|| {
            let home = Arc::new(Signal::default());
            let pool = Arc::new(Pool::new(Mapping::new(4096).unwrap(), 4096, home.clone()));
            // Only the lock of the free list orders the owners. Loom checks that this is enough.
            let owner = Arc::new(loom::cell::UnsafeCell::new(0));
            let stager = |pool: Arc<Pool>, home: Arc<Signal>, owner: Arc<loom::cell::UnsafeCell<i32>>| {
                let lease = home.wait_until(Instant::now(), || pool.try_lease()).unwrap();
                // SAFETY: this thread has the only slab's lease.
                owner.with_mut(|n| unsafe { *n += 1 });
                drop(lease);
            };
            let other = (pool.clone(), home.clone(), owner.clone());
            let other = thread::spawn(move || stager(other.0, other.1, other.2));
            stager(pool.clone(), home, owner);
            other.join().unwrap();
            assert_eq!(pool.free(), 1);
        });
    }
}
