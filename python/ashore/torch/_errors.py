"""Errors of this package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ashore import Committed, InvalidError


def invalid(text: str, tensor: str | None = None, step: int | None = None) -> InvalidError:
    """The error of a call that is wrong; `tensor` and `step` are those concerned."""
    return InvalidError(text, "invalid", tensor, None, step)


@contextlib.contextmanager
def declining(executor: Any, step: int) -> Iterator[None]:
    """What goes wrong within it keeps this rank from a call of `save`: the other ranks learn that."""
    try:
        yield
    except BaseException as e:
        with contextlib.suppress(Exception):
            executor._decline(step, f"{type(e).__name__}: {e}")
        raise


def written(committed: Committed | None, step: int) -> Committed:
    """What a save has ended with. Raises where the overlap policy skipped the save, or a later one took its place.

    Frameworks take a checkpoint for durable when an adapter returns.
    """
    if committed is None:
        text = "the executor's overlap policy left out the save: give the executor overlap='block', or a number of saves"
        raise invalid(f"{text} step={step}", step=step)
    return committed
