"""What an argument must be: a whole number, one of a few choices."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from .errors import BadPlan
from .words import either


def as_whole_number(x: object) -> int | None:
    """x as an int, if it is a whole number of any kind, numpy's too; None for anything else, truth values among it."""
    if isinstance(x, bool):
        return None
    try:
        return operator.index(x)  # type: ignore[arg-type]  # what it refuses is what we ask
    except TypeError:
        return None


def whole_number(x: object, what: str) -> int:
    """x as an int; BadPlan for anything that is not a whole number."""
    number = as_whole_number(x)
    if number is None:
        raise BadPlan("not a whole number", object=what, found=repr(x)[:80])
    return number


def choice(value: str, allowed: Sequence[str], what: str) -> str:
    """value, if it is allowed; BadPlan for another."""
    if not isinstance(value, str) or value not in allowed:
        raise BadPlan(
            "unknown choice", object=what, found=repr(value)[:80], expected=either([f'"{name}"' for name in allowed])
        )
    return value
