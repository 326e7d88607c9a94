"""What a training loop saves, as named objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ._errors import declining
from ._parts import Copies, ModulePart, OptimizerPart, RngPart, part_of
from ._restore import IncompatibleKeys, Plan


# The engine writes smaller files again rather than share them.
_LEAST = 1 << 20


class State:
    """The objects of a program that a checkpoint consists of. Made by `state`."""

    def __init__(self, **objects: Any) -> None:
        if not objects:
            raise TypeError("a state without objects saves nothing")
        self._parts = {name: part_of(name, given) for name, given in objects.items()}
        self._scans: list[int] | None = None

    def tree(self) -> dict[str, Any]:
        """The tensors and values as they are now, in dicts and lists. Tensors are those of the program."""
        self._name_parameters()
        return {name: part.tree() for name, part in self._parts.items()}

    def taken(self) -> dict[str, Any]:
        """The tree to save: that of `tree`, with copies of the tensors that may be written before the fence.

        Parameters and the state of optimizers are the program's own, because only an optimizer writes them.
        Everything else is copied: forward writes buffers, schedulers write learning rates.
        """
        self._name_parameters()
        copies = Copies()
        return {name: part.taken(copies) for name, part in self._parts.items()}

    def of_rank(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `taken` gives, without random numbers, and those: of several ranks each has its own."""
        tree = self.taken()
        own = {name: part.own() for name, part in self._parts.items() if isinstance(part, RngPart)}
        return {name: entry for name, entry in tree.items() if name not in own}, own

    def frozen(self, taken: Mapping[str, Any]) -> list[str]:
        """The names of parameters in what `taken` gave that do not train (`requires_grad` is off).

        None where they are few bytes together: files of their own would not be shared.
        """
        modules = [name for name, part in self._parts.items() if isinstance(part, ModulePart)]
        found = [(f"{name}.{path}", value) for name in modules for path, value in ModulePart.frozen(taken[name])]
        return [name for name, _ in found] if sum(value.nbytes for _, value in found) >= _LEAST else []

    def plan(self, checkpoint: Any) -> Plan:
        """What a restore of `checkpoint` would do."""
        self._name_parameters()
        plan = Plan(checkpoint)
        for name, part in self._parts.items():
            part.plan(plan, name)
        return plan

    def _name_parameters(self) -> None:
        """Tells optimizers the names of parameters, again when a module has changed its structure."""
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
    """What a checkpoint consists of: modules, optimizers, schedulers, scalers, dicts, by name.

    Anything with `state_dict` and `load_state_dict` is taken, and dicts of plain values (`progress={"epoch":
    3}`), which are restored in place. Make it once, before the loop: where the tensors are is found once, and
    again when a module has changed its structure. The objects are held, not copied.

    Tensors are saved by the names of their modules (`model.layers.0.weight`), an optimizer's state by those
    of its parameters (`optimizer.state.model.layers.0.weight.exp_avg`), so that the order of parameters does
    not matter. `DistributedDataParallel` and `torch.compile` do not change names.

    Raises TypeError for what cannot be part of a state.
    """
    return State(**objects)


def save(executor: Any, step: int, state: State, **options: Any) -> Any:
    """Begins a save of `state`, and returns it: `CheckpointExecutor.save` with what `state` consists of now.

    Until the next fence, parameters and the optimizer's state must not be written: `fence_before` takes care
    of that. Everything else (buffers, dicts, schedulers, random numbers) may be written at once: it is copied
    in this call, where it lies, and the copies are held until they are staged. `options` are those of
    `CheckpointExecutor.save`. `frozen` is by default the parameters of modules whose `requires_grad` is off, if
    they are 1 MiB or more: their files are shared by later steps as long as they do not change.

    Of several ranks (`CheckpointExecutor(ranks=...)`) each calls it with the same step. It gives its boxes of
    DTensors, and random numbers of its own; everything else is the same on all ranks, and written once.

    A storage that is resized between the save and the fence (`untyped_storage().resize_`) is read after it
    was freed: that is the caller's breach, which no reference prevents.
    """
    with declining(executor, step):
        # A step that a GradScaler skipped has called no fence, and the executor reads one state at a time.
        executor.fence()
        tree, own = (state.taken(), {}) if executor._alone else state.of_rank()
        if executor._alone:
            options.setdefault("frozen", state.frozen(tree))
    if own:
        options["rank_values"] = {**own, **options.get("rank_values", {})}
    return executor.save(step, tree, **options)


def restore(checkpoint: Any, state: State, *, strict: bool = True) -> IncompatibleKeys:
    """Puts a checkpoint into the objects of `state`, in place, and returns the names that did not match.

    Tensors of modules and optimizers are filled where they lie; an optimizer that has no state yet gets it.
    Shapes and dtypes are never converted. With `strict`, names that only one of them has are an error, and
    nothing was changed; otherwise what both have is restored.

    Raises `ashore.InvalidError` for names, shapes or dtypes that differ, and `ashore.DamagedError` for bytes
    that are not those that were saved: then the content of the objects is undefined.
    """
    with torch.no_grad():
        return state.plan(checkpoint).carry_out(strict)
