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
    """The name of the tier in futures, reports and errors. None: its root."""
    keep_last: int | None = None
    """How many of the newest steps the tier keeps. None: all."""
    keep_every: int | None = None
    """The tier also keeps every step that is a multiple of this number."""
    unpromoted: Literal["warn", "block"] = "warn"
    """What retention of the first tier does with a step that this tier does not have yet: delete it with a
    warning, or keep it."""

    def _given(self) -> dict[str, Any]:
        """Describes the tier in the form that the engine reads."""
        given = {"name": self.name, "keep_last": self.keep_last, "keep_every": self.keep_every}
        return {"root": os.fspath(self.root), "unpromoted": self.unpromoted, **given}


def given(tier: Tier | StrPath) -> dict[str, Any]:
    """Describes a tier, or the root of a tier, in the form that the engine reads."""
    return (tier if isinstance(tier, Tier) else Tier(tier))._given()


@dataclass(frozen=True)
class Promoted:
    """A step that is also durable in a tier."""

    tier: str
    """The name of the tier."""
    root: Path | str
    """The root of the tier."""
    step: int
    """The step."""
    attempt: str
    """The identity of the attempt, the same as in the first tier."""
    path: Path | str
    """The directory of the copy."""
    bytes: int
    """The total length of the files of the copy."""


def promoted(outcome: dict[str, Any]) -> Promoted:
    """Converts the engine's description of a promotion."""
    return Promoted(**{**outcome, "root": place(outcome["root"]), "path": place(outcome["path"])})


@dataclass(frozen=True)
class TierReport:
    """Reports which steps a tier has and lacks."""

    tier: str
    """The name of the tier."""
    root: Path | str
    """The root of the tier."""
    state: str
    """``ours``; ``away``: the tier does not answer at present; ``lost``: another session has taken over the
    tier."""
    newest: int | None
    """The newest step of the executor's root that is durable in the tier."""
    lacks: tuple[int, ...]
    """Steps of the first tier that this tier wants and does not have."""
    forks: tuple[int, ...]
    """Steps of which the tier has another attempt, made by a session that does not belong to this job."""
    error: str | None
    """Why the last promotion failed, if nothing was promoted since then."""
