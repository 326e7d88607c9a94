//! Finds flipped bits from two digests of the same bytes: the digest at the time of writing and the digest at
//! the time of reading.
//!
//! **Mathematics.** The digest is affine. So the exclusive-or of both digests, the *syndrome*, is the
//! remainder of `e(x) * x^64`, where `e` has a one for each flipped bit. A run of flips that ends `t` bits
//! before the end of the bytes is `x^t * p(x)`, with a `p` of few terms. The search divides the syndrome by
//! `x^64`, and then by `x^8` for each byte from the end. It stops when the quotient has only terms of low
//! degree; these terms are the flips. The search reads no bytes again.
//!
//! **Uniqueness.** The polynomial is primitive: the order of `x` is `2^64 - 1`, which a test proves. So one
//! flipped bit has one place in any length below 2^64 bits. Other damage of 8 MiB looks like one flipped bit
//! once in 2^38 cases, like flips within one byte once in 2^34 cases, and like flips within [`WIDTH`] bits
//! once in 2^23 cases. The search prefers a narrower explanation to a wider one. Two equally narrow
//! explanations count as none.

#[cfg(test)]
use super::multiply;
use super::{Digest, POLYNOMIAL};
use serde::Serialize;
use std::sync::OnceLock;

/// The maximum number of neighbouring bits within which flips are found.
const WIDTH: u32 = 16;

/// The bits of a byte-aligned window in which [`WIDTH`] bits at any offset fit.
const WINDOW: u32 = WIDTH + 8;

/// Maximum number of bytes in a run that is searched. It bounds the time to a fraction of a second.
pub(crate) const LONGEST: u64 = 128 << 20;

/// Flipped bits within 16 neighbouring bits, the only such flips that explain two digests.
///
/// Bits are counted from the lowest bit of a byte, bytes from the start of the digested bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Flip {
    /// The offset of the first changed byte.
    pub offset: u64,
    /// Which bits of the bytes from `offset` on are flipped; the lowest 8 bits are for the first byte.
    pub mask: u32,
}

impl Flip {
    /// The number of changed bytes, from the first to the last: 1 to 3.
    pub fn bytes(self) -> usize {
        (u32::BITS - self.mask.leading_zeros()).div_ceil(8) as usize
    }

    /// The number of the flipped bit in its byte, if only one bit is flipped.
    pub fn single_bit(self) -> Option<u32> {
        (self.mask.is_power_of_two()).then(|| self.mask.trailing_zeros())
    }

    /// True when the flips are within one byte.
    pub fn is_one_byte(self) -> bool {
        self.mask <= 0xff
    }

    /// The flipped bits of the byte at `offset` of the digested bytes: 0 when the byte is not changed.
    pub fn mask_at(self, offset: u64) -> u8 {
        match offset.checked_sub(self.offset) {
            Some(at @ 0..4) => (self.mask >> (8 * at)) as u8,
            _ => 0,
        }
    }
}

/// Finds the flips that turn `len` bytes of the digest `written` into bytes of the digest `found`: within one
/// bit, else within one byte, else within 16 neighbouring bits. Returns None when there are no such flips, or
/// several.
pub fn explain(written: Digest, found: Digest, len: u64) -> Option<Flip> {
    let syndrome = written.0 ^ found.0;
    if syndrome == 0 || len > LONGEST {
        return None;
    }
    let mut narrowest = Narrowest::default();
    let mut rest = divided_by_x64(syndrome);
    for after in 0..len {
        // `rest` times x^(8 * after) is the syndrome. Terms below x^24 are flips in the three bytes that have
        // `after` to `after + 2` bytes behind them.
        if rest << WINDOW == 0 {
            narrowest.take(len, after, rest);
        }
        rest = divided_by_x8(rest);
    }
    narrowest.found.filter(|_| !narrowest.ambiguous)
}

#[derive(Default)]
struct Narrowest {
    found: Option<Flip>,
    ambiguous: bool,
}

impl Narrowest {
    /// Takes the flips whose terms are the highest bits of `rest`. They are in bytes that have `after` or
    /// more bytes behind them.
    fn take(&mut self, len: u64, after: u64, rest: u64) {
        // x^0 is both the highest bit of the register and the highest bit of the last byte.
        let bytes = (rest >> (u64::BITS - WINDOW)) as u32;
        if u32::BITS - bytes.leading_zeros() - bytes.trailing_zeros() > WIDTH {
            return;
        }
        let first = bytes.trailing_zeros() / 8;
        // A window may begin before the first byte; the flips may not.
        if let Some(offset) = (len - after + u64::from(first)).checked_sub(u64::from(WINDOW / 8)) {
            self.judge(Flip { offset, mask: bytes >> (8 * first) });
        }
    }

    fn judge(&mut self, flip: Flip) {
        let class = |flip: Flip| (flip.single_bit().is_none(), !flip.is_one_byte());
        match self.found {
            Some(found) if found == flip || class(found) < class(flip) => {}
            Some(found) if class(found) == class(flip) => self.ambiguous = true,
            _ => (self.found, self.ambiguous) = (Some(flip), false),
        }
    }
}

/// `register / x` modulo the polynomial.
fn divided_by_x(register: u64) -> u64 {
    // The constant term of the polynomial is 1 and is the highest bit. So multiplying by x sets that bit
    // exactly when it subtracts the polynomial.
    if register >> 63 == 1 { (register ^ POLYNOMIAL) << 1 | 1 } else { register << 1 }
}

fn divided_by_x8(register: u64) -> u64 {
    static QUOTIENTS: OnceLock<[u64; 256]> = OnceLock::new();
    let quotients = QUOTIENTS.get_or_init(|| {
        std::array::from_fn(|byte| (0..8).fold((byte as u64) << 56, |register, _| divided_by_x(register)))
    });
    register << 8 ^ quotients[(register >> 56) as usize]
}

fn divided_by_x64(register: u64) -> u64 {
    (0..8).fold(register, |register, _| divided_by_x8(register))
}

/// `x^n` modulo the polynomial.
#[cfg(test)]
fn power_of_x(n: u64) -> u64 {
    let (mut power, mut square) = (1 << 63, 1 << 62);
    for k in 0..64 {
        if n >> k & 1 == 1 {
            power = multiply(power, square);
        }
        square = multiply(square, square);
    }
    power
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Pseudo-random numbers from a seed.
    fn numbers(mut seed: u64) -> impl FnMut(u64) -> u64 {
        move |below| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 16) % below
        }
    }

    fn flipped(bytes: &[u8], bits: impl IntoIterator<Item = u64>) -> Vec<u8> {
        let mut flipped = bytes.to_vec();
        bits.into_iter().for_each(|bit| flipped[(bit / 8) as usize] ^= 1 << (bit % 8));
        flipped
    }

    fn found(written: &[u8], read: &[u8]) -> Option<Flip> {
        explain(Digest::of(written), Digest::of(read), written.len() as u64)
    }

    #[test]
    fn the_polynomial_is_primitive() {
        let all = u64::MAX;
        assert_eq!(power_of_x(all), 1 << 63, "x^(2^64 - 1) is 1");
        let primes = [3, 5, 17, 257, 641, 65_537, 6_700_417];
        assert_eq!(primes.into_iter().fold(1_u64, u64::wrapping_mul), all);
        for prime in primes {
            assert_ne!(power_of_x(all / prime), 1 << 63, "{prime}");
        }
        assert_eq!([divided_by_x(1 << 62), divided_by_x64(power_of_x(64))], [1 << 63; 2]);
    }

    #[test]
    fn each_of_400_single_flips_is_located() {
        let mut below = numbers(1);
        let long: Vec<u8> = (0..8 << 20).map(|_| below(256) as u8).collect();
        for i in 0..400 {
            let len = if i < 8 { long.len() } else { 1 + below(20_000) as usize };
            let bit = below(8 * len as u64);
            let flip = found(&long[..len], &flipped(&long[..len], [bit])).expect("one flip has one place");
            assert_eq!((flip.offset, flip.single_bit()), (bit / 8, Some((bit % 8) as u32)), "len {len} bit {bit}");
            assert!(flip.is_one_byte() && flip.mask_at(bit / 8) == 1 << (bit % 8) && flip.mask_at(bit / 8 + 1) == 0);
        }
    }

    #[test]
    fn each_of_400_bursts_of_up_to_16_bits_is_located() {
        let mut below = numbers(2);
        let bytes: Vec<u8> = (0..20_000).map(|_| below(256) as u8).collect();
        for width in (2..=16).cycle().take(400) {
            let (first, inner) = (below(8 * bytes.len() as u64 - width), below(1 << (width - 2)));
            let bits = (0..width).filter(|k| *k == 0 || *k == width - 1 || inner >> (k - 1) & 1 == 1);
            let read = flipped(&bytes, bits.map(|k| first + k));
            let flip = found(&bytes, &read).expect("a burst of up to 16 bits is unique");
            let again: Vec<u8> = (0..).zip(&bytes).map(|(at, byte)| byte ^ flip.mask_at(at)).collect();
            assert!(again == read, "width {width} first {first}");
            assert_eq!((flip.offset, flip.single_bit()), (first / 8, None));
            assert_eq!(flip.bytes() as u64, (first + width - 1) / 8 - first / 8 + 1);
        }
    }

    #[test]
    fn pairs_of_flips_are_never_claimed() {
        let mut below = numbers(3);
        let bytes: Vec<u8> = (0..20_000).map(|_| below(256) as u8).collect();
        let all = 8 * bytes.len() as u64;
        for _ in 0..400 {
            let first = below(all - 100);
            let second = first + 17 + below(all - first - 17);
            assert_eq!(found(&bytes, &flipped(&bytes, [first, second])), None, "{first} and {second}");
        }
        assert_eq!(found(&bytes, &[0; 20_000]), None, "other bytes");
        assert_eq!(found(&bytes, &bytes), None, "the same bytes");
        assert_eq!(explain(Digest::of(b"a"), Digest::of(b"b"), LONGEST + 1), None, "too long to search");
    }

    proptest! {
        #[test]
        fn what_is_found_explains_both_digests(
            bytes in prop::collection::vec(any::<u8>(), 1..40), at in 0_usize..40, mask in 1_u8..,
        ) {
            let mut read = bytes.clone();
            let at = at % bytes.len();
            read[at] ^= mask;
            let flip = found(&bytes, &read).unwrap();
            prop_assert_eq!((flip.offset, flip.mask), (at as u64, u32::from(mask)));
        }

        #[test]
        fn damage_at_random_is_no_flip(written in any::<u64>(), read in any::<u64>()) {
            prop_assert_eq!(explain(Digest(written), Digest(read), 4096), None);
        }
    }
}
