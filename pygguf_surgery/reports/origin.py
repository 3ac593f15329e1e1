"""Where the bytes of a result come from in its source, and both as rows of numbers."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .._core import Run
from .._core import dequantize as decode
from ..architecture.experts import expert_rule, pad_value
from ..architecture.names import layer_of, local_name
from ..base.runs import merge_adjacent
from ..files.model import Model, Tensor
from ..plan_data.expressions import Slices
from ..quant.types import row_bytes, tensor_type
from .numbering import Kept, Layers


def source_name(name: str, layers: Layers) -> str | None:
    """The name that a tensor of the result has in the source; None where that lacks the layer."""
    layer = layer_of(name)
    if layers is None or layer is None or layer >= len(layers):
        return name
    return None if layers[layer] is None else f"blk.{layers[layer]}.{local_name(name)}"


@dataclass
class Origin:
    """The source of one result tensor: byte ranges that together, in order, hold the same rows in the source's type."""

    model: Model
    tensor: Tensor
    runs: list[Run]
    slices: Slices | None = None  # old ids of the slices along the slowest axis; None: all of them
    starts: list[int] = field(default_factory=list)  # where each run begins in the whole
    nbytes: int = 0

    def __post_init__(self) -> None:
        for run in self.runs:
            self.starts.append(self.nbytes)
            self.nbytes += run.nbytes

    def read(self, begin: int, nbytes: int) -> NDArray[np.uint8]:
        """uint8 [nbytes] from byte `begin` of the whole."""
        if len(self.runs) == 1 and (source := self.runs[0].source) is not None:
            return self.model.sources[source].read(self.runs[0].offset + begin, nbytes)
        out = np.empty(nbytes, np.uint8)
        done = 0
        k = bisect_right(self.starts, begin) - 1
        while done < nbytes:
            run = self.runs[k]
            skip = begin + done - self.starts[k]
            n = min(run.nbytes - skip, nbytes - done)
            if run.source is None:
                pattern = np.array([run.value], "<f4").view(np.uint8)
                out[done : done + n] = np.resize(np.roll(pattern, -(skip % 4)), n)
            else:
                out[done : done + n] = self.model.sources[run.source].read(run.offset + skip, n)
            done += n
            k += 1
        return out


def whole(model: Model, tensor: Tensor) -> Origin:
    return Origin(model, tensor, [Run(tensor.source, tensor.offset, tensor.nbytes)] if tensor.nbytes else [])


def origin_of(result: Tensor, source: Model, kept: Kept, layers: Layers = None) -> Origin | str:
    """Where `result` comes from in `source`, or in a few words why that cannot be said."""
    name = source_name(result.name, layers)
    if name is None:
        return "the source lacks its layer"
    tensor = source.tensors.get(name)
    if tensor is None:
        return "the source has no tensor of this name" + (f" ({name})" if name != result.name else "")
    slices = _slices(result.name, source, kept)
    if slices is None:
        if tensor.shape != result.shape:
            return f"its shape {result.shape} cannot come from {tensor.shape}: no list of kept experts says how"
        return whole(source, tensor)
    if not tensor.shape or not result.shape or tensor.shape[1:] != result.shape[1:]:
        return f"its shape {result.shape} cannot come from {tensor.shape}"
    real = [i for i in slices if i is not None]
    if len(slices) != result.shape[0] or not all(0 <= i < tensor.shape[0] for i in real):
        return f"{len(slices)} kept experts do not give its shape {result.shape} from {tensor.shape}"
    if len(tensor.shape) == 1 and tensor_type(tensor.type).block > 1:
        return f"its type {tensor.type} has several experts in a block"
    size = tensor.nbytes // tensor.shape[0]
    runs = [Run(tensor.source, tensor.offset + first * size, n * size) for first, n in merge_adjacent(real)]
    if len(real) < len(slices):
        value = pad_value(source.architecture, result.name)
        runs.append(Run.fill(value, (len(slices) - len(real)) * size))
    return Origin(source, tensor, runs, slices)


def _slices(name: str, source: Model, kept: Kept) -> Slices | None:
    """Old ids of the slices that a cut left of this tensor; None where it has no expert axis or its layer no list."""
    rule, layer = expert_rule(name), layer_of(name)
    if rule is None or layer is None or layer not in kept or rule.axis not in ("experts", "groups"):
        return None
    ids = kept[layer]
    if rule.axis == "experts":
        return tuple(ids)
    size = max(1, source.get("experts_per_group", 1))
    return tuple(dict.fromkeys(None if i is None else i // size for i in ids))


def decode_rows(origin: Origin, tensor: Tensor, first: int, n: int) -> NDArray[np.float32]:
    """Rows first..first+n of `tensor`, as its origin has them: float32 [n, row]."""
    size = row_bytes(origin.tensor.type, tensor.ne[0] if tensor.ne else 1)
    return decode(origin.read(first * size, n * size).reshape(n, size), origin.tensor.type_id, 1)
