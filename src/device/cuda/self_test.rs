//! Self-tests at start of kernels and of batched copies, against the CPU. If a device gets a byte wrong, it
//! does not gather, digest or batch copies.
//!
//! # Safety argument
//! Buffers are locals that outlive the queued work: they are dropped after the stream has ended, or leaked
//! after a timeout. The host reads the results only after the stream has ended.
#![expect(unsafe_code, reason = "kernels over local buffers; argument above")]

use super::driver::Copies;
use super::gpu::Gpu;
use crate::device::{Kernels, Piece, Pieces, View};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use smallvec::smallvec;
use std::mem::forget;
use std::sync::Arc;

/// Size of a buffer in bytes: enough for tensors from every alignment to every alignment.
const BYTES: usize = 48 << 10;

/// Tests gather and digest in the copy stream. The context must be current.
pub(super) fn run(kernels: &impl Kernels, gpu: &Gpu) -> Result<()> {
    let (host, from, to) = (gpu.context.pinned(2 * BYTES)?, gpu.context.memory(BYTES)?, gpu.context.memory(BYTES)?);
    // SAFETY: just allocated, and not shared yet.
    let sent = unsafe { std::slice::from_raw_parts_mut(host.pointer(), BYTES) };
    vary(sent);
    let (pieces, expected) = list(sent, from.address(), to.address());
    let (sent, back) = (sent.as_ptr(), host.pointer().wrapping_add(BYTES));
    let stream = gpu.copies.as_device();
    // Dropped unused, because `settle` waits for the copy stream, and so for all queued work.
    let mut queued = Vec::new();
    let mut queue = || {
        // SAFETY: within the buffers, which are kept until the stream has ended.
        unsafe { gpu.copies.copy_to_device(sent, from.address(), BYTES) }?;
        kernels.capture(stream, &pieces, &mut queued)?;
        // SAFETY: as above.
        unsafe { gpu.copies.copy_to_host(to.address(), back, BYTES) }?;
        kernels.digest(stream, &pieces, &mut queued)
    };
    let queued = queue();
    if !gpu.settle(&gpu.copies) {
        forget((host, from, to));
        return Err(Error::new(ErrorKind::Device, "kernels of the self-test did not end"));
    }
    let digests = queued?.take()?;
    // SAFETY: inside the buffer, which is not written any more.
    let back = unsafe { std::slice::from_raw_parts(back, BYTES) };
    let right = pieces.list.iter().zip(&expected).zip(&digests).all(|((piece, expected), digest)| {
        let at = (piece.to - to.address()) as usize;
        back.get(at..at + expected.len()) == Some(expected) && *digest == Digest::of(expected)
    });
    if right && digests.len() == expected.len() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Device, "the kernels of this device gather or digest wrong bytes"))
}

/// Tests batched copies of parts of a buffer to the host.
pub(super) fn batch(gpu: &Arc<Gpu>) -> Result<()> {
    let _entered = gpu.context.enter()?;
    let (host, from) = (gpu.context.pinned(2 * BYTES)?, gpu.context.memory(BYTES)?);
    // SAFETY: just allocated, and not shared yet.
    let (sent, back) = unsafe { std::slice::from_raw_parts_mut(host.pointer(), 2 * BYTES) }.split_at_mut(BYTES);
    vary(sent);
    let (sent, back) = (sent.as_ptr(), back.as_mut_ptr());
    let mut copies = Copies::default();
    // Parts of every length and alignment, each to its own offset.
    let mut at = 0;
    for len in (1..).take_while(|len| len * (len + 1) / 2 <= BYTES) {
        copies.push(from.address() + at as u64, back.wrapping_add(at), len);
        at += len;
    }
    let queue = || {
        // SAFETY: within the buffers, which are kept until the stream has ended.
        unsafe { gpu.copies.copy_to_device(sent, from.address(), BYTES) }?;
        // SAFETY: as above.
        unsafe { gpu.copies.copy_all_to_host(&copies) }
    };
    let queued = queue();
    if !gpu.settle(&gpu.copies) {
        forget((host, from));
        return Err(Error::new(ErrorKind::Device, "copies of the self-test did not end"));
    }
    queued?;
    gpu.context.alive()?;
    // SAFETY: the first half and part of the second, which are not written any more.
    let (sent, back) = unsafe { (std::slice::from_raw_parts(sent, at), std::slice::from_raw_parts(back, at)) };
    let wrong = || Error::new(ErrorKind::Device, "batched copies returned wrong bytes");
    if sent == back { Ok(()) } else { Err(wrong()) }
}

/// Bytes that differ from their neighbours.
fn vary(bytes: &mut [u8]) {
    bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i as u32).wrapping_mul(2_654_435_761).to_be_bytes()[0]);
}

/// Pieces to every alignment, and from nearly every alignment; a strided tensor; and the expected bytes of
/// each.
fn list(sent: &[u8], from: u64, to: u64) -> (Pieces, Vec<Vec<u8>>) {
    let mut pieces = Pieces::default();
    let (mut expected, mut end) = (Vec::new(), 0);
    let mut add = |pieces: &mut Pieces, at: u64, shift: u64, view, bytes: Vec<u8>| {
        end = u64::next_multiple_of(end, 16) + shift;
        let chunk = pieces.chunks;
        let piece = Piece { from: from + at, skip: 0, to: to + end, bytes: bytes.len() as u64, view, chunk };
        pieces.list.push(piece);
        pieces.chunks += 1;
        end += bytes.len() as u64;
        expected.push(bytes);
    };
    for shift in 0..32 {
        let (at, len) = ((shift * 1285) as usize, 33 + shift as usize * 5);
        add(&mut pieces, at as u64, shift / 2, None, sent[at..at + len].to_vec());
    }
    // The transpose of 10 rows of 24 elements of two bytes.
    pieces.views.push(View { item: 2, dims: smallvec![(24, 2), (10, 48)] });
    let element = |i: usize| &sent[(i % 10) * 48 + (i / 10) * 2..][..2];
    add(&mut pieces, 0, 6, Some(0), (0..24 * 10).flat_map(element).copied().collect());
    (pieces, expected)
}
