"""Fit a file into a size: choose a type for each tensor, within a family of types, by the error that it makes.

The error of a tensor in a type is measured on a sample of its rows, encoded and decoded again: the sum of w * (x - y)^2
over the sum of w * x^2, w being the importance of the column (1 without an importance matrix). What is minimised is the
plain sum of these relative errors over the tensors, under the bytes of the file: start with the smallest types, then
take the steps to larger ones, the most error for a byte first. (Weighing the tensors by their size, or by its root,
gives a higher perplexity: a small tensor disturbs what passes through it as much as a large one.)

The same choice on every machine, number of threads and budget of memory: the rows of the sample follow from the shape
alone, the kernels are bit-identical, sums have a fixed order, ties go to the tensor that comes first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ..base.errors import BadPlan, SurgeryError
from ..base.limits import Limits
from ..base.progress import Progress, ProgressLike, as_progress
from ..base.units import human, parse_file_size
from ..files.companions import Companions
from ..files.imatrix import Imatrix
from ..files.model import Model
from ..gate.check import check
from ..gate.checked import CheckedPlan
from ..plan_data.edits import PlanData, Quantize
from ..plan_data.expressions import MEAN, ONES, Importance, ImportanceRow, OutputTensor
from ..quant.arrays import dequantize, quantize
from ..quant.types import row_bytes, tensor_type
from ..recipes import importance, mixes
from ..recipes.overrides import patterns

# The types of a family. Which of them are worth their bytes for a tensor is measured, not assumed.
LADDERS = {
    "K": ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"),
    "IQ": ("IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS", "Q5_K", "Q6_K", "Q8_0"),
    "legacy": ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    "MXFP4": ("MXFP4", "Q8_0"),
    "NVFP4": ("NVFP4", "Q8_0"),
    "Q8_0": ("Q8_0",),
}
SAMPLE = 1 << 17  # elements of a tensor that are measured,
ROWS_LEAST = 32  # in at least so many rows (so that as many experts have one),
SAMPLE_MOST = 1 << 18  # unless these are more elements than this


@dataclass(frozen=True)
class Choice:
    """What became of one tensor. error is relative, of its own rows; None where nothing had to be measured."""

    name: str
    role: str
    type: str
    nbytes: int
    error: float | None


@dataclass(frozen=True)
class Fitted:
    """overrides: (pattern, type) pairs for Plan.quantize, after the caller's own, or for llama-quantize's
    --tensor-type. file_bytes and bits_per_weight are those of the whole output. choices: of all tensors, in order."""

    overrides: tuple[tuple[str, str], ...]
    file_bytes: int
    bits_per_weight: float
    choices: list[Choice]
    notes: list[str]

    @property
    def error(self) -> float:
        """What was minimised: the sum of the relative errors."""
        return math.fsum(choice.error or 0.0 for choice in self.choices)


def ladder(file_type: str) -> tuple[str, ...]:
    """The types that fit() chooses from for this file type. BadPlan for one without a family."""
    name = file_type.upper()
    if name.startswith("IQ"):
        return LADDERS["IQ"]
    if re.fullmatch(r"Q[2-6]_K(_[SML])?", name):
        return LADDERS["K"]
    if name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        return LADDERS["legacy"]
    if name.removesuffix("_MOE") in ("MXFP4", "NVFP4", "Q8_0"):
        return LADDERS[name.removesuffix("_MOE")]
    raise BadPlan(
        "no family of types to choose from",
        object=name,
        expected="a file type such as Q4_K_M, IQ3_M, Q4_0, MXFP4_MOE or Q8_0",
    )


def fit(
    model: Model,
    data: PlanData,
    limits: Limits,
    *,
    size: int | str | None = None,
    bpw: float | None = None,
    progress: ProgressLike = None,
) -> Fitted:
    """Types for the tensors of a plan so that its output has at most `size` bytes, or at most `bpw` bits per weight.

    data has a Quantize edit, whose type names the family. Chosen are the types of the tensors that llama-quantize would
    quantize and that no override or option of the edit decides; one that is quantized already stays as it is unless
    allow_requantize. size: bytes or "22GB", of the whole file or of all shards, header and padding included. bpw: as
    CheckedPlan.summary counts, over all tensors. Reads a sample of each tensor. progress: True, or a callable(tensors
    done, tensors), which may raise to end the run. BadPlan where even the smallest types are too large, with the size
    that they come to.
    """
    edit = next((edit for edit in data.edits if isinstance(edit, Quantize)), None)
    if edit is None:
        raise BadPlan("nothing to fit: the plan does not quantize", object="fit", hint="name a family: Q4_K_M, IQ3_M")
    rungs = ladder(edit.type)
    target = _Target.parse(size, bpw)
    with Companions() as companions:
        return _fit(model, data, edit, rungs, target, limits, companions, progress)


def _fit(
    model: Model,
    data: PlanData,
    edit: Quantize,
    rungs: Sequence[str],
    target: _Target,
    limits: Limits,
    companions: Companions,
    progress: ProgressLike,
) -> Fitted:
    def checked(overrides: Sequence[tuple[str, str]]) -> CheckedPlan:
        edits = tuple(replace(e, overrides=(*edit.overrides, *overrides)) if e is edit else e for e in data.edits)
        return check(model, replace(data, edits=edits), limits, companions)

    base = checked(())
    imatrix = None
    if edit.imatrix is not None:
        with suppress(SurgeryError):  # a blocker of the plan, raised below
            imatrix = companions.imatrix(edit.imatrix)
    free, quantized = _undecided(base, edit)
    tensors = _tensors(model, imatrix, edit, rungs, free)
    solution = _Solution(base, tensors, {t.name: t.source_type for t in quantized}, checked, target)
    excess = solution.take([0] * len(tensors))
    if solution.plan.blockers:
        raise solution.plan.blockers[0]
    if excess > 0 and not tensors:
        raise BadPlan(
            "nothing to choose: overrides and options decide every tensor",
            object=target.name,
            found=target.found(solution.plan),
            expected=target.text,
        )
    if excess > 0:
        raise BadPlan(
            "even the smallest types are too large",
            object=target.name,
            found=target.found(solution.plan),
            expected=target.text,
            hint=f"the family is {', '.join(rungs)}{_needing(rungs) if imatrix is None else ''}",
        )
    notes = []
    if solution.take([len(t.steps) - 1 for t in tensors]) <= 0:
        notes.append("the largest types of the family fit")
    else:
        with as_progress(progress, "measuring", "tensors") as report:
            _measure(model, tensors, imatrix, edit.quality, limits.threads, report)
        _solve(solution, tensors, -excess)
    plan = solution.plan
    if plan.blockers:
        raise plan.blockers[0]
    by_name = {t.output.name: t for t in tensors}
    choices = [
        Choice(t.name, t.role, t.type, nbytes, by_name[t.name].error(t.type) if t.name in by_name else None)
        for t, nbytes in zip(plan.tensors, plan.nbytes, strict=True)
    ]
    return Fitted(solution.overrides, plan.file_bytes, _bpw(plan), choices, notes)


def _needing(rungs: Sequence[str]) -> str:
    """What to say of the types that are left out where there is no importance matrix."""
    needing = [name for name in rungs if name in mixes.WANT_IMPORTANCE]
    return f"; {', '.join(needing)} need an importance matrix" if needing else ""


def _bpw(plan: CheckedPlan) -> float:
    return 8 * sum(plan.nbytes) / plan.elements if plan.elements else 0.0


def check_target(size: int | str | None, bpw: float | None) -> None:
    """BadPlan for what `fit` would refuse of these before it reads anything."""
    _Target.parse(size, bpw)


@dataclass(frozen=True)
class _Target:
    name: str
    text: str
    size: int | None
    bpw: float | None

    @staticmethod
    def parse(size: int | str | None, bpw: float | None) -> _Target:
        if (size is None) == (bpw is None):
            raise BadPlan(
                "give a size or bits per weight",
                object="fit",
                found="neither" if size is None else "both",
                hint='size="22GB" or bpw=4.2',
            )
        if size is not None:
            nbytes = parse_file_size(size)
            if nbytes <= 0:
                raise BadPlan("not a size", object="size", found=size, expected="above 0")
            return _Target("size", f"at most {nbytes} bytes ({human(nbytes)})", nbytes, None)
        try:
            bits = float(bpw) if bpw is not None and not isinstance(bpw, (bool, str)) else math.nan
        except (TypeError, ValueError):
            bits = math.nan
        if not 0 < bits < math.inf:
            raise BadPlan("not a number of bits", object="bpw", found=repr(bpw), expected="such as 4.2")
        return _Target("bpw", f"at most {bits:g} bits per weight", None, bits)

    def excess(self, plan: CheckedPlan) -> int:
        """Bytes by which the plan is too large; below 1 where it fits."""
        if self.size is not None:
            return plan.file_bytes - self.size
        return sum(plan.nbytes) - math.floor((self.bpw or 0.0) * plan.elements / 8)

    def found(self, plan: CheckedPlan) -> str:
        if self.size is not None:
            return f"{plan.file_bytes} bytes ({human(plan.file_bytes)})"
        return f"{math.ceil(_bpw(plan) * 1000) / 1000:.3f} bits per weight"


# --- which tensors, and which types for each -------------------------------------------------------------------------


@dataclass
class _Tensor:
    """A tensor whose type is to be chosen. steps: (type, bytes in the file), smallest first; after the measurement only
    those that are worth it, with their errors."""

    output: OutputTensor
    importance: Importance | None
    steps: list[tuple[str, int]]
    errors: list[float]

    def error(self, type: str) -> float | None:
        return next((e for (name, _), e in zip(self.steps, self.errors, strict=False) if name == type), None)


def _undecided(base: CheckedPlan, edit: Quantize) -> tuple[list[OutputTensor], list[OutputTensor]]:
    """The tensors to choose a type for, and those that stay because they are quantized already."""
    patterns = [re.compile(pattern) for pattern, _ in edit.overrides]
    tied = not any(t.name in mixes.OUTPUT for t in base.tensors)
    free: list[OutputTensor] = []
    kept: list[OutputTensor] = []
    for tensor in base.tensors:
        output = tensor.name in mixes.OUTPUT or (tied and tensor.name in mixes.TOKEN_EMBEDDING)
        decided = (
            any(pattern.search(tensor.name) for pattern in patterns)
            or (output and edit.output_type is not None)
            or (tensor.name in mixes.TOKEN_EMBEDDING and edit.token_embedding_type is not None)
        )
        if (
            decided
            or not mixes.allows(base.architecture, tensor.name, tensor.shape, edit.leave_output)
            or not math.prod(tensor.shape)
            or tensor.expression.word not in ("copy", "take", "repair")
        ):
            continue
        (kept if tensor_type(tensor.source_type).quantized and not edit.allow_requantize else free).append(tensor)
    return free, kept


def _tensors(
    model: Model, imatrix: Imatrix | None, edit: Quantize, rungs: Sequence[str], free: Sequence[OutputTensor]
) -> list[_Tensor]:
    """The undecided tensors that at least one type of the family can hold; all others keep the file type's choice."""
    rows: dict[str, Importance] = {}
    if imatrix is not None and edit.imatrix is not None:
        # As if all became a type that uses importance, whatever the base type does with it.
        weighted = [replace(t, type="Q4_0" if t.source_type != "Q4_0" else "Q4_1") for t in free]
        rows = importance.resolve(imatrix, edit.imatrix, model, weighted).importance
    file_type = mixes.file_type(edit.type, edit.pure)
    found = []
    for output in free:
        its_rows = rows.get(output.name)
        steps = []
        for type in _fitting(rungs, output.shape[-1]):
            wants = tensor_type(type).needs_importance or mixes.wants_importance(file_type, output.name, type)
            if its_rows is not None or not wants or type == output.source_type:
                nbytes = math.prod(output.shape[:-1]) * row_bytes(type, output.shape[-1])
                steps.append((type, nbytes))
        if steps:
            found.append(_Tensor(output, its_rows, sorted(steps, key=lambda step: step[1]), []))
    return found


def _fitting(rungs: Sequence[str], row: int) -> list[str]:
    """The types that can hold such rows; in place of one that cannot, what llama-quantize takes instead (not F16)."""
    types = [mixes.fallback(type, row) for type in rungs]
    return list(dict.fromkeys(type for type in types if type is not None and type != "F16"))


# --- the error of each type ------------------------------------------------------------------------------------------


def sample_rows(rows: int, elements: int) -> list[int]:
    """Rows of a tensor of `rows` rows of `elements` elements: spread over all of it, one at a scattered place in each
    of equal parts, so that a period (the first row of each expert, of each head) is not all that is seen."""
    number = max(SAMPLE // elements, min(ROWS_LEAST, SAMPLE_MOST // elements), 1)
    if number >= rows:
        return list(range(rows))
    parts = [i * rows // number for i in range(number + 1)]
    # Multiples of the golden ratio, modulo 1, are spread as evenly as can be.
    return [first + (i * 40503 % 65536) * (end - first) // 65536 for i, (first, end) in enumerate(pairwise(parts))]


def _measure(
    model: Model,
    tensors: Sequence[_Tensor],
    imatrix: Imatrix | None,
    quality: str,
    threads: int,
    progress: Progress | None,
) -> None:
    """Fills errors, and leaves of the steps those on the lower convex hull: each is worth its bytes more than the next.
    One tensor's sample is in memory at a time."""
    for done, tensor in enumerate(tensors):
        if progress is not None:
            progress(done, len(tensors))
        if len(tensor.steps) > 1:
            values, weights = _sample(model, tensor, imatrix, threads)
            tensor.errors = [_error(tensor, values, weights, type, threads, quality) for type, _ in tensor.steps]
            hull = _hull([(nbytes, error) for (_, nbytes), error in zip(tensor.steps, tensor.errors, strict=True)])
            tensor.steps = [tensor.steps[i] for i in hull]
            tensor.errors = [tensor.errors[i] for i in hull]
    if progress is not None:
        progress(len(tensors), len(tensors))


def _sample(
    model: Model, tensor: _Tensor, imatrix: Imatrix | None, threads: int
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Rows and, if there is an importance matrix, the importance of their columns, both [n, k]."""
    output = tensor.output
    k = output.shape[-1]
    total = math.prod(output.shape[:-1])
    rows = sample_rows(total, k)
    source, slices = rows, output.expression.slices  # repaired rows are near enough to those they replace
    if slices is not None:
        per_slice = total // output.shape[0]
        taken = [i if isinstance(i, int) else 0 for i in slices]  # a padding expert is as easy to encode as any
        source = [taken[row // per_slice] * per_slice + row % per_slice for row in rows]
    values = model.tensors[output.expression.refs[0]].dequantize(rows=source, threads=threads)
    if not np.isfinite(values).all():
        raise BadPlan("a value that is not finite", object=output.name)
    if tensor.importance is None or imatrix is None:
        return values, None
    numbers = tensor.importance.rows
    used = [numbers[row * len(numbers) // total] for row in rows]
    ref = tensor.importance.ref
    known: dict[ImportanceRow, NDArray[np.float32]] = {ONES: np.ones(k, np.float32)}
    if MEAN in used:
        known[MEAN] = imatrix.mean_row(ref, k)
    if any(isinstance(number, int) for number in used):
        known.update(enumerate(imatrix.importance(ref).reshape(-1, k)))
    return values, np.stack([known[number] for number in used])


def _error(
    tensor: _Tensor,
    values: NDArray[np.float32],
    weights: NDArray[np.float32] | None,
    type: str,
    threads: int,
    quality: str = "default",
) -> float:
    """The relative error of the sample in `type`; 0 for the type that the rows already have."""
    if type == tensor.output.source_type:
        return 0.0
    n, k = values.shape
    try:
        # As n experts of one row each: every row has its own importance.
        encoded = quantize(values.reshape(n, 1, k), type, weights, threads=threads, quality=quality)
    except SurgeryError as error:  # the core knows the row of the sample, not the tensor
        error.object = tensor.output.name
        raise
    decoded = dequantize(encoded, type, threads=threads).reshape(n, k)
    x = values.astype(np.float64)
    difference = (x - decoded) ** 2
    square = x * x
    if weights is not None:
        difference *= weights
        square *= weights
    noise, signal = _sum(difference), _sum(square)
    if signal == 0.0:
        return 0.0 if noise == 0.0 else 1.0
    return noise / signal


def _sum(x: NDArray[np.float64]) -> float:
    """In a fixed order: numpy adds the rows of a C-contiguous array one after the other, fsum is exact."""
    return math.fsum(x.sum(axis=0).tolist())


def _hull(points: Sequence[tuple[int, float]]) -> list[int]:
    """Indices of the (bytes, error) points on the lower convex hull, from the smallest to the least error."""

    def gain(a: int, b: int) -> float:  # the error that a byte saves on the way from a to b
        return (points[a][1] - points[b][1]) / (points[b][0] - points[a][0])

    hull: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if hull and points[i][1] >= points[hull[-1]][1]:
            continue  # more bytes for no less error
        while len(hull) > 1 and gain(hull[-2], hull[-1]) <= gain(hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


# --- the choice ------------------------------------------------------------------------------------------------------


class _Solution:
    """The types taken last and the plan that they give."""

    def __init__(
        self,
        base: CheckedPlan,
        tensors: Sequence[_Tensor],
        fixed: dict[str, str],
        checked: Callable[[Sequence[tuple[str, str]]], CheckedPlan],
        target: _Target,
    ):
        self.names = [t.name for t in base.tensors]
        self.tensors, self.fixed, self.checked, self.target = tensors, fixed, checked, target
        self.overrides: tuple[tuple[str, str], ...] = ()
        self.plan = base

    def take(self, chosen: Sequence[int]) -> int:
        """Takes a step of each tensor. Returns the bytes by which the plan is too large then."""
        types = {**{t.output.name: t.steps[i][0] for t, i in zip(self.tensors, chosen, strict=True)}, **self.fixed}
        self.overrides = tuple(patterns({name: types[name] for name in self.names if name in types}, self.names))
        self.plan = self.checked(self.overrides)
        return self.target.excess(self.plan)


def _solve(solution: _Solution, tensors: Sequence[_Tensor], room: int) -> None:
    """Takes the best steps that fit into `room` bytes over the smallest types."""
    alignment = solution.plan.alignment if solution.target.size is not None else 1
    costs = [[-(-nbytes // alignment) * alignment for _, nbytes in t.steps] for t in tensors]
    while True:
        chosen = climb(costs, [t.errors for t in tensors], room)
        # Headers, shards and the tensors that keep the file type's choice may differ a little between plans.
        excess = solution.take(chosen)
        if excess <= 0 or not any(chosen):
            return
        room -= excess


def climb(costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], room: int) -> list[int]:
    """A step of each tensor, whose costs rise and errors fall along a convex hull; together at most `room` over the
    costs of the first steps.

    Greedy: the steps in the order of the error that a byte of theirs saves. One that does not fit ends its tensor's
    climb and no other's. So more room never gives more error: where the first decision differs, the larger room takes a
    step that saves more than all that the smaller one can do with the bytes it has left. And the error is above the
    least possible by less than the first step that did not fit would save.
    """
    steps = sorted(
        (-(e[i - 1] - e[i]) / (c[i] - c[i - 1]), tensor, i)
        for tensor, (c, e) in enumerate(zip(costs, errors, strict=True))
        for i in range(1, len(e))
    )
    chosen = [0] * len(costs)
    for _, tensor, i in steps:
        more = costs[tensor][i] - costs[tensor][i - 1]
        if chosen[tensor] == i - 1 and more <= room:
            chosen[tensor] = i
            room -= more
    return chosen
