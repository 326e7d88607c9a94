//! Dtypes of burn, and the dtypes of safetensors that store them.

use crate::invalid;
use ashore::{Dtype, Result};
use burn::tensor::{BoolStore, DType};

/// The dtype that stores elements of `dtype`. Several of burn's dtypes are stored in the same dtype; a record
/// keeps burn's own dtype beside the tensor.
pub(crate) fn stored(dtype: DType) -> Result<Dtype> {
    Ok(match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 | DType::Flex32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        DType::I16 => Dtype::I16,
        DType::I8 => Dtype::I8,
        DType::U64 => Dtype::U64,
        DType::U32 | DType::Bool(BoolStore::U32) => Dtype::U32,
        DType::U16 => Dtype::U16,
        DType::U8 | DType::Bool(BoolStore::U8) => Dtype::U8,
        DType::Bool(BoolStore::Native) => Dtype::BOOL,
        DType::QFloat(_) => {
            return Err(invalid("a quantized tensor has no dtype of safetensors: save the module before `quantize`"));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::quantization::QuantScheme;

    #[test]
    fn stored_elements_have_the_size_of_those_of_burn() {
        for dtype in [DType::F64, DType::Flex32, DType::BF16, DType::I8, DType::U16] {
            assert_eq!(stored(dtype).unwrap().bitsize(), 8 * dtype.size());
        }
        for store in [BoolStore::Native, BoolStore::U8, BoolStore::U32] {
            assert_eq!(stored(DType::Bool(store)).unwrap().bitsize(), 8 * DType::Bool(store).size());
        }
        let refused = stored(DType::QFloat(QuantScheme::default())).unwrap_err();
        assert!(refused.to_string().contains("save the module before `quantize`"), "{refused}");
    }
}
