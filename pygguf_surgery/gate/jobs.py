"""The checked plan as the engine takes it: one job per tensor."""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

from .._core import AS_IS, FILL, IN_MEMORY, Job
from ..base.errors import BadPlan, Unsupported
from ..base.runs import merge_adjacent
from ..files.model import Model
from ..plan_data.expressions import MEAN, ONES, PAD, FromRepair, Merge, OutputTensor, Remap, Stack, Take
from ..quant.types import row_bytes, tensor_type

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..files.imatrix import Entry, Imatrix
    from ..files.repair import Repair
    from .checked import CheckedPlan


# --- jobs: the checked plan as the engine takes it ------------------------------------------------------------------


def build_jobs(model: Model, checked: CheckedPlan) -> list[Job]:
    """One job per tensor that has bytes. BadPlan where an expression does not give the bytes that its shape needs."""
    jobs = []
    file_of = {i: number for number, file in enumerate(checked.files) for i in file.tensors}
    for i, (tensor, nbytes, offset) in enumerate(zip(checked.tensors, checked.nbytes, checked.offsets)):
        elements = math.prod(tensor.shape)
        row = tensor.shape[-1] if tensor.shape else 1
        if elements == 0:
            continue
        if len(tensor.shape) == 1 and isinstance(tensor.expression, Take):
            if tensor_type(tensor.source_type).block != 1 or tensor_type(tensor.type).block != 1:
                raise Unsupported("a vector of blocks cannot be cut", object=tensor.name, found=tensor.source_type)
            row = 1  # runs are whole rows
        runs = source_runs(model, tensor, checked.repair, len(model.sources) + (checked.imatrix is not None))
        expected = elements // row * row_bytes(tensor.source_type, row)
        merge = None
        if isinstance(tensor.expression, Merge):
            merge = _merge(tensor)
        elif int(runs[:, 2].sum()) != expected:
            raise BadPlan(
                "an expression of another size than its shape",
                object=tensor.name,
                found=f"{int(runs[:, 2].sum())} bytes",
                expected=f"{expected}",
            )
        remap = None
        if isinstance(tensor.expression, Remap):
            remap = (tensor.expression.table, tensor.expression.substitutes, row)
        jobs.append(
            Job(
                tensor.name,
                source_type=tensor_type(tensor.source_type).id,
                target_type=tensor_type(tensor.type).id,
                row_elements=row,
                rows=elements // row,
                target_offset=offset,
                runs=runs,
                remap=remap,
                merge=merge,
                file=file_of[i],
                best=tensor.best,
                **_importance(tensor, checked.imatrix, len(model.sources)),
            )
        )
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
            place = AS_IS
            if order and expression.axis != "none":
                place = len(orders)
                neurons = np.frombuffer(order, "<u2").astype(np.uint32)
                orders.append(
                    np.concatenate([neurons, neurons + len(neurons)]) if "half" in expression.axis else neurons
                )
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
            places[member] = place if order and ordered else AS_IS
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
            inline.append(
                {ONES: lambda: np.ones(row, np.float32), MEAN: lambda: imatrix.mean_row(entry.name, row)}[number]()
            )
        rows.append((IN_MEMORY, held[number]))
        divisors.append(1.0)
    more = {"importance_parts": _importance_parts(tensor, entry)} if isinstance(tensor.expression, Merge) else {}
    return {
        **more,
        "importance": np.array(inline, np.float32).reshape(-1, row),
        "importance_rows": np.array(rows, np.uint64),
        "importance_divisors": np.array(divisors, np.float32),
    }


def source_runs(
    model: Model, tensor: OutputTensor, repair: Repair | None = None, repair_source: int = 0
) -> NDArray[np.uint64]:
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
        runs = [
            (ref.source if source is None else source, ref.offset + first * step, n * step)
            for first, n in merge_adjacent(real)
        ]
        if len(real) < len(indices):  # the pads come last
            fill = getattr(expression, "fill", 0.0)
            runs.append((FILL, int.from_bytes(struct.pack("<f", fill), "little"), (len(indices) - len(real)) * step))
    else:
        refs = expression.refs if isinstance(expression, Stack) else (expression.ref,)
        runs = [(ref.source, ref.offset, ref.nbytes) for ref in (model.tensors[name] for name in refs)]
    return np.array(runs, dtype=np.uint64).reshape(-1, 3)
