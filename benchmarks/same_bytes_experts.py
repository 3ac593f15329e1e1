"""Jobs of same_bytes.py about experts: every metric, expression and architecture."""

# ruff: noqa: B023  (functions that are made in a loop are called at once)
from __future__ import annotations

import os
from typing import Any

from same_bytes_shared import attempt, choice, half, job, layers_of, scores, written

import pygguf_surgery as pgs

METRICS = "router-norm aimer frequency imatrix-msan reap reap-sum ean-sum ean-mean msan weighted-frequency best"
UNEVEN = {1: [0, 2, 3, 5, 7, 8, 11, 12, 15], 2: [1, 4, 6, 9, 14]}


@job
def architecture(name: str) -> Any:
    """Half of the experts by the weights; types; layers; a merge; a second cut; each with the importance matrix."""
    path = f"moe-{name}.gguf"
    im = f"moe-{name}.imatrix.gguf" if os.path.exists(f"moe-{name}.imatrix.gguf") else None
    said: dict[str, Any] = {}
    with pgs.open(path) as model:
        for by in ("router-norm", "aimer"):
            said[by] = attempt(lambda: [scores(pgs.experts.rank(model, by=by)), choice(half(model, by))])
        keep = half(model)
        plan = pgs.Plan(model).keep_experts(keep)
        said["half"] = written(plan, "half.gguf")
        for kind in ("Q8_0", "MXFP4_MOE", "NVFP4_MOE", "IQ4_NL"):
            said[kind] = attempt(
                lambda: written(plan.quantize(kind, imatrix=im, allow_requantize=True), f"{kind}.gguf")
            )
        for first in range(3):
            said[f"without {first}"] = attempt(
                lambda: written(pgs.Plan(model).prune_layers([first]), f"without-{first}.gguf")
            )
        said["layers and experts"] = attempt(lambda: written(plan.prune_layers([1]), "both.gguf"))
        said["drop mtp"] = attempt(
            lambda: written(
                pgs.Plan(model).keep_experts(pgs.experts.rank(model, mtp="drop").keep(ratio=0.5), mtp="drop"),
                "dropped.gguf",
            )
        )
        said["global"] = attempt(
            lambda: written(
                pgs.Plan(model).keep_experts(pgs.experts.rank(model, "aimer").keep(ratio=0.5, budget="global")),
                "global.gguf",
            )
        )
    with pgs.open("half.gguf") as model:
        said["again"] = attempt(lambda: written(pgs.Plan(model).keep_experts(half(model, "aimer")), "quarter.gguf"))
    return said


@job
def merged(name: str) -> Any:
    """Expression Merge: groups from the weights, with the importance matrix, other types, after and before a cut."""
    said: dict[str, Any] = {}
    with pgs.open(f"moe-{name}.gguf") as model:

        def grouped(n: int, **how: Any) -> Any:
            return pgs.experts.group(model, n, weights_only=True, **how)

        for n, size in ((12, 16), (8, 2), (4, 16)):

            def run() -> Any:
                groups = grouped(n, group_size=size)
                plan = pgs.Plan(model).merge_experts(groups)
                return [groups.summary(), groups.notes, written(plan, f"merged-{n}-{size}.gguf")]

            said[f"{n} {size}"] = attempt(run)
        im = f"moe-{name}.imatrix.gguf"
        for kind in ("Q8_0", "IQ4_NL", "MXFP4_MOE"):
            said[kind] = attempt(
                lambda: written(pgs.Plan(model).merge_experts(grouped(8)).quantize(kind, imatrix=im), f"{kind}.gguf")
            )
        layers = layers_of(model)
        said["then cut"] = attempt(
            lambda: written(
                pgs.Plan(model).merge_experts(grouped(8)).keep_experts(dict.fromkeys(layers, (0, 2, 4, 5, 6, 7))),
                "cut.gguf",
            )
        )
        said["without layer"] = attempt(
            lambda: written(pgs.Plan(model).merge_experts(grouped(8)).prune_layers([1]), "layers.gguf")
        )
        said["one is left"] = attempt(lambda: written(pgs.Plan(model).merge_experts(grouped(1)), "one.gguf"))
    return said


@job
def metrics() -> Any:
    """Each metric on the main model: scores, choices, and what is refused."""
    said: dict[str, Any] = {}
    with pgs.open("model.gguf") as model:
        for by in METRICS.split():
            for word, imatrix, stats in (
                ("alone", None, None),
                ("imatrix", "imatrix.gguf", None),
                ("stats", None, "synthetic.stats.gguf"),
            ):

                def run() -> Any:
                    ranking = pgs.experts.rank(model, by=by, imatrix=imatrix, stats=stats)
                    return [
                        scores(ranking),
                        repr(ranking),
                        choice(ranking.keep(7)),
                        choice(ranking.keep(ratio=0.3)),
                        attempt(lambda: choice(ranking.keep(10, super_experts=True))),
                        attempt(lambda: choice(ranking.keep(10, protect=[1, 2]))),
                        attempt(lambda: choice(ranking.keep(10, budget="global"))),
                    ]

                said[f"{by} {word}"] = attempt(run)
        for name in ("kept", "scores", "bad", "half-kept", "twice", "not-json", "no"):
            file = f"{name}.json"
            said[file] = attempt(lambda: choice(pgs.experts.rank(model, by=file).keep(None if "kept" in file else 5)))
        ranking = pgs.experts.rank(model)
        numbers: tuple[Any, ...] = (0, 17, 3.5, None, True, "8")
        for n in numbers:
            said[f"keep {n!r}"] = attempt(lambda: choice(ranking.keep(n)))
    return said


@job
def statistics() -> Any:
    """Statistics: read, added, written, used to merge and to choose."""
    first, second = (pgs.experts.open_stats(f"synthetic{n}.stats.gguf") for n in ("", "-2"))
    both = first.merge(second)
    both.write("both.stats.gguf")
    said = [both.summary(), both.to_json(), repr(both), both.unseen(), attempt(lambda: first.merge(first).summary())]
    with pgs.open("model.gguf") as model:
        keep = pgs.experts.rank(model, by="reap-sum", stats=both).keep(8, super_experts=True)
        said += [choice(keep), written(pgs.Plan(model).keep_experts(keep), "half.gguf")]
        for by in ("reap", "reap-sum", "frequency"):
            groups = pgs.experts.group(model, 14, stats="synthetic.stats.gguf", by=by)
            said += [groups.summary(), written(pgs.Plan(model).merge_experts(groups), f"merged-{by}.gguf")]
        said += [attempt(lambda: pgs.experts.group(model, 8).summary())]
    with pgs.open("moe-qwen3moe.gguf") as model:
        said += [attempt(lambda: choice(pgs.experts.rank(model, by="reap", stats=both).keep(4)))]
    return said


@job
def repaired() -> Any:
    """Expression Repaired: as it is, encoded, cut again; and repairs that do not fit."""
    kept = {0: (1, 2, 5, 9), 1: (0, 3, 4, 15)}
    path = "moe-qwen3moe.repair.gguf"
    said: dict[str, Any] = {}
    with pgs.open("moe-qwen3moe.gguf") as model:
        plan = pgs.Plan(model).keep_experts(kept, repair=path)
        said["plain"] = written(plan, "plain.gguf")
        for kind in ("Q8_0", "MXFP4_MOE", "F32"):
            said[kind] = written(plan.quantize(kind, imatrix="moe-qwen3moe.imatrix.gguf"), f"{kind}.gguf")
        again = plan.keep_experts({0: (0, 1, 2, 3), 1: (0, 1, 2, 3)})
        said["again"] = written(again, "again.gguf")
        said["layers"] = attempt(lambda: written(plan.prune_layers([0]), "layers.gguf"))
        said["others"] = attempt(
            lambda: written(
                pgs.Plan(model).keep_experts({0: (1, 2, 5, 8), 1: (0, 3, 4, 15)}, repair=path), "others.gguf"
            )
        )
        said["no repair"] = attempt(lambda: pgs.Plan(model).keep_experts(kept, repair="moe-Q8_0.gguf"))
    with pgs.open("moe-Q8_0.gguf") as model:
        said["quantized"] = attempt(lambda: written(pgs.Plan(model).keep_experts(kept, repair=path), "quantized.gguf"))
    opened = pgs.experts.open_repair(path)
    said["file"] = [opened.summary(), opened.kept, opened.digest, opened.errors]
    opened.close()
    return said


@job
def padded() -> Any:
    """PAD: layers that keep fewer; encoded; cut again; with statistics and a budget over all layers."""
    said: dict[str, Any] = {}
    with pgs.open("moe-dots1.gguf") as model:
        plan = pgs.Plan(model).keep_experts(UNEVEN)
        said["plain"] = written(plan, "plain.gguf")
        for kind in ("Q8_0", "MXFP4_MOE", "IQ4_NL"):
            said[kind] = attempt(lambda: written(plan.quantize(kind, imatrix="moe-dots1.imatrix.gguf"), f"{kind}.gguf"))
        keep = pgs.experts.rank(model, "reap-sum", stats="moe-dots1.stats.gguf").keep(8, budget="global")
        said["global"] = [choice(keep), written(pgs.Plan(model).keep_experts(keep), "global.gguf")]
        said["fewer than used"] = attempt(
            lambda: written(pgs.Plan(model).keep_experts({1: range(8), 2: range(3)}), "x")
        )
    with pgs.open("plain.gguf") as model:
        said["again"] = attempt(lambda: written(pgs.Plan(model).keep_experts({1: range(6), 2: range(6)}), "again.gguf"))
    for name in ("qwen3moe", "grouped", "grovemoe", "gpt_oss"):
        with pgs.open(f"moe-{name}.gguf") as model:
            layers = layers_of(model)
            uneven = {layer: range(8 + 2 * (layer == layers[0])) for layer in layers}
            said[name] = attempt(lambda: written(pgs.Plan(model).keep_experts(uneven), f"{name}.gguf"))
    return said


@job
def remapped() -> Any:
    """Remap: tables of expert ids, by scores and by lists, and a cut of a cut."""
    said: dict[str, Any] = {}
    table = {"0": [(7 * e) % 16 for e in range(16)], "1": list(range(16))}
    with pgs.open("moe-deepseek4.gguf") as model:
        keep = pgs.experts.rank(model, by={"scores": table}).keep(6)
        plan = pgs.Plan(model).keep_experts(keep)
        said["scores"] = [choice(keep), written(plan, "scores.gguf")]
        said["list"] = written(pgs.Plan(model).keep_experts({0: (1, 3, 5, 7), 1: (0, 1, 2, 3)}), "list.gguf")
        said["twice"] = written(plan.keep_experts({0: range(4), 1: range(4)}), "twice.gguf")
        said["too few"] = attempt(lambda: written(pgs.Plan(model).keep_experts({0: range(3), 1: range(3)}), "few.gguf"))
        said["moved"] = attempt(lambda: written(plan.prune_layers([0]), "moved.gguf"))
    return said
