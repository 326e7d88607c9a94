"""Futures of saves, and the notifier thread that completes them.

Threads of the engine never run Python. They put numbers into a queue; the notifier thread takes the numbers
from the queue and completes the futures. The notifier thread starts when a program first waits for a future
by other means than ``result()``.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from . import _ashore
from ._errors import make

T = TypeVar("T")


class _Notifier:
    """The notifier thread, and the futures that it completes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens = itertools.count(1)
        self._waiting: dict[int, SaveFuture[Any]] = {}
        self._thread: threading.Thread | None = None

    def watch(self, future: SaveFuture[Any]) -> None:
        with self._lock:
            token = next(self._tokens)
            self._waiting[token] = future
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ashore-notifier", daemon=True)
                self._thread.start()
        future._watch(token)

    def _run(self) -> None:
        while tokens := _ashore.notify_next():
            for token in tokens:
                with self._lock:
                    future = self._waiting.pop(token, None)
                if future is not None:
                    future._settle()

    def stop(self) -> None:
        """Ends the thread, because it must not wait in Rust when the interpreter ends."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            _ashore.notify_stop()
            thread.join()

    def forget(self) -> None:
        """Starts anew in a forked child, where the thread does not exist."""
        _ashore.notify_forget()
        self.__init__()  # type: ignore[misc]


notifier = _Notifier()
os.register_at_fork(after_in_child=notifier.forget)


class SaveFuture(Future[T], Generic[T]):
    """A future of a save. ``result()`` waits in the engine; in all other cases the notifier completes the
    future."""

    _done_callbacks: list[Callable[[Future[T]], object]]

    def __init__(self, handle: _ashore.Handle, staged: bool, convert: Callable[[Any], T]) -> None:
        self._handle, self._staged, self._convert = handle, staged, convert
        self._watched = False
        self._arm = threading.Lock()
        super().__init__()
        # The future is RUNNING from the beginning, so a task that is cancelled does not cancel the save.
        self._state = "RUNNING"

    # `concurrent.futures.wait` and `as_completed` read the condition and the list of waiters and call no
    # method. So an access to the condition means that the caller wants to be notified.
    @property
    def _condition(self) -> threading.Condition:
        if not self._watched:
            with self._arm:
                watched, self._watched = self._watched, True
            if not watched:
                notifier.watch(self)
        return self._plain_condition

    @_condition.setter
    def _condition(self, condition: threading.Condition) -> None:
        self._plain_condition = condition

    def _watch(self, token: int) -> None:
        self._handle.watch(token, self._staged)

    def _outcome(self, timeout: float | None) -> Any:
        if self._staged:
            return (True, None) if self._handle.wait_staged(timeout) else (False, None)
        return self._handle.wait(timeout)

    def _settle(self) -> None:
        """Completes the future, in the notifier thread."""
        try:
            ended, outcome = self._outcome(0.0)
            if not ended:
                raise make("internal", "the engine reported the end of a save that has not ended")
            result = self._convert(outcome)
        except BaseException as error:
            self.set_exception(error)
        else:
            self.set_result(result)

    def result(self, timeout: float | None = None) -> T:
        ended, outcome = self._outcome(timeout)
        if not ended:
            raise make("deadline", f"the save {self._unlike()} waited={timeout} s", step=self._handle.step)
        return self._convert(outcome)

    def _unlike(self) -> str:
        return "is not staged" if self._staged else "has not ended"

    def exception(self, timeout: float | None = None) -> BaseException | None:
        try:
            self.result(timeout)
        except Exception as error:
            if getattr(error, "kind", None) == "deadline" and not self.done():
                raise
            return error
        return None

    def done(self) -> bool:
        """True if ``result()`` returns at once. Calling this does not count as seeing an error of the
        save."""
        return self._handle.is_done(self._staged)

    def running(self) -> bool:
        return not self.done()

    def cancel(self) -> bool:
        """Returns False: only ``Save.cancel`` cancels a save."""
        return False

    def cancelled(self) -> bool:
        return False

    def _invoke_callbacks(self) -> None:
        for callback in self._done_callbacks:
            self._call(callback)

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Calls ``fn`` with this future in the notifier thread when it is done, or at once if it is done
        already. An exception in ``fn`` goes to ``sys.unraisablehook``."""
        with self._condition:
            if self._state == "RUNNING":
                self._done_callbacks.append(fn)
                return
        self._call(fn)

    def _call(self, fn: Callable[[Future[T]], object]) -> None:
        try:
            fn(self)
        except BaseException as error:
            _ashore.unraisable(error, fn)

    # The base class's method reads the condition, and so would register the future with the notifier.
    def __repr__(self) -> str:
        return f"<ashore.SaveFuture of={self._of()} step={self._handle.step} phase={self._handle.progress()[0]}>"

    def _of(self) -> str:
        return "staged" if self._staged else "durable"


class PromotionFuture(SaveFuture[T]):
    """A future that is done when the step is durable in a tier."""

    def __init__(self, handle: _ashore.Handle, promotion: _ashore.Promotion, convert: Callable[[Any], T]) -> None:
        self._promotion = promotion
        super().__init__(handle, False, convert)

    def _watch(self, token: int) -> None:
        self._promotion.watch(token)

    def _outcome(self, timeout: float | None) -> Any:
        return self._promotion.wait(timeout)

    def _unlike(self) -> str:
        return "is not durable in the tier"

    def done(self) -> bool:
        return self._promotion.is_done()

    def _of(self) -> str:
        return "promoted"
