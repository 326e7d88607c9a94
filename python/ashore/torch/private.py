"""torch's private interface for the executor of asynchronous saves.

torch may change this interface in any version. `TRIED` lists the versions that were tried; other versions are
refused.
"""

from __future__ import annotations

import concurrent.futures
import os
from typing import Any

import torch
import torch.distributed as dist

import ashore

from . import dcp
from ._errors import invalid, written

TRIED = ("2.11",)

try:
    from torch.distributed.checkpoint import state_dict_saver as _saver
    from torch.distributed.checkpoint._async_executor import _AsyncCheckpointExecutor
except ImportError as e:
    tried = ", ".join(TRIED)
    raise ImportError(f"torch has no _AsyncCheckpointExecutor: tried were {tried} torch={torch.__version__}") from e


class Executor(_AsyncCheckpointExecutor):
    """Runs DCP's asynchronous saves with an executor of ashore, without DCP's planner and without a thread.

    `Executor(executor).execute_save(state, checkpoint_id="step-5")` begins the save in the call and returns a
    future of DCP's metadata, which resolves when the step is durable. The program may write the state after
    the next fence of the executor. Planners are not used. Process groups of several ranks are refused: use
    `dcp.async_save` with `ashore.torch.StorageWriter`.
    """

    def __init__(self, executor: Any) -> None:
        self._executor = executor

    def execute_save(
        self,
        staging_future_or_state_dict: Any,
        *,
        checkpoint_id: str | os.PathLike[str] | None = None,
        storage_writer: Any = None,
        planner: Any = None,
        process_group: Any = None,
        no_dist: bool = False,
        use_collectives: bool = True,
    ) -> concurrent.futures.Future[Any]:
        if storage_writer is not None and not isinstance(storage_writer, dcp.StorageWriter):
            raise invalid(f"the executor writes its own steps: give no other writer {type(storage_writer).__name__}")
        if planner is not None:
            raise invalid("the executor asks no planner: use dcp.async_save with ashore.torch.StorageWriter")
        if _has_several_ranks(process_group, no_dist):
            raise invalid("the executor saves for one rank: use dcp.async_save with ashore.torch.StorageWriter")
        step = dcp.step_of(checkpoint_id)
        if step is None and storage_writer is not None:
            step = storage_writer._step
        if step is None:
            raise invalid("a save needs a checkpoint_id that ends in the number of its step")
        done: concurrent.futures.Future[Any] = concurrent.futures.Future()
        if isinstance(staging_future_or_state_dict, concurrent.futures.Future):
            staging_future_or_state_dict.add_done_callback(lambda staged: self._begin(step, staged.result, done))
        else:
            self._begin(step, lambda: staging_future_or_state_dict, done, raises=True)
        return done

    def _begin(self, step: int, state: Any, done: concurrent.futures.Future[Any], raises: bool = False) -> None:
        try:
            begun = dcp._Begun.take(self._executor, step)
            save, _ = begun or dcp.begin(self._executor, step, state())
        except BaseException as e:
            if raises:
                raise
            done.set_exception(e)
            return
        save.durable.add_done_callback(lambda durable: self._end(step, durable, done))

    def _end(self, step: int, durable: concurrent.futures.Future[Any], done: concurrent.futures.Future[Any]) -> None:
        try:
            committed = written(durable.result(), step)
            done.set_result(dcp.metadata(ashore.Checkpoint(committed.path)))
        except BaseException as e:
            done.set_exception(e)


def _has_several_ranks(process_group: Any, no_dist: bool) -> bool:
    within = not no_dist and dist.is_available() and dist.is_initialized()
    return within and dist.get_world_size(process_group) > 1


# The class that torch constructs for saves in a thread.
_CLASS = "_ThreadBasedAsyncCheckpointExecutor"


class Installed:
    """The handle that `install` returns: `remove()` undoes the installation."""

    def __init__(self, before: Any) -> None:
        self._before = before

    def remove(self) -> None:
        setattr(_saver, _CLASS, self._before)


def install(executor: Any) -> Installed:
    """Makes `dcp.async_save` use `Executor` for saves whose `storage_writer` is `ashore.torch.StorageWriter`.

    Other saves, and saves of several ranks, run as before. Raises ImportError for a version of torch that was
    not tried.
    """
    if not torch.__version__.startswith(tuple(version + "." for version in TRIED)):
        raise ImportError(f"ashore.torch.private was tried with torch {', '.join(TRIED)} torch={torch.__version__}")
    before = getattr(_saver, _CLASS)

    class Chooses(_AsyncCheckpointExecutor):
        def execute_save(  # type: ignore[override]
            self, staged: Any, *, storage_writer: Any = None, **options: Any
        ) -> concurrent.futures.Future[Any]:
            one_rank = not _has_several_ranks(options.get("process_group"), options.get("no_dist", False))
            ours = isinstance(storage_writer, dcp.StorageWriter) and options.get("planner") is None and one_rank
            chosen = Executor(executor) if ours else before()
            done: concurrent.futures.Future[Any] = chosen.execute_save(staged, storage_writer=storage_writer, **options)
            return done

    setattr(_saver, _CLASS, Chooses)
    return Installed(before)
