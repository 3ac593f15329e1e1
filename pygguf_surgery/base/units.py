"""Bytes, seconds and numbers of threads as people write and read them."""

from __future__ import annotations

import re

from .checks import as_whole_number
from .errors import BadPlan

MEMORY = "512MiB"  # default budget of a run's buffers: enough to keep 16 threads and the disk busy
MEMORY_OF_TEXTS = "4GiB"  # the same of what is held of texts while llama.cpp runs them: sums, tokens of layers
MEMORY_LEAST = 64 << 20
MEMORY_MOST = 1 << 62
THREADS_MOST = 1024  # as in the core

_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def parse_size(size: int | str) -> int:
    """Bytes of 536870912, "512MiB" or "2GB" (KiB MiB GiB TiB are powers of 1024, kB MB GB TB of 1000)."""
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise BadPlan("not a size", object=repr(size), expected="bytes, or text such as 512MiB")
    if isinstance(size, int):
        return size
    match = _SIZE.fullmatch(size)
    if match is None or (match[2] and size.strip()[-1] not in "bB"):
        raise BadPlan("not a size", object=size, expected="bytes, or text such as 512MiB or 2GB")
    unit = (match[2] or "").lower()
    power = " kmgt".index(unit[0]) if unit else 0
    return int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** power)


def parse_file_size(size: int | str) -> int:
    """parse_size for the size of a file: BadPlan for a small number without a unit, which was most likely forgotten."""
    nbytes = parse_size(size)
    if isinstance(size, str) and not size.strip()[-1].isalpha() and 0 < nbytes < 1_000_000:
        raise BadPlan(
            "a size without a unit", object=size, found=f"{nbytes} bytes", hint=f"give a unit, such as {size.strip()}GB"
        )
    return nbytes


def parse_memory(memory: int | str) -> int:
    """A budget in bytes; BadPlan below the least that works."""
    nbytes = parse_size(memory)
    if nbytes < MEMORY_LEAST:
        raise BadPlan("too little memory for a run", object="memory", found=memory, expected="at least 64MiB")
    if nbytes > MEMORY_MOST:
        raise BadPlan("more memory than any machine has", object="memory", found=memory)
    return nbytes


def parse_threads(threads: int) -> int:
    """A number of threads, 0 for all; BadPlan for anything else."""
    number = as_whole_number(threads)
    if number is None or not 0 <= number <= THREADS_MOST:
        raise BadPlan("not a number of threads", object="threads", found=threads, expected=f"0 to {THREADS_MOST}")
    return number


def human(nbytes: int) -> str:
    """1234567 -> "1.18 MiB"."""
    size, units = float(nbytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{nbytes} B" if units[0] == "B" else f"{size:.2f} {units[0]}"


def duration(seconds: float) -> str:
    """75.3 -> "1:15"."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
