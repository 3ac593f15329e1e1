"""What llama.cpp needs to run a model, or what a plan would make of it: weights, caches, states. From headers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from .._core import Value
from ..architecture.cache import CACHE_TYPES, CELLS, Caches, Use, caches, check_types, size_of, state_bytes, token_bytes
from ..architecture.experts import most_used
from ..architecture.keys import Get, as_count, getter, mtp_layers, read_count
from ..architecture.names import ROLES, layer_of, role_of
from ..base.checks import whole_number
from ..base.errors import BadPlan
from ..base.units import human, parse_size
from ..base.words import counted, either, table
from ..files.model import Model
from ..gate.checked import CheckedPlan
from ..quant.types import type_of_name

BANDWIDTH = "273GB/s"  # of a DGX Spark (GB10)
CONTEXT_MOST = (1 << 31) - CELLS
SEQUENCES_MOST = 256  # LLAMA_MAX_SEQ
# Tables of which llama.cpp reads single rows from the file, if they are larger (llama-model-loader.cpp, lazy_read).
LAZY = {"gemma4": "per_layer_token_embd.weight", "qwen4exp": "per_layer_token_embd.weight"}
LAZY_LEAST = 4 << 30
# A token needs one row of these.
TABLES = frozenset(("per_layer_token_embd.weight", "position_embd.weight", "token_types.weight"))


class Part(NamedTuple):
    """A tensor of a model, or of what a plan makes of it. shape is outermost first."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    role: str


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclass
class _Role:
    tensors: int = 0
    nbytes: int = 0
    read: int = 0
    types: Counter[str] = field(default_factory=Counter)


@dataclass
class Weights:
    """Of all tensors, in bytes; padding is that of the file. loaded: what llama.cpp holds: not the MTP layers, which it
    loads for a draft only, and not tables that it reads lazily. read: what a token needs to read."""

    file: int
    elements: int = 0
    tensors: int = 0
    padding: int = 0
    mtp: int = 0
    lazy: int = 0
    read: int = 0
    roles: dict[str, _Role] = field(default_factory=dict)

    @property
    def loaded(self) -> int:
        return self.tensors + self.padding - self.mtp - self.lazy

    @property
    def bits(self) -> float | None:
        return 8 * self.tensors / self.elements if self.elements else None


def weigh(architecture: str, get: Get, parts: Iterable[Part], alignment: int, file_bytes: int) -> Weights:
    """get: a metadata value by its key."""
    parts, total = list(parts), Weights(file_bytes)
    last = read_count(get, f"{architecture}.block_count", 0) - mtp_layers(architecture, get)
    tied = not any(part.name == "output.weight" for part in parts)
    used = _used(architecture, get)
    for part in parts:
        layer, padded = layer_of(part.name), -(-part.nbytes // alignment) * alignment
        mtp = layer is not None and layer >= last > 0
        role = total.roles.setdefault("mtp" if mtp else part.role, _Role())
        read = 0 if mtp else _read(part, tied, used(layer))
        role.tensors, role.nbytes, role.read = role.tensors + 1, role.nbytes + part.nbytes, role.read + read
        role.types[part.type] += part.nbytes
        total.elements += math.prod(part.shape)
        total.tensors, total.read, total.padding = (
            total.tensors + part.nbytes,
            total.read + read,
            total.padding + padded - part.nbytes,
        )
        if mtp:
            total.mtp += padded
        elif LAZY.get(architecture) == part.name and part.nbytes > LAZY_LEAST:
            total.lazy += padded
    return total


def _used(architecture: str, get: Get) -> Callable[[int | None], int]:
    """The experts that a token uses in a layer."""
    key = f"{architecture}.expert_used_count"
    value, most = get(key), most_used(architecture, get)
    if not isinstance(value, list):
        return lambda layer: most
    return lambda layer: as_count(value[layer], key) if layer is not None and layer < len(value) else most


def _read(part: Part, tied: bool, used: int) -> int:
    """Bytes of the tensor that a token needs."""
    slices = part.shape[0] if part.shape else 1
    if part.name in TABLES or part.name.endswith("ffn_gate_tid2eid.weight"):
        return part.nbytes // max(1, slices)
    if part.name == "token_embd.weight" and not tied:
        return part.nbytes // max(1, slices)
    if part.role == "expert":
        return part.nbytes * min(used, slices) // max(1, slices)
    return part.nbytes


# --- the whole --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """What a model with these weights needs for a context. get: a metadata value by its key."""

    architecture: str
    get: Get
    weights: Weights
    caches: Caches
    vocabulary: int

    def attention(self, use: Use) -> int:
        sizes = (size_of(cache, self.caches, use) for cache in self.caches.attention)
        return sum(size.key_bytes + size.value_bytes for size in sizes)

    def states(self, use: Use) -> int:
        return state_bytes(self.caches, use.sequences)

    def compute(self, use: Use) -> int:
        """An estimate of llama.cpp's buffers for the numbers of a batch: logits or what the experts are given, some
        vectors of the model's width, the mask. No metadata say what a backend's graph takes."""
        embedding, dense, expert, heads = (
            _most(self.get(f"{self.architecture}.{word}"))
            for word in (
                "embedding_length",
                "feed_forward_length",
                "expert_feed_forward_length",
                "attention.head_count",
            )
        )
        ffn = max(dense, expert * most_used(self.architecture, self.get))
        cells = max((size_of(cache, self.caches, use).cells for cache in self.caches.attention), default=0)
        flash = use.flash and self.caches.flash
        wide = max(self.vocabulary, 3 * ffn) + 8 * embedding + (0 if flash else cells * heads)
        return min(use.batch, use.context) * (4 * wide + (2 if flash else 4) * cells)

    def total(self, use: Use) -> int:
        return self.weights.loaded + self.attention(use) + self.states(use) + self.compute(use)

    def largest_context(self, use: Use, device: int) -> int | None:
        """The most tokens of a sequence, or of all where they share a cache, for which everything fits into `device`
        bytes: a multiple of 256, 0 where nothing fits, None where any number does."""
        each = 1 if use.unified else use.sequences

        def fits(steps: int) -> bool:
            return self.total(replace(use, context=steps * CELLS * each)) <= device

        below, above = 0, CONTEXT_MOST // CELLS // each
        if fits(above):
            return None
        while above - below > 1:
            middle = (below + above) // 2
            below, above = (middle, above) if fits(middle) else (below, middle)
        return below * CELLS


def _most(value: object) -> int:
    """The largest number of a value, which may have one per layer; 0 without any."""
    return max((n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)), default=0)


def need_of(
    architecture: str, metadata: dict[str, Value], parts: Iterable[Part], alignment: int, file_bytes: int
) -> Need:
    parts, get = list(parts), getter(metadata)
    rows = [part.shape[0] for part in parts if part.name in ("output.weight", "token_embd.weight") and part.shape]
    found = caches(architecture, metadata)  # first: it checks the numbers of layers
    return Need(architecture, get, weigh(architecture, get, parts, alignment, file_bytes), found, max(rows, default=0))


def need(of: Model | CheckedPlan) -> Need:
    if isinstance(of, Model):
        parts = [Part(t.name, t.type, t.shape, t.nbytes, role_of(t.name)) for t in of.tensors.values()]
        return need_of(of.architecture, of.metadata.exact(), parts, of.alignment, of.file_bytes)
    parts = [Part(t.name, t.type, t.shape, n, t.role) for t, n in zip(of.tensors, of.nbytes, strict=True)]
    return need_of(of.architecture, of.metadata, parts, of.alignment, of.file_bytes)


def parse_use(
    needed: Need,
    context: int | None = None,
    type_k: str = "F16",
    type_v: str = "F16",
    parallel: int = 1,
    unified: bool = False,
    ubatch: int = 512,
    flash_attention: bool = True,
) -> Use:
    """The options of memory(), checked against the model."""
    trained = trained_context(needed)
    if context is None and not trained:
        raise BadPlan("the model does not say how long its context is", object="context", hint="give one (--ctx)")
    numbers = {}
    for what, n, most in (
        ("context", trained if context is None else context, CONTEXT_MOST),
        ("parallel", parallel, SEQUENCES_MOST),
        ("ubatch", ubatch, CONTEXT_MOST),
    ):
        numbers[what] = whole_number(n, what)
        if not 1 <= numbers[what] <= most:
            raise BadPlan("out of llama.cpp's range", object=what, found=n, expected=f"1..{most}")
    key, value = (type_of_name(name).name for name in (type_k, type_v))
    for name in (key, value):
        if name not in CACHE_TYPES:
            raise BadPlan("not a type of caches", object=name, expected=either(CACHE_TYPES))
    use = Use(
        numbers["context"], numbers["parallel"], bool(unified), numbers["ubatch"], key, value, bool(flash_attention)
    )
    check_types(needed.architecture, needed.caches, use)
    return use


def trained_context(needed: Need) -> int:
    return read_count(needed.get, f"{needed.architecture}.context_length", 0)


def parse_bandwidth(bandwidth: int | str) -> int:
    """Bytes per second of 273000000000, "273GB/s" or "273GB"."""
    nbytes = parse_size(bandwidth.strip().removesuffix("/s") if isinstance(bandwidth, str) else bandwidth)
    if nbytes < 1:
        raise BadPlan("not a bandwidth", object=repr(bandwidth), expected="such as 273GB/s")
    return nbytes


def parse_device(device: int | str) -> int:
    nbytes = parse_size(device)
    if nbytes < 1:
        raise BadPlan("not a size of memory", object=repr(device), expected="such as 120GiB")
    return nbytes


def rate(needed: Need, bandwidth: int) -> float | None:
    """Tokens per second at most, if reading weights were all that takes time."""
    return bandwidth / needed.weights.read if needed.weights.read else None


def memory(
    of: Model | CheckedPlan,
    *,
    context: int | None = None,
    type_k: str = "F16",
    type_v: str = "F16",
    parallel: int = 1,
    unified: bool = False,
    ubatch: int = 512,
    flash_attention: bool = True,
    device: int | str | None = None,
    bandwidth: int | str = BANDWIDTH,
) -> dict[str, Any]:
    """What llama.cpp needs to run a model, or what a plan makes of one (`plan.check()`), in bytes. Reads headers only.

    context: tokens of all sequences together, by default as many as the model was trained for. parallel: sequences;
    unified: they share one cache. type_k, type_v: types of the caches. ubatch, flash_attention: as llama.cpp's options.
    device: memory that all has to fit into ("120GiB"); bandwidth: what it reads per second.

    {"architecture", "context": {"tokens", "per_sequence", "parallel", "unified", "trained"},
    "weights": {"file_bytes", "nbytes", "padding_nbytes", "loaded_nbytes", "mtp_nbytes", "lazy_nbytes",
    "read_per_token_nbytes", "bits_per_weight", "roles": [{"role", "tensors", "nbytes", "read_per_token_nbytes",
    "types"}]},
    "kv": {"type_k", "type_v", "nbytes", "per_token_nbytes", "caches": [{"kind", "layers", "cells", "streams",
    "k_nbytes", "v_nbytes"}]}, "recurrent": {"nbytes", "per_sequence_nbytes", "states": [{"kind", "layers", "nbytes"}]},
    "compute_nbytes_estimate", "total_nbytes",
    "device": None or {"nbytes", "fits", "largest_context"}, "speed": {"bandwidth", "tokens_per_second_at_most"}}

    loaded: without MTP layers and lazily read tables, with padding. per_token: what one more token of context takes;
    window caches and states do not grow. largest_context: of each sequence, or of all where they share a cache; None
    where any fits; it may be more than the model was trained for. BadFile for numbers that llama.cpp does not take,
    Unsupported for an architecture whose caches are not known, BadPlan for options that do not go with the model.
    """
    needed = need(of)
    use = parse_use(needed, context, type_k, type_v, parallel, unified, ubatch, flash_attention)
    limit, speed = None if device is None else parse_device(device), parse_bandwidth(bandwidth)
    total = needed.total(use)
    return {
        "architecture": needed.architecture,
        "context": {
            "tokens": use.total,
            "per_sequence": use.per_sequence,
            "parallel": use.sequences,
            "unified": use.unified,
            "trained": trained_context(needed) or None,
        },
        "weights": _weights_json(needed.weights),
        "kv": _kv_json(needed, use),
        "recurrent": {
            "nbytes": needed.states(use),
            "per_sequence_nbytes": needed.states(replace(use, sequences=1)),
            "states": [
                {"kind": s.kind, "layers": s.layers, "nbytes": 4 * use.sequences * s.layers * s.elements}
                for s in needed.caches.states
            ],
        },
        "compute_nbytes_estimate": needed.compute(use),
        "total_nbytes": total,
        "device": None
        if limit is None
        else {"nbytes": limit, "fits": total <= limit, "largest_context": needed.largest_context(use, limit)},
        "speed": {"bandwidth": speed, "tokens_per_second_at_most": rate(needed, speed)},
    }


def _weights_json(weights: Weights) -> dict[str, Any]:
    roles = sorted(weights.roles.items(), key=lambda item: ROLES.index(item[0]))
    return {
        "file_bytes": weights.file,
        "nbytes": weights.tensors,
        "padding_nbytes": weights.padding,
        "loaded_nbytes": weights.loaded,
        "mtp_nbytes": weights.mtp,
        "lazy_nbytes": weights.lazy,
        "read_per_token_nbytes": weights.read,
        "bits_per_weight": weights.bits,
        "roles": [
            {
                "role": name,
                "tensors": role.tensors,
                "nbytes": role.nbytes,
                "read_per_token_nbytes": role.read,
                "types": [type for type, _ in role.types.most_common()],
            }
            for name, role in roles
        ],
    }


def _kv_json(needed: Need, use: Use) -> dict[str, Any]:
    found, growing = [], 0.0
    for cache in needed.caches.attention:
        size = size_of(cache, needed.caches, use)
        found.append(
            {
                "kind": cache.kind,
                "layers": len(cache.rows),
                "cells": size.cells,
                "streams": size.streams,
                "k_nbytes": size.key_bytes,
                "v_nbytes": size.value_bytes,
            }
        )
        if cache.window is None:
            growing += sum(token_bytes(cache, needed.caches, use)) / cache.ratio
    return {
        "type_k": use.key_type,
        "type_v": use.value_type,
        "nbytes": needed.attention(use),
        "per_token_nbytes": int(growing) if growing.is_integer() else growing,
        "caches": found,
    }


# --- for people -------------------------------------------------------------------------------------------------------


def describe(report: dict[str, Any]) -> str:
    """What memory() returns as tables."""
    weights, kv, recurrent, context = (report[part] for part in ("weights", "kv", "recurrent", "context"))
    roles = [("role", "tensors", "bytes", "read per token", "types")] + [
        (r["role"], str(r["tensors"]), human(r["nbytes"]), human(r["read_per_token_nbytes"]), ", ".join(r["types"]))
        for r in sorted(weights["roles"], key=lambda r: -int(r["nbytes"]))
    ]
    needs = [
        ("weights", human(weights["loaded_nbytes"]), _bits(weights["bits_per_weight"])),
        *((f"kv {c['kind']}", human(c["k_nbytes"] + c["v_nbytes"]), _cells(c)) for c in kv["caches"]),
        *(
            (f"recurrent {s['kind']}", human(s["nbytes"]), f"{counted(s['layers'], 'layer')}, F32")
            for s in recurrent["states"]
        ),
        ("compute buffers", human(report["compute_nbytes_estimate"]), "an estimate"),
        ("all", human(report["total_nbytes"]), ""),
    ]
    lines = [_context_line(context)]
    if kv["caches"]:
        types = kv["type_k"] if kv["type_k"] == kv["type_v"] else f"{kv['type_k']} and {kv['type_v']}"
        lines.append(f"keys and values: {types}, {human(int(kv['per_token_nbytes']))} for each token more")
    for word, what in (
        ("mtp_nbytes", "of MTP layers are loaded only for a draft"),
        ("lazy_nbytes", "of tables stay in the file"),
    ):
        if weights[word]:
            lines.append(f"not counted: {human(weights[word])} {what}")
    speed = report["speed"]
    if speed["tokens_per_second_at_most"] is not None:
        lines.append(
            f"a token reads {human(weights['read_per_token_nbytes'])} of weights: at most "
            f"{speed['tokens_per_second_at_most']:.1f} tokens/s at {speed['bandwidth'] / 1e9:g} GB/s"
        )
    if report["device"] is not None:
        lines.append(_device_line(report["device"], context))
    return "\n\n".join((_columns(roles), _columns(needs), "\n".join(lines)))


def _cells(cache: dict[str, Any]) -> str:
    streams = f" for each of {cache['streams']} sequences" if cache["streams"] > 1 else ""
    return f"{counted(cache['layers'], 'layer')} of {cache['cells']:,} cells{streams}"


def _columns(rows: Sequence[tuple[str, ...]]) -> str:
    """A table whose last column is text too."""
    lines = table([row[:-1] for row in rows]).split("\n")
    width = max(map(len, lines))
    return "\n".join(f"{line:<{width}}  {row[-1]}".rstrip() for line, row in zip(lines, rows, strict=True))


def _bits(bits: float | None) -> str:
    return "" if bits is None else f"{bits:.2f} bits per weight"


def _context_line(context: dict[str, Any]) -> str:
    text = f"context: {context['tokens']:,} tokens"
    if context["parallel"] > 1:
        text += f", {context['parallel']} sequences" + (
            " that share them" if context["unified"] else f" of {context['per_sequence']:,}"
        )
    return text + (f" (trained for {context['trained']:,})" if context["trained"] else "")


def _device_line(device: dict[str, Any], context: dict[str, Any]) -> str:
    text = f"device of {human(device['nbytes'])}: {'fits' if device['fits'] else 'does not fit'}"
    largest = device["largest_context"]
    if largest is None:
        return f"{text}; any context does"
    if not largest:
        return f"{text}, and no context does"
    beyond = context["trained"] and largest > context["trained"]
    return (
        f"{text}; the largest context that does: {largest:,}"
        + (" for each sequence" if context["parallel"] > 1 else "")
        + (", more than the model was trained for" if beyond else "")
    )
