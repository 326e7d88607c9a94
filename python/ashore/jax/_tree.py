"""The names of the leaves of a pytree, and the shape of the tree as text.

The name of a leaf is the path to it, joined by dots. `Checkpoint.tree` rebuilds a tree of dicts, lists and
tuples from its shape. The shape describes other nodes (named tuples, dataclasses, custom nodes) as dicts;
only a target can restore their types.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import jax

from .._errors import InvalidError

SHAPE = "ashore.tree"
"""The metadata key under which a step keeps the shape of the tree."""


@dataclass(frozen=True)
class Structure:
    """What all trees of the same treedef have in common."""

    names: tuple[str, ...]
    """The name of each leaf."""
    pieces: tuple[str, ...]
    """The pieces of the shape's text: before each leaf, and after the last one."""

    def shape(self, tensors: list[bool]) -> str:
        """Returns the shape of a tree. ``tensors`` tells for each leaf whether it is a tensor or a value."""
        marks = ["0" if tensor else "1" for tensor in tensors]
        return "".join(text for pair in zip(self.pieces, [*marks, ""], strict=True) for text in pair)


_KNOWN: OrderedDict[Any, Structure] = OrderedDict()
_MOST_KNOWN = 8


def flatten(tree: Any) -> tuple[list[Any], Structure, Any]:
    """Returns the leaves of a tree (including None), the structure with their names, and the treedef.

    Raises ``InvalidError`` for a tree that is one leaf, and for two leaves of the same name.
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=_is_none)
    try:
        structure = _KNOWN.get(treedef)
    except (TypeError, ValueError):
        # Static fields that cannot be hashed or compared: walk the tree at each call.
        return leaves, _walk(tree), treedef
    if structure is None:
        structure = _walk(tree)
        _KNOWN[treedef] = structure
        while len(_KNOWN) > _MOST_KNOWN:
            _KNOWN.popitem(last=False)
    return leaves, structure, treedef


def _is_none(node: Any) -> bool:
    return node is None


def _walk(tree: Any) -> Structure:
    walk = _Walk()
    walk.visit(tree, ())
    walk.pieces.append("".join(walk.text))
    if walk.paths == [()]:
        text = f"a state is a pytree with at least one level, such as a dict: this is one leaf type={_type(tree)}"
        raise InvalidError(text, "invalid")
    names = tuple(".".join(_part(key) for key in path) for path in walk.paths)
    if len(set(names)) < len(names):
        _refuse_same(names, walk.paths)
    return Structure(names, tuple(walk.pieces))


class _Walk:
    def __init__(self) -> None:
        self.paths: list[tuple[Any, ...]] = []
        self.pieces: list[str] = []
        self.text: list[str] = []

    def visit(self, node: Any, path: tuple[Any, ...]) -> None:
        # Flatten one level only: everything below the node itself counts as a leaf.
        below = [] if node is None else jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
        if node is None or (len(below) == 1 and below[0][0] == ()):
            self.paths.append(path)
            self.pieces.append("".join(self.text))
            self.text = []
            return
        kind = _kind(node)
        self.text.append(f'["{kind}"')
        for (key,), child in below:
            self.text.append(",")
            if kind in "do":
                self.text.append(_key(key) + ",")
            self.visit(child, (*path, key))
        self.text.append("]")


def _kind(node: Any) -> str:
    of = type(node)
    if of is list:
        return "l"
    if of is tuple:
        return "t"
    return "o" if of is OrderedDict else "d"


def _raw(key: Any) -> Any:
    for field in ("key", "name", "idx"):
        if hasattr(key, field):
            return getattr(key, field)
    return str(key)


def _part(key: Any) -> str:
    return str(_raw(key))


def _key(key: Any) -> str:
    """Returns a key as it is written in the shape: a 64-bit integer, or text."""
    raw = _raw(key)
    if type(raw) is int and -(1 << 63) <= raw < 1 << 63:
        return str(raw)
    return json.dumps(str(raw))


def _refuse_same(names: tuple[str, ...], paths: list[tuple[Any, ...]]) -> None:
    first: dict[str, tuple[Any, ...]] = {}
    for name, path in zip(names, paths, strict=True):
        other = first.setdefault(name, path)
        if other is not path:
            one, two = jax.tree_util.keystr(other), jax.tree_util.keystr(path)
            text = f"two leaves have the same name once their keys are joined by dots: {one} and {two}"
            raise InvalidError(f'{text} tensor="{name}"', "invalid", name)


def _type(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
