"""Scores of experts: one function per metric, from the weights, an importance matrix or statistics of calibration;
METRICS says all there is to know of each."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..architecture.experts import Layout
from ..base.errors import BadFile, BadPlan, SurgeryWarning, Unsupported
from ..files.imatrix import Imatrix
from ..files.model import Model, Tensor
from ..files.stats import LayerStats, Stats, open_stats
from ..files.subjects import subject_of
from .sums import Reduce

Scores = dict[int, NDArray[np.float64]]  # layer -> [E]
Need = Literal["weights", "imatrix", "stats"]


@dataclass(frozen=True)
class Given:
    """What the user has given to compute scores from."""

    reduce: Reduce  # the model's weights
    imatrix: Imatrix | None = None
    stats: Stats | None = None

    def has(self, need: Need) -> bool:
        return need == "weights" or getattr(self, need) is not None


@dataclass(frozen=True)
class Metric:
    """A way to score experts.

    needs: where its numbers can come from; one is enough, the first that is given is used. reads: the weights that it
    reads; all that experts have, or their down projections, take long. formula: the score of an expert, higher stays.
    function: scores of these layers; it leaves out layers of which the numbers say nothing. paper: arXiv's number.
    repaired: for a cut whose down projections are repaired (experts.repair) only.
    """

    name: str
    needs: tuple[Need, ...]
    reads: Literal["routers", "experts", "down projections", "nothing"]
    formula: str
    function: Callable[[Given, Sequence[int]], Scores]
    paper: str | None = None
    repaired: bool = False

    @property
    def takes_long(self) -> bool:
        return self.reads in ("experts", "down projections")


# --- from the weights -----------------------------------------------------------------------------------------------


def _router_norm(given: Given, layers: Sequence[int]) -> Scores:
    reduce = given.reduce
    alike: dict[
        tuple[int, tuple[int, ...]], dict[int, Tensor]
    ] = {}  # many small tensors: one pass over all of a type and shape
    for layer, tensors in reduce.tensors(("ffn_gate_inp.weight",), layers).items():
        if not tensors:
            raise BadFile("a layer with experts and no router", object=f"blk.{layer}.ffn_gate_inp.weight")
        alike.setdefault((tensors[0].type_id, tensors[0].ne), {})[layer] = tensors[0]
    scores: Scores = {}
    for routers in alike.values():
        scores |= zip(routers, np.sqrt(reduce.sums(tuple(routers.values()))[:, :, 1]), strict=True)
    return {layer: scores[layer] for layer in sorted(scores)}


# |score| is at most 1 (Cauchy-Schwarz), so an expert without any weight comes after every other.
_EMPTY_EXPERT = -2.0


def _aimer(given: Given, layers: Sequence[int]) -> Scores:
    """The weights count times the expert's scale where the file has one."""
    reduce = given.reduce
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
    scale = model.tensors.get(tensor.name.removesuffix("weight") + "scale")
    if scale is None:
        return None
    values: NDArray[np.float64] = np.abs(scale.dequantize().astype(np.float64))
    if not np.isfinite(values).all():
        raise BadFile("scales that are not finite", object=scale.name)
    return values


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


def _frequency(given: Given, layers: Sequence[int]) -> Scores:
    if given.stats is not None or given.imatrix is None:
        return _of_stats(lambda s: s.count.copy())(given, layers)
    reduce, imatrix = given.reduce, given.imatrix
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


def _imatrix_msan(given: Given, layers: Sequence[int]) -> Scores:
    """E||f||^2 of a token of the expert if the h_j were uncorrelated. h is the input of the down projection. 0 for an
    expert that was never seen."""
    reduce, imatrix = given.reduce, given.imatrix
    if imatrix is None:
        return {}
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


# --- from statistics of calibration ---------------------------------------------------------------------------------


def _of_stats(score: Callable[[LayerStats], NDArray[np.float64]]) -> Callable[[Given, Sequence[int]], Scores]:
    """The function of a metric that looks at the statistics of one layer at a time."""

    def scores(given: Given, layers: Sequence[int]) -> Scores:
        known = {} if given.stats is None else given.stats.layers
        return {layer: score(known[layer]) for layer in layers if layer in known}

    return scores


def _mean(total: NDArray[np.float64], stats: LayerStats) -> NDArray[np.float64]:
    """total / count; 0 for an expert that was never seen."""
    return np.divide(total, stats.count, out=np.zeros_like(total), where=stats.count > 0)


# --- all of them ----------------------------------------------------------------------------------------------------

# In formulas sums and means are over the tokens that were routed to the expert, g is its gate, f its output before the
# gate. Each metric stands here and nowhere else in the code; a test compares the README's table.
METRICS = {
    metric.name: metric
    for metric in (
        Metric("router-norm", ("weights",), "routers", "norm of its router row", _router_norm),
        Metric("aimer", ("weights",), "experts", "-mean |w| / rms(w) of its matrices", _aimer, "2603.18492"),
        Metric("frequency", ("stats", "imatrix"), "nothing", "number of tokens", _frequency),
        Metric("imatrix-msan", ("imatrix",), "down projections", "sum_j E[h_j^2] ||W_down[:, j]||^2", _imatrix_msan),
        Metric(
            "reap", ("stats",), "nothing", "mean g ||f||", _of_stats(lambda s: _mean(s.gated_norm_sum, s)), "2510.13999"
        ),
        Metric("reap-sum", ("stats",), "nothing", "sum g ||f||", _of_stats(lambda s: s.gated_norm_sum.copy())),
        Metric("ean-sum", ("stats",), "nothing", "sum ||f||", _of_stats(lambda s: s.norm_sum.copy())),
        Metric("ean-mean", ("stats",), "nothing", "mean ||f||", _of_stats(lambda s: _mean(s.norm_sum, s))),
        Metric("msan", ("stats",), "nothing", "mean ||f||^2", _of_stats(lambda s: _mean(s.norm_sq_sum, s))),
        Metric("weighted-frequency", ("stats",), "nothing", "sum g", _of_stats(lambda s: s.gate_sum.copy())),
        # What does best together with a repair: docs/experts.md.
        Metric(
            "best", ("stats",), "nothing", "sum g ||f||", _of_stats(lambda s: s.gated_norm_sum.copy()), repaired=True
        ),
    )
}

_NEEDS: dict[Need, str] = {
    "imatrix": "an importance matrix (imatrix=, --imatrix)",
    "stats": "statistics (stats=, --stats) of gguf-surgery calibrate",
}


def names(need: Need) -> list[str]:
    """The metrics that can be computed from this."""
    return [name for name, metric in METRICS.items() if need in metric.needs]


def compute(by: str, given: Given, layers: Sequence[int]) -> tuple[Scores, list[str]]:
    """Scores of these layers by one of METRICS, and what the user should know. BadPlan where what it needs is not given
    or is of another model. MTP layers that the numbers do not reach are scored by aimer."""
    metric, notes = METRICS[by], []
    used = next((need for need in metric.needs if given.has(need)), None)
    if used is None:
        raise BadPlan(
            "this metric needs " + " or ".join(text for need, text in _NEEDS.items() if need in metric.needs),
            object=by,
            hint=f"from the weights alone: {', '.join(names('weights'))}",
        )
    model, layout = given.reduce.model, given.reduce.layout
    if used == "stats" and given.stats is not None and given.stats.header_sha256 != model.header_sha256:
        notes.append(f"the statistics are of another file ({given.stats.name or 'no name'}) of the same shape")
    if used == "imatrix" and given.imatrix is not None:
        subject = subject_of(model)
        if given.imatrix.of is not None:
            given.imatrix.of.check_same(subject, "the importance matrix is", path=given.imatrix.path)
        elif subject.origin.changed:
            notes.append("the importance matrix does not say of which cut it is: taken to be this model's")
    scores = metric.function(given, layers)
    missing = [layer for layer in layers if layer not in scores]
    if wrong := [layer for layer in missing if layer not in layout.mtp]:
        raise BadPlan(
            "nothing is known of the experts of this layer",
            object=f"blk.{wrong[0]}",
            path=given.imatrix.path if given.imatrix is not None else None,
        )
    if missing:
        scores |= METRICS["aimer"].function(given, missing)
        notes.append(
            f"{', '.join(f'blk.{layer}' for layer in missing)} (MTP): by aimer, as calibration does not run MTP layers"
        )
    return {layer: scores[layer] for layer in layers}, notes


def read_stats(stats: str | os.PathLike[str] | Stats, model: Model, layout: Layout) -> Stats:
    """Statistics, from a file or what `open` returned. BadPlan if they cannot be of the model or of a quantized twin of
    it, or are not complete. A warning where they do not say whether theirs was cut as the model was."""
    opened = stats if isinstance(stats, Stats) else open_stats(stats)
    path = None if isinstance(stats, Stats) else os.fsdecode(stats)
    try:
        _check_stats(opened, model, layout)
    except BadPlan as error:
        error.path = path
        raise
    if opened.of is None and opened.header_sha256 != model.header_sha256 and subject_of(model).origin.changed:
        warnings.warn(
            f"{path or 'the statistics'}: an older version made them of another file, and did not say of which cut; "
            "taken to be of this one",
            SurgeryWarning,
            stacklevel=3,
        )
    return opened


def _check_stats(stats: Stats, model: Model, layout: Layout) -> None:
    for what, found, expected in (
        ("architecture", stats.architecture, model.architecture),
        ("experts", stats.experts, layout.experts),
        ("layers", list(stats.layers), [n for n in layout.layers if n not in layout.mtp]),
    ):
        if found != expected:
            raise BadPlan("the statistics are of another model", object=what, found=found, expected=expected)
    if stats.of is not None:
        stats.of.check_same(subject_of(model), "the statistics are", layers=stats.layers)
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
    every = np.concatenate([layer.max_activation for layer in stats.layers.values()])
    least = max(float(np.percentile(every, 99.5)), float(every.max()) / 10)
    return {layer: tuple(np.flatnonzero(s.max_activation > least).tolist()) for layer, s in stats.layers.items()}
