"""Whether a value is an array of NumPy, which need not be installed."""

from __future__ import annotations

import sys
from typing import Any


def is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)
