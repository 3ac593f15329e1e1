"""The gate: a plan becomes a CheckedPlan, with every type, shape, byte offset and the peak memory fixed, or blockers.

Pure: reads no tensor data, raises only for a misuse of the call itself.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import _core, metadata as metadata_rules
from ._core import Value
from .errors import BadFile, BadPlan, SourceChanged, SurgeryError, Unsupported
from .model import Model, merge_adjacent, row_bytes, type_facts
from .plan_data import MEAN, ONES, PAD, Copy, FromRepair, KeepExperts, Merge, MergeExperts, OutputTensor, PlanData, \
    PruneLayers, Quantize, Remap, RemoveMetadata, SetMetadata, Split, Stack, Take, UseImatrix, UseRepair, \
    expression_to_json, plan_to_json
from .quantize import recipe
from .units import MEMORY, human, parse_memory, parse_threads

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .experts.repair_file import Repair
    from .imatrix import Entry, Imatrix

NAME_BYTES = 63            # llama.cpp's limit of a tensor name
ALIGNMENT_LEAST = 32       # llama.cpp aborts on 4, and always writes 32
# What a run needs beside its buffers and the output's header: lists of jobs and runs, thread stacks, malloc's slack.
FIXED_BYTES = 24 << 20
LIST_LONGEST = 32          # printed JSON abbreviates longer arrays


@dataclass(repr=False)  # it would show the whole header
class OutputFile:
    """One file of the output. tensors: indices of CheckedPlan.tensors. header: up to the data, padding included; empty
    if none can be made."""

    tensors: list[int]
    metadata: dict[str, Value]
    header: bytes
    file_bytes: int


@dataclass(repr=False)
class CheckedPlan:
    """What a plan comes to. With blockers it can be described and not written; its numbers are then best guesses."""

    data: PlanData
    tensors: list[OutputTensor]
    nbytes: list[int]           # of each tensor, without padding
    offsets: list[int]          # of each tensor, from the start of its file; empty if no header can be made
    metadata: dict[str, Value]
    alignment: int
    files: list[OutputFile]     # one, or the shards
    split: bool                 # shards, whatever their number: their names say so
    file_bytes: int             # of all files
    peak_memory_bytes: int      # over the interpreter's own: buffers, header, lists
    blockers: list[SurgeryError]
    warnings: list[str]
    notes: list[str]            # what is as it should be, counted: overrides, importance
    source_bytes: int           # of the input's tensors
    architecture: str
    experts: tuple[int | None, int | None]  # before, after
    imatrix: Imatrix | None     # open, as the run reads its rows
    repair: Repair | None       # the same

    def __repr__(self) -> str:
        return (f"<CheckedPlan of {len(self.tensors)} tensors, {human(self.file_bytes)}, {len(self.blockers)} blockers, "
                f"{len(self.warnings)} warnings>")

    def extra_sources(self) -> list[_core.Source]:
        """What a run reads beside the model, in the order of their numbers."""
        return [extra.source for extra in (self.imatrix, self.repair) if extra is not None]

    @property
    def elements(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    def actions(self) -> dict[str, int]:
        """How many tensors are copied, taken, encoded, ..."""
        return dict(Counter(action(tensor) for tensor in self.tensors))

    def summary(self) -> str:
        """The plan in words: sizes by role, types, bits per weight, experts, peak memory, warnings, blockers."""
        lines = [f"{self.data.source}",
                 f"{self.architecture or 'no architecture'}: {len(self.tensors)} tensors, "
                 f"{human(self.source_bytes)} -> {human(sum(self.nbytes))} ({human(self.file_bytes)} file)"]
        if self.experts[0] is not None:
            lines.append(f"experts: {self.experts[0]} -> {self.experts[1]}"
                         if self.experts[0] != self.experts[1] else f"experts: {self.experts[0]}")
        if self.elements:
            lines.append(f"{self.elements / 1e9:.3f} billion weights, "
                         f"{8 * sum(self.nbytes) / self.elements:.3f} bits per weight")
        if self.split:
            lines.append(f"shards: {len(self.files)}, the largest {human(max(f.file_bytes for f in self.files))}")
        lines.append("tensors: " + ", ".join(f"{count} {name}" for name, count in sorted(self.actions().items())))
        lines.append(f"peak memory: {human(self.peak_memory_bytes)}")
        lines += ["", f"{'role':<14} {'tensors':>7} {'size':>11} {'share':>6}  types"]
        total = sum(self.nbytes) or 1
        by_role: dict[str, list[int]] = {}
        for i, tensor in enumerate(self.tensors):
            by_role.setdefault(tensor.role, []).append(i)
        for role, indices in sorted(by_role.items(), key=lambda item: -sum(self.nbytes[i] for i in item[1])):
            size = sum(self.nbytes[i] for i in indices)
            types = Counter(self.tensors[i].type for i in indices)
            lines.append(f"{role:<14} {len(indices):>7} {human(size):>11} {100 * size / total:>5.1f}%  "
                         + ", ".join(f"{type} x{count}" for type, count in types.most_common()))
        if self.notes:
            lines += ["", "notes:"] + [f"  {text}" for text in self.notes]
        if self.warnings:
            lines += ["", "warnings:"] + [f"  {text}" for text in self.warnings]
        if self.blockers:
            lines += ["", "cannot be written:"] + [f"  {error}" for error in self.blockers]
        return "\n".join(lines)

    def to_json(self, full: bool = False) -> dict[str, Any]:
        """JSON-ready. Without `full`, arrays over 32 elements in metadata, expressions and plan are
        {"type", "length", "head"}."""
        shorten = (lambda x: x) if full else abbreviate
        return {
            "tensors": [
                {"name": t.name, "role": t.role, "type": t.type, "shape": list(t.shape), "nbytes": n,
                 "action": action(t), "source_type": t.source_type,
                 "expression": shorten(expression_to_json(t.expression)),
                 **({"importance": t.importance.ref} if t.importance else {}),
                 **({"notes": t.notes} if t.notes else {})}
                for t, n in zip(self.tensors, self.nbytes)],
            "metadata": {key: value_for_json(value, full) for key, value in self.metadata.items()},
            "file_bytes": self.file_bytes,
            **({"shards": [{"tensors": len(f.tensors), "file_bytes": f.file_bytes} for f in self.files]}
               if self.split else {}),
            "peak_memory_bytes": self.peak_memory_bytes,
            "blockers": [error_for_json(error) for error in self.blockers],
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "plan": shorten(plan_to_json(self.data) if full else _without_groups(plan_to_json(self.data))),
        }


def _without_groups(plan: dict[str, Any]) -> dict[str, Any]:
    """Groups of experts only counted: the orders of their neurons are megabytes."""
    for edit in plan["edits"]:
        if edit["edit"] == "merge_experts":
            edit["groups"] = {layer: {"type": "group", "length": len(groups), "head": []}
                              for layer, groups in edit["groups"].items()}
    return plan


def action(tensor: OutputTensor) -> str:
    if isinstance(tensor.expression, (Remap, Merge)):
        return type(tensor.expression).__name__.lower()
    if tensor.type != tensor.source_type:
        return "encode"
    return {Copy: "copy", Take: "take", Stack: "stack", FromRepair: "repair"}[type(tensor.expression)]


def value_for_json(value: Value, full: bool = False) -> Any:
    """A metadata value for people and scripts (plan_data.value_to_json is the lossless form)."""
    if value.type.endswith("[]") and not full and len(value) > LIST_LONGEST:
        return {"type": value.type, "length": len(value), "head": _finite(value.head(LIST_LONGEST))}
    return _finite(value.value)


def _finite(x: Any) -> Any:
    """JSON has no NaN and no infinity: they become text. Bytes that are no UTF-8 become U+FFFD."""
    if isinstance(x, list):
        return [_finite(element) for element in x]
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    if isinstance(x, str):
        return x.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return x


def abbreviate(data: Any) -> Any:
    """Lists of over 32 plain elements as {"type", "length", "head"}, at any depth."""
    if isinstance(data, dict):
        return {key: abbreviate(value) for key, value in data.items()}
    if isinstance(data, list):
        if len(data) > LIST_LONGEST and not isinstance(data[0], (dict, list)):
            return {"type": type(data[0]).__name__, "length": len(data), "head": data[:LIST_LONGEST]}
        return [abbreviate(element) for element in data]
    return data


def error_for_json(error: SurgeryError) -> dict[str, Any]:
    fields = {name: getattr(error, name) for name in ("path", "object", "offset", "found", "expected", "hint")}
    return {"error": type(error).__name__, "message": str(error), "problem": error.problem,
            **{name: value if isinstance(value, (int, str)) else str(value)
               for name, value in fields.items() if value is not None}}


# --- the check -------------------------------------------------------------------------------------------------------

def check(model: Model, data: PlanData, *, memory: int | str = MEMORY, threads: int = 0,
          io: str = "auto") -> CheckedPlan:
    """Everything about the output, before a byte of it exists. What cannot be done is in .blockers."""
    from .experts import roles

    budget, threads = parse_memory(memory), parse_threads(threads)
    blockers: list[SurgeryError] = []
    warnings = [f"input: {text}" for text in model.warnings]
    before = model.metadata.exact()
    metadata = dict(before)
    tensors = [OutputTensor(t.name, t.shape, t.type, t.type, Copy(t.name), roles.role_of(t.name))
               for t in model.tensors.values()]
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
            from .experts import prune

            repair = _open_repair(edit.repair, blockers) or repair
            outcome = prune.apply(model, tensors, metadata, edit, repair)
        elif isinstance(edit, MergeExperts):
            from .experts import merge

            outcome = merge.apply(model, tensors, metadata, edit)
        elif isinstance(edit, PruneLayers):
            from . import layers

            outcome = layers.apply(model, tensors, metadata, edit)
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
        quantized = recipe.apply(model, tensors, metadata, quantize, imatrix=imatrix,
                                 file_order=split is not None and split.keep)
        tensors, metadata = quantized.tensors, quantized.metadata
        blockers += quantized.blockers
        warnings += quantized.warnings
        notes += quantized.notes
    metadata = metadata_rules.drop_tensor_extra(metadata, model.tensors.keys() - {t.name for t in tensors})
    metadata, alignment = _derived(model, metadata, warnings)
    blockers += _check_tensors(model, tensors, weighed=quantize is not None)
    blockers += _check_metadata(model.architecture, before, metadata)
    embedding = next((t.shape for t in tensors if t.name == "token_embd.weight"), ())
    blockers += [error for error in metadata_rules.check_embedding(model.architecture, metadata, embedding)
                 if before.get(error.object) != metadata.get(error.object)]

    checked = CheckedPlan(
        data=data, tensors=tensors, nbytes=[_target_bytes(t) for t in tensors], offsets=[], metadata=metadata,
        alignment=alignment, files=[], split=False, file_bytes=0, peak_memory_bytes=0, blockers=blockers,
        warnings=warnings, notes=notes,
        source_bytes=sum(t.nbytes for t in model.tensors.values()), architecture=model.architecture,
        experts=(_count(before, model.architecture), _count(metadata, model.architecture)), imatrix=imatrix,
        repair=repair)
    _lay_out(model, checked, split)
    if quantize is not None and quantize.max_bytes is not None and checked.file_bytes > quantize.max_bytes:
        blockers.append(BadPlan("the output is too large", object="max_size", found=human(checked.file_bytes),
                                expected=f"at most {human(quantize.max_bytes)}", hint="the recipe allows no more"))
    _budget(model, checked, budget, threads, io)
    return checked


def _at_most_one(data: PlanData, kind: type, blockers: list[SurgeryError]) -> Any:
    found = [edit for edit in data.edits if isinstance(edit, kind)]
    if len(found) > 1:
        name = kind.__name__.lower()
        blockers.append(BadPlan(f"a plan can {name} only once", object=name, found=len(found)))
    return found[0] if found else None


def _open_imatrix(use: UseImatrix | None, blockers: list[SurgeryError]) -> Imatrix | None:
    from . import imatrix

    return _open_companion(use, imatrix.open, "importance matrix", blockers)


def _open_repair(use: UseRepair | None, blockers: list[SurgeryError]) -> Repair | None:
    from .experts import repair_file

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
        blockers.append(BadFile(f"the {what} cannot be read", path=use.path,
                                found=getattr(error, "strerror", None) or error))
    except SurgeryError as error:
        blockers.append(error)
    return None


def _edit_metadata(architecture: str, metadata: dict[str, Value], edits: Sequence[SetMetadata | RemoveMetadata],
                   own: bool, blockers: list[SurgeryError], dropped: Collection[str] = ()) -> dict[str, Value]:
    """The edits of the architecture's own keys, or of all others. dropped: keys that are gone already."""
    prefix = f"{architecture}."
    for edit in edits:
        if isinstance(edit, SetMetadata):
            part: SetMetadata | RemoveMetadata = SetMetadata(
                tuple(item for item in edit.items if item[0].startswith(prefix) == own))
        else:
            part = RemoveMetadata(tuple(key for key in edit.keys if key.startswith(prefix) == own
                                        and not (key in dropped and key not in metadata)))
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
    facts = type_facts()
    seen: set[str] = set()
    if model.tensors and not tensors:
        found.append(BadPlan("nothing is left of the model"))
    for tensor in tensors:
        if tensor.name in seen:
            found.append(BadPlan("duplicate tensor", object=tensor.name))
        seen.add(tensor.name)
        nbytes = len(tensor.name.encode("utf-8", "surrogateescape"))
        if nbytes == 0 or nbytes > NAME_BYTES:
            found.append(BadPlan("a tensor name that llama.cpp cannot load", object=tensor.name,
                                 found=f"{nbytes} bytes", expected=f"1..{NAME_BYTES}"))
        row = tensor.shape[-1] if tensor.shape else 1
        if row % facts[tensor.type]["block"]:
            found.append(BadPlan("a row is no multiple of the block", object=tensor.name, found=f"{row} elements",
                                 expected=f"a multiple of {facts[tensor.type]['block']} ({tensor.type})"))
        if tensor.encoded:
            if facts[tensor.type]["needs_importance"] and not weighed:
                found.append(Unsupported("this type needs an importance matrix", object=tensor.name, found=tensor.type,
                                         hint="quantize() gives it one, or another type"))
            if not facts[tensor.source_type]["decodes"]:
                found.append(Unsupported("ggml cannot decode this type", object=tensor.name, found=tensor.source_type,
                                         hint='override it with "copy"'))
            if not facts[tensor.type]["encodes"]:
                found.append(Unsupported("ggml cannot encode this type", object=tensor.name, found=tensor.type))
    return found


def _check_metadata(architecture: str, before: dict[str, Value], after: dict[str, Value]) -> list[SurgeryError]:
    """What llama.cpp refuses of the keys that this plan changed: numbers of experts, lists of tensors."""
    from .experts import prune

    found: list[SurgeryError] = []
    if any(before.get(key) != after.get(key) for key in (f"{architecture}.{name}" for name in prune.NUMBERS)):
        found += prune.check_numbers(architecture, after)
    if any(before.get(key) != after.get(key) for key in {*before, *after} if metadata_rules.is_tensor_extra(key)):
        found += metadata_rules.check_tensor_extra(after)
    return found + metadata_rules.check_required(architecture, before, after)


def _count(metadata: dict[str, Value], architecture: str) -> int | None:
    value = metadata.get(f"{architecture}.expert_count")
    return value.value if value is not None and isinstance(value.value, int) else None


def _target_bytes(tensor: OutputTensor) -> int:
    facts = type_facts()[tensor.type]
    elements = math.prod(tensor.shape)
    return -(-elements // facts["block"]) * facts["block_bytes"]


def _lay_out(model: Model, checked: CheckedPlan, split: Split | None) -> None:
    """Which tensor is in which file, and where."""
    from . import shards

    parts = [list(range(len(checked.tensors)))]
    if split is not None:
        partition = shards.partition(split, checked.nbytes, [_shard_of(model, t) for t in checked.tensors],
                                     checked.alignment, source_count=len(model.sources),
                                     names=[t.name for t in checked.tensors])
        parts, checked.split = partition.shards, not partition.single
        checked.warnings += partition.warnings
        checked.blockers += partition.blockers
    offsets = [0] * len(checked.tensors)
    try:
        for number, part in enumerate(parts):
            metadata = checked.metadata if not checked.split else shards.shard_metadata(
                checked.metadata, number, len(parts), len(checked.tensors), checked.alignment)
            infos = [_core.TensorInfo(t.name, t.shape[::-1], type_facts()[t.type]["id"])
                     for t in (checked.tensors[i] for i in part)]
            header, at, file_bytes = _core.encode_header(list(metadata.items()), infos, checked.alignment)
            for i, offset in zip(part, at):
                offsets[i] = offset
            checked.files.append(OutputFile(part, metadata, header, file_bytes))
        checked.offsets = offsets
        checked.file_bytes = sum(file.file_bytes for file in checked.files)
    except SurgeryError as error:
        if not checked.blockers:  # else it is one of them again
            checked.blockers.append(error)
        padded = [-(-n // checked.alignment) * checked.alignment for n in checked.nbytes]
        checked.files = [OutputFile(part, checked.metadata, b"", sum(padded[i] for i in part)) for part in parts]
        checked.file_bytes = sum(padded)


def _shard_of(model: Model, tensor: OutputTensor) -> int:
    ref = tensor.expression.refs[0] if isinstance(tensor.expression, Stack) else tensor.expression.ref
    return model.tensors[ref].source


def _budget(model: Model, checked: CheckedPlan, memory: int, threads: int, io: str) -> None:
    buffers = memory
    if checked.offsets and not checked.blockers:
        try:
            jobs = build_jobs(model, checked)
            buffers = _core.plan_budget(jobs, memory=memory, threads=threads, io=io)["buffer_bytes"]
        except SurgeryError as error:
            checked.blockers.append(error)
    checked.peak_memory_bytes = buffers + 2 * sum(len(file.header) for file in checked.files) + FIXED_BYTES


# --- jobs: the checked plan as the engine takes it ------------------------------------------------------------------

def build_jobs(model: Model, checked: CheckedPlan) -> list[_core.Job]:
    """One job per tensor that has bytes. BadPlan where an expression does not give the bytes that its shape needs."""
    jobs = []
    facts = type_facts()
    file_of = {i: number for number, file in enumerate(checked.files) for i in file.tensors}
    for i, (tensor, nbytes, offset) in enumerate(zip(checked.tensors, checked.nbytes, checked.offsets)):
        elements = math.prod(tensor.shape)
        row = tensor.shape[-1] if tensor.shape else 1
        if elements == 0:
            continue
        if len(tensor.shape) == 1 and isinstance(tensor.expression, Take):
            if facts[tensor.source_type]["block"] != 1 or facts[tensor.type]["block"] != 1:
                raise Unsupported("a vector of blocks cannot be cut", object=tensor.name, found=tensor.source_type)
            row = 1  # runs are whole rows
        runs = source_runs(model, tensor, checked.repair, len(model.sources) + (checked.imatrix is not None))
        expected = elements // row * row_bytes(tensor.source_type, row)
        merge = None
        if isinstance(tensor.expression, Merge):
            merge = _merge(tensor)
        elif int(runs[:, 2].sum()) != expected:
            raise BadPlan("an expression of another size than its shape", object=tensor.name,
                          found=f"{int(runs[:, 2].sum())} bytes", expected=f"{expected}")
        remap = None
        if isinstance(tensor.expression, Remap):
            remap = (tensor.expression.table, tensor.expression.substitutes, row)
        jobs.append(_core.Job(
            tensor.name, source_type=facts[tensor.source_type]["id"], target_type=facts[tensor.type]["id"],
            row_elements=row, rows=elements // row, target_offset=offset, runs=runs, remap=remap, merge=merge,
            file=file_of[i], best=tensor.best, **_importance(tensor, checked.imatrix, len(model.sources))))
    return jobs


def _merge(tensor: OutputTensor) -> tuple[Any, ...]:
    """A job's merge: the orders of all members in one list, groups that name them by place."""
    import numpy as np

    expression, shape = tensor.expression, tensor.shape
    rows, columns = math.prod(shape[1:-1]), expression.axis.endswith("columns")
    orders: list[NDArray[np.uint32]] = []
    groups = []
    for group in expression.groups:
        parts = []
        for member, weight, order in zip(group.members, group.weights, group.orders):
            place = _core.AS_IS
            if order and expression.axis != "none":
                place = len(orders)
                neurons = np.frombuffer(order, "<u2").astype(np.uint32)
                orders.append(np.concatenate([neurons, neurons + len(neurons)]) if "half" in expression.axis else neurons)
            parts.append((member, place, weight))
        groups.append(parts)
    return rows, columns, orders, groups


def _importance_parts(tensor: OutputTensor, entry: Entry | None) -> list[list[tuple[int, int]]]:
    """The sums that are added for each importance row of a merged tensor: those of all members of its group. They belong
    to the columns of the tensor and come in their order."""
    row, parts, place = tensor.shape[-1], [], 0
    ordered = tensor.expression.axis == "columns"
    for group, number in zip(tensor.expression.groups, tensor.importance.rows):
        places = {}
        for member, order in zip(group.members, group.orders):
            places[member] = place if order and ordered else _core.AS_IS
            place += bool(order) and tensor.expression.axis != "none"
        several = number if isinstance(number, tuple) else ()
        parts.append([(entry.offset + member * row * 4, places[member]) for member in several])
    return parts


def _importance(tensor: OutputTensor, imatrix: Imatrix | None, source: int) -> dict[str, Any]:
    """A job's importance. The rows stay in the importance matrix, which is source number `source` of the run."""
    if tensor.importance is None:
        return {}
    import numpy as np

    assert imatrix is not None
    row, entry = tensor.shape[-1], imatrix.entries.get(tensor.importance.ref)  # None: all its rows are ones
    held: dict[int, int] = {}  # ONES, MEAN -> row of `inline`
    inline, rows, divisors = [], [], []
    for number in tensor.importance.rows:
        if isinstance(number, tuple):  # of a merged expert
            rows.append((source, entry.offset + number[0] * row * 4))
            divisors.append(sum(entry.divisor(member, row) for member in number))
            continue
        if number >= 0:
            rows.append((source, entry.offset + number * row * 4))
            divisors.append(entry.divisor(number, row))
            continue
        if number not in held:
            held[number] = len(inline)
            inline.append({ONES: lambda: np.ones(row, np.float32),
                           MEAN: lambda: imatrix.mean_row(entry.name, row)}[number]())
        rows.append((_core.IN_MEMORY, held[number]))
        divisors.append(1.0)
    more = {"importance_parts": _importance_parts(tensor, entry)} if isinstance(tensor.expression, Merge) else {}
    return {**more, "importance": np.array(inline, np.float32).reshape(-1, row),
            "importance_rows": np.array(rows, np.uint64), "importance_divisors": np.array(divisors, np.float32)}


def source_runs(model: Model, tensor: OutputTensor, repair: Repair | None = None,
                repair_source: int = 0) -> NDArray[np.uint64]:
    """[n, 3]: source, byte offset, bytes. Neighbouring slices that are kept are one run. repair_source: the number of
    the repair among the run's sources."""
    import numpy as np

    expression = tensor.expression
    if isinstance(expression, (Take, FromRepair)):
        if isinstance(expression, Take):
            ref, source, indices = model.tensors[expression.ref], None, expression.indices
        else:
            assert repair is not None
            ref, source, indices = repair.tensors[expression.ref], repair_source, expression.rows
        real = [i for i in indices if i != PAD]
        if not real or not ref.shape or min(real) < 0 or max(real) >= ref.shape[0]:
            raise BadPlan("slices out of range", object=tensor.name, expected=f"within {list(ref.shape)}")
        step = ref.nbytes // ref.shape[0]
        runs = [(ref.source if source is None else source, ref.offset + first * step, n * step)
                for first, n in merge_adjacent(real)]
        if len(real) < len(indices):  # the pads come last
            fill = getattr(expression, "fill", 0.0)
            runs.append((_core.FILL, int.from_bytes(struct.pack("<f", fill), "little"), (len(indices) - len(real)) * step))
    else:
        refs = expression.refs if isinstance(expression, Stack) else (expression.ref,)
        runs = [(ref.source, ref.offset, ref.nbytes) for ref in (model.tensors[name] for name in refs)]
    return np.array(runs, dtype=np.uint64).reshape(-1, 3)
