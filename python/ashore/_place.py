"""Locations of steps: directories, and URLs of object stores."""

from __future__ import annotations

import os
from pathlib import Path


def is_url(place: str | os.PathLike[str]) -> bool:
    """True for a URL, such as ``s3://bucket/prefix``."""
    return "://" in os.fspath(place)


def absolute(place: str | os.PathLike[str]) -> str:
    """Makes the path of a directory absolute; returns a URL unchanged."""
    return os.fspath(place) if is_url(place) else os.path.abspath(place)


def place(text: str) -> Path | str:
    """Returns a directory as a ``Path``. A URL stays a string, because a ``Path`` would lose one of its
    slashes."""
    return text if is_url(text) else Path(text)
