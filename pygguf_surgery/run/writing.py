"""Run a checked plan: the engine writes the file, this reports progress and hands back a Receipt."""

from __future__ import annotations

import copy
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .._core import run as run_jobs
from ..base.progress import as_progress
from ..edits.split import shard_paths
from ..files.companions import Companions
from ..files.model import Model
from ..gate.checked import CheckedPlan

if TYPE_CHECKING:
    from ..base.progress import ProgressLike


@dataclass(frozen=True)
class Receipt:
    """What a run did. path: the file, or the first shard; paths: all files. actions: how many tensors were copied,
    taken, encoded, ... quality: of `measure`, how far the result is from the source, as docs/schema/compare says."""

    path: str
    paths: list[str]
    file_bytes: int  # of all files
    seconds: float
    buffer_bytes: int  # the most that the run's buffers held
    bytes_read: int
    elements_encoded: int
    threads: int
    actions: dict[str, int]
    warnings: list[str]
    notes: list[str]
    quality: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def write(
    model: Model,
    checked: CheckedPlan,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: ProgressLike = False,
    companions: Companions | None = None,
) -> Receipt:
    """Writes the file at `path` (of a split plan the shards that it names), whole or not at all, within the limits that
    the plan was checked for. Raises the first blocker. companions: where the plan's files are open still.

    progress: True shows a bar on stderr, a callable gets (done_bytes, total_bytes); what it raises cancels the run, as
    Ctrl-C does, and leaves nothing behind.
    """
    if checked.blockers:
        raise first_blocker(checked)
    paths = output_paths(checked, path)
    start = time.monotonic()
    with (
        Companions() if companions is None else nullcontext(companions) as opened,
        as_progress(progress, os.path.basename(paths[0])) as report,
    ):
        stats = run_jobs(
            [*model.sources, *map(opened.source, checked.companions)],
            [(name, file.header, file.file_bytes) for name, file in zip(paths, checked.files, strict=True)],
            checked.jobs,
            memory=checked.limits.memory,
            threads=checked.limits.threads,
            io=checked.limits.io,
            overwrite=overwrite,
            progress=report,
        )
    return Receipt(
        path=paths[0],
        paths=paths,
        file_bytes=checked.file_bytes,
        seconds=time.monotonic() - start,
        buffer_bytes=stats["buffer_bytes"],
        bytes_read=stats["bytes_read"],
        elements_encoded=stats["elements_encoded"],
        threads=stats["threads"],
        actions=checked.actions(),
        warnings=list(checked.warnings),
        notes=list(checked.notes),
    )


def output_paths(checked: CheckedPlan, path: str | os.PathLike[str]) -> list[str]:
    """The files that a plan writes: `path`, or its shards PATH-00001-of-00003.gguf."""
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
