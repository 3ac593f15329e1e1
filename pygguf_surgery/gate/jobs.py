"""The checked plan as the engine takes it: one job per tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .._core import ImportanceRow, Job, Member, Run, Source
from .._core import Merge as MergedSlices
from .._core import Remap as RemappedIds
from ..base.errors import BadPlan, Unsupported
from ..base.runs import merge_adjacent
from ..files.companions import Companions
from ..files.imatrix import Entry, Imatrix
from ..files.model import Model
from ..files.repair import Repair
from ..plan_data.edits import KeepExperts, Quantize
from ..plan_data.expressions import (
    MEAN,
    ONES,
    Copy,
    Merge,
    OutputTensor,
    Remap,
    Repaired,
    Slices,
    Stack,
    Substitute,
    Take,
)
from ..quant.types import row_bytes, tensor_type

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from .checked import CheckedPlan

Orders = list[dict[int, int | None]]  # of each group: member -> place of the order of its neurons, None: as they are


@dataclass
class Inputs:
    """What a run reads. Its sources are numbered: those of the model, then the importance matrix and the repair if
    there are any."""

    model: Model
    imatrix: Imatrix | None = None
    repair: Repair | None = None

    @property
    def imatrix_source(self) -> int:
        return len(self.model.sources)

    @property
    def repair_source(self) -> int:
        return len(self.model.sources) + (self.imatrix is not None)

    def beside(self) -> list[Source]:
        """The sources after the model's."""
        return [file.source for file in (self.imatrix, self.repair) if file is not None]


@dataclass
class _Lowered:
    """What an expression comes to: the runs that hold its bytes, and what a job does with them, if more than copy or
    encode. Without a merge the runs are as long as the output in the source's type."""

    runs: list[Run]
    remap: RemappedIds | None = None
    merge: MergedSlices | None = None
    orders: Orders = field(default_factory=list)  # of a merge


def build_jobs(model: Model, checked: CheckedPlan, companions: Companions) -> tuple[list[Job], list[Source]]:
    """One job per tensor that has bytes, and what they read beside the model. BadPlan where an expression does not give
    the bytes that its shape needs."""
    inputs = _inputs(model, checked, companions)
    jobs = []
    file_of = {i: number for number, file in enumerate(checked.files) for i in file.tensors}
    for i, (tensor, offset) in enumerate(zip(checked.tensors, checked.offsets, strict=True)):
        if math.prod(tensor.shape):
            jobs.append(_job(tensor, inputs, offset, file_of[i]))
    return jobs, inputs.beside()


def _inputs(model: Model, checked: CheckedPlan, companions: Companions) -> Inputs:
    """The files that the plan's edits name; they are open since the check."""
    inputs = Inputs(model)
    for edit in checked.data.edits:
        if isinstance(edit, Quantize) and edit.imatrix is not None:
            inputs.imatrix = companions.imatrix(edit.imatrix)
        elif isinstance(edit, KeepExperts) and edit.repair is not None:
            inputs.repair = companions.repair(edit.repair)
    return inputs


def _job(tensor: OutputTensor, inputs: Inputs, offset: int, file: int) -> Job:
    source_type, target_type = tensor_type(tensor.source_type), tensor_type(tensor.type)
    row = tensor.shape[-1] if tensor.shape else 1
    if len(tensor.shape) == 1 and tensor.expression.slices is not None:
        if source_type.block != 1 or target_type.block != 1:
            raise Unsupported("a vector of blocks cannot be cut", object=tensor.name, found=tensor.source_type)
        row = 1  # runs are whole rows
    rows = math.prod(tensor.shape) // row
    lowered = lower(tensor, inputs)
    found, expected = sum(run.nbytes for run in lowered.runs), rows * row_bytes(tensor.source_type, row)
    if lowered.merge is None and found != expected:
        raise BadPlan(
            "an expression of another size than its shape",
            object=tensor.name,
            found=f"{found} bytes",
            expected=f"{expected}",
        )
    return Job(
        tensor.name,
        source_type=source_type.id,
        target_type=target_type.id,
        row_elements=row,
        rows=rows,
        target_offset=offset,
        runs=lowered.runs,
        importance_rows=_importance(tensor, inputs, lowered.orders),
        remap=lowered.remap,
        merge=lowered.merge,
        file=file,
        best=tensor.best,
    )


# --- one lowering for each expression -------------------------------------------------------------------------------


def lower(tensor: OutputTensor, inputs: Inputs) -> _Lowered:
    """The runs of a tensor's expression: neighbouring slices that are kept are one."""
    return LOWERINGS[type(tensor.expression)](tensor.expression, tensor, inputs)


def _whole(expression: Copy | Stack, _: OutputTensor, inputs: Inputs) -> _Lowered:
    refs = (inputs.model.tensors[name] for name in expression.refs)
    return _Lowered([Run(ref.source, ref.offset, ref.nbytes) for ref in refs])


def _take(expression: Take, tensor: OutputTensor, inputs: Inputs) -> _Lowered:
    ref = inputs.model.tensors[expression.ref]
    runs = _slices(expression.indices, tensor, ref.shape, ref.nbytes, ref.source, ref.offset)
    if pads := expression.indices.count(None):  # they come last
        runs.append(Run.fill(expression.fill, pads * (ref.nbytes // ref.shape[0])))
    return _Lowered(runs)


def _repaired(expression: Repaired, tensor: OutputTensor, inputs: Inputs) -> _Lowered:
    assert inputs.repair is not None
    ref = inputs.repair.tensors[expression.ref]
    return _Lowered(_slices(expression.rows, tensor, ref.shape, ref.nbytes, inputs.repair_source, ref.offset))


def _remap(expression: Remap, tensor: OutputTensor, inputs: Inputs) -> _Lowered:
    ref = inputs.model.tensors[expression.ref]
    table = tuple(-1 if i is None else i for i in expression.table)
    remap = RemappedIds(table, expression.substitutes, tensor.shape[-1] if tensor.shape else 1)
    return _Lowered([Run(ref.source, ref.offset, ref.nbytes)], remap=remap)


def _merge(expression: Merge, tensor: OutputTensor, inputs: Inputs) -> _Lowered:
    """The orders of all members in one list, groups that name them by place."""
    import numpy as np

    ref = inputs.model.tensors[expression.ref]
    every: list[NDArray[np.uint32]] = []
    groups: list[list[Member]] = []
    orders: Orders = []
    for group in expression.groups:
        members, places = [], {}
        for slice_, weight, order in zip(group.members, group.weights, group.orders, strict=True):
            place = None
            if order and expression.axis != "none":
                place = len(every)
                neurons = np.frombuffer(order, "<u2").astype(np.uint32)
                if "half" in expression.axis:
                    neurons = np.concatenate([neurons, neurons + len(neurons)])
                every.append(neurons)
            members.append(Member(slice_, weight, place))
            places[slice_] = place
        groups.append(members)
        orders.append(places)
    rows = math.prod(tensor.shape[1:-1])
    merge = MergedSlices(rows, groups, orders=every, columns=expression.axis.endswith("columns"))
    return _Lowered([Run(ref.source, ref.offset, ref.nbytes)], merge=merge, orders=orders)


LOWERINGS: Mapping[type, Callable[[Any, OutputTensor, Inputs], _Lowered]] = {
    Copy: _whole,
    Take: _take,
    Stack: _whole,
    Remap: _remap,
    Repaired: _repaired,
    Merge: _merge,
}


def _slices(
    indices: Slices, tensor: OutputTensor, shape: tuple[int, ...], nbytes: int, source: int, offset: int
) -> list[Run]:
    """Runs of the slices `indices`, without pads, of a tensor of this shape that begins at `offset`."""
    real = [i for i in indices if i is not None]
    if not real or not shape or min(real) < 0 or max(real) >= shape[0]:
        raise BadPlan("slices out of range", object=tensor.name, expected=f"within {list(shape)}")
    step = nbytes // shape[0]
    return [Run(source, offset + first * step, n * step) for first, n in merge_adjacent(real)]


# --- importance -------------------------------------------------------------------------------------------------------


def _importance(tensor: OutputTensor, inputs: Inputs, orders: Orders) -> list[ImportanceRow]:
    """A job's importance. The rows stay in the importance matrix, which is one of the sources. That of a merged expert
    is the sum of its members' rows, which belong to the columns of the tensor and come in their order."""
    if tensor.importance is None:
        return []
    imatrix, source = inputs.imatrix, inputs.imatrix_source
    assert imatrix is not None
    row, entry = tensor.shape[-1], imatrix.entries.get(tensor.importance.ref)
    ordered = isinstance(tensor.expression, Merge) and tensor.expression.axis == "columns"
    held: dict[Substitute, ImportanceRow] = {}
    rows = []
    for i, number in enumerate(tensor.importance.rows):
        if isinstance(number, Substitute):
            if number not in held:
                held[number] = ImportanceRow.held(_substitute(number, imatrix, entry, row))
            rows.append(held[number])
            continue
        assert entry is not None  # without one all rows are ones
        if isinstance(number, tuple):  # of a merged expert
            parts = [(entry.offset + n * row * 4, orders[i][n] if ordered else None) for n in number]
            rows.append(ImportanceRow.sum(source, parts, divisor=sum(entry.divisor(n, row) for n in number)))
        else:
            rows.append(ImportanceRow(source, entry.offset + number * row * 4, divisor=entry.divisor(number, row)))
    return rows


def _substitute(which: Substitute, imatrix: Imatrix, entry: Entry | None, row: int) -> NDArray[np.float32]:
    import numpy as np

    if which is MEAN and entry is not None:
        return imatrix.mean_row(entry.name, row)
    assert which is ONES
    return np.ones(row, np.float32)
