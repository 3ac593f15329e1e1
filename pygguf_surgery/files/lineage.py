"""What a file says of the file it was made from: the keys `pgs.*`, in one place."""

from __future__ import annotations

import re
from collections import Counter

from .._core import Value, __version__
from ..architecture.keys import getter, like, read_count
from ..architecture.loader import MAX_EXPERTS
from ..architecture.names import layer_of
from ..plan_data.expressions import Slices
from .model import Model, Tensor

KEPT = "pgs.layers.kept"  # u32[]: the source's number of each block
OF_EXPERTS = re.compile(r"pgs\.experts\.([0-9]+)\.(\w+)")

_IDS = ("general.uuid", "general.doi", "general.source.uuid", "general.source.doi")  # of the original, not of this file
_BASE_MODEL = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")


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
    metadata["pgs.version"] = Value(__version__, "str")
    metadata["pgs.source.header_sha256"] = Value(model.header_sha256, "str")
    metadata["pgs.source.name"] = Value(model.name, "str")
    return again


def drop_size_label(metadata: dict[str, Value], warnings: list[str]) -> None:
    if (label := metadata.pop("general.size_label", None)) is not None:
        warnings.append(f"general.size_label {label.value!r} is no longer true and is dropped")


def _add_base_model(model: Model, metadata: dict[str, Value]) -> None:
    """Appends the source to the base models, with what it says about itself."""
    source = model.metadata
    known = {
        word: source[key]
        for word in _BASE_MODEL
        if isinstance(source.get(key := f"general.{word}"), str) and source[key]
    }
    if not known:
        return
    key = "general.base_model.count"
    index = read_count(getter(metadata), key, 0)
    while any(k.startswith(f"general.base_model.{index}.") for k in metadata):  # more than the count says
        index += 1
    metadata[key] = like(metadata[key], index + 1) if key in metadata else Value(index + 1, "u32")
    for word, text in known.items():
        metadata[f"general.base_model.{index}.{word}"] = Value(text, "str")


DROPPED = 0xFFFFFFFF  # in pgs.experts.LAYER.merged: in no group


def set_size_label(metadata: dict[str, Value], old: int, new: int, warnings: list[str]) -> None:
    """In "512x2.5B" the size is that of the shared weights and one expert: a cut leaves it as it is."""
    label = metadata.get("general.size_label")
    if label is not None and (match := re.fullmatch(rf"{old}(x.+)", str(label.value), re.DOTALL)):
        metadata["general.size_label"] = Value(f"{new}{match[1]}", "str")
    else:
        drop_size_label(metadata, warnings)


# --- where the rows of a result come from --------------------------------------------------------------------------


def kept_experts(result: Model, source: Model) -> dict[int, Slices]:
    """The lists that pruning left in the result's metadata (`pgs.experts.LAYER.kept`). Empty when there are none, or
    when the source has the same ones: then they tell of an earlier cut."""
    kept = {}
    for key in () if _of_earlier_cut(result, source) else result.metadata:
        match = re.fullmatch(r"pgs\.experts\.([0-9]+)\.kept", key)
        if match and result.metadata.value(key).type.endswith("[]"):
            pads = result.metadata.get(f"pgs.experts.{match[1]}.padded", 0)
            pads = pads if isinstance(pads, int) and 0 < pads <= MAX_EXPERTS else 0
            kept[int(match[1])] = (*result.metadata[key], *(None,) * pads)
    return kept


def kept_layers(result: Model, source: Model) -> tuple[int, ...] | None:
    """The source's number of each block of the result (`pgs.layers.kept`). None when it lists none, or when the source
    has the same list: then blocks have the same numbers in both."""
    if KEPT not in result.metadata or _of_earlier_cut(result, source):
        return None
    value = result.metadata.value(KEPT)
    return tuple(value.value) if value.type in ("u32[]", "i32[]") else None


def _of_earlier_cut(result: Model, source: Model) -> bool:
    key = "pgs.source.header_sha256"
    return key in source.metadata and source.metadata[key] == result.metadata.get(key)


def is_repaired(tensor: Tensor, model: Model, source: Model) -> bool:
    """A cut with a repair gave it other numbers on purpose."""
    key = f"pgs.experts.{layer_of(tensor.name)}.repaired"
    return tensor.name.endswith(".ffn_down_exps.weight") and key in model.metadata and key not in source.metadata


def merged_slices(tensor: Tensor, model: Model, source: Model) -> set[int]:
    """The experts of this tensor that were made of several of the source's."""
    key = f"pgs.experts.{layer_of(tensor.name)}.merged"
    if (
        not re.search(r"_exps\.(weight|bias)$", tensor.name)
        or key not in model.metadata
        or key in source.metadata
        or not model.metadata.value(key).type.endswith("[]")
    ):
        return set()
    return {expert for expert, n in Counter(model.metadata[key]).items() if n > 1}
