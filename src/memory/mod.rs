//! The arena: pinned, aligned memory bought once, lent out in slabs.

/// Slabs, chunks and direct I/O are aligned to this many bytes.
pub const ALIGNMENT: usize = 4096;
