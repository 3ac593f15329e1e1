"""Numbers, tables and JSON as they are printed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .._core import Value

PROGRAM = "gguf-surgery"
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # all but the end of a line


def say(text: str) -> None:
    """One line for a person, on stderr."""
    print(f"{PROGRAM}: {printable(' '.join(text.split()))}", file=sys.stderr)


def explain(text: str) -> None:
    """Lines for a person, on stderr, to be copied as they are."""
    print(printable(text), file=sys.stderr)


def show(text: str) -> None:
    """Lines for a person, on stdout."""
    print(printable(text))


def printable(text: str) -> str:
    """Control characters as \\x1b: names come from the file, and a terminal obeys what they say."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def count(n: float) -> str:
    """79.7 B, as models are named."""
    for unit in ("", " K", " M", " B", " T"):
        if n < 1000 or unit == " T":
            break
        n /= 1000
    return f"{n:.0f}" if not unit else f"{n:.1f}{unit}"


def number(x: float | None, digits: int) -> str:
    return "" if x is None else f"{x:.{digits}f}"


def table(rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Columns of equal width; the first `left` are flush left, the others right."""
    rows = [[printable(cell).replace("\n", "\\n") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return "\n".join("  ".join(cell.ljust(w) if i < left else cell.rjust(w)
                               for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows)


def print_json(data: Any) -> None:
    json.dump(data, sys.stdout, allow_nan=False)
    print()


def short(value: Value, width: int = 72) -> str:
    """One line for a person."""
    if value.type.endswith("[]"):
        head = ", ".join(_scalar(e, 20) for e in value.head(4))
        return f"{value.type[:-2]}[{len(value)}] {head}{', ...' if len(value) > 4 else ''}"
    return _scalar(value.value, width)


def _scalar(x: Any, width: int) -> str:
    text = f"{x:.7g}" if isinstance(x, float) else repr(x)[1:-1] if isinstance(x, str) else str(x)
    return text if len(text) <= width else text[:width - 3] + "..."
