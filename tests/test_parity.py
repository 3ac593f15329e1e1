"""Our one pass against llama.cpp itself: its llama_model_quantize for bytes, its loader for files (pytest -m
parity)."""

from __future__ import annotations

import re

import gguf
import pytest

import pygguf_surgery as pgs
from support import llama_oracle, moe_models
from support.gguf_files import read_gguf
from support.llama_oracle import assert_same_tensors
from support.llama_oracle import quantize as llama_quantize
from support.places import SHARED

pytestmark = pytest.mark.parity

FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32, "MXFP4_MOE": 38}
# ggml type -> the file type under which llama-quantize's --pure gives it everywhere; no imatrix needed.
PURE = {
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 14,
    "Q5_K": 16,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
    "IQ3_S": 26,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "Q1_0": 40,
    "Q2_0": 41,
    "MXFP4": 38,
}
# Metadata that llama.cpp's quantizer asks for beyond what the builders of moe_models write.
MODELS = ["qwen3next", "qwen3moe", "deepseek2", "gpt_oss", "llama4", "gemma4", "granitehybrid", "grovemoe"]


@pytest.fixture(scope="session")
def llama():
    return llama_oracle.load()


def slice_with_gguf_py(source, target, keep):
    """The experts `keep` {layer: ids} of every expert-axis tensor, by numpy; independent of our rules."""
    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(target, architecture)
    count = len(next(iter(keep.values())))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = count if field.name == architecture + ".expert_count" else field.contents()
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(field.name, value, field.types[0], sub_type=field.types[-1] if is_array else None)
    expert = re.compile(
        r"blk\.(\d+)\.(ffn_(gate|up|down|gate_up)_exps\.(weight|bias|scale)|ffn_gate_inp\.(weight|bias)"
        r"|exp_probs_b\.bias)"
    )
    for t in reader.tensors:
        m = expert.fullmatch(t.name)
        writer.add_tensor(t.name, t.data[list(keep[int(m[1])])] if m else t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def build(name, path):
    return str(moe_models.ALL[name](path))


def allow_requantize(name):
    return {"allow_requantize": True} if name == "gpt_oss" else {}  # its experts are MXFP4 already


@pytest.mark.parametrize("name", [m for m in MODELS if m != "grovemoe"])
def test_one_pass_equals_gguf_py_slice_then_llama_quantize(llama, tmp_path, name):
    source = build(name, tmp_path / "in.gguf")
    with pgs.open(source) as model:
        n = model.get("expert_count")
        keep = pgs.experts.rank(model, by="router-norm").keep(n // 2)
        pgs.Plan(model).keep_experts(keep).quantize("MXFP4_MOE", **allow_requantize(name)).write(
            str(tmp_path / "ours.gguf")
        )
    slice_with_gguf_py(source, str(tmp_path / "sliced.gguf"), keep)
    llama_quantize(llama, tmp_path / "sliced.gguf", tmp_path / "theirs.gguf", 38, **allow_requantize(name))
    assert assert_same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf") > 10


@pytest.mark.parametrize("file_type", FILE_TYPES)
@pytest.mark.parametrize("name", MODELS)
def test_file_type_gives_the_same_types_and_bytes(llama, tmp_path, name, file_type):
    source = build(name, tmp_path / "in.gguf")
    options = allow_requantize(name)
    llama_quantize(llama, source, tmp_path / "theirs.gguf", FILE_TYPES[file_type], **options)
    with pgs.open(source) as model:
        pgs.Plan(model).quantize(file_type, **options).write(str(tmp_path / "ours.gguf"))
    assert_same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    (ours, tensors), (theirs, _) = read_gguf(tmp_path / "ours.gguf"), read_gguf(tmp_path / "theirs.gguf")
    encoded = {n: t for n, (t, _) in tensors.items()} != {n: t for n, (t, _) in read_gguf(source)[1].items()}
    for key in ("general.file_type", "general.quantization_version"):
        assert ours.get(key) == (theirs[key] if encoded else None), key  # a file that was only copied keeps its own


@pytest.mark.parametrize("type_name", PURE)
@pytest.mark.parametrize("name", ["qwen3next", "deepseek2"])
def test_pure_type_gives_the_same_types_and_bytes(llama, tmp_path, name, type_name):
    """The builders' rows have 32 elements and fewer, so this is the table of fallbacks too."""
    source = build(name, tmp_path / "in.gguf")
    try:
        llama_quantize(llama, source, tmp_path / "theirs.gguf", PURE[type_name], pure=True)
    except RuntimeError:
        with pgs.open(source) as model, pytest.raises(pgs.SurgeryError):
            pgs.Plan(model).quantize(type_name, pure=True).write(str(tmp_path / "ours.gguf"))
        return
    with pgs.open(source) as model:
        pgs.Plan(model).quantize(type_name, pure=True).write(str(tmp_path / "ours.gguf"))
    assert_same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory):
    from pygguf_surgery.cli.commands import demo_model

    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    demo_model.write_demo_model(str(path))
    return str(path)


@pytest.mark.parametrize("type_name", PURE)
def test_pure_type_on_rows_of_whole_blocks(llama, tmp_path, demo_model, type_name):
    llama_quantize(llama, demo_model, tmp_path / "theirs.gguf", PURE[type_name], pure=True)
    with pgs.open(demo_model) as model:
        pgs.Plan(model).quantize(type_name, pure=True).write(str(tmp_path / "ours.gguf"))
    assert_same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


def test_requantizing_equals_llama_quantize(llama, tmp_path):
    source = build("qwen3next", tmp_path / "in.gguf")
    with pgs.open(source) as model:
        pgs.Plan(model).quantize("Q8_0").write(str(tmp_path / "q8.gguf"))
    llama_quantize(llama, tmp_path / "q8.gguf", tmp_path / "theirs.gguf", 38, allow_requantize=True)
    with pgs.open(str(tmp_path / "q8.gguf")) as model:
        pgs.Plan(model).quantize("MXFP4_MOE", allow_requantize=True).write(str(tmp_path / "ours.gguf"))
    assert_same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")


def test_llama_cpp_loads_a_pruned_demo_model(llama, tmp_path, demo_model):
    out = str(tmp_path / "out.gguf")
    with pgs.open(demo_model) as model:
        keep = pgs.experts.rank(model, by="aimer").keep(ratio=0.5)
        pgs.Plan(model).keep_experts(keep).quantize("MXFP4_MOE").write(out)
    handle = llama.llama_model_load_from_file(out.encode(), llama.llama_model_default_params())
    assert handle, "".join(llama.said)[-2000:]
    llama.llama_model_free(handle)


def test_trained_model_is_cut_and_generates(llama, tmp_path):
    source = SHARED / "models" / "tiny-qwen3next-bf16.gguf"
    if not source.exists():
        pytest.skip(f"no trained model at {source}")
    out = str(tmp_path / "out.gguf")
    with pgs.open(str(source)) as model:
        keep = pgs.experts.rank(model, by="router-norm").keep(16)
        pgs.Plan(model).keep_experts(keep).quantize("MXFP4_MOE").write(out)
    from llama_cpp import Llama

    model = Llama(out, n_ctx=128, n_threads=1, verbose=False)
    text = model("import os\n\ndef main(", max_tokens=16, temperature=0)["choices"][0]["text"]
    model.close()
    assert len(text) > 0
