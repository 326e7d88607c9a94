"""Maps safetensors dtype names to torch dtypes."""

from __future__ import annotations

import torch

_TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
}  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """Returns the torch dtype for a safetensors dtype. Raises TypeError if this version of torch has none."""
    dtype = getattr(torch, _TORCH.get(name, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch has no such dtype dtype={name}")
    return dtype
