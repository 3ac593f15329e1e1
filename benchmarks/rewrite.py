"""A rewrite that moves every data offset against copying the file: rewrite.py MODEL.gguf [--runs 5] [--folder DIR]

Ours: gguf-surgery edit with one long string key added. Theirs: cp --reflink=never, then sync -f of the copy.
Alternating.
"""

import argparse
import os
import statistics
import tempfile

from common import SURGERY, show, timed, warm

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("model")
parser.add_argument("--runs", type=int, default=5)
parser.add_argument("--folder")
args = parser.parse_args()
with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    copy, ours = os.path.join(folder, "copy.gguf"), os.path.join(folder, "ours.gguf")
    cp = ["sh", "-c", 'rm -f "$2"; cp --reflink=never "$1" "$2" && sync -f "$2"', "sh", args.model, copy]
    edit = [
        "sh",
        "-c",
        'rm -f "$1"; shift; exec "$@"',
        "sh",
        ours,
        *SURGERY,
        "edit",
        args.model,
        ours,
        "--quiet",
        "--set",
        f"general.description={'long ' * 1000}",
    ]
    results = {"cp --reflink=never; sync -f": [], "gguf-surgery edit": []}
    warm(args.model, os.path.getsize(args.model))
    for _ in range(args.runs):
        for label, command in zip(results, (cp, edit), strict=True):
            results[label].append(timed(command))
    for label, runs in results.items():
        show(label, [s for s, _ in runs], max(m for _, m in runs))
    a, b = ([s for s, _ in runs] for runs in results.values())
    pairs = ", ".join(f"{y / x:.2f}" for x, y in zip(a, b, strict=True))
    print(f"ours / cp: {statistics.median(b) / statistics.median(a):.3f} of the medians; pairs {pairs}")
