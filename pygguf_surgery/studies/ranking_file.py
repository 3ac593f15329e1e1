"""Rankings and choices that the user gives, as a file or a dict."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping

import numpy as np

from ..architecture.experts import Layout
from ..base.checks import as_whole_number
from ..base.codec import loads
from ..base.errors import BadPlan
from ..plan_data.choices import expert_ids
from ..plan_data.subject import Subject
from .ranking import Ranking

# --- from the user --------------------------------------------------------------------------------------------------


def from_file(path: str, found: Layout, tables: tuple[int, ...], of: Subject) -> Ranking:
    try:
        with open(path, encoding="utf-8") as file:
            data = loads(file.read())
    except UnicodeDecodeError as error:
        raise BadPlan("not UTF-8", path=path, offset=error.start) from None
    except BadPlan as error:
        error.path = path
        raise
    return given(data, "file", found, tables, path, of)


def given(data: object, metric: str, found: Layout, tables: tuple[int, ...], path: str | None, of: Subject) -> Ranking:
    """{"kept": {"0": [ids]}} or {"scores": {"0": [E numbers]}}, with an optional "metric", or a decision, which has
    both and says which experts stay, and maybe the "model" that this is of; nothing else. of: the model that is to be
    ranked; BadPlan if it is another one, or another cut of it."""
    form = '{"kept": {"0": [ids]}} or {"scores": {"0": [numbers]}}'
    if not isinstance(data, Mapping):
        raise BadPlan("not a ranking", path=path, found=type(data).__name__, expected=form)
    kinds = [kind for kind in ("kept", "scores") if kind in data]
    unknown = [key for key in data if key not in ("kept", "scores", "metric", "model")]
    if not kinds or unknown:
        raise BadPlan("not a ranking", path=path, found=f"keys {', '.join(map(str, data)) or 'none'}", expected=form)
    name = data.get("metric", metric)
    if not isinstance(name, str) or not name:
        raise BadPlan("not a name", path=path, object="metric", found=repr(name)[:80])
    if "model" in data:
        try:
            subject = Subject.from_json(data["model"])
        except BadPlan as error:
            error.path = path
            raise
        subject.check_same(of, "the ranking is", path=path)
    numbers_of = {kind: _per_layer(kind, data[kind], found, path, form) for kind in kinds}
    scores = kept = None
    if "scores" in numbers_of:
        scores = {
            layer: np.array(_scores(layer, values, found.experts, path), np.float64)
            for layer, values in numbers_of["scores"].items()
        }
    if "kept" in numbers_of:
        kept = {
            layer: expert_ids(layer, values, found.experts, path, "kept")
            for layer, values in numbers_of["kept"].items()
        }
    return Ranking(name, found, scores=scores, kept=kept, tables=tables, of=of)


def _per_layer(kind: str, layers: object, found: Layout, path: str | None, form: str) -> dict[int, list[object]]:
    if not isinstance(layers, Mapping):
        raise BadPlan(
            "not layers and their experts", path=path, object=kind, found=type(layers).__name__, expected=form
        )
    numbers_of: dict[int, list[object]] = {}
    for key, values in layers.items():
        layer = _layer(key, kind, found, path)
        if layer in numbers_of:
            raise BadPlan("a layer twice", path=path, object=f"{kind}.{layer}")
        if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__iter__"):
            raise BadPlan("not a list of numbers", path=path, object=f"{kind}.{layer}", found=type(values).__name__)
        numbers_of[layer] = list(values)
    # A list without the MTP layers is complete where the plan drops those.
    missing = [layer for layer in found.layers if layer not in numbers_of and layer not in found.mtp]
    if missing:
        raise BadPlan(
            f"layer {missing[0]} is missing",
            path=path,
            object=kind,
            found=f"{len(numbers_of)} layers",
            expected=f"the {len(found.layers)} layers with experts",
        )
    return {layer: numbers_of[layer] for layer in found.layers if layer in numbers_of}


def _layer(key: object, kind: str, found: Layout, path: str | None) -> int:
    layer = int(key) if isinstance(key, str) and key.isdecimal() and str(int(key)) == key else as_whole_number(key)
    if layer is None or layer not in found.layers:
        raise BadPlan(
            "no layer with experts",
            path=path,
            object=kind,
            found=repr(key)[:80],
            expected=f"one of {', '.join(map(str, found.layers))}"[:200],
        )
    return layer


def _scores(layer: int, values: list[object], experts: int, path: str | None) -> list[float]:
    where = f"scores.{layer}"
    if len(values) != experts:
        raise BadPlan("not one score per expert", path=path, object=where, found=len(values), expected=experts)
    scores = []
    for e, x in enumerate(values):
        if isinstance(x, bool) or not isinstance(x, numbers.Real):
            raise BadPlan(f"the score of expert {e} is not a number", path=path, object=where, found=repr(x)[:80])
        try:
            finite = math.isfinite(x)
        except OverflowError:  # a whole number beyond float64
            finite = False
        if not finite:
            raise BadPlan(f"the score of expert {e} is not finite", path=path, object=where, found=repr(x)[:80])
        scores.append(float(x))
    return scores
