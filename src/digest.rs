//! CRC-64/NVME: the digest of every staged byte. Digests of adjacent byte runs combine into one digest.
//!
//! Combining must be cheap, because a checkpoint of 40,000 tensors combines 40,000 digests per save.
//! Appending `n` bytes multiplies the register by x^(8n) modulo the polynomial. With a table of x^(8 * 2^k)
//! this takes at most 64 carry-less multiplications of 64 bits, for any `n`.

mod flip;

pub(crate) use flip::LONGEST;
pub use flip::{Flip, explain};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::sync::OnceLock;

/// The generator polynomial, bit-reflected.
const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;

/// A CRC-64/NVME digest, written as 16 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(u64);

impl Digest {
    /// The digest of no bytes.
    pub const EMPTY: Digest = Digest(0);

    /// The digest of `bytes`, in one pass.
    pub fn of(bytes: &[u8]) -> Self {
        Self(crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, bytes))
    }

    /// The digest of `self`'s bytes followed by the `next_len` bytes of `next`.
    pub fn then(self, next: Digest, next_len: u64) -> Self {
        match (self, next_len) {
            (_, 0) => self,
            // Skips the multiplication, because a run that is digested piece by piece begins with EMPTY.
            (Self::EMPTY, _) => next,
            _ => Self(times_x8n(self.0, next_len) ^ next.0),
        }
    }

    /// The digest of the concatenation of `(digest, length)` pieces, in order.
    pub fn concat(pieces: impl IntoIterator<Item = (Digest, u64)>) -> Self {
        pieces.into_iter().fold(Self::EMPTY, |sum, (digest, len)| sum.then(digest, len))
    }

    /// The 16 hex digits as bytes, for templates of fixed width.
    pub fn to_hex(self) -> [u8; 16] {
        let mut out = [0; 16];
        for (i, digit) in out.iter_mut().enumerate() {
            *digit = b"0123456789abcdef"[(self.0 >> (60 - 4 * i)) as usize & 15];
        }
        out
    }

    /// Parses exactly 16 lower-case hex digits. One digest has one spelling, so every flipped bit in it is
    /// detected.
    pub fn from_hex(text: &[u8]) -> Option<Self> {
        if text.len() != 16 {
            return None;
        }
        text.iter()
            .try_fold(0_u64, |sum, &b| {
                let digit = match b {
                    b'0'..=b'9' => b - b'0',
                    b'a'..=b'f' => b - b'a' + 10,
                    _ => return None,
                };
                Some(sum << 4 | u64::from(digit))
            })
            .map(Digest)
    }

    /// The register's value.
    pub fn to_bits(self) -> u64 {
        self.0
    }

    /// A digest from the register's value.
    pub fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        Self::from_hex(text.as_bytes()).ok_or_else(|| serde::de::Error::custom("a digest is 16 lower-case hex digits"))
    }
}

/// `a * b` modulo the polynomial; bit-reflected, so x^0 is the highest bit.
fn multiply(a: u64, mut b: u64) -> u64 {
    let mut product = 0;
    for bit in (0..64).rev() {
        product ^= b & 0_u64.wrapping_sub(a >> bit & 1);
        b = b >> 1 ^ POLYNOMIAL & 0_u64.wrapping_sub(b & 1);
    }
    product
}

/// `crc * x^(8n)` modulo the polynomial.
fn times_x8n(crc: u64, n: u64) -> u64 {
    static POWERS: OnceLock<[u64; 64]> = OnceLock::new();
    let powers = POWERS.get_or_init(|| {
        let mut powers = [1 << (63 - 8); 64];
        for k in 1..64 {
            powers[k] = multiply(powers[k - 1], powers[k - 1]);
        }
        powers
    });
    (0..64).filter(|k| n >> k & 1 == 1).fold(crc, |crc, k| multiply(powers[k], crc))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_check_value_of_the_standard() {
        assert_eq!(Digest::of(b"123456789").to_string(), "ae8b14860a799888");
        assert_eq!(Digest::of(b""), Digest::EMPTY);
    }

    #[test]
    fn combining_agrees_with_the_crate_for_lengths_no_memory_holds() {
        let (a, b) = (Digest::of(b"shore"), Digest::of(b"line"));
        for n in [1, 4096, 1 << 33, (1 << 40) + 12_345] {
            let theirs = crc_fast::checksum_combine(crc_fast::CrcAlgorithm::Crc64Nvme, a.0, b.0, n);
            assert_eq!(a.then(b, n), Digest(theirs), "{n}");
        }
    }

    proptest! {
        #[test]
        fn digests_of_pieces_combine_to_the_digest_of_the_whole(
            bytes in prop::collection::vec(any::<u8>(), 0..5000), cuts in prop::collection::vec(0_usize..5000, 0..5),
        ) {
            let mut cuts: Vec<_> = cuts.into_iter().map(|c| c.min(bytes.len())).chain([0, bytes.len()]).collect();
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|w| &bytes[w[0]..w[1]]);
            prop_assert_eq!(Digest::concat(pieces.map(|p| (Digest::of(p), p.len() as u64))), Digest::of(&bytes));
        }

        #[test]
        fn hex_has_one_spelling(bits in any::<u64>(), place in 0_usize..16) {
            let hex = Digest(bits).to_hex();
            prop_assert_eq!(&Digest(bits).to_string(), std::str::from_utf8(&hex).unwrap());
            prop_assert_eq!(Digest::from_hex(&hex), Some(Digest(bits)));
            for bit in 0..8 {
                let mut flipped = hex;
                flipped[place] ^= 1 << bit;
                prop_assert_ne!(Digest::from_hex(&flipped), Some(Digest(bits)));
            }
        }
    }
}
