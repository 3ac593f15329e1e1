"""GGUF files by hand, right and wrong ones: struct.pack and nothing of the package under test."""

from __future__ import annotations

import struct

IDS = {
    "u8": 0,
    "i8": 1,
    "u16": 2,
    "i16": 3,
    "u32": 4,
    "i32": 5,
    "f32": 6,
    "bool": 7,
    "str": 8,
    "array": 9,
    "u64": 10,
    "i64": 11,
    "f64": 12,
}
FORMATS = {
    "u8": "B",
    "i8": "b",
    "u16": "H",
    "i16": "h",
    "u32": "I",
    "i32": "i",
    "f32": "f",
    "bool": "B",
    "u64": "Q",
    "i64": "q",
    "f64": "d",
}
F32, F16, Q4_0, Q8_0, I8, I64 = 0, 1, 2, 8, 24, 27


def u32(n):
    return struct.pack("<I", n % 2**32)


def u64(n):
    return struct.pack("<Q", n % 2**64)


def string(text):
    data = text.encode() if isinstance(text, str) else text
    return u64(len(data)) + data


def scalar(kind, value):
    return string(value) if kind == "str" else struct.pack("<" + FORMATS[kind], value)


def kv(key, kind, value):
    """kind "u8" or an array "u8[]"."""
    if kind.endswith("[]"):
        element = kind[:-2]
        body = u32(IDS["array"]) + u32(IDS[element]) + u64(len(value)) + b"".join(scalar(element, v) for v in value)
    else:
        body = u32(IDS[kind]) + scalar(kind, value)
    return string(key) + body


def info(name, ne=(32,), kind=F32, offset=0):
    return string(name) + u32(len(ne)) + b"".join(u64(n) for n in ne) + u32(kind) + u64(offset)


def pad(data, alignment=32):
    return data + bytes(-len(data) % alignment)


def header(kvs=(), infos=(), *, magic=b"GGUF", version=3, n_tensors=None, n_kv=None):
    """Without the padding before the data."""
    counts = u64(len(infos) if n_tensors is None else n_tensors) + u64(len(kvs) if n_kv is None else n_kv)
    return magic + u32(version) + counts + b"".join(kvs) + b"".join(infos)


def gguf(kvs=(), infos=(), data=b"", *, alignment=32, **fields):
    """A file: header, padding, data."""
    return pad(header(kvs, infos, **fields), alignment) + data
