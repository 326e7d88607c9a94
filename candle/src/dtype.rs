//! Dtypes of candle, and the dtypes of safetensors that store them.

use crate::invalid;
use ashore::{Dtype, Result};
use candle_core::DType;

const PAIRS: [(DType, Dtype); 11] = [
    (DType::U8, Dtype::U8),
    (DType::U32, Dtype::U32),
    (DType::I16, Dtype::I16),
    (DType::I32, Dtype::I32),
    (DType::I64, Dtype::I64),
    (DType::BF16, Dtype::BF16),
    (DType::F16, Dtype::F16),
    (DType::F32, Dtype::F32),
    (DType::F64, Dtype::F64),
    (DType::F8E4M3, Dtype::F8_E4M3),
    (DType::F8E8M0, Dtype::F8_E8M0),
];

/// The dtype that stores elements of `dtype`. Dtypes smaller than a byte have no size in candle, so they are
/// refused.
pub(crate) fn stored(dtype: DType) -> Result<Dtype> {
    let found = PAIRS.iter().find(|(candle, _)| *candle == dtype);
    let refused = || invalid(format!("tensors of this dtype of candle cannot be saved dtype={}", dtype.as_str()));
    found.map(|(_, stored)| *stored).ok_or_else(refused)
}

/// The candle dtype of stored elements.
pub(crate) fn loaded(dtype: Dtype) -> Result<DType> {
    let found = PAIRS.iter().find(|(_, stored)| *stored == dtype);
    found
        .map(|(candle, _)| *candle)
        .ok_or_else(|| invalid(format!("candle has no tensors of this dtype dtype={dtype}")))
}
