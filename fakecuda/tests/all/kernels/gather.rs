//! `gather` writes pieces of any alignment, contiguous or strided, to their destinations and nowhere else.

use super::{Piece, View, noise};
use crate::fixture::{Fixture, synchronize};

#[derive(Clone, Copy)]
#[repr(C)]
struct Gather {
    pieces: u64,
    views: u64,
    base: u64,
    first: u32,
    count: u32,
}

/// Gathers, and compares the whole destination, which has poison where no piece goes.
fn check(memory: &[u8], places: &[(usize, usize, usize)], room: usize, grid: u32, block: u32) {
    let fixture = Fixture::new();
    let (from, to, stream) = (fixture.upload(memory), fixture.memory(room), fixture.stream(1));
    let pieces: Vec<_> = places
        .iter()
        .map(|&(source, target, bytes)| Piece {
            from: from + source as u64,
            to: target as u64,
            bytes: bytes as u32,
            ..Piece::default()
        })
        .collect();
    // A first piece outside the range, which must not be gathered.
    let outside = Piece { from: 1, bytes: 1, ..Piece::default() };
    let table = fixture.upload(&[&[outside][..], &pieces].concat());
    let argument = Gather { pieces: table, views: 0, base: to, first: 1, count: pieces.len() as u32 };
    let kernel = fixture.kernel("gather", "gather");
    assert_eq!((fixture.launch(kernel, grid, block, stream, argument), synchronize(stream)), (0, 0));
    let mut expected = vec![0xCD; room];
    for &(source, target, bytes) in places {
        expected[target..target + bytes].copy_from_slice(&memory[source..source + bytes]);
    }
    let got = fixture.peek(to, room);
    let wrong = (0..room).find(|&i| got[i] != expected[i]);
    assert_eq!(wrong, None, "grid={grid} block={block}");
}

#[test]
fn every_alignment_of_source_and_target_at_every_short_length() {
    let memory = noise(4096, 1);
    for length in (0..=100_usize).chain([127, 128, 129, 255, 256, 1000, 1023]) {
        let stride = (length + 40).next_multiple_of(16);
        let places: Vec<_> = (0..256).map(|i| (256 + i % 16, i * stride + 16 + i / 16, length)).collect();
        check(&memory, &places, 256 * stride + 64, 7, 32);
    }
}

#[test]
fn large_pieces_at_every_alignment_and_any_grid() {
    let memory = noise((256 << 10) + 64, 2);
    for (i, (grid, block)) in [(1, 1), (3, 256), (64, 96), (200, 1024)].into_iter().enumerate() {
        let bytes = (64 << 10) - i;
        let places: Vec<_> = (0..16).map(|a| (a * 7919, a * (bytes + 48) + (a * 5 + i) % 16, bytes)).collect();
        check(&memory, &places, 17 * (bytes + 48), grid, block);
    }
}

#[test]
fn the_whole_of_an_allocation_is_read_and_nothing_beside_it() {
    // Each source and each target is its own allocation, so that an access past an end is detected.
    let fixture = Fixture::new();
    let (kernel, stream) = (fixture.kernel("gather", "gather"), fixture.stream(1));
    for bytes in [1_usize, 7, 8, 15, 16, 17, 24, 31, 33, 250, 4097] {
        for shift in 0..16_usize.min(bytes) {
            let memory = noise(bytes, bytes as u64);
            let (from, to) = (fixture.upload(&memory), fixture.memory(bytes));
            let piece = Piece { from: from + shift as u64, bytes: (bytes - shift) as u32, ..Piece::default() };
            let pieces = fixture.upload(&[piece]);
            let argument = Gather { pieces, views: 0, base: to, first: 0, count: 1 };
            assert_eq!((fixture.launch(kernel, 2, 64, stream, argument), synchronize(stream)), (0, 0));
            assert_eq!(fixture.peek(to, bytes - shift), memory[shift..]);
        }
    }
}

#[test]
fn strided_tensors_are_packed_piece_by_piece() {
    let memory = noise(64 << 10, 3);
    let fixture = Fixture::new();
    let (from, kernel, stream) = (fixture.upload(&memory), fixture.kernel("gather", "gather"), fixture.stream(1));
    let cases = [
        (View::new(&[33, 17], &[4, 33 * 4], 4), 0),
        (View::new(&[5, 7, 3], &[2, 10, 700], 2), 6),
        (View::new(&[100], &[-8], 8), 900),
        (View::new(&[4, 6], &[0, 16], 16), 5),
        (View::new(&[2, 3, 2, 3, 2, 2, 3, 2], &[1, 2, 6, 12, 40, 80, 200, 900], 1), 11),
        (View::new(&[9, 3], &[100, 24], 24), 3),
        (View::new(&[], &[], 4), 1),
    ];
    for (i, (view, offset)) in cases.into_iter().enumerate() {
        let expected = view.packed(&memory, offset);
        let item = view.item as usize;
        // In three pieces, at an odd address.
        let cuts = [0, expected.len() / item / 3 * item, expected.len() / item / 2 * item, expected.len()];
        let pieces: Vec<_> = cuts
            .windows(2)
            .map(|w| Piece {
                from: from + offset as u64,
                to: w[0] as u64 + (i % 4) as u64,
                skip: w[0] as u64,
                bytes: (w[1] - w[0]) as u32,
                view: 1,
                ..Piece::default()
            })
            .collect();
        let to = fixture.memory(expected.len() + 8);
        let (pieces, views) = (fixture.upload(&pieces), fixture.upload(&[view]));
        let argument = Gather { pieces, views, base: to, first: 0, count: 3 };
        assert_eq!((fixture.launch(kernel, 2, 48, stream, argument), synchronize(stream)), (0, 0), "case {i}");
        assert!(fixture.peek(to + (i % 4) as u64, expected.len()) == expected, "case {i}");
    }
}
