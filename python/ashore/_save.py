"""The handle of a save."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from . import _ashore
from ._errors import make
from ._futures import PromotionFuture, SaveFuture
from ._place import place
from ._tiers import Promoted, promoted


@dataclass(frozen=True)
class Committed:
    """A durable step and its measurements. Times are seconds since the call of ``save``.

    >>> import ashore, numpy, tempfile
    >>> ashore.save(tempfile.mkdtemp(), 3, {"w": numpy.zeros(4, "float32")}, arena=8 << 20, chunk=1 << 20).bytes
    16
    """

    step: int
    """The step."""
    attempt: str
    """The identity of the attempt that was published."""
    path: Path | str
    """The directory of the step."""
    bytes: int
    """Bytes of tensors."""
    written_bytes: int
    """Bytes of tensor files that were written."""
    cloned_bytes: int
    """Bytes of tensor files that are clones of files of an older step."""
    linked_bytes: int
    """Bytes of tensor files that are files of an older step, under a second name."""
    blocked: float
    """How long ``save`` and fences blocked their callers for this save."""
    staged: float
    """When the last read of a tensor ended."""
    durable: float
    """When the step became durable."""
    tail: float
    """Time from the last byte written until the step was durable: fsyncs and the publish."""
    direct: bool
    """True if the bytes bypassed the page cache."""
    over_budget: int
    """How many small tensors the call did not capture, because the budget was used up."""


@dataclass(frozen=True)
class Progress:
    """The progress of a save."""

    phase: str
    """``waiting``, ``staging``, ``writing``, ``promised``, ``publishing`` or ``ended``."""
    bytes: int
    """Bytes of tensors to save."""
    staged: int
    """Bytes copied from the tensors so far, headers included."""
    written: int
    """Bytes written so far, headers included."""


def _committed(outcome: dict[str, Any] | None) -> Committed | None:
    if outcome is None:
        return None
    outcome["path"] = place(outcome["path"])
    return Committed(**outcome)


def _nothing(_: object) -> None:
    return None


class Save:
    """A save in progress. Dropping this object detaches the save, which goes on. The next ``save`` or
    ``shutdown`` then raises an error that was not yet seen.

    In asyncio, awaiting this object returns ``durable.result()``:

    >>> import asyncio, ashore, numpy, tempfile
    >>> async def main():
    ...     with ashore.CheckpointExecutor(tempfile.mkdtemp(), arena=8 << 20, chunk=1 << 20) as executor:
    ...         return await executor.save(1, {"w": numpy.ones(3)})
    >>> asyncio.run(main()).step
    1
    """

    __slots__ = ("__dict__", "__weakref__", "_handle")

    def __init__(self, handle: _ashore.Handle) -> None:
        self._handle = handle

    @property
    def step(self) -> int:
        """The step being saved."""
        return self._handle.step

    @cached_property
    def staged(self) -> Future[None]:
        """Done when the save will not read its tensors any more. The program may then write them, as after a
        fence."""
        return SaveFuture(self._handle, True, _nothing)

    @cached_property
    def durable(self) -> Future[Committed | None]:
        """Done when the step is durable. The result is None if the overlap policy did not begin the save."""
        return SaveFuture(self._handle, False, _committed)

    def durable_in(self, tier: str) -> Future[Promoted]:
        """Done when the step is also durable in the tier of this name; ``durable`` covers only the executor's
        own root.

        The future fails with the error of the save; with ``CancelledError`` if the tier does not want the
        step any more; with ``ConflictError`` if another session owns the tier; with ``DeadlineError`` if the
        executor was shut down before; with ``InvalidError`` for a tier that the executor of this process does
        not have. While a tier is away, the future waits.
        """
        return PromotionFuture(self._handle, self._handle.durable_in(tier), promoted)

    def wait(self, deadline: float | None = None) -> Committed | None:
        """Waits at most ``deadline`` seconds until the save has ended, without the GIL. Ctrl-C interrupts the
        wait.

        Raises the error of the save, or ``DeadlineError``. After ``DeadlineError`` the save goes on and can
        be waited for again.
        """
        ended, outcome = self._handle.wait(deadline)
        if not ended:
            raise make("deadline", f"the save has not ended waited={deadline} s", step=self.step)
        return _committed(outcome)

    def progress(self) -> Progress:
        """Returns the progress of the save."""
        return Progress(*self._handle.progress())

    def cancel(self) -> bool:
        """Cancels the save. Returns False when it is too late: the save has ended or is being published."""
        return self._handle.cancel()

    def __await__(self) -> Generator[Any, None, Committed | None]:
        return asyncio.wrap_future(self.durable).__await__()

    def __repr__(self) -> str:
        return f"<ashore.Save step={self.step} phase={self._handle.progress()[0]}>"
