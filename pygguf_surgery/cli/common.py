"""What the commands share."""

from __future__ import annotations

import errno
import os
from argparse import Namespace
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING

from . import words

if TYPE_CHECKING:
    from ..files.model import Model
    from ..plan_data.choices import Keep

# Exit codes, that a script may rely on; 0 is done.
FAILED, USAGE, BAD_INPUT, CANNOT, INTERRUPTED = 1, 2, 3, 4, 130
DEFAULT_METRIC = "router-norm"


class Usage(Exception):
    """Options that do not go together: exit code 2."""


def choose(model: Model, args: Namespace) -> Keep:
    """The experts that --by, --keep and their companions name."""
    from ..studies.scoring import rank

    with progress("ranking", args.quiet if "quiet" in args else False) as bar:
        ranking = rank(
            model,
            by=DEFAULT_METRIC if args.by is None else args.by,
            stats=args.stats,
            imatrix=args.imatrix,
            mtp=args.mtp,
            memory=args.memory,
            threads=args.threads,
            io=args.io,
            progress=bar,
        )
    return ranking.keep(
        args.keep, ratio=args.ratio, super_experts=args.super_experts, budget=getattr(args, "budget", "layer")
    )


def refuse_existing(paths: list[str]) -> None:
    for path in paths:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "exists already; --force replaces it", path)


def write_beside(path: str, data: bytes, force: bool) -> None:
    """A small file, whole or not at all."""
    from .._core import Sink

    with Sink(path, len(data), overwrite=force) as sink:
        sink.write_at(0, data)


def progress(what: str, quiet: bool, unit: str | None = None):
    if quiet:
        return nullcontext()
    from ..base.progress import ProgressBar

    return closing(ProgressBar(what, unit=unit))


def warn(warnings) -> None:
    for text in warnings:
        words.say(f"warning: {text}")
