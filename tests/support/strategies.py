"""What hypothesis draws: values and headers of GGUF files, importance matrices, numbers to encode, choices of types,
whole files and models, plans, JSON.

A law that holds only away from rounding, overflow or subnormal numbers has a strategy that stays away from them, and
says so.
"""

from __future__ import annotations

import itertools
import os

import gguf
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import pygguf_surgery as pgs
from pygguf_surgery._core import TensorInfo, Value, types
from pygguf_surgery.plan_data.edits import (
    KeepExperts,
    MergeExperts,
    PlanData,
    PruneLayers,
    Quantize,
    RemoveMetadata,
    SetMetadata,
    Split,
    UseImatrix,
    UseRepair,
)
from pygguf_surgery.plan_data.expressions import Copy, Group, Merge, Remap, Repaired, Stack, Take

# --- GGUF: metadata and tensors ---------------------------------------------------------------------------------------

INTEGERS = {
    f"{sign}{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if sign == "i" else (0, 2**bits - 1)
    for sign in "ui"
    for bits in (8, 16, 32, 64)
}
SCALAR_TYPES = sorted([*INTEGERS, "bool", "str", "f32", "f64"])
UTF8 = st.text(st.characters(exclude_categories=["Cs"]))
ANY_BYTES = st.text() | st.binary().map(lambda raw: raw.decode("utf-8", "surrogateescape"))  # as Python has file names
KEYS = st.from_regex(r"[a-z0-9_]{1,12}(\.[a-z0-9_]{1,12}){0,3}", fullmatch=True).filter(
    lambda key: key != "general.alignment"
)


def scalars(kind, *, text=UTF8, nan=False):
    """What a value of this type may be in Python. nan: whether a float may be NaN, which equals nothing."""
    if kind in INTEGERS:
        return st.integers(*INTEGERS[kind])
    return {
        "bool": st.booleans(),
        "str": text,
        "f32": st.floats(width=32, allow_nan=nan),
        "f64": st.floats(allow_nan=nan),
    }[kind]


@st.composite
def python_values(draw, *, text=ANY_BYTES, nan=False, max_size=None):
    """(type, what Value takes for it): a scalar or an array."""
    kind = draw(st.sampled_from(SCALAR_TYPES))
    if draw(st.booleans()):
        return f"{kind}[]", draw(st.lists(scalars(kind, text=text, nan=nan), max_size=max_size))
    return kind, draw(scalars(kind, text=text, nan=nan))


def values(*, nan=False, max_size=20):
    return python_values(text=UTF8, nan=nan, max_size=max_size).map(lambda case: Value(case[1], case[0]))


@st.composite
def tensor_infos(draw):
    names = draw(
        st.lists(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(
                lambda n: len(n.encode()) <= 63
            ),
            unique=True,
            max_size=8,
        )
    )
    infos = []
    for name in names:
        fact = draw(st.sampled_from(sorted(types(), key=lambda f: f.id)))
        ne = draw(st.lists(st.integers(0, 5), max_size=4))
        if fact.block > 1:
            ne = ne or [1]
            ne[0] *= fact.block
        infos.append(TensorInfo(name, ne, fact.id))
    return infos


@st.composite
def canonical_headers(draw):
    """(metadata items, tensor infos without offsets, alignment)."""
    metadata = draw(st.dictionaries(KEYS, values(), max_size=8))
    alignment = draw(st.sampled_from([32, 64, 4096]))
    if alignment != 32:
        metadata["general.alignment"] = Value(alignment, "u32")
    return list(metadata.items()), draw(tensor_infos()), alignment


# --- importance matrices ----------------------------------------------------------------------------------------------

ENTRY_NAMES = st.text("abc.0123456789_é", min_size=1, max_size=20)
DATASETS = st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8), max_size=3)


def sums(shape):
    size = int(np.prod(shape))
    return st.lists(st.floats(0, 2.0**100, width=32), min_size=size, max_size=size).map(
        lambda x: np.array(x, np.float32).reshape(shape)
    )


@st.composite
def entry(draw, rows=None, columns=None):
    """(sums of squares [rows, columns], counts [rows])."""
    rows, columns = rows or draw(st.integers(1, 5)), columns or draw(st.integers(1, 9))
    counts = draw(st.lists(st.integers(0, 2**24), min_size=rows, max_size=rows))
    return draw(sums((rows, columns))), np.array(counts, np.float32)


ENTRIES = st.dictionaries(ENTRY_NAMES, entry(), min_size=1, max_size=5)

# --- numbers to encode ------------------------------------------------------------------------------------------------

# fmt: off
NUMBERS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 1.0, -6.0, 0.75, 2.0**-149, -(2.0**-126), 2.0**-15, 65504.0, 2.0**47, 2.0**48,
                     2.0**100]),
    st.integers(-24, 24).map(lambda n: n / 4))
# fmt: on
WEIGHTS = st.one_of(st.floats(0, 100, width=32), st.sampled_from([0.0, 1.0, 1e-20, 2.0**-140, 2.0**47, 2.0**49]))


@st.composite
def rows_of(draw, block):
    """One or two rows of one or two blocks: a few values, many of them equal."""
    shape = (draw(st.integers(1, 2)), block * draw(st.integers(1, 2)))
    few = draw(st.lists(NUMBERS, min_size=1, max_size=12))
    choice = draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 255), fill=st.just(0)))
    scale = draw(st.sampled_from([1.0, 1.0, 2.0**-12, 2.0**-30, 2.0**-120]))
    return np.array(few, np.float32)[choice % len(few)] * np.float32(scale)


# --- choices of types: bytes against errors ---------------------------------------------------------------------------

# Errors per tensor. None is so small that its difference from another, over some bytes, rounds to a slope of zero.
ERRORS = st.just(0.0) | st.floats(1e-300, 1)
GAINS = st.lists(st.integers(1, 12), min_size=1, max_size=5).map(lambda gains: sorted(gains, reverse=True))


@st.composite
def ladders(draw):
    """(costs, errors) of one tensor: convex, as after _hull. The first step costs something too. Whole numbers, so that
    all sums are exact."""
    gains = draw(GAINS)  # per byte
    widths = draw(st.lists(st.integers(1, 9), min_size=len(gains), max_size=len(gains)))
    total = sum(g * w for g, w in zip(gains, widths, strict=True))
    costs = list(itertools.accumulate(widths, initial=draw(st.integers(0, 5))))
    errors = [total - x for x in itertools.accumulate((g * w for g, w in zip(gains, widths, strict=True)), initial=0)]
    return costs, [float(e) for e in errors]


# --- files and models as make_gguf takes them -------------------------------------------------------------------------

Q, T = gguf.GGMLQuantizationType, gguf.GGUFValueType
SOURCE_TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "MXFP4", "Q4_K", "Q6_K"]


@st.composite
def contents_of_files(draw):
    """(metadata, tensors, alignment) for make_gguf."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tensors = {}
    for i in range(draw(st.integers(0, 6))):
        shape = [*draw(st.lists(st.integers(1, 3), max_size=3)), draw(st.sampled_from([1, 5, 32, 64]))]
        x = rng.standard_normal(shape, dtype=np.float32)
        if shape[-1] % 32 == 0 and draw(st.booleans()):
            type = draw(st.sampled_from([Q.Q8_0, Q.Q4_0, Q.MXFP4, Q.BF16]))
            x = (gguf.quants.quantize(x, type), type)
        tensors[f"blk.{i}.x.weight"] = x
    metadata = {
        "general.name": (draw(st.text()), T.STRING),
        "a.i32": (draw(st.integers(-(2**31), 2**31 - 1)), T.INT32),
        "a.u8s": (draw(st.lists(st.integers(0, 255), min_size=1)), T.ARRAY, T.UINT8),
        "a.strings": (draw(st.lists(st.text(), min_size=1)), T.ARRAY, T.STRING),
    }
    return metadata, tensors, draw(st.sampled_from([None, 32, 64, 256]))


@st.composite
def small_models(draw):
    """(tensors for make_gguf, experts, layers): a MoE with any types, and rows that some blocks do not divide."""
    experts, layers = draw(st.integers(2, 9)), draw(st.integers(1, 2))
    columns = draw(st.sampled_from([32, 64, 96, 256]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

    def tensor(*shape, any_type=True):
        x = rng.standard_normal(shape, dtype=np.float32)
        type = draw(st.sampled_from(SOURCE_TYPES)) if any_type else "F32"
        if type == "F32" or (columns % 256 and type in ("Q4_K", "Q6_K")):
            return x
        return pgs.quantize(x, type), Q[type]

    tensors = {"token_embd.weight": tensor(5, columns), "output_norm.weight": tensor(columns, any_type=False)}
    for i in range(layers):
        tensors[f"blk.{i}.attn_q.weight"] = tensor(3, columns)
        tensors[f"blk.{i}.ffn_gate_inp.weight"] = tensor(experts, columns, any_type=False)
        tensors[f"blk.{i}.ffn_gate_inp.bias"] = tensor(experts, any_type=False)
        for part in ("gate", "up", "down"):
            tensors[f"blk.{i}.ffn_{part}_exps.weight"] = tensor(experts, draw(st.integers(1, 3)), columns)
        tensors[f"blk.{i}.ffn_down_exps.bias"] = tensor(experts, 3, any_type=False)
    return tensors, experts, layers


# --- plans and JSON ---------------------------------------------------------------------------------------------------

FINITE = st.floats(allow_nan=False, allow_infinity=False)
SHORT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
PATHS = st.binary(max_size=12).map(os.fsdecode) | SHORT
IDS = st.lists(st.integers(-1, 600), max_size=4).map(tuple)
MTP = st.sampled_from(["keep", "drop"])
GROUP = st.builds(
    Group, IDS, st.lists(FINITE, max_size=3).map(tuple), st.lists(st.binary(max_size=9), max_size=3).map(tuple)
)
EVERY_F32 = st.binary(min_size=4, max_size=4).map(lambda raw: Value.from_raw("f32", raw))  # every NaN too
METADATA = python_values(nan=True, max_size=3).map(lambda case: Value(case[1], case[0])) | EVERY_F32


def layers(of):
    return st.dictionaries(st.integers(-2, 200), of, max_size=3)


def tuples(of):
    return st.lists(of, max_size=3).map(tuple)


EDIT = {
    KeepExperts: st.builds(
        KeepExperts,
        layers(IDS),
        SHORT,
        MTP,
        layers(IDS),
        layers(tuples(FINITE)),
        st.none() | st.builds(UseRepair, PATHS, SHORT),
    ),
    MergeExperts: st.builds(MergeExperts, layers(tuples(GROUP)), SHORT, MTP),
    SetMetadata: st.builds(SetMetadata, tuples(st.tuples(SHORT, METADATA))),
    RemoveMetadata: st.builds(RemoveMetadata, tuples(SHORT)),
    PruneLayers: st.builds(PruneLayers, IDS),
    Quantize: st.builds(
        Quantize,
        SHORT,
        st.booleans(),
        tuples(st.tuples(SHORT, SHORT)),
        st.booleans(),
        st.none() | SHORT,
        st.none() | SHORT,
        st.booleans(),
        st.none() | st.builds(UseImatrix, PATHS, SHORT, SHORT, tuples(SHORT), tuples(SHORT)),
        st.none() | st.integers(),
        SHORT,
    ),
    Split: st.builds(Split, st.none() | st.integers(), st.none() | st.integers(), st.booleans(), st.booleans()),
}
PLAN = st.builds(PlanData, PATHS, SHORT, tuples(st.one_of(*EDIT.values())))


def json_values(*, keys=None, max_leaves=8):
    """Whatever json.loads may give, and NaN and infinities."""
    keys = st.text(max_size=4) if keys is None else keys
    return st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
        max_leaves=max_leaves,
    )


# --- expressions over small arrays ------------------------------------------------------------------------------------

SLICES, NEURONS = 6, 4  # of the tensors "a", "b" and "c", whose slices have as many rows and twice as many columns
NAMES = st.sampled_from(["a", "b", "c"])
NUMBERS_OF_SLICES = st.lists(st.integers(0, SLICES - 1), min_size=1, max_size=8)


def ids_of_slices(count, *, pads=True):
    """Of `count` slices some, in any order and more than once, then pads."""
    real = st.lists(st.integers(0, count - 1), min_size=1, max_size=8)
    return st.builds(lambda ids, pads: (*ids, *[None] * pads), real, st.integers(0, 2 if pads else 0))


@st.composite
def remaps(draw):
    """Of the tensor "ids": its rows are two different ids below SLICES. Two or more of them stay."""
    kept = draw(st.permutations(range(SLICES)))[: draw(st.integers(2, SLICES))]
    table = tuple(kept.index(i) if i in kept else None for i in range(SLICES))
    return Remap("ids", table, tuple(draw(st.permutations(range(len(kept))))))


@st.composite
def repairs(draw):
    rows = draw(NUMBERS_OF_SLICES)
    return Repaired(draw(NAMES), tuple(rows), tuple(draw(st.permutations(rows))))


@st.composite
def merges(draw):
    axis = draw(st.sampled_from(["rows", "half rows", "columns", "half columns", "none"]))
    neurons = (NEURONS if "rows" in axis else 2 * NEURONS) // (2 if "half" in axis else 1)
    order = st.permutations(range(neurons)).map(lambda p: np.asarray(p, "<u2").tobytes())
    left, groups = list(draw(st.permutations(range(SLICES)))), []
    while left:
        members, left = left[: (n := draw(st.integers(1, 3)))], left[n:]
        shares = draw(st.lists(st.integers(1, 9), min_size=len(members), max_size=len(members)))
        orders = (b"", *(draw(st.just(b"") | order) if axis != "none" else b"" for _ in members[1:]))
        groups.append(Group(tuple(members), tuple(x / sum(shares) for x in shares), orders))
    return Merge(draw(NAMES), tuple(groups), axis)


EXPRESSION = {
    Copy: st.builds(Copy, st.sampled_from(["a", "vector", "ids"])),
    Take: st.builds(Take, NAMES | st.just("vector"), ids_of_slices(SLICES), st.sampled_from([0.0, -1e30])),
    Stack: st.builds(Stack, st.lists(NAMES, min_size=1, max_size=5).map(tuple)),
    Remap: remaps(),
    Repaired: repairs(),
    Merge: merges(),
}
