//! Elements as integers of their width, ordered so that a small update is a small difference.

use crate::state::Dtype;

/// The width of a tensor's elements, and whether their highest bit is a sign apart from the magnitude.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// 1, 2, 4 or 8 bytes.
    pub width: usize,
    /// Whether the integers are ordered as floats are.
    pub float: bool,
    /// Whether an element of the tensor is one of these numbers. False where several elements share a byte.
    pub whole: bool,
}

impl Numbers {
    /// The numbers of `dtype`. Elements of less than a byte are compared byte by byte.
    pub fn of(dtype: Dtype) -> Self {
        let bits = dtype.bitsize();
        let float = matches!(
            dtype,
            Dtype::F8_E5M2
                | Dtype::F8_E4M3
                | Dtype::F8_E4M3FNUZ
                | Dtype::F8_E5M2FNUZ
                | Dtype::F16
                | Dtype::BF16
                | Dtype::F32
                | Dtype::F64
        );
        Self { width: (bits / 8).max(1), float, whole: bits >= 8 }
    }
}

/// An element: an unsigned integer of its width.
pub(super) trait Number: Copy + PartialEq {
    const WIDTH: usize;
    /// Whether differences of this width can be longer than a byte.
    const LONG: bool;

    /// The element at `index` of `bytes`, or zero beyond their end.
    fn get(bytes: &[u8], index: usize) -> Self;
    /// Sets the element at `index` of `bytes`, if there is one.
    fn set(self, bytes: &mut [u8], index: usize);
    /// The first element of `bytes`, if they are long enough.
    fn first(bytes: &[u8]) -> Option<Self>;
    /// Appends the element.
    fn push(self, to: &mut Vec<u8>);
    /// The distance from `self` to `new`, folded so that a small distance in either direction is a small
    /// number.
    fn distance(self, new: Self, float: bool) -> Self;
    /// The element at this distance.
    fn moved(self, distance: Self, float: bool) -> Self;
    fn byte(self) -> u8;
    fn from_byte(byte: u8) -> Self;
    /// The exclusive or of both numbers, bit by bit.
    fn xor(self, other: Self) -> Self;
    fn is_zero(self) -> bool;
    fn is_long(self) -> bool;
}

macro_rules! number {
    ($type:ty, $signed:ty) => {
        impl Number for $type {
            const WIDTH: usize = size_of::<$type>();
            const LONG: bool = size_of::<$type>() > 1;

            #[inline(always)]
            fn get(bytes: &[u8], index: usize) -> Self {
                bytes.as_chunks().0.get(index).map_or(0, |bytes| Self::from_le_bytes(*bytes))
            }

            #[inline(always)]
            fn set(self, bytes: &mut [u8], index: usize) {
                if let Some(bytes) = bytes.as_chunks_mut().0.get_mut(index) {
                    *bytes = self.to_le_bytes();
                }
            }

            #[inline(always)]
            fn first(bytes: &[u8]) -> Option<Self> {
                bytes.first_chunk().map(|bytes| Self::from_le_bytes(*bytes))
            }

            fn push(self, to: &mut Vec<u8>) {
                to.extend_from_slice(&self.to_le_bytes());
            }

            #[inline(always)]
            fn distance(self, new: Self, float: bool) -> Self {
                let order = |n: Self| if float { ordered::<$type>(n, Self::BITS) } else { n };
                let distance = order(new).wrapping_sub(order(self));
                (distance << 1) ^ ((distance as $signed) >> (Self::BITS - 1)) as Self
            }

            #[inline(always)]
            fn moved(self, distance: Self, float: bool) -> Self {
                let by = (distance >> 1) ^ (distance & 1).wrapping_neg();
                if !float {
                    return self.wrapping_add(by);
                }
                let moved = ordered::<$type>(self, Self::BITS).wrapping_add(by);
                let sign = 1 << (Self::BITS - 1);
                if moved & sign == 0 { !moved } else { moved ^ sign }
            }

            #[inline(always)]
            fn byte(self) -> u8 {
                self as u8
            }

            #[inline(always)]
            fn from_byte(byte: u8) -> Self {
                byte.into()
            }

            #[inline(always)]
            fn xor(self, other: Self) -> Self {
                self ^ other
            }

            #[inline(always)]
            fn is_zero(self) -> bool {
                self == 0
            }

            #[inline(always)]
            fn is_long(self) -> bool {
                Self::LONG && self >= (super::values::LONG as $type)
            }
        }

        impl Ordered for $type {
            #[inline(always)]
            fn invert_or_mark(self, sign: Self) -> Self {
                if self & sign == 0 { self | sign } else { !self }
            }

            #[inline(always)]
            fn sign(bits: u32) -> Self {
                1 << (bits - 1)
            }
        }
    };
}
number!(u8, i8);
number!(u16, i16);
number!(u32, i32);
number!(u64, i64);

/// Orders floats as integers: the negative floats of the largest magnitude become the lowest integers.
trait Ordered: Copy {
    fn invert_or_mark(self, sign: Self) -> Self;
    fn sign(bits: u32) -> Self;
}

#[inline(always)]
fn ordered<N: Ordered>(number: N, bits: u32) -> N {
    number.invert_or_mark(N::sign(bits))
}

/// Calls `$f` with the type of numbers of this width.
macro_rules! by_width {
    ($width:expr, $f:ident ( $($argument:expr),* $(,)? )) => {
        match $width {
            1 => $f::<u8>($($argument),*),
            2 => $f::<u16>($($argument),*),
            4 => $f::<u32>($($argument),*),
            _ => $f::<u64>($($argument),*),
        }
    };
}
pub(super) use by_width;

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;
    use proptest::prelude::*;

    #[test]
    fn neighbours_of_a_float_are_one_apart_also_across_zero() {
        let bits = |f: f32| bf16::from_f32(f).to_bits();
        assert_eq!(bits(1.0).distance(bits(1.0) + 1, true), 2);
        assert_eq!(bits(1.0).distance(bits(1.0) - 1, true), 1);
        assert_eq!(bits(-1.0).distance(bits(-1.0) + 1, true), 1, "a larger magnitude of a negative is lower");
        assert_eq!(bits(-0.0).distance(bits(0.0), true), 2, "zero follows minus zero");
        assert_eq!(0_u16.distance(u16::MAX, false), 1, "integers wrap");
    }

    proptest! {
        #[test]
        fn every_bit_pattern_is_reached_from_every_other(a in any::<u64>(), b in any::<u64>(), float in any::<bool>()) {
            prop_assert_eq!(a.moved(a.distance(b, float), float), b);
            let (a, b) = (a as u32, b as u32);
            prop_assert_eq!(a.moved(a.distance(b, float), float), b);
            let (a, b) = (a as u16, b as u16);
            prop_assert_eq!(a.moved(a.distance(b, float), float), b);
            let (a, b) = (a as u8, b as u8);
            prop_assert_eq!(a.moved(a.distance(b, float), float), b);
        }
    }
}
