"""The states of the random number generators of Python, NumPy, torch and CUDA devices."""

from __future__ import annotations

import contextlib
import random
import sys
from typing import Any

import torch

from ._numpy import is_array


def rng_state(devices: bool = True) -> dict[str, Any]:
    """Returns the states of the global generators of Python, NumPy (if it is imported) and torch.

    With `devices`, also returns the state of every CUDA device, if CUDA is in use. `set_rng_state` restores
    the states.

    >>> state = rng_state()
    >>> a = torch.rand(3)
    >>> set_rng_state(state)
    >>> torch.equal(a, torch.rand(3))
    True
    """
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if (numpy := sys.modules.get("numpy")) is not None:
        state["numpy"] = numpy.random.get_state(legacy=False)
    if devices and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = list(torch.cuda.get_rng_state_all())
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Sets the generators that `state` names. `state` is a result of `rng_state`.

    Generators that this process lacks (CUDA devices beyond its own, NumPy if it is not installed) are
    skipped. Generators that `state` lacks continue unchanged.
    """
    random.setstate(state["python"])
    torch.set_rng_state(torch.as_tensor(state["torch"]))
    if "numpy" in state:
        with contextlib.suppress(ImportError):
            _set_numpy(state["numpy"])
    if "cuda" in state:
        devices = [torch.as_tensor(device) for device in state["cuda"]]
        torch.cuda.set_rng_state_all(devices[: torch.cuda.device_count()])


def _set_numpy(state: dict[str, Any]) -> None:
    import numpy

    key = numpy.asarray(state["state"]["key"])
    numpy.random.set_state({**state, "state": {**state["state"], "key": key}})


def plain(tree: Any) -> Any:
    """Returns the states of generators with the bytes of tensors and arrays in their place."""
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(plain, tree))
    if isinstance(tree, torch.Tensor):
        return tree.numpy().tobytes()
    return tree.tobytes() if is_array(tree) else tree


def of_plain(state: dict[str, Any]) -> dict[str, Any]:
    """Reverses `plain`."""

    def tensor(data: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)

    made = {**state, "torch": tensor(state["torch"])}
    if "cuda" in state:
        made["cuda"] = list(map(tensor, state["cuda"]))
    if "numpy" in state:
        import numpy

        key = numpy.frombuffer(state["numpy"]["state"]["key"], dtype=numpy.uint32)
        made["numpy"] = {**state["numpy"], "state": {**state["numpy"]["state"], "key": key}}
    return made


class Rng:
    """The global generators as an object of a `State`: `state(model=model, rng=Rng())`.

    A step may have been saved with more or fewer generators than exist at its restore. Only generators that
    both have are set.
    """

    def __init__(self, devices: bool = True) -> None:
        self._devices = devices

    def state_dict(self) -> dict[str, Any]:
        return rng_state(self._devices)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_rng_state(state)
