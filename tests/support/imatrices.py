"""Importance matrices of both formats: by hand, as llama-imatrix writes them, and read by gguf-py."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from pygguf_surgery._core import Value
from pygguf_surgery.files.gguf import write_gguf
from support.gguf_bytes import gguf as build
from support.gguf_bytes import info, kv
from support.gguf_files import read_gguf
from support.places import SHARED

REAL = SHARED / "models" / "imatrix.gguf"
LEGACY = SHARED / "models" / "imatrix.dat"
real = pytest.mark.skipif(not REAL.exists(), reason=f"needs {REAL}")
UP = "blk.0.ffn_up_exps.weight"
METADATA = [
    kv("general.type", "str", "imatrix"),
    kv("imatrix.datasets", "str[]", ["a.txt"]),
    kv("imatrix.chunk_count", "u32", 3),
    kv("imatrix.chunk_size", "u32", 64),
]


def legacy(entries, trailer=b""):
    """A .dat file by hand. entries: (name, ncall, values)."""
    data = struct.pack("<i", len(entries))
    for name, calls, values in entries:
        name = name.encode() if isinstance(name, str) else name
        data += struct.pack("<i", len(name)) + name + struct.pack("<ii", calls, len(values))
        data += np.asarray(values, "<f4").tobytes()
    return data + trailer


def trailer(chunks, dataset):
    return struct.pack("<ii", chunks, len(dataset.encode())) + dataset.encode()


def by_hand(entries, kvs=METADATA):
    """A GGUF file by hand. entries: (name, ne, values)."""
    infos, data = [], b""
    for name, ne, values in entries:
        infos.append(info(name, ne, offset=len(data)))
        data += np.asarray(values, "<f4").tobytes()
        data += bytes(-len(data) % 32)
    return build(kvs, infos, data)


def put(tmp_path, data, name="x.imatrix"):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def same(a, b):
    return np.array_equal(np.asarray(a, np.float32).view(np.uint32), np.asarray(b, np.float32).view(np.uint32))


def contents(path):
    """{name: (sums, counts)} by gguf-py, and the metadata."""
    metadata, tensors = read_gguf(path)
    names = {name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")}
    assert {f"{n}.{part}" for n in names for part in ("in_sum2", "counts")} == set(tensors)
    return {n: (tensors[f"{n}.in_sum2"][1], tensors[f"{n}.counts"][1].ravel()) for n in names}, metadata


def imatrix_of(path, model, entries):
    """A GGUF importance matrix. entries: name -> (sums [E, n], counts [E])."""
    tensors = {}
    for name, (sums, counts) in entries.items():
        tensors[name + ".in_sum2"] = np.asarray(sums, np.float32)
        tensors[name + ".counts"] = np.asarray(counts, np.float32).reshape(-1, 1)
    write_gguf(
        path,
        {
            "general.type": Value("imatrix", "str"),
            "imatrix.datasets": Value(["text"], "str[]"),
            "imatrix.chunk_count": Value(5, "u32"),
            "imatrix.chunk_size": Value(8, "u32"),
        },
        tensors,
    )
    return path


ONE = legacy([("ab", 3, [1, 2])])  # 4 count, 4 length, 2 name, 4 calls, 4 values, 8 values
