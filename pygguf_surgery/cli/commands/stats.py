"""`gguf-surgery calibrate`, `repair` and `stats show | merge`: arguments in, exit code out."""

from __future__ import annotations

import os
from argparse import Namespace

from ...files.outputs import check_output
from .. import words

# fmt: off
# As in cli/imatrix.py.
OPTIONS = {
    "--force": dict(action="store_true", help="replace an existing output"),
    "--json": dict(action="store_true", help="print the machine form"),
}
# fmt: on
# fmt: off
COMMANDS = {
    "show": ("what calibration has seen", ("STATS",), ("--json",)),
    "merge": ("add statistics of one model over several texts", ("OUT", "STATS..."), ("--force",)),
}
# fmt: on
# fmt: off
POSITIONALS = {
    "STATS": ("input", "statistics of calibrate", None),
    "STATS...": ("inputs", "statistics of calibrate", "+"),
    "OUT": ("output", "the statistics to write", None),
}
# fmt: on


def calibrate(args: Namespace) -> int:
    from ...studies.calibration import calibrate as run
    from ..common import INTERRUPTED, Usage, progress

    path, *texts = args.arguments
    if not texts:
        raise Usage("calibrate needs a TEXT")
    quiet = args.quiet
    before = _identity(args.output)
    try:
        with progress("calibrating", quiet, "windows") as bar:
            stats = run(
                path,
                texts,
                args.output,
                n_ctx=args.ctx,
                chunks=args.chunks,
                merge_stats=args.merge_stats,
                parse_special=args.parse_special,
                threads=args.threads,
                gpu_layers=args.gpu_layers,
                overwrite=args.force,
                progress=bar,
            )
    except KeyboardInterrupt:
        if _identity(args.output) in (None, before):
            raise
        words.say(f"interrupted; the same command without --force goes on from what {args.output} has")
        return INTERRUPTED
    if args.json:
        words.print_json(stats.to_json())
    elif not quiet:
        words.show(stats.summary())
    return 0


def _identity(path: str) -> tuple[int, int] | None:
    """Another one after each write: files are replaced, not changed."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def repair(args: Namespace) -> int:
    from ...files.open import open_model
    from ...files.repair import open_repair
    from ...studies.metrics import METRICS
    from ...studies.repairs import repair as run
    from ..common import Usage, choose, progress

    path, *texts = args.arguments
    if not texts:
        raise Usage("repair needs a TEXT")
    if args.keep is None and args.ratio is None and args.by in (None, *METRICS):
        raise Usage("repair needs --keep N or --ratio R (or --by FILE.json with the experts to keep)")
    check_output([path, *texts, args.stats], args.output, args.force)
    with open_model(path) as model:
        keep = choose(model, args)
        with progress("repairing", args.quiet, "windows") as bar:
            errors = run(
                model,
                keep,
                texts,
                args.output,
                run=args.run,
                n_ctx=args.ctx,
                chunks=args.chunks,
                parse_special=args.parse_special,
                memory=args.memory,
                threads=args.threads,
                gpu_layers=args.gpu_layers,
                overwrite=args.force,
                progress=bar,
            )
    if args.json:
        words.print_json({"layers": {str(layer): {"before": a, "after": b} for layer, (a, b) in errors.items()}})
    elif not args.quiet:
        opened = open_repair(args.output)
        words.show(opened.summary())
        opened.close()
    return 0


def show(args: Namespace) -> int:
    from ...files.stats import open_stats

    stats = open_stats(args.input)
    if args.json:
        words.print_json(stats.to_json())
    else:
        words.show(stats.summary())
    return 0


def merge(args: Namespace) -> int:
    from ...files.stats import open_stats

    check_output(args.inputs, args.output, args.force)
    first, *others = (open_stats(path) for path in args.inputs)
    first.merge(*others).write(args.output, overwrite=args.force)
    return 0
