"""The sha256 of what ggml compiled by gcc gives on x86-64, by case: kernel_golden.txt, and how its cases are made.

On x86-64 and with a build by gcc, `cd tests && python -m support.golden > support/kernel_golden.txt` writes it anew,
with the linked ggml; it changes only with ggml or with kernel_data.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numpy as np

from pygguf_surgery import _core
from support import kernel_data
from support.kernels import CASES, DECODED, TYPES, UNDEFINED, encode, with_kernels

GOLDEN = Path(__file__).with_name("kernel_golden.txt")
UNBOUNDED = ("BF16", "MXFP4", "NVFP4")  # no number is too large for their scales


@cache
def rows(kind, block):
    """Numbers, and the importance for them; no block that ggml refuses."""
    if kind == "ordinary":
        return kernel_data.ordinary(27, 1280, 1), kernel_data.importance(1280, 1, 0)[None]
    if kind == "strange":
        return kernel_data.strange(27, 1280, 3), kernel_data.importance(1280, 3, 1)[None]
    if kind == "tiny":
        return kernel_data.tiny(27, 1280, 7), kernel_data.importance(1280, 7, 2)[None]
    if kind == "huge":
        return kernel_data.huge(27, 1280, 5), None
    assert kind == "blocks"  # rows of one
    return kernel_data.strange(135, block, 4), kernel_data.importance(block, 4, 1)[None]


def kinds(name, kernels=None):
    of_type = ["ordinary", "strange", "tiny", "blocks"] + ["huge"] * (name in UNBOUNDED)
    # What ggml does with these, a cast of what is no number of the integer's type, is undefined in C: compilers differ.
    if kernels == "ggml" and (name in UNDEFINED or name == "MXFP4"):
        of_type.remove("tiny")
    return of_type


def encoded(name, weighted, kind):
    x, importance = rows(kind, TYPES[name].block)
    return encode(name, x, importance if weighted else None)


@cache
def to_decode(name):
    if name in ("F16", "BF16"):
        return np.arange(1 << 16, dtype="<u2").view(np.uint8)[None]
    rows = [with_kernels("scalar", lambda: encoded(name, False, kind)) for kind in ("ordinary", "strange")]
    return np.concatenate(rows)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def of_encoder(name, weighted, kernels=None):
    """Lines of the golden file: hash by case."""
    return {
        f"{name} {'imatrix' if weighted else '-'} {kind}": sha256(encoded(name, weighted, kind).tobytes())
        for kind in kinds(name, kernels)
    }


def of_decoder(name):
    return {f"{name} decode": sha256(_core.dequantize(to_decode(name), TYPES[name].id, 1).tobytes())}


@cache
def golden():
    return dict(line.rsplit(" ", 1) for line in GOLDEN.read_text().splitlines())


def all_cases():
    cases = {}
    for name, weighted in CASES:
        cases |= of_encoder(name, weighted)
    for name in DECODED:
        cases |= of_decoder(name)
    return cases


if __name__ == "__main__":
    for case, found in with_kernels("ggml", all_cases).items():
        print(case, found)
