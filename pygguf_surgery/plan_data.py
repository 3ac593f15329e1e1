"""The plan as plain data: what was asked (edits) and what it comes to (output tensors). No behaviour but JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ._core import Value
from .errors import BadPlan

FORMAT = 1


# --- edits: what was asked, with all its numbers -------------------------------------------------------------------

@dataclass(frozen=True)
class KeepExperts:
    """Keep these experts. kept: layer -> ascending ids, the same count in every layer. mtp: "keep" (cut the MTP blocks
    with the rest; they must be in `kept`) or "drop" (remove them). order: the kept ids best first, for layers whose
    tables of expert ids need substitutes; where it is missing they are taken in ascending order."""

    kept: dict[int, tuple[int, ...]]
    metric: str
    mtp: str = "keep"
    order: dict[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class SetMetadata:
    items: tuple[tuple[str, Value], ...]


@dataclass(frozen=True)
class RemoveMetadata:
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Quantize:
    """type: a llama-quantize file type ("MXFP4_MOE"), or any ggml type with pure. overrides: (pattern, ggml type or
    "copy"), first match wins."""

    type: str
    pure: bool = False
    overrides: tuple[tuple[str, str], ...] = ()
    allow_requantize: bool = False


Edit = KeepExperts | SetMetadata | RemoveMetadata | Quantize


# --- expressions: where an output tensor's rows come from ----------------------------------------------------------

@dataclass(frozen=True)
class Copy:
    ref: str


@dataclass(frozen=True)
class Take:
    """Slices of `ref` along its slowest axis."""

    ref: str
    indices: tuple[int, ...]


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


Expression = Copy | Take | Stack | Remap


@dataclass
class OutputTensor:
    """shape is outermost first, type a ggml type name. source_type is the type of the bytes that the expression gives;
    where it differs from type they are decoded and encoded."""

    name: str
    shape: tuple[int, ...]
    type: str
    source_type: str
    expression: Expression
    role: str = "other"
    notes: list[str] = field(default_factory=list)  # a fallback, a missing importance row, ...


@dataclass(frozen=True)
class PlanData:
    """Everything that determines the output, bar the source's bytes."""

    source: str             # path of the (first) file
    header_sha256: str      # of the header bytes of all its shards
    edits: tuple[Edit, ...] = ()


# --- JSON, both ways -----------------------------------------------------------------------------------------------

def value_to_json(value: Value) -> dict[str, Any]:
    """Lossless: numbers and clean text as JSON, all else (NaN, bytes that are no UTF-8) as hex of the encoding."""
    plain = value.value
    if Value(plain, value.type) == value and _is_plain(plain):
        return {"type": value.type, "value": plain}
    return {"type": value.type, "hex": value.raw.hex()}


def _is_plain(x: Any) -> bool:
    if isinstance(x, list):
        return all(_is_plain(e) for e in x)
    if isinstance(x, float):
        return x - x == 0  # finite
    if isinstance(x, str):
        return not any("\ud800" <= c <= "\udfff" for c in x)
    return True


def value_from_json(data: dict[str, Any]) -> Value:
    if "hex" in data:
        return Value.from_raw(data["type"], bytes.fromhex(data["hex"]))
    return Value(data["value"], data["type"])


def edit_to_json(edit: Edit) -> dict[str, Any]:
    match edit:
        case KeepExperts(kept, metric, mtp, order):
            return {"edit": "keep_experts", "kept": {str(k): list(v) for k, v in kept.items()}, "metric": metric,
                    "mtp": mtp, "order": {str(k): list(v) for k, v in order.items()}}
        case SetMetadata(items):
            return {"edit": "set_metadata", "items": [[k, value_to_json(v)] for k, v in items]}
        case RemoveMetadata(keys):
            return {"edit": "remove_metadata", "keys": list(keys)}
        case Quantize(type, pure, overrides, allow):
            return {"edit": "quantize", "type": type, "pure": pure, "overrides": [list(o) for o in overrides],
                    "allow_requantize": allow}
    raise TypeError(edit)


def _text(x: Any) -> str:
    if not isinstance(x, str):
        raise TypeError(f"{x!r:.80} is not a string")
    return x


def edit_from_json(data: dict[str, Any]) -> Edit:
    match data["edit"]:
        case "keep_experts":
            return KeepExperts({int(k): tuple(v) for k, v in data["kept"].items()}, _text(data["metric"]), data["mtp"],
                               {int(k): tuple(v) for k, v in data.get("order", {}).items()})
        case "set_metadata":
            return SetMetadata(tuple((_text(k), value_from_json(v)) for k, v in data["items"]))
        case "remove_metadata":
            return RemoveMetadata(tuple(_text(k) for k in data["keys"]))
        case "quantize":
            return Quantize(_text(data["type"]), data["pure"], tuple((p, t) for p, t in data["overrides"]),
                            data["allow_requantize"])
    raise BadPlan("unknown edit", object=str(data["edit"]))


def expression_to_json(expression: Expression) -> dict[str, Any]:
    match expression:
        case Copy(ref):
            return {"expression": "copy", "ref": ref}
        case Take(ref, indices):
            return {"expression": "take", "ref": ref, "indices": list(indices)}
        case Stack(refs):
            return {"expression": "stack", "refs": list(refs)}
        case Remap(ref, table, substitutes):
            return {"expression": "remap", "ref": ref, "table": list(table), "substitutes": list(substitutes)}
    raise TypeError(expression)


def plan_to_json(plan: PlanData) -> dict[str, Any]:
    return {"format": FORMAT, "source": plan.source, "header_sha256": plan.header_sha256,
            "edits": [edit_to_json(e) for e in plan.edits]}


def plan_from_json(data: dict[str, Any]) -> PlanData:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise BadPlan("not a plan of this version", object="format", found=found, expected=FORMAT)
    try:
        return PlanData(_text(data["source"]), _text(data["header_sha256"]),
                        tuple(edit_from_json(e) for e in data["edits"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadPlan(f"not a plan: {error!r}") from None
