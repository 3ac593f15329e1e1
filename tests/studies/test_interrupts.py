"""Runs that are stopped: whole windows are kept, the same call goes on, and nothing else is different."""

import importlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

import pygguf_surgery as pgs
from pygguf_surgery.studies import recording
from support import moe_models
from support.expert_stats import same, some_stats
from support.llama_oracle import TOKENS
from support.places import ROOT, SHARED

calibration = importlib.import_module("pygguf_surgery.studies.calibration")
TRAINED = SHARED / "models" / "tiny-qwen3next-bf16.gguf"


@pytest.fixture
def model(tmp_path):
    pytest.importorskip("llama_cpp")
    return moe_models.dots1(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "number, code, word", [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_stopped_command_says_what_is_there(tmp_path, monkeypatch, capsys, number, code, word):
    from pygguf_surgery.cli import main

    def stopped(path, texts, out, **_):
        if "early" not in out:
            stats = some_stats()
            stats.texts[0] = replace(stats.texts[0], done=5 if "whole" in out else 2)
            stats.write(out, overwrite=True)
        os.kill(os.getpid(), number)
        time.sleep(10)

    monkeypatch.setattr(calibration, "calibrate", stopped)

    def run(name, *options):
        code = main(["calibrate", "model.gguf", "text", "-o", str(tmp_path / name), *options])
        return code, capsys.readouterr().err

    for _ in range(2):
        assert run("late.gguf")[0] == code
        assert run("late.gguf", "--force") == (
            code,
            f"gguf-surgery: {word}; the same command goes on from the 2 of 5 windows that {tmp_path}/late.gguf has\n",
        )
    assert run("early.gguf") == (code, f"gguf-surgery: {word}; nothing was written\n")
    (tmp_path / "early.gguf").write_bytes(b"old")
    assert run("early.gguf", "--force") == (code, f"gguf-surgery: {word}; nothing was written\n")
    assert run("whole.gguf") == (0, "")  # too late
    some_stats().write(tmp_path / "early.gguf", overwrite=True)
    assert run("early.gguf", "--force") == (code, f"gguf-surgery: {word}; nothing was written\n")
    assert main(["calibrate", "model.gguf", "-o", str(tmp_path / "x.gguf")]) == 2


@pytest.mark.parity
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("last", [1, 4, 6])
def test_a_stopped_run_goes_on_where_it_was(model, tmp_path, error, last):
    out, texts = tmp_path / "stats.gguf", [TOKENS, TOKENS[:90]]
    raised = error("mine")

    def stop(done, total):
        assert total == 7
        if done == last:
            raise raised

    def run(**options):
        return pgs.experts.calibrate(model, texts, out, n_ctx=40, merge_stats=True, threads=1, **options)

    with pytest.raises(error) as caught:
        run(progress=stop)
    assert caught.value is raised
    part = pgs.experts.open_stats(out)
    assert [text.done for text in part.texts] == [min(last, 5), max(last - 5, 0)]
    assert all(layer.tokens == 40 * last for layer in part.layers.values())
    with pytest.raises(pgs.BadPlan, match="not complete"), pgs.open(model) as opened:
        pgs.experts.rank(opened, "reap", stats=part)
    for other in ({"n_ctx": 20}, {"merge_stats": False}, {"merge_stats": False, "pairs": False}):
        with pytest.raises(pgs.BadPlan, match="another run"):
            pgs.experts.calibrate(model, texts, out, **{"n_ctx": 40, "merge_stats": True, **other})
    calls = []
    resumed = run(progress=lambda done, total: calls.append(done), overwrite=last == 4)
    assert calls == list(range(last + 1, 8)) and resumed.complete
    fresh = pgs.experts.calibrate(model, texts, tmp_path / "fresh.gguf", n_ctx=40, merge_stats=True, threads=1)
    same(resumed, fresh)
    assert out.read_bytes() == (tmp_path / "fresh.gguf").read_bytes()
    with pytest.raises(FileExistsError):
        run()
    run(overwrite=True)
    assert out.read_bytes() == (tmp_path / "fresh.gguf").read_bytes()


@pytest.mark.parity
def test_a_window_that_was_not_whole_counts_nowhere(model, tmp_path, monkeypatch):
    """Older versions could count a part of one: such a file is told from a good one."""
    out, taken = tmp_path / "stats.gguf", []

    class Stop(Exception):
        pass

    def take(self, name, values):
        taken.append(name)
        if len(taken) == 4 * 2 * 3 + 5:  # 4 tensors of 2 layers, the fourth window, in the second layer
            raise Stop
        recording_take(self, name, values)

    recording_take = recording.Recorder.take
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(recording.Recorder, "take", take)
        pgs.experts.calibrate(model, [TOKENS], out, n_ctx=40, threads=1)
    part = pgs.experts.open_stats(out)
    assert part.texts[0].done == 3 and {layer.tokens for layer in part.layers.values()} == {120}
    same(
        pgs.experts.calibrate(model, [TOKENS], out, n_ctx=40, threads=1),
        pgs.experts.calibrate(model, [TOKENS], n_ctx=40, threads=1),
    )
    part.layers[1].tokens += 40
    part.write(out, overwrite=True)
    with pytest.raises(pgs.BadPlan, match="part of a window"):
        pgs.experts.calibrate(model, [TOKENS], out, n_ctx=40)
    pgs.experts.calibrate(model, [TOKENS], out, n_ctx=40, overwrite=True)
    assert pgs.experts.open_stats(out).complete


@pytest.mark.parity
def test_signals_at_random_moments(tmp_path):
    """benchmarks/interrupts.py asserts exit codes, bytes, and that nothing is left behind."""
    pytest.importorskip("llama_cpp")
    if not TRAINED.exists():
        pytest.skip(f"{TRAINED.name} is not here")
    trials = ["--sigint", "6", "--sigterm", "3", "--kill", "3", "--chunks", "10", "--ctx", "64", "--seed", "1"]
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "interrupts.py", TRAINED, TRAINED.parent / "calib.txt", *trials],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("every result byte-equal") == 3
