"""The demo: what it prints, that it cleans up, and that its model is a real one."""

import json
import os

import gguf
import numpy as np
import pytest

from pygguf_surgery.cli import main
from pygguf_surgery.cli.commands.demo_model import DemoShape, write_demo_model
from pygguf_surgery.reports.verification import verify


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Where the demo puts its temporary folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_demo_prints_summary_table_time_and_memory_and_cleans_up(temporary, capsys):
    assert main(["demo"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    summary = {line.split()[0]: line for line in lines if line.startswith(("before", "after", "ratio"))}
    assert "64 experts x 4 layers" in summary["before"] and "32 experts x 4 layers" in summary["after"]
    assert "MXFP4_MOE" in summary["after"] and "%" in summary["ratio"]
    header = next(line for line in lines if line.startswith("role"))
    for column in ("types", "before", "after", "cosine", "SNR dB", "relative error"):
        assert column in header
    for role in ("attention", "ssm", "router", "norm", "shared expert", "expert"):
        assert any(line.startswith(role + " ") for line in lines)
    assert any("peak memory" in line and " s " in line for line in lines)
    assert err == "" and os.listdir(temporary) == []


def test_demo_json_keeps_its_files_in_a_folder(tmp_path, capsys):
    assert main(["demo", "--folder", str(tmp_path), "--keep", "16", "--type", "Q8_0", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    source, result = tmp_path / "demo-bf16.gguf", tmp_path / "demo-cut.gguf"
    assert sorted(os.listdir(tmp_path)) == [source.name, result.name]
    assert 90e6 < data["before"]["file_bytes"] == source.stat().st_size < 115e6
    assert data["after"]["file_bytes"] == result.stat().st_size and data["after"]["experts"] == 16
    assert data["seconds"] > 0 and data["peak_memory_bytes"] > 0
    roles = {r["role"]: r for r in data["roles"]}
    assert roles["expert"]["types"] == ["Q8_0"] and 0.999 < roles["expert"]["cosine"] < 1
    assert roles["norm"]["snr_db"] is None
    assert verify(result, source).good


def test_demo_of_a_given_model(temporary, tmp_path_factory, capsys):
    path = tmp_path_factory.mktemp("given") / "given.gguf"
    write_demo_model(path, shape=DemoShape(embedding=64, experts=8, used=2, feed_forward=32, vocabulary=300))
    before = path.read_bytes()
    assert main(["demo", "--model", str(path)]) == 0
    assert "4 experts x 4 layers" in capsys.readouterr().out
    assert path.read_bytes() == before and os.listdir(temporary) == [] and os.listdir(path.parent) == [path.name]


def test_demo_of_a_model_without_experts_is_4(temporary, tmp_path_factory, capsys):
    path = tmp_path_factory.mktemp("dense") / "dense.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert main(["demo", "--model", str(path)]) == 4
    assert "no experts" in capsys.readouterr().err and os.listdir(temporary) == []


def test_same_seed_same_bytes(tmp_path):
    shape = DemoShape(embedding=64, experts=8, used=2, feed_forward=32, vocabulary=300)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_demo_model(tmp_path / name, seed=seed, shape=shape)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_routers_are_heavy_tailed_and_tokens_distinct(tmp_path):
    write_demo_model(tmp_path / "a.gguf", shape=DemoShape(layers=1, feed_forward=32))
    reader = gguf.GGUFReader(str(tmp_path / "a.gguf"))
    router = next(t for t in reader.tensors if t.name == "blk.0.ffn_gate_inp.weight")
    norms = np.linalg.norm(router.data, axis=1)
    assert norms.max() > 2 * np.median(norms) > 4 * norms.min()
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert len(set(tokens)) == len(tokens) == 512


@pytest.mark.parity
def test_llama_cpp_loads_and_runs_the_model_and_the_cut(tmp_path, capsys):
    llama_cpp = pytest.importorskip("llama_cpp")
    assert main(["demo", "--folder", str(tmp_path)]) == 0
    for name in ("demo-bf16.gguf", "demo-cut.gguf"):
        model = llama_cpp.Llama(str(tmp_path / name), n_ctx=64, n_threads=2, verbose=False)
        assert model.n_vocab() == 512
        logits = model.create_completion("hello", max_tokens=4, temperature=0)
        assert logits["usage"]["completion_tokens"] > 0
        model.close()
