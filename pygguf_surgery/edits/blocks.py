"""The blocks of a model ("blk.N."): taking some away, and what the result says of the source it was cut from."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from .._core import Value
from ..architecture.keys import (
    LAYER_NUMBERS,
    LEADING,
    OTHER_ARRAYS,
    PER_LAYER_GLOBAL,
    PER_LAYER_KEYS,
    getter,
    like,
    mtp_layers,
    read_count,
    whole_numbers,
)
from ..architecture.names import layer_of
from ..base.errors import BadPlan, Unsupported
from ..files.lineage import without_layers

if TYPE_CHECKING:
    from ..plan_data.outcome import Draft


# --- taking blocks away ---------------------------------------------------------------------------------------------


def drop(architecture: str, out: Draft, dropped: Collection[int]) -> None:
    """Removes these blocks as if the model had been converted without them: the rest is numbered from 0, and all that
    has one element per block, counts blocks or names them follows. SurgeryError, before anything is changed, for an
    array that nobody knows and that may have one element per block.
    """
    metadata = dict(out.metadata)
    blocks, nextn = (
        read_count(getter(metadata), f"{architecture}.block_count"),
        mtp_layers(architecture, getter(metadata)),
    )
    gone = sorted(dropped)
    lengths = {blocks, blocks - nextn} if gone and gone[0] < blocks - nextn else {blocks}
    for name, value in metadata.items():
        word = name.removeprefix(f"{architecture}.")
        if not value.type.endswith("[]"):
            continue
        if word != name and word in LAYER_NUMBERS:
            metadata[name] = like(value, [_renumber(name, x, gone) for x in whole_numbers(metadata, name) or ()])
        elif word != name and word in PER_LAYER_KEYS or name in PER_LAYER_GLOBAL:
            # Cut by index: some are longer than the number of blocks, some leave the MTP layers out.
            metadata[name] = like(value, [x for i, x in enumerate(value.value) if _number(i, gone) is not None])
        elif word != name and len(value) in lengths and word not in OTHER_ARRAYS:
            raise Unsupported(
                "unknown array: it may have one element per block",
                object=name,
                hint=f"it has {len(value)} elements, as many as there are blocks",
            )
    _count(architecture, metadata, gone, blocks, nextn)
    out.metadata = _rename(metadata, gone)
    out.tensors = [
        tensor if new == tensor.name else replace(tensor, name=new, notes=list(tensor.notes))
        for tensor in out.tensors
        if (new := _new_name(tensor.name, gone)) is not None
    ]


def _number(block: int, gone: list[int]) -> int | None:
    """The number of a block without those in `gone`, None for one of them."""
    below = bisect_left(gone, block)
    return None if below < len(gone) and gone[below] == block else block - below


def _renumber(key: str, block: int, gone: list[int]) -> int:
    number = _number(block, gone)
    if number is None:
        raise BadPlan(f"block {block} is named by this key and cannot be dropped", object=key)
    return number


def _count(architecture: str, metadata: dict[str, Value], dropped: list[int], blocks: int, nextn: int) -> None:
    key = f"{architecture}.block_count"
    metadata[key] = like(metadata[key], blocks - len(dropped))
    for word in LEADING:
        if (key := f"{architecture}.{word}") in metadata:
            leading = read_count(getter(metadata), key)
            metadata[key] = like(metadata[key], leading - sum(block < leading for block in dropped))
    if nextn:
        key = f"{architecture}.nextn_predict_layers"
        left = nextn - sum(block >= blocks - nextn for block in dropped)
        if left:
            metadata[key] = like(metadata[key], left)
        else:
            del metadata[key]


def _new_name(name: str, gone: list[int]) -> str | None:
    """The name of a tensor afterwards, None for one of a dropped block."""
    block = layer_of(name)
    number = None if block is None else _number(block, gone)
    if number == block:
        return name
    return None if number is None else f"blk.{number}.{name.split('.', 2)[2]}"


def _rename(metadata: dict[str, Value], gone: list[int]) -> dict[str, Value]:
    """Keys and lists that name blocks, in their old places."""
    result = without_layers(metadata, lambda layer: _number(layer, gone))
    names = result.get("general.tensor_extra.name")
    if names is None or names.type != "str[]":
        return result
    new = [_new_name(name, gone) for name in names.value]
    for key, value in result.items():  # arrays parallel to the names
        if key.startswith("general.tensor_extra.") and value.type.endswith("[]") and len(value) == len(new):
            result[key] = like(
                value, [x for x, name in zip(new if value is names else value.value, new) if name is not None]
            )
    return result
