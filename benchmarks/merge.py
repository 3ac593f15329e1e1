"""merge.py MODEL [--keep 384] [--threads N] [--weights-only]: time and memory of merging the experts of a model.

MODEL may be a layer or two of a full-size one. The statistics are made up: they decide who goes with whom, not how long
it takes. The command runs as a process of its own; memory is its peak RSS, and what it left in the page cache.
"""

from __future__ import annotations

import argparse
import os
import tempfile

import numpy as np
from common import MIB, SURGERY, cached_bytes, drop_cache, timed

import pygguf_surgery as pgs
from pygguf_surgery.architecture import experts as roles
from pygguf_surgery.files import stats as stats_file
from pygguf_surgery.files.stats import LayerStats


def made_up_stats(model: pgs.Model, path: str) -> None:
    found = roles.layout(model.architecture, model.tensors, model.metadata.get)
    layers = [layer for layer in found.layers if layer not in found.mtp]
    rng, width = np.random.default_rng(0), model.tensors[f"blk.{layers[0]}.ffn_down_exps.weight"].shape[1]
    stats = stats_file.Stats(
        model.header_sha256,
        model.architecture,
        "",
        found.experts,
        512,
        {},
        [stats_file.Text("", 512, 1, 1)],
        1.0,
        1.0,
        1,
    )
    for layer in layers:
        s = LayerStats.empty(found.experts)
        s.count[:], s.gated_norm_sum[:] = rng.integers(1, 1000, found.experts), rng.random(found.experts)
        s.logit_gram[:] = np.cov(rng.standard_normal((found.experts, 2 * found.experts)))
        s.gated_sum = rng.standard_normal((found.experts, width))
        stats.layers[layer] = s
    stats.write(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--keep", default="384")
    parser.add_argument("--threads", default="0")
    parser.add_argument("--weights-only", action="store_true")
    parser.add_argument("--folder", help="where the output goes (default: beside the model)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder or os.path.dirname(os.path.abspath(args.model))) as folder:
        stats, out = os.path.join(folder, "stats.gguf"), os.path.join(folder, "out.gguf")
        with pgs.open(args.model) as model:
            made_up_stats(model, stats)
            shape = next(t.shape for name, t in model.tensors.items() if name.endswith("ffn_down_exps.weight"))
            layers = sum(name.endswith("ffn_down_exps.weight") for name in model.tensors)
        choice = ["--weights-only"] if args.weights_only else ["--stats", stats]
        drop_cache(args.model)
        before = cached_bytes(args.model)
        seconds, peak = timed(
            [*SURGERY, "merge", args.model, out, "--keep", args.keep, "--threads", args.threads, *choice, "--quiet"]
        )
        cached = cached_bytes(args.model) - before + cached_bytes(out)
        print(
            f"{layers} layers of {shape[0]} experts {shape[2]} x {shape[1]} -> {args.keep}: {seconds:.1f} s, "
            f"{seconds / layers:.1f} s per layer, peak RSS {peak:.0f} MiB, page cache {cached / MIB:+.0f} MiB"
        )


if __name__ == "__main__":
    main()
