"""The gate: a plan becomes a CheckedPlan, with every type, shape, byte offset and the peak memory fixed, or blockers.

Pure: reads no tensor data, raises only for a misuse of the call itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from .._core import Value, plan_budget
from ..architecture.loader import (
    ALIGNMENT_LEAST,
    NAME_BYTES,
    check_embedding,
    check_required,
    check_tensor_extra,
    is_tensor_extra,
)
from ..base.errors import BadFile, BadPlan, SourceChanged, SurgeryError, Unsupported
from ..base.units import MEMORY, human, parse_memory, parse_threads
from ..edits import metadata as metadata_rules
from ..edits import quantize as quantize_edit
from ..files.model import Model
from ..plan_data.edits import (
    KeepExperts,
    MergeExperts,
    PlanData,
    PruneLayers,
    Quantize,
    RemoveMetadata,
    SetMetadata,
    Split,
    UseImatrix,
    UseRepair,
)
from ..plan_data.expressions import Copy, OutputTensor
from ..quant.types import tensor_type
from .checked import CheckedPlan
from .jobs import build_jobs
from .place import lay_out, target_bytes

if TYPE_CHECKING:
    from ..files.imatrix import Imatrix
    from ..files.repair import Repair


# What a run needs beside its buffers and the output's header: lists of jobs and runs, thread stacks, malloc's slack.
FIXED_BYTES = 24 << 20


# --- the check -------------------------------------------------------------------------------------------------------


def check(
    model: Model, data: PlanData, *, memory: int | str = MEMORY, threads: int = 0, io: str = "auto"
) -> CheckedPlan:
    """Everything about the output, before a byte of it exists. What cannot be done is in .blockers."""
    from ..architecture.names import role_of

    budget, threads = parse_memory(memory), parse_threads(threads)
    blockers: list[SurgeryError] = []
    warnings = [f"input: {text}" for text in model.warnings]
    before = model.metadata.exact()
    metadata = dict(before)
    tensors = [
        OutputTensor(t.name, t.shape, t.type, t.type, Copy(t.name), role_of(t.name)) for t in model.tensors.values()
    ]
    if model.metadata_only and tensors:
        blockers.append(BadPlan("opened for its metadata only", path=model.path, hint="open it without metadata_only"))

    metadata_edits = [edit for edit in data.edits if isinstance(edit, (SetMetadata, RemoveMetadata))]
    quantize, split = (_at_most_one(data, kind, blockers) for kind in (Quantize, Split))
    # The architecture's own keys before the experts, so that their rules see the final numbers; all others after, so
    # that the caller has the last word.
    metadata = _edit_metadata(model.architecture, metadata, metadata_edits, True, blockers)
    uncut, repair = metadata, None
    for edit in data.edits:  # in their order: the numbers of a second cut are those after the first
        if isinstance(edit, KeepExperts):
            from ..edits import keep_experts

            repair = _open_repair(edit.repair, blockers) or repair
            outcome = keep_experts.apply(model, tensors, metadata, edit, repair)
        elif isinstance(edit, MergeExperts):
            from ..edits import merge_experts

            outcome = merge_experts.apply(model, tensors, metadata, edit)
        elif isinstance(edit, PruneLayers):
            from ..edits import prune_layers

            outcome = prune_layers.apply(model, tensors, metadata, edit)
        else:
            continue
        tensors, metadata = outcome.tensors, outcome.metadata
        blockers += outcome.blockers
        warnings += outcome.warnings
    dropped = uncut.keys() - metadata.keys()  # with the experts: that the caller removes these too is no error
    metadata = _edit_metadata(model.architecture, metadata, metadata_edits, False, blockers, dropped)
    imatrix, notes = None, []
    if quantize is not None:
        imatrix = _open_imatrix(quantize.imatrix, blockers)
        quantized = quantize_edit.apply(
            model, tensors, metadata, quantize, imatrix=imatrix, file_order=split is not None and split.keep
        )
        tensors, metadata = quantized.tensors, quantized.metadata
        blockers += quantized.blockers
        warnings += quantized.warnings
        notes += quantized.notes
    metadata = metadata_rules.drop_tensor_extra(metadata, model.tensors.keys() - {t.name for t in tensors})
    metadata, alignment = _derived(model, metadata, warnings)
    blockers += _check_tensors(model, tensors, weighed=quantize is not None)
    blockers += _check_metadata(model.architecture, before, metadata)
    embedding = next((t.shape for t in tensors if t.name == "token_embd.weight"), ())
    blockers += [
        error
        for error in check_embedding(model.architecture, metadata, embedding)
        if before.get(error.object) != metadata.get(error.object)
    ]

    checked = CheckedPlan(
        data=data,
        tensors=tensors,
        nbytes=[target_bytes(t) for t in tensors],
        offsets=[],
        metadata=metadata,
        alignment=alignment,
        files=[],
        split=False,
        file_bytes=0,
        peak_memory_bytes=0,
        blockers=blockers,
        warnings=warnings,
        notes=notes,
        source_bytes=sum(t.nbytes for t in model.tensors.values()),
        architecture=model.architecture,
        experts=(_count(before, model.architecture), _count(metadata, model.architecture)),
        imatrix=imatrix,
        repair=repair,
    )
    lay_out(model, checked, split)
    if quantize is not None and quantize.max_bytes is not None and checked.file_bytes > quantize.max_bytes:
        blockers.append(
            BadPlan(
                "the output is too large",
                object="max_size",
                found=human(checked.file_bytes),
                expected=f"at most {human(quantize.max_bytes)}",
                hint="the recipe allows no more",
            )
        )
    _budget(model, checked, budget, threads, io)
    return checked


def _at_most_one(data: PlanData, kind: type, blockers: list[SurgeryError]) -> Any:
    found = [edit for edit in data.edits if isinstance(edit, kind)]
    if len(found) > 1:
        name = kind.__name__.lower()
        blockers.append(BadPlan(f"a plan can {name} only once", object=name, found=len(found)))
    return found[0] if found else None


def _open_imatrix(use: UseImatrix | None, blockers: list[SurgeryError]) -> Imatrix | None:
    from ..files import imatrix as imatrix_file

    return _open_companion(use, imatrix_file.open, "importance matrix", blockers)


def _open_repair(use: UseRepair | None, blockers: list[SurgeryError]) -> Repair | None:
    from ..files import repair as repair_file

    return _open_companion(use, repair_file.open, "repair", blockers)


def _open_companion(use: Any, open: Callable[[str], Any], what: str, blockers: list[SurgeryError]) -> Any:
    """The file that an edit names, if there is one and it is still the one that the plan was made with."""
    if use is None:
        return None
    try:
        opened = open(use.path)
        if opened.digest != use.digest:
            raise SourceChanged(f"the {what} is not the one that the plan was made with", path=use.path)
        return opened
    except (OSError, ValueError) as error:  # ValueError: a path from JSON that is none
        blockers.append(
            BadFile(f"the {what} cannot be read", path=use.path, found=getattr(error, "strerror", None) or error)
        )
    except SurgeryError as error:
        blockers.append(error)
    return None


def _edit_metadata(
    architecture: str,
    metadata: dict[str, Value],
    edits: Sequence[SetMetadata | RemoveMetadata],
    own: bool,
    blockers: list[SurgeryError],
    dropped: Collection[str] = (),
) -> dict[str, Value]:
    """The edits of the architecture's own keys, or of all others. dropped: keys that are gone already."""
    prefix = f"{architecture}."
    for edit in edits:
        if isinstance(edit, SetMetadata):
            part: SetMetadata | RemoveMetadata = SetMetadata(
                tuple(item for item in edit.items if item[0].startswith(prefix) == own)
            )
        else:
            part = RemoveMetadata(
                tuple(
                    key
                    for key in edit.keys
                    if key.startswith(prefix) == own and not (key in dropped and key not in metadata)
                )
            )
        metadata = metadata_rules.apply(architecture, metadata, part, blockers)
    return metadata


def _derived(model: Model, metadata: dict[str, Value], warnings: list[str]) -> tuple[dict[str, Value], int]:
    """Keys that follow from the rest, and the alignment: the output is one file that llama.cpp reads."""
    metadata = {key: value for key, value in metadata.items() if not key.startswith("split.")}
    alignment = model.alignment
    if alignment < ALIGNMENT_LEAST:
        warnings.append(f"alignment {alignment} becomes {ALIGNMENT_LEAST}, the least that llama.cpp reads")
        alignment = ALIGNMENT_LEAST
        metadata["general.alignment"] = Value(alignment, "u32")
    return metadata, alignment


def _check_tensors(model: Model, tensors: list[OutputTensor], weighed: bool) -> list[SurgeryError]:
    """What llama.cpp could not load afterwards, and what ggml cannot do. weighed: a quantize edit has looked whether each
    type that needs importance has some."""
    found: list[SurgeryError] = []
    seen: set[str] = set()
    if model.tensors and not tensors:
        found.append(BadPlan("nothing is left of the model"))
    for tensor in tensors:
        if tensor.name in seen:
            found.append(BadPlan("duplicate tensor", object=tensor.name))
        seen.add(tensor.name)
        nbytes = len(tensor.name.encode("utf-8", "surrogateescape"))
        if nbytes == 0 or nbytes > NAME_BYTES:
            found.append(
                BadPlan(
                    "a tensor name that llama.cpp cannot load",
                    object=tensor.name,
                    found=f"{nbytes} bytes",
                    expected=f"1..{NAME_BYTES}",
                )
            )
        row = tensor.shape[-1] if tensor.shape else 1
        if row % tensor_type(tensor.type).block:
            found.append(
                BadPlan(
                    "a row is no multiple of the block",
                    object=tensor.name,
                    found=f"{row} elements",
                    expected=f"a multiple of {tensor_type(tensor.type).block} ({tensor.type})",
                )
            )
        if tensor.encoded:
            if tensor_type(tensor.type).needs_importance and not weighed:
                found.append(
                    Unsupported(
                        "this type needs an importance matrix",
                        object=tensor.name,
                        found=tensor.type,
                        hint="quantize() gives it one, or another type",
                    )
                )
            if not tensor_type(tensor.source_type).decodes:
                found.append(
                    Unsupported(
                        "ggml cannot decode this type",
                        object=tensor.name,
                        found=tensor.source_type,
                        hint='override it with "copy"',
                    )
                )
            if not tensor_type(tensor.type).encodes:
                found.append(Unsupported("ggml cannot encode this type", object=tensor.name, found=tensor.type))
    return found


def _check_metadata(architecture: str, before: dict[str, Value], after: dict[str, Value]) -> list[SurgeryError]:
    """What llama.cpp refuses of the keys that this plan changed: numbers of experts, lists of tensors."""
    from ..architecture.loader import NUMBERS, check_numbers

    found: list[SurgeryError] = []
    if any(before.get(key) != after.get(key) for key in (f"{architecture}.{name}" for name in NUMBERS)):
        found += check_numbers(architecture, after)
    if any(before.get(key) != after.get(key) for key in {*before, *after} if is_tensor_extra(key)):
        found += check_tensor_extra(after)
    return found + check_required(architecture, before, after)


def _count(metadata: dict[str, Value], architecture: str) -> int | None:
    value = metadata.get(f"{architecture}.expert_count")
    return value.value if value is not None and isinstance(value.value, int) else None


def _budget(model: Model, checked: CheckedPlan, memory: int, threads: int, io: str) -> None:
    buffers = memory
    if checked.offsets and not checked.blockers:
        try:
            jobs = build_jobs(model, checked)
            buffers = plan_budget(jobs, memory=memory, threads=threads, io=io)["buffer_bytes"]
        except SurgeryError as error:
            checked.blockers.append(error)
    checked.peak_memory_bytes = buffers + 2 * sum(len(file.header) for file in checked.files) + FIXED_BYTES
