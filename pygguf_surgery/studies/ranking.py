"""Which experts to keep: a ranking per layer, from a metric or from the user, and the choice it leads to."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..architecture.experts import Layout
from ..base.checks import as_whole_number, choice
from ..base.errors import BadPlan, Unsupported
from ..base.words import nearest_multiples
from ..plan_data.choices import Keep, Seen, expert_ids, model_to_json, scores_to_json
from ..plan_data.subject import Subject

NOTHING_SEEN = Seen()


class Ranking:
    """Scores of the experts of each MoE layer, MTP layers included: higher = keep. Made by `rank`.

    metric: its name. scores: layer -> float64 array of E scores; empty where the user named the experts. seen: what
    calibration says beside them. mtp: as Plan.keep_experts takes it. of: the model that was ranked.
    """

    def __init__(
        self,
        metric: str,
        model: Layout,
        *,
        scores: Mapping[int, NDArray[np.float64]] | None = None,
        kept: Mapping[int, tuple[int, ...]] | None = None,
        tables: tuple[int, ...] = (),
        seen: Seen = NOTHING_SEEN,
        used: int = 1,
        of: Subject | None = None,
    ):
        self.metric = metric
        self.scores = dict(scores or {})
        self.seen = seen
        self._kept = None if kept is None else dict(kept)
        self._model = model
        self._tables = tables
        self._used = used
        self.mtp = "keep"
        self.of = of

    def __repr__(self) -> str:
        return f"<Ranking by {self.metric} of {self._model.experts} experts in {len(self._model.layers)} layers>"

    def keep(
        self,
        n: int | None = None,
        *,
        ratio: float | None = None,
        protect: Mapping[int, Iterable[int]] | Iterable[int] = (),
        super_experts: bool = False,
        per_group: bool | str = "auto",
        budget: str = "layer",
    ) -> Keep:
        """The n experts with the highest scores of each layer; ties: the lower id stays.

        ratio: the share to keep instead, rounded to the nearest possible number. Where the router picks groups, each
        group keeps the same number of experts (per_group: nothing else can be loaded); where experts share a chunk
        expert (grovemoe) they stay or go together, by their mean score: n must be a multiple of those. A ranking that
        names the experts needs no n.
        protect: {layer: ids}, or ids for every layer, that stay whatever their score. super_experts: so do those with
        massive activations, which only calibration knows. budget: "global" keeps n times the number of layers in all,
        where scores are the largest share of their layer's; only some architectures can load the result (prune pads
        it). BadPlan for a number that cannot be kept.
        """
        if n is not None and ratio is not None:
            raise BadPlan("give n or ratio, not both", object="keep")
        choice(budget, ("layer", "global"), "budget")
        if per_group not in ("auto", True, False):
            raise BadPlan("unknown choice", object="per_group", found=repr(per_group), expected='"auto", True or False')
        if per_group is False and self._model.groups > 1:
            raise Unsupported(
                f"the router picks {self._model.groups} groups: a different number of experts in each "
                "would change which expert is in which",
                object="per_group",
                hint='leave it "auto"',
            )
        if self._kept is not None:
            for name, given in (("protect", protect), ("super_experts", super_experts)):
                if given:
                    raise BadPlan("the experts are named already", object=name, hint="leave it out")
            return self._keep_named(self._kept, n, ratio)
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
                order[layer] = tuple(sorted(chosen, key=best_first(scores)))
        return Keep(kept, self.metric, order, self.scores, self.seen, everywhere, self.mtp, self.of)

    def _number(self, n: int | None, ratio: float | None) -> int:
        experts, step = self._model.experts, self._step()
        if ratio is not None:
            if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real) or not 0 < ratio <= 1:
                raise BadPlan(
                    "not a share of the experts", object="ratio", found=repr(ratio), expected="above 0, at most 1"
                )
            return min(max(math.floor(ratio * experts / step + 0.5), 1) * step, experts)
        number = as_whole_number(n)
        if number is None:
            raise BadPlan(
                "how many experts to keep?", object="keep", found=repr(n), expected="a whole number, or ratio="
            )
        if not 1 <= number <= experts:
            raise BadPlan("cannot keep this number of experts", object="keep", found=n, expected=f"1..{experts}")
        if number % step:
            why = f"{step} groups" if self._model.groups > 1 else f"chunks of {step} experts"
            raise BadPlan(
                f"{number} experts do not divide into {why}",
                object="keep",
                found=number,
                expected=nearest_multiples(number, step, experts),
            )
        return number

    def _step(self) -> int:
        return max(self._model.groups, self._model.chunk, 1)

    def _protected(
        self, protect: Mapping[int, Iterable[int]] | Iterable[int], super_experts: bool
    ) -> dict[int, set[int]]:
        fixed: dict[int, set[int]] = {layer: set() for layer in self.scores}
        if not isinstance(protect, Mapping):
            protect = dict.fromkeys(self.scores, tuple(protect)) if protect else {}
        for layer, ids in protect.items():
            if layer not in fixed:
                raise BadPlan("no layer with experts", object="protect", found=repr(layer)[:80])
            fixed[layer] |= set(expert_ids(layer, list(ids), self._model.experts, None, "protect"))
        if super_experts:
            if self.seen.supers is None:
                raise BadPlan(
                    "only calibration knows which experts have massive activations",
                    object="super_experts",
                    hint="give stats=, --stats",
                )
            for layer, ids in self.seen.supers.items():
                fixed[layer] |= set(ids)
        return fixed

    def _global_numbers(self, n: int) -> dict[int, int]:
        """How many experts each layer would keep of a budget over all layers: the largest shares of their layer's sum
        of scores, or the largest scores where those are not masses. Each keeps as many as a token uses; MTP layers,
        which may be scored by another metric, keep n."""
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
        chosen = np.argsort(-value.ravel(), kind="stable")[: n * len(layers)]
        counts = np.bincount(chosen // scores.shape[1], minlength=len(layers))
        return {**dict.fromkeys(self.scores, n), **dict(zip(layers, counts.tolist(), strict=True))}

    def _choose(self, layer: int, scores: NDArray[np.float64], n: int, fixed: Iterable[int]) -> list[int]:
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
            raise BadPlan(
                f"{most} experts are protected" + (" in one group" if groups > 1 else ""),
                object=f"layer {layer}",
                expected=f"at most {room}, which are kept",
            )
        best = np.argsort(-value.reshape(groups, size), axis=1, kind="stable")[:, :room]
        return [e for unit in (best + np.arange(groups)[:, None] * size).ravel() for e in units[unit]]

    def _keep_named(self, kept: dict[int, tuple[int, ...]], n: int | None, ratio: float | None) -> Keep:
        if ratio is not None:
            raise BadPlan("the experts are named already", object="ratio", hint="leave it out")
        for layer, ids in kept.items():
            if n is not None and len(ids) != n:
                raise BadPlan(
                    "the experts are named already",
                    object="keep",
                    found=n,
                    expected=f"{len(ids)}, as named for layer {layer}",
                )
        return Keep(kept, self.metric, scores=self.scores, seen=self.seen, mtp=self.mtp, of=self.of)

    def to_json(self) -> str:
        """Text that `rank(model, by=FILE)` accepts."""
        if self._kept is not None:
            return Keep(self._kept, self.metric, scores=self.scores, of=self.of).to_json()
        data = {"metric": self.metric, "scores": scores_to_json(self.scores), **model_to_json(self.of)}
        return json.dumps(data, allow_nan=False)


def best_first(scores: Sequence[float] | NDArray[np.float64]) -> Callable[[int], tuple[float, int]]:
    """The key of a sort: higher scores first, then lower ids."""
    return lambda expert: (-scores[expert], expert)
