"""Values as printed JSON shows them: for people and scripts, not lossless."""

from __future__ import annotations

import math
from typing import Any

from .._core import Value
from .errors import SurgeryError

LIST_LONGEST = 32  # printed JSON abbreviates longer arrays


def value_for_json(value: Value, full: bool = False) -> Any:
    """A metadata value for people and scripts (plan_data.codec.value_to_json is the lossless form)."""
    if value.type.endswith("[]") and not full and len(value) > LIST_LONGEST:
        return {"type": value.type, "length": len(value), "head": _finite(value.head(LIST_LONGEST))}
    return _finite(value.value)


def _finite(x: Any) -> Any:
    """JSON has no NaN and no infinity: they become text. Bytes that are no UTF-8 become U+FFFD."""
    if isinstance(x, list):
        return [_finite(element) for element in x]
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    if isinstance(x, str):
        return x.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return x


def abbreviate(data: Any) -> Any:
    """Lists of over 32 plain elements as {"type", "length", "head"}, at any depth."""
    if isinstance(data, dict):
        return {key: abbreviate(value) for key, value in data.items()}
    if isinstance(data, list):
        if len(data) > LIST_LONGEST and not isinstance(data[0], (dict, list)):
            return {"type": type(data[0]).__name__, "length": len(data), "head": data[:LIST_LONGEST]}
        return [abbreviate(element) for element in data]
    return data


def error_for_json(error: SurgeryError) -> dict[str, Any]:
    fields = {name: getattr(error, name) for name in ("path", "object", "offset", "found", "expected", "hint")}
    return {
        "error": type(error).__name__,
        "message": str(error),
        "problem": error.problem,
        **{
            name: value if isinstance(value, (int, str)) else str(value)
            for name, value in fields.items()
            if value is not None
        },
    }
