"""repair.py [--experts 256] [--neurons 512] [--width 2048] [--used 10] [--tokens 20000]: time and memory of one layer's
fit.

The tokens are made up; how long llama.cpp takes to run them (twice) comes on top.
"""

from __future__ import annotations

import argparse
import importlib
import resource
import time

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("experts", 256), ("neurons", 512), ("width", 2048), ("used", 10), ("tokens", 20000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    repairing = importlib.import_module("pygguf_surgery.studies.repairs")
    rng = np.random.default_rng(0)
    old = rng.standard_normal((args.experts, args.width, args.neurons), np.float32)
    samples = repairing.Samples(
        args.tokens, range(args.experts), args.experts, gate_in_input=False, scales=None, biases=None
    )
    for start in range(0, args.tokens, 500):
        n = min(500, args.tokens - start)
        ids = np.argsort(rng.random((n, args.experts)), axis=1)[:, : args.used].astype(np.int32)
        samples.add(
            ids,
            rng.random((n, args.used), np.float32),
            rng.standard_normal((n, args.used, args.neurons), np.float32),
            rng.standard_normal((n, args.width), np.float32),
        )
    held = (old.nbytes + samples.inputs.nbytes + samples.outputs.nbytes + samples.ids.nbytes) / 2**30
    begin, sweeps = time.monotonic(), 0
    for ridge in repairing.RIDGES:  # each alone: noise is not predicted better by the next
        repairing.RIDGES, sweeps = (ridge,), sweeps + 1
        repairing.fit(old, samples, args.tokens // 10)
    seconds = time.monotonic() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{args.experts} experts of {args.neurons} x {args.width}, {args.tokens} tokens of {args.used} experts: "
        f"{seconds / sweeps:.1f} s per sweep, at most {sweeps} sweeps; tokens and weights {held:.2f} GiB, peak RSS "
        f"{peak:.2f} GiB"
    )


if __name__ == "__main__":
    main()
