//! Buffers aligned for direct I/O.

use super::ALIGNMENT;
use std::ops::{Deref, DerefMut};

/// Zeroed bytes, of any length, at an address that is a multiple of [`ALIGNMENT`].
#[derive(Debug)]
pub struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    /// Allocates `len` zero bytes.
    pub fn new(len: usize) -> Self {
        Self::over(vec![0; len + ALIGNMENT], len)
    }

    /// Allocates `len` zero bytes, or returns None if the allocation fails.
    pub fn try_new(len: usize) -> Option<Self> {
        let memory: Vec<u8> = bytemuck::allocation::try_zeroed_slice_box(len.checked_add(ALIGNMENT)?).ok()?.into();
        Some(Self::over(memory, len))
    }

    fn over(memory: Vec<u8>, len: usize) -> Self {
        let start = memory.as_ptr().addr().next_multiple_of(ALIGNMENT) - memory.as_ptr().addr();
        Self { memory, start, len }
    }

    /// Sets the length to `len`, and reuses the memory if it is large enough. The content is unspecified
    /// afterwards.
    pub fn reset(&mut self, len: usize) {
        if self.start + len > self.memory.len() {
            *self = Self::new(len);
        }
        self.len = len;
    }
}

impl From<&[u8]> for AlignedBuffer {
    fn from(bytes: &[u8]) -> Self {
        let mut buffer = Self::new(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..][..self.len]
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..self.len]
    }
}
