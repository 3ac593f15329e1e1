"""`gguf-surgery perplexity`: arguments in, exit code out."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from ...base.words import decimals, table
from .. import words
from ..command import Command, Options, Positional
from ..common import Usage
from ..options import JSON, QUIET, THREADS
from .calibration import TEXTS, run_of_texts


def perplexity(args: Namespace) -> int:
    from ...studies.evaluation import perplexity

    models, texts = _told_apart(args.arguments)
    result = perplexity(models, texts, baseline=args.baseline, loops=args.loops, **run_of_texts(args))
    if args.json:
        words.print_json(result)
    else:
        words.show(_describe(result, texts))
    return 0


def _told_apart(paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Models, which come first, and texts."""
    models = 0
    for path in paths:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                break
        models += 1
    if not 0 < models < len(paths):
        raise Usage("perplexity needs a MODEL" if not models else "perplexity needs a TEXT")
    return list(paths[:models]), list(paths[models:])


def _describe(result: dict[str, Any], texts: Sequence[str]) -> str:
    parent = result["baseline"]
    heads = ["", "perplexity", "+/-"]
    if parent is not None:
        heads += ["ratio", "mean KLD", "median", "99 %", "most", "same top", "RMS dp"]
    loops = result["models"][0]["loops"] is not None
    rows = [[*heads, *["distinct-4"] * loops]]

    def row(name: str, entry: dict[str, Any]) -> list[str]:
        cells = [name, decimals(entry["perplexity"], 4), decimals(entry["perplexity_error"], 4)]
        kld = entry["kld"]
        if kld is not None:
            cells.append(decimals(kld["perplexity_ratio"], 4))
            cells += [decimals(kld[what], 6) for what in ("mean", "median", "p99", "max")]
            cells += [f"{100 * kld['same_top']:.2f} %", f"{100 * kld['delta_p_rms']:.2f} %"]
        elif parent is not None:
            cells += [""] * 7
        if loops:
            distinct = (entry.get("loops") or {}).get("distinct_4")
            cells.append("" if distinct is None else f"{100 * distinct:.1f} %")
        return cells

    for entry in [*([] if parent is None else [parent]), *result["models"]]:
        name = os.path.basename(entry["path"])
        rows.append(row(f"{name} (baseline)" if entry is parent else name, entry))
        if len(texts) > 1:
            rows += [row(f"  {os.path.basename(text)}", part) for text, part in zip(texts, entry["texts"], strict=True)]
    return f"{result['windows']} windows of {result['n_ctx']} tokens\n{table(rows)}"


# fmt: off
MODELS_AND_TEXTS = Positional("PERPLEXITY", "arguments", "GGUF files, then texts (UTF-8)", "+", "MODEL... TEXT...")
BASELINE: Options = {
    "--baseline": dict(metavar="PARENT", help="also how far each model is from this one (KLD), which has the same "
                       "vocabulary"),
    "--loops": dict(action="store_true", help="also what share of 4-grams is distinct in what each model says at "
                    "temperature 0: low where it repeats itself"),
}
COMMAND = Command(
    "perplexity", "how well models predict texts, and how far they are from a parent", perplexity, (MODELS_AND_TEXTS,),
    {"": BASELINE | TEXTS | THREADS | QUIET | JSON},
)
# fmt: on
