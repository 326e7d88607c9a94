//! Memory for direct I/O: its start is aligned.

use std::ops::{Deref, DerefMut};

pub const ALIGNMENT: usize = 4096;

pub struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub fn zeroed(len: usize) -> Self {
        let mut memory = vec![0_u8; len + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        // Touched here, so that no measurement includes the page faults.
        memory.iter_mut().step_by(ALIGNMENT).for_each(|b| *b = std::hint::black_box(0));
        Self { memory, start, len }
    }

    /// Repeats `period`. Blocks are compressed independently, so no coder sees a repetition while a block is
    /// shorter than the period.
    pub fn tiled(period: &[u8], len: usize) -> Self {
        let mut all = Self::zeroed(len);
        for piece in all.chunks_mut(period.len()) {
            piece.copy_from_slice(&period[..piece.len()]);
        }
        all
    }
}

impl Deref for Aligned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}
