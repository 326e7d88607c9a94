"""Published versions: weights that a training program hands to other programs, as fulls or as deltas.

A chain is a directory, or a URL of an object store, that holds versions. A version is a full, which is a
complete step, or a delta. See docs/deltas.md.

>>> import ashore.chain, numpy, tempfile
>>> root = tempfile.mkdtemp()
>>> weights = numpy.ones((10, 100), "float32")
>>> with ashore.chain.Publisher(root, arena=4 << 20) as publisher:
...     publisher.publish({"w": weights}).wait().kind
...     follow = ashore.chain.Follow(root)  # in another process
...     follow.advance()
...     weights[0, 7] = 1.5
...     publisher.publish({"w": weights}, values={"step": 20}).wait().changed
'full'
1
1
>>> follow.advance()
2
>>> float(follow.read("w")[0, 7])
1.5
"""

from __future__ import annotations

import asyncio
import atexit
import os
import weakref
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Union

from . import _ashore, _numpy
from ._errors import InvalidError, NotFoundError, make
from ._futures import SaveFuture
from ._place import absolute, place

if TYPE_CHECKING:
    import numpy

__all__ = ["Changed", "Follow", "Form", "Publish", "Published", "Publisher", "Switch", "Update", "Weights"]

StrPath = Union[str, "os.PathLike[str]"]

Form = Literal["packed", "indices", "zstd"]
"""How deltas are written. ``packed``: a gap and a difference in a byte each. ``indices``: indices and values,
about three times as long. ``zstd``: ``packed`` and compressed, for networks below about 1 GB/s."""

Switch = Literal["in_place", "double"]
"""How weights get from one version to the next. ``in_place``: in one copy, which nothing may read meanwhile.
``double``: in two copies; readers have the copy that is not written."""

_NONE: Mapping[str, Any] = {}
_OPEN: weakref.WeakSet[Publisher] = weakref.WeakSet()


@dataclass(frozen=True)
class Published:
    """A durable version."""

    version: int
    """The number of the version."""
    attempt: str
    """The identity of the attempt that was published."""
    kind: Literal["full", "delta"]
    """``full`` is a complete step, ``delta`` is what changed."""
    base: int | None
    """The version to which a delta applies."""
    changed: int | None
    """How many elements a delta changes. A tensor that is written whole counts with all its elements."""
    bytes: int
    """The length of its files."""
    full_bytes: int
    """The length of the files that a full of this version would have."""
    state: int
    """The digest of the version's state: names, dtypes, shapes and tensors."""
    path: Path | str
    """The directory of the version."""
    encoding: float
    """How long it took to find and encode the changes, in seconds; zero for a full."""


def _published(outcome: dict[str, Any]) -> Published:
    outcome["path"] = place(outcome["path"])
    return Published(**outcome)


def _nothing(_: object) -> None:
    return None


class Publish:
    """A publish in progress. Dropping this object detaches the publish, which goes on. Errors name the
    version as their step.

    In asyncio, awaiting this object returns ``durable.result()``.
    """

    __slots__ = ("__dict__", "__weakref__", "_handle")

    def __init__(self, handle: _ashore.Handle) -> None:
        self._handle = handle

    @property
    def version(self) -> int:
        """The number of the version."""
        return self._handle.step

    @cached_property
    def staged(self) -> Future[None]:
        """Done when the publish will not read its tensors any more. The program may then write them."""
        return SaveFuture(self._handle, True, _nothing)

    @cached_property
    def durable(self) -> Future[Published]:
        """Done when the version is durable."""
        return SaveFuture(self._handle, False, _published)

    def wait(self, deadline: float | None = None) -> Published:
        """Waits at most ``deadline`` seconds until the version is durable, without the GIL. Ctrl-C interrupts
        the wait.

        Raises the error of the publish, or ``DeadlineError``. After ``DeadlineError`` the publish goes on and
        can be waited for again. Raises ``CancelledError`` when the overlap policy of the program's executor
        skipped the version.
        """
        ended, outcome = self._handle.wait(deadline)
        if not ended or outcome is None:
            raise make("deadline", f"the publish has not ended waited={deadline} s", step=self.version)
        return _published(outcome)

    def __await__(self) -> Generator[Any, None, Published]:
        return asyncio.wrap_future(self.durable).__await__()

    def __repr__(self) -> str:
        return f"<ashore.chain.Publish version={self.version} phase={self._handle.progress()[0]}>"


class Publisher:
    """Publishes versions to the chain in ``root``, a directory or a URL.

    Only one publisher at a time writes a chain. If two publish the same number, the second one gets
    ``ConflictError`` and ends.

    The publisher keeps the newest version in host memory, and during a publish also the next version: twice
    the bytes of the weights. ``form`` is how deltas are written. Versions that the newest full has made
    unnecessary are kept until ``grace`` more versions exist. A full is written after at most ``full_every``
    deltas, and earlier when the deltas have half its length. With ``begin_with_full`` the publisher does not
    read the newest version at the start and publishes a full first. ``arena`` is the size in bytes of the
    host memory that tensors pass through.

    >>> import ashore.chain, tempfile, torch
    >>> root, model = tempfile.mkdtemp(), torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    >>> with ashore.chain.Publisher(root, arena=4 << 20) as publisher:
    ...     publish = publisher.publish(model.state_dict(), values={"step": 10})  # returns at once
    ...     publish.staged.result()  # now the weights may be written
    ...     publish.wait().version
    1

    Leaving the ``with`` block waits for the publishes in flight. The end of the interpreter waits for them,
    too.
    """

    def __init__(
        self,
        root: StrPath,
        *,
        form: Form = "packed",
        grace: int = 8,
        full_every: int = 64,
        begin_with_full: bool = False,
        arena: int = 64 << 20,
    ) -> None:
        self._root = absolute(root)
        self._core = _ashore.Publisher(self._root, form, grace, full_every, begin_with_full, arena)
        _OPEN.add(self)

    @property
    def newest(self) -> int | None:
        """The newest version that is known to be durable, or None."""
        return self._core.newest()

    def publish(self, state: Any, *, values: Mapping[str, Any] = _NONE) -> Publish:
        """Publishes ``state`` as the next version and returns at once. Nothing may write its tensors until
        ``Publish.staged`` is done.

        ``state`` is a dict, list or tuple, as
        :meth:`CheckpointExecutor.save <ashore.CheckpointExecutor.save>` takes it, for example
        ``module.state_dict()``. ``values`` are additional plain values for followers, such as the number of
        the training step.

        A failed publish loses nothing: the next version is a delta to the newest durable version, or a full.

        Raises ``InvalidError``, naming the tensor; ``BusyError``; ``ConflictError`` after another publisher
        has taken over the chain; ``ClosedError``.
        """
        return Publish(self._core.publish(state, dict(values)))

    def prune(self) -> list[str]:
        """Removes versions that no follower needs, and returns their names. Each publish does this, too."""
        return self._core.prune()

    def close(self) -> None:
        """Waits for publishes in flight, and releases memory and threads. May be called again."""
        self._core.close()
        _OPEN.discard(self)

    def __enter__(self) -> Publisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ashore.chain.Publisher {self._root!r} {'open' if self._core.is_open() else 'closed'}>"


class Changed:
    """The change that an update makes to one tensor."""

    __slots__ = ("_core",)

    def __init__(self, core: _ashore.Change) -> None:
        self._core = core

    @property
    def name(self) -> str:
        """The name of the tensor."""
        return self._core.name

    @property
    def dtype(self) -> str:
        """The safetensors name of the tensor's dtype."""
        return self._core.dtype[0]

    @property
    def is_whole(self) -> bool:
        """True if all elements are given, in row-major order, without indices."""
        return self._core.count is None

    def arrays(self) -> tuple[numpy.ndarray[Any, Any] | None, numpy.ndarray[Any, Any]]:
        """Returns 64-bit indices into the flattened tensor, in ascending order (None: all elements), and the
        values at these indices, in the tensor's dtype. :func:`ashore.torch.changed` returns them as torch
        tensors."""
        count, (stored, name) = self._core.count, self._core.dtype
        indices = None if count is None else _numpy.empty((count,), "int64", "I64", self.name)
        values = _numpy.empty((0,), name, stored, self.name)
        values.resize(self._core.bytes // values.itemsize, refcheck=False)
        self._core.fill(indices, values)
        return indices, values

    def __repr__(self) -> str:
        return f"<ashore.chain.Changed {self.name!r} elements={'all' if self.is_whole else self._core.count}>"


class Update:
    """A version that was read, checked and made durable, but not yet applied."""

    __slots__ = ("_core", "_follow")

    def __init__(self, core: _ashore.Update, follow: Follow) -> None:
        self._core, self._follow = core, follow

    @property
    def version(self) -> int:
        """The version of the weights after this update is applied."""
        return self._core.version

    @property
    def is_full(self) -> bool:
        """True if the update is a full, which is read whole; False for a delta to the current weights."""
        return self._core.is_full

    @property
    def bytes(self) -> int:
        """The length of its files."""
        return self._core.bytes

    def values(self) -> dict[str, Any]:
        """The values that were published with the version."""
        return self._core.values()

    def changes(self) -> list[Changed]:
        """The changes of a delta to the follower's weights, tensor by tensor. Empty for a full.

        They are for memory that this package does not write, such as ``index_copy_`` on a GPU. Call this
        before :meth:`Follow.apply`.
        """
        return [Changed(core) for core in self._follow._core.changes(self._core)]

    def __repr__(self) -> str:
        what = "full" if self.is_full else "delta"
        return f"<ashore.chain.Update version={self.version} {what} bytes={self.bytes}>"


class _Bytes:
    """The bytes of one tensor of a version, described by NumPy's array interface."""

    def __init__(self, core: _ashore.Weights, name: str) -> None:
        self._core = core
        address, length = core.memory(name)
        self.__array_interface__ = {"data": (address, True), "shape": (length,), "typestr": "|u1", "version": 3}


class Weights(Mapping[str, Any]):
    """A version in memory: a mapping from names to read-only NumPy arrays, which copy nothing.

    The version does not change while this object or one of its arrays is kept.

    >>> import ashore.chain, numpy, tempfile
    >>> root = tempfile.mkdtemp()
    >>> with ashore.chain.Publisher(root, arena=4 << 20) as publisher:
    ...     _ = publisher.publish({"w": numpy.arange(4.0)}).wait()
    >>> follow = ashore.chain.Follow(root, switch="double")
    >>> follow.advance(), follow.weights().version, follow.weights()["w"]
    (1, 1, array([0., 1., 2., 3.]))
    """

    __slots__ = ("_core", "_infos")

    def __init__(self, core: _ashore.Weights) -> None:
        self._core = core
        self._infos = {info[0]: info for info in core.tensors()}

    @property
    def version(self) -> int | None:
        """The number of the version; None before the first."""
        return self._core.version

    def __getitem__(self, name: str) -> numpy.ndarray[Any, Any]:
        import numpy

        if name not in self._infos:
            raise NotFoundError(f"the version has no such tensor tensor={name!r}", "not_found", name, None, self.version)
        _, stored, dtype, shape, _ = self._infos[name]
        if dtype is None:
            text = f"NumPy has no such dtype: read the tensor with torch tensor={name!r} dtype={stored}"
            raise InvalidError(text, "invalid", name)
        found: numpy.ndarray[Any, Any] = numpy.asarray(_Bytes(self._core, name)).view(_numpy.dtype(dtype)).reshape(shape)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    def __repr__(self) -> str:
        return f"<ashore.chain.Weights version={self.version} tensors={len(self)}>"


class Follow:
    """Follows the chain in ``root``, a directory or a URL, and updates weights in host memory to each
    version.

    ``targets`` maps names in the chain to the arrays and tensors that are updated in place, such as
    ``module.state_dict()`` of a module on the CPU. They must be packed and writable, with the published
    dtypes and shapes. Names of tied weights must be tied in the chain, too. Their memory must not be resized,
    and nothing else may write it. With ``strict``, a version that also has other tensors is refused. Without
    targets the follower has memory of its own: :meth:`read` and :meth:`read_into` copy from it, and with
    ``switch="double"`` :meth:`weights` gives other threads the newest version without a copy.

    ``copy_to`` is a directory for a chain of the follower's own. Each version is durable there before the
    weights are updated to it, and a restart begins from that chain. The follower lists the root every
    ``poll_every`` seconds, and earlier after an event of the file system. ``confirm=False`` updates the
    weights without making the version durable where it was published; this is for mounts on which files
    cannot be fsynced.

    Whenever a call has returned, memory holds a published version, bit for bit. Each update is checked before
    the first write. Only one thread at a time may use a follower, and another gets ``BusyError``. Any thread
    may use :meth:`weights` and :attr:`version`.

    >>> import ashore.chain, tempfile, torch
    >>> root, trained = tempfile.mkdtemp(), torch.nn.Linear(8, 8)
    >>> with ashore.chain.Publisher(root, arena=4 << 20) as publisher:
    ...     _ = publisher.publish(trained.state_dict()).wait()
    >>> served = torch.nn.Linear(8, 8)
    >>> follow = ashore.chain.Follow(root, targets=served.state_dict())
    >>> follow.advance()
    1
    >>> torch.equal(served.weight, trained.weight)
    True
    """

    def __init__(
        self,
        root: StrPath,
        *,
        switch: Switch = "in_place",
        targets: Mapping[str, Any] | None = None,
        strict: bool = True,
        copy_to: StrPath | None = None,
        poll_every: float = 0.2,
        confirm: bool = True,
    ) -> None:
        if switch not in ("in_place", "double"):
            raise InvalidError(f"a switch is in_place or double switch={switch!r}", "invalid")
        self._root = absolute(root)
        # The version that an adapter has copied to its own tensors.
        self._copied: int | None = None
        given = None if targets is None else list(targets.items())
        into = None if copy_to is None else absolute(copy_to)
        self._core = _ashore.Follow(self._root, switch == "double", given, strict, into, poll_every, confirm)

    @property
    def version(self) -> int | None:
        """The version of the weights. None before the first version, and after a full that could not be read
        in place."""
        return self._core.version

    def advance(self, deadline: float | None = None) -> int | None:
        """Waits at most ``deadline`` seconds for a newer version, and applies all updates up to the newest.
        Returns the version of the weights, or None when there was no newer version.

        Raises what :meth:`next` and :meth:`apply` raise. Versions before the version that failed stay
        applied.
        """
        update, version = self.next(deadline), None
        while update is not None:
            version = self.apply(update)
            update = self.next(0.0)
        return version

    def next(self, deadline: float | None = None) -> Update | None:
        """Waits at most ``deadline`` seconds for a newer version; reads, checks and makes durable the next
        update.

        Of the updates that lead to the newest version it takes the first of the sequence with the fewest
        bytes to read. It waits without the GIL; Ctrl-C interrupts it. It does not write the weights.

        Raises ``InvalidError`` when a version was made for other weights, ``DamagedError`` when a version is
        not what was written, ``StorageError``. Each names version, path and tensor. A later call tries again.
        """
        core = self._core.next(deadline)
        return None if core is None else Update(core, self)

    def apply(self, update: Update) -> int:
        """Applies an update, and returns the version of the weights. Ctrl-C does not interrupt it.

        Raises ``InvalidError`` when the weights are at another version than the update was read for. If
        reading a full in place fails, the weights are unusable until the next full. A delta was checked
        before.
        """
        return self._core.apply(update._core)

    def names(self) -> list[str]:
        """The names of the tensors of the version, sorted."""
        return [name for name, *_ in self._core.tensors()]

    def read(self, name: str) -> numpy.ndarray[Any, Any]:
        """A copy of the tensor ``name``."""
        infos = {info[0]: info for info in self._core.tensors()}
        if name not in infos:
            raise NotFoundError(f"the version has no such tensor tensor={name!r}", "not_found", name, None, self.version)
        _, stored, dtype, shape, _ = infos[name]
        array = _numpy.empty(tuple(shape), dtype, stored, name)
        self.read_into({name: array})
        return array

    def read_into(self, targets: Mapping[str, Any]) -> None:
        """Copies tensors of the version to arrays and tensors in packed host memory that have the same dtypes
        and shapes."""
        self._core.read_into(list(targets.items()))

    def weights(self) -> Weights:
        """The current version of the weights, with ``switch="double"``. Any thread may call this at any time;
        it never waits for an update."""
        shown = self._core.shown()
        if shown is None:
            raise InvalidError("a follower of one copy has no weights beside it: give switch='double'", "invalid")
        return Weights(shown)

    def verify(self) -> None:
        """Reads all bytes of the weights and compares them with the digests of the version. Raises
        ``DamagedError``, naming the first tensor that differs from what was published."""
        self._core.verify()

    def __repr__(self) -> str:
        return f"<ashore.chain.Follow {self._root!r} version={self.version}>"


def _at_exit() -> None:
    for publisher in list(_OPEN):
        try:
            publisher.close()
        except Exception as error:
            _ashore.unraisable(error, publisher)


def _in_child() -> None:
    # The publishers belong to the parent.
    _OPEN.clear()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_in_child)
