"""What a run may use."""

from __future__ import annotations

from dataclasses import dataclass

from .units import MEMORY, parse_memory, parse_threads


@dataclass(frozen=True)
class Limits:
    """memory: bytes of all buffers together. threads: 0 is PGS_THREADS or all CPUs. io: how inputs are read, "auto",
    "mmap", "pread" or "direct"; the core refuses others."""

    memory: int
    threads: int
    io: str

    @staticmethod
    def parse(memory: int | str = MEMORY, threads: int = 0, io: str = "auto") -> Limits:
        """The limits as a caller gives them: memory in bytes or as "512MiB". BadPlan for what cannot be one."""
        return Limits(parse_memory(memory), parse_threads(threads), io)
