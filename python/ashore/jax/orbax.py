"""A handler that makes ``orbax.checkpoint.CheckpointManager`` save and restore with ashore.

>>> import ashore, ashore.jax.orbax, jax.numpy as jnp, orbax.checkpoint as ocp, tempfile
>>> executor = ashore.CheckpointExecutor(tempfile.mkdtemp(), arena=8 << 20, chunk=1 << 20)
>>> handler = ashore.jax.orbax.CheckpointHandler(executor)
>>> state = {"w": jnp.arange(3.0)}
>>> with ocp.CheckpointManager(tempfile.mkdtemp(), item_handlers=handler) as manager:
...     saving = manager.save(1, args=ashore.jax.orbax.SaveArgs(state))
...     manager.wait_until_finished()
...     manager.restore(1, args=ashore.jax.orbax.RestoreArgs(state))["w"].tolist()
[0.0, 1.0, 2.0]
>>> executor.shutdown()

Orbax chooses the directories. The executor saves into a directory ``ashore`` below each of them, and the
executor's root stays empty. Orbax renames a directory when all of its items are saved, and does not sync that
rename. When ``wait_until_finished`` has returned, the files are on the disk. Whether the name of the step
survives a loss of power depends on Orbax; a killed process loses nothing. Steps of :func:`ashore.jax.save` do
not have this gap.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp  # type: ignore[import-untyped]

from .._checkpoint import Checkpoint
from .._errors import InvalidError, make
from .._executor import CheckpointExecutor
from .._save import Save
from ._restore import restore, shapes
from ._save import save

__all__ = ["CheckpointHandler", "RestoreArgs", "SaveArgs"]


def _step(name: str) -> int:
    """Returns the step that a manager's directory is named after, such as `7.orbax-checkpoint-tmp`. Orbax
    does not pass the step."""
    found = re.fullmatch(r"(?:.*_)?(\d+)(?:\.orbax-checkpoint-tmp.*)?", name)
    return int(found[1]) if found else 0


_NAME = "ashore"
"""The name of the checkpoint in a directory of Orbax. Orbax may write files of its own beside the
checkpoint."""

_CREATION = 60.0
"""How many seconds Orbax may take to make a directory."""


class _Future:
    """The future for which Orbax waits before it renames a directory."""

    def __init__(self, save: Save) -> None:
        self._save = save

    def result(self, timeout: float | None = None) -> None:
        if self._save.wait(timeout) is None:
            text = "the overlap policy of the executor did not begin the save: Orbax needs overlap='block'"
            raise InvalidError(text, "invalid", step=self._save.step)

    def cancel(self) -> bool:
        return self._save.cancel()


class CheckpointHandler(ocp.AsyncCheckpointHandler):  # type: ignore[misc]
    """Saves pytrees with ``executor``, which belongs to the program. Shut it down after closing the manager.

    Give the handler to a ``CheckpointManager`` as ``item_handlers``, or in a dict for several items. The
    program may donate the arrays right after ``manager.save``. See :func:`ashore.jax.save`, also for the
    errors.
    """

    def __init__(self, executor: CheckpointExecutor) -> None:
        self._executor = executor

    async def async_save(self, directory: Any, args: SaveArgs) -> list[_Future]:
        """Begins a save into ``directory`` after Orbax has created it."""
        directory = Path(directory)
        # Orbax creates the directory in another thread, and fails if it exists by then.
        late = time.monotonic() + _CREATION
        while not directory.is_dir():
            if time.monotonic() > late:
                raise make("deadline", f"Orbax has not made the directory waited={_CREATION} s", path=str(directory))
            await asyncio.sleep(0.001)
        return [_Future(self._begin(directory, args))]

    def save(self, directory: Any, args: SaveArgs) -> None:
        """Saves into ``directory`` and waits. Called by ``ocp.Checkpointer``, which is not asynchronous."""
        _Future(self._begin(Path(directory), args)).result()

    def _begin(self, directory: Path, args: SaveArgs) -> Save:
        step = _step(directory.parent.name) if args.step is None else args.step
        return save(self._executor, step, args.item, directory=directory / _NAME)

    def restore(self, directory: Any, args: RestoreArgs | None = None) -> Any:
        """Restores what ``args.item`` describes, or everything in its saved form."""
        args = args or RestoreArgs()
        return restore(Checkpoint(Path(directory) / _NAME), args.item, strict=args.strict)

    def metadata(self, directory: Any) -> Any:
        """Returns the shapes and dtypes of the arrays, and the values."""
        return shapes(Checkpoint(Path(directory) / _NAME))

    def finalize(self, directory: Any) -> None:
        """Does nothing, because the save has ended when its future is done."""

    def close(self) -> None:
        """Does nothing, because the executor belongs to the program."""


@ocp.args.register_with_handler(CheckpointHandler, for_save=True)
@dataclass
class SaveArgs(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """The arguments of a save."""

    item: Any
    """The pytree."""
    step: int | None = None
    """The step number in the checkpoint. None: the number in the manager's directory name, or 0."""


@ocp.args.register_with_handler(CheckpointHandler, for_restore=True)
@dataclass
class RestoreArgs(ocp.args.CheckpointArgs):  # type: ignore[misc]
    """The arguments of a restore."""

    item: Any = None
    """The target of :func:`ashore.jax.restore`. None: everything in its saved form, with NumPy arrays."""
    strict: bool = True
    """True: it is an error if the checkpoint contains more than the target."""
