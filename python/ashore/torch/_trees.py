"""Trees with objects that are not plain values. These objects are pickled, so that they are restored
unchanged."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import torch

from ._numpy import is_array

_PICKLED = "ashore.pickled"
_PLAIN = {type(None), bool, int, float, complex, str, bytes}


def packed(tree: Any) -> Any:
    """Returns the tree with each object that is neither plain nor a tensor replaced by a dict that holds its
    pickle."""
    of = type(tree)
    if of in _PLAIN or isinstance(tree, torch.Tensor) or is_array(tree):
        return tree
    if of is list or of is tuple:
        return of(map(packed, tree))
    if (of is dict or of is OrderedDict) and all(type(key) in (str, int) for key in tree):
        return of((key, packed(value)) for key, value in tree.items())
    data = io.BytesIO()
    torch.save(tree, data)
    return {_PICKLED: data.getvalue()}


def unpacked(tree: Any) -> Any:
    """Reverses `packed`."""
    of = type(tree)
    if of is list or of is tuple:
        return of(map(unpacked, tree))
    if of is dict or of is OrderedDict:
        if tree.keys() == {_PICKLED}:
            return torch.load(io.BytesIO(tree[_PICKLED]), weights_only=False)
        return of((key, unpacked(value)) for key, value in tree.items())
    return tree
