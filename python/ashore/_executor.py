"""The executor, which saves states while the program goes on computing."""

from __future__ import annotations

import atexit
import json
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Union

from . import _ashore
from ._checkpoint import Catalog, Checkpoint
from ._errors import InvalidError, NotFoundError
from ._futures import notifier
from ._place import absolute, is_url, place
from ._save import Committed, Save
from ._tiers import Tier, TierReport, given

if TYPE_CHECKING:
    from .chain import Publish, Publisher

StrPath = Union[str, "os.PathLike[str]"]
When = Literal["save", "fence"]
Box = tuple[Sequence[int], Sequence[int]]

_MISSING: Mapping[str, Any] = {}
_SECONDS = ("abandoned_after", "save_timeout", "fence_timeout", "shutdown_timeout")
_OPEN: weakref.WeakSet[CheckpointExecutor] = weakref.WeakSet()


def _settings(settings: Mapping[str, Any]) -> str:
    """Encodes the settings as the JSON text that the engine reads."""
    encoded: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _SECONDS and isinstance(value, (int, float)):
            whole = int(value)
            value = {"secs": whole, "nanos": int((value - whole) * 1e9)}
        elif name == "overlap" and isinstance(value, int):
            value = {"queue": value}
        elif name == "on_unseen_error" and isinstance(value, str):
            value = value.replace("_", "")
        encoded[name] = value
    try:
        return json.dumps(encoded)
    except TypeError as error:
        raise InvalidError(f"a setting is not plain: {error} settings={settings!r}", "invalid") from None


class CheckpointExecutor:
    """Saves states under ``root`` while the program goes on computing. ``root`` is a directory, or a URL such
    as ``s3://bucket/prefix``.

    ``arena`` is the size in bytes of the host memory that states pass through; ``chunk`` is the size in bytes
    of one copy and one write. ``keep_last`` deletes older steps. ``device`` is ``"auto"``, ``"host"`` or
    ``"cuda:N"``. ``detect`` selects the saves that detect a forgotten fence.

    ``ranks`` is for one of several processes that save together: its rank, the number of processes, and its
    rank on this machine. All of them must see ``root``, where they meet. ``run`` is a text that is the same
    in all of these processes and in no others. ``alone`` is for a process that a launcher started with others
    and that saves by itself.

    ``tiers`` are roots behind this one, nearest first, each a :class:`Tier` or its path or URL. Durable steps
    are copied to the tiers, and ``latest`` finds the newest step of all roots.

    Other settings have the same names as in the engine: ``writers``, ``files``, ``direct``, ``overlap`` (how
    many saves may wait, or ``"block"``, ``"skip"``, ``"latest"``), ``keep_every``, ``capture_budget``,
    ``save_timeout`` and so on. Times are in seconds.

    >>> import ashore, numpy, tempfile
    >>> weights = numpy.zeros(1000, "float32")
    >>> with ashore.CheckpointExecutor(tempfile.mkdtemp(), arena=8 << 20, chunk=1 << 20) as executor:
    ...     for step in range(1, 4):
    ...         executor.fence()  # from here on no save reads the weights
    ...         weights += 1.0
    ...         save = executor.save(step, {"weights": weights, "lr": 0.1})  # returns at once
    ...     save.wait().step
    ...     executor.latest().value("lr")
    3
    0.1

    Leaving the ``with`` block waits for the saves in flight. The end of the interpreter waits for them, too.
    """

    def __init__(
        self,
        root: StrPath,
        *,
        arena: int = 256 << 20,
        chunk: int = 8 << 20,
        keep_last: int | None = None,
        device: str = "auto",
        detect: Literal["never", "first", "all"] = "first",
        alone: bool = False,
        ranks: tuple[int, int] | tuple[int, int, int] | None = None,
        run: str | None = None,
        tiers: Sequence[Tier | StrPath] = (),
        **settings: Any,
    ) -> None:
        if isinstance(tiers, (str, os.PathLike, Tier)):
            raise InvalidError(f"tiers are a list tiers={tiers!r}", "invalid")
        plain = {"arena": arena, "chunk": chunk, "keep_last": keep_last, "device": device, "detect": detect}
        behind = [given(tier) for tier in tiers]
        self._root = os.fspath(root)
        member = None if ranks is None else (ranks[0], ranks[1], ranks[-1] if len(ranks) == 3 else 0)
        self._alone = member is None
        self._core = _ashore.Executor(self._root, _settings({**plain, "tiers": behind, **settings}), alone, member, run)
        _OPEN.add(self)

    @property
    def root(self) -> Path | str:
        """The directory of the steps, or its URL."""
        return place(self._root)

    def save(
        self,
        step: int,
        state: Any,
        *,
        values: Mapping[str, Any] = _MISSING,
        rank_values: Mapping[str, Any] = _MISSING,
        metadata: Mapping[str, Any] = _MISSING,
        capture: Mapping[str, When] | When | None = None,
        frozen: Iterable[str] = (),
        overwrite: bool = False,
        name: str | None = None,
        directory: StrPath | None = None,
        deadline: float | None = None,
    ) -> Save:
        """Saves ``state`` as ``step`` and returns at once.

        ``state`` is a dict, list or tuple that contains others, tensors (of torch, NumPy, or any library with
        DLPack) and plain values. The name of each leaf is the path to it, joined by dots. Nothing may write
        the tensors until the next :meth:`fence` returns or ``Save.staged`` is done; the call copies small
        tensors in host memory. Nothing may resize their storages in that time, either.

        ``values`` are values in addition to those of the state. ``rank_values`` are values that each of
        several ranks saves for itself. ``metadata`` describes the checkpoint. ``capture`` selects, by the
        name of a tensor or of a container, when tensors are copied: in this call (``"save"``, within the
        setting ``capture_budget``) or by the fence. ``capture="save"`` waits until all tensors are copied.
        ``frozen`` names tensors, or containers of tensors, that are not expected to change. They get files of
        their own, which later steps share as long as the bytes stay the same.

        ``overwrite`` replaces a step. ``name`` is the name of the directory in the root. ``directory`` is a
        directory anywhere, which is not a step: no catalog lists it. The save fails if it is not durable
        after ``deadline`` seconds.

        Raises ``InvalidError``, naming the tensor, for what cannot be saved as it is; the error of an earlier
        save that was not yet raised; ``ConflictError`` while this step is being saved; ``BusyError``;
        ``ClosedError``.
        """
        named = (dict(values), dict(rank_values), dict(metadata))
        options = _options(overwrite, name, directory, deadline)
        return Save(self._core.save(step, state, named, capture, list(frozen), options))

    def _save_prepared(
        self,
        step: int,
        names: Sequence[str],
        tensors: Sequence[Any],
        *,
        boxes: Sequence[Box | None] | None = None,
        aliases: Mapping[str, str] = _MISSING,
        values: Mapping[str, Any] = _MISSING,
        rank_values: Mapping[str, Any] = _MISSING,
        metadata: Mapping[str, Any] = _MISSING,
        capture: Mapping[str, When] | When | None = None,
        overwrite: bool = False,
        name: str | None = None,
        directory: StrPath | None = None,
        deadline: float | None = None,
        keep: object = None,
        stream: int | None = None,
        immutable: bool = False,
    ) -> Save:
        """Saves tensors under names that an adapter chose, instead of a tree.

        ``boxes`` contains, for each tensor, None or the shape of the whole tensor and the index of the first
        element. A name may occur several times, with a box each. ``aliases`` maps more names to tensors in
        ``names``; tensors without a box that lie in the same memory become aliases automatically. ``keep`` is
        kept alive until the save is staged, as the owners of the memory are. ``stream`` is the number of the
        CUDA stream that wrote the tensors; None is the current stream of torch, and the legacy stream for
        other libraries. ``capture`` cannot be given for boxes.

        ``immutable`` promises that nothing writes the memory while its owner is kept alive. Packed tensors in
        host memory then need no fence, and none are captured. The other parameters are as in :meth:`save`.
        Adapters of this package call this method; it may change.
        """
        named = (dict(values), dict(rank_values), dict(metadata))
        options = _options(overwrite, name, directory, deadline)
        handle = self._core.save_prepared(
            step, names, tensors, boxes, dict(aliases), named, capture, options, keep, stream, immutable
        )
        return Save(handle)

    def publish_delta(self, publisher: Publisher, state: Any, *, values: Mapping[str, Any] = _MISSING) -> Publish:
        """Publishes ``state`` as the next version of ``publisher`` (:class:`ashore.chain.Publisher`). The
        publish uses this executor's arena and device, waits behind its saves, and needs its :meth:`fence`. It
        writes no step of this executor.

        Raises what :meth:`save` raises; ``InvalidError`` with several ranks; ``ConflictError`` once another publisher
        has taken the chain over.
        """
        from .chain import Publish

        return Publish(self._core.publish_delta(publisher._core, state, dict(values)))

    def _decline(self, step: int, why: str) -> None:
        """Tells the other ranks that this rank will not call :meth:`save` for ``step``. The save then fails
        on the other ranks. Otherwise they would wait for this rank, and count one call more than this rank
        does."""
        self._core.decline(step, why)

    def fence(self, streams: Iterable[Any] | None = None) -> None:
        """Returns when the program may write the tensors of all saves so far. Call it before the optimizer's
        step. It costs next to nothing when no save is reading.

        The program may write tensors on a GPU in ``streams`` (streams of torch, or pairs of device and
        handle), which wait on the GPU. The default is the current stream of each device that holds tensors of
        saves. Order other streams after one of these.
        """
        self._core.fence(None if streams is None else [_stream(stream) for stream in streams])

    def latest(self) -> Checkpoint | None:
        """The newest durable step, or None. With tiers, the newest step of all roots, from the nearest root
        that has it complete."""
        found = self._core.latest()
        return None if found is None else Checkpoint._of(found)

    def checkpoint(self, step: int) -> Checkpoint:
        """The checkpoint of ``step``. Raises ``NotFoundError`` rather than return another step."""
        return Checkpoint._of(self._core.checkpoint(step))

    def tiers(self) -> list[TierReport]:
        """Reports what each tier behind the root has and lacks. Empty if another rank promotes."""
        return [
            TierReport(tier, place(root), state, newest, tuple(lacks), tuple(forks), error)
            for tier, root, state, newest, lacks, forks, error in self._core.tiers()
        ]

    @property
    def catalog(self) -> Catalog:
        """All steps under the root."""
        return Catalog(self._root)

    def shutdown(self, deadline: float = 60.0) -> None:
        """Accepts no more saves, waits for the saves in flight and for copies to tiers, and releases memory
        and threads.

        Raises the error of a save that was not yet raised, or ``DeadlineError`` if saves had not ended: these
        saves have failed. May be called again.
        """
        self._core.shutdown(deadline)
        _OPEN.discard(self)

    def __enter__(self) -> CheckpointExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.shutdown()
        except Exception as late:
            if error is None:
                raise
            # The error of the block happened first.
            _ashore.unraisable(late, self)

    def __repr__(self) -> str:
        state = "open" if self._core.is_open() else "closed"
        return f"<ashore.CheckpointExecutor {self._root!r} {state}>"


def _options(
    overwrite: bool, name: str | None, directory: StrPath | None, deadline: float | None
) -> tuple[bool, str | None, str | None, float | None]:
    return overwrite, name, None if directory is None else absolute(directory), deadline


def _stream(stream: Any) -> tuple[int, int]:
    if isinstance(stream, tuple):
        return stream
    handle = getattr(stream, "cuda_stream", None)
    if handle is None:
        raise InvalidError(f"a stream is one of torch.cuda, or a pair of device and handle stream={stream!r}", "invalid")
    return stream.device_index, handle


def save(root: StrPath, step: int, state: Any, **settings: Any) -> Committed:
    """Saves ``state`` as ``step`` under ``root`` and waits until the step is durable. ``settings`` are the
    settings of :class:`CheckpointExecutor` and the options of its ``save``.

    >>> import ashore, numpy, tempfile
    >>> root = tempfile.mkdtemp()
    >>> str(ashore.save(root, 7, {"weights": numpy.arange(3.0)}).path).endswith("step-00000007")
    True
    >>> ashore.latest(root).tree()
    {'weights': array([0., 1., 2.])}
    """
    options = ("values", "metadata", "overwrite", "name", "directory", "deadline")
    chosen = {key: settings.pop(key) for key in options if key in settings}
    with CheckpointExecutor(root, detect="never", alone=True, **settings) as executor:
        committed = executor.save(step, state, **chosen).wait()
    if committed is None:
        raise InvalidError("the overlap policy did not begin the save", "invalid", step=step)
    return committed


def latest(root: StrPath) -> Checkpoint | None:
    """The newest durable step under ``root``, or None."""
    if not is_url(root) and not os.path.isdir(root):
        return None
    try:
        return Catalog(root).latest()
    except NotFoundError:
        return None


def _at_exit() -> None:
    for executor in list(_OPEN):
        try:
            executor.shutdown(300.0)
        except Exception as error:
            _ashore.unraisable(error, executor)
    notifier.stop()


def _in_child() -> None:
    # The executors belong to the parent.
    _OPEN.clear()


atexit.register(_at_exit)
os.register_at_fork(after_in_child=_in_child)
