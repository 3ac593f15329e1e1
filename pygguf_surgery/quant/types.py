"""Facts about tensor types."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeAlias

from .._core import TypeFacts
from .._core import types as core_types
from ..base.errors import Unsupported
from ..base.words import nearest_names

TensorType: TypeAlias = TypeFacts

TYPES: Mapping[str, TensorType] = MappingProxyType({facts.name: facts for facts in core_types()})
_BY_ID = {facts.id: facts for facts in TYPES.values()}


def tensor_type(name: str) -> TensorType:
    """The facts of a type, by the name that ggml writes: "Q4_K". KeyError for another."""
    return TYPES[name]


def type_of_name(name: str) -> TensorType:
    """The facts of a type, by its name in any case. Unsupported, with the nearest names, for another."""
    facts = TYPES.get(name) or TYPES.get(name.upper())
    if facts is None:
        raise Unsupported("unknown tensor type", found=name, hint=nearest_names(name.upper(), TYPES))
    return facts


def type_of_id(number: int) -> TensorType:
    """The facts of a type, by ggml's number. Unsupported for a number that ggml does not have."""
    if number not in _BY_ID:
        raise Unsupported("unknown type", object=repr(number))
    return _BY_ID[number]


def row_bytes(type: str, elements: int) -> int:
    """Bytes of a row; `elements` is a multiple of the type's block."""
    facts = TYPES[type]
    return elements // facts.block * facts.block_bytes
