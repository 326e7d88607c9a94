"""Lightning: an executor writes its checkpoints, and a fence runs where Lightning's optimizers need it.

    fence = ashore.torch.lightning.Fence(executor)
    io = ashore.torch.lightning.CheckpointIO(executor, fence)
    trainer = lightning.Trainer(plugins=[io], callbacks=[fence, ModelCheckpoint(...)])
"""

from __future__ import annotations

import shutil
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins.io import CheckpointIO as _CheckpointIO
from torch.utils._pytree import tree_map_only

import ashore
from ashore._place import absolute

from ._errors import written
from ._parts import Copies
from ._restore import Plan
from ._trees import packed, unpacked


class Fence(Callback):
    """Calls the fence in `on_before_optimizer_step`.

    The optimizer's own pre-hook, which `fence_before` uses, runs before forward and backward there, because
    these run within the optimizer's step.
    """

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self._module: torch.nn.Module | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._module = pl_module

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._executor.fence()

    def addresses(self) -> set[int]:
        """Returns the addresses of the parameters, which only an optimizer writes."""
        return set() if self._module is None else {parameter.data_ptr() for parameter in self._module.parameters()}


class CheckpointIO(_CheckpointIO):
    """Writes each Lightning checkpoint into a directory with the name that Lightning gives it (`last.ckpt`).

    `save_checkpoint` returns at once. The save reads parameters and the state of optimizers until the fence;
    the call copies other tensors. Objects that are not plain (paths, hyperparameters of other types) are
    pickled. A checkpoint of the same path is replaced when the new one is durable. `remove_checkpoint` waits
    until all checkpoints are durable, and removes nothing if one failed; `ModelCheckpoint(save_top_k=-1)`
    never calls it. `load_checkpoint` unpickles: load only checkpoints that you trust.
    """

    def __init__(self, executor: Any, fence: Fence) -> None:
        self._executor, self._fence = executor, fence
        self._saves: dict[str, Any] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None:
            raise ashore.InvalidError("the executor has its own options: give no storage_options", "invalid")
        path = absolute(path)
        copies, parameters = Copies(), self._fence.addresses()
        optimizers = checkpoint.get("optimizer_states", [])
        taken = {key: copies.of(value) for key, value in checkpoint.items() if key not in ("optimizer_states", "state_dict")}
        taken["optimizer_states"] = [
            {**optimizer, "param_groups": copies.of(optimizer["param_groups"])} for optimizer in optimizers
        ]
        weights = checkpoint.get("state_dict", {})
        taken["state_dict"] = {
            name: value if isinstance(value, torch.Tensor) and value.data_ptr() in parameters else copies.of(value)
            for name, value in weights.items()
        }
        self._wait(path)
        # A step without an optimizer step, as after validation, has not called a fence.
        self._executor.fence()
        step = int(checkpoint.get("global_step", 0))
        self._saves[path] = self._executor.save(step, packed(taken), directory=path, overwrite=True)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        self._wait(absolute(path))
        tree: dict[str, Any] = unpacked(Plan(ashore.Checkpoint(path)).whole())
        if map_location is not None:
            tree = tree_map_only(torch.Tensor, lambda tensor: tensor.to(map_location), tree)
        return tree

    def remove_checkpoint(self, path: Any) -> None:
        # Lightning removes the old checkpoint right after `save_checkpoint` of the new one has returned.
        self._wait_for_all()
        shutil.rmtree(path, ignore_errors=True)

    def teardown(self) -> None:
        """Waits until every checkpoint is durable. Raises the error of a checkpoint that failed."""
        self._wait_for_all()

    def _wait_for_all(self) -> None:
        for path in list(self._saves):
            self._wait(path)

    def _wait(self, path: str) -> None:
        if (save := self._saves.pop(path, None)) is not None:
            written(save.wait(), save.step)
