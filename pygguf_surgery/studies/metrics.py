"""Scores of experts: one function per metric, from the weights, an importance matrix or statistics of calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..architecture.experts import Layout
from ..base.errors import BadFile, BadPlan, Unsupported
from ..files.stats import LayerStats, Stats

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..files.imatrix import Imatrix
    from ..files.model import Model, Tensor
    from .sums import Reduce


Scores = dict[int, Any]  # layer -> float64 [E]


def _router_norm(reduce: Reduce, layers: Sequence[int]) -> Scores:
    """L2 norm of the router row of each expert."""
    import numpy as np

    alike: dict[Any, dict[int, Tensor]] = {}  # many small tensors: one pass over all of a type and shape
    for layer, tensors in reduce.tensors(("ffn_gate_inp.weight",), layers).items():
        if not tensors:
            raise BadFile("a layer with experts and no router", object=f"blk.{layer}.ffn_gate_inp.weight")
        alike.setdefault((tensors[0].type_id, tensors[0].ne), {})[layer] = tensors[0]
    scores = {}
    for routers in alike.values():
        scores |= zip(routers, np.sqrt(reduce.sums(tuple(routers.values()))[:, :, 1]))
    return {layer: scores[layer] for layer in sorted(scores)}


# |score| is at most 1 (Cauchy-Schwarz), so an expert without any weight comes after every other.
_EMPTY_EXPERT = -2.0


def _aimer(reduce: Reduce, layers: Sequence[int]) -> Scores:
    """-mean|w| / rms(w), w all gate, up and down weights of the expert times its scale where the file has one."""
    import numpy as np

    parts = tuple(f"ffn_{part}_exps.weight" for part in ("gate_up", "gate", "up", "down"))
    scores = {}
    for layer, tensors in reduce.tensors(parts, layers).items():
        total, elements = np.zeros((reduce.layout.experts, 2)), 0
        for tensor in tensors:
            sums = reduce.sums([tensor])[0]
            if (s := _scale_of(reduce.model, tensor)) is not None:
                sums = sums * np.stack([s, s * s], axis=1)
            total += sums
            elements += tensor.elements // reduce.layout.experts
        rms = np.sqrt(total[:, 1] / elements)
        ratio = np.divide(total[:, 0] / elements, rms, out=np.full(len(rms), -_EMPTY_EXPERT), where=rms > 0)
        scores[layer] = -ratio
    return scores


def _scale_of(model: Model, tensor: Tensor) -> NDArray[np.float64] | None:
    """|scale| of each expert, which the product with this tensor is multiplied with, or None."""
    import numpy as np

    scale = model.tensors.get(tensor.name.removesuffix("weight") + "scale")
    if scale is None:
        return None
    values = np.abs(scale.dequantize().astype(np.float64))
    if not np.isfinite(values).all():
        raise BadFile("scales that are not finite", object=scale.name)
    return values


FROM_WEIGHTS: Mapping[str, Callable[[Reduce, Sequence[int]], Scores]] = {"router-norm": _router_norm, "aimer": _aimer}


# --- from an importance matrix --------------------------------------------------------------------------------------


def _entry(imatrix: Imatrix, layer: int, experts: int) -> str | None:
    """The name of the entry of a layer's down projections; None where there is none."""
    name = f"blk.{layer}.ffn_down_exps.weight"
    entry = imatrix.entries.get(name)
    if entry is None:
        return None
    if len(entry.counts) not in (1, experts) or entry.size % experts:
        raise BadPlan(
            "the importance matrix is of another model",
            path=imatrix.path,
            object=name,
            found=f"{len(entry.counts)} counts",
            expected=experts,
        )
    return name


def _counts(reduce: Reduce, imatrix: Imatrix, layers: Sequence[int]) -> Scores:
    """How many tokens were routed to each expert."""
    import numpy as np

    if imatrix.format == "legacy":
        raise Unsupported(
            "an importance matrix in the old format has lost the counts",
            path=imatrix.path,
            object="frequency",
            hint="llama-imatrix writes GGUF now, which has them",
        )
    scores = {}
    for layer in layers:
        if (name := _entry(imatrix, layer, reduce.layout.experts)) is not None:
            counts = imatrix.entries[name].counts
            if len(counts) != reduce.layout.experts:
                raise BadPlan(
                    "not one count per expert",
                    path=imatrix.path,
                    object=name,
                    found=len(counts),
                    expected=reduce.layout.experts,
                )
            scores[layer] = counts.astype(np.float64)
    return scores


def _imatrix_msan(reduce: Reduce, imatrix: Imatrix, layers: Sequence[int]) -> Scores:
    """sum_j E[h_j^2] ||W_down[:, j]||^2: E||f||^2 of a token of the expert if the h_j were uncorrelated. h is the input
    of the down projection. 0 for an expert that was never seen."""
    import numpy as np

    experts = reduce.layout.experts
    names = {layer: name for layer in layers if (name := _entry(imatrix, layer, experts)) is not None}
    scores = {}
    for layer, tensors in reduce.tensors(("ffn_down_exps.weight",), tuple(names)).items():
        tensor, name = tensors[0], names[layer]
        if problem := imatrix.problem(name):
            raise problem
        if imatrix.entries[name].size != experts * tensor.ne[0]:
            raise BadPlan(
                "importance of another size",
                path=imatrix.path,
                object=name,
                found=imatrix.entries[name].size,
                expected=experts * tensor.ne[0],
            )
        squares = imatrix.importance(name).reshape(experts, -1).astype(np.float64)
        score = reduce.sums([tensor], squares)[0, :, 1]
        if (s := _scale_of(reduce.model, tensor)) is not None:
            score = score * s * s
        score[imatrix.unseen(name, tensor.ne[0])] = 0
        scores[layer] = score
    return scores


FROM_IMATRIX: Mapping[str, Callable[[Reduce, Any, Sequence[int]], Scores]] = {
    "frequency": _counts,
    "imatrix-msan": _imatrix_msan,
}


# --- from statistics of calibration ---------------------------------------------------------------------------------


def _mean(total: NDArray[np.float64], stats: LayerStats) -> NDArray[np.float64]:
    """total / count; 0 for an expert that was never seen."""
    import numpy as np

    return np.divide(total, stats.count, out=np.zeros_like(total), where=stats.count > 0)


# g: gate, f: output before the gate (arXiv 2510.13999 and the ablations there). best: what does best with a repair.
# `best` is what does best together with a repair: docs/experts.md.
FROM_STATS: Mapping[str, Callable[[LayerStats], Any]] = {
    "reap": lambda s: _mean(s.gated_norm_sum, s),
    "reap-sum": lambda s: s.gated_norm_sum.copy(),
    "ean-sum": lambda s: s.norm_sum.copy(),
    "ean-mean": lambda s: _mean(s.norm_sum, s),
    "msan": lambda s: _mean(s.norm_sq_sum, s),
    "weighted-frequency": lambda s: s.gate_sum.copy(),
    "frequency": lambda s: s.count.copy(),
    "best": lambda s: s.gated_norm_sum.copy(),
}

METRICS = (*FROM_WEIGHTS, *FROM_IMATRIX, *(name for name in FROM_STATS if name not in FROM_IMATRIX))


def compute(
    by: str, reduce: Reduce, layers: Sequence[int], stats: Stats | None, imatrix: Imatrix | None
) -> tuple[Scores, list[str]]:
    """Scores of these layers by one of METRICS, and what the user should know. BadPlan where what it needs is not given
    or is of another model. MTP layers that the numbers do not reach are scored by aimer."""
    notes: list[str] = []
    if by in FROM_WEIGHTS:
        return FROM_WEIGHTS[by](reduce, layers), notes
    if by in FROM_STATS and stats is not None:
        if stats.header_sha256 != reduce.model.header_sha256:
            notes.append(f"the statistics are of another file ({stats.name or 'no name'}) of the same shape")
        scores: Scores = {layer: FROM_STATS[by](stats.layers[layer]) for layer in layers if layer in stats.layers}
    elif by in FROM_IMATRIX and imatrix is not None:
        scores = FROM_IMATRIX[by](reduce, imatrix, layers)
    else:
        needs = [
            what
            for what, table in (
                ("an importance matrix (imatrix=, --imatrix)", FROM_IMATRIX),
                ("statistics (stats=, --stats) of gguf-surgery calibrate", FROM_STATS),
            )
            if by in table
        ]
        raise BadPlan(
            "this metric needs " + " or ".join(needs),
            object=by,
            hint=f"from the weights alone: {', '.join(FROM_WEIGHTS)}",
        )
    missing = [layer for layer in layers if layer not in scores]
    if wrong := [layer for layer in missing if layer not in reduce.layout.mtp]:
        raise BadPlan(
            "nothing is known of the experts of this layer",
            object=f"blk.{wrong[0]}",
            path=imatrix.path if imatrix is not None else None,
        )
    if missing:
        scores |= _aimer(reduce, missing)
        notes.append(
            f"{', '.join(f'blk.{layer}' for layer in missing)} (MTP): by aimer, as calibration does not run MTP layers"
        )
    return {layer: scores[layer] for layer in layers}, notes


def check_stats(stats: Stats, model: Model, layout: Layout) -> None:
    """BadPlan if these statistics cannot be of the model or of a quantized twin of it, or are not complete."""
    for what, found, expected in (
        ("architecture", stats.architecture, model.architecture),
        ("experts", stats.experts, layout.experts),
        ("layers", list(stats.layers), [n for n in layout.layers if n not in layout.mtp]),
    ):
        if found != expected:
            raise BadPlan("the statistics are of another model", object=what, found=found, expected=expected)
    if not stats.complete:
        raise BadPlan(
            "the statistics are not complete",
            object="stats",
            found=f"{stats.tokens} tokens",
            hint="run the same calibrate command again: it goes on where it stopped",
        )


def super_experts(stats: Stats) -> dict[int, tuple[int, ...]]:
    """layer -> experts with massive activations: max |f| above the 99.5th percentile of all experts and above a tenth
    of the largest (REAP's definition)."""
    import numpy as np

    every = np.concatenate([layer.max_activation for layer in stats.layers.values()])
    least = max(float(np.percentile(every, 99.5)), float(every.max()) / 10)
    return {layer: tuple(np.flatnonzero(s.max_activation > least).tolist()) for layer, s in stats.layers.items()}
