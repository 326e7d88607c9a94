"""Restores a checkpoint into the objects of a `State`."""

from __future__ import annotations

import collections
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from ashore import NotFoundError

from ._boxes import is_dtensor, mine
from ._dtypes import torch_dtype
from ._errors import invalid
from ._numpy import is_array


class IncompatibleKeys(collections.namedtuple("IncompatibleKeys", ["missing_keys", "unexpected_keys"])):
    """Names that the state has and the checkpoint lacks, and names for which the reverse is true."""

    __slots__ = ()


class _Missing:
    def __repr__(self) -> str:
        return "<missing>"


class Plan:
    """The tensors that a restore will read, and the actions after that. The state changes only in
    `carry_out`."""

    MISSING = _Missing()

    def __init__(self, checkpoint: Any) -> None:
        self._checkpoint = checkpoint
        self._shape = _Shape.of_json(_saved_shape(checkpoint))
        self._targets: dict[str, torch.Tensor] = {}
        self._after: list[Callable[[], Any]] = []
        self._used: set[str] = set()
        self.missing: list[str] = []

    def after(self, act: Callable[[], Any]) -> None:
        """Runs `act` after all tensors are read."""
        self._after.append(act)

    def build(self, name: str, *, like: Any, in_place: bool, of_module: bool = False) -> Any:
        """Returns the saved tree at `name`. `like` is the current tree; with `in_place` its tensors are the
        targets.

        Names that only `like` has are missing. For a module, only names that `like` has are restored, and new
        tensors must have the dtype and shape of the current ones.
        """
        shape = self._shape.at(name)
        if shape is None:
            self.missing += _leaves(name, like)
            return self.MISSING
        if of_module:
            shape = _Shape(shape.kind, {key: item for key, item in shape.items.items() if key in like})

        def target(path: str, now: Any) -> Any:
            if not isinstance(now, torch.Tensor):
                return self._new(path, None)
            if in_place or of_module:
                self._same(path, now)
            return now if in_place else self._new(path, now)

        return self._build(shape, name, like, target)

    def whole(self) -> Any:
        """Reads the whole tree into new tensors on the host."""
        items = {key: self._build(item, str(key), None, lambda path, _: self._new(path, None)) for key, item in self._shape.items.items()}
        self._checkpoint.read_into(self._targets, strict=False)
        return self._shape.made(items)

    def build_state(
        self, name: str, now: Mapping[str, Any], known: Mapping[str, Any], like: Callable[[str, str], Any]
    ) -> dict[str, Any]:
        """Returns the saved state of an optimizer's parameters. Tensors that are missing in the current state
        are created as `like` says."""
        shape = self._shape.at(name)
        entries = {} if shape is None else shape.items
        if shape is not None and shape.kind == "value":
            # An optimizer that has not stepped saves an empty dict as a value.
            self._used.add(name)
        built = {}
        for parameter, entry in entries.items():
            if parameter not in known:
                continue

            def target(path: str, tensor: Any, parameter: str = parameter) -> Any:
                if isinstance(tensor, torch.Tensor):
                    self._same(path, tensor)
                    return tensor
                return self._new(path, like(parameter, path.rsplit(".", 1)[1]))

            built[parameter] = self._build(entry, f"{name}.{parameter}", now.get(parameter, {}), target)
        for parameter, entry in now.items():
            if parameter not in built:
                self.missing += _leaves(f"{name}.{parameter}", entry)
        return built

    def matched_groups(self, name: str, saved: list[list[str]], now: list[list[str]]) -> list[int]:
        """Returns for each group the index of the saved group with the same parameters, in any order."""
        if len(saved) == len(now):
            numbers = {frozenset(names): number for number, names in enumerate(saved)}
            matched = [numbers.get(frozenset(names), -1) for names in now]
            if -1 not in matched:
                return matched
        changed = sorted({name for group in saved for name in group} ^ {name for group in now for name in group})
        raise invalid(
            f"an optimizer has other groups of parameters than the saved one optimizer={name} "
            f"saved={[len(group) for group in saved]} now={[len(group) for group in now]} differ={changed[:3]}"
        )

    def carry_out(self, strict: bool) -> IncompatibleKeys:
        every = [*self._checkpoint.names(), *self._checkpoint.value_names()]
        keys = IncompatibleKeys(self.missing, [name for name in every if name not in self._used])
        if strict and (keys.missing_keys or keys.unexpected_keys):
            raise invalid(
                "the checkpoint and the state differ: give strict=False to restore what both have "
                f"missing={_some(keys.missing_keys)} unexpected={_some(keys.unexpected_keys)}"
            )
        self._read()
        for act in self._after:
            act()
        return keys

    def own(self, name: str) -> tuple[bool, Any]:
        """Returns whether the saving ranks have values of their own, and the value of this rank: None if it
        has none."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        if self._shape.at(name) is not None:
            return False, None
        try:
            value = self._checkpoint.rank_value(min(rank, self._checkpoint.ranks - 1), name)
        except NotFoundError:
            return False, None
        return True, value if rank < self._checkpoint.ranks else None

    def _read(self) -> None:
        names, targets, regions = [], [], []
        for name, tensor in self._targets.items():
            region = None
            if is_dtensor(tensor):
                held = mine(tensor, name)  # type: ignore[arg-type]
                if held is None:
                    continue
                tensor, (_, at) = held
                region = [(begin, begin + length) for begin, length in zip(at, tensor.shape)]
            names.append(name)
            targets.append(tensor.detach())
            regions.append(region)
        self._checkpoint._read_prepared(names, targets, regions=regions)

    def _build(self, shape: _Shape, path: str, now: Any, target: Callable[[str, Any], Any]) -> Any:
        if shape.kind == "tensor":
            self._used.add(path)
            self._targets[path] = target(path, now)
            return self._targets[path].numpy() if is_array(now) else self._targets[path]
        if shape.kind == "value":
            self._used.add(path)
            return self._checkpoint.value(path)
        before = _children(now)
        built = {key: self._build(item, f"{path}.{key}", before.pop(key, None), target) for key, item in shape.items.items()}
        for key, item in before.items():
            self.missing += _leaves(f"{path}.{key}", item)
        return shape.made(built)

    def _new(self, path: str, like: torch.Tensor | None) -> torch.Tensor:
        info = self._checkpoint.info(path)
        dtype, shape = torch_dtype(info.dtype), tuple(info.shape)
        if like is not None and tuple(like.shape) == shape:
            return torch.empty_like(like, dtype=dtype, requires_grad=False)
        return torch.empty(shape, dtype=dtype, device=None if like is None else like.device)

    def _same(self, path: str, tensor: torch.Tensor) -> None:
        info = self._checkpoint.info(path)
        if (torch_dtype(info.dtype), tuple(info.shape)) != (tensor.dtype, tuple(tensor.shape)):
            raise invalid(
                f"a tensor has another dtype or shape than the saved one: nothing is converted tensor={path} "
                f"saved={info.dtype}{list(info.shape)} now={tensor.dtype}{list(tensor.shape)}",
                path,
            )


def _saved_shape(checkpoint: Any) -> Any:
    if not checkpoint._core.has_tree():
        raise invalid(f"the step was not saved from a tree: read its tensors by name path={checkpoint.path}")
    return json.loads(checkpoint._core.metadata("ashore.tree"))


class _Shape:
    """The structure of a saved tree, from the text in the step's metadata `ashore.tree`."""

    def __init__(self, kind: str, items: dict[Any, _Shape]) -> None:
        self.kind, self.items = kind, items

    @classmethod
    def of_json(cls, json: Any) -> _Shape:
        if json in (0, 1):
            return cls("value" if json else "tensor", {})
        kind, *items = json
        pairs = enumerate(items) if kind in "lt" else zip(items[::2], items[1::2])
        return cls(kind, {key: cls.of_json(item) for key, item in pairs})

    def at(self, name: str) -> _Shape | None:
        """What is at a path of keys that have no dots, but for the first."""
        found: _Shape | None = self
        for key in name.split("."):
            found = None if found is None else found.items.get(key)
        return found

    def made(self, items: dict[Any, Any]) -> Any:
        if self.kind == "l":
            return list(items.values())
        if self.kind == "t":
            return tuple(items.values())
        return collections.OrderedDict(items) if self.kind == "o" else items


def _children(tree: Any) -> dict[Any, Any]:
    if isinstance(tree, Mapping):
        return dict(tree)
    return dict(enumerate(tree)) if isinstance(tree, (list, tuple)) else {}


def _leaves(path: str, tree: Any) -> list[str]:
    """The names under which the leaves of a tree are saved."""
    children = _children(tree)
    if not children or (isinstance(tree, (list, tuple)) and not has_tensor(tree)):
        return [path]
    return [leaf for key, item in children.items() for leaf in _leaves(f"{path}.{key}", item)]


def has_tensor(tree: Any) -> bool:
    return isinstance(tree, torch.Tensor) or is_array(tree) or any(map(has_tensor, _children(tree).values()))


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return f"{names[:5]}" if len(names) <= 5 else f"{names[:5]} and {len(names) - 5} more"
