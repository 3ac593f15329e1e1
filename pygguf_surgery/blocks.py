"""The blocks of a model ("blk.N."): taking some away, and what the result says of the source it was cut from."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from . import _core
from ._core import Value
from .errors import BadFile, BadPlan, SurgeryError, Unsupported
from .experts import roles
from .plan_data import OutputTensor

if TYPE_CHECKING:
    from .model import Model

KEPT = "pgs.layers.kept"        # u32[]: the source's number of each block
_OF_EXPERTS = re.compile(r"pgs\.experts\.([0-9]+)\.(\w+)")
# Numbers under "{architecture}." that count the first blocks, which differ from the rest.
_LEADING = ("leading_dense_block_count", "hash_layer_count")
# Arrays of block numbers, and arrays with one element per block that are not under "{architecture}." (apertus).
_NUMBERS = ("ple.layers",)
_PER_BLOCK_GLOBAL = ("xielu.alpha_n", "xielu.alpha_p", "xielu.beta", "xielu.eps")

_IDS = ("general.uuid", "general.doi", "general.source.uuid", "general.source.doi")  # of the original, not of this file
_BASE_MODEL = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")


@dataclass
class Outcome:
    """What an edit comes to. With blockers the tensors are still the best description that can be given."""

    tensors: list[OutputTensor]
    metadata: dict[str, Value]
    blockers: list[SurgeryError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def getter(metadata: dict[str, Value]) -> Callable[[str], Any]:
    return lambda key: metadata[key].value if key in metadata else None


def like(value: Value, new: Any) -> Value:
    return Value(new, value.type)


def whole_numbers(metadata: Mapping[str, Value], key: str) -> list[int] | None:
    """The elements of an array of whole numbers or truth values; None for a scalar or a missing key. BadFile for an
    array of anything else."""
    value = metadata.get(key)
    if value is None or not value.type.endswith("[]"):
        return None
    if not all(isinstance(x, int) for x in value.value):
        raise BadFile("not an array of whole numbers", object=key, found=value.type)
    return value.value


def ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] as "0..2, 5"."""
    parts: list[list[int]] = []
    for n in sorted(numbers):
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(f"{a}..{b}" if b > a else str(a) for a, b in parts)


def mtp_blocks(architecture: str, metadata: dict[str, Value]) -> int:
    """How many of the last blocks are MTP blocks. BadFile where that is no count."""
    if architecture in roles.NOT_MTP:
        return 0
    return roles.count(getter(metadata), f"{architecture}.nextn_predict_layers", 0)


# --- taking blocks away ---------------------------------------------------------------------------------------------

def drop(architecture: str, out: Outcome, dropped: Collection[int]) -> None:
    """Removes these blocks as if the model had been converted without them: the rest is numbered from 0, and all that
    has one element per block, counts blocks or names them follows. SurgeryError, before anything is changed, for an
    array that nobody knows and that may have one element per block.
    """
    metadata = dict(out.metadata)
    blocks, nextn = roles.count(getter(metadata), f"{architecture}.block_count"), mtp_blocks(architecture, metadata)
    gone = sorted(dropped)
    lengths = {blocks, blocks - nextn} if gone and gone[0] < blocks - nextn else {blocks}
    for name, value in metadata.items():
        word = name.removeprefix(f"{architecture}.")
        if not value.type.endswith("[]"):
            continue
        if word != name and word in _NUMBERS:
            metadata[name] = like(value, [_renumber(name, x, gone) for x in whole_numbers(metadata, name) or ()])
        elif word != name and word in roles.PER_BLOCK_KEYS or name in _PER_BLOCK_GLOBAL or name == KEPT:
            # Cut by index: some are longer than the number of blocks, some leave the MTP blocks out.
            metadata[name] = like(value, [x for i, x in enumerate(value.value) if _number(i, gone) is not None])
        elif word != name and len(value) in lengths and word not in roles.OTHER_ARRAYS:
            raise Unsupported("unknown array: it may have one element per block", object=name,
                              hint=f"it has {len(value)} elements, as many as there are blocks")
    _count(architecture, metadata, gone, blocks, nextn)
    out.metadata = _rename(metadata, gone)
    out.tensors = [tensor if name == tensor.name else replace(tensor, name=name, notes=list(tensor.notes))
                   for tensor in out.tensors if (name := _new_name(tensor.name, gone)) is not None]


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
    for word in _LEADING:
        if (key := f"{architecture}.{word}") in metadata:
            leading = roles.count(getter(metadata), key)
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
    block = roles.layer_of(name)
    number = None if block is None else _number(block, gone)
    if number == block:
        return name
    return None if number is None else f"blk.{number}.{name.split('.', 2)[2]}"


def _rename(metadata: dict[str, Value], gone: list[int]) -> dict[str, Value]:
    """Keys and lists that name blocks, in their old places."""
    result: dict[str, Value] = {}
    for key, value in metadata.items():
        match = _OF_EXPERTS.fullmatch(key)
        if match is None:
            result[key] = value
        elif (number := _number(int(match[1]), gone)) is not None:
            result[f"pgs.experts.{number}.{match[2]}"] = value
    names = result.get("general.tensor_extra.name")
    if names is None or names.type != "str[]":
        return result
    new = [_new_name(name, gone) for name in names.value]
    for key, value in result.items():  # arrays parallel to the names
        if key.startswith("general.tensor_extra.") and value.type.endswith("[]") and len(value) == len(new):
            result[key] = like(value, [x for x, name in zip(new if value is names else value.value, new)
                                       if name is not None])
    return result


# --- what the result says of its source ------------------------------------------------------------------------------

def claim_source(model: Model, metadata: dict[str, Value]) -> bool:
    """Writes down which source this was cut from; True if an earlier edit of the plan did. What the source says of its
    own source, and the ids of the original, go; the source becomes a base model."""
    digest = metadata.get("pgs.source.header_sha256")
    again = digest is not None and digest.value == model.header_sha256
    if not again:
        for key in [k for k in metadata if k in _IDS or k == KEPT or k.startswith("pgs.experts.")]:
            del metadata[key]
        _add_base_model(model, metadata)
    metadata["pgs.version"] = Value(_core.__version__, "str")
    metadata["pgs.source.header_sha256"] = Value(model.header_sha256, "str")
    metadata["pgs.source.name"] = Value(model.name, "str")
    return again


def drop_size_label(metadata: dict[str, Value], warnings: list[str]) -> None:
    if (label := metadata.pop("general.size_label", None)) is not None:
        warnings.append(f"general.size_label {label.value!r} is no longer true and is dropped")


def _add_base_model(model: Model, metadata: dict[str, Value]) -> None:
    """Appends the source to the base models, with what it says about itself."""
    source = model.metadata
    known = {word: source[key] for word in _BASE_MODEL
             if isinstance(source.get(key := f"general.{word}"), str) and source[key]}
    if not known:
        return
    key = "general.base_model.count"
    index = roles.count(getter(metadata), key, 0)
    while any(k.startswith(f"general.base_model.{index}.") for k in metadata):  # more than the count says
        index += 1
    metadata[key] = like(metadata[key], index + 1) if key in metadata else Value(index + 1, "u32")
    for word, text in known.items():
        metadata[f"general.base_model.{index}.{word}"] = Value(text, "str")
