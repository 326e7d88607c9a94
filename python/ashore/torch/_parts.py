"""The parts of a `State`: how each kind of object is saved and restored.

`tree` returns a part as a tree of tensors and values. `taken` returns the same tree with copies of the
tensors that may be written before the fence. `plan` restores a part from a saved tree (see `_restore`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, MutableMapping
from itertools import repeat
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ._boxes import is_dtensor
from ._fence import unwrapped
from ._numpy import is_array
from ._rng import Rng, of_plain, plain

if TYPE_CHECKING:
    from ._restore import Plan


_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)


def part_of(name: str, given: Any) -> Part:
    """Returns the part for an object that was given under this name."""
    if isinstance(given, nn.Module):
        return ModulePart(given)
    optimizer = unwrapped(given) if isinstance(given, torch.optim.Optimizer) else given
    if isinstance(optimizer, torch.optim.Optimizer) and type(optimizer).state_dict is torch.optim.Optimizer.state_dict:
        return OptimizerPart(optimizer)
    if isinstance(given, Rng):
        return RngPart(given)
    if callable(getattr(given, "state_dict", None)) and callable(getattr(given, "load_state_dict", None)):
        return StatefulPart(given)
    if isinstance(given, MutableMapping):
        return DictPart(given)
    raise TypeError(
        "a state consists of modules, optimizers, dicts, and objects with state_dict and load_state_dict: put plain "
        f"values into a dict name={name} type={type(given).__name__}"
    )


class Copies:
    """Copies tensors, once for each memory range, so that tied tensors stay tied."""

    def __init__(self) -> None:
        self._made: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, tree: Any) -> Any:
        """Returns the tree with copies of its tensors and arrays."""
        of = type(tree)
        if of is dict or of is OrderedDict:
            return of((key, self.of(value)) for key, value in tree.items())
        if of is list or of is tuple:
            return of(map(self.of, tree))
        if isinstance(tree, torch.Tensor):
            return self.tensor(tree)
        return tree.copy() if is_array(tree) else tree

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if is_dtensor(tensor):
            return tensor.detach().clone()
        if type(tensor) not in _PLAIN or tensor.layout is not torch.strided:
            return tensor
        key = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        # The original is held, too, so that no other tensor gets its memory meanwhile.
        if key not in self._made:
            self._made[key] = tensor, tensor.detach().clone()
        return self._made[key][1]


class Part:
    def tree(self) -> Any:
        raise NotImplementedError

    def taken(self, copies: Copies) -> Any:
        return copies.of(self.tree())

    def plan(self, plan: Plan, name: str) -> None:
        raise NotImplementedError


class StatefulPart(Part):
    def __init__(self, given: Any) -> None:
        self._given = given

    def tree(self) -> Any:
        return self._given.state_dict()

    def plan(self, plan: Plan, name: str) -> None:
        built = plan.build(name, like=self.tree(), in_place=False)
        if built is not plan.MISSING:
            plan.after(lambda: self._given.load_state_dict(built))


class RngPart(StatefulPart):
    """The states of random number generators. Which generators exist depends on the machine and on the
    moment.

    A step that was saved before CUDA or NumPy was in use lacks their states, and they do not count as missing
    names. With several ranks, each rank keeps its own states in a value of the rank.
    """

    def own(self) -> Any:
        return plain(self.tree())

    def plan(self, plan: Plan, name: str) -> None:
        found, own = plan.own(name)
        if found:
            if own is not None:
                plan.after(lambda: self._given.load_state_dict(of_plain(own)))
            return
        built = plan.build(name, like=None, in_place=False)
        if built is not plan.MISSING:
            plan.after(lambda: self._given.load_state_dict(built))


class DictPart(Part):
    def __init__(self, given: MutableMapping[Any, Any]) -> None:
        self._given = given

    def tree(self) -> Any:
        return dict(self._given)

    def plan(self, plan: Plan, name: str) -> None:
        built = plan.build(name, like=self._given, in_place=True)
        if built is not plan.MISSING:
            plan.after(lambda: self._replace(built))

    def _replace(self, built: Mapping[Any, Any]) -> None:
        self._given.clear()
        self._given.update(built)


def _bare(module: nn.Module) -> nn.Module:
    """Returns the module inside wrappers that only add a prefix to its names."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            module = module.module
        elif isinstance(inner := module.__dict__.get("_modules", {}).get("_orig_mod"), nn.Module):
            module = inner
        else:
            return module


def _is_plain(module: nn.Module) -> bool:
    """True if `state_dict` of this module, without its children, is its parameters and persistent buffers."""
    of = type(module)
    return (
        of.state_dict is nn.Module.state_dict
        and of._save_to_state_dict is nn.Module._save_to_state_dict
        and of.get_extra_state is nn.Module.get_extra_state
        and not module._state_dict_hooks
        and not module._state_dict_pre_hooks
    )


class ModulePart(Part):
    """A module. It locates its tensors once, and again when the module has changed its structure."""

    def __init__(self, module: nn.Module) -> None:
        self._module = _bare(module)
        self._count = 0
        self._scan()

    def scans(self) -> int:
        """Returns how often the structure was scanned. Scans it again if it has changed."""
        if not self._is_known():
            self._scan()
        return self._count

    def _scan(self) -> None:
        self._count += 1
        modules = list(self._module.named_modules(remove_duplicate=False))
        self._plain = all(_is_plain(module) for _, module in modules)
        self._names: list[str] = []
        self._places: list[tuple[Mapping[str, Any], str]] = []
        self._buffers: list[str] = []
        # The places are valid while these are unchanged: children by identity, and the number of entries of
        # dicts.
        self._children: list[tuple[Mapping[str, Any], str]] = []
        self._dicts: list[Mapping[str, Any] | set[str]] = []
        self._absent: list[tuple[Mapping[str, Any], str]] = []
        for path, module in modules:
            prefix = path + "." if path else ""
            self._dicts += [module._modules, module._parameters, module._buffers, module._non_persistent_buffers_set]
            self._children += [(module._modules, key) for key in module._modules]
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self._names.append(prefix + key)
                    self._places.append((module._parameters, key))
            for key, buffer in module._buffers.items():
                if buffer is not None and key not in module._non_persistent_buffers_set:
                    self._names.append(prefix + key)
                    self._buffers.append(prefix + key)
                    self._places.append((module._buffers, key))
            self._absent += [(held, key) for held in (module._parameters, module._buffers) for key in held if held[key] is None]
        self._seen = [children[key] for children, key in self._children], [len(entries) for entries in self._dicts]

    def _is_known(self) -> bool:
        children = [children.get(key) for children, key in self._children]
        same = (children, [len(entries) for entries in self._dicts]) == self._seen
        return same and all(held.get(key) is None for held, key in self._absent)

    def tree(self) -> dict[str, Any]:
        self.scans()
        if not self._plain:
            return dict(self._module.state_dict(keep_vars=True))
        tensors = [held.get(key) for held, key in self._places]
        if any(map(is_, tensors, repeat(None))):
            self._scan()
            tensors = [held[key] for held, key in self._places]
        return dict(zip(self._names, tensors))

    def taken(self, copies: Copies) -> Any:
        tree = self.tree()
        # Forward writes buffers before the fence: BatchNorm writes its averages, spectral_norm its vectors.
        for name in self._buffers if self._plain else [key for key, value in tree.items() if not _is_parameter(value)]:
            tree[name] = copies.of(tree[name])
        return tree

    @staticmethod
    def frozen(taken: Mapping[str, Any]) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters in the result of `taken` that do not train."""
        return ((name, value) for name, value in taken.items() if _is_parameter(value) and not value.requires_grad)

    def names(self) -> Iterator[tuple[int, str]]:
        """Yields the identity of each parameter, and its first name."""
        return ((id(parameter), name) for name, parameter in self._module.named_parameters())

    def plan(self, plan: Plan, name: str) -> None:
        if self._plain:
            plan.build(name, like=self.tree(), in_place=True, of_module=True)
            return
        # Hooks and extra state may transform the tensors, so `load_state_dict` gets new tensors.
        built = plan.build(name, like=self.tree(), in_place=False, of_module=True)
        if built is not plan.MISSING:
            plan.after(lambda: self._module.load_state_dict(built, strict=False))


def _is_parameter(value: Any) -> bool:
    return isinstance(value, nn.Parameter)


class OptimizerPart(Part):
    """An optimizer. Parameters are named after their modules, so that their order does not matter."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._known: dict[int, str] = {}
        self._parameters: list[list[nn.Parameter]] = []
        self._names: list[list[str]] = []
        self._by_id: dict[int, str] = {}

    def name_by(self, names: Mapping[int, str]) -> None:
        """Sets the names of parameters. Parameters that no module has are numbered within their groups."""
        self._known = dict(names)
        self._parameters = []

    def _scan(self) -> None:
        parameters = [group["params"] for group in self._optimizer.param_groups]
        same = len(parameters) == len(self._parameters) and all(
            len(now) == len(seen) and all(map(is_, now, seen)) for now, seen in zip(parameters, self._parameters)
        )
        if not same:
            self._parameters = [list(group) for group in parameters]
            self._names = [
                [self._known.get(id(parameter), f"group{number}:{index}") for index, parameter in enumerate(group)]
                for number, group in enumerate(parameters)
            ]
            # Hashing a torch parameter calls Python, which would be most of the cost of `tree`.
            pairs = (zip(group, names) for group, names in zip(self._parameters, self._names))
            self._by_id = {id(parameter): name for pair in pairs for parameter, name in pair}

    def tree(self) -> dict[str, Any]:
        self._scan()
        known = self._by_id
        try:
            state = {known[id(parameter)]: entry for parameter, entry in self._optimizer.state.items() if entry}
        except KeyError:
            raise ValueError("an optimizer holds state of parameters that are in none of its groups") from None
        groups = [
            {key: value for key, value in group.items() if key != "params"} | {"params": names}
            for group, names in zip(self._optimizer.param_groups, self._names)
        ]
        return {"state": state, "param_groups": groups}

    def taken(self, copies: Copies) -> Any:
        tree = self.tree()
        # A scheduler writes a learning rate in place if it is a tensor.
        tree["param_groups"] = [
            {key: value if key == "params" else copies.of(value) for key, value in group.items()}
            for group in tree["param_groups"]
        ]
        return tree

    def plan(self, plan: Plan, name: str) -> None:
        now = self.tree()
        by_name = {
            name: parameter for group, names in zip(self._parameters, self._names) for parameter, name in zip(group, names)
        }
        groups = {key: number for number, names in enumerate(self._names) for key in names}
        saved = plan.build(f"{name}.param_groups", like=now["param_groups"], in_place=True)
        if saved is plan.MISSING:
            return
        matched = plan.matched_groups(name, [group["params"] for group in saved], self._names)

        def like(parameter: str, key: str) -> Any:
            """Returns the parameter on whose device new state lies. None for step counters that stay on the
            host."""
            owner, group = by_name[parameter], self._optimizer.param_groups[groups[parameter]]
            off_device = key == "step" and not (group.get("capturable") or group.get("fused"))
            return None if off_device else owner

        built = plan.build_state(f"{name}.state", now["state"], by_name, like)

        def put_back() -> None:
            for parameter, owner in by_name.items():
                if parameter in built:
                    self._optimizer.state[owner] = built[parameter]
            for group, number in zip(self._optimizer.param_groups, matched):
                group.update({key: value for key, value in saved[number].items() if key != "params"})

        plan.after(put_back)
