//! Statistics of the elements of a tensor: norm, least, greatest, and how many are no numbers.

use crate::element;
use ashore::{Checkpoint, Dtype, Result, TensorInfo};
use serde::Serialize;
use std::ops::Range;

/// The maximum bytes of a tensor in memory at once, unless one row is longer.
const PART: u64 = 64 << 20;

/// Statistics of the elements of a tensor. Of a complex number only the real part counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Stats {
    /// The root of the sum of squares.
    pub norm: f64,
    /// The least and the greatest element that is a number; None if no element is one.
    pub min: Option<f64>,
    pub max: Option<f64>,
    pub nan: u64,
    pub infinite: u64,
}

impl Stats {
    /// Reads a tensor; None for a dtype whose elements are no plain numbers.
    ///
    /// # Errors
    /// When the tensor's bytes cannot be read or are not those that were written.
    pub fn of(checkpoint: &Checkpoint, tensor: TensorInfo<'_>) -> Result<Option<Self>> {
        let Some(size) = element::size(tensor.dtype) else { return Ok(None) };
        let mut stats = Self::default();
        let mut squares = 0.0;
        for part in parts(&tensor) {
            stats.take(tensor.dtype, size, &read(checkpoint, &tensor, &part)?, &mut squares);
        }
        stats.norm = squares.sqrt();
        Ok(Some(stats))
    }

    fn take(&mut self, dtype: Dtype, size: usize, bytes: &[u8], squares: &mut f64) {
        for value in bytes.chunks_exact(size).filter_map(|bytes| element::number(dtype, bytes)) {
            if value.is_nan() {
                self.nan += 1;
            } else if value.is_infinite() {
                self.infinite += 1;
            } else {
                *squares += value * value;
                self.min = Some(self.min.map_or(value, |min| min.min(value)));
                self.max = Some(self.max.map_or(value, |max| max.max(value)));
            }
        }
    }
}

/// The differences of two tensors of the same dtype and shape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Difference {
    /// The norm of the difference, divided by the norm of the first tensor; None if that norm is zero.
    pub relative: Option<f64>,
    /// The greatest difference between two elements.
    pub greatest: f64,
    /// The number of elements whose bytes differ.
    pub changed: u64,
    pub elements: u64,
}

impl Difference {
    /// Reads both tensors; None for a dtype whose elements are no plain numbers.
    ///
    /// # Errors
    /// When bytes cannot be read or are not those that were written.
    pub fn of(a: (&Checkpoint, TensorInfo<'_>), b: (&Checkpoint, TensorInfo<'_>)) -> Result<Option<Self>> {
        let dtype = a.1.dtype;
        let Some(size) = element::size(dtype) else { return Ok(None) };
        let mut difference = Self::default();
        let (mut squares, mut first) = (0.0, 0.0);
        for part in parts(&a.1) {
            let (before, after) = (read(a.0, &a.1, &part)?, read(b.0, &b.1, &part)?);
            for (x, y) in before.chunks_exact(size).zip(after.chunks_exact(size)) {
                difference.elements += 1;
                difference.changed += u64::from(x != y);
                let (Some(x), Some(y)) = (element::number(dtype, x), element::number(dtype, y)) else { continue };
                let by = (y - x).abs();
                if by.is_finite() {
                    squares += by * by;
                    difference.greatest = difference.greatest.max(by);
                }
                first += if x.is_finite() { x * x } else { 0.0 };
            }
        }
        difference.relative = (first > 0.0).then(|| (squares / first).sqrt());
        Ok(Some(difference))
    }
}

/// Returns the parts in which a tensor is read: ranges of its first dimension, or None for the whole tensor.
fn parts(tensor: &TensorInfo<'_>) -> Vec<Option<Range<usize>>> {
    let rows = tensor.shape.first().copied().unwrap_or(0);
    if tensor.bytes <= PART || rows == 0 {
        return vec![None];
    }
    let row = (tensor.bytes / rows as u64).max(1);
    let step = usize::try_from(PART / row).unwrap_or(usize::MAX).max(1);
    (0..rows).step_by(step).map(|start| Some(start..rows.min(start.saturating_add(step)))).collect()
}

fn read(checkpoint: &Checkpoint, tensor: &TensorInfo<'_>, part: &Option<Range<usize>>) -> Result<Vec<u8>> {
    let Some(first) = part else { return checkpoint.read(tensor.name) };
    let rest = tensor.shape.iter().skip(1).map(|&extent| 0..extent);
    let slice: Vec<Range<usize>> = std::iter::once(first.clone()).chain(rest).collect();
    checkpoint.read_slice(tensor.name, &slice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_that_are_no_numbers_are_counted_and_left_out() {
        let (mut stats, mut squares) = (Stats::default(), 0.0);
        let bytes: Vec<u8> = [3.0, f32::NAN, -4.0, f32::INFINITY].iter().flat_map(|x| x.to_le_bytes()).collect();
        stats.take(Dtype::F32, 4, &bytes, &mut squares);
        assert_eq!((squares, stats.min, stats.max, stats.nan, stats.infinite), (25.0, Some(-4.0), Some(3.0), 1, 1));
    }
}
