"""`gguf-surgery compare`: how far the numbers of one model are from those of another that it was made from."""

from __future__ import annotations

from argparse import Namespace

from .. import words
from ..command import Command, Positional
from ..options import IMATRIX, JSON, MEMORY, QUIET, THREADS


def run(args: Namespace) -> int:
    from ...files.open import open_model
    from ...reports.comparison import compare

    with open_model(args.source) as source, open_model(args.result) as result:
        found = compare(
            source,
            result,
            imatrix=args.imatrix,
            rows=args.rows,
            threads=args.threads,
            memory=args.memory,
            progress=not args.quiet,
        )
    if args.json:
        words.print_json(found.to_json())
    elif not args.quiet:
        words.show(found.summary(tensors=args.tensors))
    return 0


# fmt: off
COMMAND = Command(
    "compare", "measure how far a result is from its source, by role and tensor", run,
    (Positional("A", "source", "the model that B was made from, or any before that in a chain of cuts"),
     Positional("B", "result", "what was made: cut, merged, repaired, quantized, split")),
    {"": {
        "--imatrix": {**IMATRIX["--imatrix"],
                      "help": "importance matrix of A or of B, GGUF or .dat, for errors weighted by importance"},
        "--rows": dict(choices=("all", "sample"), default="all",
                       help="sample: rows at fixed strides, at least 8 of each expert and 256 of each matrix"),
        "--tensors": dict(action="store_true", help="show each tensor too"),
    } | MEMORY | THREADS | QUIET | JSON},
)
# fmt: on
