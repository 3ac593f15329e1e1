"""Which tensors of a result and a source belong together, and their rows in pieces that any thread can take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .._core import dequantize as decode
from ..architecture.experts import expert_rule
from ..architecture.names import layer_of
from ..base.runs import merge_adjacent
from ..files.model import Model, Tensor
from ..quant.types import row_bytes, tensor_type
from .numbering import LACKS, Numbering
from .origin import Origin, origin_of, source_name, whole

CHUNK = 1 << 15  # elements in work at a time, a multiple of every block: their float64 copies stay in the cache
PIECE = 1 << 19  # elements that a thread reads at once, a multiple too
SAMPLE_ROWS = 256  # of a sampled tensor at least
SLICE_ROWS = 8  # of each of its slices at least


@dataclass(frozen=True)
class Unmatched:
    """What is not compared, and why. of: "source" or "result", whose name this is. experts: only these, by their
    numbers in the result; None: all of the tensor."""

    name: str
    of: str
    reason: str
    experts: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        experts = None if self.experts is None else list(self.experts)
        return {"name": self.name, "of": self.of, "reason": self.reason, "experts": experts}


@dataclass(frozen=True)
class Pair:
    """A tensor of the result and where its rows are in the source. left_out: slices of the slowest axis that are not
    compared, experts of zeros among them; padding: how many those are; repaired: the numbers are others on purpose."""

    tensor: Tensor
    origin: Origin
    target: Origin
    left_out: frozenset[int] = frozenset()
    padding: int = 0
    repaired: bool = False
    experts: bool = field(init=False)  # its slices are matrices of experts

    def __post_init__(self) -> None:
        rule = expert_rule(self.tensor.name)
        experts = rule is not None and rule.axis == "experts" and len(self.tensor.shape) == rule.ndim == 3
        object.__setattr__(self, "experts", experts)

    @property
    def width(self) -> int:
        """Elements of a row. Of a vector with an element for each expert each is one."""
        shape = self.tensor.shape
        return 1 if not shape or (len(shape) == 1 and self.origin.slices is not None) else shape[-1]


def match(source: Model, result: Model, numbers: Numbering) -> tuple[list[Pair], list[Unmatched]]:
    """Every tensor of both is in one of the pairs, or in the list of what has no counterpart, or its experts are."""
    pairs, unmatched, used = [], [], set()
    for tensor in result.tensors.values():
        name = source_name(tensor.name, numbers.layers)
        used.add(name)
        origin = origin_of(tensor, source, numbers.kept, numbers.layers)
        if not isinstance(origin, str):
            for type in (tensor.type, origin.tensor.type):
                if not tensor_type(type).decodes:
                    origin = f"numbers of type {type} are not compared"
                    break
        if isinstance(origin, str):
            unmatched.append(Unmatched(tensor.name, "result", origin))
            continue
        target = whole(result, tensor)
        pads = {i for i, old in enumerate(origin.slices or ()) if old is None}
        full = frozenset(i for i in pads if not _is_padding(target, i, origin.runs[-1].value))
        every = frozenset(range(tensor.shape[0] if tensor.shape else 1))
        reasons = {why: some & every for why, some in numbers.without_counterpart(tensor.name).items()}
        reasons[LACKS] = reasons.get(LACKS, frozenset()) | full
        unmatched += [
            Unmatched(tensor.name, "result", why, tuple(sorted(some))) for why, some in reasons.items() if some
        ]
        left_out = frozenset(pads).union(*reasons.values())
        if left_out < every or not left_out:
            repaired = numbers.is_repaired(tensor.name)
            pairs.append(Pair(tensor, origin, target, left_out, len(pads - full), repaired))
        elif not any(reasons.values()):
            unmatched.append(Unmatched(tensor.name, "result", "only experts of zeros"))
    gone = "the result has no such tensor"
    for name in source.tensors:
        if name not in used:
            layer = layer_of(name)
            dropped = layer is not None and numbers.layers is not None and layer not in numbers.layers
            unmatched.append(Unmatched(name, "source", "its layer was dropped" if dropped else gone))
    return pairs, unmatched


def _is_padding(target: Origin, expert: int, value: float) -> bool:
    """Whether an expert has nothing but what a cut fills up with."""
    tensor = target.tensor
    row = row_bytes(tensor.type, tensor.shape[-1] if len(tensor.shape) > 1 else 1)
    size = tensor.nbytes // tensor.shape[0]
    step = max(1, CHUNK // max(1, row)) * max(1, row)
    for begin in range(0, size, step):
        raw = target.read(expert * size + begin, min(step, size - begin)).reshape(-1, row)
        if not (decode(raw, tensor.type_id, 1) == np.float32(value)).all():
            return False
    return True


class Piece(NamedTuple):
    """Rows first, first + step, ... of a pair; number: of the importance row that they share."""

    pair: Pair
    first: int
    rows: int
    step: int
    number: int

    @property
    def expert(self) -> int | None:
        """Of whose matrix they are."""
        return self.number if self.pair.experts else None


def pieces(pair: Pair, sample: bool) -> Iterator[Piece]:
    """The same ones for any number of threads. sample: of each slice (a tensor of two axes is one) every `step`-th row,
    from the middle of the first step; step = ceil(rows / n), n = max(SLICE_ROWS, ceil(SAMPLE_ROWS / slices)). A vector
    is read whole."""
    shape, width = pair.tensor.shape, pair.width
    if not pair.tensor.elements:
        return
    rows = pair.tensor.elements // width
    slices = math.prod(shape[:-2]) if len(shape) > 2 else 1
    wanted = max(SLICE_ROWS, -(-SAMPLE_ROWS // slices)) if sample and width > 1 else rows
    each = max(1, PIECE // width)
    for number, first, n in _spans(pair, rows, slices):
        step = -(-n // wanted)
        taken = range(first + (step // 2 if step > 1 else 0), first + n, step)
        for i in range(0, len(taken), each):
            yield Piece(pair, taken[i], min(each, len(taken) - i), step, number)


def _spans(pair: Pair, rows: int, slices: int) -> Iterator[tuple[int, int, int]]:
    """(importance row, first row, rows) of what is compared."""
    if slices > 1 or len(pair.tensor.shape) > 2:
        per_slice, per_expert = rows // slices, slices // pair.tensor.shape[0]
        for number in range(slices):
            if number // per_expert not in pair.left_out:
                yield number, number * per_slice, per_slice
    elif pair.left_out:
        for first, n in merge_adjacent([i for i in range(rows) if i not in pair.left_out]):
            yield 0, first, n
    else:
        yield 0, 0, rows


class Numbers(NamedTuple):
    """Some rows, or a part of one: x of the source, y of the result, [rows, columns] from column `column`; y is x where
    all bytes are equal."""

    x: NDArray[np.float32]
    y: NDArray[np.float32]
    column: int


def numbers_of(piece: Piece) -> Iterator[Numbers]:
    """The numbers of a piece, about CHUNK at a time."""
    pair, width = piece.pair, piece.pair.width
    source, result = pair.origin.tensor, pair.tensor
    for begin in range(0, width, PIECE):  # once, but for rows that are longer
        columns = min(PIECE, width - begin)
        a, b = (_raw(side, piece, begin, columns) for side in (pair.origin, pair.target))
        same = source.type == result.type and np.array_equal(a, b)
        part = min(columns, CHUNK)
        step = CHUNK // part
        for i in range(0, piece.rows, step):
            for column in range(0, columns, part):
                n = min(part, columns - column)
                x = _decode(source, a[i : i + step], column, n)
                yield Numbers(x, x if same else _decode(result, b[i : i + step], column, n), begin + column)


def _raw(origin: Origin, piece: Piece, column: int, columns: int) -> NDArray[np.uint8]:
    """Bytes [rows, ...] of those columns."""
    type, width = origin.tensor.type, piece.pair.width
    row, size = row_bytes(type, width), row_bytes(type, columns)
    if piece.step == 1 and columns == width:
        return origin.read(piece.first * row, piece.rows * size).reshape(piece.rows, size)
    at = row_bytes(type, column)
    rows = range(piece.first, piece.first + piece.rows * piece.step, piece.step)
    return np.stack([origin.read(i * row + at, size) for i in rows])


def _decode(tensor: Tensor, raw: NDArray[np.uint8], column: int, columns: int) -> NDArray[np.float32]:
    first, size = row_bytes(tensor.type, column), row_bytes(tensor.type, columns)
    return decode(raw[:, first : first + size], tensor.type_id, 1)
