"""The plan as JSON, both ways, lossless: derived by base.codec from the dataclasses, but for what stands here."""

from __future__ import annotations

import base64
import re
import typing
from functools import cache
from typing import Any

from .._core import Value
from ..base.codec import Convert, decoder, encode, exactly
from ..base.errors import BadPlan, SurgeryError
from .edits import Edit, PlanData
from .expressions import Expression, Merge, Take

FORMAT = 1

# {"edit": "keep_experts", ...} for KeepExperts
EDITS: dict[str, type] = {
    re.sub("(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower(): kind for kind in typing.get_args(Edit)
}


def plan_to_json(plan: PlanData) -> dict[str, Any]:
    inner: dict[Any, Convert] = {Value: value_to_json, bytes: lambda x: base64.b64encode(x).decode()}
    words = {kind: word for word, kind in EDITS.items()}
    edits: dict[Any, Convert] = dict.fromkeys(words, lambda edit: {"edit": words[type(edit)], **encode(edit, inner)})
    return {"format": FORMAT, **encode(plan, edits)}


def plan_from_json(data: Any) -> PlanData:
    """The plan in what base.codec.loads gave. BadPlan, its object the path, for anything that plan_to_json cannot give,
    but for keys of a default, which may be missing."""
    version = data.get("format") if isinstance(data, dict) else data
    if type(version) is not int or version != FORMAT:
        found = version if isinstance(version, int) else type(version).__name__
        raise BadPlan("not a plan of this version", object="format", found=found, expected=FORMAT)
    try:
        plan: PlanData = _plan_decoder()({key: x for key, x in data.items() if key != "format"})
        return plan
    except BadPlan as error:
        raise BadPlan(
            f"not a plan: {error.problem}",
            object=(error.object or "").removeprefix(".") or None,
            found=error.found,
            expected=error.expected,
            hint=error.hint,
        ) from None


@cache
def _plan_decoder() -> Convert:
    inner: dict[Any, Convert] = {Value: value_from_json, bytes: _bytes_from_json}
    edits = {word: decoder(kind, inner) for word, kind in EDITS.items()}

    def edit_from_json(data: Any) -> Any:
        word = exactly(dict, data).get("edit")
        if not isinstance(word, str) or word not in edits:
            found = f"{word:.80}" if isinstance(word, str) else None
            raise BadPlan("unknown edit", object=".edit", found=found, expected=", ".join(edits))
        return edits[word]({key: x for key, x in data.items() if key != "edit"})

    return decoder(PlanData, {Edit: edit_from_json})


def _bytes_from_json(data: Any) -> bytes:
    try:
        return base64.b64decode(exactly(str, data), validate=True)
    except ValueError:
        raise BadPlan("not base64") from None


def value_to_json(value: Value) -> dict[str, Any]:
    """Lossless: numbers and clean text as JSON, all else (NaN, bytes that are no UTF-8) as hex of the encoding."""
    plain = value.value
    if Value(plain, value.type) == value and _is_plain(plain):
        return {"type": value.type, "value": plain}
    return {"type": value.type, "hex": value.raw.hex()}


_SURROGATE = re.compile("[\ud800-\udfff]")


def _is_plain(x: Any) -> bool:
    if isinstance(x, list):
        return all(_is_plain(e) for e in x)
    if isinstance(x, float):
        return x - x == 0  # finite
    if isinstance(x, str):
        return not _SURROGATE.search(x)
    return True


def value_from_json(data: Any) -> Value:
    if sorted(exactly(dict, data)) not in (["type", "value"], ["hex", "type"]):
        raise BadPlan("not a value", found=f"keys {', '.join(data) or 'none'}"[:80], expected="type, and value or hex")
    kind = exactly(str, data["type"])
    try:
        if "hex" in data:
            return Value.from_raw(kind, bytes.fromhex(exactly(str, data["hex"])))
        value = Value(data["value"], kind)
    except SurgeryError as error:
        raise BadPlan(error.problem, found=error.found and f"{error.found:.80}", expected=error.expected) from None
    except (TypeError, ValueError, RecursionError):  # a type that is not UTF-8, hex that is not hex
        raise BadPlan("not a value of its type", found=f"{kind:.80}") from None
    if value.type != kind or not _is_plain(value.value):
        raise BadPlan("not a value of its type", found=f"{kind:.80}", hint="hex has the bytes of any")
    return value


def expression_to_json(expression: Expression) -> dict[str, Any]:
    """For people and scripts to read; of a Merge without the orders, which are in the plan's edit."""
    if isinstance(expression, Merge):
        groups = {"groups": [list(group.members) for group in expression.groups]}
        parts = {"ref": expression.ref, "axis": expression.axis, **groups}
        parts["weights"] = [list(group.weights) for group in expression.groups]
    else:  # a pad and an id that is dropped are -1
        parts = encode(expression, {type(None): lambda _: -1})
    if isinstance(expression, Take) and not expression.fill:
        del parts["fill"]
    return {"expression": expression.word, **parts}
