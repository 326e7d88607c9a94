//! Names of dtypes in torch, NumPy and DLPack.

use crate::dlpack::DataType;
use ashore::Dtype;

/// Returns the dtype of safetensors by its name in torch and NumPy (with `ml_dtypes`).
pub fn by_name(name: &str) -> Option<Dtype> {
    Some(match name {
        "bool" => Dtype::BOOL,
        "uint8" => Dtype::U8,
        "int8" => Dtype::I8,
        "uint16" => Dtype::U16,
        "int16" => Dtype::I16,
        "uint32" => Dtype::U32,
        "int32" => Dtype::I32,
        "uint64" => Dtype::U64,
        "int64" => Dtype::I64,
        "float16" => Dtype::F16,
        "bfloat16" => Dtype::BF16,
        "float32" => Dtype::F32,
        "float64" => Dtype::F64,
        "complex64" => Dtype::C64,
        "float8_e4m3fn" => Dtype::F8_E4M3,
        "float8_e5m2" => Dtype::F8_E5M2,
        "float8_e4m3fnuz" => Dtype::F8_E4M3FNUZ,
        "float8_e5m2fnuz" => Dtype::F8_E5M2FNUZ,
        "float8_e8m0fnu" => Dtype::F8_E8M0,
        "float4_e2m1fn_x2" => Dtype::F4,
        _ => return None,
    })
}

/// Returns the name of a dtype in NumPy (with `ml_dtypes`). None: NumPy has no array of this dtype.
pub fn numpy_name(dtype: Dtype) -> Option<&'static str> {
    const NAMES: [&str; 19] = [
        "bool",
        "uint8",
        "int8",
        "uint16",
        "int16",
        "uint32",
        "int32",
        "uint64",
        "int64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
        "complex64",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
    ];
    NAMES.into_iter().find(|name| by_name(name) == Some(dtype))
}

/// Returns the dtype of safetensors for a dtype of DLPack.
pub fn by_dlpack(dtype: DataType) -> Option<Dtype> {
    Some(match (dtype.code, dtype.bits, dtype.lanes) {
        (6, 8, 1) => Dtype::BOOL,
        (0, 8, 1) => Dtype::I8,
        (0, 16, 1) => Dtype::I16,
        (0, 32, 1) => Dtype::I32,
        (0, 64, 1) => Dtype::I64,
        (1, 8, 1) => Dtype::U8,
        (1, 16, 1) => Dtype::U16,
        (1, 32, 1) => Dtype::U32,
        (1, 64, 1) => Dtype::U64,
        (2, 16, 1) => Dtype::F16,
        (2, 32, 1) => Dtype::F32,
        (2, 64, 1) => Dtype::F64,
        (4, 16, 1) => Dtype::BF16,
        (5, 64, 1) => Dtype::C64,
        (10, 8, 1) => Dtype::F8_E4M3,
        (11, 8, 1) => Dtype::F8_E4M3FNUZ,
        (12, 8, 1) => Dtype::F8_E5M2,
        (13, 8, 1) => Dtype::F8_E5M2FNUZ,
        (14, 8, 1) => Dtype::F8_E8M0,
        _ => return None,
    })
}
