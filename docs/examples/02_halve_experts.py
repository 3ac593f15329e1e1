"""Keep half of the experts and quantize, in one pass: 02_halve_experts.py MODEL.gguf OUT.gguf

The router norm needs no text and no statistics. docs/experts.md says what better choices cost and what they bring.
"""

from __future__ import annotations

import sys

import pygguf_surgery as pgs

source, out = sys.argv[1:]

with pgs.open(source) as model:
    ranking = pgs.experts.rank(model, by="router-norm")
    keep = ranking.keep(ratio=0.5)  # {layer: ascending ids of the experts that stay}
    print(keep.summary())

    plan = pgs.Plan(model).keep_experts(keep).quantize("Q8_0")
    checked = plan.check()  # everything about the output, before a byte of it exists
    print(checked.summary())
    if checked.blockers:
        sys.exit("this cannot be written")

    receipt = plan.write(out, memory="256MiB")
    print(f"{receipt.path}: {receipt.file_bytes} bytes in {receipt.seconds:.1f} s")
