"""Facts about tensor types."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from .._core import types as core_types


@lru_cache(maxsize=None)
def type_facts() -> dict[str, dict[str, Any]]:
    """Facts of every ggml type, by its name: see _core.types."""
    return {facts["name"]: facts for facts in core_types()}


@lru_cache(maxsize=None)
def type_names() -> dict[int, str]:
    return {facts["id"]: name for name, facts in type_facts().items()}


def row_bytes(type: str, elements: int) -> int:
    """Bytes of a row; `elements` is a multiple of the type's block."""
    facts = type_facts()[type]
    return elements // facts["block"] * facts["block_bytes"]
