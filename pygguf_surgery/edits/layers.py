"""The layers of a model ("blk.N."): taking some away as if they had never been there."""

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
from ..architecture.loader import EXTRA_NAME, is_tensor_extra
from ..architecture.names import layer_of, local_name
from ..base.errors import BadPlan, Unsupported
from ..files.lineage import without_layers

if TYPE_CHECKING:
    from ..plan_data.outcome import Draft


# --- taking layers away ---------------------------------------------------------------------------------------------


def drop(architecture: str, out: Draft, dropped: Collection[int]) -> None:
    """Removes these layers as if the model had been converted without them: the rest is numbered from 0, and all that
    has one element per layer, counts layers or names them follows. SurgeryError, before anything is changed, for an
    array that nobody knows and that may have one element per layer.
    """
    metadata = dict(out.metadata)
    get = getter(metadata)
    layers, nextn = read_count(get, f"{architecture}.block_count"), mtp_layers(architecture, get)
    gone = sorted(dropped)
    lengths = {layers, layers - nextn} if gone and gone[0] < layers - nextn else {layers}
    for name, value in metadata.items():
        word = name.removeprefix(f"{architecture}.")
        if not value.type.endswith("[]"):
            continue
        if word != name and word in LAYER_NUMBERS:
            metadata[name] = like(value, [_renumber(name, x, gone) for x in whole_numbers(metadata, name) or ()])
        elif (word != name and word in PER_LAYER_KEYS) or name in PER_LAYER_GLOBAL:
            # Cut by index: some are longer than the number of layers, some leave the MTP layers out.
            metadata[name] = like(value, [x for i, x in enumerate(value.value) if _number(i, gone) is not None])
        elif word != name and len(value) in lengths and word not in OTHER_ARRAYS:
            raise Unsupported(
                "unknown array: it may have one element per layer",
                object=name,
                hint=f"it has {len(value)} elements, as many as there are layers",
            )
    _count(architecture, metadata, gone, layers, nextn)
    out.metadata = _rename(metadata, gone)
    out.tensors = [
        tensor if new == tensor.name else replace(tensor, name=new, notes=list(tensor.notes))
        for tensor in out.tensors
        if (new := _new_name(tensor.name, gone)) is not None
    ]


def _number(layer: int, gone: list[int]) -> int | None:
    """The number of a layer without those in `gone`, None for one of them."""
    below = bisect_left(gone, layer)
    return None if below < len(gone) and gone[below] == layer else layer - below


def _renumber(key: str, layer: int, gone: list[int]) -> int:
    number = _number(layer, gone)
    if number is None:
        raise BadPlan(f"layer {layer} is named by this key and cannot be dropped", object=key)
    return number


def _count(architecture: str, metadata: dict[str, Value], dropped: list[int], layers: int, nextn: int) -> None:
    key = f"{architecture}.block_count"
    metadata[key] = like(metadata[key], layers - len(dropped))
    for word in LEADING:
        if (key := f"{architecture}.{word}") in metadata:
            leading = read_count(getter(metadata), key)
            metadata[key] = like(metadata[key], leading - sum(layer < leading for layer in dropped))
    if nextn:
        key = f"{architecture}.nextn_predict_layers"
        left = nextn - sum(layer >= layers - nextn for layer in dropped)
        if left:
            metadata[key] = like(metadata[key], left)
        else:
            del metadata[key]


def _new_name(name: str, gone: list[int]) -> str | None:
    """The name of a tensor afterwards, None for one of a dropped layer."""
    layer = layer_of(name)
    number = None if layer is None else _number(layer, gone)
    if number == layer:
        return name
    return None if number is None else f"blk.{number}.{local_name(name)}"


def _rename(metadata: dict[str, Value], gone: list[int]) -> dict[str, Value]:
    """Keys and lists that name layers, in their old places."""
    result = without_layers(metadata, lambda layer: _number(layer, gone))
    names = result.get(EXTRA_NAME)
    if names is None or names.type != "str[]":
        return result
    new = [_new_name(name, gone) for name in names.value]
    for key, value in result.items():  # arrays parallel to the names
        if is_tensor_extra(key) and value.type.endswith("[]") and len(value) == len(new):
            old = new if value is names else value.value
            result[key] = like(value, [x for x, name in zip(old, new, strict=True) if name is not None])
    return result
