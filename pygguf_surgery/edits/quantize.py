"""Apply a Quantize edit: options and overrides, the file type's choice for the rest, fallbacks, importance."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .._core import Value
from ..architecture.keys import getter
from ..architecture.names import layer_of
from ..base.errors import BadPlan, SurgeryError
from ..base.words import counted, listed, with_others
from ..files.lineage import has_other_layers
from ..files.subjects import subject_of, subject_of_keys
from ..plan_data.edits import Quantize, UseImatrix
from ..plan_data.expressions import OutputTensor
from ..plan_data.outcome import Draft, Faults
from ..quant.arrays import parse_quality
from ..quant.types import TYPES, tensor_type
from ..recipes import importance, mixes
from ..recipes.overrides import Overrides, parse_overrides, parse_type
from .context import Context

if TYPE_CHECKING:
    from ..files.imatrix import Imatrix
    from ..files.model import Model


QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION


def use_imatrix(imatrix: Any, missing: str, include: Iterable[str], exclude: Iterable[str]) -> UseImatrix | None:
    """What an edit keeps of an importance matrix, given as a path or open; it must be readable now."""
    include, exclude = _parts(include, "include_weights"), _parts(exclude, "exclude_weights")
    if imatrix is None:
        if include or exclude or missing != "default":
            raise BadPlan("an option of the importance matrix without one", object="imatrix")
        return None
    from ..files import imatrix as imatrix_file

    if missing not in imatrix_file.POLICIES:
        raise BadPlan(
            "unknown choice", object="imatrix_missing", found=repr(missing), expected=", ".join(imatrix_file.POLICIES)
        )
    if include and exclude:
        raise BadPlan("include_weights and exclude_weights exclude each other", object="imatrix")
    if isinstance(imatrix, imatrix_file.Imatrix):
        return UseImatrix(imatrix.path, imatrix.digest, missing, include, exclude)
    with imatrix_file.open_imatrix(imatrix) as opened:
        return UseImatrix(opened.path, opened.digest, missing, include, exclude)


def _parts(names: Iterable[str], what: str) -> tuple[str, ...]:
    parts = (names,) if isinstance(names, str) else tuple(names)
    if not all(isinstance(part, str) and part for part in parts):
        raise BadPlan("not parts of names", object=what, found=repr(parts))
    return parts


def apply(draft: Draft, edit: Quantize, context: Context) -> Draft:
    """Gives each tensor its type and its importance. Pure, but for the counts and values of the importance matrix. What
    cannot be done becomes a blocker; nothing is raised."""
    out, tensors, model = draft.copy(), draft.tensors, context.model
    imatrix = None
    if edit.imatrix is not None:
        try:
            imatrix = context.companions.imatrix(edit.imatrix)
        except SurgeryError as error:
            out.block(error)
    try:
        file_type = mixes.file_type(edit.type, edit.pure)
        overrides = Overrides(parse_overrides(edit.overrides))
        edit = replace(
            edit,
            output_type=parse_type(edit.output_type, "output_type"),
            token_embedding_type=parse_type(edit.token_embedding_type, "token_embedding_type"),
        )
        parse_quality(edit.quality)
    except SurgeryError as error:  # a plan from JSON; Plan.quantize has refused it at once
        out.block(error)
        return out

    unreadable = edit.imatrix is not None and imatrix is None  # which is a blocker already
    entries = 0 if imatrix is None or edit.imatrix is None else importance.used_entries(imatrix, edit.imatrix)
    if imatrix is not None and not entries:
        out.warn("no entry of the importance matrix is used: it is as if there were none")
        imatrix = None
    wanted = _wanted(draft, edit, file_type, overrides, imatrix, context, out)
    out.tensors = []
    requantized: list[OutputTensor] = []
    fallbacks: Counter[tuple[str, str]] = Counter()
    for tensor in tensors:
        type, notes = _fitting(tensor, wanted[tensor.name], fallbacks, out)
        if type != tensor.source_type and tensor_type(tensor.source_type).quantized:
            requantized.append(tensor)
        best = edit.quality == "best" and type != tensor.source_type and tensor_type(type).has_best
        out.tensors.append(replace(tensor, type=type, notes=[*tensor.notes, *notes], best=best))
    if requantized and not edit.allow_requantize:
        out.block(
            BadPlan(
                f"already quantized{with_others(requantized)}",
                object=requantized[0].name,
                found=requantized[0].source_type,
                hint="allow_requantize=True (--allow-requantize) decodes and encodes it again, at a loss; or override "
                'it with "copy"',
            )
        )
    if edit.quality == "best":
        count = sum(tensor.best for tensor in out.tensors)
        (out.note if count else out.warn)(
            f"quality best: {counted(count, 'tensor')} with less error than llama-quantize's bytes"
            if count
            else "quality best: no tensor gets a type that it is for ("
            + ", ".join(name for name, t in TYPES.items() if t.has_best)
            + ")"
        )
    if not unreadable:
        _weigh(model, edit, file_type, imatrix, out)
    overrides.report(out, lambda: set(model.tensors) - {ref for t in tensors for ref in t.expression.refs})
    for (wished, type), count in sorted(fallbacks.items()):
        out.warn(f"{counted(count, 'tensor')} with rows that {wished} cannot hold became {type}")
    if any(t.type != t.source_type for t in out.tensors):
        if file_type.number is not None:
            out.metadata["general.file_type"] = Value(file_type.number, "u32")
        out.metadata["general.quantization_version"] = Value(QUANTIZATION_VERSION, "u32")
        if imatrix is not None:
            out.metadata.update(_imatrix_metadata(imatrix, entries))
    return out


def _wanted(
    draft: Draft,
    edit: Quantize,
    file_type: mixes.FileType,
    overrides: Overrides,
    imatrix: Imatrix | None,
    context: Context,
    faults: Faults,
) -> dict[str, str]:
    """The type that each tensor is to have, whether its rows can or not."""
    architecture, tensors = context.model.architecture, draft.tensors
    decided: dict[str, str] = {}
    for tensor in tensors:
        allowed = mixes.allows(architecture, tensor.name, tensor.shape, edit.leave_output)
        option = None
        if allowed and tensor.name in mixes.OUTPUT:
            option = edit.output_type
        elif allowed and tensor.name in mixes.TOKEN_EMBEDDING:
            option = edit.token_embedding_type
            if tensor.name != mixes.TOKEN_EMBEDDING[0] and overrides.names(tensor.name):
                option = None  # per_layer_token_embd follows only where no override names it
        type = option or overrides.type_for(tensor, allowed, faults)
        if option:
            overrides.skip(tensor.name)
        if type is not None:
            decided[tensor.name] = tensor.source_type if type == "copy" else type
    wanted = {tensor.name: tensor.source_type for tensor in tensors}
    if file_type.type is not None:
        try:
            facts = mixes.model_facts(architecture, getter(draft.metadata))
        except SurgeryError as error:
            faults.block(error)
            return wanted | decided
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        order = list(shapes) if context.keep_split else mixes.loader_order(shapes)
        chosen, errors = mixes.choose_types(
            file_type,
            facts,
            [(name, shapes[name]) for name in order],
            decided=decided,
            has_imatrix=imatrix is not None,
            output_type=edit.output_type,
            leave_output=edit.leave_output,
        )
        wanted |= chosen
        faults.blockers += errors
    return wanted | decided


def _fitting(
    tensor: OutputTensor, wanted: str, fallbacks: Counter[tuple[str, str]], faults: Faults
) -> tuple[str, list[str]]:
    """`wanted`, or what llama-quantize falls back to where a row is not a multiple of its block; and what to note."""
    if wanted == tensor.source_type:  # it keeps its bytes, whatever its rows
        return wanted, []
    row = tensor.shape[-1] if tensor.shape else 1
    type = mixes.fallback(wanted, row)
    block = tensor_type(wanted).block
    if type is None:
        faults.block(
            BadPlan(
                f"a row is not a multiple of the block of {wanted}, which has no fallback",
                object=tensor.name,
                found=f"{row} elements",
                expected=f"a multiple of {block}",
                hint=f'an override such as ("{re.escape(tensor.name)}", "Q8_0")',
            )
        )
        return tensor.source_type, []
    if type == wanted:
        return type, []
    fallbacks[wanted, type] += 1
    return type, [f"{wanted} needs rows of a multiple of {block}, this has {row}: {type}"]


def _weigh(model: Model, edit: Quantize, file_type: mixes.FileType, imatrix: Imatrix | None, out: Draft) -> None:
    """Gives each encoded tensor its importance; what needs one and has none is a blocker."""
    encoded, refused = [t for t in out.tensors if t.encoded], set()
    if imatrix is not None and edit.imatrix is not None:
        if encoded and not (_belongs(imatrix, model, out) and _of_this_cut(imatrix, model, out)):
            return
        found = importance.resolve(imatrix, edit.imatrix, model, encoded)
        out.add(found)
        refused = found.refused
        for tensor in encoded:
            tensor.importance = found.importance.get(tensor.name)
            tensor.notes += found.tensor_notes.get(tensor.name, [])
    without: dict[str, list[str]] = {}
    for tensor in encoded:
        needs = tensor_type(tensor.type).needs_importance or mixes.wants_importance(file_type, tensor.name, tensor.type)
        if needs and tensor.importance is None and tensor.name not in refused:
            without.setdefault(tensor.type, []).append(tensor.name)
    hint = (
        "imatrix= (--imatrix) gives one"
        if imatrix is None
        else "the one given has no entry for it; imatrix_missing= (--imatrix-missing) says what to do then"
    )
    for type, names in without.items():
        out.block(BadPlan(f"{type} needs an importance matrix{with_others(names)}", object=names[0], hint=hint))


def _belongs(imatrix: Imatrix, model: Model, faults: Faults) -> bool:
    """False, and a blocker, where the entries are those of another model; a warning where some have no tensor."""
    strangers = [name for name in imatrix.entries if name not in model.tensors]
    if len(strangers) == len(imatrix.entries):
        faults.block(
            BadPlan(
                "the importance matrix of another model",
                path=imatrix.path,
                found=f"entries such as {strangers[0]}",
                expected="names of the model's tensors",
            )
        )
        return False
    block_count = model.metadata.get(f"{model.architecture}.block_count")
    if has_other_layers(model.metadata) and isinstance(block_count, int):
        beyond = [name for name in strangers if (layer_of(name) or 0) >= block_count]
        if beyond:
            faults.block(
                BadPlan(
                    "the importance matrix of the model before its layers were dropped",
                    path=imatrix.path,
                    object=beyond[0],
                    hint="prune layers and quantize the original in one plan: the matrix follows then",
                )
            )
            return False
    if strangers:
        faults.warn(
            f"importance: {len(strangers)} of {len(imatrix.entries)} entries belong to no tensor of the model "
            f"({listed(strangers, 3)})"
        )
    return True


def _of_this_cut(imatrix: Imatrix, model: Model, draft: Draft) -> bool:
    """False, and a blocker, where the importance matrix is of another cut than the source, and than what the plan makes
    of it."""
    source = subject_of(model)
    if imatrix.of is None:
        if source.origin.changed:
            draft.note("the importance matrix does not say of which cut it is: taken to be this model's")
        return True
    fault = imatrix.of.fault(source)
    if fault is None:
        return True
    result = subject_of_keys(model.architecture, draft.metadata)
    if imatrix.of.fault(result) is None and imatrix.of.origin.same_layers(source.origin):  # entries are named as there
        return True
    fault.problem, fault.path = f"the importance matrix is of {fault.problem}", imatrix.path
    draft.block(fault)
    return False


def _imatrix_metadata(imatrix: Imatrix, entries: int) -> dict[str, Value]:
    """The keys that llama-quantize writes. It cuts texts at 127 bytes and gives the whole path; here neither."""
    keys = {"file": Value(os.path.basename(imatrix.path), "str")}
    if imatrix.datasets:
        keys["dataset"] = Value(imatrix.datasets[0], "str")
    keys["entries_count"] = Value(entries, "u32")
    if imatrix.chunk_count > 0:
        keys["chunks_count"] = Value(imatrix.chunk_count, "u32")
    return {f"quantize.imatrix.{name}": value for name, value in keys.items()}
