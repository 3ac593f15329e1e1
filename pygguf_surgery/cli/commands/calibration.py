"""`gguf-surgery calibrate` and `repair`: what needs llama.cpp."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from ...base.units import MEMORY_OF_TEXTS
from ...files.outputs import check_output
from .. import words
from ..command import Command, Options, Positional
from ..common import Usage, choose, needs_number, stopped
from ..options import CHOICE, FORCE, IMATRIX, IO, JSON, MEMORY, MTP, QUIET, THREADS


def calibrate(args: Namespace) -> int:
    from ...files.stats import windows_done
    from ...studies.calibration import calibrate

    path, *texts = args.arguments
    if not texts:
        raise Usage("calibrate needs a TEXT")
    before = _identity(args.output)
    try:
        stats = calibrate(
            path,
            texts,
            args.output,
            merge_stats=args.merge_stats,
            pairs=not args.no_pairs,
            memory=args.memory,
            overwrite=args.force,
            **run_of_texts(args),
        )
    except KeyboardInterrupt as stop:
        done, total = windows_done(args.output) or (0, 0)
        if done == total > 0 and _identity(args.output) != before:
            return 0  # it came too late
        if not done or done == total:
            raise
        return stopped(stop, f"the same command goes on from the {done} of {total} windows that {args.output} has")
    if args.json:
        words.print_json(stats.to_json())
    elif not args.quiet:
        words.show(stats.summary())
    return 0


def run_of_texts(args: Namespace) -> dict[str, Any]:
    """How texts are run, as the library takes it: the options TEXTS, THREADS and QUIET."""
    return {
        "n_ctx": args.ctx,
        "chunks": args.chunks,
        "parse_special": args.parse_special,
        "threads": args.threads,
        "gpu_layers": args.gpu_layers,
        "isolate": args.isolate,
        "progress": not args.quiet,
    }


def _identity(path: str) -> tuple[int, int] | None:
    """Another one after each write: files are replaced, not changed."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def repair(args: Namespace) -> int:
    from ...files.open import open_model
    from ...files.partial import partial_path
    from ...files.repair import open_repair
    from ...files.texts import read_texts
    from ...llama.texts import check_texts, check_windows
    from ...studies.repairs import repair

    path, *texts = args.arguments
    if not texts:
        raise Usage("repair needs a TEXT")
    if needs_number(args):
        raise Usage("repair needs --keep N or --ratio R (or --by FILE.json with the experts to keep)")
    # All this before the weights are read to choose.
    check_output([path, *texts, args.stats, args.run], args.output, args.force)
    check_windows(args.ctx, args.chunks, texts)
    texts = read_texts(texts)
    before = _identity(args.output)
    try:
        with open_model(path) as model, open_model(args.run or path) as running:
            check_texts(running, texts, args.ctx)
            errors = repair(
                model,
                choose(model, args),
                texts,
                args.output,
                run=args.run,
                memory=args.memory,
                overwrite=args.force,
                **run_of_texts(args),
            )
    except KeyboardInterrupt as stop:
        if _identity(args.output) != before:
            return 0  # it came too late
        if not os.path.exists(partial := partial_path(args.output)):
            raise
        return stopped(stop, f"the same command goes on from the layers that {partial} has")
    if args.json:
        words.print_json({"layers": {str(layer): {"before": a, "after": b} for layer, (a, b) in errors.items()}})
    elif not args.quiet:
        opened = open_repair(args.output)
        words.show(opened.summary())
        opened.close()
    return 0


# fmt: off
MODEL_AND_TEXTS = Positional("CALIBRATE", "arguments", "a GGUF file, quantized or not, and texts in UTF-8", "+",
                             "MODEL TEXT...")
OUTPUT: Options = {"-o": dict(dest="output", metavar="OUT", required=True, help="the file to write")}
TEXTS: Options = {
    "--ctx": dict(type=int, default=512, metavar="N", help="tokens of a window (default 512)"),
    "--chunks": dict(type=int, metavar="N", help="at most N windows of each text"),
    "--parse-special": dict(action="store_true", help="special tokens in the text are tokens, not text"),
    "--gpu-layers": dict(type=int, default=0, metavar="N", help="layers that llama.cpp puts on a GPU, -1 for all"),
    "--isolate": dict(action="store_true", help="run llama.cpp in a child process: a file of unknown origin that it "
                      "aborts on is then an error"),
}
COMMANDS = (
    Command(
        "calibrate", "run texts through a model and record what its experts do", calibrate, (MODEL_AND_TEXTS,),
        {"": OUTPUT | TEXTS | MEMORY | THREADS
         | {"--merge-stats": dict(action="store_true", help="also record what merging needs: larger statistics"),
            "--no-pairs": dict(action="store_true", help="do not record what two experts do together, which only "
                               "merging needs: much smaller statistics where there are hundreds of experts")}
         | FORCE | QUIET | JSON},
        {"memory": MEMORY_OF_TEXTS},
    ),
    Command(
        "repair", "make down projections with which the experts that stay do what all did", repair, (MODEL_AND_TEXTS,),
        {
            "": OUTPUT,
            "choice of experts": CHOICE | IMATRIX | MTP,
            "texts": {"--run": dict(metavar="FILE", help="let llama.cpp run this file of the same model, such as a "
                                    "quantized one")} | TEXTS | THREADS,
            "run": MEMORY | IO,
            "output": FORCE | QUIET | JSON,
        },
        {"memory": MEMORY_OF_TEXTS},
    ),
)
# fmt: on
