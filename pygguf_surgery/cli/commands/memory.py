"""`gguf-surgery memory`: what llama.cpp needs to run a model, or what a plan would make of it, and what fits."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from .. import options, words
from ..command import Command, Options
from ..common import Usage, limits, warn
from ..options import IN, JSON
from ..values import size
from . import surgery

if TYPE_CHECKING:
    from ...files.model import Model

_USE = {
    "ctx": "context", "cache_type_k": "type_k", "cache_type_v": "type_v", "parallel": "parallel",
    "kv_unified": "unified", "ubatch_size": "ubatch", "bandwidth": "bandwidth",
}  # fmt: skip


def run(args: Namespace) -> int:
    from ...files.open import open_model

    use: dict[str, Any] = {name: value for word, name in _USE.items() if (value := getattr(args, word)) is not None}
    use["flash_attention"] = args.flash_attn == "on"
    if args.solve and args.device is None:
        raise Usage("--solve goes with --device")
    with open_model(args.input) as model:
        if args.solve:
            return _solve(model, args, use)
        return _report(model, args, use)


def _report(model: Model, args: Namespace, use: dict[str, Any]) -> int:
    from ...base.limits import Limits
    from ...files.companions import Companions
    from ...gate.check import check
    from ...reports.memory import describe, memory

    plan = surgery.make_plan(model, args)
    with Companions() as companions:
        checked = check(model, plan.data, Limits.parse(**limits(args)), companions) if plan.data.edits else None
    report = memory(model if checked is None else checked, device=args.device, **use)
    if args.json:
        words.print_json(report)
    else:
        words.show(describe(report))
        warn(model.warnings if checked is None else checked.warnings)
    for blocker in checked.blockers if checked is not None else ():
        words.say(f"error: {blocker}")
    return 0


def _solve(model: Model, args: Namespace, use: dict[str, Any]) -> int:
    from ...reports.solutions import describe, solve

    if word := next((word for word, plain in _plan_words().items() if getattr(args, word) != plain), None):
        raise Usage(f"--{word.replace('_', '-')} does not go with --solve, which takes --keep and --type")
    report = solve(model, device=args.device, keep=args.keep, type=args.type, **use)
    if args.json:
        words.print_json(report)
    else:
        words.show(describe(report))
    return 0


def _plan_words() -> dict[str, Any]:
    """argparse's names of the options that describe a plan, with their defaults, but for --keep and --type."""
    groups = (
        EXPERTS,
        options.LAYERS,
        options.TYPE,
        options.TYPES,
        options.IMPORTANCE,
        options.QUALITY,
        options.METADATA,
    )
    return {
        option.get("dest", name[2:].replace("-", "_")): option.get(
            "default", False if option.get("action") == "store_true" else None
        )
        for group in groups
        for name, option in group.items()
        if name not in ("--keep", "--type", "--tensor-type")
    }


# fmt: off
EXPERTS: Options = {name: option for name, option in surgery.EXPERTS.items() if name not in ("--report", "--plot")}
USE: Options = {
    "--ctx": dict(type=int, metavar="N", help="tokens of context of all sequences together, as llama.cpp's --ctx-size "
                  "(default: what the model was trained for)"),
    "--cache-type-k": dict(metavar="TYPE", default="F16", help="type of the cached keys: F32, F16, BF16, Q8_0, Q5_1, "
                           "Q5_0, Q4_1, Q4_0, IQ4_NL (default F16)"),
    "--cache-type-v": dict(metavar="TYPE", default="F16", help="type of the cached values"),
    "--parallel": dict(type=int, metavar="N", default=1, help="sequences at once, each with its share of the context"),
    "--kv-unified": dict(action="store_true", help="sequences share one cache"),
    "--ubatch-size": dict(type=int, metavar="N", default=512, help="tokens computed at once (default 512)"),
    "--flash-attn": dict(choices=("on", "off"), default="on", help="flash attention (default on)"),
}
MACHINE: Options = {
    "--device": dict(metavar="SIZE", type=size, help="memory that all has to fit into, such as 120GiB; says the "
                     "largest context that does"),
    "--bandwidth": dict(metavar="RATE", help="what that memory reads per second (default 273GB/s, a DGX Spark's)"),
    "--solve": dict(action="store_true", help="list the numbers of experts and file types that fit into --device with "
                    "this context; with --keep or --type only those with these"),
}
# fmt: on
COMMAND = Command(
    "memory",
    "what llama.cpp needs to run a model, or what prune, quantize or edit would make of it",
    run,
    (IN,),
    {
        "context": USE,
        "machine": MACHINE,
        "choice of experts": EXPERTS,
        "layers": options.LAYERS,
        "types": options.TYPE | options.TYPES,
        "importance matrix": options.IMPORTANCE,
        "quality and size": options.QUALITY,
        "metadata": options.METADATA,
        "run": options.RUN,
        "output": JSON,
    },
    {"report": None, "plot": None, "dry_run": True},  # what make_plan looks at
)
