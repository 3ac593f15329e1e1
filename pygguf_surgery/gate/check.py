"""The gate: a plan becomes a CheckedPlan, with every type, shape, byte offset and the peak memory fixed, or blockers.

Pure: reads no tensor data, raises only for a misuse of the call itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .._core import Value, plan_budget
from ..architecture.loader import (
    ALIGNMENT_LEAST,
    NUMBERS,
    check_embedding,
    check_name,
    check_numbers,
    check_required,
    check_tensor_extra,
    is_tensor_extra,
)
from ..architecture.names import role_of
from ..base.errors import BadPlan, SurgeryError, Unsupported
from ..base.limits import Limits
from ..base.units import human
from ..edits import keep_experts, merge_experts, prune_layers
from ..edits import metadata as metadata_edit
from ..edits import quantize as quantize_edit
from ..edits.context import Context
from ..files.companions import Companion, Companions
from ..files.model import Model
from ..plan_data.edits import (
    Edit,
    KeepExperts,
    MergeExperts,
    PlanData,
    PruneLayers,
    Quantize,
    RemoveMetadata,
    SetMetadata,
    Split,
)
from ..plan_data.expressions import Copy, OutputTensor
from ..plan_data.outcome import Draft, Faults
from ..quant.types import tensor_type
from .checked import CheckedPlan
from .jobs import build_jobs
from .place import lay_out, target_bytes

# What a run needs beside its buffers and the output's header: lists of jobs and runs, thread stacks, malloc's slack.
FIXED_BYTES = 24 << 20


@dataclass(frozen=True)
class _Work:
    """What the passes look at beside the draft. before: the metadata of the source."""

    context: Context
    data: PlanData
    before: Mapping[str, Value]

    def only(self, kind: type[Edit]) -> Any:
        """The edit of a kind that a plan has at most once, or None."""
        return next((edit for edit in self.data.edits if isinstance(edit, kind)), None)


def check(model: Model, data: PlanData, limits: Limits, companions: Companions) -> CheckedPlan:
    """Everything about the output, before a byte of it exists. What cannot be done is in .blockers. companions: where
    the files that the plan names are opened."""
    split = next((edit for edit in data.edits if isinstance(edit, Split)), None)
    before = model.metadata.exact()
    work = _Work(Context(model, companions, keep_split=split is not None and split.keep), data, before)
    draft = Draft([], {})
    for _, step in PASSES:
        after = step(draft, work)
        after.blockers[:0], after.warnings[:0], after.notes[:0] = draft.blockers, draft.warnings, draft.notes
        draft = after
    checked = CheckedPlan(
        tensors=draft.tensors,
        metadata=draft.metadata,
        blockers=draft.blockers,
        warnings=draft.warnings,
        notes=draft.notes,
        data=data,
        limits=limits,
        nbytes=[target_bytes(t) for t in draft.tensors],
        alignment=max(model.alignment, ALIGNMENT_LEAST),
        source_bytes=sum(t.nbytes for t in model.tensors.values()),
        architecture=model.architecture,
        experts=(_count(before, model.architecture), _count(draft.metadata, model.architecture)),
    )
    lay_out(model, checked, split)
    _check_size(checked, work.only(Quantize))
    _make_jobs(model, checked, companions)
    return checked


# --- the passes -------------------------------------------------------------------------------------------------------


def _source(_: Draft, work: _Work) -> Draft:
    """The model as it is."""
    model = work.context.model
    tensors = [
        OutputTensor(t.name, t.shape, t.type, t.type, Copy(t.name), role_of(t.name)) for t in model.tensors.values()
    ]
    out = Draft(tensors, dict(work.before))
    out.warnings += [f"input: {text}" for text in model.warnings]
    if model.metadata_only and tensors:
        out.block(BadPlan("opened for its metadata only", path=model.path, hint="open it without metadata_only"))
    for kind in (Quantize, Split):
        found = [edit for edit in work.data.edits if isinstance(edit, kind)]
        if len(found) > 1:
            name = kind.__name__.lower()
            out.block(BadPlan(f"a plan can {name} only once", object=name, found=len(found)))
    return out


def _own_keys(draft: Draft, work: _Work) -> Draft:
    """The architecture's own keys, before the experts, whose rules then see the final numbers."""
    return _edit_metadata(draft, work, own=True)


def _experts_and_layers(draft: Draft, work: _Work) -> Draft:
    """What drops, merges and renumbers, in the order of the plan: the numbers of a second cut are those after the
    first."""
    out = draft.copy()
    for edit in work.data.edits:
        if type(edit) not in CUTS:
            continue
        after = CUTS[type(edit)](out, edit, work.context)
        out.tensors, out.metadata = after.tensors, after.metadata
        out.add(after)
    return out


def _other_keys(draft: Draft, work: _Work) -> Draft:
    """All other keys, so that the caller has the last word."""
    return _edit_metadata(draft, work, own=False)


def _types(draft: Draft, work: _Work) -> Draft:
    edit = work.only(Quantize)
    return draft.copy() if edit is None else quantize_edit.apply(draft, edit, work.context)


def _derived_keys(draft: Draft, work: _Work) -> Draft:
    """Keys that follow from the rest: shards get theirs later, llama.cpp reads no alignment below 32."""
    out, model = draft.copy(), work.context.model
    gone = model.tensors.keys() - {t.name for t in out.tensors}
    metadata = metadata_edit.drop_tensor_extra(out.metadata, gone)
    out.metadata = {key: value for key, value in metadata.items() if not key.startswith("split.")}
    if model.alignment < ALIGNMENT_LEAST:
        out.warn(f"alignment {model.alignment} becomes {ALIGNMENT_LEAST}, the least that llama.cpp reads")
        out.metadata["general.alignment"] = Value(ALIGNMENT_LEAST, "u32")
    return out


def _loadable_tensors(draft: Draft, work: _Work) -> Draft:
    """What llama.cpp could not load afterwards, and what ggml cannot do."""
    out = draft.copy()
    if work.context.model.tensors and not out.tensors:
        out.block(BadPlan("nothing is left of the model"))
    weighed = work.only(Quantize) is not None  # then each type that needs importance was looked after
    seen: set[str] = set()
    for tensor in out.tensors:
        if tensor.name in seen:
            out.block(BadPlan("duplicate tensor", object=tensor.name))
        seen.add(tensor.name)
        _check_tensor(tensor, weighed, out)
    return out


def _loadable_keys(draft: Draft, work: _Work) -> Draft:
    """What llama.cpp refuses of the keys that this plan changed: numbers of experts, lists of tensors, the
    vocabulary."""
    out, before, after = draft.copy(), work.before, draft.metadata
    architecture = work.context.model.architecture
    if any(before.get(key) != after.get(key) for key in (f"{architecture}.{name}" for name in NUMBERS)):
        out.blockers += check_numbers(architecture, after)
    if any(before.get(key) != after.get(key) for key in {*before, *after} if is_tensor_extra(key)):
        out.blockers += check_tensor_extra(after)
    out.blockers += check_required(architecture, before, after)
    embedding = next((t.shape for t in out.tensors if t.name == "token_embd.weight"), ())
    out.blockers += [
        error
        for error in check_embedding(architecture, after, embedding)
        if (key := str(error.object)) and before.get(key) != after.get(key)
    ]
    return out


# The edits of the pass "experts and layers".
CUTS: Mapping[type[Edit], Callable[[Draft, Any, Context], Draft]] = {
    KeepExperts: keep_experts.apply,
    MergeExperts: merge_experts.apply,
    PruneLayers: prune_layers.apply,
}

# In this order. A pass takes the draft so far and gives back the next one with the faults that it found.
PASSES: tuple[tuple[str, Callable[[Draft, _Work], Draft]], ...] = (
    ("source", _source),
    ("own keys", _own_keys),
    ("experts and layers", _experts_and_layers),
    ("other keys", _other_keys),
    ("types", _types),
    ("derived keys", _derived_keys),
    ("loadable tensors", _loadable_tensors),
    ("loadable keys", _loadable_keys),
)


# --- what the passes do -----------------------------------------------------------------------------------------------


def _edit_metadata(draft: Draft, work: _Work, *, own: bool) -> Draft:
    """The edits of the architecture's own keys, or of all others."""
    out, prefix = draft.copy(), f"{work.context.model.architecture}."
    dropped = set() if own else work.before.keys() - draft.metadata.keys()
    for edit in work.data.edits:
        part: SetMetadata | RemoveMetadata
        if isinstance(edit, SetMetadata):
            part = SetMetadata(tuple(item for item in edit.items if item[0].startswith(prefix) == own))
        elif isinstance(edit, RemoveMetadata):
            # With the experts some keys are gone: that the caller removes these too is no error.
            keys = tuple(
                key
                for key in edit.keys
                if key.startswith(prefix) == own and not (key in dropped and key not in out.metadata)
            )
            part = RemoveMetadata(keys)
        else:
            continue
        after = metadata_edit.apply(out, part, work.context)
        out.metadata = after.metadata
        out.add(after)
    return out


def _check_tensor(tensor: OutputTensor, weighed: bool, faults: Faults) -> None:
    """weighed: a quantize edit has looked whether its type has the importance that it needs."""
    if fault := check_name(tensor.name):
        faults.block(fault)
    row, target = tensor.shape[-1] if tensor.shape else 1, tensor_type(tensor.type)
    if row % target.block:
        faults.block(
            BadPlan(
                "a row is not a multiple of the block",
                object=tensor.name,
                found=f"{row} elements",
                expected=f"a multiple of {target.block} ({tensor.type})",
            )
        )
    if not tensor.encoded:
        return
    if target.needs_importance and not weighed:
        faults.block(
            Unsupported(
                "this type needs an importance matrix",
                object=tensor.name,
                found=tensor.type,
                hint="quantize() gives it one, or another type",
            )
        )
    if not tensor_type(tensor.source_type).decodes:
        faults.block(
            Unsupported(
                "ggml cannot decode this type",
                object=tensor.name,
                found=tensor.source_type,
                hint='override it with "copy"',
            )
        )
    if not target.encodes:
        faults.block(Unsupported("ggml cannot encode this type", object=tensor.name, found=tensor.type))


def _count(metadata: Mapping[str, Value], architecture: str) -> int | None:
    value = metadata.get(f"{architecture}.expert_count")
    return value.value if value is not None and isinstance(value.value, int) else None


# --- the run ----------------------------------------------------------------------------------------------------------


def _check_size(checked: CheckedPlan, edit: Quantize | None) -> None:
    if edit is not None and edit.max_bytes is not None and checked.file_bytes > edit.max_bytes:
        checked.block(
            BadPlan(
                "the output is too large",
                object="max_size",
                found=human(checked.file_bytes),
                expected=f"at most {human(edit.max_bytes)}",
                hint="the recipe allows no more",
            )
        )


def _make_jobs(model: Model, checked: CheckedPlan, companions: Companions) -> None:
    """The jobs of the run, what they read, and how much memory that takes."""
    buffers, limits = checked.limits.memory, checked.limits
    if checked.offsets and not checked.blockers:
        try:
            checked.jobs, sources = build_jobs(model, checked, companions)
            checked.companions = tuple(Companion(s.path, s.identity) for s in sources)
            budget = plan_budget(checked.jobs, memory=limits.memory, threads=limits.threads, io=limits.io)
            buffers = budget["buffer_bytes"]
        except SurgeryError as error:
            checked.block(error)
    checked.peak_memory_bytes = buffers + 2 * sum(len(file.header) for file in checked.files) + FIXED_BYTES
