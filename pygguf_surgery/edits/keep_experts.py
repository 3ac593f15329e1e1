"""Cutting experts: a pure function from output tensors and metadata to output tensors and metadata."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..architecture.experts import Layout, check_shape, expert_rule, layout, pad_value, padding_obstacle
from ..architecture.keys import NOT_MTP, getter, like, read_count
from ..architecture.loader import check_expert_count, check_groups, used_experts
from ..architecture.names import layer_of
from ..base.errors import BadFile, BadPlan, SurgeryError, Unsupported
from ..base.words import ranges
from ..files.lineage import record_cut, set_size_label
from ..files.subjects import subject_of
from ..plan_data.choices import parse_mtp
from ..plan_data.edits import KeepExperts
from ..plan_data.expressions import Copy, OutputTensor, Remap, Repaired, Slices, Take
from ..plan_data.outcome import Draft
from ..quant.types import tensor_type
from .layers import drop

if TYPE_CHECKING:
    from ..files.model import Model
    from ..files.repair import Repair
    from ..plan_data.choices import Ids
    from .context import Context


Kept = dict[int, Slices]  # layer -> ascending ids, then pads


def apply(draft: Draft, edit: KeepExperts, context: Context) -> Draft:
    """Keeps the experts that `edit` names in every MoE layer. Reads no tensor data and changes nothing in place.

    Ids are those of the draft, so a second cut counts in the experts that the first one left. What llama.cpp could not
    load, and what would change routing silently, becomes a blocker; nothing is raised.
    """
    out = draft.copy()
    repair = None
    if edit.repair is not None:
        try:
            repair = context.companions.repair(edit.repair)
        except SurgeryError as error:
            out.block(error)
    if repair is not None:
        try:
            out.warnings += check_repair(repair, context.model)
        except SurgeryError as error:  # its ids are those of another model: more of them would be wrong
            out.block(error)
            return out
    cut = _cut_experts(draft, edit, context.model, repair)
    cut.warnings[:0] = out.warnings
    cut.blockers[:0] = out.blockers  # that the repair cannot be read hides nothing else that is wrong
    return cut


def _cut_experts(draft: Draft, edit: KeepExperts, model: Model, repair: Repair | None) -> Draft:
    out = draft.copy()
    architecture = model.architecture
    try:
        parse_mtp(edit.mtp)
        dropped = _drop_mtp(architecture, out) if edit.mtp == "drop" else range(0)
        found = layout(architecture, [t.name for t in out.tensors], getter(out.metadata))
        if not found.layers:
            raise BadPlan("the model has no experts", object=architecture or None)
    except SurgeryError as error:
        out.block(error)
        return out
    out.blockers += [fault for t in out.tensors if (fault := check_shape(t.name, t.shape, found))]
    kept = _check_kept(architecture, edit, found, dropped, out)
    if out.blockers or all(len(ids) == found.experts for ids in kept.values()):
        return out
    _check_routing(architecture, found, kept, out)
    if out.blockers:
        return out
    uncut = out.tensors
    out.tensors = [_cut(t, architecture, found, kept, edit.order, out.blockers) for t in out.tensors]
    try:
        if edit.repair is not None and repair is not None:
            _check_repaired(kept, repair)
            out.tensors = [_repaired(before, after, repair) for before, after in zip(uncut, out.tensors, strict=True)]
        _set_metadata(model, architecture, kept, edit, found.mtp, out)
    except SurgeryError as error:
        out.block(error)
    return out


# --- what was asked for ---------------------------------------------------------------------------------------------


def _check_kept(architecture: str, edit: KeepExperts, found: Layout, dropped: range, out: Draft) -> Kept:
    """The ids per MoE layer as plain ints, padded where layers keep different numbers; every fault is a blocker."""
    kept: dict[int, tuple[int, ...]] = {}
    blockers = out.blockers
    for layer, ids in edit.kept.items():
        if layer in found.layers:
            kept[layer] = _check_ids(layer, ids, found.experts, blockers)
        elif layer not in dropped:  # a ranking of the whole model names those too
            blockers.append(
                BadPlan(
                    "experts named for a layer that has none",
                    object=f"blk.{layer}",
                    hint=f"layers with experts: {ranges(found.layers)}",
                )
            )
    for layer in found.layers:
        if layer not in kept:
            mtp = layer in found.mtp
            blockers.append(
                BadPlan(
                    "no experts named for this " + ("MTP layer" if mtp else "layer"),
                    object=f"blk.{layer}",
                    hint='or drop it with mtp="drop"' if mtp else None,
                )
            )
    counts = sorted({len(ids) for ids in kept.values()})
    if len(counts) > 1 and not blockers:
        numbers = ", ".join(f"{n} in {ranges(k for k, v in kept.items() if len(v) == n)}" for n in counts)
        types = {t.name: t.source_type for t in out.tensors}
        if reason := padding_obstacle(architecture, found, kept, types, getter(out.metadata)):
            blockers.append(
                Unsupported(
                    "a different number of experts per layer",
                    object="keep_experts",
                    found=numbers,
                    hint="llama.cpp has one expert_count for all layers, and experts that are never picked cannot "
                    f"make up for it: {reason}; keep the same number in each",
                )
            )
        else:
            out.warn(
                f"experts per layer: {numbers}; made up to {counts[-1]} in each by experts of zeros that "
                "the router never picks, which saves no bytes"
            )
            return {layer: (*kept[layer], *(None,) * (counts[-1] - len(kept[layer]))) for layer in found.layers}
    return {layer: kept[layer] for layer in found.layers if layer in kept}


def _check_ids(layer: int, ids: Iterable[Any], experts: int, blockers: list[SurgeryError]) -> tuple[int, ...]:
    name = f"blk.{layer}.ffn_down_exps.weight"
    try:
        plain = tuple(operator.index(i) for i in ids)
    except TypeError:
        blockers.append(BadPlan("an expert id is a whole number", object=name, found=repr(ids)[:80]))
        return ()
    problem = None
    if not plain:
        problem = "no expert is kept"
    elif outside := [i for i in plain if not 0 <= i < experts]:
        problem = f"expert {outside[0]} out of range (the tensor has {experts}: 0..{experts - 1})"
    elif twice := [i for i, n in Counter(plain).items() if n > 1]:
        problem = f"expert {twice[0]} named twice"
    elif list(plain) != sorted(plain):
        problem = "experts not in ascending order"
    if problem:
        blockers.append(BadPlan(problem, object=name))
    return plain


# --- what llama.cpp's loader and router need ------------------------------------------------------------------------


def _check_routing(architecture: str, found: Layout, kept: Kept, out: Draft) -> None:
    n = len(kept[found.layers[0]])
    real = {layer: tuple(i for i in ids if i is not None) for layer, ids in kept.items()}
    least = min(map(len, real.values()))
    get = getter(out.metadata)
    if fault := check_expert_count(architecture, n):
        out.block(fault)
    try:
        used = used_experts(get, f"{architecture}.expert_used_count")
        if least < used:
            out.block(
                BadPlan(
                    f"{least} experts kept and {used} used per token",
                    object=f"{architecture}.expert_used_count",
                    hint=f"keep at least {used}; the number used is never changed silently",
                )
            )
        if found.groups:
            out.blockers += check_groups(architecture, found, real, n, used, get)
    except SurgeryError as error:
        out.block(error)
    if found.chunk > 1:
        _check_chunks(found, real, out.blockers)
    if not ((n & (n - 1) == 0 and n <= 512) or n in (288, 576)):
        out.warn(
            f"{n} experts: CUDA's fused top-k router is lost; it runs only for a power of two up to "
            "512, for 288 and for 576"
        )


def _check_chunks(found: Layout, kept: Ids, blockers: list[SurgeryError]) -> None:
    for layer, ids in kept.items():
        partial = next((g for g, n in Counter(i // found.chunk for i in ids).items() if n != found.chunk), None)
        if partial is not None:
            first = partial * found.chunk
            blockers.append(
                BadPlan(
                    f"experts {first}..{first + found.chunk - 1} share one chunk expert and only some of them are kept",
                    object=f"blk.{layer}.ffn_down_chexps.weight",
                    hint="keep or drop them together",
                )
            )


# --- tensors --------------------------------------------------------------------------------------------------------


def _cut(
    tensor: OutputTensor,
    architecture: str,
    found: Layout,
    kept: Kept,
    order: Mapping[int, tuple[int, ...]],
    blockers: list[SurgeryError],
) -> OutputTensor:
    rule, layer = expert_rule(tensor.name), layer_of(tensor.name)
    if rule is None or layer not in kept or rule.axis == "none":
        return tensor
    ids = kept[layer]
    try:
        if rule.axis == "values":
            best_first = order.get(layer, ids)
            return replace(tensor, expression=_remap(tensor, ids, best_first, found.experts), notes=list(tensor.notes))
        if rule.axis == "groups":
            ids = tuple(None if i is None else i // found.chunk for i in ids[:: found.chunk])
        if len(tensor.shape) == 1 and tensor_type(tensor.source_type).block != 1:
            raise Unsupported(
                "an expert is not whole blocks of this type", object=tensor.name, found=tensor.source_type
            )
        shape = (len(ids), *tensor.shape[1:])
        expression = tensor.expression.take(ids)
        if expression is None:
            raise Unsupported("experts that can be neither cut nor padded", object=tensor.name)
        if None in ids and isinstance(expression, Take):
            expression = replace(expression, fill=pad_value(architecture, tensor.name))
        return replace(tensor, shape=shape, expression=expression, notes=list(tensor.notes))
    except SurgeryError as error:
        blockers.append(error)
        return tensor


def check_repair(repair: Repair, model: Model) -> list[str]:
    """BadPlan for the repair of another model, or of another cut of it. What to say of one that was made from another
    file of the model, such as one in other types."""
    if repair.header_sha256 == model.header_sha256:
        return []
    of, subject = repair.of, subject_of(model)
    if of is not None:
        of.check_same(subject, "the repair is", path=repair.path)
        return [f"the repair is of another file ({of.name or 'no name'}) of the same shape"]
    if subject.origin.changed:
        raise BadPlan(
            "the repair is of another file, and does not say of which cut",
            path=repair.path,
            object="repair",
            found=repair.header_sha256[:16],
            expected=model.header_sha256[:16],
            hint="make it again from this model",
        )
    return ["the repair is of another file, and does not say of which model"]


def _check_repaired(kept: Kept, repair: Repair) -> None:
    for layer, ids in kept.items():
        if repair.kept.get(layer) != ids:
            raise BadPlan(
                "the repair is for other experts",
                path=repair.path,
                object=f"blk.{layer}",
                hint="keep those that it was made for: prune --repair without --keep and --by does",
            )


def _repaired(before: OutputTensor, after: OutputTensor, repair: Repair) -> OutputTensor:
    """The tensor of the repair in place of what the cut left, decoded and encoded again if its type is not that of the
    source."""
    tensor = repair.tensors.get(after.name)
    if tensor is None:
        return after
    if before.expression != Copy(before.name):  # its numbers of layers and experts are those of the source
        raise BadPlan("a repair goes with the first cut", path=repair.path, object=after.name)
    if tensor.shape != after.shape:
        raise BadPlan(
            "the repair does not fit",
            path=repair.path,
            object=after.name,
            found=list(tensor.shape),
            expected=list(after.shape),
        )
    indices = tuple(i for i in after.expression.slices or () if isinstance(i, int))  # a plain cut, without pads
    facts = tensor_type(after.type)
    type, notes = after.type, list(after.notes)
    if not facts.encodes or facts.needs_importance:  # a quantize() of the plan may still say otherwise
        type = tensor.type
        notes.append(f"repaired, so {type}: {after.type} cannot be made without an importance matrix")
    expression = Repaired(after.name, tuple(range(len(indices))), indices)
    return replace(after, type=type, source_type=tensor.type, expression=expression, notes=notes)


def _remap(tensor: OutputTensor, ids: Slices, best_first: Slices, experts: int) -> Remap:
    """An id that is gone becomes the best kept expert that its column lacks."""
    if tensor.source_type != "I32":
        raise BadFile("not a table of expert ids", object=tensor.name, found=tensor.source_type, expected="I32")
    if {*best_first} != {*ids} or len(best_first) != len(ids):
        raise BadPlan("the order of the kept experts names others than those kept", object=tensor.name)
    new = {old: i for i, old in enumerate(ids)}
    table = tuple(new.get(old) for old in range(experts))
    substitutes = tuple(new[old] for old in best_first)
    match tensor.expression:
        case Copy(ref):
            return Remap(ref, table, substitutes)
        case Remap(ref, first, _):
            return Remap(ref, tuple(None if i is None else table[i] for i in first), substitutes)
    raise Unsupported("expert ids that are not copied", object=tensor.name)


# --- MTP layers -----------------------------------------------------------------------------------------------------


def _drop_mtp(architecture: str, out: Draft) -> range:
    """Removes the last nextn_predict_layers layers as if the model had been converted without them."""
    get = getter(out.metadata)
    key = f"{architecture}.nextn_predict_layers"
    if architecture in NOT_MTP:
        raise Unsupported("this architecture has no MTP layers", object=key)
    nextn = read_count(get, key, 0)
    if not nextn:
        out.warn("the model has no MTP layers to drop")
        return range(0)
    layers = read_count(get, f"{architecture}.block_count")
    if nextn >= layers:
        raise BadPlan("nothing is left without the MTP layers", object=key, found=nextn, expected=f"less than {layers}")
    dropped = range(layers - nextn, layers)
    gone = {t.name for t in out.tensors if layer_of(t.name) in dropped}
    for layer in sorted({layer for name in gone if (layer := layer_of(name)) is not None}):
        if not any(name.startswith(f"blk.{layer}.nextn.") for name in gone):
            raise Unsupported("not an MTP layer: it has no nextn tensors", object=f"blk.{layer}")
    drop(architecture, out, dropped)
    return dropped


# --- metadata -------------------------------------------------------------------------------------------------------


def _set_metadata(
    model: Model, architecture: str, kept: Kept, edit: KeepExperts, mtp: Collection[int], out: Draft
) -> None:
    metadata, old = out.metadata, read_count(getter(out.metadata), f"{architecture}.expert_count")
    n = len(next(iter(kept.values())))
    metadata[f"{architecture}.expert_count"] = like(metadata[f"{architecture}.expert_count"], n)
    set_size_label(metadata, old, n, out.warnings)
    repaired = [layer for layer in kept if layer not in mtp] if edit.repair is not None else []
    record_cut(model, metadata, kept, metric=edit.metric, scores=edit.scores, repaired=repaired)
