"""How far a result is from its source: per tensor and per role, streamed, whatever was cut or encoded in between."""

from __future__ import annotations

import math
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._core import thread_count
from ..architecture.names import ROLES, role_of
from ..base.errors import BadPlan
from ..base.limits import Limits
from ..base.progress import Progress, ProgressLike, as_progress
from ..base.units import MEMORY
from ..base.words import counted, decimals, listed, table
from ..files.companions import Companions
from ..files.imatrix import Imatrix, open_imatrix
from ..files.lineage import Lineage
from ..files.model import Model, Tensor
from ..files.open import open_model
from ..gate.checked import CheckedPlan
from ..plan_data.edits import Quantize
from ..quant.types import row_bytes
from .numbering import Kept, numbering, of_lineage
from .origin import source_name
from .pairs import Pair, Piece, Unmatched, match, numbers_of, pieces
from .weights import TensorWeights, Weights

ROWS = ("all", "sample")
THREAD_BYTES = 8 << 20  # what a thread holds at most: bytes of PIECE elements of both, and copies of CHUNK as float64
_AHEAD = 4  # pieces in work or done for each thread


# --- the numbers ---------------------------------------------------------------------------------------------------


@dataclass
class Sums:
    """Of source x and result y, in float64, over the elements that are finite in both; weighted ones over those that
    have an importance w."""

    xy: float = 0.0
    xx: float = 0.0
    yy: float = 0.0
    difference: float = 0.0  # sum of (x - y)^2
    weighted: float = 0.0  # sum of w x^2
    weighted_difference: float = 0.0  # sum of w (x - y)^2
    elements: int = 0  # all that were read
    left_out: int = 0  # of these, as they are not finite
    source_nan: int = 0
    source_inf: int = 0
    nan: int = 0
    inf: int = 0
    largest: float = 0.0  # max |x - y|

    def add(self, x: NDArray[np.float32], y: NDArray[np.float32], weights: NDArray[np.float32] | None = None) -> None:
        """x, y: [rows, columns], or [n] without weights. weights: [columns]. Where y is x less is computed."""
        a = x.astype(np.float64)
        b = a if y is x else y.astype(np.float64)
        self.elements += a.size
        xx, yy = _dot(a, a), _dot(b, b)
        if not (math.isfinite(xx) and math.isfinite(yy)):  # squares of float32 do not overflow: a number is not finite
            self._leave_out(a, b)
            xx, yy = _dot(a, a), _dot(b, b)
        self.xx += xx
        self.yy += yy
        self.xy += xx if b is a else _dot(a, b)
        w = None if weights is None else weights.astype(np.float64)
        if w is not None:
            self.weighted += _dot(np.einsum("ij,ij->j", a, a), w)
        if b is a:
            return
        np.subtract(a, b, out=a)
        self.difference += _dot(a, a)
        if w is not None:
            self.weighted_difference += _dot(np.einsum("ij,ij->j", a, a), w)
        self.largest = max(self.largest, float(a.max(initial=0.0)), -float(a.min(initial=0.0)))

    def _leave_out(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        """Counts what is not finite, and makes it zeros in both."""
        self.source_nan += int(np.isnan(x).sum())
        self.source_inf += int(np.isinf(x).sum())
        self.nan += int(np.isnan(y).sum())
        self.inf += int(np.isinf(y).sum())
        bad = ~(np.isfinite(x) & np.isfinite(y))
        self.left_out += int(bad.sum())
        x[bad] = 0
        y[bad] = 0

    def pool(self, other: Sums) -> None:
        largest = max(self.largest, other.largest)
        for one in fields(Sums):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))
        self.largest = largest

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

    def all_json(self) -> dict[str, float | None]:
        """Also weighted_error sqrt(sum(w (x-y)^2)/sum(w x^2)), null without importance, and the counts. Where there is
        not a single finite number in both, all is null."""
        numbers = self.to_json()
        if self.elements == self.left_out:
            numbers = dict.fromkeys(numbers)
        weighted = math.sqrt(self.weighted_difference / self.weighted) if self.weighted else None
        counts = {name: getattr(self, name) for name in ("elements", "nan", "inf", "source_nan", "source_inf")}
        return {**numbers, "weighted_error": weighted, **counts}


def _dot(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Not a @ b: BLAS would start threads, which wait for each other on a busy machine."""
    return float(np.einsum("i,i->", a.ravel(), b.ravel()))


# --- what compare gives --------------------------------------------------------------------------------------------


@dataclass
class TensorQuality:
    """A tensor of the result. source: the name that it has there. zero_experts: how many experts, those that are there
    to fill up (padding_experts) aside, have only zeros in the rows that were read. repaired: its numbers are others
    than those of the source on purpose."""

    name: str
    source: str
    source_type: str
    type: str
    repaired: bool
    padding_experts: int
    zero_experts: int = 0
    sums: Sums = field(default_factory=Sums)

    @property
    def role(self) -> str:
        return role_of(self.name)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "role": self.role,
            "source": self.source,
            "source_type": self.source_type,
            "type": self.type,
            **self.sums.all_json(),
            "zero_experts": self.zero_experts,
            "padding_experts": self.padding_experts,
            "repaired": self.repaired,
        }


@dataclass
class RoleQuality:
    """All tensors of a role. tensors, nbytes, types: with those that are not compared; compared, repaired: how many
    tensors are."""

    role: str
    tensors: int = 0
    nbytes: int = 0
    source_nbytes: int = 0
    types: Counter[str] = field(default_factory=Counter)  # type -> bytes
    source_types: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    repaired: int = 0
    zero_experts: int = 0
    sums: Sums = field(default_factory=Sums)

    def add(self, tensor: Tensor, source: Tensor | None) -> None:
        self.tensors += 1
        self.nbytes += tensor.nbytes
        self.types[tensor.type] += tensor.nbytes
        if source is not None:
            self.source_nbytes += source.nbytes
            self.source_types[source.type] += source.nbytes

    def pool(self, tensor: TensorQuality) -> None:
        self.compared += 1
        self.repaired += tensor.repaired
        self.zero_experts += tensor.zero_experts
        self.sums.pool(tensor.sums)

    def to_json(self) -> dict[str, Any]:
        return {
            "role": self.role,
            "tensors": self.tensors,
            "compared": self.compared,
            "source_nbytes": self.source_nbytes,
            "nbytes": self.nbytes,
            "source_types": [t for t, _ in self.source_types.most_common()],
            "types": [t for t, _ in self.types.most_common()],
            **self.sums.all_json(),
            "zero_experts": self.zero_experts,
            "repaired": self.repaired,
        }


@dataclass
class Comparison:
    """What `compare` found. rows: "all" or "sample". tensors in the order of the result, roles in that of their list.
    unmatched: what has no counterpart, or cannot be compared."""

    rows: str
    tensors: list[TensorQuality]
    roles: list[RoleQuality]
    unmatched: list[Unmatched]

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "roles": [role.to_json() for role in self.roles],
            "unmatched": [one.to_json() for one in self.unmatched],
        }

    def summary(self, *, tensors: bool = False) -> str:
        """A table of the roles; tensors: and one of all tensors."""
        head = ("cosine", "SNR dB", "relative error", "max error", "weighted error", "")
        lines: list[tuple[str, ...]] = [("role", "types", "tensors", *head)]
        for role in self.roles:
            json = role.to_json()
            types = _arrow("+".join(json["source_types"]), "+".join(json["types"]))
            lines.append((role.role.replace("_", " "), types, str(role.tensors), *_cells(json)))
        parts = [table(_without_empty(lines, 7), left=2)]
        if tensors:
            lines = [("tensor", "type", *head)]
            for tensor in self.tensors:
                types = _arrow(tensor.source_type, tensor.type)
                lines.append((tensor.name, types, *_cells(tensor.to_json())))
            parts.append(table(_without_empty(lines, 6), left=2))
        if self.rows == "sample":
            parts.append("of a sample of the rows")
        return "\n\n".join([*parts, *self._not_compared()])

    def _not_compared(self) -> Iterator[str]:
        reasons: dict[tuple[str, str], list[str]] = {}
        for one in self.unmatched:
            some = "" if one.experts is None else f" ({counted(len(one.experts), 'expert')})"
            reasons.setdefault((one.of, one.reason), []).append(one.name + some)
        if reasons:
            yield "not compared:\n" + "\n".join(
                f"  {counted(len(names), 'tensor')} of the {of}: {reason}: {listed(names, 4)}"
                for (of, reason), names in reasons.items()
            )


_FLAGS = {
    "source_nan": "NaN in the source",
    "source_inf": "Inf in the source",
    "nan": "NaN",
    "inf": "Inf",
    "zero_experts": "experts of zeros",
}


def _cells(numbers: dict[str, Any]) -> tuple[str, ...]:
    snr = "equal" if numbers["relative_error"] == 0 else decimals(numbers["snr_db"], 2)
    words = [f"{numbers[key]} {word}" for key, word in _FLAGS.items() if numbers[key]]
    if numbers["repaired"]:
        words.append("repaired" if numbers["repaired"] is True else f"{numbers['repaired']} repaired")
    if numbers["max_error"] is None:
        return "", "nothing", "", "", "", ", ".join(words)
    return (
        decimals(numbers["cosine"], 6),
        snr,
        decimals(numbers["relative_error"], 6),
        f"{numbers['max_error']:.4g}",
        decimals(numbers["weighted_error"], 6),
        ", ".join(words),
    )


def _without_empty(lines: list[tuple[str, ...]], weighted: int) -> list[tuple[str, ...]]:
    """Without the column of weighted errors where there is none."""
    if any(line[weighted] for line in lines[1:]):
        return lines
    return [(*line[:weighted], *line[weighted + 1 :]) for line in lines]


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


# --- comparing -----------------------------------------------------------------------------------------------------


def compare(
    source: Model,
    result: Model,
    *,
    imatrix: str | os.PathLike[str] | Imatrix | None = None,
    rows: str = "all",
    threads: int = 0,
    memory: int | str = MEMORY,
    progress: ProgressLike = None,
    kept: Kept | None = None,
) -> Comparison:
    """How far the numbers of a result are from those of its source, or of any model before that in a chain of cuts.

    Layers and experts are paired by what the files say of each other; kept, {layer of the result: ids in the source},
    is for a result that does not say it. What has no counterpart (an expert merged of several, a tensor that only one
    of both has, integers) is listed as unmatched; BadPlan where nothing can be paired. imatrix: of the source or of the
    result, for the weighted error; experts that it never saw are left out of that. rows: "sample" reads rows at fixed
    strides, see `pieces`. Sums are float64, of fixed pieces in a fixed order: the same for any threads and memory, of
    which each thread takes 8 MiB. Errors: BadPlan, BadFile, SourceChanged, OSError.
    """
    limits = Limits.parse(memory, threads)
    if rows not in ROWS:
        raise BadPlan("not a choice of rows", object="rows", found=repr(rows), expected=" or ".join(ROWS))
    for model in (source, result):
        if model.metadata_only:
            raise BadPlan("opened for its metadata only", path=model.path, hint="open it without metadata_only")
    if source.architecture != result.architecture:
        raise BadPlan(
            "models of different architectures",
            path=result.path,
            found=result.architecture,
            expected=source.architecture,
        )
    if kept is None:
        numbers = numbering(source, result)
    else:
        numbers = replace(of_lineage(Lineage.of(result.metadata.exact())), kept=dict(kept))
    pairs, unmatched = match(source, result, numbers)
    if not pairs:
        first = unmatched[0] if unmatched else None
        raise BadPlan(
            "nothing in these models can be compared",
            path=result.path,
            object=first.name if first else None,
            found=first.reason if first else None,
        )
    with ExitStack() as stack:
        weights = None
        if imatrix is not None:
            if not isinstance(imatrix, Imatrix):
                imatrix = stack.enter_context(open_imatrix(imatrix))
            weights = Weights(imatrix, source, result)
        report = stack.enter_context(as_progress(progress, "comparing"))
        tensors = _measure(pairs, weights, rows == "sample", limits, report)
    for file in (*source.sources, *result.sources):
        file.check_unchanged()
    roles: dict[str, RoleQuality] = {}
    for tensor in result.tensors.values():
        role = roles.setdefault(role_of(tensor.name), RoleQuality(role_of(tensor.name)))
        role.add(tensor, source.tensors.get(source_name(tensor.name, numbers.layers) or ""))
    for quality in tensors:
        roles[quality.role].pool(quality)
    return Comparison(rows, tensors, sorted(roles.values(), key=lambda r: ROLES.index(r.role)), unmatched)


def compare_written(
    model: Model, checked: CheckedPlan, path: str, companions: Companions, progress: ProgressLike = None
) -> Comparison:
    """The file (or first shard) that a plan has written beside its source, within the plan's limits and by its
    importance matrix."""
    uses = [edit.imatrix for edit in checked.data.edits if isinstance(edit, Quantize)]
    imatrix = next((companions.imatrix(use) for use in uses if use is not None), None)
    limits = checked.limits
    with open_model(path) as result:
        return compare(model, result, imatrix=imatrix, threads=limits.threads, memory=limits.memory, progress=progress)


def _measure(
    pairs: list[Pair], weights: Weights | None, sample: bool, limits: Limits, progress: Progress | None
) -> list[TensorQuality]:
    found = []
    zeros: list[dict[int, bool]] = []  # by pair: expert -> has it only zeros
    importance = []
    for pair in pairs:
        origin = pair.origin.tensor
        found.append(
            TensorQuality(pair.tensor.name, origin.name, origin.type, pair.tensor.type, pair.repaired, pair.padding)
        )
        zeros.append({})
        importance.append(None if weights is None else weights.of(pair.tensor, pair.origin))
    work = [(i, piece) for i, pair in enumerate(pairs) for piece in pieces(pair, sample)]
    total = sum(_nbytes(piece) for _, piece in work)
    done = 0
    for (i, piece), sums in _in_order(work, importance, limits):
        found[i].sums.pool(sums)
        if piece.expert is not None:
            zero = sums.yy == 0 and not (sums.nan or sums.inf or sums.source_nan or sums.source_inf)
            zeros[i][piece.expert] = zeros[i].get(piece.expert, True) and zero
        done += _nbytes(piece)
        if progress is not None:
            progress(done, total)
    for quality, experts in zip(found, zeros, strict=True):
        quality.zero_experts = sum(experts.values())
    return found


def _nbytes(piece: Piece) -> int:
    return piece.rows * row_bytes(piece.pair.tensor.type, piece.pair.width)


Work = tuple[int, Piece]  # number of the pair


def _in_order(
    work: Iterable[Work], importance: list[TensorWeights | None], limits: Limits
) -> Iterator[tuple[Work, Sums]]:
    """The sums of all pieces, in their order, whatever threads do."""
    threads = max(1, min(thread_count(limits.threads), limits.memory // THREAD_BYTES))

    def sums(item: Work) -> Sums:
        return piece_sums(item[1], importance[item[0]])

    if threads == 1:
        yield from ((item, sums(item)) for item in work)
        return
    waiting: deque[tuple[Work, Future[Sums]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in work:
            waiting.append((item, pool.submit(sums, item)))
            if len(waiting) >= _AHEAD * threads:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def piece_sums(piece: Piece, importance: TensorWeights | None) -> Sums:
    sums, w, at = Sums(), None, None
    for x, y, column in numbers_of(piece):
        if importance is not None and at != column:
            w, at = importance.row(piece.number, column, x.shape[1]), column
        sums.add(x, y, w)
    return sums
