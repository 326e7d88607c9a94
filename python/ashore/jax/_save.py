"""Saving pytrees from the shards of their arrays."""

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
    """The leaves of one tree, as the executor takes them."""

    def __init__(self, alone: bool) -> None:
        self.alone = alone
        self.names: list[str] = []
        self.tensors: list[Any] = []
        self.boxes: list[tuple[tuple[int, ...], tuple[int, ...]] | None] = []
        self.values: dict[str, Any] = {}
        self.keys: dict[str, str] = {}
        self.keep: list[Any] = []

    def add(self, name: str, leaf: Any) -> bool:
        """Adds a leaf; returns whether it is a tensor."""
        if isinstance(leaf, jax.core.Tracer):
            raise _invalid("a traced value has no memory: call save outside of jit, grad and vmap", name)
        if isinstance(leaf, jax.Array):
            self._array(name, leaf)
        elif type(leaf) in (numpy.ndarray, numpy.memmap):
            # The program may write it at any time.
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
            # No process has a box of it.
            self._put(name, numpy.empty(array.shape, array.dtype))
        elif len(array.sharding.device_set) == 1:
            self._put(name, array)
        else:
            self._shards(name, array)

    def _shards(self, name: str, array: jax.Array) -> None:
        for shard in array.addressable_shards:
            if shard.replica_id != 0:
                # XLA reuses the memory of donated shards one by one, and no shard of which a capsule is held.
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
    """Saves a pytree as ``step``: the values at the time of this call, whatever happens to the arrays afterwards.

    Leaves are arrays of JAX with any sharding, typed keys of ``jax.random``, arrays of NumPy, numbers, text and None.
    The name of a leaf is the path to it, joined by dots. A sharded array is saved in boxes, from the first replica of
    each shard; the step has the whole array under its name, and other programs read it so. Static fields of nodes are
    not saved: they come from the target of :func:`restore`.

    Where arrays lie over several processes, each process calls this with the same tree, and an executor with
    ``ranks``. Leaves that every process has for itself must be equal in all; plain values are those of rank 0.

    The call waits until the arrays are computed, and copies those of NumPy. It copies none of JAX: it holds a DLPack
    capsule of every shard until the save is staged. Meanwhile a computation to which the arrays are donated gets
    other memory for its results, and leaves the arrays as they are. ``executor.fence()`` before such a computation
    waits until the save is staged, and drops the capsules; without it the old arrays stay allocated until the next
    call of ashore.

    ``metadata``, ``overwrite``, ``name``, ``directory`` and ``deadline`` are as in ``CheckpointExecutor.save``.

    Raises ``InvalidError``, naming the leaf, for two leaves of one name, an object that is no array and no plain
    value, a dtype that safetensors lacks (such as int4), an array that was donated already, and one with shards of
    other processes where the executor has no ranks; otherwise as ``CheckpointExecutor.save``.

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
