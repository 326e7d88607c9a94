"""Helpers for errors of this package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ashore import Committed, InvalidError


def invalid(text: str, tensor: str | None = None, step: int | None = None) -> InvalidError:
    """Makes the error of a wrong call. `tensor` and `step` identify what it concerns."""
    return InvalidError(text, "invalid", tensor, None, step)


@contextlib.contextmanager
def declining(executor: Any, step: int) -> Iterator[None]:
    """Tells the other ranks if an error in the block keeps this rank from calling `save`."""
    try:
        yield
    except BaseException as e:
        with contextlib.suppress(Exception):
            executor._decline(step, f"{type(e).__name__}: {e}")
        raise


def written(committed: Committed | None, step: int) -> Committed:
    """Returns the outcome of a save. Raises if the overlap policy skipped the save or replaced it by a later
    one.

    Frameworks assume that a checkpoint is durable when an adapter returns.
    """
    if committed is None:
        text = "the executor's overlap policy left out the save: give the executor overlap='block', or a number of saves"
        raise invalid(f"{text} step={step}", step=step)
    return committed
