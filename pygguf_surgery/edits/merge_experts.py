"""Merging experts: a pure function from output tensors and metadata to output tensors and metadata."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from ..architecture.experts import NEURON_AXES, has_mean
from ..architecture.names import layer_of, local_name
from ..base.errors import BadPlan, SurgeryError, Unsupported
from ..files.lineage import record_merge
from ..plan_data.edits import KeepExperts, MergeExperts
from ..plan_data.expressions import Copy, Group, Merge, OutputTensor, Take
from ..plan_data.outcome import Draft
from . import keep_experts

if TYPE_CHECKING:
    from .context import Context


def apply(draft: Draft, edit: MergeExperts, context: Context) -> Draft:
    """Makes one expert of each group of `edit`: weights are averaged, the router keeps the centroid's row and bias.
    Reads no tensor data and changes nothing in place; what cannot be done becomes a blocker."""
    neurons: dict[int, int] = {}
    experts: dict[int, int] = {}
    for tensor in draft.tensors:
        layer = layer_of(tensor.name)
        if layer is not None and tensor.name.endswith(".ffn_down_exps.weight"):
            neurons[layer], experts[layer] = tensor.shape[-1], tensor.shape[0]
    out = draft.copy()
    for layer, groups in edit.groups.items():
        out.blockers += _check_groups(layer, groups, experts.get(layer, 0), neurons.get(layer, 0))
    if out.blockers:
        return out
    centroids = {layer: tuple(group.members[0] for group in groups) for layer, groups in edit.groups.items()}
    out = keep_experts.apply(draft, KeepExperts(centroids, edit.metric, edit.mtp), context)
    if out.blockers:
        return out
    before = {t.name: t for t in draft.tensors}
    merged = {layer for layer, groups in edit.groups.items() if any(len(g.members) > 1 for g in groups)}
    for i, tensor in enumerate(out.tensors):
        layer = layer_of(tensor.name)
        if layer not in merged:
            continue
        try:
            out.tensors[i] = _merged(before[tensor.name], tensor, edit.groups[layer])
        except SurgeryError as error:
            out.block(error)
    if left := merged & {layer_of(t.name) for t in out.tensors}:
        members = {layer: [group.members for group in edit.groups[layer]] for layer in left}
        record_merge(context.model, draft.metadata, out.metadata, members, experts)
    return out


def _check_groups(layer: int, groups: Iterable[Group], experts: int, neurons: int) -> list[SurgeryError]:
    """What is wrong with the groups of one layer, the first of each kind."""

    def fail(problem: str, found: object = None) -> list[SurgeryError]:
        return [BadPlan(problem, object=f"blk.{layer}.ffn_down_exps.weight", found=found)]

    seen: set[int] = set()
    last = -1
    for group in groups:
        if not group.members or not len(group.members) == len(group.weights) == len(group.orders):
            return fail("a group without members, or not one weight and order for each", group.members)
        if group.members[0] <= last:
            return fail("centroids not in ascending order", group.members[0])
        last = group.members[0]
        for member in group.members:
            if not 0 <= member < experts:
                return fail(f"expert {member} out of range (the tensor has {experts}: 0..{experts - 1})")
            if member in seen:
                return fail(f"expert {member} in two groups")
            seen.add(member)
        if not all(math.isfinite(w) and w >= 0 for w in group.weights) or abs(math.fsum(group.weights) - 1) > 1e-6:
            return fail("weights that are not shares of one", group.weights[:8])
        if group.orders[0]:
            return fail("the neurons of a centroid stay in their order")
        for order in group.orders:
            if order and sorted(memoryview(order).cast("H") if len(order) % 2 == 0 else ()) != list(range(neurons)):
                return fail(f"an order that is not a permutation of the {neurons} neurons")
    return []


def _merged(before: OutputTensor, after: OutputTensor, groups: tuple[Group, ...]) -> OutputTensor:
    if not has_mean(after.name):
        raise Unsupported(
            "experts with this tensor cannot be merged",
            object=after.name,
            hint="drop experts instead (prune), or merge the 16-bit model",
        )
    axis = NEURON_AXES.get(local_name(after.name))
    if axis is None:
        return after  # router and selection bias: the centroid's
    match before.expression:
        case Copy(ref):
            ids = None
        case Take(ref, ids, _):
            pass
        case _:
            raise Unsupported("experts that are not plain copies cannot be merged", object=after.name)
    if ids is not None:
        real = [i for i in ids if i is not None]
        if len(real) < len(ids):
            raise Unsupported("layers with padding experts cannot be merged", object=after.name)
        groups = tuple(replace(g, members=tuple(real[m] for m in g.members)) for g in groups)
    return replace(after, expression=Merge(ref, groups, axis), notes=list(after.notes))
