"""Numbers, names and tables as people read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .runs import merge_adjacent

if TYPE_CHECKING:
    from .._core import Value


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] as "0..2, 5"."""
    runs = merge_adjacent(sorted(numbers))
    return ", ".join(f"{first}..{first + n - 1}" if n > 1 else str(first) for first, n in runs)


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
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
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


def columns(widths: Sequence[int], cells: Sequence[object]) -> str:
    """A line of a table of figures, whose columns have given widths: cells flush right, those with a negative width
    flush left, one blank between them."""
    line = " ".join(f"{cell!s:<{-w}}" if w < 0 else f"{cell!s:>{w}}" for w, cell in zip(widths, cells, strict=True))
    return line.rstrip()


def nearest(name: str, existing: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Up to three of the existing names that are most like this one, best first; cutoff: how alike, 0 to 1."""
    import difflib  # takes long to import, and only errors need it

    return difflib.get_close_matches(name, list(existing), n=3, cutoff=cutoff)


def nearest_names(name: str, existing: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The hint of an error: "nearest: Q4_K, Q6_K"; None where nothing is near."""
    close = nearest(name, existing, cutoff)
    return f"nearest: {', '.join(close)}" if close else None


def nearest_multiples(n: int, step: int, most: int) -> str:
    """The multiples of step around n: "96 or 128"."""
    below, above = n // step * step, -(-n // step) * step
    return either([str(x) for x in sorted({below, above}) if 0 < x <= most])


def short_repr(obj: Any) -> str:
    text = repr(obj)
    return text if len(text) <= 80 else text[:77] + "..."


def counted(n: int, what: str) -> str:
    """1 and "tensor" as "1 tensor", 2 as "2 tensors"."""
    return f"1 {what}" if n == 1 else f"{n} {what}s"


def with_others(items: Sequence[object]) -> str:
    """After the first of several tensors: " (and 3 more tensors)"; "" where there is but one."""
    return f" (and {counted(len(items) - 1, 'more tensor')})" if len(items) > 1 else ""


def listed(items: Sequence[object], most: int, *, number: bool = False) -> str:
    """The first ones: "a, b, c, ..."; number: with how many there are, where there are more: "a, b, ... (7)"."""
    text = ", ".join(map(str, items[:most]))
    if len(items) <= most:
        return text
    return f"{text}, ... ({len(items)})" if number else f"{text}, ..."


def either(items: Sequence[str]) -> str:
    """["a", "b", "c"] as "a, b or c"."""
    return " or ".join(part for part in (", ".join(items[:-1]), *items[-1:]) if part)
