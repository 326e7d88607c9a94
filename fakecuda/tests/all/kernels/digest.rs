//! `digest` equals CRC-64/NVME on the host, for every alignment, length, layout and grid.

use super::{Piece, View, noise};
use crate::fixture::{Fixture, Kernel, synchronize};

const TABLES: usize = 8 * 256 + 256 + 40;

#[derive(Clone, Copy)]
#[repr(C)]
struct Digest {
    pieces: u64,
    views: u64,
    tables: u64,
    out: u64,
    first: u32,
    count: u32,
}

fn crc(bytes: &[u8]) -> u64 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, bytes)
}

/// Returns the filled tables and the kernel.
fn ready(fixture: &Fixture, stream: u64) -> (u64, Kernel) {
    let tables = fixture.memory(TABLES * 8);
    assert_eq!(fixture.launch(fixture.kernel("digest", "digest_tables"), 3, 128, stream, tables), 0);
    (tables, fixture.kernel("digest", "digest"))
}

fn digests(
    fixture: &Fixture,
    ready: (u64, Kernel),
    pieces: &[Piece],
    views: &[View],
    grid: (u32, u32),
    stream: u64,
) -> Vec<u64> {
    let (tables, kernel) = ready;
    let out = fixture.upload(&vec![0_u64; pieces.len()]);
    let (table, views) = (fixture.upload(pieces), fixture.upload(views));
    let count = pieces.len() as u32;
    let argument = Digest { pieces: table, views, tables, out, first: 0, count };
    assert_eq!((fixture.launch(kernel, grid.0, grid.1, stream, argument), synchronize(stream)), (0, 0));
    let bytes = fixture.peek(out, 8 * pieces.len());
    bytes.chunks(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn every_alignment_and_short_length() {
    let fixture = Fixture::new();
    let (memory, stream) = (noise(16 << 10, 4), fixture.stream(1));
    let (from, ready) = (fixture.upload(&memory), ready(&fixture, stream));
    let lengths = (0..=100_usize).chain([2047, 2048, 2049, 4096, 10_000]);
    let ranges: Vec<_> = lengths.flat_map(|length| (0..8).map(move |shift| (shift * 129, length))).collect();
    let piece =
        |&(at, length): &(usize, usize)| Piece { from: from + at as u64, bytes: length as u32, ..Piece::default() };
    let pieces: Vec<_> = ranges.iter().map(piece).collect();
    let got = digests(&fixture, ready, &pieces, &[], (16, 64), stream);
    for (&(at, length), got) in ranges.iter().zip(got) {
        assert_eq!(got, crc(&memory[at..at + length]), "at={at} length={length}");
    }
    assert_eq!(crc(b"123456789"), 0xae8b_1486_0a79_9888);
}

#[test]
fn large_pieces_on_any_grid() {
    let fixture = Fixture::new();
    let (memory, stream) = (noise(300 << 10, 5), fixture.stream(1));
    let (from, ready) = (fixture.upload(&memory), ready(&fixture, stream));
    let pieces: Vec<_> = (0..4)
        .map(|i| Piece { from: from + 3 * i, bytes: (64 << 10) + i as u32 * 41_111, ..Piece::default() })
        .collect();
    let expected: Vec<_> = (0..4).map(|i| crc(&memory[3 * i..3 * i + (64 << 10) + i * 41_111])).collect();
    for grid in [(1, 1), (2, 256), (9, 1024), (4, 100)] {
        assert_eq!(digests(&fixture, ready, &pieces, &[], grid, stream), expected, "{grid:?}");
    }
}

#[test]
fn strided_tensors_digest_as_they_are_packed() {
    let fixture = Fixture::new();
    let (memory, stream) = (noise(32 << 10, 6), fixture.stream(1));
    let (from, ready) = (fixture.upload(&memory), ready(&fixture, stream));
    let views =
        [View::new(&[61, 37], &[4, 61 * 4], 4), View::new(&[50, 3], &[24, 2], 2), View::new(&[7, 9], &[81, 9], 1)];
    let pieces: Vec<_> = [(1, 0, 61 * 37 * 4), (1, 400, 1000), (2, 0, 300), (2, 2, 14), (3, 5, 50)]
        .map(|(view, skip, bytes)| Piece { from: from + 8, skip, bytes, view, ..Piece::default() })
        .into();
    let got = digests(&fixture, ready, &pieces, &views, (3, 256), stream);
    for (piece, got) in pieces.iter().zip(got) {
        let packed = views[piece.view as usize - 1].packed(&memory, 8);
        let (skip, bytes) = (piece.skip as usize, piece.bytes as usize);
        assert_eq!(got, crc(&packed[skip..skip + bytes]), "view={} skip={skip}", piece.view);
    }
}

#[test]
fn one_flipped_bit_is_seen() {
    let fixture = Fixture::new();
    let (mut memory, stream) = (noise(5000, 7), fixture.stream(1));
    let (from, ready) = (fixture.upload(&memory), ready(&fixture, stream));
    let pieces = [Piece { from: from + 1, bytes: 4990, ..Piece::default() }];
    let before = digests(&fixture, ready, &pieces, &[], (1, 256), stream);
    for at in [1, 7, 8, 2500, 4990] {
        memory[at] ^= 16;
        fixture.poke(from, &memory);
        assert_ne!(digests(&fixture, ready, &pieces, &[], (1, 256), stream), before, "{at}");
        memory[at] ^= 16;
    }
}
