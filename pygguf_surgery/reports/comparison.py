"""How far a result is from its source: per tensor and per role, streamed, whatever was cut or encoded in between."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..architecture.names import ROLES, role_of
from ..base.errors import BadPlan
from ..files.lineage import Lineage
from ..files.model import Model, Tensor
from ..quant.types import tensor_type
from .origin import chunks, decode_rows, origin_of, source_name, whole

if TYPE_CHECKING:
    from .origin import Kept, Origin


# --- the numbers ---------------------------------------------------------------------------------------------------


@dataclass
class Sums:
    """Of source x and result y, in float64."""

    xy: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    difference: float = 0.0  # sum of (x - y)^2
    largest: float = 0.0  # max |x - y|

    def add(self, x: NDArray[np.float32], y: NDArray[np.float32]) -> None:
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


def compare(source: Model, result: Model, *, kept: Kept | None = None) -> dict[str, Any]:
    """{"tensors": [{"name", "role", "cosine", "snr_db", "relative_error", "max_error"}], "roles": [{"role", "tensors",
    "source_nbytes", "nbytes", "source_types", "types", and the same four numbers}]}.

    Result against source, tensor by tensor; experts are paired by `kept` (layer -> old ids), which is read from the
    result's metadata when it is not given, layers by its list of kept layers. A role pools the sums of its tensors.
    Tensors of integers are left out, and so are those of the source that the result lacks. Streamed: a few MiB whatever
    the sizes. BadPlan names a tensor that has no counterpart.
    """
    lineage = Lineage.of(result.metadata.exact()).since(Lineage.of(source.metadata.exact()))
    kept = lineage.slices() if kept is None else kept
    layers = lineage.layers
    tensors: list[dict[str, Any]] = []
    roles: dict[str, _Role] = {}
    for tensor in result.tensors.values():
        role = role_of(tensor.name)
        total = roles.setdefault(role, _Role(role))
        total.add(tensor, source.tensors.get(source_name(tensor.name, layers)))
        if not tensor_type(tensor.type).decodes:
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
    types: Counter[str] = field(default_factory=Counter)  # type -> bytes
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
        return {
            "role": self.role,
            "tensors": self.count,
            "source_nbytes": self.source_nbytes,
            "nbytes": self.nbytes,
            "source_types": [t for t, _ in self.source_types.most_common()],
            "types": [t for t, _ in self.types.most_common()],
            **self.sums.to_json(),
        }
