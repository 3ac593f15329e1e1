"""experts.py MODEL CALIB EVAL --perplexity SCRIPT [--keep 24,16] [--imatrix FILE]: what each choice of experts costs.

SCRIPT is run as `python SCRIPT FILE TEXT --ctx N --chunks N` and prints "PPL = 13.4 +/- 0.2 ..." as llama-perplexity
does. Statistics, and repairs, come from CALIB. Needs llama-cpp-python and scipy.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time

import numpy as np

import pygguf_surgery as pgs

STATS = ("reap", "reap-sum", "weighted-frequency", "frequency", "ean-sum", "ean-mean", "msan")
ROWS = (
    *STATS,
    "imatrix-msan",
    "aimer",
    "router-norm",
    "random 0",
    "random 1",
    "random 2",
    "merge reap",
    "merge reap-sum",
    "merge weights-only",
    "best",
    "repair reap",
    "repair frequency",
    "repair router-norm",
    "repair random 0",
)


class Bench:
    def __init__(self, args: argparse.Namespace, folder: str):
        self.args, self.folder = args, folder
        self.out, self.repair = os.path.join(folder, "out.gguf"), os.path.join(folder, "repair.gguf")
        begin = time.monotonic()
        self.stats = pgs.experts.calibrate(args.model, [args.calib], n_ctx=args.ctx, merge_stats=True)
        print(f"calibrated on {self.stats.tokens} tokens in {time.monotonic() - begin:.0f} s", flush=True)

    def ranking(self, model: pgs.Model, by: str) -> pgs.experts.Ranking:
        if by.startswith("random"):
            rng = np.random.default_rng(int(by.split()[1]))
            return pgs.experts.rank(
                model,
                {
                    "metric": by,
                    "scores": {layer: rng.random(self.stats.experts).tolist() for layer in self.stats.layers},
                },
            )
        return pgs.experts.rank(model, by, stats=self.stats, imatrix=self.args.imatrix)

    def make(self, row: str, keep: int) -> None:
        with pgs.open(self.args.model) as model:
            plan = pgs.Plan(model)
            if row.startswith("merge"):
                by = row.split()[1]
                how = {"weights_only": True} if by == "weights-only" else {"stats": self.stats, "by": by}
                plan = plan.merge_experts(pgs.experts.group(model, keep, **how))
            else:
                kept = self.ranking(model, row.removeprefix("repair ")).keep(keep)
                repair = None
                if row == "best" or row.startswith("repair"):
                    pgs.experts.repair(model, kept, [self.args.calib], self.repair, n_ctx=self.args.ctx, overwrite=True)
                    repair = self.repair
                plan = plan.keep_experts(kept, repair=repair)
            plan.write(self.out, overwrite=True)

    def perplexity(self, path: str) -> str:
        said = subprocess.run(
            [
                sys.executable,
                self.args.perplexity,
                path,
                self.args.eval,
                "--ctx",
                str(self.args.ctx),
                "--chunks",
                str(self.args.chunks),
            ],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        value, error = re.search(r"PPL = ([\d.]+) \+/- ([\d.]+)", said).groups()
        return f"{float(value):.2f} ± {float(error):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "calib", "eval"):
        parser.add_argument(name)
    parser.add_argument("--perplexity", required=True, metavar="SCRIPT")
    parser.add_argument("--imatrix")
    parser.add_argument("--keep", default="24,16")
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--ctx", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=120)
    args = parser.parse_args()
    cuts = [int(n) for n in args.keep.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        print("| experts | " + " | ".join(f"{bench.stats.experts} → {n}" for n in cuts) + " | seconds |")
        print("|---" * (len(cuts) + 2) + "|")
        print(f"| none cut | {bench.perplexity(args.model)} |" + " |" * len(cuts), flush=True)
        for row in args.rows.split(","):
            cells, seconds = [], 0.0
            for n in cuts:
                begin = time.monotonic()
                bench.make(row, n)
                seconds += time.monotonic() - begin
                cells.append(bench.perplexity(bench.out))
            print(f"| {row} | " + " | ".join(cells) + f" | {seconds / len(cuts):.1f} |", flush=True)


if __name__ == "__main__":
    main()
