"""Models without some of their layers in llama.cpp itself: it loads them and computes the same (pytest -m parity)."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys

import gguf
import numpy as np
import pytest

from support import moe_models
from support.gguf_files import make_gguf, read_gguf
from support.layer_models import BLOCK, CASES, build, prune

pytestmark = pytest.mark.parity

# In a process of its own: llama.cpp aborts on what it cannot compute. Prints the logits of the last token.
CHILD = """
import sys
import numpy as np
from llama_cpp import llama_cpp as llama

llama.llama_backend_init()
model = llama.llama_model_load_from_file(sys.argv[1].encode(), llama.llama_model_default_params())
if sys.argv[2] == "logits":
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 64, 1, 1
    context = llama.llama_init_from_model(model, params)
    tokens = (llama.llama_token * 6)(1, 2, 3, 5, 8, 13)
    assert llama.llama_decode(context, llama.llama_batch_get_one(tokens, 6)) == 0
    print("logits", np.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (VOCAB,)).tolist())
assert model
""".replace("VOCAB", str(moe_models.VOCAB))


def load(path, what="load"):
    pytest.importorskip("llama_cpp")
    done = subprocess.run([sys.executable, "-c", CHILD, str(path), what], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def logits(path):
    return np.array(json.loads(load(path, "logits").removeprefix("logits ")))


def make_identity(path, dropped):
    """Zero what these blocks add to the residual stream, in place, so that they can go without a trace."""
    reader = gguf.GGUFReader(path, "r+")
    for t in reader.tensors:
        match = BLOCK.fullmatch(t.name)
        if match and int(match[1]) in dropped:
            if re.match(r"attn_output\.|ssm_out\.|ffn_down(_exps|_shexp|_chexps)?\.", match[2]):
                t.data[...] = 0
            elif match[2] == "layer_output_scale.weight":
                t.data[...] = 1
    reader.data.flush()


# Those of which llama.cpp computes numbers; the others only have the shapes that it loads.
COMPUTED = ("qwen3moe", "gpt_oss", "llama4", "gemma4", "granitehybrid", "qwen3next")


@pytest.mark.parametrize("name", [n for n in CASES if n not in COMPUTED])
def test_llama_cpp_loads_what_is_left(tmp_path, name):
    source, target = build(name, tmp_path / "in.gguf"), tmp_path / "out.gguf"
    prune(source, target, CASES[name][0])
    load(target)


@pytest.mark.parametrize("name", COMPUTED)
def test_llama_cpp_computes_the_same_without_layers_that_add_nothing(tmp_path, name):
    """So the layers that are left are, to llama.cpp, what they were."""
    source, target = build(name, tmp_path / "in.gguf"), tmp_path / "out.gguf"
    dropped, _ = CASES[name]
    make_identity(source, dropped)
    prune(source, target, dropped)
    before, after = logits(source), logits(target)
    assert np.isfinite(before).all() and np.ptp(before) > 0
    assert np.array_equal(before, after)


@pytest.mark.parametrize("dropped", [[0], [0, 2], [4], [1, 4]])
def test_llama_cpp_computes_the_same_with_mtp_blocks(tmp_path, dropped):
    source, target = build("mtp", tmp_path / "in.gguf"), tmp_path / "out.gguf"
    make_identity(source, dropped)
    prune(source, target, dropped)
    assert np.array_equal(logits(source), logits(target))


@pytest.mark.parametrize("name", ["qwen3moe", "grovemoe"])
def test_where_llama_quantize_is_right_it_gives_the_same_tensors(tmp_path, name):
    source, target = build(name, tmp_path / "in.gguf"), tmp_path / "out.gguf"
    prune(source, target, [0])
    llama = pytest.importorskip("llama_cpp").llama_cpp
    params = llama.llama_model_quantize_default_params()
    params.only_copy = True
    numbers = (ctypes.c_int32 * 2)(0, -1)
    params.prune_layers = (
        ctypes.cast(numbers, type(params.prune_layers))
        if params.prune_layers is not None
        else ctypes.cast(numbers, ctypes.c_void_p)
    )
    assert not llama.llama_model_quantize(source.encode(), str(tmp_path / "theirs.gguf").encode(), ctypes.byref(params))
    (ours, a), (theirs, b) = read_gguf(target), read_gguf(tmp_path / "theirs.gguf")
    key = f"{ours['general.architecture']}.block_count"
    assert ours[key] == theirs[key] == 3 and a.keys() == b.keys()
    assert all(a[n][0] == b[n][0] and np.array_equal(a[n][1], b[n][1]) for n in a)


def test_a_dense_model_keeps_its_logits_without_idle_layers(tmp_path):
    """llama, four layers, one of them idle, twice in a row."""
    b = moe_models.Builder("llama", blocks=4, experts=1, used=1)
    for key in [k for k in b.metadata if "expert" in k]:
        del b.metadata[key]
    for i in range(4):
        b.attention(i)
        b.dense(i)
    source = str(make_gguf(tmp_path / "in.gguf", "llama", b.metadata, b.tensors))
    make_identity(source, [1, 2])
    prune(source, tmp_path / "one.gguf", [1])
    prune(str(tmp_path / "one.gguf"), tmp_path / "two.gguf", [1])
    expected = logits(source)
    assert np.array_equal(logits(tmp_path / "one.gguf"), expected)
    assert np.array_equal(logits(tmp_path / "two.gguf"), expected)
