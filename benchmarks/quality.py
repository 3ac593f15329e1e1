"""quality.py MODEL TEXT --perplexity SCRIPT [--types Q8_0,Q4_K_M] [--imatrix FILE]: size and perplexity of file types.

SCRIPT is run as `python SCRIPT FILE TEXT --ctx N [--chunks N]` and prints "PPL = 13.4 +/- 0.2 ..." as llama-perplexity
does. A type with "+i" behind it (IQ3_M+i) is made with the importance matrix. "-" is the model itself. The error is
that of the encoded tensors: the mean of sum w (x - y)^2 / sum w x^2, w being the importance if there is a matrix at
all.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile

import numpy as np
from common import MIB

import pygguf_surgery as pgs

TYPES = "-,F16,Q8_0,Q6_K,Q4_K_M,MXFP4_MOE,IQ4_XS,IQ3_M,IQ3_M+i,Q2_K,Q2_K+i"


def error_of(model: pgs.Model, path: str, imatrix: pgs.imatrix.Imatrix | None) -> float:
    errors = []
    with pgs.open(path) as made:
        for name, tensor in made.tensors.items():
            if tensor.type == model.tensors[name].type:
                continue
            x, y = (np.asarray(m.tensors[name].dequantize(), np.float64) for m in (model, made))
            w = np.ones(1)
            if imatrix is not None and name in imatrix.entries:
                w = imatrix.importance(name).reshape(*x.shape[:-2], 1, x.shape[-1]).astype(np.float64)
            errors.append((w * (x - y) ** 2).sum() / (w * x * x).sum())
    return float(np.mean(errors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--perplexity", required=True, metavar="SCRIPT")
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--imatrix")
    parser.add_argument("--ctx", default="256")
    parser.add_argument("--chunks", default="0")
    parser.add_argument("--quality", default="default")
    parser.add_argument("--target-bpw", type=float, help="choose types by error, within the family of each type")
    args = parser.parse_args()
    matrix = pgs.imatrix.open(args.imatrix) if args.imatrix else None
    with tempfile.TemporaryDirectory() as folder, pgs.open(args.model) as model:
        for name in args.types.split(","):
            path, bits, error = args.model, None, ""
            if name != "-":
                path = os.path.join(folder, "out.gguf")
                type, weighted = name.removesuffix("+i"), name.endswith("+i")
                plan = pgs.Plan(model).quantize(type, imatrix=args.imatrix if weighted else None, quality=args.quality)
                if args.target_bpw:
                    plan = plan.fit(bpw=args.target_bpw)
                checked = plan.check()
                bits = 8 * sum(checked.nbytes) / checked.elements
                plan.write(path, overwrite=True)
                error = f"  error {error_of(model, path, matrix):.6f}"
            out = subprocess.run(
                [sys.executable, args.perplexity, path, args.text, "--ctx", args.ctx, "--chunks", args.chunks],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            found = re.search(r"PPL = (\S+) \+/- (\S+)", out)
            print(
                f"{name:<12} {os.path.getsize(path) / MIB:8.2f} MiB {'' if bits is None else f'{bits:.3f} bpw':>10}  "
                f"PPL {float(found[1]):.3f} +/- {float(found[2]):.3f}{error}",
                flush=True,
            )


if __name__ == "__main__":
    main()
