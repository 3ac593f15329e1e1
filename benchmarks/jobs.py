"""Whole jobs, process by process: jobs.py MODEL.gguf [--types MXFP4_MOE,Q4_K_M,IQ4_XS] [--runs 3] [--folder DIR]

A rewrite and a prune to half the experts against copying the file (cp, then sync -f), and quantizing to each type,
without and with an importance matrix (made up here), against llama-quantize (through llama-cpp-python, where it is
installed) with as many threads. Runs alternate, the model is in the page cache, and every tensor of the results is
compared byte for byte.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile

import numpy as np
from common import SURGERY, equal_tensors, show, timed, warm

import pygguf_surgery as pgs

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("model")
parser.add_argument("--types", default="MXFP4_MOE,Q4_K_M,IQ4_XS")
parser.add_argument("--runs", type=int, default=3)
parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
parser.add_argument("--folder")
parser.add_argument("--quantize-only", action="store_true")
args = parser.parse_args()


def compare(title: str, theirs: tuple[str, list[str]], ours: list[str]) -> None:
    """Runs both alternately; shows the medians and their ratio."""
    results: dict[str, list[tuple[float, float]]] = {theirs[0]: [], title: []}
    for _ in range(args.runs):
        for label, command in zip(results, (theirs[1], ours), strict=True):
            warm(args.model, os.path.getsize(args.model))
            results[label].append(timed(command))
    for label, runs in results.items():
        show(label, [s for s, _ in runs], max(m for _, m in runs))
    a, b = ([s for s, _ in runs] for runs in results.values())
    print(
        f"{'':44s} {statistics.median(x / y for x, y in zip(a, b, strict=True)):.2f} times as fast (median of pairs)",
        flush=True,
    )


def make_imatrix(path: str) -> None:
    """An entry for each matrix, with a row for each expert."""
    rng = np.random.default_rng(0)
    with pgs.open(args.model) as model:
        entries = {
            name: (
                rng.standard_exponential((int(np.prod(t.shape[:-2])), t.shape[-1])).astype(np.float32) + 0.05,
                np.ones(int(np.prod(t.shape[:-2])), np.float32),
            )
            for name, t in model.tensors.items()
            if len(t.shape) > 1 and name.endswith(".weight") and not name.startswith("token_embd")
        }
    pgs.imatrix.write(path, entries, chunk_count=1, chunk_size=512)


with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    copy, theirs, ours, imatrix = (
        os.path.join(folder, n) for n in ("copy.gguf", "theirs.gguf", "ours.gguf", "im.gguf")
    )
    run = ["--threads", str(args.threads), "--quiet", "--force"]
    if not args.quantize_only:
        cp = "cp", ["sh", "-c", 'rm -f "$2"; cp --reflink=never "$1" "$2" && sync -f "$2"', "sh", args.model, copy]
        compare(
            "edit (rewrite)",
            cp,
            [*SURGERY, "edit", args.model, ours, "--set", f"general.description={'long ' * 1000}", *run],
        )
        compare(
            "prune to half the experts",
            cp,
            [*SURGERY, "prune", args.model, ours, "--ratio", "0.5", "--by", "router-norm", *run],
        )
        os.unlink(copy)
    if importlib.util.find_spec("llama_cpp") is None:
        raise SystemExit("llama-cpp-python is not installed: nothing to compare quantizing with")
    make_imatrix(imatrix)
    here = os.path.dirname(os.path.abspath(__file__))
    for name in args.types.split(","):
        for extra in ([], [imatrix]):
            if extra and name == "MXFP4_MOE":
                continue  # it ignores an importance matrix
            quantize = [
                sys.executable,
                os.path.join(here, "llama_quantize.py"),
                args.model,
                theirs,
                name,
                str(args.threads),
                *extra,
            ]
            label = name + (" with imatrix" if extra else "")
            compare(
                f"{label}: gguf-surgery",
                (f"{label}: llama-quantize", quantize),
                [*SURGERY, "quantize", *(["--imatrix", imatrix] if extra else []), *run, args.model, ours, name],
            )
            print(f"{'':44s} {equal_tensors(ours, theirs)} tensors: same types, shapes and bytes", flush=True)
            os.unlink(theirs)
            os.unlink(ours)
