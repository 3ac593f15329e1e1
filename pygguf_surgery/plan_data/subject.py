"""What a thing is of: the model that statistics, a repair, an importance matrix or a ranking belong to, so that those
of another cut with the same shapes are told apart, and those of the same model in other types are not."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..base import codec
from ..base.errors import BadPlan
from ..base.words import listed
from .expressions import Slices

Ids = dict[int, tuple[int, ...]]  # layer -> ascending expert ids

DROPPED = 0xFFFFFFFF  # in `merged`: in no group
_MOST = 0xFFFFFFFF  # above all numbers of experts and layers, which files have as u32
_SHOWN = 6  # ids in a message


@dataclass(frozen=True)
class Descent:
    """What the experts and layers of a model are in its origin, the first model of a chain of cuts and merges.

    header_sha256, experts: of the origin; "" and None where they are not known. layers: the origin's number of each
    layer, None where none was dropped. By layer, as it is numbered now: kept, the ids in the origin of its experts,
    ascending, without those of zeros, of a merged one that of its centroid; merged, where experts were merged, for each
    expert of the origin the one that it is in now, or DROPPED. Of a model that nothing was dropped from all is empty.
    """

    header_sha256: str = ""
    experts: int | None = None
    layers: tuple[int, ...] | None = None
    kept: Ids = field(default_factory=dict)
    merged: Ids = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        return bool(self.kept or self.merged or self.layers is not None)

    def contents(self, layer: int) -> list[tuple[int, ...]] | None:
        """For each expert of a layer the origin's experts that are in it; None where no expert is gone."""
        if layer not in self.kept:
            return None
        if layer not in self.merged:
            return [(expert,) for expert in self.kept[layer]]
        members: list[list[int]] = [[] for _ in self.kept[layer]]
        for expert, now in enumerate(self.merged[layer]):
            if now < len(members):
                members[now].append(expert)
        return [tuple(some) for some in members]

    # --- what edits do to it ----------------------------------------------------------------------------------------

    def after_cut(self, kept: Mapping[int, Slices]) -> Descent:
        """After one more cut. kept: ids as they are before it, None for experts of zeros."""
        return replace(
            self,
            kept={layer: self._of_origin(layer, ids) for layer, ids in kept.items()},
            merged={layer: _follow(self.merged[layer], ids) for layer, ids in kept.items() if layer in self.merged},
        )

    def _of_origin(self, layer: int, ids: Slices) -> tuple[int, ...]:
        real = [i for i in ids if i is not None]
        if layer not in self.kept:
            return tuple(real)
        before = self.kept[layer]
        return tuple(before[i] for i in real if i < len(before))  # a number beyond those is an expert of zeros

    def merge(self, groups: Mapping[int, Sequence[Sequence[int]]], experts: Mapping[int, int]) -> Ids:
        """`merged` of the layers of `groups` after experts became one: by layer, the members of each group and how many
        experts there are, as they are before it."""
        merged = {}
        for layer, several in groups.items():
            group_of = {member: number for number, members in enumerate(several) for member in members}
            contents = self.contents(layer)
            if contents is None:
                contents = [(expert,) for expert in range(experts[layer])]
            now = {old: group_of.get(expert, DROPPED) for expert, members in enumerate(contents) for old in members}
            count = self.experts if self.experts and layer in self.kept else max(now, default=-1) + 1
            merged[layer] = tuple(now.get(old, DROPPED) for old in range(count))
        return merged

    # --- two of them ------------------------------------------------------------------------------------------------

    def same_layers(self, other: Descent) -> bool:
        """Whether the layers of both have the same numbers, as far as both have them."""
        return _numbers(self.layers) == _numbers(other.layers)

    def places(self, wanted: Descent) -> Ids:
        """Where the experts of another descent from the same origin are in this one, by the layers of this one. BadPlan
        where it lacks one."""
        here = None if self.layers is None else {old: new for new, old in enumerate(self.layers)}
        found = {}
        for layer, ids in wanted.kept.items():
            if wanted.layers is not None and layer >= len(wanted.layers):  # numbers that somebody changed
                continue
            old = layer if wanted.layers is None else wanted.layers[layer]
            mine = old if here is None else here.get(old)
            if mine is None or (self.kept and mine not in self.kept):
                continue  # it has nothing of that layer
            contents, wishes = self.contents(mine), wanted.contents(layer) or []
            place = None if contents is None else {expert: i for i, expert in enumerate(self.kept[mine])}
            places = []
            for expert, members in zip(ids, wishes, strict=True):
                at = expert if place is None else place.get(expert)
                if at is None:
                    raise BadPlan(f"expert {expert} of the origin is not among its experts", object=f"blk.{mine}")
                if members != ((at,) if contents is None else contents[at]):
                    raise BadPlan(
                        "the model's experts were merged: how their neurons were matched is not in the file",
                        object=f"blk.{mine}",
                        hint="quantize with the importance matrix in the run that merges",
                    )
                places.append(at)
            found[mine] = tuple(places)
        return found

    def comparable(self, other: Descent) -> bool:
        """False where a list is of experts of nobody knows which model, and may not be of the same as the other's."""
        if all(descent.header_sha256 or not descent.changed for descent in (self, other)):
            return True
        return self.changed and other.changed and self.experts == other.experts

    # --- numbers from a file ----------------------------------------------------------------------------------------

    def plausible(self) -> Descent:
        """Without what cannot be: lists that somebody changed are as good as missing."""
        experts = self.experts if self.experts is not None and 0 < self.experts <= _MOST else None
        known = experts or _MOST
        kept = {layer: ids for layer, ids in self.kept.items() if _ascending(ids, known) and layer < _MOST}
        return Descent(
            self.header_sha256 if _is_digest(self.header_sha256) else "",
            experts,
            self.layers if self.layers is None or _ascending(self.layers, _MOST) else None,
            kept,
            {
                layer: ids
                for layer, ids in self.merged.items()
                if layer in kept and len(ids) <= known and all(i == DROPPED or 0 <= i < known for i in ids)
            },
        )


@dataclass(frozen=True)
class Subject:
    """The model that a thing is of. experts: of a layer, 0 if it has none. header_sha256: the digest of its header, ""
    where that is not known; a file in other types has another. name: its general.name."""

    experts: int
    header_sha256: str = ""
    name: str = ""
    origin: Descent = field(default_factory=Descent)

    def is_known_as(self, header_sha256: str) -> bool:
        return bool(self.header_sha256) and self.header_sha256 == header_sha256

    def fault(self, other: Subject, layers: Collection[int] | None = None) -> BadPlan | None:
        """What tells this model from another one, or None where they can be the same in other types. layers: the only
        ones that count. The problem goes on from "... are of"."""
        mine, theirs = self.origin, other.origin
        if self.is_known_as(other.header_sha256) or not mine.comparable(theirs):
            return None
        if not mine.same_layers(theirs):
            return BadPlan(
                "a model with other layers",
                object="layers",
                found=_words("layers", mine.layers),
                expected=_words("layers", theirs.layers),
            )
        if mine.experts != theirs.experts and mine.experts and theirs.experts:
            return BadPlan("another model", object="experts", found=mine.experts, expected=theirs.experts)
        for layer in sorted({*mine.kept, *theirs.kept} if layers is None else {*mine.kept, *theirs.kept} & {*layers}):
            a, b = mine.contents(layer), theirs.contents(layer)
            if a == b or (mine.kept and theirs.kept and (a is None or b is None)):  # an MTP layer that only one has
                continue
            cut, other_cut = mine.kept.get(layer), theirs.kept.get(layer)
            return BadPlan(
                "another merge" if cut == other_cut else "another cut",
                object=f"blk.{layer}",
                found=None if cut == other_cut else _words("experts", cut),
                expected=None if cut == other_cut else _words("experts", other_cut),
            )
        if not mine.kept and self.experts != other.experts:
            return BadPlan("another model", object="experts", found=self.experts, expected=other.experts)
        return None

    def check_same(
        self, other: Subject, what: str, *, path: str | None = None, layers: Collection[int] | None = None
    ) -> None:
        """BadPlan if this cannot be the other model. what: the thing that is of this one, "the statistics are"."""
        if (fault := self.fault(other, layers)) is not None:
            fault.problem, fault.path = f"{what} of {fault.problem}", path
            raise fault

    def after_cut(self, kept: Mapping[int, Iterable[int]]) -> Subject:
        """What is left of it when these experts are kept. Its own header is the origin's where nothing was dropped
        before."""
        ids = {layer: tuple(sorted(some)) for layer, some in kept.items()}
        origin = self.origin if self.origin.changed else Descent(self.header_sha256, self.experts or None)
        return Subject(max(map(len, ids.values()), default=0), origin=origin.after_cut(ids))

    # --- JSON -------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = codec.encode(self, {})
        data["origin"] = {key: value for key, value in data["origin"].items() if value not in (None, {})}
        return data if self.origin.changed else {key: value for key, value in data.items() if key != "origin"}

    @classmethod
    def from_json(cls, data: object) -> Subject:
        """BadPlan, with the path to what is wrong, for what `to_json` cannot have given."""
        try:
            subject: Subject = codec.decoder(Subject, {})(data)
            subject.check()
        except BadPlan as error:
            error.object = f"model{error.object or ''}"
            raise
        return subject

    def check(self) -> None:
        """BadPlan for numbers and texts that cannot be those of a model; its object is a path, ".origin.kept"."""
        good = self.origin.plausible()
        for where, fine in (
            (".experts", 0 <= self.experts <= _MOST),
            (".header_sha256", _is_digest(self.header_sha256)),
            (".origin.header_sha256", good.header_sha256 == self.origin.header_sha256),
            (".origin.experts", good.experts == self.origin.experts),
            (".origin.layers", good.layers == self.origin.layers),
            (".origin.kept", good.kept == self.origin.kept and all(layer >= 0 for layer in good.kept)),
            (".origin.merged", good.merged == self.origin.merged),
        ):
            if not fine:
                raise BadPlan("not what can be said of a model", object=where)


@dataclass(frozen=True)
class Wanted:
    """A cut that something else is to be cut by. cut: what is left, by the ids of its direct source; model: the model
    that is left."""

    cut: Descent
    model: Subject

    @classmethod
    def of_choice(cls, kept: Mapping[int, Iterable[int]], of: Subject) -> Wanted:
        """These experts of that model. BadPlan for one that it has not."""
        ids = {layer: tuple(sorted(some)) for layer, some in kept.items()}
        for layer, some in ids.items():
            if some and not 0 <= some[0] <= some[-1] < (of.experts or _MOST):
                raise BadPlan(
                    "an expert that the model has not",
                    object=f"kept.{layer}",
                    found=some[0] if some[0] < 0 else some[-1],
                    expected=f"0..{(of.experts or _MOST) - 1}",
                )
        return cls(Descent(of.header_sha256, of.experts or None).after_cut(ids), of.after_cut(ids))


def _follow(merged: tuple[int, ...], ids: Slices) -> tuple[int, ...]:
    """id in the origin -> id after the merge -> id now."""
    now = {old: new for new, old in enumerate(ids)}
    return tuple(now.get(i, DROPPED) for i in merged)


def _ascending(numbers: Sequence[int], below: int) -> bool:
    return all(a < b for a, b in zip((-1, *numbers), (*numbers, below), strict=True))


def _is_digest(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{0,64}", text) is not None


def _numbers(layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """None where no layer has another number than before."""
    return None if layers is None or layers == tuple(range(len(layers))) else layers


def _words(what: str, numbers: tuple[int, ...] | None) -> str:
    return f"all {what}" if numbers is None else f"{what} {listed(numbers, _SHOWN, number=True)} of the origin"
