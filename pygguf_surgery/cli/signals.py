"""What the command line makes of signals."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """SIGTERM: stops what runs as Ctrl-C does."""


def code_of(stop: KeyboardInterrupt) -> int:
    return 143 if isinstance(stop, Terminated) else 130


@contextmanager
def raising_terminated() -> Iterator[None]:
    """Makes SIGTERM an exception, where nobody else has something in mind for it."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(_number: int, _frame: object) -> NoReturn:
    raise Terminated
