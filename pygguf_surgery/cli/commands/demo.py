"""`gguf-surgery demo`: make a model, cut it in half in MXFP4, show what it cost. Everything through the public face."""

from __future__ import annotations

import os
import time
from argparse import Namespace
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from ...base.units import human
from ...base.words import decimals, magnitude, table
from .. import words
from ..command import Command
from ..common import limits
from ..options import BY, DEFAULT_METRIC, JSON, KEEP, RUN
from ..options import TYPE as TYPE_OPTION
from .info import bits_per_weight, experts, parameters

if TYPE_CHECKING:
    from ...files.model import Model

TYPE = "MXFP4_MOE"


def run(args: Namespace) -> int:
    import tempfile

    folder = nullcontext(args.folder) if args.folder else tempfile.TemporaryDirectory(prefix="gguf-surgery-demo-")
    with folder as path:
        os.makedirs(path, exist_ok=True)
        result = _demo(args, path)
    if args.json:
        words.print_json(result)
    return 0


def _demo(args: Namespace, folder: str) -> dict[str, Any]:
    import resource

    import pygguf_surgery as pgs

    from ...reports.comparison import compare

    say = (lambda text: None) if args.json else print
    source_path, start = args.model, time.perf_counter()
    if source_path is None:
        from .demo_model import write_demo_model

        source_path = os.path.join(folder, "demo-bf16.gguf")
        write_demo_model(source_path, overwrite=bool(args.folder))
        say(f"made {source_path} in {time.perf_counter() - start:.1f} s")
    output = os.path.join(folder, "demo-cut.gguf")
    with pgs.open(source_path) as source:
        moe = experts(source)
        if moe is None:
            raise pgs.BadPlan("the model has no experts", path=source.path)
        keep = moe["count"] // 2 if args.keep is None else args.keep
        type, by = TYPE if args.type is None else args.type, DEFAULT_METRIC if args.by is None else args.by
        start = time.perf_counter()
        kept = pgs.experts.rank(source, by=by, **limits(args)).keep(keep)
        plan = pgs.Plan(source).keep_experts(kept).quantize(type)
        receipt = plan.write(output, overwrite=bool(args.folder), **limits(args))
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with pgs.open(output) as result:
            data = {
                "before": _size(source),
                "after": _size(result),
                "seconds": seconds,
                "peak_memory_bytes": peak,
                "receipt": receipt.to_json(),
                **compare(source, result, memory=args.memory, threads=args.threads).to_json(),
            }
            say(_summary(source, result, type, by))
    say(_roles(data["roles"]))
    say(
        f"cut and quantized in {seconds:.2f} s with {human(receipt.buffer_bytes)} of buffers; "
        f"peak memory of the whole process {human(peak)}"
    )
    if args.folder:
        say(f"kept in {folder}")
    return data


def _size(model: Model) -> dict[str, Any]:
    moe = experts(model)
    return {
        "file_bytes": model.file_bytes,
        "parameters": parameters(model),
        "bits_per_weight": bits_per_weight(model),
        "experts": moe["count"] if moe else None,
    }


def _summary(source: Model, result: Model, type: str, by: str) -> str:
    def line(word: str, model: Model, note: str) -> tuple[str, ...]:
        s, moe = _size(model), experts(model)
        return (
            word,
            human(s["file_bytes"]),
            f"{magnitude(s['parameters'])} parameters",
            f"{s['bits_per_weight']:.2f} bits per weight",
            f"{s['experts']} experts x {len(moe['layers']) if moe else 0} layers",
            note,
        )

    before, after = source.file_bytes, result.file_bytes
    rows = [line("before", source, ""), line("after", result, f"{type}, experts by {by}")]
    return (
        f"\n{table(rows, left=6)}\n"
        f"ratio   {before / after:.2f} times smaller: {100 * after / before:.1f} % of the bytes are left\n"
    )


def _roles(roles: list[dict[str, Any]]) -> str:
    rows = [("role", "types", "tensors", "before", "after", "cosine", "SNR dB", "relative error")]
    for r in roles:
        before, after = "+".join(r["source_types"]), "+".join(r["types"])
        rows.append(
            (
                r["role"].replace("_", " "),
                before if before == after else f"{before} -> {after}",
                str(r["tensors"]),
                human(r["source_nbytes"]),
                human(r["nbytes"]),
                decimals(r["cosine"], 6),
                "equal" if r["relative_error"] == 0 else decimals(r["snr_db"], 1),
                decimals(r["relative_error"], 4),
            )
        )
    return table(rows, left=2) + "\n"


# fmt: off
COMMAND = Command(
    "demo", "make a small model, cut it in half, show what was lost", run,
    groups={"": {"--model": dict(metavar="FILE", help="cut this model in place of the made-up one")}
            | {"--keep": KEEP["--keep"]} | BY | TYPE_OPTION
            | {"--folder": dict(metavar="DIR",
                                help="keep the files here (default: a temporary folder, removed at the end)")}
            | RUN | JSON},
)
# fmt: on
