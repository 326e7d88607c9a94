"""Exceptions of the package: one class for each action that a program can take after an error."""

from __future__ import annotations

from typing import Any


class Error(Exception):
    """The base of all errors of this package.

    ``kind`` is one word that tells what the program can do about the error: ``"invalid"``, ``"not_found"``,
    ``"conflict"``, ``"busy"``, ``"no_space"``, ``"unavailable"``, ``"corrupt"``, ``"device"``,
    ``"cancelled"``, ``"deadline"``, ``"indeterminate"``, ``"closed"`` or ``"internal"``. ``tensor``, ``path``
    and ``step`` identify what the error concerns, where that is known.

    >>> import ashore, tempfile
    >>> try:
    ...     ashore.Catalog(tempfile.mkdtemp()).checkpoint(7)
    ... except ashore.Error as error:
    ...     print(error.kind, error.step)
    not_found 7
    """

    kind: str
    tensor: str | None
    path: str | None
    step: int | None

    def __init__(
        self,
        message: str,
        kind: str = "internal",
        tensor: str | None = None,
        path: str | None = None,
        step: int | None = None,
    ) -> None:
        super().__init__(message)
        self.kind, self.tensor, self.path, self.step = kind, tensor, path, step

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.kind, self.tensor, self.path, self.step)


class InvalidError(Error, ValueError):
    """The call is wrong: change the state, the setting or the target."""


class NotFoundError(Error, LookupError):
    """The step, tensor or value does not exist."""


class ConflictError(Error):
    """The step exists already, or another attempt at the step won."""


class BusyError(Error):
    """Too much is in flight; the same call can succeed later."""


class StorageError(Error, OSError):
    """The storage is full or failed, or the outcome of a publish is unknown. Older steps are intact."""


class DamagedError(Error, OSError):
    """The stored bytes differ from the bytes that were written."""


class DeviceError(Error, RuntimeError):
    """The GPU failed. Saves that were staged still commit."""


class CancelledError(Error):
    """The save was cancelled, or its executor was shut down before the save was done."""


class DeadlineError(Error, TimeoutError):
    """The deadline passed before the operation ended."""


class ClosedError(Error, RuntimeError):
    """The executor was shut down, or it belongs to the parent of this forked process."""


class InternalError(Error, RuntimeError):
    """A bug in this package."""


CLASSES: dict[str, type[Error]] = {
    "invalid": InvalidError,
    "not_found": NotFoundError,
    "conflict": ConflictError,
    "busy": BusyError,
    "no_space": StorageError,
    "unavailable": StorageError,
    "indeterminate": StorageError,
    "corrupt": DamagedError,
    "device": DeviceError,
    "cancelled": CancelledError,
    "deadline": DeadlineError,
    "closed": ClosedError,
    "internal": InternalError,
}

for _class in {Error, *CLASSES.values()}:
    _class.__module__ = "ashore"


def make(
    kind: str, message: str, tensor: str | None = None, path: str | None = None, step: int | None = None
) -> Error:
    """Makes the error of ``kind``."""
    return CLASSES[kind](message, kind, tensor, path, step)
