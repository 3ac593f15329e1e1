"""Which experts a user chose: to keep, to merge."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..base.checks import as_whole_number, choice, whole_number
from ..base.errors import BadPlan
from ..base.words import columns
from .expressions import Group
from .subject import Ids as Ids
from .subject import Subject


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
    scores: layer -> E scores; empty where the user named the experts. mtp: what becomes of the MTP layers, "keep" or
    "drop", where Plan.keep_experts is told nothing else. of: the model whose experts these are, where that is known.
    """

    def __init__(
        self,
        kept: Mapping[int, tuple[int, ...]],
        metric: str,
        order: Mapping[int, tuple[int, ...]] = {},
        scores: Mapping[int, Any] = {},
        seen: Seen = Seen(),
        everywhere: Mapping[int, int] = {},
        mtp: str = "keep",
        of: Subject | None = None,
    ):
        super().__init__(kept)
        self.metric = metric
        self.order = dict(order)
        self.scores = dict(scores)
        self.seen = seen
        self.mtp = mtp
        self.of = of
        self._everywhere = dict(everywhere)

    def mass(self, layer: int) -> float | None:
        """The share of the layer's saliency that the kept experts have; None where scores can be negative or are all
        0."""
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
        widths = (5, 9, 7, 13, 5, 14)
        title = ("layer", "kept", "mass", "unseen", "ties", "global budget" if self._everywhere else "")
        lines = [f"experts kept by {self.metric}", columns(widths, title)]
        for layer, ids in self.items():
            mass, unseen = self.mass(layer), (self.seen.unseen or {}).get(layer, ())
            experts = len(self.scores[layer]) if layer in self.scores else None
            kept_unseen = len(set(unseen) & set(ids))
            seen = f"{len(unseen)}, kept {kept_unseen}" if unseen else "" if self.seen.unseen is None else "0"
            row = (
                layer,
                f"{len(ids)}/{experts}" if experts else len(ids),
                "" if mass is None else f"{100 * mass:.1f}%",
                seen,
                self.ties(layer) or "",
                self._everywhere.get(layer, ""),
            )
            lines.append(columns(widths, row))
        supers = self.seen.supers or {}
        for layer, ids in supers.items():
            if gone := sorted(set(ids) - set(self.get(layer, ids))):
                lines.append(
                    f"dropped in layer {layer} in spite of massive activations: {', '.join(map(str, gone))} "
                    "(super_experts=True keeps them)"
                )
        lines += [f"note: {text}" for text in self.seen.notes]
        return "\n".join(lines)

    def to_json(self) -> str:
        """The decision, as text that `rank(model, by=FILE)` takes back."""
        return json.dumps(
            {
                "metric": self.metric,
                "kept": {str(k): list(v) for k, v in self.items()},
                **({"scores": scores_to_json(self.scores)} if self.scores else {}),
                **model_to_json(self.of),
            },
            allow_nan=False,
        )


def scores_to_json(scores: Mapping[int, Any]) -> dict[str, list[float]]:
    return {str(layer): [float(x) for x in values] for layer, values in scores.items()}


def model_to_json(of: Subject | None) -> dict[str, Any]:
    return {} if of is None else {"model": of.to_json()}


def parse_mtp(mtp: str) -> str:
    """What becomes of the MTP layers: "keep" treats them like the rest, "drop" removes them."""
    return choice(mtp, ("keep", "drop"), "mtp")


def plain_ids(layer: object, values: object) -> tuple[int, ...]:
    """Ids of experts as a user names them, ascending, where it is not known yet how many experts there are. BadPlan for
    what is not a list of whole numbers, and for an id twice."""
    where = f"layer {layer}"
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise BadPlan("not a list of expert ids", object=where, found=repr(values)[:80])
    ids = sorted(whole_number(i, where) for i in values)
    if twice := [a for a, b in pairwise(ids) if a == b]:
        raise BadPlan(f"expert {twice[0]} is kept twice", object=where)
    return tuple(ids)


def expert_ids(layer: int, values: Sequence[object], experts: int, path: str | None, kind: str) -> tuple[int, ...]:
    where, ids = f"{kind}.{layer}", set()
    for x in values:
        i = as_whole_number(x)
        if i is None or not 0 <= i < experts:
            raise BadPlan(
                "not an expert id" if i is None else f"expert {x!r:.80} out of range",
                path=path,
                object=where,
                found=repr(x)[:80],
                expected=f"0..{experts - 1}",
            )
        if i in ids:
            raise BadPlan(f"expert {i} named twice", path=path, object=where)
        ids.add(i)
    return tuple(sorted(ids))


class Groups(dict[int, tuple[Group, ...]]):
    """layer -> groups by ascending centroid, the same number in every layer; for Plan.merge_experts. metric: the name
    of what chose them. mtp: as in Keep."""

    def __init__(
        self, groups: Mapping[int, tuple[Group, ...]], metric: str, notes: Sequence[str] = (), mtp: str = "keep"
    ):
        super().__init__(groups)
        self.metric, self.notes, self.mtp = metric, tuple(notes), mtp

    def summary(self) -> str:
        widths = (5, 12, 10, 13)
        lines = [
            f"experts merged by {self.metric}",
            columns(widths, ("layer", "experts", "singletons", "largest group")),
        ]
        for layer, groups in self.items():
            sizes = [len(group.members) for group in groups]
            lines.append(columns(widths, (layer, f"{sum(sizes)} -> {len(sizes)}", sizes.count(1), max(sizes))))
        return "\n".join(lines + [f"note: {text}" for text in self.notes])
