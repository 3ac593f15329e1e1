"""The thread that llama.cpp runs in: what interrupts the caller waits for it, and is raised as it is."""

import os
import signal
import threading
import time

import pytest

from pygguf_surgery._core import StopFlag
from pygguf_surgery.llama.worker import Stopped, Worker


@pytest.fixture
def worker():
    made = Worker()
    yield made
    made.close()


def test_results_and_errors_come_back_as_they_are(worker):
    error = ValueError("mine")

    def fail():
        raise error

    assert worker.call(lambda: threading.current_thread().name) == "llama.cpp"
    with pytest.raises(ValueError) as caught:
        worker.call(fail)
    assert caught.value is error and worker.call(lambda: 7) == 7


@pytest.mark.parametrize("interrupts", [1, 3])
def test_an_interrupted_caller_waits_until_nothing_runs(worker, interrupts):
    ended = []

    def work():
        for _ in range(interrupts):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.02)
        while not worker.stop.is_set():
            time.sleep(0.001)
        time.sleep(0.05)
        ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        worker.call(work)
    assert ended == [True]
    with pytest.raises(Stopped):
        worker.call(lambda: ended.append(False))
    assert worker.call(lambda: "freed", always=True) == "freed" and ended == [True]


def test_whatever_a_handler_raises_stops_it(worker):
    class Mine(Exception):
        pass

    def handler(*_):
        raise Mine

    def work():
        os.kill(os.getpid(), signal.SIGUSR1)
        while not worker.stop.is_set():
            time.sleep(0.001)

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        with pytest.raises(Mine):
            worker.call(work)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_callbacks_say_what_the_flag_says():
    import ctypes

    flag = StopFlag()
    abort = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p)(flag.abort_callback)
    goes_on = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_float, ctypes.c_void_p)(flag.progress_callback)
    assert not flag.is_set() and not abort(flag.address) and goes_on(0.5, flag.address)
    flag.set()
    assert flag.is_set() and abort(flag.address) and not goes_on(0.5, flag.address)
