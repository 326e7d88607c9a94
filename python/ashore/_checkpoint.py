"""Reads and lists steps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from . import _ashore, _numpy
from ._errors import InvalidError
from ._place import place

if TYPE_CHECKING:
    import numpy

StrPath = Union[str, "os.PathLike[str]"]
Region = Sequence[Union[slice, tuple[int, int]]]


@dataclass(frozen=True)
class TensorInfo:
    """Describes one tensor of a step."""

    name: str
    dtype: str
    """The name of the dtype in safetensors: ``F32``, ``BF16``."""
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class Report:
    """What :meth:`Checkpoint.verify` found."""

    files: int
    tensors: int
    bytes: int
    damage: tuple[str, ...]
    """Descriptions of what is not as it was written."""
    sound: bool
    """Whether everything is as it was written."""


@dataclass(frozen=True)
class Entry:
    """A step in a catalog."""

    step: int
    name: str
    path: Path | str
    bytes: int


class Checkpoint:
    """An open step. Its contents stay readable even if the step is deleted meanwhile.

    >>> import ashore, numpy, tempfile
    >>> saved = ashore.save(tempfile.mkdtemp(), 1, {"model": {"w": numpy.ones((2, 2), "float32")}, "epoch": 3})
    >>> checkpoint = ashore.Checkpoint(saved.path)
    >>> checkpoint.names(), checkpoint.value("epoch")
    (['model.w'], 3)
    >>> weights = numpy.empty((2, 2), "float32")
    >>> checkpoint.read_into({"model.w": weights})
    >>> float(weights.sum())
    4.0
    """

    __slots__ = ("_core",)

    def __init__(self, path: StrPath) -> None:
        self._core = _ashore.Checkpoint.open(os.fspath(path))

    @classmethod
    def _of(cls, core: _ashore.Checkpoint) -> Checkpoint:
        checkpoint = cls.__new__(cls)
        checkpoint._core = core
        return checkpoint

    @property
    def step(self) -> int:
        """The step."""
        return self._core.step

    @property
    def path(self) -> Path | str:
        """The directory or URL from which the step was opened."""
        return place(self._core.path)

    @property
    def bytes(self) -> int:
        """The total length of all files of the step."""
        return self._core.bytes

    @property
    def tier(self) -> str | None:
        """The tier in which the executor found the step; None for the executor's own root, or if there are no
        tiers."""
        return self._core.tier

    @property
    def ranks(self) -> int:
        """The number of processes that wrote the step."""
        return self._core.ranks

    def names(self, prefix: str = "") -> list[str]:
        """The names of the tensors that begin with ``prefix``, sorted."""
        return self._core.names(prefix)

    def info(self, name: str) -> TensorInfo:
        """The dtype, shape and size of the tensor ``name``."""
        name, dtype, _, shape, size = self._core.info(name)
        return TensorInfo(name, dtype, tuple(shape), size)

    def boxes(self, name: str) -> list[tuple[tuple[int, int], ...]]:
        """The boxes in which the tensor is stored, each as begin and end in each dimension."""
        return [tuple(box) for box in self._core.boxes(name)]

    def value_names(self) -> list[str]:
        """The names of the values, sorted."""
        return self._core.value_names()

    def value(self, name: str) -> Any:
        """The value ``name``, of the type it was saved with."""
        return self._core.value(name)

    def rank_value(self, rank: int, name: str) -> Any:
        """The value ``name`` that the rank ``rank`` saved for itself."""
        return self._core.rank_value(rank, name)

    def metadata(self) -> dict[str, Any]:
        """The metadata that describes the checkpoint."""
        return {key: self._core.metadata(key) for key in self._core.metadata_keys()}

    def read(self, name: str, region: Region | None = None) -> numpy.ndarray[Any, Any]:
        """Reads the tensor ``name``, or a region of it (a slice for each dimension), into a new NumPy
        array."""
        _, stored, dtype, shape, _ = self._core.info(name)
        box = None if region is None else _box(region, shape, name)
        extent = tuple(shape) if box is None else tuple(end - begin for begin, end in box)
        array = _numpy.empty(extent, dtype, stored, name)
        self._core.read_into([(name, array, box)], False, None)
        return array

    def tree(self) -> Any:
        """The state as it was saved: dicts, lists and tuples, with NumPy arrays for the tensors. Tied tensors
        are one array. For a step that was not saved from a tree, returns a dict of all tensors and values by
        name."""
        arrays = {}
        for name in self.names():
            _, stored, dtype, shape, _ = self._core.info(name)
            arrays[name] = _numpy.empty(tuple(shape), dtype, stored, name)
        self._core.read_into([(name, array, None) for name, array in arrays.items()], False, None)
        return self._put_together(arrays)

    def _put_together(self, arrays: dict[str, Any]) -> Any:
        """The saved tree, with ``arrays`` in the places of its tensors. For adapters; this method may
        change."""
        if self._core.has_tree():
            return self._core.tree(arrays)
        return {**arrays, **{name: self.value(name) for name in self.value_names()}}

    def read_into(self, targets: Mapping[str, Any], *, strict: bool = True) -> None:
        """Reads tensors into existing memory. ``targets`` maps the name of each tensor to the array or tensor
        to fill.

        Each target must have the dtype and shape of the stored tensor and be writable. It may be a view with
        strides. Nothing is converted. With ``strict``, a tensor of the step without a target is an error.
        Every byte is checked against its digest. After an error, the contents of the targets are undefined.

        Raises ``InvalidError`` and ``NotFoundError``, naming the tensor, before anything is read. Raises
        ``DamagedError`` for bytes that are not what was written.
        """
        self._core.read_into([(name, target, None) for name, target in targets.items()], strict, None)

    def _read_prepared(
        self,
        names: Sequence[str],
        targets: Sequence[Any],
        *,
        regions: Sequence[Sequence[tuple[int, int]] | None] | None = None,
        strict: bool = False,
        stream: int | None = None,
    ) -> None:
        """Reads tensors, or regions of them (begin and end in each dimension). For adapters; this method may
        change.

        ``stream`` is the number of the CUDA stream in which the targets are used. None is the current stream.
        """
        boxes = [None] * len(names) if regions is None else [None if box is None else list(box) for box in regions]
        self._core.read_into(list(zip(names, targets, boxes, strict=True)), strict, stream)

    def verify(self) -> Report:
        """Reads every byte and compares it with what was written."""
        files, tensors, size, damage, sound = self._core.verify()
        return Report(files, tensors, size, tuple(damage), sound)

    def __repr__(self) -> str:
        return f"<ashore.Checkpoint step={self.step} path={str(self.path)!r}>"


def _box(region: Region, shape: Sequence[int], name: str) -> list[tuple[int, int]]:
    if len(region) != len(shape):
        text = f"a region has a slice for each dimension tensor={name!r} shape={list(shape)} region={list(region)}"
        raise InvalidError(text, "invalid", name)
    box = []
    for part, size in zip(region, shape, strict=True):
        if isinstance(part, slice):
            begin, end, step = part.indices(size)
            if step != 1:
                raise InvalidError(f"a region has no steps tensor={name!r} region={list(region)}", "invalid", name)
            part = (begin, max(begin, end))
        box.append((int(part[0]), int(part[1])))
    return box


class Catalog:
    """The steps under a directory.

    >>> import ashore, numpy, tempfile
    >>> root = tempfile.mkdtemp()
    >>> for step in (1, 2, 3):
    ...     _ = ashore.save(root, step, {"w": numpy.zeros(2)})
    >>> catalog = ashore.Catalog(root)
    >>> catalog.steps(), catalog.latest().step, catalog.prune(keep_last=1)
    ([1, 2, 3], 3, [1, 2])
    """

    __slots__ = ("_core",)

    def __init__(self, root: StrPath) -> None:
        self._core = _ashore.Catalog.open(os.fspath(root))

    @classmethod
    def open(cls, root: StrPath) -> Catalog:
        """Opens the catalog of ``root``, as the constructor does."""
        return cls(root)

    def steps(self) -> list[int]:
        """The numbers of all durable steps, ascending."""
        return sorted(step for step, *_ in self._core.entries())

    def entries(self) -> list[Entry]:
        """All durable steps."""
        return [Entry(step, name, place(path), size) for step, name, path, size in self._core.entries()]

    def latest(self) -> Checkpoint | None:
        """The newest durable step, or None."""
        found = self._core.latest()
        return None if found is None else Checkpoint._of(found)

    def latest_valid(self) -> tuple[Checkpoint, list[int]] | None:
        """The newest step whose bytes are all as written, and the newer steps that were skipped. Reads that
        step completely."""
        found = self._core.latest_valid()
        return None if found is None else (Checkpoint._of(found[0]), found[1])

    def checkpoint(self, step: int) -> Checkpoint:
        """The checkpoint of ``step``."""
        return Checkpoint._of(self._core.checkpoint(step))

    def prune(self, keep_last: int, keep_every: int | None = None, *, dry_run: bool = False) -> list[int]:
        """Deletes all steps except the newest ``keep_last`` and the multiples of ``keep_every``. Returns the
        steps that it deleted, or would delete with ``dry_run``."""
        return self._core.prune(keep_last, keep_every, dry_run)

    def delete(self, step: int) -> None:
        """Deletes a step."""
        self._core.delete(step)
