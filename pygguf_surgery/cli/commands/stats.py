"""`gguf-surgery stats show | merge`: arguments in, exit code out."""

from __future__ import annotations

from argparse import Namespace

from ...files.outputs import check_output
from .. import words
from ..command import Command, Family, Options, Positional
from ..options import JSON


def show(args: Namespace) -> int:
    from ...files.stats import open_stats

    stats = open_stats(args.input)
    if args.json:
        words.print_json(stats.to_json())
    else:
        words.show(stats.summary())
    return 0


def merge(args: Namespace) -> int:
    from ...base.errors import BadPlan
    from ...files.stats import open_stats

    check_output(args.inputs, args.output, args.force)
    joined = open_stats(args.inputs[0])
    for path in args.inputs[1:]:
        try:
            joined = joined.merge(open_stats(path))
        except BadPlan as error:
            error.path = path
            raise
    joined.write(args.output, overwrite=args.force)
    return 0


# fmt: off
FORCE: Options = {"--force": dict(action="store_true", help="replace an existing output")}
FAMILY = Family("stats", "show and merge what calibrate has recorded", (
    Command("show", "what calibration has seen", show, (Positional("STATS", "input", "statistics of calibrate"),),
            {"": JSON}),
    Command("merge", "add statistics of one model over several texts", merge,
            (Positional("OUT", "output", "the statistics to write"),
             Positional("STATS", "inputs", "statistics of calibrate", "+")),
            {"": FORCE}),
))
# fmt: on
