"""The kinds of leaves of a pytree: arrays, typed keys of random numbers, plain values."""

# mypy: disable-error-code="no-untyped-call, attr-defined"
from __future__ import annotations

from typing import Any

import jax
import numpy

KEYS = "ashore.jax.keys"
"""The metadata key under which a step keeps the implementation of each typed key, by name. The key's tensor
is its `jax.random.key_data`."""

STORED: dict[str, str] = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
}
"""The safetensors dtypes, by the names of the JAX dtypes."""

_INSTEAD = {
    "int4": "save leaf.astype(jnp.int8), and convert it back after restore",
    "uint4": "save leaf.astype(jnp.uint8), and convert it back after restore",
    "int2": "save leaf.astype(jnp.int8), and convert it back after restore",
    "uint2": "save leaf.astype(jnp.uint8), and convert it back after restore",
    "complex128": "save leaf.real and leaf.imag",
}


def is_key(leaf: Any) -> bool:
    """True if a leaf, or its placeholder in a target, is an array of typed keys."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def no_dtype(dtype: Any) -> str:
    """Returns the text that says why a dtype cannot be saved."""
    name = str(dtype)
    instead = _INSTEAD.get(name, "save jax.lax.bitcast_convert_type(leaf, jnp.uint8), or convert the leaf")
    return f"safetensors has no such dtype: {instead} dtype={name}"


def key_type(impl: str, shape: tuple[int, ...]) -> Any:
    """Returns the shape and dtype of the keys whose data has this shape."""
    data = jax.ShapeDtypeStruct(shape, numpy.uint32)
    return jax.eval_shape(lambda data: jax.random.wrap_key_data(data, impl=impl), data)
