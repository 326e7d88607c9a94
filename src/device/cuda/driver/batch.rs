//! Batches of copies: one call for many copies. Drivers have this call since CUDA 12.8.
//!
//! # Safety argument
//! See the module above. The arrays have as many members as the call is told, and live until it returns. The
//! driver reads them only during the call.
#![expect(unsafe_code, reason = "calls of a C library; argument above")]

use super::codes::flag;
use super::handles::{Address, StreamHandle};
use crate::tries;
use std::ffi::{c_int, c_uint};
use std::sync::atomic::Ordering;

/// `CUmemcpyAttributes`: when the driver reads the sources, hints for kinds of memory that are not used here,
/// and flags.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Attributes {
    pub order: c_uint,
    pub hints: [c_uint; 4],
    pub flags: c_uint,
}

/// The driver only reads the arrays, although `cuda.h` does not declare them `const`.
// SAFETY: a type; nothing is called.
pub(super) type Plain = unsafe extern "C" fn(
    *mut *mut u8,
    *mut Address,
    *mut usize,
    usize,
    *mut Attributes,
    *mut usize,
    usize,
    StreamHandle,
) -> c_int;
// SAFETY: as above.
pub(super) type WithIndex = unsafe extern "C" fn(
    *mut *mut u8,
    *mut Address,
    *mut usize,
    usize,
    *mut Attributes,
    *mut usize,
    usize,
    *mut usize,
    StreamHandle,
) -> c_int;

/// The function as CUDA 13 has it, or as CUDA 12.8 has it: with the index of a wrong copy.
#[derive(Clone, Copy)]
pub(super) enum Batch {
    Plain(Plain),
    WithIndex(WithIndex),
}

impl Batch {
    /// Looks up the function.
    ///
    /// # Safety
    /// `library` is a CUDA driver.
    pub unsafe fn find(library: &libloading::Library) -> Option<Self> {
        // SAFETY: the caller vouches that it is a driver; the signature is that of `cuda.h` for this symbol.
        let plain = unsafe { library.get::<Plain>(b"cuMemcpyBatchAsync_v2\0") };
        // SAFETY: as above.
        let with_index = || unsafe { library.get::<WithIndex>(b"cuMemcpyBatchAsync\0") };
        plain.map(|f| Self::Plain(*f)).or_else(|_| with_index().map(|f| Self::WithIndex(*f))).ok()
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Plain(_) => "cuMemcpyBatchAsync_v2",
            Self::WithIndex(_) => "cuMemcpyBatchAsync",
        }
    }

    /// # Safety
    /// Each copy meets the contract of [`Stream::copy_to_host`](super::Stream::copy_to_host), and the stream
    /// is a live one that is not a default stream.
    pub unsafe fn call(self, copies: &Copies, stream: StreamHandle) -> c_int {
        let overlap = tries::PREFER_OVERLAP.load(Ordering::Relaxed);
        let flags = if overlap { flag::COPY_PREFER_OVERLAP_WITH_COMPUTE } else { flag::COPY_DEFAULT };
        let mut attributes = Attributes { order: flag::COPY_IN_STREAM_ORDER, hints: [0; 4], flags };
        let (mut first, mut wrong) = (0, 0);
        let Copies { to, from, bytes } = copies;
        let (to, from, count) = (to.as_ptr().cast_mut(), from.as_ptr().cast_mut(), bytes.len());
        let (bytes, first) = (bytes.as_ptr().cast_mut(), &raw mut first);
        // SAFETY: the arrays have the same length, and one set of attributes applies from the first copy on.
        // The caller vouches for the copies.
        unsafe {
            match self {
                Self::Plain(f) => f(to, from, bytes, count, &mut attributes, first, 1, stream),
                Self::WithIndex(f) => f(to, from, bytes, count, &mut attributes, first, 1, &mut wrong, stream),
            }
        }
    }
}

/// Copies to the host, which the driver may make in any order.
#[derive(Debug, Default)]
pub struct Copies {
    to: Vec<*mut u8>,
    from: Vec<Address>,
    bytes: Vec<usize>,
}

impl Copies {
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The source, destination and length of each copy.
    pub fn each(&self) -> impl Iterator<Item = (Address, *mut u8, usize)> {
        self.from.iter().zip(&self.to).zip(&self.bytes).map(|((&from, &to), &len)| (from, to, len))
    }

    pub fn push(&mut self, from: Address, to: *mut u8, len: usize) {
        if len > 0 {
            self.to.push(to);
            self.from.push(from);
            self.bytes.push(len);
        }
    }

    /// Removes all copies, but keeps the allocations.
    pub fn clear(&mut self) {
        self.to.clear();
        self.from.clear();
        self.bytes.clear();
    }
}
