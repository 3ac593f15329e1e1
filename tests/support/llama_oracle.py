"""llama.cpp itself, through llama-cpp-python: its quantizer, and what it would do to each tensor."""

from __future__ import annotations

import ctypes
import functools
import re

import gguf
import numpy as np
import pytest

import pygguf_surgery as pgs
from support import moe_models


@functools.cache
def load():
    """The ctypes module of llama-cpp-python with its log collected in `.said`; skips the test where there is none."""
    module = pytest.importorskip("llama_cpp").llama_cpp
    said = []
    callback = module.llama_log_callback(lambda level, text, _: said.append(text.decode(errors="replace")))
    module.llama_log_set(callback, None)
    module.llama_backend_init()
    module.said, module.keep_callback = said, callback
    return module


TYPE_FIELDS = ("output_tensor_type", "token_embedding_type")


def quantize(llama, source, target, file_type, *, imatrix=None, overrides=(), **params):
    """llama_model_quantize. imatrix: name -> float32 values, one row per expert; overrides: (pattern, name of a ggml
    type) pairs; params: fields of its parameters, types by name. RuntimeError with what llama.cpp said if it refuses.
    """
    p = llama.llama_model_quantize_default_params()
    p.ftype, p.nthread = file_type, 1
    if imatrix is not None:
        rows = {name: np.ascontiguousarray(values, np.float32).ravel() for name, values in imatrix.items()}
        floats = ctypes.POINTER(ctypes.c_float)
        p.imatrix = (llama.llama_model_imatrix_data * (len(rows) + 1))(  # the last one, of zeros, ends the list
            *((name.encode(), row.ctypes.data_as(floats), row.size) for name, row in rows.items())
        )
    if overrides:
        p.tt_overrides = (llama.llama_model_tensor_override * (len(overrides) + 1))(
            *((pattern.encode(), gguf.GGMLQuantizationType[type]) for pattern, type in overrides)
        )
    for key, value in params.items():
        setattr(p, key, gguf.GGMLQuantizationType[value] if key in TYPE_FIELDS else value)
    llama.said.clear()
    if llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(p)):
        raise RuntimeError("".join(llama.said)[-2000:])


_LINE = re.compile(
    r"\[ *\d+/ *\d+\] (.+?) +- \[[^\]]*\], type = +(\w+), size = +[\d.]+ MiB"
    r"(?: -> +[\d.]+ MiB \((\w+)\))?\n"
)


def dry_run(llama, source, file_type, **params):
    """{tensor: type, upper case} that llama_model_quantize would write, in the order in which it visits the tensors."""
    quantize(llama, source, "", file_type, dry_run=True, **params)
    return {name: (new or old).upper() for name, old, new in _LINE.findall("".join(llama.said))}


def squeezed(shape):
    """ggml drops outermost dimensions of 1 when it writes a file."""
    return shape[1:] if len(shape) > 1 and shape[0] == 1 else shape


def assert_same_tensors(ours, theirs):
    """The same tensors in any order: names, types, shapes, bytes. Returns their number."""
    with pgs.open(str(ours)) as a, pgs.open(str(theirs)) as b:
        assert sorted(a.tensors) == sorted(b.tensors)
        for name, t in a.tensors.items():
            other = b.tensors[name]
            assert (name, t.type, squeezed(t.shape)) == (name, other.type, squeezed(other.shape))
            assert np.array_equal(t.bytes(), other.bytes()), name
        return len(a.tensors)


TOKENS = np.random.default_rng(7).integers(0, moe_models.VOCAB, 200)


class Tap:
    """Records tensors of the graph by exact name, in a session of its own."""

    def __init__(self, path, names, tokens, n_ctx):
        from pygguf_surgery.llama.session import Session

        self.names, self.found = set(names), {}
        with Session(str(path), n_ctx=n_ctx, threads=2, watch=self) as session:
            if isinstance(tokens, bytes):
                tokens = session.tokenize(tokens)[: n_ctx * 40]
            for i in range(len(tokens) // n_ctx):
                session.run(tokens[i * n_ctx : (i + 1) * n_ctx])

    def wants(self, name):
        return name in self.names

    def take(self, name, values):
        self.found.setdefault(name, []).append(values.astype(np.float64))

    def __getitem__(self, name):
        return np.concatenate(self.found[name])
