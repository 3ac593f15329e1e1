"""Cutting experts: a pure function from output tensors and metadata to output tensors and metadata."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import _core
from .._core import Value
from ..blocks import Outcome, claim_source, drop, drop_size_label, getter, like, ranges
from ..errors import BadFile, BadPlan, SurgeryError, Unsupported
from ..model import type_facts
from ..plan_data import PAD, Copy, Expression, FromRepair, KeepExperts, Merge, OutputTensor, Remap, Stack, Take
from . import roles
from .rank import nearest
from .roles import Layout

if TYPE_CHECKING:
    from ..model import Model
    from .repair_file import Repair

MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS
DROPPED = 0xFFFFFFFF  # in pgs.experts.LAYER.merged: in no group
Kept = dict[int, tuple[int, ...]]


def apply(model: Model, tensors: list[OutputTensor], metadata: dict[str, Value], edit: KeepExperts,
          repair: Repair | None = None) -> Outcome:
    """Keeps the experts that `edit` names in every MoE block. Reads no tensor data and changes nothing in place. repair:
    that of the edit, open, or None where it has none or that could not be opened.

    Ids are those of `tensors`, so a second cut counts in the experts that the first one left. What llama.cpp could not
    load, and what would change routing silently, becomes a blocker; nothing is raised.
    """
    out = Outcome(list(tensors), dict(metadata))
    architecture = model.architecture
    try:
        if edit.mtp not in ("keep", "drop"):
            raise BadPlan("no such choice", object="mtp", found=repr(edit.mtp), expected='"keep" or "drop"')
        dropped = _drop_mtp(architecture, out) if edit.mtp == "drop" else range(0)
        found = roles.layout(architecture, [t.name for t in out.tensors], getter(out.metadata))
        if not found.layers:
            raise BadPlan("the model has no experts", object=architecture or None)
    except SurgeryError as error:
        out.blockers.append(error)
        return out
    out.blockers += [error for t in out.tensors if (error := roles.check_shape(t.name, t.shape, found))]
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
            _check_repair(model, kept, repair)
            out.tensors = [_repaired(before, after, repair) for before, after in zip(uncut, out.tensors)]
        _set_metadata(model, architecture, kept, edit, found.mtp, out)
    except SurgeryError as error:
        out.blockers.append(error)
    return out


# --- what was asked for ---------------------------------------------------------------------------------------------

def _check_kept(architecture: str, edit: KeepExperts, found: Layout, dropped: range, out: Outcome) -> Kept:
    """The ids per MoE layer as plain ints, padded where layers keep different numbers; every fault is a blocker."""
    kept: Kept = {}
    blockers = out.blockers
    for layer, ids in edit.kept.items():
        if layer in found.layers:
            kept[layer] = _check_ids(layer, ids, found.experts, blockers)
        elif layer not in dropped:  # a ranking of the whole model names those too
            blockers.append(BadPlan("experts named for a layer that has none", object=f"blk.{layer}",
                                    hint=f"layers with experts: {ranges(found.layers)}"))
    for layer in found.layers:
        if layer not in kept:
            mtp = layer in found.mtp
            blockers.append(BadPlan("no experts named for this " + ("MTP block" if mtp else "layer"),
                                    object=f"blk.{layer}", hint='or drop it with mtp="drop"' if mtp else None))
    counts = sorted({len(ids) for ids in kept.values()})
    if len(counts) > 1 and not blockers:
        numbers = ", ".join(f"{n} in {ranges(k for k, v in kept.items() if len(v) == n)}" for n in counts)
        if reason := _unpaddable(architecture, found, kept, out):
            blockers.append(Unsupported(
                "a different number of experts per layer", object="keep_experts", found=numbers,
                hint="llama.cpp has one expert_count for all layers, and experts that are never picked cannot make up "
                     f"for it: {reason}; keep the same number in each"))
        else:
            out.warnings.append(f"experts per layer: {numbers}; made up to {counts[-1]} in each by experts of zeros that "
                                "the router never picks, which saves no bytes")
            kept = {layer: ids + (PAD,) * (counts[-1] - len(ids)) for layer, ids in kept.items()}
    return {layer: kept[layer] for layer in found.layers if layer in kept}


# {architecture}.expert_gating_func, llama.cpp's llama_expert_gating_func_type
_SOFTMAX, _SIGMOID, _SQRT_SOFTPLUS = 1, 2, 4
_NEVER_PICKED = -3e4  # finite, as llama.cpp's check of tensors wants it
_SELECTION_BIASES = ("exp_probs_b.bias", "exp_probs_b", "exp_probs_b_vl.bias")


def _unpaddable(architecture: str, found: Layout, kept: Kept, out: Outcome) -> str | None:
    """Why experts of zeros would change what the model computes; None where they do not: a bias keeps the router from
    them, and a zero logit does not enter the gates of the others."""
    tensors = {t.name: t for t in out.tensors}
    get = getter(out.metadata)
    if found.groups > 1 or found.chunk > 1:
        return "the router picks groups" if found.groups > 1 else "experts share chunk experts"
    if any(name.endswith(".ffn_gate_tid2eid.weight") for name in tensors):
        return "experts are looked up by token"
    if architecture != "gpt-oss":  # whose router bias is added to the logits, and the softmax is over those picked
        gate = get(f"{architecture}.expert_gating_func")
        if gate == _SOFTMAX and not get(f"{architecture}.expert_weights_norm"):
            return "the softmax over all experts is not renormalised"
        if gate not in (_SOFTMAX, _SIGMOID, _SQRT_SOFTPLUS):
            return "the file does not say how gates are computed"
    for layer in kept:
        names = [f"blk.{layer}.{bias}" for bias in _selection_biases(architecture)]
        biases = [tensors[name] for name in names if name in tensors]
        if not biases:
            return f"layer {layer} has no selection bias"
        if any(bias.source_type != "F32" for bias in biases):
            return f"the selection bias of layer {layer} is not F32"
    return None


def _selection_biases(architecture: str) -> tuple[str, ...]:
    return ("ffn_gate_inp.bias",) if architecture == "gpt-oss" else _SELECTION_BIASES


def pad_value(architecture: str, name: str) -> float:
    """What the padding experts of this tensor hold."""
    return _NEVER_PICKED if name.split(".", 2)[2] in _selection_biases(architecture) else 0.0


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

def _check_routing(architecture: str, found: Layout, kept: Kept, out: Outcome) -> None:
    n = len(kept[found.layers[0]])
    least = min(sum(i != PAD for i in ids) for ids in kept.values())
    get = getter(out.metadata)
    if n > MAX_EXPERTS:
        out.blockers.append(Unsupported("more experts than llama.cpp loads", object=f"{architecture}.expert_count",
                                        found=n, expected=f"at most {MAX_EXPERTS}"))
    try:
        used = _used(get, f"{architecture}.expert_used_count")
        if least < used:
            out.blockers.append(BadPlan(f"{least} experts kept and {used} used per token",
                                        object=f"{architecture}.expert_used_count",
                                        hint=f"keep at least {used}; the number used is never changed silently"))
        if found.groups:
            _check_groups(architecture, found, kept, n, used, out.blockers, get)
    except SurgeryError as error:
        out.blockers.append(error)
    if found.chunk > 1:
        _check_chunks(architecture, found, kept, out.blockers)
    if not (n & (n - 1) == 0 and n <= 512 or n in (288, 576)):
        out.warnings.append(f"{n} experts: CUDA's fused top-k router is lost; it runs only for a power of two up to "
                            "512, for 288 and for 576")


# Keys of an architecture that llama.cpp's loader checks against each other (llama-model.cpp, load_hparams).
NUMBERS = ("block_count", "nextn_predict_layers", "expert_count", "expert_used_count", "expert_group_count",
           "expert_group_used_count")


def check_numbers(architecture: str, metadata: dict[str, Value]) -> list[SurgeryError]:
    """Which of these numbers, as they are, llama.cpp's loader or its router cannot take."""
    found: list[SurgeryError] = []
    get = getter(metadata)
    try:
        blocks, nextn = (roles.count(get, f"{architecture}.{name}", 0) for name in NUMBERS[:2])
        if nextn > blocks:
            found.append(BadPlan("more MTP blocks than blocks", object=f"{architecture}.nextn_predict_layers",
                                 found=nextn, expected=f"at most {blocks}"))
        experts = roles.count(get, f"{architecture}.expert_count", 0)
        key = f"{architecture}.expert_used_count"
        if not experts and get(key) in (None, 0):
            return found
        if experts > MAX_EXPERTS:
            found.append(Unsupported("more experts than llama.cpp loads", object=f"{architecture}.expert_count",
                                     found=experts, expected=f"at most {MAX_EXPERTS}"))
        used = _used(get, key)
        if used > experts:
            found.append(BadPlan("more experts used than there are", object=key, found=used,
                                 expected=f"at most {experts}"))
        groups = roles.count(get, f"{architecture}.expert_group_count", 0)
        if groups:
            _check_groups(architecture, Layout((), (), experts, groups, 1), {}, experts, used, found, get)
    except SurgeryError as error:
        found.append(error)
    return found


def _used(get: Callable[[str], Any], key: str) -> int:
    """The most experts per token of any layer. The value is one number or one per block (0 in dense ones)."""
    value = get(key)
    numbers = value if isinstance(value, list) else [value]
    used = max((roles.count(lambda _, x=x: x, key) for x in numbers), default=0)
    if used < 1:
        raise BadFile("no expert is used", object=key, found=value)
    return used


def _check_groups(architecture: str, found: Layout, kept: Kept, n: int, used: int, blockers: list[SurgeryError],
                  get: Callable[[str], Any]) -> None:
    """A group is a contiguous range of ids; the router first picks group_used groups, by their two best experts."""
    key, groups = f"{architecture}.expert_group_count", found.groups
    if groups == 1:
        if n == 1:
            blockers.append(BadPlan("as many groups as experts", object=key, found=1, expected="fewer groups"))
        return
    key_used = f"{architecture}.expert_group_used_count"
    per_group = n // groups
    if n % groups:
        blockers.append(BadPlan(f"{n} experts do not divide into {groups} groups", object=key,
                                hint=f"keep {nearest(n, groups, found.experts)}"))
        return
    group_used = roles.count(get, key_used)
    if not 0 < group_used < groups:
        raise BadFile("llama.cpp does not load this number of groups", object=key_used, found=group_used,
                      expected=f"1..{groups - 1}")
    if per_group < 2:
        blockers.append(BadPlan(f"{per_group} expert per group", object=key,
                                hint=f"a group is chosen by its two best experts: keep at least {2 * groups}"))
    if group_used * per_group < used:
        need = -(-used // group_used) * groups
        blockers.append(BadPlan(f"{group_used} groups of {per_group} experts are fewer than the {used} used per token",
                                object=key_used, hint=f"keep at least {need}"))
    size = found.experts // groups
    for layer, ids in kept.items():
        counts = Counter(i // size for i in ids)
        uneven = next((g for g in range(groups) if counts[g] != per_group), None)
        if uneven is not None:
            blockers.append(BadPlan(
                f"{counts[uneven]} experts kept in group {uneven} (ids {uneven * size}..{uneven * size + size - 1})",
                object=f"blk.{layer}.ffn_down_exps.weight", expected=per_group,
                hint=f"keep the same number in each of the {groups} groups, or routing is re-partitioned"))


def _check_chunks(architecture: str, found: Layout, kept: Kept, blockers: list[SurgeryError]) -> None:
    for layer, ids in kept.items():
        partial = next((g for g, n in Counter(i // found.chunk for i in ids).items() if n != found.chunk), None)
        if partial is not None:
            first = partial * found.chunk
            blockers.append(BadPlan(
                f"experts {first}..{first + found.chunk - 1} share one chunk expert and only some of them are kept",
                object=f"blk.{layer}.ffn_down_chexps.weight", hint="keep or drop them together"))


# --- tensors --------------------------------------------------------------------------------------------------------

def _cut(tensor: OutputTensor, architecture: str, found: Layout, kept: Kept, order: Kept,
         blockers: list[SurgeryError]) -> OutputTensor:
    rule, layer = roles.expert_rule(tensor.name), roles.layer_of(tensor.name)
    if rule is None or layer not in kept or rule.axis == "none":
        return tensor
    ids = kept[layer]
    try:
        if rule.axis == "values":
            best_first = order.get(layer, ids)
            return replace(tensor, expression=_remap(tensor, ids, best_first, found.experts), notes=list(tensor.notes))
        if rule.axis == "groups":
            ids = tuple(i // found.chunk for i in ids[::found.chunk])
        if len(tensor.shape) == 1 and _block(tensor.source_type) != 1:
            raise Unsupported("an expert is no whole block of this type", object=tensor.name, found=tensor.source_type)
        shape = (len(ids), *tensor.shape[1:])
        expression = _take(tensor, ids)
        if PAD in ids and isinstance(expression, Take):
            expression = replace(expression, fill=pad_value(architecture, tensor.name))
        return replace(tensor, shape=shape, expression=expression, notes=list(tensor.notes))
    except SurgeryError as error:
        blockers.append(error)
        return tensor


def _take(tensor: OutputTensor, ids: tuple[int, ...]) -> Expression:
    match tensor.expression:
        case Copy(ref):
            return Take(ref, ids)
        case Take(ref, indices, fill):
            return Take(ref, tuple(PAD if i == PAD else indices[i] for i in ids), fill)
        case Stack(refs) if PAD not in ids:
            return Stack(tuple(refs[i] for i in ids))
        case FromRepair(ref, rows, indices) if PAD not in ids:
            return FromRepair(ref, tuple(rows[i] for i in ids), tuple(indices[i] for i in ids))
        case Merge(ref, groups, axis) if PAD not in ids:
            return Merge(ref, tuple(groups[i] for i in ids), axis)
    raise Unsupported("experts that can be neither cut nor padded", object=tensor.name)


def _check_repair(model: Model, kept: Kept, repair: Repair) -> None:
    if repair.header_sha256 != model.header_sha256:
        raise BadPlan("the repair is of another file", path=repair.path, object="repair",
                      found=repair.header_sha256[:16], expected=model.header_sha256[:16])
    for layer, ids in kept.items():
        if repair.kept.get(layer) != ids:
            raise BadPlan("the repair is for other experts", path=repair.path, object=f"blk.{layer}",
                          hint="keep those that it was made for: prune --repair without --keep and --by does")


def _repaired(before: OutputTensor, after: OutputTensor, repair: Repair) -> OutputTensor:
    """The tensor of the repair in place of what the cut left, decoded and encoded again if its type is not that of the
    source."""
    tensor = repair.tensors.get(after.name)
    if tensor is None:
        return after
    if before.expression != Copy(before.name):  # its numbers of layers and experts are those of the source
        raise BadPlan("a repair goes with the first cut", path=repair.path, object=after.name)
    if tensor.shape != after.shape:
        raise BadPlan("the repair does not fit", path=repair.path, object=after.name, found=list(tensor.shape),
                      expected=list(after.shape))
    facts = type_facts()[after.type]
    type, notes = after.type, list(after.notes)
    if not facts["encodes"] or facts["needs_importance"]:  # a quantize() of the plan may still say otherwise
        type = tensor.type
        notes.append(f"repaired, so {type}: {after.type} cannot be made without an importance matrix")
    expression = FromRepair(after.name, tuple(range(len(repair.kept[roles.layer_of(after.name)]))),
                            after.expression.indices)
    return replace(after, type=type, source_type=tensor.type, expression=expression, notes=notes)


def _remap(tensor: OutputTensor, ids: tuple[int, ...], best_first: tuple[int, ...], experts: int) -> Remap:
    """An id that is gone becomes the best kept expert that its column lacks."""
    if tensor.source_type != "I32":
        raise BadFile("not a table of expert ids", object=tensor.name, found=tensor.source_type, expected="I32")
    if sorted(best_first) != list(ids):
        raise BadPlan("the order of the kept experts names others than those kept", object=tensor.name)
    new = {old: i for i, old in enumerate(ids)}
    table = tuple(new.get(old, -1) for old in range(experts))
    substitutes = tuple(new[old] for old in best_first)
    match tensor.expression:
        case Copy(ref):
            return Remap(ref, table, substitutes)
        case Remap(ref, first, _):
            return Remap(ref, tuple(-1 if i < 0 else table[i] for i in first), substitutes)
    raise Unsupported("expert ids that are not copied", object=tensor.name)


def _block(type: str) -> int:
    return next(facts["block"] for facts in _core.types() if facts["name"] == type)


# --- MTP blocks -----------------------------------------------------------------------------------------------------

def _drop_mtp(architecture: str, out: Outcome) -> range:
    """Removes the last nextn_predict_layers blocks as if the model had been converted without them."""
    get = getter(out.metadata)
    key = f"{architecture}.nextn_predict_layers"
    if architecture in roles.NOT_MTP:
        raise Unsupported("this architecture has no MTP blocks", object=key)
    nextn = roles.count(get, key, 0)
    if not nextn:
        out.warnings.append("the model has no MTP blocks to drop")
        return range(0)
    blocks = roles.count(get, f"{architecture}.block_count")
    if nextn >= blocks:
        raise BadPlan("nothing is left without the MTP blocks", object=key, found=nextn, expected=f"less than {blocks}")
    dropped = range(blocks - nextn, blocks)
    gone = {t.name for t in out.tensors if roles.layer_of(t.name) in dropped}
    for layer in sorted({roles.layer_of(name) for name in gone}):
        if not any(name.startswith(f"blk.{layer}.nextn.") for name in gone):
            raise Unsupported("not an MTP block: it has no nextn tensors", object=f"blk.{layer}")
    drop(architecture, out, dropped)
    return dropped


# --- metadata -------------------------------------------------------------------------------------------------------

def _set_metadata(model: Model, architecture: str, kept: Kept, edit: KeepExperts, mtp: Collection[int],
                  out: Outcome) -> None:
    metric = edit.metric
    metadata, old = out.metadata, roles.count(getter(out.metadata), f"{architecture}.expert_count")
    n = len(next(iter(kept.values())))
    metadata[f"{architecture}.expert_count"] = like(metadata[f"{architecture}.expert_count"], n)
    _set_size_label(metadata, old, n, out.warnings)
    again = claim_source(model, metadata)  # True: a second cut in one plan
    earlier = {layer: metadata[key].value for layer in kept if (key := f"pgs.experts.{layer}.kept") in metadata}
    if again and (first := metadata.get("pgs.experts.metric")) and first.value != metric:
        metric = f"{first.value}, {metric}"
    merged = {layer: metadata[key].value for layer in kept if (key := f"pgs.experts.{layer}.merged") in metadata}
    repaired = [layer for layer in kept if f"pgs.experts.{layer}.repaired" in metadata]
    for key in [k for k in metadata if k.startswith("pgs.experts.")]:
        del metadata[key]
    metadata["pgs.experts.metric"] = Value(metric, "str")
    for layer, ids in kept.items():
        source = [i for i in ids if i != PAD]
        if layer in earlier:  # a number beyond those is a pad of that cut
            source = [earlier[layer][i] for i in source if i < len(earlier[layer])]
        metadata[f"pgs.experts.{layer}.kept"] = Value(source, "u32[]")
        if len(source) < n:
            metadata[f"pgs.experts.{layer}.padded"] = Value(n - len(source), "u32")
        if again and layer in merged:  # old id -> id after the merge -> id now
            now = {old: new for new, old in enumerate(ids)}
            metadata[f"pgs.experts.{layer}.merged"] = Value([now.get(i, DROPPED) for i in merged[layer]], "u32[]")
        if edit.repair is not None and layer not in mtp or again and layer in repaired:
            metadata[f"pgs.experts.{layer}.repaired"] = Value(True, "bool")
        if layer in edit.scores and not earlier:  # of all experts of the source
            metadata[f"pgs.experts.{layer}.scores"] = Value(list(edit.scores[layer]), "f64[]")


def _set_size_label(metadata: dict[str, Value], old: int, new: int, warnings: list[str]) -> None:
    """In "512x2.5B" the size is that of the shared weights and one expert: a cut leaves it as it is."""
    label = metadata.get("general.size_label")
    if label is not None and (match := re.fullmatch(rf"{old}(x.+)", str(label.value), re.DOTALL)):
        metadata["general.size_label"] = Value(f"{new}{match[1]}", "str")
    else:
        drop_size_label(metadata, warnings)
