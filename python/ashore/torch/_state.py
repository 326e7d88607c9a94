"""The state that a training loop saves, as named objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ._errors import declining
from ._parts import Copies, ModulePart, OptimizerPart, RngPart, part_of
from ._restore import IncompatibleKeys, Plan


# The engine rewrites smaller files instead of sharing them.
_LEAST = 1 << 20


class State:
    """The objects of a program that make up a checkpoint. Created by `state`."""

    def __init__(self, **objects: Any) -> None:
        if not objects:
            raise TypeError("a state without objects saves nothing")
        self._parts = {name: part_of(name, given) for name, given in objects.items()}
        self._scans: list[int] | None = None

    def tree(self) -> dict[str, Any]:
        """Returns the current tensors and values, in dicts and lists. The tensors are the program's own."""
        self._name_parameters()
        return {name: part.tree() for name, part in self._parts.items()}

    def taken(self) -> dict[str, Any]:
        """Returns the tree to save: the result of `tree`, with copies of tensors that may be written before
        the fence.

        Parameters and the state of optimizers are not copied, because only an optimizer writes them.
        Everything else is copied: forward writes buffers, schedulers write learning rates.
        """
        self._name_parameters()
        copies = Copies()
        return {name: part.taken(copies) for name, part in self._parts.items()}

    def of_rank(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the result of `taken` without the states of random number generators, and these states
        separately. With several ranks, each rank saves its own."""
        tree = self.taken()
        own = {name: part.own() for name, part in self._parts.items() if isinstance(part, RngPart)}
        return {name: entry for name, entry in tree.items() if name not in own}, own

    def frozen(self, taken: Mapping[str, Any]) -> list[str]:
        """Returns the names of parameters in the result of `taken` that do not train (`requires_grad` is
        off).

        Returns no names if these parameters have few bytes together, because their files would not be shared.
        """
        modules = [name for name, part in self._parts.items() if isinstance(part, ModulePart)]
        found = [(f"{name}.{path}", value) for name in modules for path, value in ModulePart.frozen(taken[name])]
        return [name for name, _ in found] if sum(value.nbytes for _, value in found) >= _LEAST else []

    def plan(self, checkpoint: Any) -> Plan:
        """Plans a restore of `checkpoint`."""
        self._name_parameters()
        plan = Plan(checkpoint)
        for name, part in self._parts.items():
            part.plan(plan, name)
        return plan

    def _name_parameters(self) -> None:
        """Passes the names of parameters to the optimizers, again after a module has changed its
        structure."""
        modules = {name: part for name, part in self._parts.items() if isinstance(part, ModulePart)}
        scans = [part.scans() for part in modules.values()]
        if scans == self._scans:
            return
        self._scans = scans
        names: dict[int, str] = {}
        for name, part in modules.items():
            for parameter, path in part.names():
                names.setdefault(parameter, f"{name}.{path}")
        for each in self._parts.values():
            if isinstance(each, OptimizerPart):
                each.name_by(names)


def state(**objects: Any) -> State:
    """Collects the objects of a checkpoint by name: modules, optimizers, schedulers, scalers, dicts.

    Any object with `state_dict` and `load_state_dict` is accepted, and dicts of plain values
    (`progress={"epoch": 3}`), which are restored in place. Create the state once, before the loop: it locates
    the tensors once, and again when a module has changed its structure. It holds the objects and does not
    copy them.

    Tensors are saved under the names of their modules (`model.layers.0.weight`), and an optimizer's state
    under the names of its parameters (`optimizer.state.model.layers.0.weight.exp_avg`). So the order of
    parameters does not matter. `DistributedDataParallel` and `torch.compile` do not change names.

    Raises TypeError for an object that cannot be part of a state.
    """
    return State(**objects)


def save(executor: Any, step: int, state: State, **options: Any) -> Any:
    """Begins a save of `state` and returns the save: `CheckpointExecutor.save` with the current contents of
    `state`.

    Until the next fence, nothing may write parameters and the optimizer's state; `fence_before` ensures that.
    The program may write everything else (buffers, dicts, schedulers, random numbers) at once: this call
    copies it on the device where it lies, and the copies are held until they are staged. `options` are those
    of `CheckpointExecutor.save`. The default of `frozen` is the parameters of modules whose `requires_grad`
    is off, if they have 1 MiB or more: later steps share their files as long as they do not change.

    With several ranks (`CheckpointExecutor(ranks=...)`), each rank calls this with the same step. Each rank
    gives its boxes of DTensors and its own random numbers. Everything else is the same on all ranks and
    written once.

    Do not resize a storage between the save and the fence (`untyped_storage().resize_`): the save would read
    freed memory, and no reference prevents that.
    """
    with declining(executor, step):
        # A step that a GradScaler skipped has not called a fence, and the executor reads one state at a time.
        executor.fence()
        tree, own = (state.taken(), {}) if executor._alone else state.of_rank()
        if executor._alone:
            options.setdefault("frozen", state.frozen(tree))
    if own:
        options["rank_values"] = {**own, **options.get("rank_values", {})}
    return executor.save(step, tree, **options)


def restore(checkpoint: Any, state: State, *, strict: bool = True) -> IncompatibleKeys:
    """Restores a checkpoint into the objects of `state`, in place, and returns the names that did not match.

    Tensors of modules and optimizers are filled in place. An optimizer that has no state yet gets it. Shapes
    and dtypes are never converted. With `strict`, names that only one of the two has are an error, and
    nothing is changed. Otherwise the names that both have are restored.

    Raises `ashore.InvalidError` for names, shapes or dtypes that differ. Raises `ashore.DamagedError` for
    bytes that differ from the saved bytes: then the content of the objects is undefined.
    """
    with torch.no_grad():
        return state.plan(checkpoint).carry_out(strict)
