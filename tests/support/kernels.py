"""The sets of kernels that this machine has, chosen by PGS_KERNELS, and the cases to encode with each."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pygguf_surgery import _core
from pygguf_surgery.base import errors
from support.places import ROOT

TYPES = {t.name: t for t in _core.types()}
ENCODED = [name for name, t in TYPES.items() if t.encodes and name != "F32"]
# The types that kernels decode: those in the table that all sets are compiled from.
_TABLE = (ROOT / "csrc" / "quant" / "lanes" / "set.cpp").read_text().replace("\\\n", " ")
DECODED = re.findall(r"\bX\((\w+), \w+\)", re.search(r"#define PGS_DECODERS\(X\).*", _TABLE)[0])


def available(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGS_KERNELS", name)
        try:
            return _core.kernels() == name
        except errors.Unsupported:
            return False


SETS = [name for name in ("scalar", "sse", "neon", "avx2", "avx512") if available(name)]


def with_kernels(name, work):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGS_KERNELS", name)
        assert _core.kernels() == name
        return work()


# (type, with importance) of everything that ggml encodes
CASES = [
    (name, weighted)
    for name in ENCODED
    for weighted in (False, True)
    if (TYPES[name].uses_importance if weighted else not TYPES[name].needs_importance)
]
# Below this the inverse of a scale is infinite, and what these types then do, a cast of NaN or infinity to an integer,
# is undefined in C: compilers differ. The kernels do as gcc's code does on x86.
LEAST = np.float32(2.0**-100)
# fmt: off
# sha256 of what ggml compiled by gcc 12 for x86-64 gives.
UNDEFINED = {
    "Q4_0": "40bdb4e2f72feeb7", "Q4_1": "b8f3e1f27f593a6c", "Q5_0": "bdc349a3ae9fc178",
    "Q5_1": "54052ab2992bd98e", "Q8_0": "e927a65a9b2f4c7b", "Q2_0": "427f9d6e0c498e00",
    "TQ1_0": "076df3528cf4cc03", "TQ2_0": "2b3b3d0fa0986858"}
# fmt: on


def defined(name, x):
    return np.where(np.abs(x) < LEAST, np.float32(0), x) if name in UNDEFINED else x


def encode(name, x, importance=None, best=False):
    return _core.quantize(x, TYPES[name].id, importance, 1, best)


def outcome(work):
    """Bytes, or what the error says."""
    try:
        return work().tobytes()
    except errors.BadPlan as error:
        return str(error)
