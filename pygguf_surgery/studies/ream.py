"""Which experts to merge, and how their neurons match: REAM (arXiv 2604.04356), layer by layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from .._core import Source, thread_count
from .._core import dequantize as decode
from ..architecture.experts import Layout, layout
from ..base.errors import BadPlan, Unsupported
from ..base.progress import Progress, ProgressLike, as_progress
from ..base.units import MEMORY, human, parse_memory, parse_threads
from ..files.model import Model, Tensor
from ..files.stats import LayerStats, Stats
from ..plan_data.choices import Groups, parse_mtp
from ..plan_data.expressions import Group
from . import metrics
from .ranking import Ranking, best_first
from .sums import Reduce

GROUP_SIZE = 16  # members of a group, the centroid among them
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_PROBES = 32  # random inputs that experts are compared by where no text was run


def group(
    model: Model,
    n: int | None = None,
    *,
    ratio: float | None = None,
    stats: str | os.PathLike[str] | Stats | None = None,
    by: str = "reap",
    group_size: int = GROUP_SIZE,
    weights_only: bool = False,
    mtp: str = "keep",
    memory: int | str = MEMORY,
    threads: int = 0,
    io: str = "auto",
    progress: ProgressLike = None,
) -> Groups:
    """Groups of experts, n of them in each layer, each to become one expert; the others of a group are aligned to its
    centroid neuron by neuron.

    Centroids are the n experts with the highest saliency, `by` a metric of statistics (see `rank`). From the most
    salient on, each takes the most similar experts that are left, up to group_size members, so that most stay alone.
    Similarity is the mean of (1 + cosine of the mean gated outputs) / 2 and of 1 - d / max d, d the distance of the
    normalised columns of router logits. A member's neurons are matched with the centroid's by scipy's
    linear_sum_assignment on the distance of normalised rows [gate | up | down^T]. Weights are the shares of saliency.
    stats: of `calibrate(..., merge_stats=True)`. weights_only: without any; the saliency is then 1 / (mean|w| / rms)
    (see aimer), the similarity that of router rows and of outputs for random inputs. MTP layers are always grouped so.
    memory: of the weights and costs that are worked on at once. progress: True, or a callable(experts done, experts in
    all). Errors: as in `rank`; Unsupported without scipy or for a model whose experts share chunk experts.
    """
    found = layout(model.architecture, model.tensors, model.metadata.get)
    if not found.layers:
        raise BadPlan("the model has no experts", path=model.path, object=model.architecture or None)
    if found.chunk > 1:
        raise Unsupported("experts that share chunk experts cannot be merged", object=model.architecture)
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise BadPlan("not a number of members", object="group_size", found=repr(group_size), expected="at least 1")
    parse_mtp(mtp)
    _assignment()
    layers = [layer for layer in found.layers if mtp == "keep" or layer not in found.mtp]
    if weights_only and stats is not None:
        raise BadPlan("statistics are of no use", object="weights_only", hint="leave out one of the two")
    stats = None if weights_only else _checked(model, found, stats, by)
    known = {} if stats is None else stats.layers
    blind = [layer for layer in layers if layer not in known]
    reduce = Reduce(model, found, memory=memory, threads=threads, io=io, progress=None)
    saliency: metrics.Scores = {}
    if stats is not None:
        scores = metrics.METRICS[by].function(metrics.Given(reduce, stats=stats), list(known))
        saliency = {layer: _positive(s) for layer, s in scores.items()}
    if blind:
        scores = metrics.METRICS["aimer"].function(metrics.Given(reduce), blind)
        saliency |= {layer: -1 / s for layer, s in scores.items()}
    name = "ream weights-only" if weights_only else f"ream {by}"
    keep = Ranking(name, found, scores=saliency).keep(n, ratio=ratio)
    groups = {}
    with (
        as_progress(progress, "matching", "experts") as report,
        _Work(model, parse_memory(memory), parse_threads(threads), io, report) as work,
    ):
        work.total = sum(
            found.experts - len(keep[layer]) + (found.experts if layer in blind else 0) for layer in layers
        )
        for layer in layers:
            experts = _Experts(model, work.sources, layer)
            similarity = _similarity(known[layer]) if layer in known else work.blind_similarity(experts)
            members = assign(saliency[layer], keep[layer], similarity, group_size)
            groups[layer] = work.align(experts, members, saliency[layer])
    notes = []
    if blind and not weights_only:
        names = ", ".join(f"blk.{layer}" for layer in blind)
        notes.append(f"{names} (MTP): from the weights alone, as calibration does not run MTP layers")
    return Groups(groups, name, notes, mtp)


def _checked(model: Model, found: Layout, stats: str | os.PathLike[str] | Stats | None, by: str) -> Stats:
    """Statistics with all that merging needs; BadPlan for others."""
    if stats is None:
        raise BadPlan(
            "merging needs statistics (stats=, --stats) of calibrate with merge_stats",
            object="stats",
            hint="or weights_only=True (--weights-only)",
        )
    stats = metrics.read_stats(stats, model, found)
    if by not in metrics.names("stats"):
        raise BadPlan(
            "not a metric of statistics", object="by", found=repr(by)[:80], expected=", ".join(metrics.names("stats"))
        )
    if not stats.pairs or any(s.gated_sum is None for s in stats.layers.values()):
        raise BadPlan(
            "the statistics lack what merging needs",
            object="stats",
            hint="calibrate with merge_stats=True (--merge-stats)",
        )
    return stats


def _positive(saliency: NDArray[np.float64]) -> NDArray[np.float64]:
    """Zeros become min(0.5, the smallest that is not), so that a group of experts never seen has a mean."""
    seen = saliency[saliency > 0]
    return np.where(saliency > 0, saliency, min(0.5, seen.min()) if seen.size else 1.0)


def _assignment() -> Callable[[NDArray[np.float64]], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """scipy's: the rows, and the column for each, whose sum is the least."""
    try:
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise Unsupported(
            "merging experts needs scipy", found=error, hint="pip install 'pygguf-surgery[merge]'"
        ) from None
    return linear_sum_assignment  # type: ignore[no-any-return, unused-ignore]


def _cosines(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    cosines: NDArray[np.float64] = unit @ unit.T
    return cosines


def _similarity(stats: LayerStats) -> NDArray[np.float64]:
    """[E, E], between 0 and 1, of statistics that have what merging needs."""
    assert stats.gated_sum is not None and stats.logit_gram is not None  # _checked has seen to it
    outputs = _cosines(stats.gated_sum)
    norms = np.sqrt(np.diag(stats.logit_gram))
    scale = np.outer(norms, norms)
    logits = np.divide(stats.logit_gram, scale, out=np.zeros_like(scale), where=scale > 0)
    distance = np.sqrt(np.maximum(2 - 2 * logits, 0))
    similarity: NDArray[np.float64] = ((outputs + 1) / 2 + 1 - distance / (distance.max() or 1)) / 2
    return similarity


def assign(
    saliency: NDArray[np.float64], centroids: Sequence[int], similarity: NDArray[np.float64], group_size: int
) -> list[list[int]]:
    """Members of the group of each centroid, itself first; centroids ascending. Each expert is in one group."""
    groups = {c: [c] for c in centroids}
    left = [e for e in range(len(saliency)) if e not in groups]
    if len(left) > len(groups) * (group_size - 1):
        raise BadPlan(
            "the groups are too small for all experts",
            object="group_size",
            found=group_size,
            expected=f"at least {-(-len(saliency) // len(groups))}",
        )
    for c in sorted(groups, key=best_first(saliency)):
        left.sort(key=best_first(similarity[c]))
        taken, left = left[: group_size - 1], left[group_size - 1 :]
        groups[c] += sorted(taken)
    return [groups[c] for c in sorted(groups)]


class _Experts:
    """The weights of one layer, one expert's matrix at a time. parts: gate, up (where there are) and down, transposed:
    all [neurons, width]."""

    def __init__(self, model: Model, sources: Sequence[Source], layer: int):
        self._sources = sources
        tensors = {
            part: model.tensors[name]
            for part in ("gate", "up", "gate_up", "down")
            if (name := f"blk.{layer}.ffn_{part}_exps.weight") in model.tensors
        }
        down = tensors["down"]
        self.count, self.width, self.neurons = down.shape
        self.router = model.tensors[f"blk.{layer}.ffn_gate_inp.weight"]
        # tensor, whether transposed, first row and number of rows of a slice
        self.parts: list[tuple[Tensor, bool, int, int]] = [(down, True, 0, self.width)]
        if "gate_up" in tensors:
            self.parts += [(tensors["gate_up"], False, first, self.neurons) for first in (0, self.neurons)]
        else:
            self.parts += [(tensors[part], False, 0, self.neurons) for part in ("gate", "up") if part in tensors]
        for tensor, transposed, _, _ in self.parts:
            expected = (self.width, self.neurons) if transposed else (tensor.shape[1], self.width)
            if tensor.shape != (self.count, *expected):
                raise BadPlan(
                    "expert matrices that do not fit each other",
                    object=tensor.name,
                    found=list(tensor.shape),
                    expected=[self.count, *expected],
                )

    def read(self, part: int, expert: int) -> NDArray[np.float32]:
        tensor, transposed, first, rows = self.parts[part]
        nbytes = tensor.nbytes // tensor.shape[0] // tensor.shape[1]
        start = tensor.offset + (expert * tensor.shape[1] + first) * nbytes
        raw = self._sources[tensor.source].read(start, rows * nbytes).reshape(rows, nbytes)
        values = decode(raw, tensor.type_id, 1)
        return values.T if transposed else values


class _Work:
    """Runs over experts in parallel, within the memory."""

    def __init__(self, model: Model, memory: int, threads: int, io: str, progress: Progress | None):
        self.sources = [Source(path, io=io) for path in model.paths]
        self._memory, self._threads = memory, thread_count(threads)
        self._progress = progress
        self.done = self.total = 0

    def __enter__(self) -> _Work:
        return self

    def __exit__(self, *_: object) -> None:
        for source in self.sources:
            source.close()

    def _map(self, function: Callable[[_Item], _Result], items: Sequence[_Item], each: int) -> list[_Result]:
        if each > self._memory:
            raise BadPlan(
                "two experts and the costs of matching them do not fit",
                object="memory",
                found=human(self._memory),
                expected=f"at least {human(each)}",
            )
        workers = max(1, min(self._threads, self._memory // each))
        out = []
        with ThreadPoolExecutor(workers) as pool:
            try:
                for result in pool.map(function, items):
                    out.append(result)
                    self.done += 1
                    if self._progress is not None:
                        self._progress(self.done, self.total)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return out

    def align(
        self, experts: _Experts, members: Sequence[Sequence[int]], saliency: NDArray[np.float64]
    ) -> tuple[Group, ...]:
        # A matrix of either, the one that was read, and the costs: float32, as float64, and a copy that scipy makes.
        each = 4 * experts.neurons * (3 * experts.width + 5 * experts.neurons)
        pairs = [(group[0], member) for group in members for member in group[1:]]
        orders = dict(zip(pairs, self._map(lambda pair: match(experts, *pair), pairs, each), strict=True))
        groups = []
        for group in members:
            shares = saliency[list(group)] / saliency[list(group)].sum()
            groups.append(
                Group(tuple(group), tuple(shares.tolist()), (b"", *(orders[group[0], member] for member in group[1:])))
            )
        return tuple(groups)

    def blind_similarity(self, experts: _Experts) -> NDArray[np.float64]:
        """Without a text: cosines of router rows and of what experts give for random inputs, which no order of neurons
        changes."""
        probes = np.random.default_rng(0).standard_normal((_PROBES, experts.width), np.float32)

        def outputs(expert: int) -> NDArray[np.float32]:
            hidden = [probes @ experts.read(part, expert).T for part in range(1, len(experts.parts))]
            act = (
                hidden[0] / (1 + np.exp(-hidden[0])) * hidden[1]
                if len(hidden) > 1
                else np.square(np.maximum(hidden[0], 0))
            )
            given: NDArray[np.float32] = (act @ experts.read(0, expert)).ravel()
            given /= np.linalg.norm(given) or 1
            return given

        each = 4 * experts.neurons * (2 * experts.width + 4 * _PROBES)
        unit = np.stack(self._map(outputs, range(experts.count), each))
        router = _cosines(experts.router.dequantize().astype(np.float64))
        similarity: NDArray[np.float64] = ((unit @ unit.T + 1) / 2 + (router + 1) / 2) / 2
        return similarity


def match(experts: _Experts, centroid: int, member: int) -> bytes:
    """The neuron of `member` for each of the centroid's, so that the summed distance of their normalised weights is the
    least; little-endian uint16."""
    products = np.zeros((experts.neurons, experts.neurons), np.float32)
    squares = np.zeros((2, experts.neurons))
    for part in range(len(experts.parts)):
        a = experts.read(part, centroid)
        b = experts.read(part, member)
        products += a @ b.T
        squares[0] += np.einsum("ij,ij->i", a, a)
        squares[1] += np.einsum("ij,ij->i", b, b)
    scale = np.sqrt(np.outer(*squares))
    cosine = np.divide(products, scale, out=np.zeros_like(scale), where=scale > 0)
    if not np.isfinite(cosine).all():
        raise BadPlan(
            "weights that are not finite", object=experts.parts[0][0].name, found=f"expert {centroid} or {member}"
        )
    np.clip(2 - 2 * cosine, 0, None, out=cosine)
    _, order = _assignment()(np.sqrt(cosine, out=cosine))
    return bytes(order.astype("<u2").tobytes())
