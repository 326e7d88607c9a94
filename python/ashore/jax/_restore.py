"""Restores pytrees onto the devices that a target names."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy
from jax.sharding import NamedSharding, SingleDeviceSharding

from .._checkpoint import Checkpoint
from .._errors import Error, InvalidError, NotFoundError
from ._leaves import KEYS, STORED, is_key, key_type, no_dtype
from ._tree import flatten

_BATCH = 1 << 30
"""How many bytes are read before they are moved to the devices. A restore needs this much host memory, or as
much as the largest leaf if that is more."""

_SHOWN = 8

_ARRAYS = (jax.ShapeDtypeStruct, jax.Array, numpy.ndarray)

Box = tuple[tuple[int, int], ...]


@dataclass
class _Array:
    """An array of the target, as it is stored. For typed keys, this is their data."""

    name: str
    want: Any
    shape: tuple[int, ...]
    key: str | None
    boxes: dict[Box, numpy.ndarray[Any, Any]] = field(default_factory=dict)
    places: list[tuple[Any, Box]] = field(default_factory=list)
    sharding: Any = None

    @property
    def dtype(self) -> Any:
        return numpy.dtype("uint32" if self.key is not None else self.want.dtype)

    def plan(self) -> int:
        """Finds the boxes that devices need, and returns their size in bytes."""
        if isinstance(self.want, numpy.ndarray):
            self._box(tuple((0, size) for size in self.shape))
        else:
            self.sharding = self._sharding()
            if self.sharding is None:
                self._box(tuple((0, size) for size in self.shape))
            else:
                for device, index in self._indices().items():
                    box = tuple(part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True))
                    self._box(box)
                    self.places.append((device, box))
        return sum(_size(box) for box in self.boxes) * int(self.dtype.itemsize)

    def _box(self, box: Box) -> None:
        self.boxes.setdefault(box, numpy.empty((), self.dtype))

    def _sharding(self) -> Any:
        """Returns None for an array without a chosen device, which JAX moves to where it is used."""
        want = self.want
        if isinstance(want, jax.Array):
            if self.key is not None:
                want = jax.random.key_data(want)
            return want.sharding if want.committed else None
        sharding = want.sharding
        if sharding is None or self.key is None or isinstance(sharding, SingleDeviceSharding):
            return sharding
        if isinstance(sharding, NamedSharding):
            spec = (*sharding.spec, *[None] * (len(self.shape) - len(sharding.spec)))
            return sharding.update(spec=jax.sharding.PartitionSpec(*spec))
        text = "the sharding of typed keys in a target is a NamedSharding or of one device"
        raise _invalid(f"{text} sharding={sharding}", self.name)

    def _indices(self) -> Any:
        try:
            return self.sharding.addressable_devices_indices_map(self.shape)
        except Exception as error:
            # For example a mesh without devices, or a dimension that the shards do not divide.
            text = f"the sharding of the target cannot place the array: {error} sharding={self.sharding}"
            raise _invalid(text, self.name) from error

    def allocate(self) -> None:
        for box in self.boxes:
            self.boxes[box] = numpy.empty([end - begin for begin, end in box], self.dtype)

    def build(self) -> Any:
        """Builds the array from the boxes that were read."""
        if isinstance(self.want, numpy.ndarray):
            (whole,) = self.boxes.values()
            return whole
        # CPU devices may share the memory of a block. XLA never reuses that memory for results.
        if self.sharding is None:
            (block,) = self.boxes.values()
            array: jax.Array = jax.device_put(block)
        else:
            kind = self.sharding.memory_kind
            shards = jax.device_put(
                [self.boxes[box] for _, box in self.places],
                [SingleDeviceSharding(device, memory_kind=kind) for device, _ in self.places],
            )
            array = jax.make_array_from_single_device_arrays(self.shape, self.sharding, shards)
        self.boxes.clear()
        if self.key is not None:
            return jax.random.wrap_key_data(array, impl=self.key)
        if getattr(self.want, "weak_type", False):
            return _weak(array)
        return array


def _size(box: Box) -> int:
    size = 1
    for begin, end in box:
        size *= end - begin
    return size


def _weak(array: jax.Array) -> jax.Array:
    """Returns the same array with the weak type of arrays that are made from Python numbers."""
    from jax.extend.core.primitives import convert_element_type_p

    weak: jax.Array = convert_element_type_p.bind(array, new_dtype=array.dtype, weak_type=True, sharding=None)
    return weak


class _Matching:
    """Compares what a checkpoint contains with what a target asks for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.tensors = set(checkpoint.names())
        self.values = set(checkpoint.value_names())
        self.keys: dict[str, str] = checkpoint.metadata().get(KEYS, {})
        self.missing: list[str] = []
        self.wrong: list[tuple[str, str]] = []

    def leaf(self, name: str, want: Any) -> Any:
        """Returns the array to read, or the value."""
        if name in self.tensors:
            why = self._unlike(name, want)
            if why is None:
                return _Array(name, want, self.checkpoint.info(name).shape, self.keys.get(name))
            self.wrong.append((name, why))
        elif name in self.values:
            value = self.checkpoint.value(name)
            if type(value) is type(want):
                return value
            self.wrong.append((name, f"the target has {_of(want)}, and stored is the value {value!r}"))
        elif want is not None:
            self.missing.append(name)
        return None

    def _unlike(self, name: str, want: Any) -> str | None:
        """Returns why a stored array is not what the target asks for, or None if it is."""
        info, key = self.checkpoint.info(name), self.keys.get(name)
        why = f"the target has {_of(want)}, and stored is {self._stored(name)}"
        if not isinstance(want, _ARRAYS) or (key is not None) != is_key(want):
            return why
        if key is not None:
            stored = key_type(key, info.shape)
            return None if (stored.dtype, stored.shape) == (want.dtype, tuple(want.shape)) else why
        dtype = numpy.dtype(want.dtype)
        if dtype.name not in STORED:
            return no_dtype(dtype)
        if not isinstance(want, numpy.ndarray) and jax.dtypes.canonicalize_dtype(dtype) != dtype:
            return f"JAX would narrow the leaf: set jax_enable_x64 dtype={dtype}"
        return None if (STORED[dtype.name], tuple(want.shape)) == (info.dtype, info.shape) else why

    def _stored(self, name: str) -> str:
        info, key = self.checkpoint.info(name), self.keys.get(name)
        if key is None:
            return f"an array {info.dtype}{list(info.shape)}"
        return f"keys of {key}{list(key_type(key, info.shape).shape)}"

    def check(self, names: Sequence[str], strict: bool) -> None:
        """Raises the errors that were found, and names the leaves."""
        unexpected = sorted((self.tensors | self.values) - set(names)) if strict else []
        parts = [f'{why} tensor="{name}"' for name, why in self.wrong[:_SHOWN]]
        if len(self.wrong) > _SHOWN:
            parts.append(f"and {len(self.wrong) - _SHOWN} more")
        if self.missing:
            parts.append(f"the checkpoint lacks leaves of the target missing={_some(self.missing)}")
        if unexpected:
            text = "the target lacks leaves of the checkpoint; strict=False ignores them"
            parts.append(f"{text} unexpected={_some(unexpected)}")
        if not parts:
            return
        of: type[Error] = InvalidError if self.wrong or not self.missing else NotFoundError
        first = [name for name, _ in self.wrong] + self.missing + unexpected
        kind = "invalid" if of is InvalidError else "not_found"
        path = str(self.checkpoint.path)
        raise of(f"{'; '.join(parts)} path={path!r}", kind, first[0], path, self.checkpoint.step)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{names[:_SHOWN]}{more}"


def _of(want: Any) -> str:
    if isinstance(want, _ARRAYS):
        return f"an array {STORED.get(str(want.dtype), str(want.dtype))}{list(want.shape)}"
    return f"a value of type {type(want).__name__}"


def restore(checkpoint: Checkpoint, target: Any = None, *, strict: bool = True) -> Any:
    """Restores the pytree that ``target`` describes from a step.

    The leaves of ``target`` say what is restored. A ``jax.ShapeDtypeStruct`` with a sharding, or an array,
    becomes a JAX array with that sharding, whatever the saved sharding was. Each device gets its boxes, and
    the restore reads only the parts of the checkpoint that devices of this process need. A NumPy array
    becomes a new NumPy array. Numbers, text and None become the stored values. A ``ShapeDtypeStruct`` without
    a sharding becomes an array on the default device, which JAX moves to where it is used.

    Leaves are found by their names, so a target may have other node types with the same paths (a named tuple
    for a dict). Static fields come from the target. Dtypes and shapes are never converted.

    Without a target, the result is the dicts, lists and tuples that :func:`save` got, with NumPy arrays and
    typed keys.

    A restore uses at most 1 GiB of host memory at a time, or the size of the largest leaf if that is more.
    Every byte is checked against its digest.

    Raises, before anything is read, ``NotFoundError`` with the names that the checkpoint lacks, and
    ``InvalidError`` for leaves of another dtype or shape, for values of another type, for shardings that do
    not fit, and, with ``strict``, for contents of the checkpoint that the target lacks. Raises
    ``DamagedError`` for damaged bytes.

    >>> import ashore, ashore.jax, jax, jax.numpy as jnp, tempfile
    >>> from jax.sharding import NamedSharding, PartitionSpec as P
    >>> executor = ashore.CheckpointExecutor(tempfile.mkdtemp(), arena=8 << 20, chunk=1 << 20)
    >>> committed = ashore.jax.save(executor, 1, {"w": jnp.ones((4, 2), "bfloat16")}).wait()
    >>> sharding = NamedSharding(jax.make_mesh((1,), ("data",)), P("data"))
    >>> target = {"w": jax.ShapeDtypeStruct((4, 2), "bfloat16", sharding=sharding)}
    >>> ashore.jax.restore(executor.latest(), target)["w"].sharding == sharding
    True
    >>> executor.shutdown()
    """
    if not isinstance(checkpoint, Checkpoint):
        text = "restore takes an ashore.Checkpoint, and executor.latest() is None where nothing was saved"
        raise InvalidError(f"{text} type={type(checkpoint).__name__}", "invalid")
    if target is None:
        return _as_saved(checkpoint)
    leaves, structure, treedef = flatten(target)
    matching = _Matching(checkpoint)
    found = [matching.leaf(name, want) for name, want in zip(structure.names, leaves, strict=True)]
    matching.check(structure.names, strict)
    arrays = [(number, leaf, leaf.plan()) for number, leaf in enumerate(found) if isinstance(leaf, _Array)]
    batch: list[tuple[int, _Array]] = []
    waiting = 0
    for number, leaf, size in arrays:
        if batch and waiting + size > _BATCH:
            _read(checkpoint, batch, found)
            batch, waiting = [], 0
        batch.append((number, leaf))
        waiting += size
    _read(checkpoint, batch, found)
    return jax.tree.unflatten(treedef, found)


def _read(checkpoint: Checkpoint, batch: list[tuple[int, _Array]], found: list[Any]) -> None:
    """Reads a batch of arrays and puts them in their places in ``found``."""
    names: list[str] = []
    blocks: list[Any] = []
    regions: list[Box | None] = []
    for _, array in batch:
        array.allocate()
        for box, block in array.boxes.items():
            names.append(array.name)
            blocks.append(block)
            regions.append(None if block.shape == array.shape else box)
    checkpoint._read_prepared(names, blocks, regions=regions)
    for number, array in batch:
        found[number] = array.build()
    # Then the blocks can be freed, and no more than one batch is in host memory.
    jax.block_until_ready([found[number] for number, _ in batch])


def _as_saved(checkpoint: Checkpoint) -> Any:
    keys: dict[str, str] = checkpoint.metadata().get(KEYS, {})
    tree = checkpoint.tree()
    if not keys:
        return tree
    leaves, structure, treedef = flatten(tree)
    wrapped = [
        jax.random.wrap_key_data(leaf, impl=keys[name]) if name in keys else leaf
        for name, leaf in zip(structure.names, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, wrapped)


def shapes(checkpoint: Checkpoint) -> Any:
    """Returns the saved pytree of dicts, lists and tuples, with a ``jax.ShapeDtypeStruct`` in the place of
    each array.

    Values are included. No tensor is read. With shardings added, the result is a target for :func:`restore`.

    >>> import ashore, ashore.jax, jax.numpy as jnp, tempfile
    >>> saved = ashore.save(tempfile.mkdtemp(), 1, {"layers": [jnp.zeros(3, "int32")], "epoch": 2})
    >>> ashore.jax.shapes(ashore.Checkpoint(saved.path))
    {'layers': [ShapeDtypeStruct(shape=(3,), dtype=int32)], 'epoch': 2}
    """
    keys: dict[str, str] = checkpoint.metadata().get(KEYS, {})
    dtypes = {stored: name for name, stored in STORED.items()}
    arrays: dict[str, Any] = {}
    for name in checkpoint.names():
        info = checkpoint.info(name)
        if name in keys:
            arrays[name] = key_type(keys[name], info.shape)
        elif info.dtype in dtypes:
            arrays[name] = jax.ShapeDtypeStruct(info.shape, dtypes[info.dtype])
        else:
            raise _invalid(f"JAX has no such dtype dtype={info.dtype}", name)
    return checkpoint._put_together(arrays)


def _invalid(text: str, name: str) -> InvalidError:
    return InvalidError(f'{text} tensor="{name}"', "invalid", name)
