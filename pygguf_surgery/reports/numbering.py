"""Which layers and experts of a source those of a result are: its direct source, an earlier model of the chain, another
cut of the same origin, or one of these in other types."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..architecture.experts import expert_rule
from ..architecture.loader import MAX_LAYERS
from ..architecture.names import layer_of
from ..base.errors import BadPlan, SurgeryWarning
from ..files.lineage import Lineage
from ..files.model import Model
from ..files.subjects import subject_of
from ..plan_data.expressions import Slices
from ..plan_data.subject import DROPPED, Subject

Kept = Mapping[int, Slices]  # layer -> old expert ids, in the order of the result
Layers = Sequence[int | None] | None  # number in the source of each layer, None where it lacks it; None: the same
Experts = Mapping[int, frozenset[int]]  # layer of the result -> some of its experts

LACKS = "experts that the source lacks"
MERGED = "merged: experts made of several of the source's"


@dataclass(frozen=True)
class Numbering:
    """By layer of the result: kept, the source's id of each expert, None for experts of zeros; merged, the experts that
    are no single expert of the source, of which the id is the centroid's; absent, those that the source lacks, of which
    the id means nothing; repaired, the layers whose down projections are others on purpose."""

    layers: Layers = None
    kept: Kept = field(default_factory=dict)
    merged: Experts = field(default_factory=dict)
    absent: Experts = field(default_factory=dict)
    repaired: frozenset[int] = frozenset()

    def without_counterpart(self, tensor: str) -> dict[str, frozenset[int]]:
        """Why -> the experts of this tensor of the result that have none in the source."""
        layer, rule = layer_of(tensor), expert_rule(tensor)
        if layer is None or rule is None or rule.axis != "experts":
            return {}
        found = {LACKS: self.absent.get(layer, frozenset())}
        if "_exps." in tensor:  # of routers and their biases the centroid's row stays
            found[MERGED] = self.merged.get(layer, frozenset())
        return found

    def is_repaired(self, tensor: str) -> bool:
        return tensor.endswith(".ffn_down_exps.weight") and layer_of(tensor) in self.repaired


def numbering(source: Model, result: Model) -> Numbering:
    """What the keys of both say. BadPlan where they are not of one chain of cuts; a SurgeryWarning where only the
    numbers of experts and layers speak for it."""
    mine, theirs = Lineage.of(result.metadata.exact()), Lineage.of(source.metadata.exact())
    if mine.source_sha256 == source.header_sha256:
        return of_lineage(mine)
    if mine.source_sha256 is None:
        if theirs.of_origin.changed:
            raise BadPlan(
                "the source was cut, and the result does not say that it was",
                path=result.path,
                hint=f"give {source.path} second if it was made from {result.path}",
            )
        return of_lineage(mine)
    here, there = subject_of(result), subject_of(source)
    fault = here.fault(there)
    repaired = mine.repaired - theirs.repaired
    if fault is None and here.origin.changed == there.origin.changed:  # nothing was dropped in between
        return Numbering(repaired=repaired)
    known = there.origin.experts if there.origin.changed else there.experts
    if here.origin.experts and known and here.origin.experts != known:
        raise BadPlan(
            "the result was made from a model with another number of experts",
            path=result.path,
            found=here.origin.experts,
            expected=known,
        )
    origin = there.origin.header_sha256 if there.origin.changed else there.header_sha256
    if here.origin.header_sha256 != origin:
        warnings.warn(
            f"{result.path}: not made from {source.path} by its own account: layers and experts are paired by number",
            SurgeryWarning,
            stacklevel=3,
        )
    return _through_origin(here, there, result, repaired)


def of_lineage(lineage: Lineage) -> Numbering:
    """Of a result beside the source that its keys name."""
    merged = {
        layer: frozenset(expert for expert, n in Counter(ids).items() if n > 1 and expert != DROPPED)
        for layer, ids in lineage.merged.items()
    }
    return Numbering(lineage.layers, lineage.slices(), merged, repaired=lineage.repaired)


def _through_origin(of_result: Subject, of_source: Subject, result: Model, repaired: frozenset[int]) -> Numbering:
    """An expert of both is one that is made of the same experts of the origin."""
    here, there = of_result.origin, of_source.origin
    number = {old: new for new, old in enumerate(there.layers)} if there.layers is not None else None
    count = result.get("block_count")
    old_layers = (
        here.layers if here.layers is not None else range(min(count, MAX_LAYERS) if isinstance(count, int) else 0)
    )
    layers = tuple(old if number is None else number.get(old) for old in old_layers)
    kept: dict[int, Slices] = {}
    merged, absent = {}, {}
    for layer, theirs in enumerate(layers):
        contents = here.contents(layer)
        others = None if theirs is None else there.contents(theirs)
        if theirs is None or (contents is None and others is None):
            continue
        centroids = here.kept.get(layer, tuple(range(of_result.experts)))
        their_centroids = there.kept.get(theirs, tuple(range(of_source.experts)))
        contents = [(old,) for old in centroids] if contents is None else contents
        others = [(old,) for old in their_centroids] if others is None else others
        place = {old: i for i, old in enumerate(their_centroids)}
        ids = [place.get(old) for old in centroids]
        absent[layer] = frozenset(i for i, at in enumerate(ids) if at is None)
        merged[layer] = frozenset(i for i, at in enumerate(ids) if at is not None and contents[i] != others[at])
        pads = (None,) * max(0, of_result.experts - len(ids))
        kept[layer] = (*(0 if at is None else at for at in ids), *pads)
    return Numbering(None if layers == tuple(range(len(layers))) else layers, kept, merged, absent, repaired)
