"""One function per command, arguments in, exit code out: each describes or writes a plan, or only reads a file."""

from __future__ import annotations

import errno
import os
from argparse import Namespace
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING

from . import words

if TYPE_CHECKING:
    from ..model import Model
    from ..plan import Plan

RANKED = ("router-norm", "aimer")


class Usage(Exception):
    """Options that do not go together: exit code 2."""


# --- commands that only read ---------------------------------------------------------------------------------------

def info(args: Namespace) -> int:
    from .info import describe, to_json
    from ..model import open as open_model

    # Not a context manager: closing hashes the header, for plans that outlive the model, and nothing here does.
    model = open_model(args.input)
    if args.json:
        words.print_json(to_json(model, args.full))
    else:
        words.show(describe(model))
        _warn(model.warnings)
    return 0


def verify(args: Namespace) -> int:
    from ..verify import verify as check

    report = check(args.file, args.against, data=not args.no_data)
    if args.json:
        words.print_json(report.to_json())
    elif not args.quiet:
        _warn(report.warnings)
        for problem in report.problems:
            words.show(f"problem: {problem}")
        words.show(report.summary())
    return 0 if report.good else 3


def demo(args: Namespace) -> int:
    from .demo import run

    return run(args)


# --- commands that make a plan --------------------------------------------------------------------------------------

def plan(args: Namespace) -> int:
    args.dry_run = True
    return _describe_or_write(args)


def prune(args: Namespace) -> int:
    if args.keep is None and args.ratio is None and args.by in (None, *RANKED):
        raise Usage("prune needs --keep N or --ratio R (or --by FILE.json with the experts to keep)")
    return _describe_or_write(args)


def quantize(args: Namespace) -> int:
    return _describe_or_write(args)


def edit(args: Namespace) -> int:
    return _describe_or_write(args)


def _describe_or_write(args: Namespace) -> int:
    from ..model import open as open_model
    from ..write import write

    if getattr(args, "keep", None) is not None and args.ratio is not None:
        raise Usage("--keep and --ratio exclude each other")
    if not args.dry_run and not args.force and os.path.lexists(args.output):  # before the weights are ranked
        raise FileExistsError(errno.EEXIST, "exists already; --force replaces it", args.output)
    limits = dict(memory=args.memory, threads=args.threads, io=args.io)
    quiet = getattr(args, "quiet", False)
    with open_model(args.input) as model:
        checked = make_plan(model, args).check(**limits)
        if args.dry_run:
            if args.json:
                words.print_json(checked.to_json(full=args.full))
            else:
                words.show(checked.summary())
            return 0
        if checked.blockers:
            for blocker in checked.blockers:
                words.say(f"error: {blocker}")
            return 4
        with _progress("writing", quiet) as progress:
            receipt = write(model, checked, args.output, overwrite=args.force, progress=progress, **limits)
    if args.json:
        words.print_json(receipt.to_json())
    elif not quiet:
        _warn(receipt.warnings)
        words.show(_receipt(receipt))
    return 0


def make_plan(model: Model, args: Namespace) -> Plan:
    """The plan that the options describe; a command lacks some of them. Ranking comes last: it may read the weights."""
    from ..plan import Plan

    given = vars(args)
    result = Plan(model)
    if given.get("remove"):
        result = result.remove_metadata(*args.remove)
    if given.get("set"):
        result = result.set_metadata_text(args.set)
    if given.get("type") is not None or given.get("override"):
        result = result.quantize("COPY" if args.type is None else args.type, overrides=args.override, pure=args.pure,
                                 allow_requantize=args.allow_requantize)
    elif given.get("pure"):
        raise Usage("--pure goes with --type")
    if any(given.get(option) is not None for option in ("keep", "ratio", "by")):
        from ..experts.rank import rank

        by = RANKED[0] if args.by is None else args.by
        if by == "aimer" and not args.dry_run:
            _refuse_early(model, result, args)
        with _progress("ranking", given.get("quiet", False)) as progress:
            ranking = rank(model, by=by, memory=args.memory, threads=args.threads, io=args.io, progress=progress)
        result = result.keep_experts(ranking.keep(args.keep, ratio=args.ratio), mtp=args.mtp)
    elif given.get("mtp") == "drop":
        raise Usage("--mtp drop goes with --keep or --ratio")
    return result


def _refuse_early(model: Model, plan: Plan, args: Namespace) -> None:
    """Raises what no choice of experts could change, before all their weights are read to choose."""
    from .info import experts
    from ..experts.rank import rank
    from ..write import first_blocker

    moe = experts(model)
    if moe is None or not isinstance(moe["count"], int):  # rank says what is wrong
        return
    alike = rank(model, by={"scores": {layer: [0] * moe["count"] for layer in moe["layers"]}})
    checked = plan.keep_experts(alike.keep(args.keep, ratio=args.ratio), mtp=args.mtp).check()
    if checked.blockers:
        raise first_blocker(checked)


def _progress(what: str, quiet: bool):
    if quiet:
        return nullcontext()
    from ..write import ProgressBar

    return closing(ProgressBar(what))


def _warn(warnings) -> None:
    for text in warnings:
        words.say(f"warning: {text}")


def _receipt(receipt) -> str:
    from ..units import human

    rate = receipt.bytes_read / receipt.seconds if receipt.seconds else 0
    done = ", ".join(f"{n} {action}" for action, n in sorted(receipt.actions.items()))
    return (f"{receipt.path}: {human(receipt.file_bytes)} in {receipt.seconds:.1f} s, reading {human(int(rate))}/s; "
            f"tensors: {done}")
