"""Numbers, names and tables as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .._core import Value


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] as "0..2, 5"."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(f"{a}..{b}" if b > a else str(a) for a, b in parts)


_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # all but the end of a line


def printable(text: str) -> str:
    """Control characters as \\x1b: names come from the file, and a terminal obeys what they say."""
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def magnitude(n: float) -> str:
    """79.7 B, as models are named."""
    for unit in ("", " K", " M", " B", " T"):
        if n < 1000 or unit == " T":
            break
        n /= 1000
    return f"{n:.0f}" if not unit else f"{n:.1f}{unit}"


def decimals(x: float | None, digits: int) -> str:
    return "" if x is None else f"{x:.{digits}f}"


def table(rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Columns of equal width; the first `left` are flush left, the others right."""
    rows = [[printable(cell).replace("\n", "\\n") for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def short(value: Value, width: int = 72) -> str:
    """One line for a person."""
    if value.type.endswith("[]"):
        head = ", ".join(_scalar(e, 20) for e in value.head(4))
        return f"{value.type[:-2]}[{len(value)}] {head}{', ...' if len(value) > 4 else ''}"
    return _scalar(value.value, width)


def _scalar(x: Any, width: int) -> str:
    text = f"{x:.7g}" if isinstance(x, float) else repr(x)[1:-1] if isinstance(x, str) else str(x)
    return text if len(text) <= width else text[: width - 3] + "..."


def nearest_multiples(n: int, step: int, most: int) -> str:
    """The multiples of step around n: "96 or 128"."""
    below, above = n // step * step, -(-n // step) * step
    return " or ".join(str(x) for x in sorted({below, above}) if 0 < x <= most)


def nearest_names(key: str, existing: Iterable[str]) -> str | None:
    import difflib

    close = difflib.get_close_matches(key, list(existing), n=3, cutoff=0.5)
    return f"nearest: {', '.join(close)}" if close else None


def short_repr(obj: Any) -> str:
    text = repr(obj)
    return text if len(text) <= 80 else text[:77] + "..."


def counted(n: int, what: str) -> str:
    return f"1 {what}" if n == 1 else f"{n} {what}s"


def first_numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:12])) + (f", ... ({len(numbers)})" if len(numbers) > 12 else "")


def tensors_text(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"


def with_others(items: Sequence[object]) -> str:
    more = len(items) - 1
    return f" (and {more} more tensor{'s' * (more > 1)})" if more else ""


def either(items: Sequence[str]) -> str:
    """["a", "b", "c"] as "a, b or c"."""
    return " or ".join(part for part in (", ".join(items[:-1]), *items[-1:]) if part)
