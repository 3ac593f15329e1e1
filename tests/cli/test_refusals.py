"""What the shell refuses: before it reads weights, with the same words in a run and in a dry run."""

import json
import os

import pytest

from pygguf_surgery.cli import values
from support.gguf_files import read_gguf
from support.small_model import BEST, everything_seen

# --- dry runs --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_written_can_be_described(run, model, tmp_path):
    code, out, _ = run("plan", model, "--keep", 1, "--json")  # 2 are used per token
    assert code == 0 and len(json.loads(out)["blockers"]) == 1
    code, out, err = run("prune", model, tmp_path / "out.gguf", "--keep", 1)
    assert code == 4 and out == "" and "expert_used_count" in err
    assert os.listdir(tmp_path) == []


def test_a_dry_run_is_the_plan_and_writes_nothing(run, model, tmp_path):
    dry = run("prune", model, tmp_path / "out.gguf", "--keep", BEST, "--dry-run")
    assert dry == run("plan", model, "--keep", BEST)
    assert dry[0] == 0 and "experts: 8 -> 4" in dry[1]
    assert os.listdir(tmp_path) == []


REFUSED = {
    "a blocker": ("prune", "{model}", "{folder}/out.gguf", "--keep", 1),
    "two blockers": (
        "quantize",
        "{model}",
        "{folder}/out.gguf",
        "Q8_0",
        "--override",
        "xx=F16",
        "--override",
        "yy=F16",
    ),
    "an output that exists": ("quantize", "{model}", "{folder}/there.gguf", "Q8_0"),
    "an output that exists, by the name that it gets": ("quantize", "{folder}/in.gguf", "Q8_0"),
    "a shard that exists": ("split", "{model}", "{folder}/there", "--split-max-tensors", 100),
    "an input": ("edit", "{folder}/in.gguf", "{folder}/in.gguf", "--force"),
    "a companion": (
        *("quantize", "{model}", "{folder}/imatrix.gguf", "Q8_0"),
        *("--imatrix", "{folder}/imatrix.gguf", "--force"),
    ),
    "no folder": ("join", "{model}", "{folder}/none/out.gguf"),
    "no folder for a merged one": ("merge", "{model}", "{folder}/none/out.gguf", "--keep", BEST, "--weights-only"),
    "a file as folder": ("edit", "{model}", "{folder}/there.gguf/out.gguf"),
    "a folder as output": ("edit", "{model}", "{folder}", "--force"),
    "a folder by its name": ("edit", "{model}", "{folder}/", "--force"),
}


@pytest.mark.parametrize("arguments", REFUSED.values(), ids=REFUSED)
def test_a_dry_run_ends_as_the_run_that_is_refused(run, model, tmp_path, arguments):
    os.link(model, tmp_path / "in.gguf")
    for name in ("there.gguf", "ggml-model-Q8_0.gguf", "there-00001-of-00001.gguf"):
        (tmp_path / name).write_bytes(b"old")
    everything_seen(model, tmp_path / "imatrix.gguf")
    before = {name: os.stat(tmp_path / name).st_mtime_ns for name in os.listdir(tmp_path)}
    arguments = [str(a).format(model=model, folder=tmp_path) for a in arguments]
    code, out, err = run(*arguments, "--quiet")
    assert code == 4 and out == "" and all(": error: " in line for line in err.splitlines())
    assert err.count("\n") == (2 if "yy=F16" in arguments else 1)
    for form in ([], ["--json"]):
        dry_code, dry_out, dry_err = run(*arguments, "--dry-run", "--quiet", *form)
        assert (dry_code, dry_err) == (4, err)
        assert json.loads(dry_out)["tensors"] if form else "tensors: " in dry_out
    assert {name: os.stat(tmp_path / name).st_mtime_ns for name in os.listdir(tmp_path)} == before


@pytest.mark.parametrize("closed", ["folder", "file"])
def test_a_dry_run_sees_what_may_not_be_written(run, model, tmp_path, monkeypatch, closed):
    """Told by os.access, which says yes to everything where root runs the tests."""
    (tmp_path / "there.gguf").write_bytes(b"old")
    shut, access = str(tmp_path / "there.gguf" if closed == "file" else tmp_path), os.access
    monkeypatch.setattr(os, "access", lambda path, *how: str(path) != shut and access(path, *how))
    code, out, err = run("edit", model, tmp_path / "there.gguf", "--force", "--dry-run")
    assert code == 4 and "tensors: " in out and err.endswith(f"error: {shut}: Permission denied\n")
    assert run("edit", model, tmp_path / "there.gguf", "--force") == (4, "", err)
    assert run("plan", model)[0] == 0


def test_a_dry_run_needs_no_name_for_its_output(run, model):
    """Where the run could not make one up."""
    assert run("quantize", model, "--recipe", "mxfp4-moe", "--dry-run")[0] == 0


# --- files that are not there, or in the way -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["info", "plan", "verify"])
def test_a_missing_input_is_3(run, tmp_path, name):
    code, out, err = run(name, tmp_path / "none.gguf")
    assert code == 3 and out == "" and err.count("\n") == 1 and "none.gguf" in err


@pytest.mark.parametrize("content", [b"", b"GGUF", b"<html>not found</html>" * 10, b"GGUF" + b"\xff" * 60])
def test_a_bad_input_is_3(run, tmp_path, content):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    code, out, err = run("info", path)
    assert code == 3 and out == "" and err.count("\n") == 1 and "bad.gguf" in err


def test_a_folder_as_input_is_3(run, tmp_path):
    assert run("info", tmp_path)[0] == 3


def test_an_existing_output_needs_force(run, model, tmp_path):
    out_path = tmp_path / "out.gguf"
    out_path.write_bytes(b"precious")
    code, _, err = run("prune", model, out_path, "--keep", BEST)
    assert code == 4 and "--force" in err and out_path.read_bytes() == b"precious"
    assert run("prune", model, out_path, "--keep", BEST, "--force")[0] == 0
    assert read_gguf(out_path)[0]["qwen3next.expert_count"] == BEST


def test_the_input_as_output_is_4_even_with_force(run, model):
    with open(model, "rb") as f:
        before = f.read()
    assert run("edit", model, model, "--force", "--set", "my.key=1")[0] == 4
    with open(model, "rb") as f:
        assert f.read() == before


def test_a_missing_output_folder_is_4(run, model, tmp_path):
    code, _, err = run("edit", model, tmp_path / "none" / "out.gguf")
    assert code == 4 and err.count("\n") == 1


def test_a_missing_file_of_scores_is_3(run, model, tmp_path):
    assert run("prune", model, tmp_path / "out.gguf", "--keep", 4, "--by", tmp_path / "none.json")[0] == 3


def test_an_unknown_metric_or_type_is_4(run, model, tmp_path):
    assert run("prune", model, tmp_path / "out.gguf", "--keep", 4, "--by", "guess")[0] == 4
    assert run("prune", model, tmp_path / "out.gguf", "--keep", 4, "--by", "reap")[0] == 4
    for arguments in (["out.gguf", "Q4_Z"], ["Q4_Z"]):
        code, out, err = run("quantize", model, *arguments)
        assert (code, out) == (4, "")
        assert err == "gguf-surgery: error: Q4_Z: unknown file type; nearest: Q4_K, Q4_1, Q4_0\n"
    assert os.listdir(tmp_path) == []


# --- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--type", "--by"])
def test_an_empty_option_is_not_the_default(run, model, tmp_path, option):
    code, out, err = run("prune", model, tmp_path / "out.gguf", "--keep", BEST, option, "")
    assert code == 4 and out == "" and "unknown" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--split-max-size", "--split-max-tensors"])
def test_shards_of_nothing_are_refused(run, model, tmp_path, option):
    for words in (["split", model, tmp_path / "out"], ["quantize", model, tmp_path / "out.gguf", "Q8_0"]):
        code, _, err = run(*words, option, 0)
        assert code == 4 and "less than one (found 0)" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [["--imatrix-missing", "ones"], ["--pure"], ["--imatrix", "x"]])
def test_options_of_a_type_without_one(run, model, option):
    code, _, err = run("plan", model, *option)
    assert code == 2 and f"error: {option[0]} goes with a type" in err.replace(chr(10), " ")


def test_the_usage_says_once_what_quantize_takes(run):
    assert run("quantize", "--help")[1].split(chr(10) + chr(10))[0].count("[OUT]") == 1


def test_a_demo_that_keeps_no_expert(run, model):
    code, _, err = run("demo", "--model", model, "--keep", 0)
    assert code == 4 and "cannot keep" in err


def test_what_cannot_be_written_is_said_before_all_weights_are_read(run, model, tmp_path, monkeypatch):
    from pygguf_surgery import _core

    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(_core, "reduce_rows", read)
    for arguments in (["--keep", 1], ["--keep", BEST, "--override", "nothing_here=F16"]):
        code, _, err = run("prune", model, tmp_path / "out.gguf", "--by", "aimer", *arguments)
        assert code == 4 and "error: " in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        *(["prune", "out.gguf", "--keep", BEST, "--plot", name] for name in ("choice.svg", "choice", "png")),
        ["prune", "out.gguf", "--keep", BEST, "--report", ""],
        ["prune", "out.gguf", "--keep", BEST, "--type", "Q4_K_M", "--target-bpw", "nan"],
        ["prune", "out.gguf", "--keep", BEST, "--type", "Q4_K_M", "--target-size", 0],
        ["quantize", "nowhere/out.gguf", "Q4_K_M", "--target-bpw", 5],
        ["merge", "model", "--keep", BEST, "--weights-only", "--force"],
    ],
)
def test_what_is_asked_for_is_looked_at_before_any_weights(run, model, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    os.link(model, "model")
    for room in ("studies.ream.group", "studies.fitting.fit", "studies.scoring.rank"):
        monkeypatch.setattr(f"pygguf_surgery.{room}", lambda *_, **__: pytest.fail("weights were read"))
    code, out, err = run(arguments[0], "model", *arguments[1:])
    assert code == 4 and out == "" and err.count("\n") == 1 and "error: " in err and os.listdir() == ["model"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--report", "out.gguf"],
        ["--report", "a.png", "--plot", "./a.png"],
        ["--target-size", "14GB"],
        ["--target-bpw", "5", "--report", "a.json"],
    ],
)
def test_what_does_not_go_together_is_usage_before_any_weights(run, model, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pygguf_surgery.studies.scoring.rank", lambda *_, **__: pytest.fail("weights were read"))
    code, out, err = run("prune", model, "out.gguf", "--keep", BEST, "--force", *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and os.listdir() == []


@pytest.mark.parametrize("option", ["--target-size", "--split-max-size"])
@pytest.mark.parametrize("size", ["14", "14.5", " 999999"])
def test_a_size_without_a_unit_is_asked_about(run, model, tmp_path, option, size):
    code, _, err = run("quantize", model, tmp_path / "out.gguf", "Q8_0", option, size)
    assert code == 2 and f"give a unit, such as {size.strip()}GB" in err.replace("\n", " ")
    assert values.file_size("1000000") == 1_000_000 and values.file_size("500KB") == 500_000
    assert values.split_size("14K") == 14_000
