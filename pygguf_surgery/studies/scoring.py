"""rank: scores of the experts, from a metric or from the user."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ..architecture.experts import check_shape, expert_rule, layout, most_used
from ..architecture.names import layer_of
from ..base.errors import BadPlan
from ..base.progress import ProgressLike, as_progress
from ..base.units import MEMORY
from ..base.words import nearest
from ..files import imatrix as imatrix_file
from ..files.imatrix import Imatrix
from ..files.model import Model
from ..files.stats import Stats
from ..files.subjects import subject_of
from ..plan_data.choices import Seen, parse_mtp
from . import metrics
from .ranking import Ranking
from .ranking_file import from_file, given
from .sums import Reduce


def rank(
    model: Model,
    by: str | os.PathLike[str] | Mapping[str, Any] = "router-norm",
    *,
    stats: str | os.PathLike[str] | Stats | None = None,
    imatrix: str | os.PathLike[str] | Imatrix | None = None,
    mtp: str = "keep",
    memory: int | str = MEMORY,
    threads: int = 0,
    io: str = "auto",
    progress: ProgressLike = None,
) -> Ranking:
    """Scores every expert of every MoE layer, MTP layers included unless mtp="drop".

    by: the name of a metric, one of METRICS: the README has a table of what each needs and computes. `router-norm` and
    `aimer` need nothing but the weights, the others an importance matrix or statistics of `calibrate`. Or a dict or a
    JSON file, {"scores": {"0": [E numbers]}} or {"kept": {"0": [ids]}}, with an optional "metric" and the "model" that
    it is of, such as Keep.to_json writes. MTP layers, which calibration does not run, are scored by aimer where its
    numbers are needed. Sums are in float64; weights are streamed within `memory`, quantized ones decoded first. stats,
    imatrix: the file or what `open` returned.
    progress: True, or a callable(bytes done, bytes in all); an exception from it stops the run.
    Errors: BadPlan for a model without experts, an unknown `by`, statistics that are missing, and for statistics, an
    importance matrix or a file of another model or another cut of this one; BadFile for weights that are not finite,
    Unsupported for what an importance matrix of the old format has lost.
    """
    found = layout(model.architecture, model.tensors, model.metadata.get)
    if not found.layers:
        raise BadPlan("the model has no experts", path=model.path, object=model.architecture or None)
    parse_mtp(mtp)
    for name, tensor in model.tensors.items():
        if error := check_shape(name, tensor.shape, found):
            raise error
    tables = {layer_of(name) for name in model.tensors if (rule := expert_rule(name)) and rule.axis == "values"}
    by_token = tuple(layer for layer in found.layers if layer in tables)
    if stats is not None:
        stats = metrics.read_stats(stats, model, found)
    of = subject_of(model)
    if isinstance(by, Mapping):
        return _finished(given(by, "dict", found, by_token, None, of), stats, mtp)
    if isinstance(by, str) and by in metrics.METRICS:
        layers = [layer for layer in found.layers if mtp == "keep" or layer not in found.mtp]
        opened = _open_imatrix(imatrix)
        try:
            with as_progress(progress, "ranking") as report:
                reduce = Reduce(model, found, memory=memory, threads=threads, io=io, progress=report)
                scores, notes = metrics.compute(by, metrics.Given(reduce, opened, stats), layers)
        finally:
            if opened is not None and opened is not imatrix:
                opened.close()
        seen = Seen(notes=tuple(notes))
        if stats is None and "imatrix" in metrics.METRICS[by].needs:
            unseen = {layer: tuple((s == 0).nonzero()[0].tolist()) for layer, s in scores.items()}
            seen = Seen({layer: ids for layer, ids in unseen.items() if ids}, None, tuple(notes))
        used = most_used(model.architecture, model.metadata.get)
        return _finished(Ranking(by, found, scores=scores, tables=by_token, seen=seen, used=used, of=of), stats, mtp)
    if isinstance(by, os.PathLike) or (
        isinstance(by, str) and (by.endswith(".json") or os.path.basename(by) != by or os.path.isfile(by))
    ):
        return _finished(from_file(os.fspath(by), found, by_token, of), stats, mtp)
    near = nearest(by, metrics.METRICS) if isinstance(by, str) else ()
    raise BadPlan(
        "unknown metric",
        object="by",
        found=repr(by)[:80],
        expected=f"{', '.join(metrics.METRICS)}, or a JSON file",
        hint=f"did you mean {near[0]}?" if near else None,
    )


def _finished(ranking: Ranking, stats: Stats | None, mtp: str) -> Ranking:
    """With what the statistics say beside the scores, whoever gave those, and what becomes of the MTP layers."""
    ranking.mtp = mtp
    if stats is not None:
        ranking.seen = Seen(
            {layer: tuple(ids) for layer, ids in stats.unseen().items()},
            metrics.super_experts(stats),
            ranking.seen.notes,
        )
    return ranking


def _open_imatrix(imatrix: str | os.PathLike[str] | Imatrix | None) -> Imatrix | None:
    return imatrix_file.open_imatrix(imatrix) if isinstance(imatrix, (str, os.PathLike)) else imatrix
