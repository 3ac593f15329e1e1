"""A thread that llama.cpp runs in, for a caller that may be interrupted at any moment."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar, cast

from .._core import StopFlag

Result = TypeVar("Result")
_LOOK = 0.02  # seconds between two looks for signals that interrupted nothing


class Stopped(BaseException):
    """In the worker's thread: the caller was interrupted, and what it waits for must end."""


class Worker:
    """Runs functions in one thread of its own, while the caller waits.

    Python runs the handlers of signals in the main thread, between any two of its instructions. What such a handler
    raises in a callback of ctypes is printed and lost, and llama.cpp runs on with numbers that are no more whole. So no
    callback runs in the caller's thread: it only waits, Ctrl-C interrupts the wait, `stop` tells llama.cpp, and the
    exception goes on to the caller once the function has come to its end. From then on nothing runs but what must.
    """

    def __init__(self) -> None:
        self.stop = StopFlag()
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="llama.cpp", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], Result], *, always: bool = False) -> Result:
        """What the function returns or raises. always: even after a stop, such as what gives memory back."""
        task = _Task(function, always)
        try:
            self._tasks.put(task)
            task.wait()
        except BaseException:  # Ctrl-C, or whatever the handler of a signal raises
            self.stop.set()
            self._settle()
            raise
        if task.error is not None:
            try:
                raise task.error
            finally:
                del task  # the error's frames hold this one
        return cast(Result, task.result)

    def close(self) -> None:
        """Ends the thread, after what it has begun."""
        self._tasks.put(None)
        self._thread.join()

    def _settle(self) -> None:
        """Waits until the thread has nothing to do; a second Ctrl-C does not hurry it, the first is on its way."""
        while True:
            try:
                last = _Task(lambda: None, always=True)
                self._tasks.put(last)
                last.wait()
                return
            except BaseException:
                continue

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                if self.stop.is_set() and not task.always:
                    raise Stopped
                task.result = task.function()
            except BaseException as error:
                task.error = error
            task.ended.release()
            del task  # and what it holds


class _Task:
    def __init__(self, function: Callable[[], Any], always: bool):
        self.function, self.always = function, always
        self.result: Any = None
        self.error: BaseException | None = None
        self.ended = threading.Lock()
        self.ended.acquire()

    def wait(self) -> None:
        # A signal that comes between Python's look for signals and the wait does not interrupt that: hence the timeout.
        while not self.ended.acquire(timeout=_LOOK):
            pass
