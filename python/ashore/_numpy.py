"""NumPy arrays and scalars, for reading. The package ``ml_dtypes`` provides the 8-bit floats and bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._errors import InvalidError

if TYPE_CHECKING:
    import numpy


def dtype(name: str) -> Any:
    """Returns the NumPy dtype of this name."""
    import numpy

    try:
        return numpy.dtype(name)
    except TypeError:
        pass
    try:
        import ml_dtypes
    except ImportError:
        raise InvalidError(f"NumPy needs the package ml_dtypes for this dtype dtype={name}", "invalid") from None
    return numpy.dtype(getattr(ml_dtypes, name))


def empty(shape: tuple[int, ...], name: str | None, stored: str, tensor: str) -> numpy.ndarray[Any, Any]:
    """Returns an uninitialized array for a tensor of this shape and dtype."""
    import numpy

    if name is None:
        text = f"NumPy has no such dtype: read the tensor with torch tensor={tensor!r} dtype={stored}"
        raise InvalidError(text, "invalid", tensor)
    return numpy.empty(shape, dtype(name))


def scalar(name: str, value: Any) -> Any:
    """Returns ``value`` as a scalar of this dtype."""
    import numpy

    kind = dtype(name)
    if kind.kind in "mM":
        return numpy.int64(value).astype(kind)
    return kind.type(value)
