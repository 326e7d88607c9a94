"""Calls the fence before an optimizer writes."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook


class Handle:
    """What `fence_before` returns: `remove()` ends it, and so does the end of a `with` block."""

    def __init__(self, hooks: list[Any]) -> None:
        self._hooks = hooks

    def remove(self) -> None:
        hooks, self._hooks = self._hooks, []
        for hook in hooks:
            hook.remove()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def unwrapped(optimizer: Any) -> Any:
    """The optimizer of torch within accelerate's and others' wrappers."""
    while not _has_hooks(optimizer) and hasattr(optimizer, "optimizer") and not isinstance(optimizer, LRScheduler):
        optimizer = optimizer.optimizer
    return optimizer


def _has_hooks(optimizer: Any) -> bool:
    # accelerate's wrapper is an `Optimizer` that never ran `Optimizer.__init__`.
    return "_optimizer_step_pre_hooks" in getattr(optimizer, "__dict__", {})


def is_capturing() -> bool:
    """Whether a CUDA graph is captured in the current stream."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


def fence_before(executor: Any, *optimizers: Any) -> Handle:
    """Calls `executor.fence()` before each step of these optimizers, or of all, later ones too, if none is given.

    The fence is called in the optimizer's pre-hook, so a save that was begun since the last step has read the
    parameters and the optimizer's state when the step writes them. A fence without a save costs less than 1
    us. A step that a GradScaler skips calls no hook, and writes nothing.

    What the hook does not see: EMA weights and schedulers (call `save` after both), a copy of an optimizer
    (hooks are not copied), and the replay of a CUDA graph. When a step is captured the hook says so once:
    then call `executor.fence()` before `graph.replay()`. Where a framework runs forward and backward within
    the step (Lightning, closures) the hook fires before them, which is right and hides nothing: use its
    adapter.

    The executor is held weakly, and the hook removes itself once it is gone. Raises TypeError for what is not
    an optimizer. An error of the fence is raised from `step`, before anything is written.
    """
    held = weakref.ref(executor)
    warned = False

    def hook(*_: Any) -> None:
        nonlocal warned
        alive = held()
        if alive is None:
            handle.remove()
        elif is_capturing():
            if not warned:
                warned = True
                text = "an optimizer's step is captured in a CUDA graph: call executor.fence() before graph.replay()"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
        else:
            alive.fence()

    inner = [unwrapped(optimizer) for optimizer in optimizers]
    for optimizer in inner:
        if not _has_hooks(optimizer):
            raise TypeError(f"fence_before takes optimizers of torch type={type(optimizer).__name__}")
    if inner:
        handle = Handle([optimizer.register_step_pre_hook(hook) for optimizer in inner])
    else:
        handle = Handle([register_optimizer_step_pre_hook(hook)])
    return handle
