"""Tiers: roots behind the executor's own, to which durable steps are copied."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

from ._place import place

StrPath = Union[str, "os.PathLike[str]"]


@dataclass(frozen=True)
class Tier:
    """A root behind the executor's own: a directory of a shared file system, or the URL of an object store.

    >>> import ashore, numpy, tempfile
    >>> fast, shared = tempfile.mkdtemp(), tempfile.mkdtemp()
    >>> tiers = [ashore.Tier(shared, name="shared", keep_last=20)]
    >>> with ashore.CheckpointExecutor(fast, arena=8 << 20, chunk=1 << 20, keep_last=2, tiers=tiers) as executor:
    ...     save = executor.save(1, {"w": numpy.ones(3)})
    ...     near = save.wait()
    ...     far = save.durable_in("shared").result()
    >>> near.attempt == far.attempt, str(far.path) == shared + "/step-00000001"
    (True, True)
    """

    root: StrPath
    name: str | None = None
    """What futures, reports and errors call it; None: its root."""
    keep_last: int | None = None
    """How many of the newest steps it keeps; None: all."""
    keep_every: int | None = None
    """It also keeps every step that is a multiple of this."""
    unpromoted: Literal["warn", "block"] = "warn"
    """What retention of the first tier does with a step that this one does not have yet: deletes it with a warning, or
    keeps it."""

    def _given(self) -> dict[str, Any]:
        """The tier as the engine reads it."""
        given = {"name": self.name, "keep_last": self.keep_last, "keep_every": self.keep_every}
        return {"root": os.fspath(self.root), "unpromoted": self.unpromoted, **given}


def given(tier: Tier | StrPath) -> dict[str, Any]:
    """A tier, or the root of one, as the engine reads it."""
    return (tier if isinstance(tier, Tier) else Tier(tier))._given()


@dataclass(frozen=True)
class Promoted:
    """A step that is durable in a tier, too."""

    tier: str
    """The name of the tier."""
    root: Path | str
    """Its root."""
    step: int
    """The step."""
    attempt: str
    """The identity of the attempt, the same as in the first tier."""
    path: Path | str
    """The directory of the copy."""
    bytes: int
    """The length of its files."""


def promoted(outcome: dict[str, Any]) -> Promoted:
    """What the engine says of a promotion."""
    return Promoted(**{**outcome, "root": place(outcome["root"]), "path": place(outcome["path"])})


@dataclass(frozen=True)
class TierReport:
    """What a tier has and lacks."""

    tier: str
    """The name of the tier."""
    root: Path | str
    """Its root."""
    state: str
    """``ours``; ``away``: it does not answer at present; ``lost``: another session has taken it over."""
    newest: int | None
    """The newest step of this root that is durable in it."""
    lacks: tuple[int, ...]
    """Steps of the first tier that it wants and does not have."""
    forks: tuple[int, ...]
    """Steps of which it has another attempt, of a session that is not of this job's."""
    error: str | None
    """Why the last promotion failed, if nothing was promoted since."""
