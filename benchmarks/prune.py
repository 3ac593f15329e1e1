"""One pass against slicing with gguf-py and then llama-quantize: prune.py MODEL.gguf [--keep N] [--runs 3]

Both cut the same experts (largest router-row norm) and write MXFP4_MOE. Runs alternate; every tensor of the two results
is compared byte for byte. Needs llama-cpp-python and room for three files in the folder (--folder DIR).
"""

import argparse
import os
import statistics
import sys
import tempfile

from common import SURGERY, equal_tensors, show, timed, warm

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("model")
parser.add_argument("--keep", type=int, default=64)
parser.add_argument("--runs", type=int, default=3)
parser.add_argument("--folder")
args = parser.parse_args()
here = os.path.dirname(os.path.abspath(__file__))
with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    between, theirs, ours = (os.path.join(folder, n) for n in ("between.gguf", "theirs.gguf", "ours.gguf"))
    quo = [sys.executable, os.path.join(here, "status_quo.py"), args.model, between, theirs, str(args.keep)]
    one = [
        *SURGERY,
        "prune",
        args.model,
        ours,
        "--keep",
        str(args.keep),
        "--by",
        "router-norm",
        "--type",
        "MXFP4_MOE",
        "--quiet",
        "--force",
    ]
    sides = {
        "gguf-py slicing + llama-quantize": quo,
        "gguf-surgery prune": one,
        "gguf-surgery prune --memory 192MiB": [*one, "--memory", "192MiB"],
    }
    results = {label: [] for label in sides}
    warm(args.model, os.path.getsize(args.model))
    for _ in range(args.runs):
        for label, command in sides.items():
            results[label].append(timed(command))
    base = statistics.median(s for s, _ in results["gguf-py slicing + llama-quantize"])
    for label, runs in results.items():
        show(label, [s for s, _ in runs], max(m for _, m in runs))
        print(f"{'':44s} {base / statistics.median(s for s, _ in runs):.2f} times as fast as the status quo")
    print(f"{equal_tensors(ours, theirs)} tensors: same types, shapes and bytes")
