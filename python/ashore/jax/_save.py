"""Saves pytrees from the shards of their arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy

from .._errors import InvalidError
from .._executor import CheckpointExecutor, StrPath
from .._save import Save
from ._leaves import KEYS, STORED, is_key, no_dtype
from ._tree import SHAPE, flatten

_MISSING: Mapping[str, Any] = {}


class _Collected:
    """The leaves of one tree, in the form that the executor takes."""

    def __init__(self, alone: bool) -> None:
        self.alone = alone
        self.names: list[str] = []
        self.tensors: list[Any] = []
        self.boxes: list[tuple[tuple[int, ...], tuple[int, ...]] | None] = []
        self.values: dict[str, Any] = {}
        self.keys: dict[str, str] = {}
        self.keep: list[Any] = []

    def add(self, name: str, leaf: Any) -> bool:
        """Adds a leaf, and returns True if it is a tensor."""
        if isinstance(leaf, jax.core.Tracer):
            raise _invalid("a traced value has no memory: call save outside of jit, grad and vmap", name)
        if isinstance(leaf, jax.Array):
            self._array(name, leaf)
        elif type(leaf) in (numpy.ndarray, numpy.memmap):
            # The program may write the array at any time.
            self._put(name, numpy.array(leaf, order="C", copy=True))
        elif hasattr(leaf, "dtype") and not isinstance(leaf, numpy.generic):
            text = "only arrays of JAX and NumPy, and plain values, can be leaves: convert this one with jnp.asarray()"
            raise _invalid(f"{text} type={type(leaf).__module__}.{type(leaf).__qualname__}", name)
        else:
            self.values[name] = leaf
            return False
        return True

    def _put(self, name: str, tensor: Any, box: tuple[tuple[int, ...], tuple[int, ...]] | None = None) -> None:
        self.names.append(name)
        self.tensors.append(tensor)
        self.boxes.append(box)

    def _array(self, name: str, array: jax.Array) -> None:
        if array.is_deleted():
            raise _invalid("the array was deleted, or donated to a computation: save before that", name)
        if is_key(array):
            impl = jax.random.key_impl(array)
            if not isinstance(impl, str):
                raise _invalid(f"keys of an implementation without a name cannot be restored impl={impl!r}", name)
            self.keys[name] = impl
            array = jax.random.key_data(array)
        if array.dtype.name not in STORED:
            raise _invalid(no_dtype(array.dtype), name)
        if self.alone and not array.is_fully_addressable:
            text = "the array has shards of other processes: give the executor ranks and run, and save in all processes"
            raise _invalid(f"{text} sharding={array.sharding}", name)
        if array.size == 0:
            # No process has a box of an empty array.
            self._put(name, numpy.empty(array.shape, array.dtype))
        elif len(array.sharding.device_set) == 1:
            self._put(name, array)
        else:
            self._shards(name, array)

    def _shards(self, name: str, array: jax.Array) -> None:
        for shard in array.addressable_shards:
            if shard.replica_id != 0:
                # XLA reuses the memory of donated shards one by one, but not the memory of a shard whose
                # capsule is held.
                self.keep.append(shard.data.__dlpack__())
            elif shard.data.shape == array.shape:
                self._put(name, shard.data)
            else:
                self._put(name, shard.data, (array.shape, tuple(part.start or 0 for part in shard.index)))


def save(
    executor: CheckpointExecutor,
    step: int,
    tree: Any,
    *,
    metadata: Mapping[str, Any] = _MISSING,
    overwrite: bool = False,
    name: str | None = None,
    directory: StrPath | None = None,
    deadline: float | None = None,
) -> Save:
    """Saves a pytree as ``step``: the values at the time of this call, even if the arrays change later.

    Leaves are JAX arrays with any sharding, typed keys of ``jax.random``, NumPy arrays, numbers, text and
    None. The name of a leaf is the path to it, joined by dots. A sharded array is saved in boxes, from the
    first replica of each shard. In the step, the whole array has one name, and other programs read the whole
    array under that name. Static fields of nodes are not saved: they come from the target of :func:`restore`.

    If arrays span several processes, each process calls this with the same tree and with an executor that has
    ``ranks``. Leaves that every process holds for itself must be equal in all processes. Plain values are
    those of rank 0.

    The call waits until the arrays are computed, and copies NumPy arrays. It copies no JAX array: it holds a
    DLPack capsule of every shard until the save is staged. If a computation to which the arrays are donated
    runs meanwhile, JAX gives it other memory for its results and leaves the arrays as they are.
    ``executor.fence()`` before such a computation waits until the save is staged, and releases the capsules.
    Without that fence the old arrays stay allocated until the next call of ashore.

    ``metadata``, ``overwrite``, ``name``, ``directory`` and ``deadline`` are as in ``CheckpointExecutor.save``.

    Raises ``InvalidError``, naming the leaf, for two leaves with the same name, for an object that is neither
    an array nor a plain value, for a dtype that safetensors lacks (such as int4), for an array that was
    already donated, and for an array with shards of other processes if the executor has no ranks. Otherwise
    raises what ``CheckpointExecutor.save`` raises.

    >>> import ashore, ashore.jax, jax, tempfile
    >>> executor = ashore.CheckpointExecutor(tempfile.mkdtemp(), arena=8 << 20, chunk=1 << 20)
    >>> committed = ashore.jax.save(executor, 1, {"key": jax.random.key(0), "sizes": (1, None)}).wait()
    >>> executor.latest().names(), executor.latest().value_names()
    (['key'], ['sizes.0', 'sizes.1'])
    >>> executor.shutdown()
    """
    leaves, structure, _ = flatten(tree)
    collected = _Collected(executor._alone)
    tensors = [collected.add(name, leaf) for name, leaf in zip(structure.names, leaves, strict=True)]
    notes: dict[str, Any] = {SHAPE: structure.shape(tensors)}
    if collected.keys:
        notes[KEYS] = collected.keys
    return executor._save_prepared(
        step,
        collected.names,
        collected.tensors,
        boxes=collected.boxes,
        values=collected.values,
        metadata={**metadata, **notes},
        overwrite=overwrite,
        name=name,
        directory=directory,
        deadline=deadline,
        keep=collected.keep,
        immutable=True,
    )


def _invalid(text: str, name: str) -> InvalidError:
    return InvalidError(f'{text} tensor="{name}"', "invalid", name)
