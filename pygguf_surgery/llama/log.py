"""What llama.cpp says while sessions are open: kept for error messages, printed nowhere."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from typing import Any

_MOST = 2000  # pieces of lines


class _Log:
    """llama.cpp has one log for the whole process. It is taken with the first session and given back, to whoever had it
    before, with the last. A session hears its own thread, and threads that are nobody's, such as those of ggml."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._heard: dict[int, deque[str]] = {}  # by thread; replaced, never changed
        self._callback: Any = None  # lives as long as the process: a thread may still be in it
        self._previous: Any = None

    def open(self, llama: Any) -> deque[str]:
        """What the calling thread will hear, the last pieces of it."""
        with self._lock:
            if not self._heard:
                self._previous = llama.llama_log_callback(), ctypes.c_void_p()
                llama.llama_log_get(*(ctypes.byref(x) for x in self._previous))
                self._callback = self._callback or llama.llama_log_callback(self._said)
                llama.llama_log_set(self._callback, None)
            mine: deque[str] = deque(maxlen=_MOST)
            self._heard = {**self._heard, threading.get_ident(): mine}
        return mine

    def close(self, llama: Any) -> None:
        """Called by the thread that called `open`."""
        with self._lock:
            self._heard = {thread: heard for thread, heard in self._heard.items() if thread != threading.get_ident()}
            if not self._heard:
                llama.llama_log_set(*self._previous)

    def _said(self, _level: int, text: bytes, _data: object) -> None:
        heard, mine = self._heard, self._heard.get(threading.get_ident())
        for pieces in heard.values() if mine is None else (mine,):
            pieces.append(text.decode(errors="replace"))


LOG = _Log()
