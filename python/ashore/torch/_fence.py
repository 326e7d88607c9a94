"""Calls the fence before an optimizer writes."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import MutableMapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import _global_optimizer_pre_hooks, register_optimizer_step_pre_hook

from ashore import ClosedError


class Handle:
    """Removes the hooks of `fence_before`: by `remove()`, or at the end of a `with` block."""

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
    """Returns the torch optimizer inside a wrapper, such as accelerate's."""
    while not _has_hooks(optimizer) and hasattr(optimizer, "optimizer") and not isinstance(optimizer, LRScheduler):
        optimizer = optimizer.optimizer
    return optimizer


def _has_hooks(optimizer: Any) -> bool:
    # accelerate's wrapper is an `Optimizer` that never ran `Optimizer.__init__`.
    return "_optimizer_step_pre_hooks" in getattr(optimizer, "__dict__", {})


def is_capturing() -> bool:
    """True while a CUDA graph is captured in the current stream."""
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return initialized and torch.cuda.is_current_stream_capturing()


def fence_before(executor: Any, *optimizers: Any) -> Handle:
    """Calls `executor.fence()` before each step of these optimizers.

    Without optimizers, applies to all optimizers, including later ones.

    The optimizer's pre-hook calls the fence. So a save that was begun since the last step has read the
    parameters and the optimizer's state before the step writes them. A fence without a save costs less than 1
    us. A step that a GradScaler skips calls no hook, and writes nothing.

    The hook does not cover EMA weights and schedulers (call `save` after both), copies of an optimizer (hooks
    are not copied), and the replay of a CUDA graph. When a step is captured, the hook warns once; then call
    `executor.fence()` before `graph.replay()`. If a framework runs forward and backward within the step
    (Lightning, closures), the hook runs before them. That is correct, but the save does not overlap with
    them: use the framework's adapter.

    The hook holds the executor weakly. After the executor was dropped or shut down, the hook does nothing,
    and the next `fence_before` of the same optimizer removes it. In a forked child, the step raises
    ClosedError for the parent's executor. Raises TypeError for an object that is not an optimizer. An error
    of the fence is raised from `step`, before anything is written.
    """
    hook = _Hook(executor)
    inner = [unwrapped(optimizer) for optimizer in optimizers]
    for optimizer in inner:
        if not _has_hooks(optimizer):
            raise TypeError(f"fence_before takes optimizers of torch type={type(optimizer).__name__}")
    if not inner:
        _remove_ended(_global_optimizer_pre_hooks)
        return Handle([register_optimizer_step_pre_hook(hook)])
    for optimizer in inner:
        _remove_ended(optimizer._optimizer_step_pre_hooks)
    return Handle([optimizer.register_step_pre_hook(hook) for optimizer in inner])


class _Hook:
    """The hook that optimizers call before a step.

    The hook never removes itself, because torch iterates over the hooks while it is called. The end of the
    executor does not remove it either, because garbage collection may run within another hook.
    """

    def __init__(self, executor: Any) -> None:
        self._executor = weakref.ref(executor)
        self._warned = False
        self._shut_down = False

    def has_ended(self) -> bool:
        return self._shut_down or self._executor() is None

    def __call__(self, *_: Any) -> None:
        executor = self._executor()
        if executor is None or self._shut_down:
            return
        if not is_capturing():
            self._fence(executor)
        elif not self._warned:
            self._warned = True
            text = "an optimizer's step is captured in a CUDA graph: call executor.fence() before graph.replay()"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _fence(self, executor: Any) -> None:
        try:
            executor.fence()
        except ClosedError as closed:
            try:
                # Returns at once if the executor was already shut down; in a forked child it raises.
                executor.shutdown()
            except ClosedError:
                raise closed from None
            self._shut_down = True


def _remove_ended(hooks: MutableMapping[int, Any]) -> None:
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook) and hook.has_ended()]:
        del hooks[key]
