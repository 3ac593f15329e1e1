"""`compare`: what it shows, prints and refuses."""

import json

import pytest

import pygguf_surgery as pgs
from pygguf_surgery.cli import main
from support import moe_models
from support.imatrices import UP
from support.schemas import faults

KEEP = ["--keep", "8", "--by", "router-norm"]


@pytest.fixture
def model(tmp_path):
    return str(moe_models.qwen3moe(tmp_path / "model.gguf", type="F32"))


@pytest.fixture
def run(capsys):
    def call(*args):
        code = main([str(a) for a in args])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_compare_shows_roles_tensors_and_what_it_could_not_compare(run, model, tmp_path):
    out = tmp_path / "out.gguf"
    assert run("prune", model, out, *KEEP, "--prune-layers", "1", "--type", "Q8_0")[0] == 0
    code, table, err = run("compare", model, out)
    assert code == 0 and "warning" not in err
    lines = {line.split("  ")[0]: line for line in table.splitlines()}
    assert "F32 -> Q8_0" in lines["expert"] and "equal" in lines["norm"] and "weighted" not in lines["role"]
    assert "tensors of the source: its layer was dropped: blk.1." in table and "blk.0." not in table
    assert "blk.0.ffn_up_exps.weight" in run("compare", model, out, "--tensors")[1]
    assert "of a sample of the rows" in run("compare", model, out, "--rows", "sample")[1]
    assert run("compare", model, out, "--quiet") == (0, "", "")


def test_compare_prints_what_the_library_gives(run, model, tmp_path):
    out, matrix = tmp_path / "out.gguf", tmp_path / "imatrix.gguf"
    assert run("prune", model, out, *KEEP)[0] == 0
    with pgs.open(model) as source, pgs.open(out) as result:
        shape = source.tensors[UP].shape
        pgs.imatrix.write(matrix, {UP: ([[1.0] * shape[2]] * shape[0], [1.0] * shape[0])})
        found = pgs.report.compare(source, result, imatrix=matrix)
    code, printed, _ = run("compare", model, out, "--imatrix", matrix, "--json", "--threads", "2")
    assert code == 0 and json.loads(printed) == found.to_json() and not faults("compare", json.loads(printed))
    assert "weighted error" in run("compare", model, out, "--imatrix", matrix)[1]


def test_compare_says_what_is_wrong(run, model, tmp_path):
    out = tmp_path / "out.gguf"
    assert run("prune", model, out, *KEEP)[0] == 0
    code, printed, err = run("compare", out, model)
    assert (code, printed) == (4, "") and "second" in err
    assert run("compare", model, tmp_path / "none.gguf")[0] == 3
    assert run("compare", model)[0] == run("compare", model, out, "--rows", "some")[0] == 2
