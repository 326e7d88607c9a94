//! Element types and tensor layouts. The dtype table is that of the `safetensors` crate, which defines the format.

use crate::error::{Error, Result};
use half::{bf16, f16};

pub use safetensors::Dtype;

/// Dimensions of a tensor, outermost first; no dimensions is a scalar.
pub type Shape = smallvec::SmallVec<[usize; 4]>;

/// Rust types that are the elements of a tensor, bit for bit.
pub trait Element: bytemuck::Pod + Send + Sync {
    /// The dtype under which such elements are stored.
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The type of the elements.
    pub dtype: Dtype,
    /// The dimensions.
    pub shape: Shape,
}

impl std::hash::Hash for Layout {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        std::mem::discriminant(&self.dtype).hash(state);
        self.shape.hash(state);
    }
}

impl Layout {
    /// A layout of `dtype` elements in `shape`.
    pub fn new(dtype: Dtype, shape: impl AsRef<[usize]>) -> Self {
        Self { dtype, shape: Shape::from_slice(shape.as_ref()) }
    }

    /// The number of elements, or None where it does not fit.
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

    /// The bytes of an element, if it has whole ones.
    pub(crate) fn item(&self) -> Option<usize> {
        let bits = self.dtype.bitsize();
        bits.is_multiple_of(8).then_some(bits / 8)
    }

    /// True when elements with these strides, in bytes, lie together in row-major order.
    pub(crate) fn is_packed(&self, strides: &[i64]) -> bool {
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
