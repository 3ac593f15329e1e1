"""Every set of kernels, and the linked ggml, gives the bytes that ggml gives on x86-64, on whatever machine this runs.

kernel_golden.txt has their sha256. On x86-64, `python tests/test_kernel_golden.py > tests/kernel_golden.txt` writes it
anew, with the linked ggml; it changes only with ggml or with kernel_data.
"""
import hashlib
from functools import cache
from pathlib import Path

import kernel_data
import numpy as np
import pytest
from test_kernels import CASES, DECODED, SETS, TYPES, encode, with_kernels

from pygguf_surgery import _core

GOLDEN = Path(__file__).with_name("kernel_golden.txt")
# Above about 2^16 the half-precision scales of most types overflow, which is an error. These have none.
LARGEST = {"BF16": 2.0**47, "MXFP4": 2.0**47, "NVFP4": 2.0**47}


@cache
def rows(kind, block, largest):
    """Numbers, and the importance for them; no block that ggml refuses."""
    if kind == "ordinary":
        return kernel_data.ordinary(27, 1280, 1), kernel_data.importance(1280, 1, 0)[None]
    if kind == "tiny":
        return kernel_data.tiny(27, 1280, 7), kernel_data.importance(1280, 2, 2)[None]
    count, k = (27, 1280) if kind == "strange" else (135, block)
    return np.clip(kernel_data.strange(count, k, 3), -largest, largest), kernel_data.importance(k, 3, 1)[None]


def encoded(name, weighted, kind):
    x, importance = rows(kind, TYPES[name]["block"], LARGEST.get(name, 2.0**12))
    return encode(name, x, importance if weighted else None)


@cache
def to_decode(name):
    if name in ("F16", "BF16"):
        return np.arange(1 << 16, dtype="<u2").view(np.uint8)[None]
    return with_kernels("scalar", lambda: np.concatenate([encoded(name, False, kind) for kind in ("ordinary", "strange")]))


def sha256(array):
    return hashlib.sha256(array.tobytes()).hexdigest()


def hashes(name, weighted=False, decode=False):
    """(line of the golden file without the hash, hash)"""
    if decode:
        yield f"{name} decode", sha256(_core.dequantize(to_decode(name), TYPES[name]["id"], 1))
        return
    for kind in ("ordinary", "strange", "tiny", "blocks"):
        yield f"{name} {'imatrix' if weighted else '-'} {kind}", sha256(encoded(name, weighted, kind))


@cache
def golden():
    return dict(line.rsplit(" ", 1) for line in GOLDEN.read_text().splitlines())


@pytest.mark.parametrize("kernels", ["ggml", *SETS])
@pytest.mark.parametrize(("name", "weighted"), CASES)
def test_encoded_bytes(kernels, name, weighted):
    found = with_kernels(kernels, lambda: dict(hashes(name, weighted)))
    assert found == {case: golden()[case] for case in found}


@pytest.mark.parametrize("kernels", ["ggml", *SETS])
@pytest.mark.parametrize("name", DECODED)
def test_decoded_numbers(kernels, name):
    found = with_kernels(kernels, lambda: dict(hashes(name, decode=True)))
    assert found == {case: golden()[case] for case in found}


def print_golden():
    for name, weighted in CASES:
        for case, found in hashes(name, weighted):
            print(case, found)
    for name in DECODED:
        for case, found in hashes(name, decode=True):
            print(case, found)


if __name__ == "__main__":
    with_kernels("ggml", print_golden)
