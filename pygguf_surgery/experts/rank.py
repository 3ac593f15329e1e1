"""Which experts to keep: a ranking per layer, from a metric or from the user, and the choice it leads to."""

from __future__ import annotations

import difflib
import json
import math
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BadPlan, Unsupported
from ..units import MEMORY
from . import metrics, roles, stats as stats_file
from .roles import Layout
from .stats import Stats

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..imatrix import Imatrix
    from ..model import Model

Progress = Callable[[int, int], object]
Ids = dict[int, tuple[int, ...]]  # layer -> ascending expert ids


@dataclass(frozen=True)
class Seen:
    """What calibration says beside the scores. unseen: experts that no token reached; supers: those with massive
    activations; None where nothing was recorded. notes: what the user should know of the scores."""

    unseen: Ids | None = None
    supers: Ids | None = None
    notes: tuple[str, ...] = ()


class Keep(dict[int, tuple[int, ...]]):
    """layer -> ascending ids of the experts to keep: the same number in every layer, unless the budget was global.

    metric: the name of what chose them. order: the same ids best first, for layers that map tokens to expert ids.
    scores: layer -> E scores; empty where the user named the experts.
    """

    def __init__(self, kept: Mapping[int, tuple[int, ...]], metric: str, order: Mapping[int, tuple[int, ...]] = {},
                 scores: Mapping[int, Any] = {}, seen: Seen = Seen(), everywhere: Mapping[int, int] = {}):
        super().__init__(kept)
        self.metric = metric
        self.order = dict(order)
        self.scores = dict(scores)
        self.seen = seen
        self._everywhere = dict(everywhere)

    def mass(self, layer: int) -> float | None:
        """The share of the layer's saliency that the kept experts have; None where scores can be negative or are all 0."""
        scores = self.scores.get(layer)
        if scores is None or scores.min() < 0 or scores.sum() <= 0:
            return None
        return float(scores[list(self[layer])].sum() / scores.sum())

    def ties(self, layer: int) -> int:
        """Dropped experts whose score is that of the worst kept one: only their ids decided."""
        scores = self.scores.get(layer)
        if scores is None:
            return 0
        last = scores[list(self[layer])].min()
        return int((scores == last).sum() - (scores[list(self[layer])] == last).sum())

    def summary(self) -> str:
        """Per layer: how many experts stay, their share of the saliency, those never seen, ties, and how many a budget
        over all layers together would keep."""
        lines = [f"experts kept by {self.metric}", f"{'layer':>5} {'kept':>9} {'mass':>7} {'unseen':>13} {'ties':>5}"
                 + (f" {'global budget':>14}" if self._everywhere else "")]
        for layer, ids in self.items():
            mass, unseen = self.mass(layer), (self.seen.unseen or {}).get(layer, ())
            experts = len(self.scores[layer]) if layer in self.scores else None
            kept_unseen = len(set(unseen) & set(ids))
            seen = f"{len(unseen)}, kept {kept_unseen}" if unseen else "" if self.seen.unseen is None else "0"
            row = (f"{layer:>5} {f'{len(ids)}/{experts}' if experts else len(ids):>9} "
                   f"{'' if mass is None else f'{100 * mass:.1f}%':>7} {seen:>13} {self.ties(layer) or '':>5} "
                   f"{self._everywhere.get(layer, ''):>14}")
            lines.append(row.rstrip())
        supers = self.seen.supers or {}
        for layer, ids in supers.items():
            if gone := sorted(set(ids) - set(self.get(layer, ids))):
                lines.append(f"dropped in layer {layer} in spite of massive activations: {', '.join(map(str, gone))} "
                             "(super_experts=True keeps them)")
        lines += [f"note: {text}" for text in self.seen.notes]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The decision, as text that `rank(model, by=FILE)` takes back."""
        return json.dumps({"metric": self.metric, "kept": {str(k): list(v) for k, v in self.items()},
                           **({"scores": _scores_to_json(self.scores)} if self.scores else {})}, allow_nan=False)


def _scores_to_json(scores: Mapping[int, Any]) -> dict[str, list[float]]:
    return {str(layer): [float(x) for x in values] for layer, values in scores.items()}


class Ranking:
    """Scores of the experts of each MoE block, MTP blocks included: higher = keep. Made by `rank`.

    metric: its name. scores: layer -> float64 array of E scores; empty where the user named the experts. seen: what
    calibration says beside them.
    """

    def __init__(self, metric: str, model: Layout, *, scores: Mapping[int, NDArray[np.float64]] | None = None,
                 kept: Mapping[int, tuple[int, ...]] | None = None, tables: tuple[int, ...] = (), seen: Seen = Seen(),
                 used: int = 1):
        self.metric = metric
        self.scores = dict(scores or {})
        self.seen = seen
        self._kept = None if kept is None else dict(kept)
        self._model = model
        self._tables = tables
        self._used = used

    def __repr__(self) -> str:
        return f"<Ranking by {self.metric} of {self._model.experts} experts in {len(self._model.layers)} layers>"

    def keep(self, n: int | None = None, *, ratio: float | None = None,
             protect: Mapping[int, Iterable[int]] | Iterable[int] = (), super_experts: bool = False,
             per_group: bool | str = "auto", budget: str = "layer") -> Keep:
        """The n experts with the highest scores of each layer; ties: the lower id stays.

        ratio: the share to keep instead, rounded to the nearest possible number. Where the router picks groups, each
        group keeps the same number of experts (per_group: nothing else can be loaded); where experts share a chunk
        expert (grovemoe) they stay or go together, by their mean score: n must be a multiple of those. A ranking that
        names the experts needs no n.
        protect: {layer: ids}, or ids for every layer, that stay whatever their score. super_experts: so do those with
        massive activations, which only calibration knows. budget: "global" keeps n times the number of layers in all,
        where scores are the largest share of their layer's; only some architectures can load the result (prune pads it).
        BadPlan for a number that cannot be kept.
        """
        if n is not None and ratio is not None:
            raise BadPlan("give n or ratio, not both", object="keep")
        if budget not in ("layer", "global"):
            raise BadPlan("no such budget", object="budget", found=repr(budget), expected='"layer" or "global"')
        if per_group not in ("auto", True, False):
            raise BadPlan("no such choice", object="per_group", found=repr(per_group), expected='"auto", True or False')
        if per_group is False and self._model.groups > 1:
            raise Unsupported(f"the router picks {self._model.groups} groups: a different number of experts in each "
                              "would change which expert is in which", object="per_group", hint='leave it "auto"')
        if self._kept is not None:
            for name, given in (("protect", protect), ("super_experts", super_experts)):
                if given:
                    raise BadPlan("the experts are named already", object=name, hint="leave it out")
            return self._keep_named(n, ratio)
        n = self._number(n, ratio)
        fixed = self._protected(protect, super_experts)
        everywhere = self._global_numbers(n)
        if budget == "global" and not everywhere:
            raise Unsupported("no global budget: the router or chunk experts tie experts together", object="budget")
        kept, order = {}, {}
        for layer, scores in self.scores.items():
            number = everywhere.get(layer, n) if budget == "global" else n
            chosen = self._choose(layer, scores, number, fixed.get(layer, ()))
            kept[layer] = tuple(sorted(chosen))
            if layer in self._tables:
                order[layer] = tuple(sorted(chosen, key=lambda e, s=scores: (-s[e], e)))
        return Keep(kept, self.metric, order, self.scores, self.seen, everywhere)

    def _number(self, n: int | None, ratio: float | None) -> int:
        experts, step = self._model.experts, self._step()
        if ratio is not None:
            if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real) or not 0 < ratio <= 1:
                raise BadPlan("not a share of the experts", object="ratio", found=repr(ratio),
                              expected="above 0, at most 1")
            return min(max(math.floor(ratio * experts / step + 0.5), 1) * step, experts)
        try:
            number = operator.index(n)
        except TypeError:
            raise BadPlan("how many experts to keep?", object="keep", found=repr(n),
                          expected="a whole number, or ratio=") from None
        if isinstance(n, bool) or not 1 <= number <= experts:
            raise BadPlan("cannot keep this number of experts", object="keep", found=n, expected=f"1..{experts}")
        if number % step:
            why = f"{step} groups" if self._model.groups > 1 else f"chunks of {step} experts"
            raise BadPlan(f"{number} experts do not divide into {why}", object="keep", found=number,
                          expected=nearest(number, step, experts))
        return number

    def _step(self) -> int:
        return max(self._model.groups, self._model.chunk, 1)

    def _protected(self, protect: Any, super_experts: bool) -> dict[int, set[int]]:
        fixed: dict[int, set[int]] = {layer: set() for layer in self.scores}
        if not isinstance(protect, Mapping):
            protect = dict.fromkeys(self.scores, tuple(protect)) if protect else {}
        for layer, ids in protect.items():
            if layer not in fixed:
                raise BadPlan("no layer with experts", object="protect", found=repr(layer)[:80])
            fixed[layer] |= set(_ids(layer, list(ids), self._model.experts, None, "protect"))
        if super_experts:
            if self.seen.supers is None:
                raise BadPlan("only calibration knows which experts have massive activations", object="super_experts",
                              hint="give stats=, --stats")
            for layer, ids in self.seen.supers.items():
                fixed[layer] |= set(ids)
        return fixed

    def _global_numbers(self, n: int) -> dict[int, int]:
        """How many experts each layer would keep of a budget over all layers: the largest shares of their layer's sum
        of scores, or the largest scores where those are no masses. Each keeps as many as a token uses; MTP blocks, which
        may be scored by another metric, keep n."""
        import numpy as np

        layers = [layer for layer in self.scores if layer not in self._model.mtp]
        if self._step() > 1 or not layers:
            return {}
        scores = np.stack([self.scores[layer] for layer in layers])
        if (scores >= 0).all():
            total = scores.sum(axis=1, keepdims=True)
            scores = np.divide(scores, total, out=np.zeros_like(scores), where=total > 0)
        best_first = np.argsort(-scores, axis=1, kind="stable")
        value = np.take_along_axis(scores, best_first, axis=1)
        least = min(max(self._used, 1), n)
        value[:, :least] = np.inf
        chosen = np.argsort(-value.ravel(), kind="stable")[:n * len(layers)]
        counts = np.bincount(chosen // scores.shape[1], minlength=len(layers))
        return {**dict.fromkeys(self.scores, n), **dict(zip(layers, counts.tolist()))}

    def _choose(self, layer: int, scores: NDArray[np.float64], n: int, fixed: Iterable[int]) -> list[int]:
        import numpy as np

        fixed = list(fixed)
        # A chunk of experts that share weights is chosen whole; a routing group keeps its share.
        if self._model.chunk > 1:
            chunk = self._model.chunk
            value, groups = scores.reshape(-1, chunk).mean(axis=1), 1
            units = [[c * chunk + i for i in range(chunk)] for c in range(len(value))]
            fixed = sorted({e // chunk for e in fixed})
        else:
            value, groups = scores.copy(), max(self._model.groups, 1)
            units = [[e] for e in range(len(value))]
        value[fixed] = np.inf
        size, room = len(value) // groups, n // len(units[0]) // groups
        most = max(np.bincount(np.array(fixed, np.int64) // size, minlength=groups), default=0)
        if most > room:
            raise BadPlan(f"{most} experts are protected" + (" in one group" if groups > 1 else ""),
                          object=f"layer {layer}", expected=f"at most {room}, which are kept")
        best = np.argsort(-value.reshape(groups, size), axis=1, kind="stable")[:, :room]
        return [e for unit in (best + np.arange(groups)[:, None] * size).ravel() for e in units[unit]]

    def _keep_named(self, n: int | None, ratio: float | None) -> Keep:
        if ratio is not None:
            raise BadPlan("the experts are named already", object="ratio", hint="leave it out")
        for layer, ids in self._kept.items():
            if n is not None and len(ids) != n:
                raise BadPlan("the experts are named already", object="keep", found=n,
                              expected=f"{len(ids)}, as named for layer {layer}")
        return Keep(self._kept, self.metric, scores=self.scores, seen=self.seen)

    def to_json(self) -> str:
        """Text that `rank(model, by=FILE)` accepts."""
        if self._kept is not None:
            return Keep(self._kept, self.metric, scores=self.scores).to_json()
        return json.dumps({"metric": self.metric, "scores": _scores_to_json(self.scores)}, allow_nan=False)


def nearest(n: int, step: int, most: int) -> str:
    """The multiples of step around n: "96 or 128"."""
    below, above = n // step * step, -(-n // step) * step
    return " or ".join(str(x) for x in sorted({below, above}) if 0 < x <= most)


def rank(model: Model, by: str | os.PathLike[str] | Mapping[str, Any] = "router-norm", *,
         stats: str | os.PathLike[str] | Stats | None = None, imatrix: str | os.PathLike[str] | Imatrix | None = None,
         mtp: str = "keep", memory: int | str = MEMORY, threads: int = 0, io: str = "auto",
         progress: Progress | None = None) -> Ranking:
    """Scores every expert of every MoE block, MTP blocks included unless mtp="drop".

    by: one of `metrics.METRICS`, below, with the sums over the tokens t routed to expert e, g its gate and f its output
    before the gate; or a dict or a JSON file, {"scores": {"0": [E numbers]}} or {"kept": {"0": [ids]}}, with an optional
    "metric", such as Keep.to_json writes.
      router-norm         L2 norm of the expert's router row; cheap
      aimer               minus mean|w| / rms(w) over its gate, up and down weights (arXiv 2603.18492); reads all of them
      frequency           count of tokens; from statistics, or else an importance matrix
      imatrix-msan        sum_j E[h_j^2] ||W_down[:, j]||^2, a diagonal approximation of mean ||f||^2; importance matrix
      reap                mean g ||f|| (arXiv 2510.13999); this and the rest from statistics of `calibrate`
      reap-sum            sum g ||f||: what is rarely used counts less
      ean-sum, ean-mean   sum and mean of ||f||
      msan                mean ||f||^2
      weighted-frequency  sum g
      best                reap-sum, for a cut whose down projections are repaired (experts.repair): by far the best
    MTP blocks, which calibration does not run, are scored by aimer then. Sums are in float64; weights are streamed within
    `memory`, quantized ones decoded first. stats, imatrix: the file or what `open` returned.
    progress: called with bytes done and bytes in all; an exception from it stops the run.
    Errors: BadPlan for a model without experts, an unknown `by`, statistics that are missing or of another model, BadFile
    for weights that are not finite, Unsupported for what an importance matrix of the old format has lost.
    """
    found = roles.layout(model.architecture, model.tensors, lambda key: model.metadata.get(key))
    if not found.layers:
        raise BadPlan("the model has no experts", path=model.path, object=model.architecture or None)
    if mtp not in ("keep", "drop"):
        raise BadPlan("no such choice", object="mtp", found=repr(mtp), expected='"keep" or "drop"')
    for name, tensor in model.tensors.items():
        if error := roles.check_shape(name, tensor.shape, found):
            raise error
    tables = tuple(sorted({roles.layer_of(name) for name in model.tensors
                           if (rule := roles.expert_rule(name)) and rule.axis == "values"}))
    if stats is not None:
        stats = stats if isinstance(stats, Stats) else stats_file.open(stats)
        metrics.check_stats(stats, model, found)
    if isinstance(by, Mapping):
        return _with_stats(_given(by, "dict", found, tables, None), stats)
    if isinstance(by, str) and by in metrics.METRICS:
        reduce = metrics.Reduce(model, found, memory=memory, threads=threads, io=io, progress=progress)
        layers = [layer for layer in found.layers if mtp == "keep" or layer not in found.mtp]
        opened = _open_imatrix(imatrix)
        try:
            scores, notes = metrics.compute(by, reduce, layers, stats, opened)
        finally:
            if opened is not None and opened is not imatrix:
                opened.close()
        seen = Seen(notes=tuple(notes))
        if by in metrics.FROM_IMATRIX and stats is None:
            unseen = {layer: tuple((s == 0).nonzero()[0].tolist()) for layer, s in scores.items()}
            seen = Seen({layer: ids for layer, ids in unseen.items() if ids}, None, tuple(notes))
        return _with_stats(Ranking(by, found, scores=scores, tables=tables, seen=seen, used=most_used(model)), stats)
    if isinstance(by, os.PathLike) or isinstance(by, str) and (
            by.endswith(".json") or os.path.basename(by) != by or os.path.isfile(by)):
        return _with_stats(_from_file(os.fspath(by), found, tables), stats)
    near = difflib.get_close_matches(by, metrics.METRICS) if isinstance(by, str) else ()
    raise BadPlan("unknown metric", object="by", found=repr(by)[:80],
                  expected=f"{', '.join(metrics.METRICS)}, or a JSON file",
                  hint=f"did you mean {near[0]}?" if near else None)


def _with_stats(ranking: Ranking, stats: Stats | None) -> Ranking:
    """What the statistics say beside the scores, whoever gave those."""
    if stats is not None:
        ranking.seen = Seen({layer: tuple(ids) for layer, ids in stats.unseen().items()}, metrics.super_experts(stats),
                            ranking.seen.notes)
    return ranking


def _open_imatrix(imatrix: str | os.PathLike[str] | Imatrix | None) -> Imatrix | None:
    from .. import imatrix as files

    return files.open(imatrix) if isinstance(imatrix, (str, os.PathLike)) else imatrix


def most_used(model: Model) -> int:
    """The most experts per token, or 1 where the file does not say."""
    value = model.metadata.get(f"{model.architecture}.expert_used_count")
    numbers_of = value if isinstance(value, list) else [value]
    return max((n for n in numbers_of if isinstance(n, int) and not isinstance(n, bool)), default=1)


# --- from the user --------------------------------------------------------------------------------------------------

def _from_file(path: str, found: Layout, tables: tuple[int, ...]) -> Ranking:
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, too deep
        raise BadPlan(f"not a JSON file: {error}", path=path) from None
    except BadPlan as error:
        error.path = path
        raise
    return _given(data, "file", found, tables, path)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        seen: set[str] = set()
        raise BadPlan("a key twice", object=next(k for k, _ in pairs if k in seen or seen.add(k)))
    return data


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON number")


def _given(data: Any, metric: str, found: Layout, tables: tuple[int, ...], path: str | None) -> Ranking:
    """{"kept": {"0": [ids]}} or {"scores": {"0": [E numbers]}}, with an optional "metric", or a decision, which has both
    and says which experts stay; nothing else."""
    form = '{"kept": {"0": [ids]}} or {"scores": {"0": [numbers]}}'
    if not isinstance(data, Mapping):
        raise BadPlan("not a ranking", path=path, found=type(data).__name__, expected=form)
    kinds = [kind for kind in ("kept", "scores") if kind in data]
    unknown = [key for key in data if key not in ("kept", "scores", "metric")]
    if not kinds or unknown:
        raise BadPlan("not a ranking", path=path, found=f"keys {', '.join(map(str, data)) or 'none'}", expected=form)
    name = data.get("metric", metric)
    if not isinstance(name, str) or not name:
        raise BadPlan("not a name", path=path, object="metric", found=repr(name)[:80])
    numbers_of = {kind: _per_layer(kind, data[kind], found, path, form) for kind in kinds}
    scores = kept = None
    if "scores" in numbers_of:
        import numpy as np

        scores = {layer: np.array(_scores(layer, values, found.experts, path), np.float64)
                  for layer, values in numbers_of["scores"].items()}
    if "kept" in numbers_of:
        kept = {layer: _ids(layer, values, found.experts, path, "kept")
                for layer, values in numbers_of["kept"].items()}
    return Ranking(name, found, scores=scores, kept=kept, tables=tables)


def _per_layer(kind: str, layers: Any, found: Layout, path: str | None, form: str) -> dict[int, list[Any]]:
    if not isinstance(layers, Mapping):
        raise BadPlan("not layers and their experts", path=path, object=kind, found=type(layers).__name__,
                      expected=form)
    numbers_of: dict[int, Any] = {}
    for key, values in layers.items():
        layer = _layer(key, kind, found, path)
        if layer in numbers_of:
            raise BadPlan("a layer twice", path=path, object=f"{kind}.{layer}")
        if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__iter__"):
            raise BadPlan("not a list of numbers", path=path, object=f"{kind}.{layer}", found=type(values).__name__)
        numbers_of[layer] = list(values)
    # A list without the MTP blocks is complete where the plan drops those.
    missing = [layer for layer in found.layers if layer not in numbers_of and layer not in found.mtp]
    if missing:
        raise BadPlan(f"layer {missing[0]} is missing", path=path, object=kind, found=f"{len(numbers_of)} layers",
                      expected=f"the {len(found.layers)} layers with experts")
    return {layer: numbers_of[layer] for layer in found.layers if layer in numbers_of}


def _layer(key: Any, kind: str, found: Layout, path: str | None) -> int:
    try:
        layer = int(key) if isinstance(key, str) and key.isdecimal() and str(int(key)) == key else operator.index(key)
    except TypeError:
        layer = -1
    if isinstance(key, bool) or layer not in found.layers:
        raise BadPlan("no layer with experts", path=path, object=kind, found=repr(key)[:80],
                      expected=f"one of {', '.join(map(str, found.layers))}"[:200])
    return layer


def _scores(layer: int, values: list[Any], experts: int, path: str | None) -> list[float]:
    where = f"scores.{layer}"
    if len(values) != experts:
        raise BadPlan("not one score per expert", path=path, object=where, found=len(values), expected=experts)
    for e, x in enumerate(values):
        if isinstance(x, bool) or not isinstance(x, numbers.Real):
            raise BadPlan(f"the score of expert {e} is no number", path=path, object=where, found=repr(x)[:80])
        try:
            finite = math.isfinite(x)
        except OverflowError:  # a whole number beyond float64
            finite = False
        if not finite:
            raise BadPlan(f"the score of expert {e} is not finite", path=path, object=where, found=repr(x)[:80])
    return [float(x) for x in values]


def _ids(layer: int, values: list[Any], experts: int, path: str | None, kind: str) -> tuple[int, ...]:
    where, ids = f"{kind}.{layer}", set()
    for x in values:
        try:
            i = -1 if isinstance(x, bool) else operator.index(x)
        except TypeError:
            i = -1
        if not 0 <= i < experts:
            raise BadPlan(f"expert {x!r:.80} out of range" if isinstance(x, int) and not isinstance(x, bool)
                          else "not an expert id", path=path, object=where, found=repr(x)[:80],
                          expected=f"0..{experts - 1}")
        if i in ids:
            raise BadPlan(f"expert {i} named twice", path=path, object=where)
        ids.add(i)
    return tuple(sorted(ids))
