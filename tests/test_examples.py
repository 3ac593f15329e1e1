"""The scripts of docs/examples run as they stand, each in a process of its own, and do what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

import pygguf_surgery as pgs
from support import moe_models, quant_models
from support.gguf_files import read_gguf

EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"
PACKAGE = Path(pgs.__file__).resolve().parents[1]


def example(name, *arguments, code=0):
    """What an example says on stdout and stderr together. It imports the package that this test imports."""
    path = os.pathsep.join([str(PACKAGE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / name, *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return moe_models.qwen3moe(tmp_path_factory.mktemp("examples") / "model.gguf", experts=16)


def test_every_example_is_tested():
    tested = {name for name in Path(__file__).read_text().split('"') if name.endswith(".py") and name[0].isdigit()}
    assert tested == {path.name for path in EXAMPLES.glob("*.py")}


def test_look(model):
    said = example("01_look.py", model)
    tensors = read_gguf(model)[1]
    assert f"architecture qwen3moe, {len(tensors)} tensors, {model.stat().st_size} bytes" in said
    assert "experts: 16 of which a token uses 4" in said
    expert_bytes = sum(data.nbytes for name, (_, data) in tensors.items() if "_exps" in name)
    assert f"expert: {expert_bytes} bytes" in said
    up = next(data for name, (_, data) in tensors.items() if name.endswith("_exps.weight"))
    assert f"largest value {np.abs(up[:2].astype(np.float32)).max():.3f}" in said


def test_halve_experts(model, tmp_path):
    out = tmp_path / "half.gguf"
    said = example("02_halve_experts.py", model, out)
    assert "experts: 16 -> 8" in said and f"{out}: {out.stat().st_size} bytes" in said
    metadata, tensors = read_gguf(out)
    assert metadata["qwen3moe.expert_count"] == 8
    kind, data = tensors["blk.0.ffn_up_exps.weight"]
    assert kind == "Q8_0" and len(data) == 8
    routers = read_gguf(model)[1]["blk.0.ffn_gate_inp.weight"][1]
    best = np.sort(np.argsort(-np.linalg.norm(routers.astype(np.float64), axis=1))[:8])
    assert (tensors["blk.0.ffn_gate_inp.weight"][1] == routers[best]).all()


def test_quantize_to_size(tmp_path):
    parts = quant_models.model("qwen3moe", blocks=2, heads=4, key_heads=2, experts=4)
    for i in range(2):
        parts.add(i, attn_norm=(256,), ffn_norm=(256,), ffn_gate_inp=(4, 256))
        parts.add(i, **{f"attn_{part}": (8, 256) for part in ("q", "k", "v", "output")})
        parts.add(i, **{f"ffn_{part}_exps": (4, 8, 256) for part in ("gate", "up", "down")})
    source, imatrix = parts.write(tmp_path / "model.gguf"), parts.write_imatrix(tmp_path / "imatrix.gguf")
    with pgs.open(source) as opened:
        limit = pgs.Plan(opened).quantize("Q4_K_M", imatrix=imatrix).check().file_bytes
    out = tmp_path / "fitted.gguf"
    said = example("03_quantize_to_size.py", source, imatrix, f"{limit}B", out)
    assert 0.9 * limit < out.stat().st_size <= limit
    types = {kind for kind, data in read_gguf(out)[1].values() if data.ndim > 1}
    assert types <= {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F32"} and len(types) > 2
    assert f"{out}: {out.stat().st_size} bytes" in said

    said = example("03_quantize_to_size.py", source, imatrix, "1KB", tmp_path / "none.gguf", code=1)
    assert "too" in said and not (tmp_path / "none.gguf").exists()


def test_edit_metadata(model, tmp_path):
    said = example("04_edit_metadata.py", model, tmp_path / "edited")
    shards = sorted(tmp_path.glob("edited-*.gguf"))
    assert len(shards) == 2 and all(str(shard) in said for shard in shards)
    metadata, _ = read_gguf(shards[0])
    assert metadata["general.name"] == "An edited model" and metadata["my.tags"] == ["edited", "split"]
    assert "general.size_label" not in metadata
    assert f"{len(read_gguf(model)[1])} tensors, each with the bytes" in said


def test_plan_as_data(model, tmp_path):
    plan, out = tmp_path / "plan.json", tmp_path / "out.gguf"
    said = example("05_plan_as_data.py", model, plan, out)
    check, _, receipt = said.partition("}\n")
    assert json.loads(check + "}")["file_bytes"] == json.loads(receipt)["file_bytes"] == out.stat().st_size
    assert {edit["edit"] for edit in json.loads(plan.read_text())["edits"]} == {"keep_experts", "quantize"}
    assert gguf.GGUFReader(out).fields["qwen3moe.expert_count"].contents() == 12
