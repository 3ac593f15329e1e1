"""`compare`, and what --measure adds to a command that writes."""

import json

import pytest

import pygguf_surgery as pgs
from pygguf_surgery.cli import main
from pygguf_surgery.cli.common import Terminated
from pygguf_surgery.reports import comparison
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


@pytest.mark.parametrize(
    "command",
    [["prune", "MODEL", "OUT", *KEEP, "--type", "Q8_0"], ["quantize", "MODEL", "OUT", "Q8_0"],
     ["edit", "MODEL", "OUT", "--set", "a.b=c"], ["merge", "MODEL", "OUT", "--keep", "8", "--weights-only"],
     ["quantize", "MODEL", "OUT", "Q8_0", "--split-max-tensors", "5"]],
    ids=lambda command: " ".join(command[:1] + command[3:]),
)  # fmt: skip
def test_measure_gives_what_compare_gives_afterwards(run, model, tmp_path, command):
    if command[0] == "merge":
        pytest.importorskip("scipy")
    out = str(tmp_path / "out.gguf")
    command = [{"MODEL": model, "OUT": out}.get(word, word) for word in command]
    code, printed, _ = run(*command, "--measure", "--json")
    receipt = json.loads(printed)
    assert code == 0 and not faults("receipt", receipt) and not faults("compare", receipt["quality"])
    with pgs.open(model) as source, pgs.open(receipt["path"]) as result:
        assert receipt["quality"] == pgs.report.compare(source, result).to_json()
    code, table, _ = run(*command, "--measure", "--force")
    assert code == 0 and table.startswith(receipt["path"]) and "relative error" in table
    assert "relative error" not in run(*command, "--force")[1]
    assert run(*command, "--measure", "--force", "--quiet")[1:] == ("", "")


def test_measure_is_by_the_plan_s_importance_matrix(model, tmp_path):
    matrix = tmp_path / "imatrix.gguf"
    with pgs.open(model) as source:
        shape = source.tensors[UP].shape
        pgs.imatrix.write(matrix, {UP: ([[1.0] * shape[2]] * shape[0], [1.0] * shape[0])})
        plan = pgs.Plan(source).keep_experts(pgs.experts.rank(source).keep(4)).quantize("Q8_0", imatrix=matrix)
        receipt = plan.write(tmp_path / "out.gguf", measure=True)
        assert plan.write(tmp_path / "plain.gguf").quality is None
    found = {tensor["name"]: tensor["weighted_error"] for tensor in receipt.quality["tensors"]}
    assert found.pop(UP) > 0 and set(found.values()) == {None}
    assert json.loads(json.dumps(receipt.to_json()))["quality"] == receipt.quality


@pytest.mark.parametrize("stop, code", [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_measurement_that_is_stopped_leaves_the_file(run, model, tmp_path, monkeypatch, stop, code):
    def interrupted(*_):
        raise stop

    monkeypatch.setattr(comparison, "piece_sums", interrupted)
    out = tmp_path / "out.gguf"
    found, printed, err = run("quantize", model, out, "Q8_0", "--measure")
    assert found == code and f"{out} is complete, and not measured" in err and "Q8_0" not in printed
    with pgs.open(out) as result:
        assert result.tensors[UP].type == "Q8_0"
