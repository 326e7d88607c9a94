//! Element types and tensor layouts, with the names and sizes of the safetensors format.

use crate::error::{Error, Result};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use std::fmt;
use std::ops::Deref;

macro_rules! dtypes {
    ($($(#[$doc:meta])* $name:ident: $bits:literal),* $(,)?) => {
        /// The element type of a tensor. `Display` and serde use its name in the safetensors format.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[non_exhaustive]
        #[expect(non_camel_case_types, reason = "the names are those of the format")]
        pub enum Dtype { $($(#[$doc])* $name),* }

        impl Dtype {
            /// The bits of an element.
            pub const fn bitsize(self) -> usize {
                match self { $(Self::$name => $bits),* }
            }

            /// Its name in the safetensors format.
            pub(crate) const fn name(self) -> &'static str {
                match self { $(Self::$name => stringify!($name)),* }
            }

            /// The dtype of the safetensors crate.
            pub(crate) fn stock(self) -> safetensors::Dtype {
                match self { $(Self::$name => safetensors::Dtype::$name),* }
            }
        }

        impl fmt::Display for Dtype {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.name())
            }
        }

        #[cfg(test)]
        pub(crate) const DTYPES: &[Dtype] = &[$(Dtype::$name),*];
    };
}
dtypes! {
    /// A boolean, in a byte.
    BOOL: 8,
    /// MXFP4 of the Open Compute Project.
    F4: 4,
    /// MXFP6, 2 bits of exponent.
    F6_E2M3: 6,
    /// MXFP6, 3 bits of exponent.
    F6_E3M2: 6,
    /// An unsigned byte.
    U8: 8,
    /// A signed byte.
    I8: 8,
    /// FP8, 5 bits of exponent.
    F8_E5M2: 8,
    /// FP8, 4 bits of exponent.
    F8_E4M3: 8,
    /// A scale of the MX formats: 8 bits of exponent.
    F8_E8M0: 8,
    /// FP8, 4 bits of exponent, without infinities and a negative zero.
    F8_E4M3FNUZ: 8,
    /// FP8, 5 bits of exponent, without infinities and a negative zero.
    F8_E5M2FNUZ: 8,
    /// A signed integer of 16 bits.
    I16: 16,
    /// An unsigned integer of 16 bits.
    U16: 16,
    /// A half-precision float.
    F16: 16,
    /// A brain float.
    BF16: 16,
    /// A signed integer of 32 bits.
    I32: 32,
    /// An unsigned integer of 32 bits.
    U32: 32,
    /// A float of 32 bits.
    F32: 32,
    /// A complex number of two floats of 32 bits.
    C64: 64,
    /// A float of 64 bits.
    F64: 64,
    /// A signed integer of 64 bits.
    I64: 64,
    /// An unsigned integer of 64 bits.
    U64: 64,
}

/// Dimensions of a tensor, outermost first; a scalar has none. Dereferences to a slice of sizes.
///
/// ```
/// let shape = ashore::Shape::from(&[2, 3][..]);
/// assert_eq!((shape.len(), shape.iter().product::<usize>()), (2, 6));
/// ```
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Shape(SmallVec<[usize; 4]>);

impl Deref for Shape {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        &self.0
    }
}

impl AsRef<[usize]> for Shape {
    fn as_ref(&self) -> &[usize] {
        &self.0
    }
}

impl From<&[usize]> for Shape {
    fn from(sizes: &[usize]) -> Self {
        Self(SmallVec::from_slice(sizes))
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A Rust type whose values are tensor elements, bit for bit.
pub trait Element: bytemuck::Pod + Send + Sync {
    /// The dtype that stores these elements.
    const DTYPE: Dtype;
}

macro_rules! elements {
    ($($type:ty => $dtype:ident),* $(,)?) => { $(impl Element for $type { const DTYPE: Dtype = Dtype::$dtype; })* };
}
elements! {
    u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, u64 => U64, i64 => I64,
    f16 => F16, bf16 => BF16, f32 => F32, f64 => F64,
}

/// Dtype and shape of a tensor in row-major order.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Layout {
    /// The type of the elements.
    pub dtype: Dtype,
    /// The dimensions.
    pub shape: Shape,
}

impl Layout {
    /// A layout of `dtype` elements in `shape`.
    pub fn new(dtype: Dtype, shape: impl AsRef<[usize]>) -> Self {
        Self { dtype, shape: shape.as_ref().into() }
    }

    /// The number of elements; None if it overflows.
    pub fn elements(&self) -> Option<u64> {
        self.shape.iter().try_fold(1_u64, |n, &dim| n.checked_mul(u64::try_from(dim).ok()?))
    }

    /// The number of bytes.
    ///
    /// # Errors
    /// `Invalid` when the size overflows, or when elements smaller than a byte do not fill whole bytes.
    pub fn bytes(&self) -> Result<u64> {
        let bits = self.elements().and_then(|n| n.checked_mul(self.dtype.bitsize() as u64));
        match bits {
            None => Err(Error::invalid(format!("the size of a tensor overflows shape={:?}", &self.shape[..]))),
            Some(bits) if bits % 8 != 0 => Err(Error::invalid(format!(
                "elements do not fill whole bytes dtype={} shape={:?}",
                self.dtype,
                &self.shape[..]
            ))),
            Some(bits) => Ok(bits / 8),
        }
    }

    /// The bytes of an element; None for dtypes smaller than a byte or not whole bytes.
    pub(crate) fn item(&self) -> Option<usize> {
        let bits = self.dtype.bitsize();
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    /// Returns these strides, in bytes, unless elements with them are packed in row-major order.
    pub(super) fn unpacked(&self, strides: &[i64]) -> Option<SmallVec<[i64; 4]>> {
        (!self.is_packed(strides)).then(|| SmallVec::from_slice(strides))
    }

    fn is_packed(&self, strides: &[i64]) -> bool {
        let Some(mut expected) = self.item().and_then(|item| i64::try_from(item).ok()) else { return false };
        let mut dims = self.shape.iter().zip(strides).rev();
        let packed = dims.all(|(&size, &stride)| {
            let fits = size == 1 || stride == expected;
            expected = expected.saturating_mul(size as i64);
            fits
        });
        strides.len() == self.shape.len() && (packed || self.elements() == Some(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dtypes_have_the_names_and_sizes_of_the_stock_crate() {
        for &dtype in DTYPES {
            let stock = dtype.stock();
            assert_eq!((dtype.to_string(), dtype.bitsize()), (stock.to_string(), stock.bitsize()));
            assert_eq!(serde_json::to_value(dtype).unwrap(), serde_json::to_value(stock).unwrap());
            assert_eq!(serde_json::from_value::<Dtype>(dtype.to_string().into()).unwrap(), dtype);
        }
    }
}
