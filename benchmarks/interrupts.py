"""Stops runs of llama.cpp at random moments and goes on: every exit code, every delay, every result.

    python benchmarks/interrupts.py MODEL TEXT [--sigint 300] [--sigterm 30] [--kill 100] [--chunks 12] [--threads 1]

MODEL is a mixture of experts in GGUF, TEXT a text of at least CHUNKS windows. Each trial runs `calibrate`, `calibrate
--merge-stats` or `repair` in a folder of its own, sends the signal after a random time, and runs the same command again
(or stops it again, up to three times) until it ends by itself. It fails if an exit code is not the signal's, if the
last run is not done, or if its result is not byte for byte that of a run that nobody disturbed. The delay is from the
signal to the end of the process, the writing of what is kept included. The checkpoints of calibrate come every 0.1 s,
so that kill -9 meets them. A signal after the last byte changes nothing: such a run counts as "too late".
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = """import importlib, sys
calibration = importlib.import_module("pygguf_surgery.studies.calibration")
calibration.CHECKPOINT_SECONDS = 0.1
from pygguf_surgery.cli import program
print("ready", flush=True)
program()"""


def start(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """The command, past the start of Python, in which a signal is Python's to handle."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return process


def trial(
    command: list[str], seconds: float, number: signal.Signals, expected: str, draw: random.Random
) -> tuple[list[float], int]:
    """Delays of the runs that were stopped, and how many signals came too late."""
    delays, late = [], 0
    with tempfile.TemporaryDirectory(prefix="interrupts-") as name:
        folder = Path(name)
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            process = start(command, folder)
            time.sleep(draw.random() * seconds)
            process.send_signal(number)
            sent = time.monotonic()
            _, words = process.communicate()
            delay = time.monotonic() - sent
            wanted = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
            if process.returncode == 0 and not words:
                late += 1
                break
            if process.returncode != wanted or b"Traceback" in words or b"Exception ignored" in words:
                raise SystemExit(f"exit {process.returncode}, not {wanted}: {words.decode()[-2000:]}")
            delays.append(delay)
        else:
            process = start(command, folder)
            _, words = process.communicate()
            if process.returncode:
                raise SystemExit(f"the run after it: exit {process.returncode}: {words.decode()[-2000:]}")
        if (found := digest(folder)) != expected:
            raise SystemExit(f"another result: {found}, not {expected}")
        if left := sorted(p.name for p in folder.iterdir() if p.name != "out.gguf"):
            raise SystemExit(f"left behind: {left}")
    return delays, late


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "out.gguf").read_bytes()).hexdigest()


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here, and so be in the processes
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    for option, default in (
        ("sigint", 300),
        ("sigterm", 30),
        ("kill", 100),
        ("chunks", 12),
        ("threads", 1),
        ("ctx", 256),
    ):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--isolate", action="store_true", help="run llama.cpp in child processes")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    args = parser.parse_args()
    draw = random.Random(args.seed)
    texts = [os.path.abspath(args.model), os.path.abspath(args.text), "-o", "out.gguf", "--quiet"]
    texts += ["--ctx", str(args.ctx), "--chunks", str(args.chunks), "--threads", str(args.threads)]
    texts += ["--isolate"] * args.isolate
    commands = {
        "calibrate": ["calibrate", *texts],
        "calibrate --merge-stats": ["calibrate", *texts, "--merge-stats"],
        "repair": ["repair", *texts, "--ratio", "0.5"],
    }
    print(f"seed {args.seed}", flush=True)
    undisturbed = {}
    for name, command in commands.items():
        with tempfile.TemporaryDirectory(prefix="interrupts-") as folder:
            begin = time.monotonic()
            process = start(command, Path(folder))
            begin = time.monotonic()
            _, words = process.communicate()
            if process.returncode:
                raise SystemExit(f"{name}: exit {process.returncode}: {words.decode()[-2000:]}")
            undisturbed[name] = time.monotonic() - begin, digest(Path(folder))
        print(f"{name}: {undisturbed[name][0]:.2f} s undisturbed", flush=True)
    for number, trials in ((signal.SIGINT, args.sigint), (signal.SIGTERM, args.sigterm), (signal.SIGKILL, args.kill)):
        delays: list[float] = []
        late = 0
        for i in range(trials):
            name = list(commands)[i % len(commands)]
            seconds, expected = undisturbed[name]
            more, missed = trial(commands[name], seconds, number, expected, draw)
            delays += more
            late += missed
        if delays:
            ordered = sorted(1000 * delay for delay in delays)
            p50, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.99))
            print(
                f"{number.name}: {trials} trials, {len(delays)} runs stopped, {late} signals too late; delay p50 "
                f"{p50:.0f} ms, p99 {p99:.0f} ms, most {ordered[-1]:.0f} ms; every result byte-equal",
                flush=True,
            )


if __name__ == "__main__":
    main()
