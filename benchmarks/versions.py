"""Is a version as fast as another? versions.py OLD_PYTHON NEW_PYTHON MODEL.gguf [--new-path DIR] [--pairs 15] [--jobs
...]

The jobs of prune.py, rewrite.py, jobs.py and merge.py, whole processes of one version and the other in turn: the median
of the pairs' ratios of CPU time and of wall time (new / old), so that a machine whose speed drifts does not decide.
With --instructions each runs once under valgrind's callgrind instead, which counts instructions, on one thread.
OLD_PYTHON and NEW_PYTHON have the package installed; --new-path is a folder with another one that stands before it.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import tempfile
import time

JOBS = {
    "version": ["--version"],
    "info": ["info", "{model}"],
    "plan": ["plan", "{model}", "--keep", "{half}", "--type", "MXFP4_MOE"],
    "rewrite": ["edit", "{model}", "{out}", "--set", "my.key=" + 400 * "x", "--force", "--quiet"],
    "prune": ["prune", "{model}", "{out}", "--keep", "{half}", "--type", "MXFP4_MOE", "--force", "--quiet"],
    "quantize Q4_K_M": ["quantize", "{model}", "{out}", "Q4_K_M", "--force", "--quiet"],
    "quantize MXFP4_MOE": ["quantize", "{model}", "{out}", "MXFP4_MOE", "--force", "--quiet"],
    "merge": ["merge", "{model}", "{out}", "--keep", "{most}", "--weights-only", "--force", "--quiet"],
}
WINDOWS = ["-o", "{out}", "--ctx", "256", "--chunks", "40", "--threads", "1", "--force", "--quiet"]
JOBS_WITH_TEXT = {
    "calibrate": ["calibrate", "{model}", "{text}", *WINDOWS],
    "calibrate merge": ["calibrate", "{model}", "{text}", "--merge-stats", *WINDOWS],
    "repair": ["repair", "{model}", "{text}", "--keep", "{half}", *WINDOWS],
}


def timed(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """(CPU seconds, wall seconds) of a process."""
    begin = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command}: exit {process.returncode}\n{said.decode(errors='replace')[-2000:]}")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - begin


def instructions(command: list[str], environment: dict[str, str]) -> int:
    """Instructions that a process runs."""
    program = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", *command]
    done = subprocess.run(program, env={**environment, "PGS_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return int(re.findall(r"Collected : (\d+)", done.stderr)[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new")
    parser.add_argument("model")
    parser.add_argument("--new-path")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--jobs", nargs="+", choices=[*JOBS, *JOBS_WITH_TEXT], default=list(JOBS))
    parser.add_argument("--text", help="for calibrate and repair, which need llama-cpp-python")
    parser.add_argument("--experts", type=int, default=32, help="how many the model has in a layer")
    parser.add_argument("--instructions", action="store_true")
    args = parser.parse_args()
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if args.text is None and not JOBS.keys() >= set(args.jobs):
        parser.error("calibrate and repair need --text")
    sides = [(args.old, plain), (args.new, {**plain, "PYTHONPATH": args.new_path} if args.new_path else plain)]
    with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(args.model))) as folder:
        os.chdir(folder)  # a checkout in the current folder would be the package
        words = {"model": os.path.abspath(args.model), "out": os.path.join(folder, "out.gguf")}
        words |= {"half": str(args.experts // 2), "most": str(args.experts * 3 // 4)}
        words["text"] = args.text and os.path.abspath(args.text)
        for job in args.jobs:
            arguments = [word.format(**words) for word in (JOBS | JOBS_WITH_TEXT)[job]]
            commands = [([python, "-m", "pygguf_surgery", *arguments], place) for python, place in sides]
            if args.instructions:
                old, new = (instructions(*command) for command in commands)
                print(f"{job:20s} {old:>15,} -> {new:>15,} instructions, {new / old:.4f}", flush=True)
                continue
            pairs = [[timed(*command) for command in commands] for _ in range(args.pairs + 1)][1:]  # the first warms up
            ratios = [statistics.median(new[i] / old[i] for old, new in pairs) for i in (0, 1)]
            seconds = [statistics.median(side[i] for side in one) for one in zip(*pairs, strict=True) for i in (0, 1)]
            print(
                f"{job:20s} CPU {seconds[0]:7.3f} -> {seconds[2]:7.3f} s, {ratios[0]:.3f}   "
                f"wall {seconds[1]:7.3f} -> {seconds[3]:7.3f} s, {ratios[1]:.3f}   ({args.pairs} pairs)",
                flush=True,
            )


if __name__ == "__main__":
    main()
