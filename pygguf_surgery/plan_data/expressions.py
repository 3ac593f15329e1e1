"""Where the rows of an output tensor come from: pure data."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Group:
    """Experts that become one. members: their ids, the first is the centroid, whose router row stays. weights: of the
    mean, adding to one. orders: for each member the neuron of its own that comes in each place, little-endian uint16;
    empty where they stay as they are."""

    members: tuple[int, ...]
    weights: tuple[float, ...]
    orders: tuple[bytes, ...]


# --- expressions: where an output tensor's rows come from ----------------------------------------------------------

PAD = -1  # in place of a slice's number: an expert that the router never picks


@dataclass(frozen=True)
class Copy:
    ref: str


@dataclass(frozen=True)
class Take:
    """Slices of `ref` along its slowest axis; PAD is one of zeros, in an F32 tensor of `fill`."""

    ref: str
    indices: tuple[int, ...]
    fill: float = 0.0


@dataclass(frozen=True)
class Stack:
    """Tensors of one shape and type, one after the other along a new slowest axis."""

    refs: tuple[str, ...]


@dataclass(frozen=True)
class Remap:
    """An I32 tensor whose values are expert ids: id -> table[id], -1 means dropped: then the first of `substitutes` (new
    ids, best first) that its column does not hold already."""

    ref: str
    table: tuple[int, ...]
    substitutes: tuple[int, ...]


@dataclass(frozen=True)
class FromRepair:
    """Slices `rows` of the tensor `ref` in the plan's repair, in the place of slices `indices` of the source's."""

    ref: str
    rows: tuple[int, ...]
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Merge:
    """Slice i is the weighted mean of the slices groups[i].members of `ref`; neurons are reordered along the rows of a
    slice ("rows", or "half rows": both halves of a fused gate and up alike), within them ("columns", "half columns"), or
    are not ("none")."""

    ref: str
    groups: tuple[Group, ...]
    axis: str


Expression = Copy | Take | Stack | Remap | FromRepair | Merge

ONES = -1  # a row of ones in place of a row of an importance matrix
MEAN = -2  # the mean of the entry's rows, weighted by their counts


@dataclass(frozen=True)
class Importance:
    """The importance rows of an encoded tensor: one for all its rows, or one per slice of its third-fastest axis. ref is
    the entry of the importance matrix, rows its row numbers, ONES, MEAN, or the rows of several experts that are merged."""

    ref: str
    rows: tuple[int | tuple[int, ...], ...]


@dataclass
class OutputTensor:
    """shape is outermost first, type a ggml type name. source_type is the type of the bytes that the expression gives;
    where it differs from type they are decoded and encoded, with `importance` if there is one."""

    name: str
    shape: tuple[int, ...]
    type: str
    source_type: str
    expression: Expression
    role: str = "other"
    notes: list[str] = field(default_factory=list)  # a fallback, a missing importance row, ...
    importance: Importance | None = None
    best: bool = False  # encoded with less error than ggml's encoder has

    @property
    def encoded(self) -> bool:
        """Whether numbers go through the encoder of its type; else bytes are only moved."""
        merged = isinstance(self.expression, Merge) and any(len(g.members) > 1 for g in self.expression.groups)
        return self.type != self.source_type or merged
