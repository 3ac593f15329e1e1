"""`gguf-surgery verify`: a file as llama.cpp would load it, and against its source."""

from __future__ import annotations

from argparse import Namespace

from .. import words
from ..command import Command, Positional
from ..common import BAD_INPUT, warn
from ..options import JSON, QUIET


def run(args: Namespace) -> int:
    from ...reports.verification import verify

    report = verify(args.file, args.against, data=not args.no_data)
    if args.json:
        words.print_json(report.to_json())
    elif not args.quiet:
        warn(report.warnings)
        for problem in report.problems:
            words.show(f"problem: {problem}")
        words.show(report.summary())
    return 0 if report.good else BAD_INPUT


# fmt: off
COMMAND = Command(
    "verify", "check a file as llama.cpp would, and against its source", run,
    (Positional("FILE", "file", "the GGUF file to check"),),
    {"": {
        "--against": dict(metavar="IN", help="the file it was made from: prove each copied tensor and expert equal"),
        "--no-data": dict(action="store_true", help="check the header and layout only, not every number"),
    } | QUIET | JSON},
)
# fmt: on
