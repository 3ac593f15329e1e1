"""Which rows of an importance matrix each encoded tensor gets, and what becomes of those that are missing."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..base.errors import BadPlan, SurgeryError
from ..base.words import counted, listed
from ..files.imatrix import POLICIES
from ..plan_data.edits import UseImatrix
from ..plan_data.expressions import MEAN, ONES, Importance, ImportanceRow, OutputTensor, Substitute
from ..plan_data.outcome import Faults
from ..quant.types import tensor_type
from .mixes import OUTPUT, TOKEN_EMBEDDING

if TYPE_CHECKING:
    from ..files.imatrix import Entry, Imatrix
    from ..files.model import Model


_FILL = "imatrix_missing= (--imatrix-missing) ones or layer-mean"
_LISTED = 8  # blockers of one kind are listed up to this number, above it counted

# A tensor without an entry -> tensors whose entry has the same inputs, best first; MEAN: the mean over their heads.
_TWINS: tuple[tuple[str, tuple[tuple[str, Substitute | None], ...]], ...] = (
    ("ffn_gate_up_exps", (("ffn_gate_exps", None), ("ffn_up_exps", None))),
    ("ffn_gate_exps", (("ffn_gate_up_exps", None), ("ffn_up_exps", None))),
    ("ffn_up_exps", (("ffn_gate_up_exps", None), ("ffn_gate_exps", None))),
    ("attn_v_b", (("attn_kv_b", None),)),
    ("attn_kv_b", (("attn_v_b", MEAN),)),
)


@dataclass(frozen=True)
class _Policy:
    """What a missing entry and a row that says nothing come to. fill: in place of such a row. refuses_unseen,
    refuses_zero: such rows are refused instead. missing: a tensor without an entry is left without importance, refused,
    or gets a substitute."""

    fill: Substitute
    refuses_unseen: bool
    refuses_zero: bool
    missing: Literal["leave", "refuse", "substitute"]


_POLICIES: Mapping[str, _Policy] = {
    "default": _Policy(ONES, refuses_unseen=False, refuses_zero=True, missing="leave"),
    "fail": _Policy(ONES, refuses_unseen=True, refuses_zero=True, missing="refuse"),
    "ones": _Policy(ONES, refuses_unseen=False, refuses_zero=False, missing="substitute"),
    "layer-mean": _Policy(MEAN, refuses_unseen=False, refuses_zero=False, missing="substitute"),
}


@dataclass
class ImportanceOutcome(Faults):
    """importance: by the name of the output tensor. missing: names of those that are encoded without, though their type
    uses it; refused: of those that a blocker is about. tensor_notes: by name; what deviates from the entry's own
    rows."""

    importance: dict[str, Importance] = field(default_factory=dict)
    tensor_notes: dict[str, list[str]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)


def used(name: str, use: UseImatrix) -> bool:
    """Is the entry of this name used? As llama-quantize's --include-weights and --exclude-weights: parts of names."""
    return (not use.include or any(part in name for part in use.include)) and not any(
        part in name for part in use.exclude
    )


def used_entries(imatrix: Imatrix, use: UseImatrix) -> int:
    """How many entries are used. With none, llama-quantize works as without an importance matrix."""
    return sum(used(name, use) for name in imatrix.entries)


def resolve(imatrix: Imatrix, use: UseImatrix, model: Model, tensors: Sequence[OutputTensor]) -> ImportanceOutcome:
    """The importance of the tensors that will be encoded; those whose type ignores it are passed over.

    An entry has the name of the source's tensor and is cut as the tensor is. Policies (use.missing), for an expert that
    was never seen (count 0) and for a tensor without an entry: "default" does as llama-quantize, ones, and without
    importance; "fail" refuses; "ones" and "layer-mean" take ones or the mean of the entry, for a tensor without an
    entry that of its twin (fused and separate gate and up, kv_b and v_b), else ones. token_embd and output.weight
    normally have no entry and then are encoded without one under every policy, unless their type cannot be. Rows that
    are all zero are refused, or replaced under "ones" and "layer-mean". Reads the sums of the entries that are used.
    """
    out = ImportanceOutcome()
    if use.missing not in _POLICIES:
        out.block(BadPlan("unknown policy", object="imatrix_missing", found=use.missing, expected=", ".join(POLICIES)))
    if use.include and use.exclude:
        out.block(BadPlan("include_weights and exclude_weights exclude each other", object="imatrix"))
    if out.blockers:
        return out
    for option, parts in (("include_weights", use.include), ("exclude_weights", use.exclude)):
        out.warnings += [
            f"{option} {part}: no entry of the importance matrix has it in its name"
            for part in parts
            if not any(part in name for name in imatrix.entries)
        ]
    _Resolver(imatrix, use, model, out).run(tensors)
    return out


class _Resolver:
    def __init__(self, imatrix: Imatrix, use: UseImatrix, model: Model, out: ImportanceOutcome):
        self.imatrix, self.policy, self.model, self.out = imatrix, _POLICIES[use.missing], model, out
        self.entries = {name: entry for name, entry in imatrix.entries.items() if used(name, use)}
        self.refused: set[str] = set()  # entries with a bad value, named once
        self.counts: Counter[str] = Counter()
        self.replaced: dict[tuple[str, str], tuple[int, int]] = {}  # what, why -> how many, in how many tensors

    def run(self, tensors: Sequence[OutputTensor]) -> None:
        chosen = [t for t in tensors if t.encoded and (t.best or tensor_type(t.type).uses_importance)]
        errors: list[SurgeryError] = []
        for tensor in chosen:
            self.notes: list[str] = []
            try:
                importance = self.importance(tensor, tensor_type(tensor.type).needs_importance)
            except SurgeryError as error:
                self.out.refused.add(tensor.name)
                errors.append(error)
                continue
            if importance is None:
                self.out.missing.append(tensor.name)
            else:
                self.out.importance[tensor.name] = importance
            if self.notes:
                self.out.tensor_notes[tensor.name] = self.notes
        self.out.blockers += _counted(errors)
        self.summarize(len(chosen))

    def summarize(self, tensors: int) -> None:
        parts = [counted(tensors, "tensor")]
        names = self.out.missing
        if names:
            parts.append(f"{len(names)} without an entry ({listed(names, 3)})")
        if n := self.counts["twin"]:
            parts.append(f"{n} with the entry of a twin")
        if n := self.counts["filled"]:
            parts.append(f"{n} with ones for want of an entry")
        if n := self.counts["direct"]:
            parts.append(f"{n} with an entry of the cut model")
        for (what, problem), (n, several) in self.replaced.items():
            parts.append(f"{counted(n, what)} {problem} in {counted(several, 'tensor')}")
        if tensors:
            normal = not self.counts and not self.replaced and set(names) <= {*OUTPUT, *TOKEN_EMBEDDING}
            (self.out.note if normal else self.out.warn)(f"importance: {', '.join(parts)}")

    def importance(self, tensor: OutputTensor, needed: bool) -> Importance | None:
        refs = tensor.expression.refs
        ref = refs[0] if len(refs) == 1 else tensor.name
        entry = self.entries.get(ref)
        if entry is not None:
            return Importance(ref, self.rows(entry, tensor, ref))
        twin = next(self.twins(ref, tensor), None)
        exempt = ref in (*OUTPUT, *TOKEN_EMBEDDING) and not needed  # llama-imatrix records none for them
        missing = "leave" if exempt else self.policy.missing
        if missing == "refuse":
            raise BadPlan("no entry in the importance matrix", path=self.imatrix.path, object=ref, hint=_hint(twin))
        if missing == "leave":
            self.notes.append(
                "no entry in the importance matrix" + (f" ({twin[0].name} has the same inputs)" if twin else "")
            )
            return None
        if twin is None:
            self.counts["filled"] += 1
            self.notes.append("no entry in the importance matrix: importance of ones")
            return Importance(ref, (ONES,) * _slices(tensor.shape))
        entry, how = twin
        self.counts["twin"] += 1
        self.notes.append(f"no entry in the importance matrix: {'the mean of ' if how == MEAN else ''}{entry.name}")
        if how == MEAN:
            unseen, zero, _ = self.useless(entry, tensor.shape[-1])
            nothing = len(unseen) + len(zero) == entry.rows(tensor.shape[-1])
            return Importance(entry.name, (ONES if nothing else MEAN,) * _slices(tensor.shape))
        return Importance(entry.name, self.rows(entry, tensor, ref))

    def rows(self, entry: Entry, tensor: OutputTensor, ref: str) -> tuple[ImportanceRow, ...]:
        """The entry's rows for the slices of the tensor, after the policy."""
        numbers, row = self.numbers(entry, tensor, ref), tensor.shape[-1]
        unseen, zero, fill = self.useless(entry, row)
        every = [n for number in numbers for n in (number if isinstance(number, tuple) else (number,))]
        if self.policy.refuses_unseen:
            self.refuse("experts never seen" if len(numbers) > 1 else "never seen", every, unseen, entry)
        if self.policy.refuses_zero:
            self.refuse("importance is all zero", every, zero, entry)
        # Of a merged expert what its members saw together; one that saw nothing adds nothing.
        useless = {*unseen, *zero}
        numbers = [
            (tuple(n for n in number if n not in useless) or number[0]) if isinstance(number, tuple) else number
            for number in numbers
        ]
        what = "expert" if len(numbers) > 1 else "row"
        for problem, some in (("never seen", set(unseen)), ("of zeros", set(zero))):
            if n := sum(number in some for number in numbers):
                before = self.replaced.get((what, problem), (0, 0))
                self.replaced[what, problem] = before[0] + n, before[1] + 1
                self.notes.append(f"{counted(n, what)} {problem}: importance of {fill.value}")
        return tuple(fill if number in useless else number for number in numbers)

    def useless(self, entry: Entry, row: int) -> tuple[list[int], list[int], Substitute]:
        """Rows that were never seen, rows of zeros, and what to put in their place."""
        if entry.name in self.refused:
            raise BadPlan("importance that cannot be used", path=self.imatrix.path, object=entry.name)
        zero = self.imatrix.zero_rows(entry.name, row)
        if error := self.imatrix.problem(entry.name):
            self.refused.add(entry.name)
            raise error
        unseen = self.imatrix.unseen(entry.name, row)
        # The mean of rows that say nothing says nothing.
        return unseen, zero, ONES if len(unseen) + len(zero) == entry.rows(row) else self.policy.fill

    def refuse(self, problem: str, numbers: Sequence[int | Substitute], bad: Sequence[int], entry: Entry) -> None:
        found = sorted(set(bad) & set(numbers))
        if found:
            experts = f"experts {listed(found, 12, number=True)}" if len(numbers) > 1 else None
            raise BadPlan(problem, path=self.imatrix.path, object=entry.name, found=experts, hint=_FILL)

    def numbers(self, entry: Entry, tensor: OutputTensor, ref: str) -> Sequence[ImportanceRow]:
        """Which row of the entry belongs to each slice of the tensor, before the policy. BadPlan for an unfit entry."""
        row, slices = tensor.shape[-1], _slices(tensor.shape)
        source = self.model.tensors.get(ref)
        shape = tensor.shape if source is None else source.shape
        here = _slices(shape)
        try:
            rows = entry.rows(row)
        except BadPlan as error:
            if entry.size == row * here:  # the counts do not fit
                error.path = self.imatrix.path
                raise
            rows = -1
        if rows == here:
            taken = tensor.expression.slices
            if taken is None or len(shape) < 3:
                return range(slices)
            each = here // shape[0]  # 4-D: several rows to a slice of the slowest axis
            return [_row(i, each, j) for i in taken for j in range(each)]
        if rows == slices:
            self.counts["direct"] += 1
            self.notes.append(f"{entry.name} in the importance matrix fits the cut model: used as it is")
            return range(slices)
        if entry.name != ref and rows == 1:  # a twin of one row, the same inputs for all slices
            return [0] * slices
        raise BadPlan(
            "importance of another size",
            path=self.imatrix.path,
            object=entry.name,
            found=entry.size,
            expected=row * here,
            hint=f"exclude_weights= (--exclude-weights) {entry.name} leaves it out",
        )

    def twins(self, ref: str, tensor: OutputTensor) -> Iterator[tuple[Entry, Substitute | None]]:
        """Entries of other tensors with the same inputs that fit."""
        for part, others in _TWINS:
            if re.search(rf"\.{part}\.weight$", ref) is None:
                continue
            for other, how in others:
                entry = self.entries.get(ref.removesuffix(f"{part}.weight") + f"{other}.weight")
                if entry is None or entry.size % tensor.shape[-1]:
                    continue
                source = self.model.tensors.get(ref)
                fits = {_slices(tensor.shape), _slices(source.shape) if source else 0, 1}
                if how == MEAN or entry.size // tensor.shape[-1] in fits:
                    yield entry, how


def _counted(errors: Sequence[SurgeryError]) -> list[SurgeryError]:
    """The errors; of a kind that is there very often, as with an importance matrix of another model, the first with the
    number of the others."""
    often = {problem: n for problem, n in Counter(error.problem for error in errors).items() if n > _LISTED}
    found = []
    for error in errors:
        n = often.get(error.problem, 1)
        if n > 1:
            often[error.problem] = 0
            error = copy.copy(error)
            error.problem += f" (and {counted(n - 1, 'more tensor')})"
        if n:
            found.append(error)
    return found


def _row(slice: int | tuple[int, ...] | None, each: int, j: int) -> ImportanceRow:
    """Row j of the `each` that belong to a slice: of those of several that are merged, of ones for a pad."""
    if slice is None:
        return ONES
    return tuple(i * each + j for i in slice) if isinstance(slice, tuple) else slice * each + j


def _slices(shape: tuple[int, ...]) -> int:
    """Slices of the third-fastest axis, each with an importance row of its own."""
    return math.prod(shape[:-2])


def _hint(twin: tuple[Entry, Substitute | None] | None) -> str:
    return f"{_FILL} takes {twin[0].name}, which has the same inputs" if twin else _FILL
