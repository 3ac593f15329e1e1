"""Run a checked plan: the engine writes the file, this reports progress and hands back a Receipt."""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from . import _core
from .check import CheckedPlan, build_jobs
from .model import Model
from .units import MEMORY, duration, human, parse_memory

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Receipt:
    """What a run did. path: the file, or the first shard; paths: all files. actions: how many tensors were copied,
    taken, encoded, ..."""

    path: str
    paths: list[str]
    file_bytes: int        # of all files
    seconds: float
    buffer_bytes: int      # the most that the run's buffers held
    bytes_read: int
    elements_encoded: int
    threads: int
    actions: dict[str, int]
    warnings: list[str]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def write(model: Model, checked: CheckedPlan, path: str | os.PathLike[str], *, overwrite: bool = False,
          memory: int | str = MEMORY, threads: int = 0, io: str = "auto",
          progress: bool | Progress | None = False) -> Receipt:
    """Writes the file at `path` (of a split plan the shards that it names), whole or not at all. Raises the first
    blocker.

    progress: True shows a bar on stderr, a callable gets (done_bytes, total_bytes); what it raises cancels the run, as
    Ctrl-C does, and leaves nothing behind.
    """
    if checked.blockers:
        raise first_blocker(checked)
    paths = output_paths(checked, path)
    start = time.monotonic()
    bar = ProgressBar(os.path.basename(paths[0])) if progress is True else None
    sources = [*model.sources, *checked.extra_sources()]
    try:
        stats = _core.run(
            sources, [(name, file.header, file.file_bytes) for name, file in zip(paths, checked.files)],
            build_jobs(model, checked), memory=parse_memory(memory), threads=threads, io=io, overwrite=overwrite,
            progress=bar or progress or None)
    finally:
        if bar is not None:
            bar.close()
    return Receipt(
        path=paths[0], paths=paths, file_bytes=checked.file_bytes, seconds=time.monotonic() - start,
        buffer_bytes=stats["buffer_bytes"], bytes_read=stats["bytes_read"],
        elements_encoded=stats["elements_encoded"], threads=stats["threads"], actions=checked.actions(),
        warnings=list(checked.warnings), notes=list(checked.notes))


def output_paths(checked: CheckedPlan, path: str | os.PathLike[str]) -> list[str]:
    """The files that a plan writes: `path`, or its shards PATH-00001-of-00003.gguf."""
    from .shards import shard_paths

    path = os.fsdecode(path)
    return shard_paths(path, len(checked.files)) if checked.split else [path]


def first_blocker(checked: CheckedPlan) -> Exception:
    """The first blocker; its hint counts the others."""
    error = copy.copy(checked.blockers[0])
    more = len(checked.blockers) - 1
    if more:
        error.hint = f"{error.hint}; " if error.hint else ""
        error.hint += f"{more} more: see check().summary()"
    return error


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
