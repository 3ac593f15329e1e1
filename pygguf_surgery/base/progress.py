"""How far a long operation is."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from .errors import BadPlan
from .units import duration, human

Progress = Callable[[int, int], object]  # called with what is done and what there is in all
ProgressLike = bool | Progress | None  # True: a bar on stderr


@contextmanager
def as_progress(progress: ProgressLike, label: str, unit: str | None = None) -> Iterator[Progress | None]:
    """What a long operation calls, or None where nobody wants to know. For True that is a ProgressBar with this label
    and unit, whose line ends with the operation, whatever the reason."""
    if progress is True:
        bar = ProgressBar(label, unit=unit)
        try:
            yield bar
        finally:
            bar.close()
        return
    if progress is not None and progress is not False and not callable(progress):
        raise BadPlan(
            "not a progress", object="progress", found=repr(progress)[:80], expected="True, or a function(done, total)"
        )
    yield progress or None


class ProgressBar:
    """Bytes (or `unit`, what else is counted), rate and remaining time: a bar that redraws itself on a terminal,
    elsewhere one line per 10 s."""

    def __init__(self, label: str, stream: TextIO | None = None, unit: str | None = None):
        self._label = label
        self._unit = unit
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty()
        self._start = self._last = time.monotonic()
        self._width = 0

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < (0.1 if self._terminal else 10) and not (self._terminal and done == total):
            return
        self._last = now
        rate = done / max(now - self._start, 1e-9)
        left = duration((total - done) / rate) if done else "?"
        text = f"{human(done)} of {human(total)}, {human(int(rate))}/s, {left} left"
        if self._unit is not None:
            text = f"{done} of {total} {self._unit}, {left} left"
        if not self._terminal:
            print(f"{self._label}: {text}", file=self._stream, flush=True)
            return
        room = self._columns() - 1  # a line that fills the terminal may wrap
        length = max(0, min(24, room - len(self._label) - len(text) - 4))
        filled = int(length * done / total) if total else length
        line = f"{self._label} [{'#' * filled}{'.' * (length - filled)}] " if length else ""
        line = (line + text)[:room]
        self._stream.write("\r" + line.ljust(min(self._width, room)))
        self._stream.flush()
        self._width = len(line)

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def close(self) -> None:
        """Ends the bar's line."""
        if self._width:
            self._stream.write("\n")
            self._stream.flush()
            self._width = 0
