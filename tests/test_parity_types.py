"""Every file type against llama.cpp's own quantizer: the type of every tensor, and its bytes (pytest -m parity)."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest

import pygguf_surgery as pgs
from pygguf_surgery import _core
from pygguf_surgery.recipes import mixes
from support import llama_oracle, quant_models
from support.places import ROOT
from support.quant_models import T, attention, ffn, moe

pytestmark = pytest.mark.parity

NUMBERS = {name: number for name, (number, _) in mixes.FILE_TYPES.items() if name not in mixes.ALIASES}


@pytest.fixture(scope="session")
def llama():
    return llama_oracle.load()


def choose(file_type, facts, tensors, has_imatrix=False):
    """{name: type, or None where no fallback fits} of those tensors {name: shape} that llama-quantize quantizes."""
    chosen, errors = mixes.choose_types(
        mixes.file_type(file_type, False),
        facts,
        [(name, tensors[name]) for name in mixes.loader_order(tensors)],
        has_imatrix=has_imatrix,
    )
    if errors:
        raise errors[0]
    return {name: mixes.fallback(type, tensors[name][-1]) for name, type in chosen.items()}


def assert_same_choice(llama, path, file_type, imatrix=None):
    """The rules alone against a dry run: types, and the order in which the tensors are visited. False: both refuse."""
    with pgs.open(path) as model:
        facts = mixes.model_facts(model.architecture, model.metadata.get)
        shapes = {name: t.shape for name, t in model.tensors.items()}
        types = {name: t.type for name, t in model.tensors.items()}
    try:
        theirs = llama_oracle.dry_run(llama, path, NUMBERS[file_type], imatrix=imatrix)
    except RuntimeError:
        with contextlib.suppress(pgs.SurgeryError):
            assert None in choose(file_type, facts, shapes, imatrix is not None).values()
        return False
    assert types | choose(file_type, facts, shapes, imatrix is not None) == theirs
    assert mixes.loader_order(shapes) == list(theirs)
    return True


# --- the matrix: file types, architectures, with and without an importance matrix -----------------------------------


@pytest.fixture(scope="session", params=quant_models.ALL)
def small(request, tmp_path_factory):
    """(description, its file, its importance matrix)"""
    folder = tmp_path_factory.mktemp(request.param)
    model = quant_models.ALL[request.param]()
    return model, str(model.write(folder / "in.gguf")), str(model.write_imatrix(folder / "imatrix.gguf"))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("file_type", NUMBERS)
def test_file_type_gives_the_same_types_and_bytes(llama, small, tmp_path, file_type, weighted):
    model, source, imatrix = small
    ours, theirs = str(tmp_path / "ours.gguf"), str(tmp_path / "theirs.gguf")
    rows = model.importance() if weighted else None
    try:
        llama_oracle.quantize(llama, source, theirs, NUMBERS[file_type], imatrix=rows)
    except RuntimeError:
        with pgs.open(source) as opened, pytest.raises(pgs.SurgeryError):
            pgs.Plan(opened).quantize(file_type, imatrix=imatrix if weighted else None).write(ours)
        assert not os.path.exists(ours)
        return
    with pgs.open(source) as opened:
        pgs.Plan(opened).quantize(file_type, imatrix=imatrix if weighted else None).write(ours)
    assert llama_oracle.assert_same_tensors(ours, theirs) == len(model.tensors)
    with pgs.open(ours) as a, pgs.open(theirs) as b:
        for key in ("general.file_type", "general.quantization_version"):
            assert a.metadata[key] == b.metadata[key]


# fmt: off
OPTIONS = {  # ours, llama.cpp's
    "output-type": ({"output_type": "Q5_1"}, {"output_tensor_type": "Q5_1"}),
    "token-embedding-type": ({"token_embedding_type": "Q4_1"}, {"token_embedding_type": "Q4_1"}),
    "both": ({"output_type": "IQ4_NL", "token_embedding_type": "F16"},
             {"output_tensor_type": "IQ4_NL", "token_embedding_type": "F16"}),
    "leave-output": ({"leave_output": True}, {"quantize_output_tensor": False}),
    "pure": ({"pure": True, "output_type": "Q8_0"}, {"pure": True, "output_tensor_type": "Q8_0"}),
    # What an override decides does not count in the rules for the others.
    **{name: ({"overrides": pairs}, {"overrides": pairs}) for name, pairs in {
        "overrides": [(r"attn_output", "Q5_0"), (r"blk\.[02468]\.(attn_v|attn_qkv|attn_output|ffn_down)", "IQ4_NL")],
        "override-of-the-embedding": [(r"token_embd|blk\.1\.", "Q5_K")]}.items()},
}
# fmt: on


@pytest.mark.parametrize("option", OPTIONS)
def test_options(llama, small, option):
    _, source, _ = small
    ours, theirs = OPTIONS[option]
    # llama-quantize ignores overrides of file types that do not quantize.
    for file_type in ("Q4_K_M", "Q3_K_L", "IQ4_XS", "MXFP4_MOE", *(() if "overrides" in ours else ("BF16",))):
        with pgs.open(source) as model:
            checked = pgs.Plan(model).quantize(file_type, **ours).check()
        expected = llama_oracle.dry_run(llama, source, NUMBERS[file_type], **theirs)
        assert {t.name: t.type for t in checked.tensors} == expected


@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q3_K_M", "Q5_K_M", "IQ4_XS"])
def test_keep_split_gives_the_same_shards(llama, small, tmp_path, file_type):
    """There llama-quantize visits the tensors as they lie in the shards, which the rules that count them notice."""
    _, source, _ = small
    with pgs.open(source) as model:
        first, *more = pgs.Plan(model).split(max_tensors=37).write(tmp_path / "in.gguf").paths
    assert more
    llama_oracle.quantize(llama, first, tmp_path / "theirs", NUMBERS[file_type], keep_split=True)
    with pgs.open(first) as model:
        ours = pgs.Plan(model).quantize(file_type).split(keep=True).write(tmp_path / "ours.gguf").paths
    assert len(ours) == len(more) + 1
    theirs = [path.replace("/ours-", "/theirs-") for path in ours]
    for a, b in zip(ours, theirs, strict=True):
        names = [[t.name for t in _core.read_header(_core.Source(path)).tensors] for path in (a, b)]
        assert names[0] == names[1]
    llama_oracle.assert_same_tensors(ours[0], theirs[0])


@pytest.mark.parametrize("name", ["llama_8_experts", "qwen3next", "deepseek2"])
def test_nvfp4_moe_is_q8_0_with_experts_in_nvfp4(llama, tmp_path, name):
    source = str(quant_models.ALL[name]().write(tmp_path / "in.gguf"))
    llama_oracle.quantize(llama, source, tmp_path / "theirs.gguf", NUMBERS["Q8_0"], overrides=[("_exps", "NVFP4")])
    with pgs.open(source) as model:
        pgs.Plan(model).quantize("NVFP4_MOE").write(str(tmp_path / "ours.gguf"))
    llama_oracle.assert_same_tensors(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    with pgs.open(str(tmp_path / "ours.gguf")) as model:
        assert model.metadata["general.file_type"] == 39


# --- corners that these models lack ---------------------------------------------------------------------------------


def decoder(architecture, blocks, **options):
    m = quant_models.model(architecture, blocks=blocks, **options)
    for i in range(blocks):
        attention(m, i)
        ffn(m, i)
    return m


def with_counts(m, real=None, **counts):
    m.count(**counts)
    m.real(**real or {})
    return m


def odd_names(experts=0):
    """Layer numbers as sscanf reads them, names without one, capitals."""
    m = quant_models.model("llama", blocks=16, experts=experts)
    for block in (
        "blk.07",
        "blk.7",
        "blk.10",
        "blk.2x",
        "blk.-1",
        "blk.+3",
        "blk. 4",
        "v.blk.0",
        "BLK.1",
        "enc.blk.5",
        "é",
    ):
        for part in ("attn_v", "ffn_down", "attn_output"):
            m.tensors[f"{block}.{part}.weight"] = (2, 256)
    return m


def graniteswitch():
    m = with_counts(decoder("graniteswitch", 15), {"logit_scale": 1.0}, adapters__count=1, adapters__lora_rank=1)
    for key in ("activate", "substitute"):
        m.metadata[f"graniteswitch.adapters.token_ids_{key}"] = ([1], T.ARRAY, T.INT32)
    return m


def kimi_like(architecture):
    """Both have MLA projections of three dimensions and rules of their own."""
    m = quant_models.model(architecture, blocks=16, key_heads=[0, 2] * 8, experts=4)
    with_counts(
        m,
        {"kda__gate_lower_bound": -5.0, "hyper_connection__epsilon": 1e-6},
        attention__key_length_mla=96,
        attention__value_length_mla=32,
        attention__q_lora_rank=256,
        attention__kv_lora_rank=256,
        ssm__conv_kernel=4,
        kda__head_dim=32,
        expert_shared_count=1,
        expert_gating_func=2,
        leading_dense_block_count=0,
        attention__indexer__head_count=2,
        attention__indexer__key_length=32,
        attention__indexer__top_k=8,
        attention__indexer__kpool=2,
        hyper_connection__count=4,
        hyper_connection__sinkhorn_iterations=2,
    )
    for i in range(16):
        m.add(
            i,
            attn_q_a=256,
            attn_q_b=256,
            attn_kv_a_mqa=256,
            attn_k_b=(4, 2, 96),
            attn_v_b=(4, 2, 256),
            attn_output=256,
            hc_attn_fn=256,
            ssm_f_a=256,
            ssm_beta=256,
        )
        moe(m, i, 4)
    m.add(15, **{"nextn.eh_proj": 512})
    return m


# fmt: off
CORNERS = {
    "70b": lambda: decoder("llama", 80, heads=8, key_heads=2),
    "65b": lambda: decoder("llama", 80, heads=4, key_heads=4),
    "70b-mtp": lambda: with_counts(decoder("llama", 81, heads=8, key_heads=4), nextn_predict_layers=1),
    "70b-8-experts": lambda: decoder("llama", 80, heads=8, key_heads=4, experts=8),
    "llama-embed": lambda: decoder("llama-embed", 80, heads=8, key_heads=4),
    "qwen2": lambda: decoder("qwen2", 80, heads=4, key_heads=4),
    "olmo": lambda: with_counts(decoder("olmo", 80, heads=8, key_heads=4), {"attention__layer_norm_epsilon": 1e-5}),
    "jais2": lambda: with_counts(decoder("jais2", 68, heads=8, key_heads=4), {"attention__layer_norm_epsilon": 1e-5}),
    "deci": lambda: decoder("deci", 80, heads=[8] * 80, key_heads=[0, *[2] * 79]),
    "falcon-8-experts": lambda: with_counts(decoder("falcon", 16, experts=8), {"attention__layer_norm_epsilon": 1e-5}),
    "looped": lambda: with_counts(decoder("nanbeige", 8), num_loops=3),
    "graniteswitch": graniteswitch,
    "glm5-next": lambda: kimi_like("glm5-next"),
    "bailingmoe3": lambda: kimi_like("bailingmoe3"),
    "odd-names": odd_names,
    "names-without-a-layer": lambda: odd_names(experts=4),
}
# fmt: on


@pytest.mark.parametrize("corner", CORNERS)
def test_corners(llama, tmp_path, corner):
    model = CORNERS[corner]()
    path = str(model.write(tmp_path / "in.gguf"))
    some = {"blk.0.attn_q.weight": np.ones(256, np.float32)}
    served = sum(assert_same_choice(llama, path, file_type, rows) for file_type in NUMBERS for rows in (None, some))
    assert served > 10  # a model that llama.cpp refuses altogether would compare nothing


# --- a model of real size, without its data -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def full_size(tmp_path_factory):
    """Qwen3-Coder-Next in BF16: 48 blocks, 512 experts, 159 GB of holes."""
    path = str(tmp_path_factory.mktemp("full") / "sparse.gguf")
    m = quant_models.model("qwen3next", blocks=48, heads=16, key_heads=2, experts=512, row=2048)
    m.count(
        expert_used_count=10,
        expert_shared_feed_forward_length=512,
        ssm__conv_kernel=4,
        ssm__inner_size=4096,
        ssm__state_size=128,
        ssm__time_step_rank=32,
        ssm__group_count=16,
    )
    m.tensors["token_embd.weight"] = m.tensors["output.weight"] = (151936, 2048)
    for i in range(48):
        if i % 4 == 3:
            m.add(
                i,
                attn_q=(8192, 2048),
                attn_k=(512, 2048),
                attn_v=(512, 2048),
                attn_output=(2048, 4096),
                attn_q_norm=(256,),
                attn_k_norm=(256,),
            )
        else:
            m.add(
                i,
                attn_qkv=(8192, 2048),
                attn_gate=(4096, 2048),
                ssm_conv1d=(8192, 4),
                ssm_ba=(64, 2048),
                ssm_norm=(128,),
                ssm_out=(2048, 4096),
            )
        m.add(
            i,
            attn_norm=(2048,),
            post_attention_norm=(2048,),
            ffn_gate_inp=(512, 2048),
            ffn_gate_exps=(512, 512, 2048),
            ffn_up_exps=(512, 512, 2048),
            ffn_down_exps=(512, 2048, 512),
            ffn_gate_inp_shexp=(2048,),
            ffn_gate_shexp=(512, 2048),
            ffn_up_shexp=(512, 2048),
            ffn_down_shexp=(2048, 512),
        )
    writer = gguf.GGUFWriter(path, m.architecture)
    for key, (value, kind, *element) in m.metadata.items():
        writer.add_key_value(key, value, kind, sub_type=element[0] if element else None)
    nbytes = 0
    for name, shape in m.tensors.items():
        kind, width = (gguf.GGMLQuantizationType.F32, 4) if len(shape) == 1 else (gguf.GGMLQuantizationType.BF16, 2)
        size = int(np.prod(shape, dtype=np.int64)) * width
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
        nbytes += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    size = os.path.getsize(path)
    try:
        os.truncate(path, -(-size // 32) * 32 + nbytes)
    except OSError as error:
        pytest.skip(f"no sparse file of {nbytes} bytes here: {error}")
    yield path
    os.unlink(path)


@pytest.mark.parametrize("file_type", NUMBERS)
def test_a_model_of_real_size(llama, full_size, file_type):
    with pgs.open(full_size) as model:
        checked = pgs.Plan(model).quantize(file_type).check()
    assert {t.name: t.type for t in checked.tensors} == llama_oracle.dry_run(llama, full_size, NUMBERS[file_type])
    some = {"blk.0.ffn_up_exps.weight": np.ones(512 * 2048, np.float32)}
    assert assert_same_choice(llama, full_size, file_type, some)


# --- llama.cpp's own records of what its file types give in published models ----------------------------------------


@dataclass
class Published:
    """A model as its published configuration says. heads: of queries and of keys, in the first block. parts: (blocks,
    tensors, row elements); those of EXPERT_AXIS have three dimensions."""

    architecture: str
    blocks: int
    heads: tuple[int, int]
    width: int
    parts: list[tuple[range | list[int], str, int]]
    experts: int = 0
    tied: bool = False

    def tensors(self):
        out = {"token_embd.weight": (2, self.width)}
        if not self.tied:
            out["output.weight"] = (2, self.width)
        for blocks, names, row in self.parts:
            for i in blocks:
                for name in names.split():
                    out[f"blk.{i}.{name}.weight"] = (2, 2, row) if name in EXPERT_AXIS else (2, row)
        return out

    def facts(self):
        keys = {
            "block_count": self.blocks,
            "expert_count": self.experts,
            "attention.head_count": self.heads[0],
            "attention.head_count_kv": self.heads[1],
        }
        return mixes.model_facts(self.architecture, {f"{self.architecture}.{k}": v for k, v in keys.items()}.get)


EXPERT_AXIS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "attn_k_b", "attn_v_b")
QKV, GATE_UP = "attn_q attn_k attn_v", "ffn_gate ffn_up"
GATE_UP_EXPERTS, DOWN_EXPERTS = "ffn_gate_exps ffn_up_exps ffn_gate_shexp ffn_up_shexp", "ffn_down_exps ffn_down_shexp"


def llama_like(architecture, blocks, heads, width, attention, ffn, tied=False):
    n = range(blocks)
    return Published(
        architecture,
        blocks,
        heads,
        width,
        [(n, f"{QKV} {GATE_UP}", width), (n, "attn_output", attention), (n, "ffn_down", ffn)],
        tied=tied,
    )


def hybrid(architecture, blocks, heads, width, attention, inner, small, more, experts=0):
    """Linear attention, every fourth block full attention. small: the tensors of the gates of the state."""
    full = range(3, blocks, 4)
    linear = [i for i in range(blocks) if i not in full]
    return Published(
        architecture,
        blocks,
        heads,
        width,
        [
            (full, QKV, width),
            (full, "attn_output", attention),
            (linear, "attn_qkv attn_gate " + small, width),
            (linear, "ssm_out", inner),
            *((range(blocks), names, row) for names, row in more),
        ],
        experts=experts,
    )


_N = [5, 12, 19, 26, 33, 42]  # the blocks of Nemotron 3 Nano with attention, with experts, the rest has a state
_E = [1, 3, 6, 8, 10, 13, 15, 17, 20, 22, 24, 27, 29, 31, 34, 36, 38, 40, 43, 45, 47, 49, 51]
_S = sorted({*range(52)} - {*_N, *_E})

# fmt: off
PUBLISHED = {
    "qwen3-coder-next": hybrid("qwen3next", 48, (16, 2), 2048, 4096, 4096, "ssm_ba",
                               [(GATE_UP_EXPERTS, 2048), (DOWN_EXPERTS, 512)], 512),
    "qwen3-0.6b": llama_like("qwen3", 28, (16, 8), 1024, 2048, 3072),
    "qwen3-14b": llama_like("qwen3", 40, (40, 8), 5120, 5120, 17408),
    "meta-llama-3.1-70b-instruct": llama_like("llama", 80, (64, 8), 8192, 8192, 28672),
    "gemma-3-4b-it": llama_like("gemma3", 34, (8, 4), 2560, 2048, 10240, tied=True),
    "gpt-oss-120b": Published("gpt-oss", 36, (64, 8), 2880, [
        (range(36), f"{QKV} ffn_gate_exps ffn_up_exps ffn_down_exps", 2880), (range(36), "attn_output", 4096)], 128),
    "deepseek-v3.1": Published("deepseek2", 61, (128, 1), 7168, [
        (range(61), "attn_q_a attn_kv_a_mqa", 7168), (range(61), "attn_q_b", 1536), (range(61), "attn_k_b", 128),
        (range(61), "attn_v_b", 512), (range(61), "attn_output", 16384), (range(3), GATE_UP, 7168),
        (range(3), "ffn_down", 18432), (range(3, 61), GATE_UP_EXPERTS, 7168), (range(3, 61), DOWN_EXPERTS, 2048)], 256),
    "glm-4.6v": Published("glm4moe", 46, (96, 8), 4096, [
        (range(46), QKV, 4096), (range(46), "attn_output", 12288), ([0], GATE_UP, 4096), ([0], "ffn_down", 10944),
        (range(1, 46), GATE_UP_EXPERTS, 4096), (range(1, 46), DOWN_EXPERTS, 1408)], 128),
    "nvidia-nemotron-3-nano-30b-a3b": Published("nemotron_h_moe", 52, (32, 0), 2688, [
        (_N, QKV, 2688), (_N, "attn_output", 4096), (_E, "ffn_up_exps ffn_up_shexp", 2688), (_E, "ffn_down_exps", 1856),
        (_E, "ffn_down_shexp", 3712), (_S, "ssm_in", 2688), (_S, "ssm_out", 4096)], 128),
    "qwen3.5-397b-a17b": hybrid("qwen35moe", 60, (32, 2), 4096, 8192, 8192, "ssm_alpha ssm_beta",
                                [(GATE_UP_EXPERTS, 4096), (DOWN_EXPERTS, 1024)], 512),
    "qwen3.6-27b": hybrid("qwen35", 64, (24, 4), 5120, 6144, 6144, "ssm_alpha ssm_beta",
                          [(GATE_UP, 5120), ("ffn_down", 17408)]),
    "step-3.5-flash": Published("step35", 45, (64, 8), 4096, [
        (range(45), f"{QKV} attn_gate", 4096), (range(45), "attn_output", 8192), (range(3), GATE_UP, 4096),
        (range(3), "ffn_down", 11264), (range(3, 45), GATE_UP_EXPERTS, 4096), (range(3, 45), DOWN_EXPERTS, 1280)], 288),
}
# fmt: on


@pytest.fixture(scope="session")
def snapshots(tmp_path_factory):
    """The folder of records: of the llama.cpp source tree in PGS_LLAMA_CPP, or of the source distribution whose ggml
    this package links, downloaded by pip."""
    if tree := os.environ.get("PGS_LLAMA_CPP"):
        return Path(tree) / "tests" / "snapshots"
    pinned = (ROOT / "third_party" / "ggml" / "CMakeLists.txt").read_text()
    carrier = re.search(r"PGS_GGML_CARRIER (\S+)\)", pinned)[1]
    folder = tmp_path_factory.mktemp("llama.cpp")
    pip = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            carrier,
            "-d",
            str(folder),
        ],
        capture_output=True,
        text=True,
    )
    if pip.returncode:
        pytest.skip(f"no PGS_LLAMA_CPP, and pip cannot download {carrier}: {pip.stderr.strip()[-200:]}")
    (archive,) = folder.iterdir()
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.endswith(".schema"):
                (folder / Path(member.name).name).write_bytes(tar.extractfile(member).read())
    return folder


def sections(text):
    """(file type, default type, {tensor: type where another}) of each section."""
    for section in re.split(r"^\[", text, flags=re.MULTILINE)[1:]:
        first, *lines = section.split("\n")
        name, default = re.fullmatch(r"(\w+)\] (\w+)", first).groups()
        yield name, default.upper(), {n: t.upper() for n, t in (line.split(" ") for line in lines if line)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_records_of_published_models(snapshots, name):
    path = snapshots / f"{name}.schema"
    if not path.exists():
        pytest.skip(f"no {path}")
    model = PUBLISHED[name]
    count = 0
    for file_type, default, others in sections(path.read_text()):
        ours = choose(file_type, model.facts(), model.tensors())
        assert others.keys() <= ours.keys(), file_type
        assert ours == {n: others.get(n, default) for n in ours}, file_type
        count += 1
    assert count >= 30
