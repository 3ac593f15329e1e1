"""The plan as JSON, both ways, lossless."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .._core import Value
from ..base.errors import BadPlan
from .edits import (
    KeepExperts,
    MergeExperts,
    PlanData,
    PruneLayers,
    Quantize,
    RemoveMetadata,
    SetMetadata,
    Split,
    UseImatrix,
    UseRepair,
)
from .expressions import Copy, Group, Merge, Remap, Repaired, Stack, Take

if TYPE_CHECKING:
    from .edits import Edit
    from .expressions import Expression


FORMAT = 1


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


def _per_layer(numbers: dict[int, tuple[Any, ...]]) -> dict[str, list[Any]]:
    return {str(layer): list(values) for layer, values in numbers.items()}


def _group_to_json(group: Group) -> dict[str, Any]:
    return {
        "members": list(group.members),
        "weights": list(group.weights),
        "orders": [base64.b64encode(order).decode() for order in group.orders],
    }


def _group_from_json(data: Any) -> Group:
    return Group(
        _numbers(data["members"]),
        tuple(float(x) for x in _typed(data["weights"], list, "a list")),
        tuple(base64.b64decode(order, validate=True) for order in _texts(data["orders"])),
    )


def edit_to_json(edit: Edit) -> dict[str, Any]:
    match edit:
        case KeepExperts():
            return {
                "edit": "keep_experts",
                "kept": _per_layer(edit.kept),
                "metric": edit.metric,
                "mtp": edit.mtp,
                "order": _per_layer(edit.order),
                "scores": _per_layer(edit.scores),
                "repair": None if edit.repair is None else asdict(edit.repair),
            }
        case MergeExperts():
            return {
                "edit": "merge_experts",
                "groups": {str(layer): [_group_to_json(g) for g in groups] for layer, groups in edit.groups.items()},
                "metric": edit.metric,
                "mtp": edit.mtp,
            }
        case SetMetadata(items):
            return {"edit": "set_metadata", "items": [[k, value_to_json(v)] for k, v in items]}
        case RemoveMetadata(keys):
            return {"edit": "remove_metadata", "keys": list(keys)}
        case Quantize():
            return {
                "edit": "quantize",
                "type": edit.type,
                "pure": edit.pure,
                "overrides": [list(o) for o in edit.overrides],
                "allow_requantize": edit.allow_requantize,
                "output_type": edit.output_type,
                "token_embedding_type": edit.token_embedding_type,
                "leave_output": edit.leave_output,
                "imatrix": None if edit.imatrix is None else asdict(edit.imatrix),
                "max_bytes": edit.max_bytes,
                "quality": edit.quality,
            }
        case PruneLayers(layers):
            return {"edit": "prune_layers", "layers": list(layers)}
        case Split():
            return {"edit": "split", **asdict(edit)}
    raise TypeError(edit)


def _typed(x: Any, kind: type, what: str) -> Any:
    """x, if it is exactly of this kind: JSON edited by hand may say "false", 1.5 or "abc" for false, 1 or ["abc"]."""
    if type(x) is not kind:
        raise TypeError(f"{x!r:.80} is not {what}")
    return x


def _text(x: Any) -> str:
    return _typed(x, str, "a string")


def _flag(x: Any) -> bool:
    return _typed(x, bool, "true or false")


def _number(x: Any) -> int:
    return _typed(x, int, "a whole number")


def _texts(x: Any) -> tuple[str, ...]:
    return tuple(_text(e) for e in _typed(x, list, "a list"))


def _numbers(x: Any) -> tuple[int, ...]:
    return tuple(_number(e) for e in _typed(x, list, "a list"))


def _maybe(read: Callable[[Any], Any], x: Any) -> Any:
    return None if x is None else read(x)


def _imatrix_from_json(data: dict[str, Any]) -> UseImatrix:
    return UseImatrix(
        _text(data["path"]),
        _text(data["digest"]),
        _text(data["missing"]),
        _texts(data["include"]),
        _texts(data["exclude"]),
    )


def edit_from_json(data: dict[str, Any]) -> Edit:
    match data["edit"]:
        case "keep_experts":
            return KeepExperts(
                {int(k): _numbers(v) for k, v in data["kept"].items()},
                _text(data["metric"]),
                _text(data["mtp"]),
                {int(k): _numbers(v) for k, v in data.get("order", {}).items()},
                {int(k): tuple(float(x) for x in v) for k, v in data.get("scores", {}).items()},
                _maybe(lambda r: UseRepair(_text(r["path"]), _text(r["digest"])), data.get("repair")),
            )
        case "set_metadata":
            return SetMetadata(tuple((_text(k), value_from_json(v)) for k, v in _typed(data["items"], list, "a list")))
        case "remove_metadata":
            return RemoveMetadata(_texts(data["keys"]))
        case "quantize":  # .get: plans of the time when an edit had no more than the first four
            overrides = tuple((_text(p), _text(t)) for p, t in _typed(data["overrides"], list, "a list"))
            return Quantize(
                _text(data["type"]),
                _flag(data["pure"]),
                overrides,
                _flag(data["allow_requantize"]),
                _maybe(_text, data.get("output_type")),
                _maybe(_text, data.get("token_embedding_type")),
                _flag(data.get("leave_output", False)),
                _maybe(_imatrix_from_json, data.get("imatrix")),
                _maybe(_number, data.get("max_bytes")),
                _text(data.get("quality", "default")),
            )
        case "merge_experts":
            return MergeExperts(
                {
                    int(k): tuple(_group_from_json(g) for g in _typed(v, list, "a list"))
                    for k, v in data["groups"].items()
                },
                _text(data["metric"]),
                _text(data["mtp"]),
            )
        case "prune_layers":
            return PruneLayers(_numbers(data["layers"]))
        case "split":
            return Split(
                _maybe(_number, data["max_bytes"]),
                _maybe(_number, data["max_tensors"]),
                _flag(data["keep"]),
                _flag(data["first_empty"]),
            )
    raise BadPlan("unknown edit", object=str(data["edit"]))


def expression_to_json(expression: Expression) -> dict[str, Any]:
    match expression:
        case Copy(ref):
            return {"expression": "copy", "ref": ref}
        case Take(ref, indices, fill):
            numbers = [-1 if i is None else i for i in indices]
            return {"expression": "take", "ref": ref, "indices": numbers, **({"fill": fill} if fill else {})}
        case Stack(refs):
            return {"expression": "stack", "refs": list(refs)}
        case Merge(ref, groups, axis):  # the orders are in the plan's edit
            return {
                "expression": "merge",
                "ref": ref,
                "axis": axis,
                "groups": [list(g.members) for g in groups],
                "weights": [list(g.weights) for g in groups],
            }
        case Repaired(ref, rows, indices):
            return {"expression": "repair", "ref": ref, "rows": list(rows), "indices": list(indices)}
        case Remap(ref, table, substitutes):
            return {
                "expression": "remap",
                "ref": ref,
                "table": [-1 if i is None else i for i in table],
                "substitutes": list(substitutes),
            }
    raise TypeError(expression)


def plan_to_json(plan: PlanData) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "source": plan.source,
        "header_sha256": plan.header_sha256,
        "edits": [edit_to_json(e) for e in plan.edits],
    }


def plan_from_json(data: dict[str, Any]) -> PlanData:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise BadPlan("not a plan of this version", object="format", found=found, expected=FORMAT)
    try:
        return PlanData(
            _text(data["source"]),
            _text(data["header_sha256"]),
            tuple(edit_from_json(e) for e in _typed(data["edits"], list, "a list")),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadPlan(f"not a plan: {error!r}") from None
