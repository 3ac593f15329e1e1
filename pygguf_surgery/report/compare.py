"""How far a result is from its source: per tensor and per role, streamed, whatever was cut or encoded in between."""

from __future__ import annotations

import math
import re
import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import _core
from ..blocks import KEPT
from ..errors import BadPlan
from ..experts.prune import MAX_EXPERTS, pad_value
from ..experts.roles import ROLES, expert_rule, layer_of, role_of
from ..model import Model, Tensor, merge_adjacent, row_bytes, type_facts
from ..plan_data import PAD

CHUNK = 1 << 16  # elements in work at a time: their float64 copies stay in the cache

Kept = Mapping[int, tuple[int, ...]]  # layer -> old expert ids, in the order of the result
Layers = Sequence[int] | None           # old number of each block; None: the same as the new one


# --- where the rows of a result come from --------------------------------------------------------------------------

def kept_experts(result: Model, source: Model) -> dict[int, tuple[int, ...]]:
    """The lists that pruning left in the result's metadata (`pgs.experts.LAYER.kept`). Empty when there are none, or
    when the source has the same ones: then they tell of an earlier cut."""
    kept = {}
    for key in () if _of_earlier_cut(result, source) else result.metadata:
        match = re.fullmatch(r"pgs\.experts\.([0-9]+)\.kept", key)
        if match and result.metadata.value(key).type.endswith("[]"):
            pads = result.metadata.get(f"pgs.experts.{match[1]}.padded", 0)
            pads = pads if isinstance(pads, int) and 0 < pads <= MAX_EXPERTS else 0
            kept[int(match[1])] = (*result.metadata[key], *(PAD,) * pads)
    return kept


def kept_layers(result: Model, source: Model) -> tuple[int, ...] | None:
    """The source's number of each block of the result (`pgs.layers.kept`). None when it lists none, or when the source
    has the same list: then blocks have the same numbers in both."""
    if KEPT not in result.metadata or _of_earlier_cut(result, source):
        return None
    value = result.metadata.value(KEPT)
    return tuple(value.value) if value.type in ("u32[]", "i32[]") else None


def _of_earlier_cut(result: Model, source: Model) -> bool:
    key = "pgs.source.header_sha256"
    return key in source.metadata and source.metadata[key] == result.metadata.get(key)


def source_name(name: str, layers: Layers) -> str:
    """The name that a tensor of the result has in the source."""
    layer = layer_of(name)
    if layers is None or layer is None or layer >= len(layers):
        return name
    return f"blk.{layers[layer]}.{name.split('.', 2)[2]}"


@dataclass
class Origin:
    """The source of one result tensor: byte ranges that together, in order, hold the same rows in the source's type."""

    model: Model
    tensor: Tensor
    runs: list[tuple[int, int, int]]                   # source file, offset, bytes
    slices: tuple[int, ...] | None = None              # old ids of the slices along the slowest axis; None: all of them
    starts: list[int] = field(default_factory=list)    # where each run begins in the whole
    nbytes: int = 0

    def __post_init__(self):
        for _, _, size in self.runs:
            self.starts.append(self.nbytes)
            self.nbytes += size

    def read(self, begin: int, nbytes: int) -> np.ndarray:
        """uint8 [nbytes] from byte `begin` of the whole."""
        out = np.empty(nbytes, np.uint8)
        done = 0
        k = bisect_right(self.starts, begin) - 1
        while done < nbytes:
            file, offset, size = self.runs[k]
            skip = begin + done - self.starts[k]
            n = min(size - skip, nbytes - done)
            if file == _core.FILL:
                pattern = np.frombuffer(offset.to_bytes(4, "little"), np.uint8)
                out[done:done + n] = np.resize(np.roll(pattern, -(skip % 4)), n)
            else:
                out[done:done + n] = self.model.sources[file].read(offset + skip, n)
            done += n
            k += 1
        return out


def whole(model: Model, tensor: Tensor) -> Origin:
    return Origin(model, tensor, [(tensor.source, tensor.offset, tensor.nbytes)] if tensor.nbytes else [])


def origin_of(result: Tensor, source: Model, kept: Kept, layers: Layers = None) -> Origin | str:
    """Where `result` comes from in `source`, or in a few words why that cannot be said."""
    name = source_name(result.name, layers)
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
    real = [i for i in slices if i != PAD]
    if len(slices) != result.shape[0] or not all(0 <= i < tensor.shape[0] for i in real):
        return f"{len(slices)} kept experts do not give its shape {result.shape} from {tensor.shape}"
    size = tensor.nbytes // tensor.shape[0]
    runs = [(tensor.source, tensor.offset + first * size, n * size) for first, n in merge_adjacent(real)]
    if len(real) < len(slices):
        value = struct.pack("<f", pad_value(source.architecture, result.name))
        runs.append((_core.FILL, int.from_bytes(value, "little"), (len(slices) - len(real)) * size))
    return Origin(source, tensor, runs, slices)


def _slices(name: str, source: Model, kept: Kept) -> tuple[int, ...] | None:
    """Old ids of the slices that a cut left of this tensor; None where it has no expert axis or its layer no list."""
    rule, ids = expert_rule(name), kept.get(layer_of(name))
    if rule is None or ids is None or rule.axis not in ("experts", "groups"):
        return None
    if rule.axis == "experts":
        return tuple(ids)
    chunk = max(1, source.get("experts_per_group", 1))
    return tuple(dict.fromkeys(i // chunk for i in ids))


# --- the numbers ---------------------------------------------------------------------------------------------------

@dataclass
class Sums:
    """Of source x and result y, in float64."""

    xy: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    difference: float = 0.0   # sum of (x - y)^2
    largest: float = 0.0      # max |x - y|

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        # Products and pairwise sums, not x @ y: BLAS would start threads that wait for each other on a busy machine.
        x, y = x.ravel().astype(np.float64), y.ravel().astype(np.float64)
        product = x * y
        self.xy += float(product.sum())
        self.xx += float(np.multiply(x, x, out=product).sum())
        self.yy += float(np.multiply(y, y, out=product).sum())
        np.subtract(x, y, out=x)
        self.difference += float(np.multiply(x, x, out=product).sum())
        self.largest = max(self.largest, float(np.abs(x, out=x).max(initial=0.0)))

    def pool(self, other: Sums) -> None:
        self.xy, self.xx, self.yy = self.xy + other.xy, self.xx + other.xx, self.yy + other.yy
        self.difference += other.difference
        self.largest = max(self.largest, other.largest)

    def to_json(self) -> dict[str, float | None]:
        """cosine sum(xy)/sqrt(sum(x^2) sum(y^2)); snr_db 10 log10(sum(x^2)/sum((x-y)^2)), null when equal;
        relative_error sqrt(sum((x-y)^2)/sum(x^2)); max_error max|x-y|. A ratio without a denominator is null."""
        norm = math.sqrt(self.xx) * math.sqrt(self.yy)
        equal = self.difference == 0
        return {
            "cosine": 1.0 if equal else self.xy / norm if norm else None,
            "snr_db": 10 * math.log10(self.xx / self.difference) if self.xx and not equal else None,
            "relative_error": 0.0 if equal else math.sqrt(self.difference / self.xx) if self.xx else None,
            "max_error": self.largest,
        }


def tensor_sums(result: Model, tensor: Tensor, origin: Origin) -> Sums:
    sums = Sums()
    target = whole(result, tensor)
    for first, n in chunks(tensor):
        sums.add(decode_rows(origin, tensor, first, n), decode_rows(target, tensor, first, n))
    return sums


def chunks(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """(first row, rows) of pieces of about CHUNK elements."""
    if tensor.elements:
        width = tensor.ne[0] if tensor.ne else 1
        rows, step = tensor.elements // width, max(1, CHUNK // width)
        for first in range(0, rows, step):
            yield first, min(step, rows - first)


def decode_rows(origin: Origin, tensor: Tensor, first: int, n: int) -> np.ndarray:
    """Rows first..first+n of `tensor`, as its origin has them: float32 [n, row]."""
    size = row_bytes(origin.tensor.type, tensor.ne[0] if tensor.ne else 1)
    return _core.dequantize(origin.read(first * size, n * size).reshape(n, size), origin.tensor.type_id, 1)


def compare(source: Model, result: Model, *, kept: Kept | None = None) -> dict[str, Any]:
    """{"tensors": [{"name", "role", "cosine", "snr_db", "relative_error", "max_error"}], "roles": [{"role", "tensors",
    "source_nbytes", "nbytes", "source_types", "types", and the same four numbers}]}.

    Result against source, tensor by tensor; experts are paired by `kept` (layer -> old ids), which is read from the
    result's metadata when it is not given, blocks by its list of kept layers. A role pools the sums of its tensors.
    Tensors of integers are left out, and so are those of the source that the result lacks. Streamed: a few MiB whatever
    the sizes. BadPlan names a tensor that has no counterpart.
    """
    kept = kept_experts(result, source) if kept is None else kept
    layers = kept_layers(result, source)
    tensors, roles = [], {}
    for tensor in result.tensors.values():
        role = role_of(tensor.name)
        total = roles.setdefault(role, _Role(role))
        total.add(tensor, source.tensors.get(source_name(tensor.name, layers)))
        if not type_facts()[tensor.type]["decodes"]:
            continue
        origin = origin_of(tensor, source, kept, layers)
        if isinstance(origin, str):
            raise BadPlan(f"cannot be compared: {origin}", path=result.path, object=tensor.name)
        sums = tensor_sums(result, tensor, origin)
        total.sums.pool(sums)
        tensors.append({"name": tensor.name, "role": role, **sums.to_json()})
    return {"tensors": tensors, "roles": [r.to_json() for r in sorted(roles.values(), key=_Role.order)]}


@dataclass
class _Role:
    role: str
    count: int = 0
    nbytes: int = 0
    source_nbytes: int = 0
    types: Counter[str] = field(default_factory=Counter)         # type -> bytes
    source_types: Counter[str] = field(default_factory=Counter)
    sums: Sums = field(default_factory=Sums)

    def add(self, tensor: Tensor, source: Tensor | None) -> None:
        self.count += 1
        self.nbytes += tensor.nbytes
        self.types[tensor.type] += tensor.nbytes
        if source is not None:
            self.source_nbytes += source.nbytes
            self.source_types[source.type] += source.nbytes

    def order(self) -> int:
        return ROLES.index(self.role)

    def to_json(self) -> dict[str, Any]:
        return {"role": self.role, "tensors": self.count, "source_nbytes": self.source_nbytes, "nbytes": self.nbytes,
                "source_types": [t for t, _ in self.source_types.most_common()],
                "types": [t for t, _ in self.types.most_common()], **self.sums.to_json()}
