"""Errors of this package."""

from __future__ import annotations

from ashore import InvalidError


def invalid(text: str, tensor: str | None = None) -> InvalidError:
    """The error of a call that is wrong; `tensor` is the one concerned."""
    return InvalidError(text, "invalid", tensor)
