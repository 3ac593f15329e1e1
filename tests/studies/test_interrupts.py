"""Commands that run llama.cpp, as processes: signals at random moments change nothing but the time that it takes."""

import os
import subprocess
import sys

import pytest

from support.places import ROOT, SHARED

TRAINED = SHARED / "models" / "tiny-qwen3next-bf16.gguf"


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
