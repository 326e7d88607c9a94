//! `fence_latch`, `late_copy` and `fence_publish` copy exactly the chunks that have not left the device, and
//! report F to the host.

use super::{Piece, View, noise};
use crate::fixture::{Fixture, Kernel, synchronize};

#[derive(Clone, Copy)]
#[repr(C)]
struct Latch {
    fence: u64,
    watermark: u64,
    base: u64,
    save: u64,
    chunks: u32,
    unused: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct LateCopy {
    fence: u64,
    pieces: u64,
    views: u64,
    starts: u64,
    slots: u64,
    chunks: u32,
    first: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Publish {
    fence: u64,
    to: u64,
}

const CHUNKS: usize = 5;
const CHUNK: usize = 1000;

/// A save of five chunks of three pieces each, one of them strided, in memory of 5,000 bytes.
struct Fence {
    fixture: Fixture,
    stream: u64,
    kernels: [Kernel; 3],
    block: u32,
    fence: u64,
    watermark: u64,
    published: u64,
    slots: Vec<u64>,
    table: LateCopy,
    expected: Vec<Vec<u8>>,
    memory: u64,
}

impl Fence {
    /// Makes slots for the last `aside` chunks.
    fn new(aside: usize) -> Self {
        Self::with(aside, "late_copy", 64)
    }

    /// Like `new`, with the copying kernel `copy` on blocks of `block` threads.
    fn with(aside: usize, copy: &str, block: u32) -> Self {
        let fixture = Fixture::new();
        let bytes = noise(CHUNKS * CHUNK, 8);
        let (memory, stream) = (fixture.upload(&bytes), fixture.stream(1));
        let view = View::new(&[10, 20], &[2, 20], 2);
        let (mut pieces, mut expected) = (Vec::new(), Vec::new());
        for chunk in 0..CHUNKS {
            let base = chunk * CHUNK;
            let piece = |at: usize, to: usize, bytes: usize, view| Piece {
                from: memory + (base + at) as u64,
                to: to as u64,
                bytes: bytes as u32,
                view,
                chunk: chunk as u32,
                ..Piece::default()
            };
            pieces.extend([piece(0, 0, 333, 0), piece(333, 333, 267, 0), piece(600, 600, 400, 1)]);
            let packed = view.packed(&bytes, base + 600);
            expected.push([&bytes[base..base + 600], &packed].concat());
        }
        let slots: Vec<u64> = (0..aside).map(|_| fixture.memory(CHUNK)).collect();
        let starts: Vec<u32> = (0..=CHUNKS as u32).map(|c| 3 * c).collect();
        let fence = fixture.upload(&[0_u64; 3]);
        let table = LateCopy {
            fence,
            pieces: fixture.upload(&pieces),
            views: fixture.upload(&[view]),
            starts: fixture.upload(&starts),
            slots: fixture.upload(&slots),
            chunks: CHUNKS as u32,
            first: (CHUNKS - aside) as u32,
        };
        let kernels = ["fence_latch", copy, "fence_publish"].map(|name| fixture.kernel("late_copy", name));
        let published = fixture.pinned(8).as_ptr() as u64;
        fixture.poke(published, &[0xFF; 8]);
        let watermark = fixture.upload(&[0_u64]);
        Self { fixture, stream, kernels, block, fence, watermark, published, slots, table, expected, memory }
    }

    /// Runs the three kernels in their order, on this grid.
    fn run(&self, watermark: u64, base: u64, save: u64, grid: u32) {
        let fence = self.fence;
        self.fixture.poke(self.watermark, &watermark.to_le_bytes());
        let latch = Latch { fence, watermark: self.watermark, base, save, chunks: CHUNKS as u32, unused: 0 };
        assert_eq!(self.fixture.launch(self.kernels[0], 1, 1, self.stream, latch), 0);
        assert_eq!(self.fixture.launch(self.kernels[1], grid, self.block, self.stream, self.table), 0);
        assert_eq!(self.fixture.launch(self.kernels[2], 1, 1, self.stream, Publish { fence, to: self.published }), 0);
        assert_eq!(synchronize(self.stream), 0);
    }

    fn published(&self) -> u64 {
        u64::from_le_bytes(self.fixture.peek(self.published, 8).try_into().unwrap())
    }

    /// True if the slot has the chunk's bytes; None if it was not written.
    fn copied(&self, chunk: usize) -> Option<bool> {
        let slot = self.fixture.peek(self.slots[chunk + self.slots.len() - CHUNKS], CHUNK);
        slot.iter().any(|&b| b != 0xCD).then(|| slot == self.expected[chunk])
    }
}

#[test]
fn chunks_from_the_watermark_on_are_copied_aside() {
    for left in 0..=CHUNKS {
        for grid in [1, 2, 40] {
            let fence = Fence::new(CHUNKS);
            let base = 1000 * grid as u64;
            fence.run(base + left as u64, base, 7, grid);
            assert_eq!(fence.published(), left as u64);
            for chunk in 0..CHUNKS {
                let expected = (chunk >= left).then_some(true);
                assert_eq!(fence.copied(chunk), expected, "left={left} chunk={chunk} grid={grid}");
            }
        }
    }
}

/// Four threads have enough words of a piece for four loads each; a block of 1,024 does not, and must work
/// nevertheless.
#[test]
fn chunks_are_copied_aside_by_either_kernel_on_blocks_of_any_size() {
    for copy in ["late_copy", "late_copy_four"] {
        for block in [1, 4, 64, 1024] {
            let fence = Fence::with(CHUNKS, copy, block);
            fence.run(1, 0, 7, 3);
            let copied: Vec<_> = (0..CHUNKS).map(|chunk| fence.copied(chunk)).collect();
            assert_eq!(copied, [None, Some(true), Some(true), Some(true), Some(true)], "{copy} block={block}");
        }
    }
}

#[test]
fn a_watermark_of_another_save_is_none_or_all_of_this_one() {
    for (watermark, base, expected) in [(3, 10, 0), (10, 10, 0), (40, 10, CHUNKS as u64)] {
        let fence = Fence::new(CHUNKS);
        fence.run(watermark, base, 2, 3);
        assert_eq!((fence.published(), fence.copied(4)), (expected, (expected == 0).then_some(true)));
    }
}

#[test]
fn only_chunks_with_a_slot_are_copied() {
    let fence = Fence::new(2);
    fence.run(3, 0, 1, 4);
    assert_eq!((fence.published(), fence.copied(3), fence.copied(4)), (3, Some(true), Some(true)));
    let fence = Fence::new(2);
    fence.run(4, 0, 1, 4);
    assert_eq!((fence.published(), fence.copied(3), fence.copied(4)), (4, None, Some(true)));
}

#[test]
fn a_second_run_for_the_same_save_changes_nothing() {
    let fence = Fence::new(CHUNKS);
    fence.run(2, 0, 1, 4);
    assert_eq!((fence.published(), fence.copied(4)), (2, Some(true)));
    // The optimizer has written since, and more chunks have left.
    fence.fixture.poke(fence.memory, &[0; CHUNKS * CHUNK]);
    fence.run(4, 0, 1, 4);
    assert_eq!((fence.published(), fence.copied(2), fence.copied(4)), (2, Some(true), Some(true)));
    // The next save latches again.
    fence.run(9, 5, 2, 4);
    assert_eq!((fence.published(), fence.copied(4)), (4, Some(false)));
}
