"""Where the rows of an output tensor come from: pure data that knows how to compose itself.

Every expression has the same face. word: its name in JSON, and what is done to the tensor. refs: the tensors of the
source that it reads. slices: which slices of its source, along the slowest axis, make each slice of the output; None
where it is all of them in their order. computes: whether numbers change, whatever the types. take(ids): the expression
of a further cut that keeps the slices `ids` of the output, None where it cannot be cut so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar, TypeAlias

# Numbers of slices; None stands for a pad, an expert that the router never picks. Pads come last.
Slices: TypeAlias = "tuple[int | None, ...]"


@dataclass(frozen=True)
class Group:
    """Experts that become one. members: their ids, the first is the centroid, whose router row stays. weights: of the
    mean, adding to one. orders: for each member the neuron of its own that comes in each place, little-endian uint16;
    empty where they stay as they are."""

    members: tuple[int, ...]
    weights: tuple[float, ...]
    orders: tuple[bytes, ...]


@dataclass(frozen=True)
class Copy:
    """All of `ref`."""

    word: ClassVar[str] = "copy"
    slices: ClassVar[None] = None
    computes: ClassVar[bool] = False

    ref: str

    @property
    def refs(self) -> tuple[str, ...]:
        return (self.ref,)

    def take(self, ids: Slices) -> Take:
        return Take(self.ref, ids)


@dataclass(frozen=True)
class Take:
    """Slices of `ref` along its slowest axis; a pad is one of zeros, in an F32 tensor of `fill`."""

    word: ClassVar[str] = "take"
    computes: ClassVar[bool] = False

    ref: str
    indices: Slices
    fill: float = 0.0

    @property
    def refs(self) -> tuple[str, ...]:
        return (self.ref,)

    @property
    def slices(self) -> Slices:
        return self.indices

    def take(self, ids: Slices) -> Take:
        return Take(self.ref, tuple(None if i is None else self.indices[i] for i in ids), self.fill)


@dataclass(frozen=True)
class Stack:
    """Tensors of one shape and type, one after the other along a new slowest axis."""

    word: ClassVar[str] = "stack"
    slices: ClassVar[None] = None
    computes: ClassVar[bool] = False

    refs: tuple[str, ...]

    def take(self, ids: Slices) -> Stack | None:
        real = _without_pads(ids)
        return None if real is None else Stack(tuple(self.refs[i] for i in real))


@dataclass(frozen=True)
class Remap:
    """An I32 tensor whose values are expert ids: id -> table[id], None means dropped: then the first of `substitutes`
    (new ids, best first) that its column does not hold already."""

    word: ClassVar[str] = "remap"
    slices: ClassVar[None] = None
    computes: ClassVar[bool] = False

    ref: str
    table: tuple[int | None, ...]
    substitutes: tuple[int, ...]

    @property
    def refs(self) -> tuple[str, ...]:
        return (self.ref,)

    def take(self, ids: Slices) -> None:
        """Its slices are tokens, not experts."""


@dataclass(frozen=True)
class Repaired:
    """Slices `rows` of the tensor `ref` in the plan's repair, in the place of slices `indices` of the source's."""

    word: ClassVar[str] = "repair"
    computes: ClassVar[bool] = False

    ref: str
    rows: tuple[int, ...]
    indices: tuple[int, ...]

    @property
    def refs(self) -> tuple[str, ...]:
        return (self.ref,)

    @property
    def slices(self) -> tuple[int, ...]:
        return self.indices

    def take(self, ids: Slices) -> Repaired | None:
        real = _without_pads(ids)
        if real is None:
            return None
        return Repaired(self.ref, tuple(self.rows[i] for i in real), tuple(self.indices[i] for i in real))


@dataclass(frozen=True)
class Merge:
    """Slice i is the weighted mean of the slices groups[i].members of `ref`; neurons are reordered along the rows of a
    slice ("rows", or "half rows": both halves of a fused gate and up alike), within them ("columns", "half columns"),
    or are not ("none")."""

    word: ClassVar[str] = "merge"

    ref: str
    groups: tuple[Group, ...]
    axis: str

    @property
    def refs(self) -> tuple[str, ...]:
        return (self.ref,)

    @property
    def slices(self) -> tuple[int | tuple[int, ...], ...]:
        """The members of a group of several, the only one of others."""
        return tuple(g.members if len(g.members) > 1 else g.members[0] for g in self.groups)

    @property
    def computes(self) -> bool:
        return any(len(g.members) > 1 for g in self.groups)

    def take(self, ids: Slices) -> Merge | None:
        real = _without_pads(ids)
        return None if real is None else Merge(self.ref, tuple(self.groups[i] for i in real), self.axis)


Expression = Copy | Take | Stack | Remap | Repaired | Merge


def _without_pads(ids: Slices) -> tuple[int, ...] | None:
    """`ids` where none of them is a pad."""
    real = tuple(i for i in ids if i is not None)
    return real if len(real) == len(ids) else None


# --- importance -------------------------------------------------------------------------------------------------------


class Substitute(Enum):
    """In place of a row of an importance matrix: ones, or the mean of the entry's rows, weighted by their counts."""

    ONES = "ones"
    MEAN = "the entry's mean"


ONES, MEAN = Substitute.ONES, Substitute.MEAN
# The number of a row, the rows of several experts that are merged (their sums are added), or what stands for a row.
ImportanceRow: TypeAlias = "int | tuple[int, ...] | Substitute"


@dataclass(frozen=True)
class Importance:
    """The importance rows of an encoded tensor: one for all its rows, or one per slice of its third-fastest axis. ref
    is the entry of the importance matrix."""

    ref: str
    rows: tuple[ImportanceRow, ...]


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
        return self.type != self.source_type or self.expression.computes

    @property
    def action(self) -> str:
        """What is done to it: the word of its expression, or "encode" where only that changes its numbers."""
        word = self.expression.word
        return "encode" if self.type != self.source_type and word not in ("remap", "merge") else word
