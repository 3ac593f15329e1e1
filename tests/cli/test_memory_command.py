"""gguf-surgery memory: tables and JSON of a model, of what a plan would make of it, and of what fits."""

from __future__ import annotations

import json

import pytest

import pygguf_surgery as pgs
from pygguf_surgery.cli import main
from support import moe_models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(moe_models.qwen3next(tmp_path_factory.mktemp("cli") / "model.gguf"))


@pytest.fixture
def run(capsys):
    """run(*arguments) -> (exit code, stdout, stderr)"""

    def call(*arguments):
        code = main(["memory", *map(str, arguments)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


def test_json_is_what_the_library_returns(run, model):
    options = ("--ctx", 4000, "--parallel", 2, "--kv-unified", "--ubatch-size", 100, "--cache-type-k", "bf16")
    code, out, err = run(model, "--json", *options, "--flash-attn", "off", "--device", "1GiB", "--bandwidth", "1TB/s")
    with pgs.open(model) as opened:
        expected = pgs.report.memory(
            opened, context=4000, parallel=2, unified=True, ubatch=100, type_k="BF16", flash_attention=False,
            device=1 << 30, bandwidth=10**12,
        )  # fmt: skip
    assert (code, err) == (0, "") and json.loads(out) == expected


def test_what_people_see(run, model):
    code, out, err = run(model, "--device", "1GiB")
    assert (code, err) == (0, "")
    for words in ("role", "kv attention", "1 layer of 256 cells", "recurrent state", "an estimate", "trained for 256",
                  "273 GB/s", "device of 1.00 GiB: fits", "more than the model was trained for"):  # fmt: skip
        assert words in out, words
    assert "device of 1.00 KiB: does not fit, and no context does" in run(model, "--device", "1KiB")[1]
    assert "2 sequences of 256" in run(model, "--parallel", 2)[1]
    assert "2 sequences that share them" in run(model, "--parallel", 2, "--kv-unified")[1]


def test_of_what_a_plan_would_make(run, model, tmp_path):
    plan = ("--keep", 8, "--type", "Q8_0", "--set", "general.name=small")
    code, out, err = run(model, "--json", *plan)
    assert (code, err) == (0, "") and main(["prune", model, str(tmp_path / "out.gguf"), *map(str, plan)]) == 0
    after = json.loads(run(tmp_path / "out.gguf", "--json")[1].splitlines()[-1])
    assert json.loads(out) == after
    code, _, err = run(model, "--keep", 2)
    assert code == 0 and "error: " in err  # it cannot be written, and is described all the same, as `plan` does


def test_what_fits(run, model):
    code, out, err = run(model, "--solve", "--device", "1GiB", "--json")
    with pgs.open(model) as opened:
        assert json.loads(out) == pgs.report.solve(opened, device="1GiB") and (code, err) == (0, "")
    code, out, err = run(model, "--solve", "--device", "1GiB")
    assert code == 0 and "smaller types not shown" in out and "256+" in out
    _, one, _ = run(model, "--solve", "--device", "1GiB", "--keep", 16, "--type", "Q8_0")
    assert len(one.splitlines()) == 2 and "16" in one and "Q8_0" in one
    assert run(model, "--solve", "--device", "1KiB")[1] == "nothing fits into 1.00 KiB\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--solve",), 2, "--device"),
        (("--solve", "--device", "1GiB", "--by", "aimer"), 2, "--by"),
        (("--solve", "--device", "1GiB", "--override", "x=F16"), 2, "--override"),
        (("--solve", "--device", "1GiB", "--mtp", "drop"), 2, "--mtp"),
        (("--device", "lots"), 2, "not a size"),
        (("--ctx", "0"), 4, "context"),
        (("--cache-type-v", "Q8_0"), 4, "multiple of the block"),
        (("--cache-type-k", "Q9"), 4, "unknown tensor type"),
        (("--report", "x.json"), 2, "unrecognized"),
    ],
)
def test_what_is_refused(run, model, arguments, code, words):
    try:
        found, _, err = run(model, *arguments)
    except SystemExit as stop:  # argparse's
        found, err = stop.code, words
    assert found == code and words in err


def test_an_architecture_that_is_not_known(run, tmp_path):
    b = moe_models.Builder("newmodel", blocks=1, experts=4, used=2)
    code, _, err = run(b.write(tmp_path / "new.gguf"))
    assert code == 4 and "not known" in err
