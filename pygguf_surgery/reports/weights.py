"""The importance rows that belong to the tensors of a result and its source."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..base.errors import BadPlan, SurgeryWarning
from ..base.words import listed
from ..files.imatrix import Imatrix
from ..files.model import Model, Tensor
from ..files.subjects import subject_of
from ..plan_data.expressions import Slices

if TYPE_CHECKING:
    from ..files.imatrix import Entry
    from .origin import Origin


class Weights:
    """Of an importance matrix of the source, or else of the result: which of the two, it says itself, or its entries
    do; where they fit both alike it is the source's. BadPlan where it is of neither."""

    def __init__(self, imatrix: Imatrix, source: Model, result: Model):
        self.imatrix = imatrix
        if imatrix.of is not None:
            fault = imatrix.of.fault(subject_of(source))
            self.of_source = fault is None
            if fault is not None and imatrix.of.fault(subject_of(result)) is not None:
                fault.problem, fault.path = f"the importance matrix is of {fault.problem}", imatrix.path
                raise fault
        else:
            misfits = {owner: list(_misfits(imatrix, owner)) for owner in (source, result)}
            owner = min(misfits, key=lambda model: len(misfits[model]))  # the first, where both fit
            self.of_source = owner is source
            if len(misfits[owner]) == len(imatrix.entries):
                raise misfits[source][0]
        owner = source if self.of_source else result
        if strangers := [name for name in imatrix.entries if name not in owner.tensors]:
            warnings.warn(
                f"{imatrix.path}: {len(strangers)} of {len(imatrix.entries)} entries belong to no tensor of "
                f"{owner.path} ({listed(strangers, 3)})",
                SurgeryWarning,
                stacklevel=3,
            )

    def of(self, tensor: Tensor, origin: Origin) -> TensorWeights | None:
        """None where it has no entry, and, with a SurgeryWarning, for one that cannot be used."""
        owner = origin.tensor if self.of_source else tensor
        entry = self.imatrix.entries.get(owner.name)
        if entry is None or len(tensor.shape) < 2:
            return None
        fault = _fault(self.imatrix, entry, owner) or self.imatrix.problem(entry.name)
        if fault is not None:
            warnings.warn(f"{fault}; {tensor.name} has no weighted error", SurgeryWarning, stacklevel=4)
            return None
        slices = origin.slices if self.of_source and len(tensor.shape) > 2 else None
        return TensorWeights(self.imatrix, entry, tensor, slices)


class TensorWeights:
    """The importance rows of a tensor of the result. slices: the entry's slice of each of its own, where it was cut."""

    def __init__(self, imatrix: Imatrix, entry: Entry, tensor: Tensor, slices: Slices | None):
        self.imatrix, self.entry, self.slices = imatrix, entry, slices
        self.width = tensor.shape[-1]
        self.each = math.prod(tensor.shape[1:-2])  # importance rows of a slice of the slowest axis
        self.unseen = frozenset(imatrix.unseen(entry.name, self.width))

    def row(self, number: int, first: int, n: int) -> NDArray[np.float32] | None:
        """Elements first..first+n of what ggml would weigh the rows of slice `number` of the result with; None for an
        expert that was never seen."""
        if self.slices is not None:
            old = self.slices[number // self.each]
            if old is None:
                return None
            number = old * self.each + number % self.each
        if number in self.unseen:
            return None
        at = self.entry.offset + 4 * (number * self.width + first)
        sums = self.imatrix.source.read(at, 4 * n).view("<f4")
        row: NDArray[np.float32] = sums / np.float32(self.entry.divisor(number, self.width))
        return row


def _misfits(imatrix: Imatrix, model: Model) -> Iterator[BadPlan]:
    for name, entry in imatrix.entries.items():
        tensor = model.tensors.get(name)
        if tensor is None:
            yield BadPlan("an entry of no tensor of the model", path=imatrix.path, object=name)
        elif (fault := _fault(imatrix, entry, tensor)) is not None:
            yield fault


def _fault(imatrix: Imatrix, entry: Entry, tensor: Tensor) -> BadPlan | None:
    width, slices = tensor.shape[-1] if tensor.shape else 1, math.prod(tensor.shape[:-2])
    try:
        if entry.rows(width) == slices:
            return None
    except BadPlan:
        pass
    return BadPlan(
        "importance of another size",
        path=imatrix.path,
        object=entry.name,
        found=f"{entry.size} values, {len(entry.counts)} counts",
        expected=f"{slices} rows of {width}",
    )
