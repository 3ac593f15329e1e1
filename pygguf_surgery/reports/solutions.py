"""Which numbers of experts and file types fit into a machine together."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..architecture.cache import Use
from ..architecture.experts import moe_layers, most_used
from ..architecture.keys import getter, read_count
from ..base.errors import BadPlan, SurgeryError
from ..base.limits import Limits
from ..base.units import MEMORY, human
from ..base.words import counted, decimals, table
from ..files.companions import Companions
from ..files.model import Model
from ..gate.check import check
from ..gate.checked import CheckedPlan
from ..plan_data.edits import KeepExperts, PlanData
from ..plan_data.expressions import OutputTensor
from ..quant.types import tensor_type
from ..recipes import mixes
from ..studies.scoring import rank
from .memory import BANDWIDTH, Part, need, need_of, parse_bandwidth, parse_device, parse_use, rate

STEPS = 8  # of the numbers of experts: E, 7/8 E, ...
COPY = "COPY"
SHOWN = 6  # types of each number of experts, in the table


def solve(
    model: Model,
    *,
    device: int | str,
    keep: int | None = None,
    type: str | None = None,
    bandwidth: int | str = BANDWIDTH,
    **options: Any,
) -> dict[str, Any]:
    """Pairs of experts kept and file type with which a model fits into `device` ("120GiB"), most experts first, then
    most bits. Reads headers only: which experts those are is for a ranking to say.

    keep, type: only this number, this file type; by default eighths of the experts, and all file types that make the
    model smaller. options: those of memory() that say how it is run, such as context and type_k.

    {"device", "experts", "trained_context", "solutions": [{"experts", "type", "bits_per_weight", "weights_nbytes",
    "total_nbytes", "largest_context", "tokens_per_second_at_most", "needs_importance", "requantizes"}]}.
    needs_importance: llama-quantize makes this type only with an importance matrix; requantizes: tensors that are
    quantized already would be encoded again.
    """
    limit, speed, use = parse_device(device), parse_bandwidth(bandwidth), parse_use(need(model), **options)
    get = getter(model.metadata.exact())
    experts = read_count(get, f"{model.architecture}.expert_count", 0) if moe_layers(model.tensors) else 0
    if keep is not None and not experts:
        raise BadPlan("the model has no experts", object="keep", found=keep)
    counts = [keep] if keep is not None else _counts(experts, most_used(model.architecture, get))
    types = [COPY, *(n for n in mixes.FILE_TYPES if n not in mixes.ALIASES), *mixes.OUR_FILE_TYPES]
    if type is not None:
        types = [mixes.file_type(type, False).name]
    solutions = []
    for count in counts:
        cut = _cut(model, count, experts, required=keep is not None)
        if cut is not None:
            solutions += _of_cut(cut, count, types, use, limit, speed)
    trained = read_count(get, f"{model.architecture}.context_length", 0)
    return {"device": limit, "experts": experts or None, "trained_context": trained or None, "solutions": solutions}


def _counts(experts: int, used: int) -> list[int | None]:
    if not experts:
        return [None]
    return [n for n in sorted({experts * i // STEPS for i in range(1, STEPS + 1)}, reverse=True) if n >= used]


def _cut(model: Model, count: int | None, experts: int, *, required: bool) -> CheckedPlan | None:
    """The model with as many experts, whichever; None where that cannot be, or an error if it is required."""
    edits: tuple[KeepExperts, ...] = ()
    limits = Limits.parse(MEMORY, 0, "auto")
    if count is not None and count != experts:
        alike = rank(model, by={"scores": {layer: [0] * experts for layer in moe_layers(model.tensors)}})
        try:
            kept = alike.keep(count)
        except SurgeryError:
            if required:
                raise
            return None
        edits = (KeepExperts(dict(sorted(kept.items())), "given", kept.mtp),)
    with Companions() as companions:
        cut = check(model, PlanData(model.path, model.header_sha256, edits), limits, companions)
    if cut.blockers and required:
        raise cut.blockers[0]
    return None if cut.blockers else cut


def _of_cut(
    cut: CheckedPlan, count: int | None, types: Sequence[str], use: Use, limit: int, speed: int
) -> list[dict[str, Any]]:
    """Those with the experts of one cut, most bits first."""
    found = []
    for name in types:
        chosen = _types(cut, mixes.file_type(name, False))
        if chosen is None:
            continue
        parts = [
            Part(t.name, type, t.shape, _nbytes(t.shape, type), t.role)
            for t, type in zip(cut.tensors, chosen.types, strict=True)
        ]
        nbytes = sum(part.nbytes for part in parts)
        if name != COPY and len(types) > 1 and nbytes >= sum(cut.nbytes):
            continue
        needed = need_of(cut.architecture, cut.metadata, parts, cut.alignment, nbytes)
        total = needed.total(use)
        if total > limit:
            continue
        found.append(
            {
                "experts": count,
                "type": name,
                "bits_per_weight": needed.weights.bits,
                "weights_nbytes": needed.weights.loaded,
                "total_nbytes": total,
                "largest_context": needed.largest_context(use, limit),
                "tokens_per_second_at_most": rate(needed, speed),
                "needs_importance": chosen.needs_importance,
                "requantizes": chosen.requantizes,
            }
        )
    return sorted(found, key=lambda s: -s["weights_nbytes"])


class _Chosen(NamedTuple):
    types: list[str]
    needs_importance: bool
    requantizes: bool


def _types(cut: CheckedPlan, file_type: mixes.FileType) -> _Chosen | None:
    """The types that llama-quantize would give the tensors, with an importance matrix where the file type needs one;
    None where it refuses."""
    facts = mixes.model_facts(cut.architecture, getter(cut.metadata))
    shapes = {tensor.name: tensor.shape for tensor in cut.tensors}
    order = [(name, shapes[name]) for name in mixes.loader_order(shapes)]
    found: list[str] = []
    encoded: list[OutputTensor] = []
    for has_imatrix in (False, True):
        wanted, errors = mixes.choose_types(file_type, facts, order, has_imatrix=has_imatrix)
        fitting = [_fitting(t, wanted.get(t.name, t.source_type)) for t in cut.tensors]
        if errors or None in fitting:
            return None
        found = [type for type in fitting if type is not None]
        encoded = [t for t, type in zip(cut.tensors, found, strict=True) if type != t.source_type]
        needs = has_imatrix or any(
            tensor_type(type).needs_importance or mixes.wants_importance(file_type, t.name, type)
            for t, type in zip(cut.tensors, found, strict=True)
            if type != t.source_type
        )
        if not needs:
            break
    return _Chosen(found, needs, any(tensor_type(t.source_type).quantized for t in encoded))


def _fitting(tensor: OutputTensor, wanted: str) -> str | None:
    if wanted == tensor.source_type:
        return wanted
    return mixes.fallback(wanted, tensor.shape[-1] if tensor.shape else 1)


def _nbytes(shape: tuple[int, ...], type: str) -> int:
    facts = tensor_type(type)
    return -(-math.prod(shape) // facts.block) * facts.block_bytes


def describe(report: dict[str, Any]) -> str:
    """What solve() returns as a table, of each number of experts the types with most bits."""
    rows = [("experts", "type", "bits per weight", "weights", "all", "largest context", "tokens/s at most", "")]
    left: Counter[int | None] = Counter()
    for s in report["solutions"]:
        left[s["experts"]] += 1
        if left[s["experts"]] > SHOWN:
            continue
        notes = [word for word, key in (("imatrix", "needs_importance"), ("requantizes", "requantizes")) if s[key]]
        rows.append(
            (
                "" if s["experts"] is None else str(s["experts"]),
                s["type"],
                decimals(s["bits_per_weight"], 2),
                human(s["weights_nbytes"]),
                human(s["total_nbytes"]),
                _context(s["largest_context"], report["trained_context"]),
                decimals(s["tokens_per_second_at_most"], 1),
                ", ".join(notes),
            )
        )
    if len(rows) == 1:
        return f"nothing fits into {human(report['device'])}"
    more = sum(max(0, n - SHOWN) for n in left.values())
    return table(rows) + (f"\n({counted(more, 'smaller type')} not shown; --json has all)" if more else "")


def _context(largest: int | None, trained: int | None) -> str:
    """The longest context that the model was trained for is enough to say."""
    if largest is None:
        return "any"
    return f"{trained:,}+" if trained is not None and largest >= trained else f"{largest:,}"
