"""Errors of this package."""

from __future__ import annotations

from ashore import Committed, InvalidError


def invalid(text: str, tensor: str | None = None, step: int | None = None) -> InvalidError:
    """The error of a call that is wrong; `tensor` and `step` are those concerned."""
    return InvalidError(text, "invalid", tensor, None, step)


def written(committed: Committed | None, step: int) -> Committed:
    """What a save has ended with. Raises where the overlap policy skipped the save, or a later one took its place.

    Frameworks take a checkpoint for durable when an adapter returns.
    """
    if committed is None:
        text = "the executor's overlap policy left out the save: give the executor overlap='block', or a number of saves"
        raise invalid(f"{text} step={step}", step=step)
    return committed
