"""What a file says of the file it was made from: the keys `pgs.*` of models, read and written here and nowhere else."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .._core import Value, __version__
from ..architecture.keys import getter, like, read_count
from ..architecture.loader import MAX_EXPERTS, MAX_LAYERS
from ..architecture.names import layer_of
from ..base.errors import BadFile, BadPlan
from ..plan_data.expressions import Slices
from ..plan_data.subject import DROPPED, Descent, Ids

if TYPE_CHECKING:
    from .model import Model

VERSION = "pgs.version"
SOURCE_SHA256 = "pgs.source.header_sha256"
SOURCE_NAME = "pgs.source.name"
SOURCE_EXPERTS = "pgs.source.experts"
KEPT_LAYERS = "pgs.layers.kept"
METRIC = "pgs.experts.metric"
ORIGIN_SHA256 = "pgs.origin.header_sha256"
ORIGIN_EXPERTS = "pgs.origin.experts"
ORIGIN_LAYERS = "pgs.origin.layers"
_EXPERTS, _ORIGIN = "pgs.experts.", "pgs.origin."
_OF_LAYER = re.compile(r"pgs\.experts\.([0-9]{1,9})\.(\w+)")  # pgs.experts.N.kept and so on

_IDS = ("general.uuid", "general.doi", "general.source.uuid", "general.source.doi")  # of the original, not of this file
_BASE_MODEL = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")


@dataclass(frozen=True)
class Lineage:
    """What the keys say. Layers are numbers in this file; ids of experts are those of the source.

    version: of the program that made the file. source_sha256, source_name: the hash of the source's header, its
    general.name. source_experts: of a layer of the source, None where an older version made the file. layers: the
    source's number of each layer, None where none was dropped. metric: what chose the experts. By layer: kept, ids of
    its experts, ascending; padded, how many experts of zeros follow them; merged, for each expert of the source the one
    that it is in, or DROPPED; scores, of all experts of the source. repaired: layers whose down projections are new.
    origin: where the source was itself cut, what the experts are in the first model of the chain.
    """

    version: str | None = None
    source_sha256: str | None = None
    source_name: str | None = None
    source_experts: int | None = None
    layers: tuple[int, ...] | None = None
    metric: str | None = None
    kept: Ids = field(default_factory=dict)
    padded: Mapping[int, int] = field(default_factory=dict)
    merged: Ids = field(default_factory=dict)
    scores: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    repaired: frozenset[int] = frozenset()
    origin: Descent | None = None

    # --- the keys ---------------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, metadata: Mapping[str, Value], *, strict: bool = False) -> Lineage:
        """What a file says. A list that somebody changed into something else is as good as missing, or, if strict, a
        BadFile."""

        def ids(key: str) -> tuple[int, ...] | None:
            value = metadata[key].value
            if isinstance(value, list) and all(type(i) is int for i in value):
                return tuple(value)
            if strict:
                raise BadFile("not an array of whole numbers", object=key)
            return None

        def number(key: str) -> int | None:
            value = metadata[key].value if key in metadata else None
            if value is None or (type(value) is int and 0 < value <= MAX_EXPERTS):
                return value
            if strict:
                raise BadFile("not a number of experts", object=key, found=f"{value!r:.80}")
            return None

        lists: dict[str, Ids] = {word: {} for word in ("kept", "merged", "origin", "origin_merged")}
        padded: dict[int, int] = {}
        scores: dict[int, tuple[float, ...]] = {}
        repaired: set[int] = set()
        for key, value in metadata.items():
            if (match := _OF_LAYER.fullmatch(key)) is None:
                continue
            layer, word = int(match[1]), match[2]
            if word in lists:
                if (numbers := ids(key)) is not None:
                    lists[word][layer] = numbers
            elif word == "padded" and type(value.value) is int and 0 < value.value <= MAX_EXPERTS:
                padded[layer] = value.value
            elif word == "scores" and value.type == "f64[]":
                scores[layer] = tuple(value.value)
            elif word == "repaired":
                repaired.add(layer)
        texts = {
            key: str(metadata[key].value) for key in (VERSION, SOURCE_SHA256, SOURCE_NAME, METRIC) if key in metadata
        }
        origin = None
        if ORIGIN_SHA256 in metadata:
            origin = Descent(
                str(metadata[ORIGIN_SHA256].value),
                number(ORIGIN_EXPERTS),
                ids(ORIGIN_LAYERS) if ORIGIN_LAYERS in metadata else None,
                lists["origin"],
                lists["origin_merged"],
            )
        return cls(
            version=texts.get(VERSION),
            source_sha256=texts.get(SOURCE_SHA256),
            source_name=texts.get(SOURCE_NAME),
            source_experts=number(SOURCE_EXPERTS),
            layers=ids(KEPT_LAYERS) if KEPT_LAYERS in metadata else None,
            metric=texts.get(METRIC),
            kept=lists["kept"],
            padded=padded,
            merged=lists["merged"],
            scores=scores,
            repaired=frozenset(repaired),
            origin=origin,
        )

    def write(self, metadata: dict[str, Value]) -> None:
        """Sets the keys of all that is known. Those that are there already keep their places."""
        metadata.update(self._keys())

    def _keys(self) -> Iterator[tuple[str, Value]]:
        for key, text in (
            (VERSION, self.version),
            (SOURCE_SHA256, self.source_sha256),
            (SOURCE_NAME, self.source_name),
        ):
            if text is not None:
                yield key, Value(text, "str")
        if self.source_experts is not None:
            yield SOURCE_EXPERTS, Value(self.source_experts, "u32")
        if self.layers is not None:
            yield KEPT_LAYERS, Value(list(self.layers), "u32[]")
        origin = Descent() if self.origin is None else self.origin
        if self.origin is not None:
            yield ORIGIN_SHA256, Value(origin.header_sha256, "str")
        if origin.experts is not None:
            yield ORIGIN_EXPERTS, Value(origin.experts, "u32")
        if origin.layers is not None:
            yield ORIGIN_LAYERS, Value(list(origin.layers), "u32[]")
        if self.metric is not None:
            yield METRIC, Value(self.metric, "str")
        others = {"merged": self.merged, "origin": origin.kept, "origin_merged": origin.merged}
        for layer in sorted({*self.kept, *self.padded, *self.scores, *self.repaired}.union(*others.values())):
            prefix = f"{_EXPERTS}{layer}."
            if layer in self.kept:
                yield prefix + "kept", Value(list(self.kept[layer]), "u32[]")
            if layer in self.padded:
                yield prefix + "padded", Value(self.padded[layer], "u32")
            for word, ids in others.items():
                if layer in ids:
                    yield prefix + word, Value(list(ids[layer]), "u32[]")
            if layer in self.repaired:
                yield prefix + "repaired", Value(True, "bool")
            if layer in self.scores:
                yield prefix + "scores", Value(list(self.scores[layer]), "f64[]")

    # --- what edits add ---------------------------------------------------------------------------------------------

    def after_cut(
        self,
        kept: Mapping[int, Slices],
        *,
        metric: str,
        scores: Mapping[int, Sequence[float]],
        repaired: Collection[int],
    ) -> Lineage:
        """After one more cut of experts. kept: ids as they are before it, None for experts of zeros; repaired: the
        layers that it repaired. Ids of a first cut are the source's; a second one counts in what the first one left."""
        cut = self.of_source.after_cut(kept)
        return replace(
            self,
            metric=metric if self.metric in (None, "", metric) else f"{self.metric}, {metric}",
            kept=cut.kept,
            merged=cut.merged,
            repaired=frozenset(repaired) | self.repaired & kept.keys(),
            scores={} if self.kept else {layer: tuple(scores[layer]) for layer in kept if layer in scores},
            padded={layer: n for layer, ids in kept.items() if (n := len(ids) - len(cut.kept[layer]))},
            origin=None if self.origin is None else self.origin.after_cut(kept),
        )

    def after_merge(
        self, groups: Mapping[int, Sequence[Sequence[int]]], experts: Mapping[int, int], before: Lineage | None = None
    ) -> Lineage:
        """After experts became one, of which the cut to the centroids is known: by layer, the members of each group,
        and how many experts there were, by the numbers that they had before. before: the lineage then."""
        before = Lineage() if before is None else before
        merged, origin = {**self.merged, **before.of_source.merge(groups, experts)}, self.origin
        if origin is not None and before.origin is not None:
            origin = replace(origin, merged={**origin.merged, **before.origin.merge(groups, experts)})
        return replace(self, merged=merged, origin=origin)

    # --- what the experts are ---------------------------------------------------------------------------------------

    @property
    def of_source(self) -> Descent:
        """What they are in the direct source. Files of older versions do not say how many it had, but for the lists
        that have an element for each."""
        experts = self.source_experts or next(map(len, (*self.scores.values(), *self.merged.values())), None)
        return Descent(self.source_sha256 or "", experts, self.layers, self.kept, self.merged)

    @property
    def of_origin(self) -> Descent:
        """What they are in the first model of the chain, as far as the lists can be that."""
        return (self.of_source if self.origin is None else self.origin).plausible()

    # --- a result beside its source ---------------------------------------------------------------------------------

    def since(self, source: Lineage) -> Lineage:
        """What happened between that file and this one. Lists that both have are of an earlier cut, whose experts and
        layers have the same numbers in both."""
        earlier = self.source_sha256 is not None and self.source_sha256 == source.source_sha256
        return replace(
            self,
            layers=None if earlier else self.layers,
            kept={} if earlier else self.kept,
            padded={} if earlier else self.padded,
            merged={} if earlier else self.merged,
            repaired=frozenset() if earlier else self.repaired,
        )

    def slices(self) -> dict[int, Slices]:
        """layer -> the id in the source of each expert, None for experts of zeros."""
        return {layer: (*ids, *(None,) * self.padded.get(layer, 0)) for layer, ids in self.kept.items()}

    def is_repaired(self, tensor: str) -> bool:
        """Its numbers are others than those of the source, on purpose."""
        return tensor.endswith(".ffn_down_exps.weight") and layer_of(tensor) in self.repaired

    def merged_slices(self, tensor: str) -> set[int]:
        """The experts of this tensor that were made of several of the source's."""
        layer = layer_of(tensor)
        if layer not in self.merged or not re.search(r"_exps\.(weight|bias)$", tensor):
            return set()
        return {expert for expert, n in Counter(self.merged[layer]).items() if n > 1 and expert != DROPPED}


def source_experts(metadata: Mapping[str, Value]) -> Ids:
    """layer of the source -> ids of its experts that a model kept, to cut something else as the source was cut.

    BadFile for lists that are not of whole numbers. BadPlan where nothing was cut, or where experts were merged.
    """
    lineage = Lineage.of(metadata, strict=True)
    layers = range(MAX_LAYERS) if lineage.layers is None else lineage.layers
    kept = {layers[layer]: ids for layer, ids in lineage.kept.items() if layer < len(layers)}
    if lineage.merged:
        raise BadPlan(
            "the model's experts were merged: how their neurons were matched is not in the file",
            hint="quantize with the importance matrix in the run that merges",
        )
    if not kept:
        raise BadPlan("this model does not say which experts it kept", expected=f"keys {_EXPERTS}N.kept")
    return kept


# --- what edits write down -------------------------------------------------------------------------------------------


def claim_source(model: Model, metadata: dict[str, Value]) -> None:
    """Writes down which source this was cut from, once for all edits of a plan. What the source says of its own source,
    and the ids of the original, go; the source becomes a base model."""
    lineage, begun = _so_far(model, metadata)
    if not begun:
        gone = (*_IDS, SOURCE_EXPERTS, KEPT_LAYERS)
        for key in [k for k in metadata if k in gone or k.startswith((_EXPERTS, _ORIGIN))]:
            del metadata[key]
        _add_base_model(model, metadata)
    lineage.write(metadata)


def _so_far(model: Model, metadata: Mapping[str, Value]) -> tuple[Lineage, bool]:
    """The lineage of a draft from this source, and whether its edits so far have written one. Before that the keys are
    the source's own, of which what its experts are in its origin goes on."""
    found = Lineage.of(metadata)
    if found.source_sha256 == model.header_sha256:
        return found, True
    experts, origin = model.metadata.get(f"{model.architecture}.expert_count"), found.of_origin
    start = Lineage(
        version=__version__,
        source_sha256=model.header_sha256,
        source_name=model.name,
        source_experts=experts if type(experts) is int and 0 < experts <= MAX_EXPERTS else None,
        origin=origin if origin.changed else None,
    )
    return start, False


def record_cut(
    model: Model,
    metadata: dict[str, Value],
    kept: Mapping[int, Slices],
    *,
    metric: str,
    scores: Mapping[int, Sequence[float]],
    repaired: Collection[int],
) -> None:
    """Writes down a cut of experts; arguments as in `Lineage.after_cut`."""
    claim_source(model, metadata)
    lineage = Lineage.of(metadata).after_cut(kept, metric=metric, scores=scores, repaired=repaired)
    for key in [k for k in metadata if k.startswith(_EXPERTS)]:
        del metadata[key]
    lineage.write(metadata)


def record_merge(
    model: Model,
    before: Mapping[str, Value],
    metadata: dict[str, Value],
    groups: Mapping[int, Sequence[Sequence[int]]],
    experts: Mapping[int, int],
) -> None:
    """Writes down, after the cut to the centroids, which experts became one. before: the metadata before that cut;
    groups and experts as in `Lineage.after_merge`."""
    Lineage.of(metadata).after_merge(groups, experts, _so_far(model, before)[0]).write(metadata)


def record_layers(model: Model, metadata: dict[str, Value], kept: Sequence[int]) -> None:
    """Writes down which layers stay, by their numbers in the source. A list of an earlier edit of the plan stands:
    `without_layers` has shortened it."""
    claim_source(model, metadata)
    metadata.setdefault(KEPT_LAYERS, Value(list(kept), "u32[]"))
    if ORIGIN_SHA256 in metadata:
        metadata.setdefault(ORIGIN_LAYERS, Value(list(kept), "u32[]"))


def without_layers(metadata: Mapping[str, Value], number: Callable[[int], int | None]) -> dict[str, Value]:
    """The metadata after layers are gone, every key in its old place. number: of a layer, what it is afterwards, or
    None if it is gone."""
    result: dict[str, Value] = {}
    for key, value in metadata.items():
        match = _OF_LAYER.fullmatch(key)
        if key in (KEPT_LAYERS, ORIGIN_LAYERS) and value.type.endswith("[]"):
            result[key] = like(value, [x for i, x in enumerate(value.value) if number(i) is not None])
        elif match is None:
            result[key] = value
        elif (layer := number(int(match[1]))) is not None:
            result[f"{_EXPERTS}{layer}.{match[2]}"] = value
    return result


def has_other_layers(metadata: Collection[str]) -> bool:
    """Whether the keys say that layers were dropped, so that the rest have other numbers than in the origin."""
    return KEPT_LAYERS in metadata or ORIGIN_LAYERS in metadata


def _add_base_model(model: Model, metadata: dict[str, Value]) -> None:
    """Appends the source to the base models, with what it says about itself."""
    source = model.metadata
    known = {
        word: source[key]
        for word in _BASE_MODEL
        if isinstance(source.get(key := f"general.{word}"), str) and source[key]
    }
    if not known:
        return
    key = "general.base_model.count"
    index = read_count(getter(metadata), key, 0)
    while any(k.startswith(f"general.base_model.{index}.") for k in metadata):  # more than the count says
        index += 1
    metadata[key] = like(metadata[key], index + 1) if key in metadata else Value(index + 1, "u32")
    for word, text in known.items():
        metadata[f"general.base_model.{index}.{word}"] = Value(text, "str")


# --- general.size_label ---------------------------------------------------------------------------------------------


def set_size_label(metadata: dict[str, Value], old: int, new: int, warnings: list[str]) -> None:
    """In "512x2.5B" the size is that of the shared weights and one expert: a cut leaves it as it is."""
    label = metadata.get("general.size_label")
    if label is not None and (match := re.fullmatch(rf"{old}(x.+)", str(label.value), re.DOTALL)):
        metadata["general.size_label"] = Value(f"{new}{match[1]}", "str")
    else:
        drop_size_label(metadata, warnings)


def drop_size_label(metadata: dict[str, Value], warnings: list[str]) -> None:
    if (label := metadata.pop("general.size_label", None)) is not None:
        warnings.append(f"general.size_label {label.value!r} is no longer true and is dropped")
