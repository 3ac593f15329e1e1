"""memory and solve: sums against the same rules written again, the report of a plan against that of its output."""

from __future__ import annotations

import json
import math
import re

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import pygguf_surgery as pgs
from pygguf_surgery import Value
from pygguf_surgery.base.errors import SurgeryError
from pygguf_surgery.recipes import mixes
from pygguf_surgery.reports import memory as room
from support import moe_models
from support.gguf_files import make_gguf, read_gguf
from support.json_schema import FOLDER

EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down|gate_up)_exps\.(weight|bias|scale|input_scale)")


def report_of(path, **options):
    with pgs.open(path) as model:
        return pgs.report.memory(model, **options)


def faults(name, data):
    schema = json.loads((FOLDER / f"{name}.schema.json").read_text())
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema).iter_errors(data)]


@pytest.fixture(scope="module", params=[n for n in moe_models.ALL if n not in ("deepseek4", "grovemoe")])
def path(request, tmp_path_factory):
    return moe_models.ALL[request.param](tmp_path_factory.mktemp("memory") / f"{request.param}.gguf")


def test_weights_are_those_of_the_file(path):
    report = report_of(path)["weights"]
    metadata, tensors = read_gguf(path)
    architecture = metadata["general.architecture"]
    used, experts = (metadata[f"{architecture}.expert_{word}"] for word in ("used_count", "count"))
    nbytes = {name: data.nbytes for name, (_, data) in tensors.items()}
    assert report["nbytes"] == sum(nbytes.values()) == sum(role["nbytes"] for role in report["roles"])
    assert report["padding_nbytes"] == sum(-n % 32 for n in nbytes.values())
    assert report["loaded_nbytes"] == report["nbytes"] + report["padding_nbytes"]
    assert report["file_bytes"] == path.stat().st_size >= report["loaded_nbytes"]
    read = 0
    for name, n in nbytes.items():
        if name == "token_embd.weight":
            read += n // moe_models.VOCAB
        else:
            read += n * used // experts if EXPERT.fullmatch(name) else n
    assert report["read_per_token_nbytes"] == read == sum(r["read_per_token_nbytes"] for r in report["roles"])
    assert not faults("memory", report_of(path)) and not faults("memory", report_of(path, device="1GiB"))


def test_mtp_layers_and_tables(tmp_path):
    path = moe_models.qwen3next(tmp_path / "mtp.gguf", mtp=True)
    plain = report_of(moe_models.qwen3next(tmp_path / "plain.gguf"))["weights"]
    report = report_of(path)["weights"]
    _, tensors = read_gguf(path)
    of_mtp = [data.nbytes for name, (_, data) in tensors.items() if name.startswith("blk.4.")]
    (role,) = (role for role in report["roles"] if role["role"] == "mtp")
    assert (role["tensors"], role["nbytes"], role["read_per_token_nbytes"]) == (len(of_mtp), sum(of_mtp), 0)
    assert report["mtp_nbytes"] == sum(n + -n % 32 for n in of_mtp)
    assert (report["loaded_nbytes"], report["read_per_token_nbytes"]) == (
        plain["loaded_nbytes"],
        plain["read_per_token_nbytes"],
    )


def test_a_tied_output_is_read_whole_and_large_tables_are_lazy(tmp_path, monkeypatch):
    def write(name, **tensors):
        b = moe_models.Builder("gemma4", blocks=2, experts=8, used=2)
        b.key("attention.sliding_window_pattern", [True, False], moe_models.ARRAY, moe_models.BOOL)
        b.key("attention.sliding_window", 128, moe_models.U32)
        for i in range(2):
            b.attention(i)
        del b.tensors["output.weight"]
        for tensor, shape in tensors.items():
            b.add(f"{tensor}.weight", *shape)
        return b.write(tmp_path / name)

    tied = report_of(write("tied.gguf"))["weights"]
    untied = report_of(write("untied.gguf", output=(48, 32)))["weights"]
    embedding = 48 * 32 * 2
    assert tied["read_per_token_nbytes"] - untied["read_per_token_nbytes"] == embedding * 47 // 48 - 48 * 32 * 4
    path = write("table.gguf", per_layer_token_embd=(48, 64))
    table = 48 * 64 * 4
    resident = report_of(path)["weights"]
    assert resident["lazy_nbytes"] == 0  # llama.cpp reads only tables over 4 GiB so
    assert resident["read_per_token_nbytes"] == tied["read_per_token_nbytes"] + table // 48
    monkeypatch.setattr(room, "LAZY_LEAST", table - 1)
    lazy = report_of(path)["weights"]
    assert lazy["lazy_nbytes"] == table and lazy["loaded_nbytes"] == resident["loaded_nbytes"] - table


def test_chunk_experts_and_counts_per_layer(tmp_path):
    path = moe_models.grovemoe(tmp_path / "a.gguf", experts=16, per_group=2)
    report = report_of(path)["weights"]
    _, tensors = read_gguf(path)
    expected = 0
    for name, (_, data) in tensors.items():
        slices = {"exps": 16, "chexps": 8}.get(name.split(".")[-2].split("_")[-1])
        expected += (
            data.nbytes * 4 // slices if slices else data.nbytes // 48 if name == "token_embd.weight" else data.nbytes
        )
    assert report["read_per_token_nbytes"] == expected
    used = ([1, 4], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
    b = moe_models.Builder("qwen3moe", blocks=2, experts=8, used=4)
    b.metadata["qwen3moe.expert_used_count"] = used
    for i in range(2):
        b.attention(i, norms=True)
        b.moe(i)
    (role,) = (r for r in report_of(b.write(tmp_path / "b.gguf"))["weights"]["roles"] if r["role"] == "expert")
    assert role["read_per_token_nbytes"] == role["nbytes"] * (1 + 4) // 16


def test_the_report_of_a_plan_is_that_of_its_output(path, tmp_path):
    with pgs.open(path) as model:
        plan = pgs.Plan(model).keep_experts(pgs.experts.rank(model).keep(8)).quantize("Q8_0", allow_requantize=True)
        promised = pgs.report.memory(plan.check(), device="1GiB", parallel=2)
        plan.write(tmp_path / "out.gguf")
    assert promised == report_of(tmp_path / "out.gguf", device="1GiB", parallel=2)
    assert promised["weights"]["nbytes"] < report_of(path)["weights"]["nbytes"]


def test_totals_and_rates(path):
    report = report_of(path, context=1000, parallel=3, bandwidth="100GB/s", ubatch=64)
    kv, recurrent = report["kv"], report["recurrent"]
    assert kv["nbytes"] == sum(c["k_nbytes"] + c["v_nbytes"] for c in kv["caches"])
    assert recurrent["nbytes"] == 3 * recurrent["per_sequence_nbytes"] == sum(s["nbytes"] for s in recurrent["states"])
    assert report["context"] == {"tokens": 1536, "per_sequence": 512, "parallel": 3, "unified": False, "trained": 256}
    parts = (report["weights"]["loaded_nbytes"], kv["nbytes"], recurrent["nbytes"], report["compute_nbytes_estimate"])
    assert report["total_nbytes"] == sum(parts)
    speed = report["speed"]
    assert speed["bandwidth"] == 10**11
    assert math.isclose(speed["tokens_per_second_at_most"] * report["weights"]["read_per_token_nbytes"], 10**11)
    longer = report_of(path, context=1000 + 3 * 4096, parallel=3, ubatch=64)["kv"]
    windows = sum(c["k_nbytes"] + c["v_nbytes"] for c in kv["caches"] if c["kind"] == "window")
    after = sum(c["k_nbytes"] + c["v_nbytes"] for c in longer["caches"] if c["kind"] == "window")
    assert longer["nbytes"] - kv["nbytes"] - (after - windows) == 3 * 4096 * kv["per_token_nbytes"]


@given(st.integers(1, 1 << 27), st.integers(1, 3), st.booleans())
def test_the_largest_context_is_the_largest(small, device, parallel, unified):
    with pgs.open(small) as model:
        use = dict(parallel=parallel, unified=unified, device=device)
        largest = pgs.report.memory(model, **use)["device"]["largest_context"]
        each = 1 if unified else parallel

        def fits(tokens):
            return pgs.report.memory(model, context=tokens * each, **use)["device"]["fits"]

        assert largest % 256 == 0 and not fits(largest + 256)
        assert largest == 0 or fits(largest)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return moe_models.qwen3next(tmp_path_factory.mktemp("small") / "model.gguf")


def test_a_model_without_attention_takes_any_context(tmp_path):
    words = dict(block_count=2, embedding_length=32, context_length=64)
    words |= {"ssm.conv_kernel": 4, "ssm.inner_size": 64, "ssm.state_size": 16, "ssm.group_count": 1}
    u32 = gguf.GGUFValueType.UINT32
    path = make_gguf(
        tmp_path / "mamba2.gguf",
        "mamba2",
        {f"mamba2.{word}": (n, u32) for word, n in words.items()},
        {"token_embd.weight": np.zeros((48, 32), np.float32)},
    )
    report = report_of(path, device="1GiB")
    assert report["device"]["largest_context"] is None and report["kv"]["caches"] == []
    assert report["recurrent"]["nbytes"] == 4 * 2 * (3 * (64 + 2 * 16) + 16 * 64)
    assert "any context" in room.describe(report)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (dict(context=0), "context"),
        (dict(context=1 << 31), "context"),
        (dict(context="many"), "context"),
        (dict(parallel=0), "parallel"),
        (dict(parallel=257), "parallel"),
        (dict(ubatch=0), "ubatch"),
        (dict(type_k="Q6_K"), "Q6_K"),
        (dict(type_v="Q8_0"), "multiple of the block"),  # heads of 8 elements
        (dict(device="0GiB"), "memory"),
        (dict(device="much"), "size"),
        (dict(bandwidth="fast"), "size"),
        (dict(bandwidth=0), "bandwidth"),
    ],
)
def test_options_that_make_no_sense(small, options, word):
    with pytest.raises(pgs.BadPlan, match=word):
        report_of(small, **options)


def test_types_by_name(small):
    with pytest.raises(pgs.Unsupported, match="unknown tensor type"):
        report_of(small, type_k="nothing")
    assert report_of(small, type_k="bf16")["kv"]["type_k"] == "BF16"


PARTS = st.builds(
    room.Part,
    st.sampled_from(
        ["token_embd.weight", "output.weight", "blk.0.ffn_up_exps.weight", "blk.9.ffn_up_exps.weight", "x"]
    ),
    st.sampled_from(["F16", "Q4_K"]),
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
    st.integers(0, 1 << 62),
    st.sampled_from(["embedding", "output", "expert", "other"]),
)
WORDS = ["block_count", "context_length", "embedding_length", "feed_forward_length", "expert_feed_forward_length",
         "expert_used_count", "expert_count", "nextn_predict_layers", "attention.head_count"]  # fmt: skip
VALUES = st.one_of(
    st.integers(0, 600).map(lambda x: Value(x, "u32")),
    st.integers(-(1 << 63), (1 << 63) - 1).map(lambda x: Value(x, "i64")),
    st.floats(width=32).map(lambda x: Value(x, "f32")),
    st.text(max_size=3).map(lambda x: Value(x, "str")),
    st.lists(st.integers(0, 9), max_size=3).map(lambda x: Value(x, "u32[]")),
    st.lists(st.text(max_size=2), max_size=3).map(lambda x: Value(x, "str[]")),
)


@given(st.dictionaries(st.sampled_from(WORDS), VALUES), st.lists(PARTS, max_size=6), st.booleans())
def test_no_header_breaks_it(changes, parts, flash):
    plain = {"block_count": 2, "embedding_length": 32, "context_length": 512, "attention.head_count": 2}
    metadata = {f"llama.{word}": Value(x, "u32") for word, x in plain.items()}
    metadata |= {f"llama.{word}": value for word, value in changes.items()}
    try:
        needed = room.need_of("llama", metadata, parts, 32, 1000)
        use = room.parse_use(needed, flash_attention=flash)
        total = needed.total(use)
    except SurgeryError:
        return
    assert isinstance(total, int) and total >= needed.weights.loaded >= 0
    assert 0 <= needed.weights.read <= needed.weights.tensors
    assert needed.largest_context(use, total) is None or needed.largest_context(use, total) >= use.per_sequence


# --- solve ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Rows of 256, which all types can hold."""
    b = moe_models.Builder("qwen3moe", blocks=8, experts=16, used=4)
    b.rng = np.random.default_rng(1)
    b.key("embedding_length", 256, moe_models.U32)
    for name in ("token_embd.weight", "output.weight"):
        b.add(name, 48, 256, type="F16")
    for i in range(8):
        for part, rows, columns in (("q", 32, 256), ("k", 16, 256), ("v", 16, 256), ("output", 256, 256)):
            b.add(f"blk.{i}.attn_{part}.weight", rows, columns, type="F16")
        b.add(f"blk.{i}.ffn_gate_inp.weight", 16, 256)
        for part in ("gate", "up", "down"):
            b.add(f"blk.{i}.ffn_{part}_exps.weight", 16, 256, 256, type="F16")
    return b.write(tmp_path_factory.mktemp("wide") / "wide.gguf")


def test_solutions_are_what_plans_come_to(wide):
    with pgs.open(wide) as model:
        found = pgs.report.solve(model, device="1GiB")
        assert not faults("solutions", found)
        assert {s["experts"] for s in found["solutions"]} == {4, 6, 8, 10, 12, 14, 16}
        checked = 0
        for s in found["solutions"][::5]:
            plan = pgs.Plan(model)
            if s["experts"] < 16:
                plan = plan.keep_experts(pgs.experts.rank(model).keep(s["experts"]))
            plan = plan.quantize(s["type"])
            result = plan.check()
            needs = ["importance matrix" in str(error) for error in result.blockers]
            assert all(needs) and bool(needs) == s["needs_importance"], s
            if not needs:  # else some types differ, as with an importance matrix
                report = pgs.report.memory(result, device="1GiB")
                assert s["weights_nbytes"] == report["weights"]["loaded_nbytes"]
                assert s["bits_per_weight"] == report["weights"]["bits_per_weight"]
                assert s["total_nbytes"] == report["total_nbytes"]
                assert s["largest_context"] == report["device"]["largest_context"]
                assert s["tokens_per_second_at_most"] == report["speed"]["tokens_per_second_at_most"]
                checked += 1
        assert checked > 10


def test_all_that_fits_is_listed_and_nothing_else(wide):
    with pgs.open(wide) as model:
        everything = pgs.report.solve(model, device="1GiB")["solutions"]
        order = [(-s["experts"], -s["weights_nbytes"]) for s in everything]
        assert order == sorted(order)
        names = {n for n in mixes.FILE_TYPES if n not in mixes.ALIASES} | {"COPY", *mixes.OUR_FILE_TYPES}
        assert {s["type"] for s in everything} == names - {"F32", "F16", "BF16"}  # no smaller than the model is
        limit = sorted(s["total_nbytes"] for s in everything)[len(everything) // 2]
        some = pgs.report.solve(model, device=limit)["solutions"]
        assert [(s["experts"], s["type"]) for s in some] == [
            (s["experts"], s["type"]) for s in everything if s["total_nbytes"] <= limit
        ]
        one = pgs.report.solve(model, device="1GiB", keep=8, type="q4_k_m")["solutions"]
        assert [(s["experts"], s["type"]) for s in one] == [(8, "Q4_K_M")]
        assert pgs.report.solve(model, device=1000)["solutions"] == []


def test_solutions_respect_router_groups_and_types_that_are_there(tmp_path):
    path = moe_models.deepseek2(tmp_path / "groups.gguf", experts=16, groups=4)
    with pgs.open(path) as model:
        found = pgs.report.solve(model, device="1GiB")["solutions"]
        assert {s["experts"] for s in found} == {16, 12, 8}  # whole groups of two or more
        with pytest.raises(SurgeryError):
            pgs.report.solve(model, device="1GiB", keep=10)
    path = moe_models.qwen3next(tmp_path / "quantized.gguf", type="Q8_0")
    with pgs.open(path) as model:
        found = pgs.report.solve(model, device="1GiB", keep=32)["solutions"]
        assert {s["type"]: s["requantizes"] for s in found}["COPY"] is False
        assert {s["type"]: s["requantizes"] for s in found}["Q4_0"] is True


def test_a_dense_model_has_types_alone(tmp_path):
    b = moe_models.Builder("llama", blocks=1, experts=0, used=0)
    del b.metadata["llama.expert_count"], b.metadata["llama.expert_used_count"]
    b.attention(0)
    b.dense(0)
    with pgs.open(b.write(tmp_path / "dense.gguf")) as model:
        found = pgs.report.solve(model, device="1GiB")
        assert found["experts"] is None and {s["experts"] for s in found["solutions"]} == {None}
        with pytest.raises(pgs.BadPlan, match="no experts"):
            pgs.report.solve(model, device="1GiB", keep=4)
