"""Runs in a child process: the same results and errors, and llama.cpp may abort."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest

import pygguf_surgery as pgs
from pygguf_surgery.files.partial import partial_path
from pygguf_surgery.llama import apart as apart_module
from pygguf_surgery.llama.apart import run_apart
from support import moe_models

# --- functions that the child runs: it finds them in this module -----------------------------------------------------


def twice(number, array):
    return 2 * number, array * 2


def fails(error):
    raise error


def dies(how):
    print("GGML_ASSERT(n_expert > 0) failed", file=sys.stderr, flush=True)
    os.kill(os.getpid(), how)
    time.sleep(60)


def counts(n, progress=None):
    for i in range(n):
        progress(i + 1, n)
    return n


def warns():
    warnings.warn("careful", pgs.SurgeryWarning, stacklevel=1)
    warnings.warn("not ours", UserWarning, stacklevel=1)


def waits(path):
    try:
        with open(path, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(60)
    except KeyboardInterrupt:
        with open(path, "w") as file:
            file.write("stopped")
        raise


def floods(progress=None):
    while True:
        progress(0, 1)


def apart(name, progress=None, **arguments):
    return run_apart(f"llama.test_apart:{name}", arguments, path="model.gguf", progress=progress)


def test_results_errors_and_warnings_come_back():
    number, array = apart("twice", number=21, array=np.arange(1 << 20))
    assert number == 42 and (array == 2 * np.arange(1 << 20)).all()
    with pytest.raises(pgs.BadPlan) as caught:
        apart("fails", error=pgs.BadPlan("mine", object="x", found=3))
    assert vars(caught.value) == vars(pgs.BadPlan("mine", object="x", found=3))
    with pytest.warns(pgs.SurgeryWarning, match="careful") as said:
        apart("warns")
    assert len(said) == 1
    calls = []
    assert apart("counts", n=5000, progress=lambda *now: calls.append(now)) == 5000
    assert calls == [(i + 1, 5000) for i in range(5000)]


@pytest.mark.parametrize("how", [signal.SIGABRT, signal.SIGSEGV, signal.SIGKILL])
def test_a_child_that_dies_is_an_error_with_what_it_said(how):
    with pytest.raises(pgs.BadFile, match="aborts") as caught:
        apart("dies", how=how)
    assert caught.value.found == "GGML_ASSERT(n_expert > 0) failed" and caught.value.path == "model.gguf"


def test_a_child_that_does_not_start_is_an_error_with_what_it_said(monkeypatch):
    monkeypatch.setattr(apart_module, "_CHILD", "import sys; sys.exit('error: no room {pipe}')")
    with pytest.raises(pgs.BadFile, match="no room"):
        apart("twice", number=1, array=np.zeros(1 << 20))


def test_an_interrupt_stops_the_child_first(tmp_path):
    def interrupt():
        while not (tmp_path / "pid").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        apart("waits", path=str(tmp_path / "pid"))
    assert (tmp_path / "pid").read_text() == "stopped"

    def stop(done, total):
        raise error

    error = ValueError("mine")
    with pytest.raises(ValueError) as caught:
        apart("floods", progress=stop)  # a child that waits to be heard hears it too
    assert caught.value is error


def test_a_child_does_not_outlive_its_parent(tmp_path):
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; from pygguf_surgery.llama.apart import run_apart; "
        f"run_apart('llama.test_apart:waits', {{'path': {str(tmp_path / 'pid')!r}}}, path='')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert parent.poll() is None
        time.sleep(0.01)
    pid = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    for _ in range(500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    pytest.fail("it is still there")


# --- llama.cpp -------------------------------------------------------------------------------------------------------

TOKENS = np.random.default_rng(1).integers(0, moe_models.VOCAB, 480)
HALF = {1: tuple(range(8)), 2: tuple(range(4, 12))}


@pytest.mark.parity
def test_calibrate_and_repair_apart_give_the_same(tmp_path):
    pytest.importorskip("llama_cpp")
    path = moe_models.dots1(tmp_path / "model.gguf")
    options = {"n_ctx": 40, "threads": 1}
    results = []
    for name, isolate in (("a", False), ("b", True)):
        calls = []
        stats = pgs.experts.calibrate(
            path, [TOKENS], tmp_path / f"{name}.stats", isolate=isolate, progress=lambda *n: calls.append(n), **options
        )
        with pgs.open(path) as model:
            errors = pgs.experts.repair(model, HALF, [TOKENS], tmp_path / f"{name}.repair", isolate=isolate, **options)
        results.append((calls, stats.perplexity(), errors))
    assert results[0] == results[1]
    for kind in ("stats", "repair"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    assert not os.path.exists(partial_path(tmp_path / "b.repair"))


@pytest.mark.parity
def test_a_file_that_llama_cpp_aborts_on_is_an_error(tmp_path):
    pytest.importorskip("llama_cpp")
    b = moe_models.Builder("qwen3moe", blocks=1, experts=4, used=8)
    b.attention(0)
    b.moe(0)
    with pytest.raises(pgs.BadFile, match="aborts") as caught:
        pgs.experts.calibrate(b.write(tmp_path / "bad.gguf"), [TOKENS], n_ctx=40, isolate=True)
    assert "GGML_ASSERT" in caught.value.found
