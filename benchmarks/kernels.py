"""Encoders and decoders of every set of kernels against the linked ggml: kernels.py [--types Q4_K,MXFP4] [--sets
avx512]

In one process and on one thread: pairs of ggml and ours on the same rows, alternating; CPU time per element of each,
the median of the pairs' ratios, and whether all bytes are equal. What is timed is the whole call (check of the input,
encoding, validation of the output), which costs ggml's side as much as ours. --markdown prints the tables of
docs/performance.md.
"""

import argparse
import os
import statistics
import time

import numpy as np

from pygguf_surgery import _core

ROW = 4096
SETS = ("avx512", "avx2", "sse", "neon", "scalar")


def use(name: str) -> None:
    os.environ["PGS_KERNELS"] = name
    assert _core.kernels() == name


def available(name: str) -> bool:
    try:
        use(name)
    except Exception:
        return False
    return True


def clock(name: str, work) -> tuple[float, bytes]:
    use(name)
    start = time.process_time()
    result = work()
    return time.process_time() - start, result.tobytes()  # the array is free again before the next call


def pairs(name: str, work, elements: int, runs: int) -> tuple[float, float, float, bool]:
    """Medians of (ns per element of ggml, of ours, ratio), and whether all bytes are equal."""
    clock("ggml", work), clock(name, work)
    theirs, ours, equal = [], [], True
    for _ in range(runs):
        seconds, expected = clock("ggml", work)
        theirs.append(seconds)
        seconds, found = clock(name, work)
        ours.append(seconds)
        equal &= found == expected
    ratio = statistics.median(a / b for a, b in zip(theirs, ours, strict=True))
    return statistics.median(theirs) * 1e9 / elements, statistics.median(ours) * 1e9 / elements, ratio, equal


def rows_for(work_of, most: int, seconds: float) -> int:
    """As many rows as take ggml about so long, whole chunks of the core's own size."""
    clock("ggml", work_of(8))
    each = clock("ggml", work_of(8))[0] / 8
    return int(min(most, max(8, seconds / max(each, 1e-9))))


parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--types", help="default: all")
parser.add_argument("--sets", default=",".join(SETS))
parser.add_argument("--runs", type=int, default=9)
parser.add_argument("--markdown", action="store_true")
args = parser.parse_args()
wanted = args.types and [t.upper() for t in args.types.split(",")]
sets = [name for name in args.sets.split(",") if available(name)]
rng = np.random.default_rng(0)
MOST = 256  # rows of 4096: 4 MiB of floats
x = (0.02 * rng.standard_normal((MOST, ROW))).astype(np.float32)
importance = (rng.standard_exponential(ROW) + 0.05).astype(np.float32)[None]
facts = [t for t in _core.types() if wanted is None or t.name in wanted]


def report(label: str, columns: list) -> None:
    cells = [f"{label:18s}", f"{columns[0][0]:8.2f}"]
    for _, ns, ratio, equal in columns:
        cells += [f"{ns:7.2f}", f"{ratio:5.1f}" + ("" if equal else " DIFFERS")]
    print(f"| {' | '.join(cells)} |" if args.markdown else "  ".join(cells), flush=True)


def header(title: str) -> None:
    cells = [title, "ggml ns"] + [cell for name in sets for cell in (f"{name} ns", "ratio")]
    if args.markdown:
        print(f"| {' | '.join(cells)} |\n|{'---|' * len(cells)}")
    else:
        print(f"{cells[0]:18s}", *(f"{cell:>9s}" for cell in cells[1:]))


header("encoding")
for t in facts:
    if not t.encodes or t.name == "F32":
        continue
    for weights in (None, importance):
        if (weights is None and t.needs_importance) or (weights is not None and not t.uses_importance):
            continue

        def encode(n, type=t.id, weights=weights):
            return lambda: _core.quantize(x[:n], type, weights, 1)

        n = rows_for(encode, MOST, 0.06)
        columns = [pairs(name, encode(n), n * ROW, args.runs) for name in sets]
        report(t.name + ("" if weights is None else " imatrix"), columns)
print()
header("decoding")
for t in facts:
    if not (t.decodes and t.encodes) or t.name == "F32":
        continue
    use("ggml")
    encoded = _core.quantize(x[:64], t.id, importance if t.uses_importance else None, 1)
    encoded = np.tile(encoded, (4, 1))

    def decode(encoded=encoded, type=t.id):
        return _core.dequantize(encoded, type, 1)

    report(t.name, [pairs(name, decode, encoded.shape[0] * ROW, args.runs) for name in sets])
