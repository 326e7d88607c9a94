"""Checkpoints of torch programs: collects what to save, calls fences, restores. See docs/torch.md."""

from ._chain import apply_update, changed
from ._fence import Handle, fence_before
from ._restore import IncompatibleKeys
from ._rng import Rng, rng_state, set_rng_state
from ._state import State, restore, save, state

__all__ = [
    "Handle",
    "IncompatibleKeys",
    "Rng",
    "Stager",
    "State",
    "StorageReader",
    "StorageWriter",
    "apply_update",
    "changed",
    "fence_before",
    "restore",
    "rng_state",
    "save",
    "set_rng_state",
    "state",
]


def __getattr__(name: str) -> object:
    # Only programs that use torch.distributed.checkpoint import it.
    if name in ("Stager", "StorageReader", "StorageWriter"):
        from . import dcp

        return getattr(dcp, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
