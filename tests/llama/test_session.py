"""A session of llama.cpp: it stops when it is told, whole windows are whole, and its log goes nowhere."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import pygguf_surgery as pgs
from pygguf_surgery.llama import session as sessions
from support import moe_models
from support.llama_oracle import TOKENS

pytestmark = pytest.mark.parity


@pytest.fixture
def model(tmp_path):
    pytest.importorskip("llama_cpp")
    return str(moe_models.dots1(tmp_path / "model.gguf"))


class Everything:
    """A watch of all that the MoE layers compute."""

    def __init__(self):
        self.seen, self.error, self.after = 0, None, -1

    def wants(self, name):
        return name.startswith("ffn_moe_") and "(view)" not in name

    def take(self, name, values):
        self.seen += 1
        if self.seen == self.after:
            raise self.error


@pytest.mark.parametrize("seed", range(20))
def test_windows_are_whole_or_not_at_all(model, seed):
    watch, begun, whole = Everything(), [], []
    tokens = TOKENS[:40].astype(np.int32)
    with sessions.Session(model, n_ctx=40, threads=1, watch=watch) as session:
        session.run(tokens)
        each = watch.seen
        timer = threading.Timer(random.Random(seed).random() * 0.1, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            while True:
                begun.append(watch.seen)
                session.run(tokens, whole.append)
        timer.join()
        assert len(whole) in (len(begun), len(begun) - 1) and len(set(whole)) <= 1
        assert all(seen == each * i for i, seen in enumerate(begun, 1))
        seen = watch.seen
        time.sleep(0.02)
        assert watch.seen == seen  # nothing runs on


@pytest.mark.parametrize("after", [1, 7, 24])
def test_an_error_of_the_watch_is_raised_and_the_session_goes_on(model, after):
    watch, tokens = Everything(), TOKENS[:40].astype(np.int32)
    with sessions.Session(model, n_ctx=40, threads=1, watch=watch) as session:
        right = session.run(tokens)
        watch.error, watch.after = RuntimeError("mine"), watch.seen + after
        with pytest.raises(RuntimeError) as caught:
            session.run(tokens, lambda _: pytest.fail("not whole"))
        assert caught.value is watch.error and watch.seen == watch.after  # it was not asked again
        assert session.run(tokens) == right


def test_a_stop_ends_the_loading_of_a_model_too(model, monkeypatch):
    class Stopping(sessions.Worker):
        def call(self, function, *, always=False):
            def work():
                self.stop.set()
                return function()

            return super().call(work, always=always)

    monkeypatch.setattr(sessions, "Worker", Stopping)
    with pytest.raises(sessions.Stopped):
        sessions.Session(model, n_ctx=40)


def test_no_line_of_the_log_is_printed(model, tmp_path, capfd):
    """Sessions of several threads open and close in any order; what one hears is its own."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(Path(model).read_bytes()[:-4000])
    said, failures = [], []

    def load(path):
        for _ in range(5):
            try:
                with sessions.Session(path, n_ctx=40, threads=1) as session:
                    session.run(TOKENS[:40].astype(np.int32))
            except pgs.BadFile as error:
                said.append(str(error))
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=load, args=(str(path),)) for path in (model, broken, model, broken)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(said) == 10 and all("broken.gguf" in text and "found" in text for text in said)
    assert capfd.readouterr() == ("", "")
    heard = []
    llama = sessions.load()
    mine = llama.llama_log_callback(lambda level, text, data: heard.append(text))
    before = llama.llama_log_callback(), sessions.ctypes.c_void_p()
    llama.llama_log_get(*(sessions.ctypes.byref(x) for x in before))
    llama.llama_log_set(mine, None)
    try:
        with sessions.Session(model, n_ctx=40, threads=1):
            assert not heard
        now = llama.llama_log_callback(), sessions.ctypes.c_void_p()
        llama.llama_log_get(*(sessions.ctypes.byref(x) for x in now))
        cast = [sessions.ctypes.cast(x, sessions.ctypes.c_void_p).value for x in (mine, now[0])]
        assert cast[0] == cast[1]  # given back to whom it belonged
    finally:
        llama.llama_log_set(*before)
