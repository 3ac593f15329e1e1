"""verify: a good file has no problem; each fault put into one is named, with the tensor or key it is in."""

import json

import numpy as np
import pytest

import pygguf_surgery as pgs
from pygguf_surgery.cli import main
from pygguf_surgery.cli.commands.demo_model import DemoShape, write_demo_model
from pygguf_surgery.files.gguf import write_gguf
from pygguf_surgery.reports.verification import verify
from support import moe_models

SMALL = DemoShape(
    layers=4,
    embedding=64,
    experts=8,
    used=2,
    feed_forward=32,
    heads=2,
    heads_kv=1,
    head=32,
    state=32,
    key_heads=1,
    value_heads=2,
    vocabulary=300,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """source (BF16, 8 experts), cut (4 experts, types kept), encoded (4 experts, MXFP4_MOE)"""
    folder = tmp_path_factory.mktemp("verify")
    write_demo_model(folder / "source.gguf", shape=SMALL)
    with pgs.open(folder / "source.gguf") as model:
        plan = pgs.Plan(model).keep_experts({layer: [0, 2, 3, 6] for layer in range(4)})
        plan.write(folder / "cut.gguf")
        plan.quantize("MXFP4_MOE").write(folder / "encoded.gguf")
    return {name: folder / f"{name}.gguf" for name in ("source", "cut", "encoded")}


def rewrite(path, out, *, metadata=None, remove=(), tensors=None):
    """A copy with other metadata (key -> Value) and tensors (name -> None, or (data, type, shape)); returns `out`."""
    with pgs.open(path) as model:
        keys = {k: v for k, v in model.metadata.exact().items() if k not in remove} | (metadata or {})
        parts = {t.name: (t.bytes(), t.type, t.shape) for t in model.tensors.values()} | (tensors or {})
        write_gguf(out, keys, {k: v for k, v in parts.items() if v is not None})
    return out


def patch(path, out, tensor, at, data):
    """A copy with bytes of one tensor replaced; returns `out`."""
    with pgs.open(path) as model:
        offset = model.tensors[tensor].offset
    raw = bytearray(path.read_bytes())
    raw[offset + at : offset + at + len(data)] = data
    out.write_bytes(raw)
    return out


def only_problem(report):
    assert len(report.problems) == 1, [str(p) for p in report.problems]
    return report.problems[0]


# --- good files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["source", "cut", "encoded"])
def test_a_good_file_is_good(files, name):
    report = verify(files[name])
    assert report.good and report.warnings == [] and report.tensors == 73
    with pgs.open(files[name]) as model:
        assert report.bytes_checked == sum(t.nbytes for t in model.tensors.values())


def test_a_cut_is_proved_equal_expert_by_expert(files):
    report = verify(files["cut"], files["source"])
    assert report.good and report.equal_tensors == 73 and report.encoded == []
    assert report.equal_experts == 4 * 4 * 4  # layers x (router, gate, up, down) x experts


def test_what_was_encoded_again_is_sampled_and_reproduced(files):
    report = verify(files["encoded"], files["source"])
    assert report.good and report.equal_tensors + len(report.encoded) == 73
    up = next(e for e in report.encoded if e["name"] == "blk.2.ffn_up_exps.weight")
    assert (up["source_type"], up["type"], up["reproduced"]) == ("BF16", "MXFP4", True) and 0.98 < up["cosine"] < 1


def test_an_edit_of_a_cut_file_is_equal_to_it(files, tmp_path):
    with pgs.open(files["cut"]) as model:
        pgs.Plan(model).set_metadata({"general.name": "again"}).write(tmp_path / "edited.gguf")
        pgs.Plan(model).keep_experts({layer: [1, 3] for layer in range(4)}).write(tmp_path / "twice.gguf")
    for name in ("edited", "twice"):
        report = verify(tmp_path / f"{name}.gguf", files["cut"])
        assert report.good and report.equal_tensors == 73


# --- the bytes of the file -----------------------------------------------------------------------------------------


def test_a_file_that_is_no_gguf_is_a_problem(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"nonsense")
    assert isinstance(only_problem(verify(tmp_path / "bad.gguf")), pgs.BadFile)


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        verify(tmp_path / "none.gguf")


def test_padding_that_is_not_zero(files, tmp_path):
    with pgs.open(files["source"]) as model:
        tensor = model.tensors["blk.0.ssm_a"]  # 8 bytes, then padding
    bad = patch(files["source"], tmp_path / "bad.gguf", tensor.name, tensor.nbytes, b"\x01")
    assert "padding" in only_problem(verify(bad)).problem


def test_bytes_after_the_last_tensor(files, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(files["source"].read_bytes() + bytes(32))
    problem = only_problem(verify(tmp_path / "bad.gguf"))
    assert problem.found == problem.expected + 32


def test_a_gap_between_tensors(tmp_path):
    from support.gguf_bytes import F32, gguf, info, kv

    data = np.zeros(32, "<f4").tobytes()
    (tmp_path / "gap.gguf").write_bytes(
        gguf(
            [kv("general.architecture", "str", "x")],
            [info("a", (32,), F32, 0), info("b", (32,), F32, 160)],
            data + bytes(32) + data,
        )
    )
    found = {(p.object, p.found, p.expected) for p in verify(tmp_path / "gap.gguf").problems}
    with pgs.open(tmp_path / "gap.gguf") as model:
        offset = model.tensors["b"].offset
    assert ("b", offset, offset - 32) in found


# --- the numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, tensor, at, data, words",
    [
        ("source", "blk.1.attn_norm.weight", 4 * 7, np.float32(np.nan).tobytes(), "element 7"),
        ("source", "blk.1.ffn_up_exps.weight", 2 * 5000, b"\x80\x7f", "element 5000"),  # BF16 infinity
        ("encoded", "blk.1.ffn_up_exps.weight", 17 * 11, b"\xff", "block 11"),  # MXFP4 exponent
        ("encoded", "output.weight", 34 * 3, b"\x00\x7c", "block 3"),  # Q8_0 scale, infinity
    ],
)
def test_numbers_that_are_none(files, tmp_path, name, tensor, at, data, words):
    bad = patch(files[name], tmp_path / "bad.gguf", tensor, at, data)
    problem = only_problem(verify(bad))
    assert problem.object == tensor and words in problem.problem
    assert verify(bad, data=False).good


# --- what llama.cpp's loader asks ------------------------------------------------------------------------------------


def u32(n):
    return pgs.Value(n, "u32")


@pytest.mark.parametrize(
    "metadata, object",
    [
        ({"qwen3next.expert_count": u32(7)}, "blk.0.ffn_up_exps.weight"),
        ({"qwen3next.expert_count": pgs.Value(8, "i32")}, "qwen3next.expert_count"),
        ({"qwen3next.expert_count": u32(1025)}, "qwen3next.expert_count"),
        ({"qwen3next.expert_used_count": u32(9)}, "qwen3next.expert_used_count"),
        ({"qwen3next.expert_used_count": u32(0)}, "qwen3next.expert_used_count"),
        ({"qwen3next.expert_group_count": u32(3)}, "qwen3next.expert_group_count"),
        (
            {"qwen3next.expert_group_count": u32(8), "qwen3next.expert_group_used_count": u32(2)},
            "qwen3next.expert_group_count",
        ),
        (
            {"qwen3next.expert_group_count": u32(4), "qwen3next.expert_group_used_count": u32(4)},
            "qwen3next.expert_group_used_count",
        ),
        (
            {
                "qwen3next.expert_group_count": u32(4),
                "qwen3next.expert_group_used_count": u32(1),
                "qwen3next.expert_used_count": u32(3),
            },
            "qwen3next.expert_group_used_count",
        ),
        ({"qwen3next.block_count": u32(3)}, "qwen3next.block_count"),
        ({"qwen3next.block_count": u32(5)}, "qwen3next.block_count"),
        ({"qwen3next.block_count": u32(0)}, "qwen3next.block_count"),
        ({"qwen3next.nextn_predict_layers": u32(5)}, "qwen3next.nextn_predict_layers"),
        ({"qwen3next.attention.head_count": pgs.Value([2, 2, 2], "u32[]")}, "qwen3next.attention.head_count"),
        ({"qwen3next.embedding_length": u32(63)}, "qwen3next.embedding_length"),
        ({"tokenizer.ggml.tokens": pgs.Value(["a", "b"], "str[]")}, "tokenizer.ggml.tokens"),
    ],
)
def test_metadata_that_llama_cpp_refuses(files, tmp_path, metadata, object):
    report = verify(rewrite(files["source"], tmp_path / "bad.gguf", metadata=metadata))
    assert object in {p.object for p in report.problems}


@pytest.mark.parametrize(
    "key",
    [
        "qwen3next.block_count",
        "qwen3next.context_length",
        "qwen3next.embedding_length",
        "qwen3next.expert_count",
        "general.architecture",
    ],
)
def test_missing_keys(files, tmp_path, key):
    report = verify(rewrite(files["source"], tmp_path / "bad.gguf", remove=[key]))
    assert key in {p.object for p in report.problems}


def zeros(*shape):
    return np.zeros(shape, np.float32), "F32", shape


@pytest.mark.parametrize(
    "tensors, object",
    [
        ({"blk.1.ffn_gate_inp.weight": None}, "blk.1.ffn_gate_inp.weight"),
        ({"blk.1.ffn_gate_inp.weight": zeros(4, 64)}, "blk.1.ffn_gate_inp.weight"),
        ({"blk.1.ffn_gate_inp.weight": zeros(8, 32)}, "blk.1.ffn_gate_inp.weight"),
        ({"blk.1.ffn_up_exps.weight": None}, "blk.1.ffn_up_exps.weight"),
        ({"blk.1.ffn_up_exps.weight": zeros(7, 32, 64)}, "blk.1.ffn_up_exps.weight"),
        ({"blk.1.ffn_gate_exps.weight": zeros(8, 16, 64)}, "blk.1.ffn_gate_exps.weight"),
        ({"blk.1.ffn_down_exps.weight": None}, "blk.1.ffn_gate_exps.weight"),
        ({"blk.1.exp_probs_b.bias": zeros(16)}, "blk.1.exp_probs_b.bias"),
        ({"blk.1.ffn_up.3.weight": zeros(32, 64)}, "blk.1.ffn_up.3.weight"),
        ({"blk.9.attn_norm.weight": zeros(64)}, "qwen3next.block_count"),
    ],
)
def test_tensors_that_llama_cpp_refuses(files, tmp_path, tensors, object):
    report = verify(rewrite(files["source"], tmp_path / "bad.gguf", tensors=tensors))
    assert object in {p.object for p in report.problems}


def test_prediction_blocks_may_be_elsewhere(tmp_path):
    """llama.cpp loads a file without the MTP blocks that block_count counts, and one with nothing but them."""
    source = moe_models.qwen3next(tmp_path / "source.gguf", mtp=True)
    names = [f"blk.{i}." for i in range(5)]

    def without(*layers):
        with pgs.open(source) as model:
            gone = {t: None for t in model.tensors if t.startswith(tuple(names[i] for i in layers))}
        out = tmp_path / f"without-{layers}.gguf"
        return verify(rewrite(source, out, tensors=gone)).problems

    assert without(4) == [] and without(0, 1, 2, 3) == []
    assert len(without(3)) == 1 and len(without(3, 4)) == 2


def test_experts_of_a_prediction_block_must_be_cut_too(tmp_path):
    """The block after the last is MTP; llama.cpp checks its shapes even when it skips it."""
    shape = DemoShape(layers=4, embedding=64, experts=8, used=2, feed_forward=32, vocabulary=300)
    write_demo_model(tmp_path / "a.gguf", shape=shape)
    bad = rewrite(
        tmp_path / "a.gguf",
        tmp_path / "bad.gguf",
        metadata={"qwen3next.nextn_predict_layers": u32(1), "qwen3next.expert_count": u32(4)},
        tensors={
            f"blk.{i}.{t}.weight": (np.zeros((4, *dims), np.float32), "F32", (4, *dims))
            for i in range(3)
            for t, dims in (
                ("ffn_gate_inp", (64,)),
                ("ffn_gate_exps", (32, 64)),
                ("ffn_up_exps", (32, 64)),
                ("ffn_down_exps", (64, 32)),
            )
        },
    )
    objects = {p.object for p in verify(bad).problems}
    assert objects == {f"blk.3.ffn_{t}.weight" for t in ("gate_inp", "gate_exps", "up_exps", "down_exps")}


# --- against the source --------------------------------------------------------------------------------------------


def test_one_wrong_bit_in_one_expert_is_found_and_named(files, tmp_path):
    with pgs.open(files["cut"]) as model:
        tensor = model.tensors["blk.2.ffn_down_exps.weight"]
        at = tensor.nbytes // 4 * 2 + 10  # in the third expert, which was 3
        byte = int(tensor.bytes()[at])
    bad = patch(files["cut"], tmp_path / "bad.gguf", tensor.name, at, bytes([byte ^ 1]))
    problem = only_problem(verify(bad, files["source"]))
    assert problem.object == tensor.name and "expert 2 differs from expert 3" in problem.problem
    assert problem.offset == tensor.offset + at


def test_one_wrong_bit_elsewhere(files, tmp_path):
    bad = patch(files["cut"], tmp_path / "bad.gguf", "output_norm.weight", 0, b"\x01")
    assert only_problem(verify(bad, files["source"])).object == "output_norm.weight"


def test_experts_in_another_order_than_claimed(files, tmp_path):
    kept = pgs.Value([0, 2, 6, 3], "u32[]")
    bad = rewrite(files["cut"], tmp_path / "bad.gguf", metadata={"pgs.experts.1.kept": kept})
    problems = verify(bad, files["source"]).problems
    assert {p.object for p in problems} == {
        f"blk.1.ffn_{t}.weight" for t in ("gate_inp", "gate_exps", "up_exps", "down_exps")
    }


def test_a_wrong_expert_among_encoded_ones(files, tmp_path):
    with pgs.open(files["encoded"]) as model:
        tensor = model.tensors["blk.1.ffn_up_exps.weight"]
        step = tensor.nbytes // 4
        other = bytes(tensor.bytes()[:step])
    bad = patch(files["encoded"], tmp_path / "bad.gguf", tensor.name, 3 * step, other)
    problem = only_problem(verify(bad, files["source"]))
    assert problem.object == tensor.name and "does not resemble" in problem.problem


def test_no_list_of_kept_experts(files, tmp_path):
    keys = [f"pgs.experts.{layer}.kept" for layer in range(4)]
    bad = rewrite(files["cut"], tmp_path / "bad.gguf", remove=keys)
    report = verify(bad, files["source"])
    assert len(report.problems) == 16 and all("no list of kept experts" in p.problem for p in report.problems)


def test_ids_out_of_range(files, tmp_path):
    kept = pgs.Value([0, 2, 3, 8], "u32[]")
    bad = rewrite(files["cut"], tmp_path / "bad.gguf", metadata={"pgs.experts.1.kept": kept})
    assert len(verify(bad, files["source"]).problems) == 4


def test_another_source(files, tmp_path):
    write_demo_model(tmp_path / "other.gguf", shape=SMALL, seed=1)
    report = verify(
        files["cut"],
        rewrite(tmp_path / "other.gguf", tmp_path / "named.gguf", metadata={"general.name": pgs.Value("other", "str")}),
    )
    objects = {p.object for p in report.problems}
    assert "pgs.source.header_sha256" in objects and "blk.0.ffn_up_exps.weight" in objects


def test_a_tensor_that_only_one_has(files, tmp_path):
    less = rewrite(files["source"], tmp_path / "less.gguf", tensors={"output.weight": None})
    report = verify(less, files["source"])
    assert only_problem(report).object == "output.weight" and report.removed == ["output.weight"]
    assert only_problem(verify(files["source"], less)).object == "output.weight"


def test_dropped_prediction_blocks_are_no_loss(tmp_path):
    source = moe_models.qwen3next(tmp_path / "source.gguf", mtp=True)
    with pgs.open(source) as model:
        kept = pgs.experts.rank(model).keep(16)
        pgs.Plan(model).keep_experts(kept, mtp="drop").write(tmp_path / "cut.gguf")
        blocks = {name for name in model.tensors if name.startswith("blk.4.")}
    report = verify(tmp_path / "cut.gguf", source)
    assert report.good, [str(p) for p in report.problems]
    assert set(report.removed) == blocks


@pytest.mark.parametrize(
    "table, good",
    [
        ([[0, 1], [2, 3]], True),  # 0 2 / 3 6 of the source, as they are now called
        ([[0, 0], [2, 3]], False),  # an expert twice
        ([[1, 0], [2, 3]], False),  # a kept one misnamed
        ([[0, 1], [2, 4]], False),  # out of range
    ],
)
def test_a_table_of_expert_ids(files, tmp_path, table, good):
    def table_of(ids):
        ids = np.array(ids, np.int32)
        return {"blk.0.ffn_gate_tid2eid.weight": (ids.view(np.uint8), "I32", ids.shape)}

    source = rewrite(files["source"], tmp_path / "source.gguf", tensors=table_of([[0, 2], [3, 6]]))
    with pgs.open(source) as model:
        sha = pgs.Value(model.header_sha256, "str")
    cut = rewrite(
        files["cut"], tmp_path / "cut.gguf", tensors=table_of(table), metadata={"pgs.source.header_sha256": sha}
    )
    report = verify(cut, source)
    assert report.good == good, [str(p) for p in report.problems]


# --- the command ---------------------------------------------------------------------------------------------------


def test_command(files, tmp_path, capsys):
    assert main(["verify", str(files["cut"]), "--against", str(files["source"])]) == 0
    out, err = capsys.readouterr()
    assert "good" in out and "64 expert slices" in out and err == ""
    bad = patch(files["cut"], tmp_path / "bad.gguf", "output_norm.weight", 0, b"\x01")
    assert main(["verify", str(bad), "--against", str(files["source"]), "--json"]) == 3
    data = json.loads(capsys.readouterr().out)
    assert data["good"] is False and len(data["problems"]) == 1 and "output_norm.weight" in data["problems"][0]
    assert main(["verify", str(bad), "--against", str(files["source"])]) == 3
    assert "problem: " in capsys.readouterr().out
    assert main(["verify", str(bad), "--against", str(tmp_path / "none")]) == 3
