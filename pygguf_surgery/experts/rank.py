"""Which experts to keep: scores per layer from the weights or from the user, and the choice they lead to."""

from __future__ import annotations

import difflib
import json
import math
import numbers
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import _core
from ..errors import BadFile, BadPlan, Unsupported
from ..units import MEMORY, parse_memory, parse_threads
from . import roles
from .roles import Layout

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..model import Model, Tensor

Progress = Callable[[int, int], object]

# Metrics that need an importance matrix or calibration.
_LATER = ("frequency", "imatrix-msan", "reap", "reap-sum", "ean-sum", "ean-mean", "msan", "weighted-frequency")


class Keep(dict[int, tuple[int, ...]]):
    """layer -> ascending ids of the experts to keep, the same number in every layer.

    metric: the name of what chose them. order: the same ids best first, for layers that map tokens to expert ids.
    """

    def __init__(self, kept: Mapping[int, tuple[int, ...]], metric: str, order: Mapping[int, tuple[int, ...]] = {}):
        super().__init__(kept)
        self.metric = metric
        self.order = dict(order)


class Ranking:
    """Scores of the experts of each MoE block, MTP blocks included: higher = keep. Made by `rank`.

    metric: its name. scores: layer -> float64 array of E scores; empty where the user named the experts.
    """

    def __init__(self, metric: str, model: Layout, *, scores: Mapping[int, NDArray[np.float64]] | None = None,
                 kept: Mapping[int, tuple[int, ...]] | None = None, tables: tuple[int, ...] = ()):
        self.metric = metric
        self.scores = dict(scores or {})
        self._kept = None if kept is None else dict(kept)
        self._model = model
        self._tables = tables

    def __repr__(self) -> str:
        return f"<Ranking by {self.metric} of {self._model.experts} experts in {len(self._model.layers)} layers>"

    def keep(self, n: int | None = None, *, ratio: float | None = None) -> Keep:
        """The n experts with the highest scores of each layer; ties: the lower id stays.

        ratio: the share to keep instead, rounded to the nearest possible number. Where the router picks groups, each
        group keeps the same number of experts; where experts share a chunk expert (grovemoe) they stay or go together,
        by their mean score: n must be a multiple of those. A ranking that names the experts needs no n.
        BadPlan for a number that cannot be kept.
        """
        if n is not None and ratio is not None:
            raise BadPlan("give n or ratio, not both", object="keep")
        if self._kept is not None:
            return self._keep_named(n, ratio)
        n = self._number(n, ratio)
        kept, order = {}, {}
        for layer, scores in self.scores.items():
            chosen = self._choose(scores, n)
            kept[layer] = tuple(sorted(chosen))
            if layer in self._tables:
                order[layer] = tuple(sorted(chosen, key=lambda e, s=scores: (-s[e], e)))
        return Keep(kept, self.metric, order)

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

    def _choose(self, scores: NDArray[np.float64], n: int) -> list[int]:
        import numpy as np

        if self._model.chunk > 1:
            chunk = self._model.chunk
            best = np.argsort(-scores.reshape(-1, chunk).mean(axis=1), kind="stable")[:n // chunk]
            return [int(c) * chunk + i for c in best for i in range(chunk)]
        groups = max(self._model.groups, 1)
        size = len(scores) // groups
        best = np.argsort(-scores.reshape(groups, size), axis=1, kind="stable")[:, :n // groups]
        return [int(e) for e in (best + np.arange(groups)[:, None] * size).ravel()]

    def _keep_named(self, n: int | None, ratio: float | None) -> Keep:
        if ratio is not None:
            raise BadPlan("the experts are named already", object="ratio", hint="leave it out")
        for layer, ids in self._kept.items():
            if n is not None and len(ids) != n:
                raise BadPlan("the experts are named already", object="keep", found=n,
                              expected=f"{len(ids)}, as named for layer {layer}")
        return Keep(self._kept, self.metric)

    def to_json(self) -> str:
        """Text that `rank(model, by=FILE)` accepts."""
        if self._kept is not None:
            return json.dumps({"metric": self.metric, "kept": {str(k): list(v) for k, v in self._kept.items()}})
        scores = {str(layer): [float(x) for x in scores] for layer, scores in self.scores.items()}
        return json.dumps({"metric": self.metric, "scores": scores}, allow_nan=False)


def nearest(n: int, step: int, most: int) -> str:
    """The multiples of step around n: "96 or 128"."""
    below, above = n // step * step, -(-n // step) * step
    return " or ".join(str(x) for x in sorted({below, above}) if 0 < x <= most)


def rank(model: Model, by: str | os.PathLike[str] | Mapping[str, Any] = "router-norm", *, memory: int | str = MEMORY,
         threads: int = 0, io: str = "auto", progress: Progress | None = None) -> Ranking:
    """Scores every expert of every MoE block, MTP blocks included.

    by: "router-norm", the L2 norm of the expert's router row, which is cheap; "aimer", minus mean|w| / rms(w) over the
    gate, up and down weights of the expert together (arXiv 2603.18492), which reads all expert weights; or a dict or a
    JSON file, {"scores": {"0": [E numbers]}} or {"kept": {"0": [ids]}}, with an optional "metric". Sums are in float64
    and streamed within `memory`; quantized weights are decoded first.
    progress: called with bytes done and bytes in all; an exception from it stops the run.
    Errors: BadPlan for a model without experts or an unknown `by`, BadFile for weights that are not finite, Unsupported
    for metrics that need calibration.
    """
    found = roles.layout(model.architecture, model.tensors, lambda key: model.metadata.get(key))
    if not found.layers:
        raise BadPlan("the model has no experts", path=model.path, object=model.architecture or None)
    for name, tensor in model.tensors.items():
        if error := roles.check_shape(name, tensor.shape, found):
            raise error
    tables = tuple(sorted({roles.layer_of(name) for name in model.tensors
                           if (rule := roles.expert_rule(name)) and rule.axis == "values"}))
    if isinstance(by, Mapping):
        return _given(by, "dict", found, tables, None)
    if isinstance(by, str) and by in _METRICS:
        reduce = _Reduce(model, found, memory=memory, threads=threads, io=io, progress=progress)
        return Ranking(by, found, scores=_METRICS[by](reduce), tables=tables)
    if isinstance(by, str) and by in _LATER:
        raise Unsupported("this metric needs an importance matrix or calibration", object=by,
                          hint=f"from the weights alone: {', '.join(_METRICS)}")
    if isinstance(by, os.PathLike) or isinstance(by, str) and (
            by.endswith(".json") or os.path.basename(by) != by or os.path.isfile(by)):
        return _from_file(os.fspath(by), found, tables)
    near = difflib.get_close_matches(by, (*_METRICS, *_LATER)) if isinstance(by, str) else ()
    raise BadPlan("unknown metric", object="by", found=repr(by)[:80],
                  expected=f"{', '.join(_METRICS)}, or a JSON file", hint=f"did you mean {near[0]}?" if near else None)


# --- from the weights ----------------------------------------------------------------------------------------------

class _Reduce:
    """Streams tensors of one model through _core.reduce_rows, with one progress over all of them."""

    def __init__(self, model: Model, found: Layout, *, memory: int | str, threads: int, io: str,
                 progress: Progress | None):
        self.model, self.layout = model, found
        self.options = {"memory": parse_memory(memory), "threads": parse_threads(threads), "io": io}
        self.progress = progress
        self.done = self.total = 0

    def tensors(self, parts: tuple[str, ...]) -> dict[int, list[Tensor]]:
        """Those of each MoE block that exist, in file order of `parts`; their bytes become the total of progress."""
        have = self.model.tensors
        chosen = {layer: [have[name] for part in parts if (name := f"blk.{layer}.{part}") in have]
                  for layer in self.layout.layers}
        self.total = sum(tensor.nbytes for tensors in chosen.values() for tensor in tensors)
        return chosen

    def sums(self, tensors: Sequence[Tensor]) -> NDArray[np.float64]:
        """[len(tensors), E, 2]: sum |w| and sum w^2 of each expert's slice, of tensors of one type and shape."""
        import numpy as np

        first, experts = tensors[0], self.layout.experts
        rows = first.elements // first.ne[0]
        job = _core.Job(first.name, source_type=first.type_id, target_type=_core.type_id("F32"),
                        row_elements=first.ne[0], rows=rows * len(tensors), target_offset=0,
                        runs=np.array([[t.source, t.offset, t.nbytes] for t in tensors], np.uint64))
        base = self.done
        poll = None if self.progress is None else lambda done, _: self.progress(base + done, self.total)
        sums = _core.reduce_rows(self.model.sources, job, rows // experts, progress=poll, **self.options)
        self.done += first.nbytes * len(tensors)
        if not np.isfinite(sums).all():
            which, expert = divmod(int(np.flatnonzero(~np.isfinite(sums).all(axis=1))[0]), experts)
            tensor = tensors[which]
            raise BadFile("weights that are not finite", path=self.model.paths[tensor.source], object=tensor.name,
                          found=f"in expert {expert}")
        return sums.reshape(len(tensors), experts, 2)


def _router_norm(reduce: _Reduce) -> dict[int, NDArray[np.float64]]:
    """L2 norm of the router row of each expert."""
    import numpy as np

    alike: dict[Any, dict[int, Tensor]] = {}  # many small tensors: one pass over all of a type and shape
    for layer, tensors in reduce.tensors(("ffn_gate_inp.weight",)).items():
        if not tensors:
            raise BadFile("a block with experts and no router", object=f"blk.{layer}.ffn_gate_inp.weight")
        alike.setdefault((tensors[0].type_id, tensors[0].ne), {})[layer] = tensors[0]
    scores = {}
    for routers in alike.values():
        scores |= zip(routers, np.sqrt(reduce.sums(tuple(routers.values()))[:, :, 1]))
    return {layer: scores[layer] for layer in sorted(scores)}


# |score| is at most 1 (Cauchy-Schwarz), so an expert without any weight comes after every other.
_EMPTY_EXPERT = -2.0


def _aimer(reduce: _Reduce) -> dict[int, NDArray[np.float64]]:
    """-mean|w| / rms(w), w all gate, up and down weights of the expert times its scale where the file has one."""
    import numpy as np

    parts = tuple(f"ffn_{part}_exps.weight" for part in ("gate_up", "gate", "up", "down"))
    scores = {}
    for layer, tensors in reduce.tensors(parts).items():
        total, elements = np.zeros((reduce.layout.experts, 2)), 0
        for tensor in tensors:
            sums = reduce.sums([tensor])[0]
            scale = reduce.model.tensors.get(tensor.name.removesuffix("weight") + "scale")
            if scale is not None:
                s = np.abs(scale.dequantize().astype(np.float64))
                if not np.isfinite(s).all():
                    raise BadFile("scales that are not finite", object=scale.name)
                sums = sums * np.stack([s, s * s], axis=1)
            total += sums
            elements += tensor.elements // reduce.layout.experts
        rms = np.sqrt(total[:, 1] / elements)
        ratio = np.divide(total[:, 0] / elements, rms, out=np.full(len(rms), -_EMPTY_EXPERT), where=rms > 0)
        scores[layer] = -ratio
    return scores


_METRICS: dict[str, Callable[[_Reduce], dict[int, Any]]] = {"router-norm": _router_norm, "aimer": _aimer}


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
    """{"kept": {"0": [ids]}} or {"scores": {"0": [E numbers]}}, each with an optional "metric"; nothing else."""
    import numpy as np

    form = '{"kept": {"0": [ids]}} or {"scores": {"0": [numbers]}}'
    if not isinstance(data, Mapping):
        raise BadPlan("not a ranking", path=path, found=type(data).__name__, expected=form)
    kinds = [kind for kind in ("kept", "scores") if kind in data]
    unknown = [key for key in data if key not in ("kept", "scores", "metric")]
    if len(kinds) != 1 or unknown:
        raise BadPlan("not a ranking", path=path, found=f"keys {', '.join(map(str, data)) or 'none'}", expected=form)
    name = data.get("metric", metric)
    if not isinstance(name, str) or not name:
        raise BadPlan("not a name", path=path, object="metric", found=repr(name)[:80])
    kind, layers = kinds[0], data[kinds[0]]
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
    ordered = {layer: numbers_of[layer] for layer in found.layers if layer in numbers_of}
    if kind == "scores":
        scores = {layer: np.array(_scores(layer, values, found.experts, path), np.float64)
                  for layer, values in ordered.items()}
        return Ranking(name, found, scores=scores, tables=tables)
    kept = {layer: _ids(layer, values, found.experts, path) for layer, values in ordered.items()}
    return Ranking(name, found, kept=kept)


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


def _ids(layer: int, values: list[Any], experts: int, path: str | None) -> tuple[int, ...]:
    where, ids = f"kept.{layer}", set()
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
