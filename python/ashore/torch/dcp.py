"""torch's distributed checkpoint (DCP) over an executor: `dcp.save`, `dcp.async_save`, `dcp.load`."""

from __future__ import annotations

import io
import os
import threading
import weakref
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageReader as _Reader
from torch.distributed.checkpoint.storage import StorageWriter as _Writer
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from ._boxes import mine
from ._dtypes import torch_dtype
from ._errors import declining, invalid, written

# The value that holds what DCP's own metadata would contain: objects as bytes, by name, and the path of each
# name.
_VALUE = "ashore.dcp"


def step_of(checkpoint_id: str | os.PathLike[str] | int | None) -> int | None:
    """Returns the step that a DCP id names by its last digits (`step-5`, `/checkpoints/1000`). None if there
    is no id."""
    if checkpoint_id is None:
        return None
    text = os.fspath(checkpoint_id) if not isinstance(checkpoint_id, int) else str(checkpoint_id)
    digits = text.rstrip("/")
    digits = digits[len(digits.rstrip("0123456789")) :]
    if not digits:
        raise invalid(f"a checkpoint_id ends in the number of the step id={text!r}")
    return int(digits)


class _Begun:
    """The saves of each executor that stagers have begun and for which no writer has waited."""

    _lock = threading.Lock()
    _saves: weakref.WeakKeyDictionary[Any, dict[int, tuple[Any, set[str]]]] = weakref.WeakKeyDictionary()

    @classmethod
    def put(cls, executor: Any, step: int, save: Any, names: set[str]) -> None:
        with cls._lock:
            cls._saves.setdefault(executor, {})[step] = save, names

    @classmethod
    def take(cls, executor: Any, step: int) -> tuple[Any, set[str]] | None:
        with cls._lock:
            return cls._saves.get(executor, {}).pop(step, None)


def begin(executor: Any, step: int, state_dict: dict[str, Any]) -> tuple[Any, set[str]]:
    """Begins the save of a DCP state dict. Returns the save and the names in it."""
    flat, paths = flatten_state_dict(state_dict)
    return begin_flat(executor, step, flat, paths), set(flat)


def begin_flat(executor: Any, step: int, flat: dict[str, Any], paths: Any) -> Any:
    saves, objects = Tensors(), {}
    with declining(executor, step):
        for name, value in flat.items():
            if isinstance(value, torch.Tensor):
                saves.add(name, value)
            else:
                objects[name] = _pickled(value)
    return saves.save(executor, step, objects, paths)


def _pickled(value: Any) -> bytes:
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


class Tensors:
    """Tensors to save, whole or in boxes."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._tensors: list[torch.Tensor] = []
        self._boxes: list[tuple[list[int], list[int]] | None] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Adds a tensor, or the part of a DTensor that this rank holds."""
        if not isinstance(tensor, DTensor):
            self._put(name, tensor.detach(), None)
        elif (held := mine(tensor, name)) is not None:
            self._put(name, *held)

    def add_box(self, name: str, tensor: torch.Tensor, size: torch.Size, offset: torch.Size) -> None:
        if tensor.numel() > 0:
            self._put(name, tensor.detach(), (list(size), list(offset)))

    def _put(self, name: str, tensor: torch.Tensor, box: tuple[list[int], list[int]] | None) -> None:
        self._names.append(name)
        self._tensors.append(tensor)
        self._boxes.append(box)

    def save(self, executor: Any, step: int, objects: dict[str, bytes], paths: Any) -> Any:
        values = {_VALUE: {"objects": objects, "paths": paths}}
        return executor._save_prepared(step, self._names, self._tensors, boxes=self._boxes, values=values)


class Stager(AsyncStager):
    """Stages a state dict by beginning its save: `dcp.async_save(state, async_stager=Stager(executor, step), ...)`.

    `stage` returns at once, and copies only small tensors. The program may write the state after the next
    fence of the executor (`ashore.torch.fence_before`). The writer of the same step waits for the save.
    """

    def __init__(self, executor: Any, step: int) -> None:
        self._executor, self._step = executor, step
        self.save: Any = None

    @property
    def should_synchronize_after_execute(self) -> bool:
        return False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        self.save, names = begin(self._executor, self._step, state_dict)
        _Begun.put(self._executor, self._step, self.save, names)
        return state_dict

    def synchronize_staging(self) -> None:
        """Waits until the state may be written."""
        if self.save is not None:
            self.save.staged.result()

    def close(self) -> None:
        pass


class StorageWriter(_Writer, Stager):
    """Writes a DCP save as a step of `executor`:
    `dcp.save(state, storage_writer=StorageWriter(executor, 5))`.

    `dcp.async_save` also uses the writer as the stager: `stage` begins the save, and `write_data` waits until
    the step is durable. The step is the argument given here, or the number at the end of DCP's
    `checkpoint_id`. Tensors keep their names. Other objects are kept in a value, as `torch.save` writes them:
    keep them small.

    With several ranks, each rank has an executor with `ranks=` over the same root, and gives the boxes of its
    DTensors. Tensors that all ranks hold are written once. Objects are those of rank 0.
    """

    def __init__(self, executor: Any, step: int | None = None) -> None:
        self._executor = executor
        self._step = step  # type: ignore[assignment]
        self.save: Any = None

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        if self._step is None:
            raise invalid("dcp.async_save tells a stager no id: give the step to StorageWriter")
        return Stager.stage(self, state_dict)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        step = step_of(checkpoint_id)
        if step is not None and self._step not in (None, step):
            raise invalid(f"the checkpoint_id names another step than the writer id={step} step={self._step}")
        self._step = self._step if step is None else step

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if self._step is None:
            raise invalid("a save needs its step: StorageWriter(executor, step), or a checkpoint_id")

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=None if self._step is None else str(self._step))

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        begun = _Begun.take(self._executor, self._step)
        if begun is not None and {item.index.fqn for item in plan.items} <= begun[1]:
            self.save = begun[0]
        else:
            self.save = self._begin(plan, planner)
        done: Future[list[WriteResult]] = Future()
        written(self.save.wait(), self.save.step)
        done.set_result([
            WriteResult(item.index, item.tensor_storage_size() or 0, storage_data=item.index.fqn) for item in plan.items
        ])  # fmt: skip
        return done

    def _begin(self, plan: SavePlan, planner: SavePlanner) -> Any:
        """Begins a save of what the planner resolves, if no stager has begun one."""
        if type(planner) is DefaultSavePlanner and planner.flatten_state_dict:
            # Save everything that each rank holds, including the replicas that DCP has dropped: the engine
            # drops replicas itself.
            return begin_flat(self._executor, self._step, planner.state_dict, planner.mappings)
        saves, objects = Tensors(), {}
        with declining(self._executor, self._step):
            for item in plan.items:
                data: Any = planner.resolve_data(item)
                whole: Any = item.tensor_data
                if item.type == WriteItemType.BYTE_IO:
                    objects[item.index.fqn] = data.getvalue()
                elif item.type == WriteItemType.SHARD:
                    saves.add_box(item.index.fqn, data, whole.size, whole.chunk.offsets)
                else:
                    saves.add(item.index.fqn, data)
        return saves.save(self._executor, self._step, objects, getattr(planner, "mappings", {}))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        metadata.storage_data = {result.index: result.storage_data for ranks in results for result in ranks}


class StorageReader(_Reader):
    """Reads a step into DCP: `dcp.load(state, storage_reader=StorageReader(checkpoint))`.

    `checkpoint` is an `ashore.Checkpoint`. It may be any step: tensors of a step that DCP did not save are
    read by their names. A tensor is read only into a tensor of the same dtype, while DCP's own readers
    convert.
    """

    def __init__(self, checkpoint: Any) -> None:
        self._checkpoint = checkpoint

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        step = step_of(checkpoint_id)
        if step not in (None, self._checkpoint.step):
            raise invalid(f"the checkpoint_id names another step than the reader's id={step}")

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return metadata(self._checkpoint)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        reads, objects = [], _saved(self._checkpoint)["objects"]
        for item in plan.items:
            name = item.storage_index.fqn
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(objects[name]))
                continue
            target = planner.resolve_tensor(item).detach()
            chunk = item.storage_index.offset or [0] * len(item.storage_offsets)
            begins = [at + offset for at, offset in zip(chunk, item.storage_offsets)]
            region = [(begin, begin + length) for begin, length in zip(begins, item.lengths)]
            # Parts of a tensor that was split by columns are interleaved in memory.
            packed = target if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
            reads.append((item, target, name, packed, region))
        names, memory, regions = ([read[at] for read in reads] for at in (2, 3, 4))
        self._checkpoint._read_prepared(names, memory, regions=regions)
        for item, target, _, packed, _ in reads:
            if packed is not target:
                target.copy_(packed)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _saved(checkpoint: Any) -> dict[str, Any]:
    return checkpoint.value(_VALUE) if _VALUE in checkpoint.value_names() else {"objects": {}, "paths": {}}


def metadata(checkpoint: Any) -> Metadata:
    """Returns what DCP's own `.metadata` would contain for a step."""
    saved = _saved(checkpoint)
    described: dict[str, Any] = {name: BytesStorageMetadata() for name in saved["objects"]}
    for name in checkpoint.names():
        info = checkpoint.info(name)
        chunks = [
            ChunkStorageMetadata(torch.Size(b for b, _ in box), torch.Size(e - b for b, e in box))
            for box in checkpoint.boxes(name)
        ]
        properties = TensorProperties(dtype=torch_dtype(info.dtype))
        described[name] = TensorStorageMetadata(properties, torch.Size(info.shape), chunks)
    meta = StorageMeta(checkpoint_id=str(checkpoint.step))
    return Metadata(described, planner_data=saved["paths"] or None, storage_data={}, storage_meta=meta)
