"""Metadata keys of an architecture: counts, and arrays with one element per layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .._core import Value
from ..base.errors import BadFile, SurgeryError

Get = Callable[[str], object]  # the value of a key, None where it is missing

# Numbers under "{architecture}." that count the first layers, which differ from the rest.
LEADING = ("leading_dense_block_count", "hash_layer_count")
# Arrays of numbers of layers, and arrays with one element per layer that are not under "{architecture}." (apertus).
LAYER_NUMBERS = ("ple.layers",)
PER_LAYER_GLOBAL = ("xielu.alpha_n", "xielu.alpha_p", "xielu.beta", "xielu.eps")


def getter(metadata: Mapping[str, Value]) -> Get:
    return lambda key: metadata[key].value if key in metadata else None


def like(value: Value, new: object) -> Value:
    """Another value of the same type."""
    return Value(new, value.type)


def whole_numbers(metadata: Mapping[str, Value], key: str) -> list[int] | None:
    """The elements of an array of whole numbers or truth values; None for a scalar or a missing key. BadFile for an
    array of anything else."""
    value = metadata.get(key)
    if value is None or not value.type.endswith("[]"):
        return None
    numbers: list[int] = value.value
    if not all(isinstance(x, int) for x in numbers):
        raise BadFile("not an array of whole numbers", object=key, found=value.type)
    return numbers


def mtp_layers(architecture: str, get: Get) -> int:
    """How many of the last layers are MTP layers. BadFile where the file's number is not a count."""
    return 0 if architecture in NOT_MTP else read_count(get, f"{architecture}.nextn_predict_layers", 0)


def mtp_fault(architecture: str, layers: int, nextn: int, kind: type[SurgeryError] = BadFile) -> SurgeryError | None:
    """What is wrong where more layers predict ahead than there are."""
    if nextn <= layers:
        return None
    return kind(
        "more MTP layers than layers",
        object=f"{architecture}.nextn_predict_layers",
        found=nextn,
        expected=f"at most {layers}",
    )


# fmt: off
# Arrays under "{architecture}." with one element per layer, MTP layers included: cut when those are dropped.
PER_LAYER_KEYS = frozenset((
    "activation_sparsity_scale", "attention.compress_ratios", "attention.head_count", "attention.head_count_kv",
    "attention.indexer.types", "attention.recurrent_layers", "attention.rope_pattern",
    "attention.sliding_window_pattern", "deepstack_mapping", "expert_feed_forward_length", "expert_used_count",
    "feed_forward_length", "swiglu_clamp_exp", "swiglu_clamp_shexp"))
# fmt: on
WITHOUT_MTP_KEYS = ("attention.indexer.types",)  # those that may leave the MTP layers out
# Arrays under "{architecture}." that have another meaning, even where their length happens to be the number of layers.
OTHER_ARRAYS = frozenset(
    (
        "adapters.token_ids_activate",
        "adapters.token_ids_substitute",
        "classifier.output_labels",
        "ple.head_offsets",
        "ple.head_vocab_sizes",
        "ple.layer_multipliers",
        "ple.layers",
        "rope.dimension_sections",
        "target_layers",
    )
)
# Here nextn_predict_layers counts the adapter router's layer, not MTP layers.
NOT_MTP = frozenset(("graniteswitch",))


def read_count(get: Get, key: str, default: int | None = None) -> int:
    """The value of `key` as a count; BadFile where it is missing (without a default) or not a whole number >= 0."""
    value = get(key)
    return default if value is None and default is not None else as_count(value, key)


def as_count(value: object, key: str) -> int:
    """The value of `key` as a count. BadFile where it is missing or not a whole number >= 0."""
    if value is None:
        raise BadFile("missing metadata", object=key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadFile("not a count", object=key, found=repr(value)[:80])
    return value
