//! Digests of updated tensors, computed without the updated bytes.
//!
//! A CRC is linear: with `^` for the exclusive or of strings of one length, the digest of `a ^ b` is
//! `digest(a) ^ digest(b) ^ digest(zeros)`. So the digest of an updated tensor follows from the digest of the
//! older tensor and from the few bits that differ.

use crate::digest::Digest;

/// The digest of `length` zero bytes.
fn of_zeros(length: u64) -> Digest {
    let (mut sum, mut run, mut left) = (Digest::EMPTY, Digest::of(&[0]), length);
    let mut size = 1_u64;
    while left > 0 {
        if left & 1 == 1 {
            // All runs are zeros, so their order does not matter.
            sum = sum.then(run, size);
        }
        left >>= 1;
        if left > 0 {
            run = run.then(run, size);
            size *= 2;
        }
    }
    sum
}

/// Differences are digested in a window of this many bytes, which stays in the fastest cache.
const WINDOW: usize = 16 << 10;

/// The digest of a string of zeros in which bytes are set from front to back.
pub(super) struct Differences {
    window: Box<[u8; WINDOW]>,
    clean: bool,
    /// The number of bytes before the window.
    before: u64,
    sum: Digest,
    zeros: Digest,
}

impl Differences {
    pub fn new() -> Self {
        let zeros = of_zeros(WINDOW as u64);
        Self { window: Box::new([0; WINDOW]), clean: true, before: 0, sum: Digest::EMPTY, zeros }
    }

    /// Moves the window forward until it contains the byte at `at`, which must not lie before the window.
    /// Returns the offset of that byte in the window.
    #[inline(always)]
    pub fn seek(&mut self, at: usize) -> usize {
        let mut offset = at as u64 - self.before;
        if offset >= WINDOW as u64 {
            self.advance(offset / WINDOW as u64);
            offset %= WINDOW as u64;
        }
        self.clean = false;
        offset as usize
    }

    pub fn window(&mut self) -> &mut [u8] {
        &mut self.window[..]
    }

    #[inline(never)]
    fn advance(&mut self, windows: u64) {
        let bytes = WINDOW as u64;
        let first = if self.clean { self.zeros } else { Digest::of(&self.window[..]) };
        self.sum = self.sum.then(first, bytes);
        self.before += bytes;
        if !self.clean {
            self.window.fill(0);
            self.clean = true;
        }
        if windows > 1 {
            let skipped = (windows - 1) * bytes;
            self.sum = self.sum.then(of_zeros(skipped), skipped);
            self.before += skipped;
        }
    }

    /// Returns the digest of `length` bytes: those of `base`, changed by the differences.
    pub fn result(mut self, base: Digest, length: u64) -> Digest {
        let left = length.saturating_sub(self.before);
        if left > WINDOW as u64 {
            self.advance(left / WINDOW as u64);
        }
        let left = length.saturating_sub(self.before);
        let tail = Digest::of(self.window.get(..left as usize).unwrap_or_default());
        let sum = self.sum.then(tail, left);
        Digest::from_bits(base.to_bits() ^ sum.to_bits() ^ of_zeros(length).to_bits())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_digest_of_zeros_needs_no_zeros(length in 0_usize..100_000) {
            prop_assert_eq!(of_zeros(length as u64), Digest::of(&vec![0; length]));
        }

        #[test]
        fn the_digest_of_a_result_follows_from_the_base_and_the_differences(
            length in 1_usize..100_000, seed in any::<u64>(), bits in prop::collection::vec(any::<(u32, u8)>(), 0..20),
        ) {
            let base: Vec<u8> = (0..length).map(|i| (seed.wrapping_mul(i as u64 | 1) >> 32) as u8).collect();
            let mut bits: Vec<_> = bits.into_iter().map(|(at, bit)| (at as usize % length, bit)).collect();
            bits.sort_unstable();
            bits.dedup_by_key(|(at, _)| *at);
            let (mut new, mut differences) = (base.clone(), Differences::new());
            for (at, bit) in bits {
                new[at] ^= bit;
                let offset = differences.seek(at);
                differences.window()[offset] = bit;
            }
            prop_assert_eq!(differences.result(Digest::of(&base), length as u64), Digest::of(&new));
        }
    }
}
