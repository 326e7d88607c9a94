//! The host as a device: the stager's thread copies each block, and digests it while its bytes are in the
//! CPU's cache.
//!
//! # Safety argument
//! The caller of [`CopyQueue::copy`] vouches for both ranges of a copy, and the copy ends before the call
//! returns.
#![expect(unsafe_code, reason = "a copy from a raw source into a slab; argument above")]

use super::{CopyQueue, Device};
use crate::digest::Digest;
use crate::error::Result;
use crate::memory::{Pages, Register};
use std::any::Any;
use std::time::Instant;

/// Block size of copy and digest. A block stays in the second-level cache between the two.
const BLOCK: usize = 128 << 10;

/// The host as a device.
#[derive(Clone, Copy, Debug, Default)]
pub struct Host;

impl Register for Host {
    fn register(&self, _: Pages<'_>) -> Result<Box<dyn Any + Send + Sync>> {
        Ok(Box::new(()))
    }
}

impl Device for Host {
    fn name(&self) -> String {
        "host".into()
    }

    fn queue(&self) -> Result<Box<dyn CopyQueue>> {
        Ok(Box::new(HostQueue(0)))
    }
}

pub(super) struct HostQueue(pub u64);

impl CopyQueue for HostQueue {
    unsafe fn copy(&mut self, from: *const u8, to: *mut u8, len: usize) -> Result<Option<Digest>> {
        let mut digest = Digest::EMPTY;
        for at in (0..len).step_by(BLOCK) {
            let n = BLOCK.min(len - at);
            // SAFETY: within the ranges for which the caller vouched; a source is never part of the arena.
            let copied = unsafe {
                std::ptr::copy_nonoverlapping(from.add(at), to.add(at), n);
                std::slice::from_raw_parts(to.add(at), n)
            };
            // The first digest needs no combining: small tensors are a single block.
            let block = Digest::of(copied);
            digest = if at == 0 { block } else { digest.then(block, n as u64) };
        }
        Ok(Some(digest))
    }

    fn event(&mut self) -> Result<u64> {
        self.0 += 1;
        Ok(self.0)
    }

    fn reached(&mut self) -> Result<u64> {
        Ok(self.0)
    }

    fn quiesce(&mut self, _: Instant) -> bool {
        true
    }
}
