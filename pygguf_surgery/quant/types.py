"""Facts about tensor types."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from .._core import types as core_types
from ..base.errors import Unsupported


class TensorType(NamedTuple):
    """A ggml type. block: elements of a block; block_bytes: its bytes. quantized: blocks share scales. encodes, decodes:
    whether ggml has an encoder and a decoder. needs_importance: the encoder cannot do without; uses_importance: it makes
    a difference. has_best: there is an encoder with less error than ggml's, which uses importance."""

    id: int
    name: str
    block: int
    block_bytes: int
    quantized: bool
    encodes: bool
    decodes: bool
    needs_importance: bool
    uses_importance: bool
    has_best: bool


TYPES: Mapping[str, TensorType] = MappingProxyType({facts["name"]: TensorType(**facts) for facts in core_types()})
_BY_ID = {facts.id: facts for facts in TYPES.values()}


def tensor_type(name: str) -> TensorType:
    """The facts of a type, by the name that ggml writes: "Q4_K". KeyError for another."""
    return TYPES[name]


def type_of_id(number: int) -> TensorType:
    """The facts of a type, by ggml's number. Unsupported for a number that ggml does not have."""
    if number not in _BY_ID:
        raise Unsupported("unknown type", object=repr(number))
    return _BY_ID[number]


def row_bytes(type: str, elements: int) -> int:
    """Bytes of a row; `elements` is a multiple of the type's block."""
    facts = TYPES[type]
    return elements // facts.block * facts.block_bytes
