"""What the commands share."""

from __future__ import annotations

import errno
import os
from argparse import Namespace
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from . import words
from .options import DEFAULT_METRIC
from .signals import Terminated, code_of

if TYPE_CHECKING:
    from ..files.model import Model
    from ..plan_data.choices import Keep

# Exit codes, that a script may rely on; 0 is done.
FAILED, USAGE, BAD_INPUT, CANNOT = 1, 2, 3, 4  # and those of a signal


class Usage(Exception):
    """Options that do not go together: exit code 2."""


def stopped(stop: KeyboardInterrupt, what: str) -> int:
    """Says what a command that was stopped leaves behind; its exit code."""
    words.say(f"{'terminated' if isinstance(stop, Terminated) else 'interrupted'}; {what}")
    return code_of(stop)


def is_quiet(args: Namespace) -> bool:
    """False for a command without --quiet."""
    return bool(getattr(args, "quiet", False))


def limits(args: Namespace) -> dict[str, Any]:
    """What bounds a run, as the library takes it."""
    return {"memory": args.memory, "threads": args.threads, "io": args.io}


def needs_number(args: Namespace) -> bool:
    """Whether --by is not a file that says which experts to keep, and neither --keep nor --ratio how many."""
    from ..studies.metrics import METRICS

    return args.keep is None and args.ratio is None and args.by in (None, *METRICS)


def choose(model: Model, args: Namespace) -> Keep:
    """The experts that --by, --keep and their companions name."""
    from ..studies.scoring import rank

    ranking = rank(
        model,
        by=DEFAULT_METRIC if args.by is None else args.by,
        stats=args.stats,
        imatrix=args.imatrix,
        mtp=args.mtp,
        progress=not is_quiet(args),
        **limits(args),
    )
    return ranking.keep(
        args.keep, ratio=args.ratio, super_experts=args.super_experts, budget=getattr(args, "budget", "layer")
    )


def refuse_existing(paths: Iterable[str]) -> None:
    for path in paths:
        if os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, "exists already; --force replaces it", path)


def write_beside(path: str, data: bytes, force: bool) -> None:
    """A small file, whole or not at all."""
    from .._core import Sink

    with Sink(path, len(data), overwrite=force) as sink:
        sink.write_at(0, data)


def warn(warnings: Iterable[str]) -> None:
    for text in warnings:
        words.say(f"warning: {text}")
