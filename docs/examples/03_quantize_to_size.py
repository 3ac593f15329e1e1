"""Choose a type for each tensor, so that the file fits: 03_quantize_to_size.py MODEL.gguf IMATRIX.gguf SIZE OUT.gguf

SIZE is such as 22GB. The importance matrix is that of llama-imatrix; it weighs the error of each column.
"""

from __future__ import annotations

import sys
from collections import Counter

import pygguf_surgery as pgs

source, imatrix, size, out = sys.argv[1:]

with pgs.open(source) as model:
    # The type names the family: fit() chooses among Q2_K, Q3_K, Q4_K, Q5_K, Q6_K and Q8_0.
    plan = pgs.Plan(model).quantize("Q4_K_M", imatrix=imatrix)
    try:
        plan = plan.fit(size=size)
    except pgs.BadPlan as error:  # too small for even the smallest types; the message says what they need
        sys.exit(str(error))

    checked = plan.check()
    print("types:", dict(Counter(tensor.type for tensor in checked.tensors)))
    receipt = plan.write(out)
    print(f"{receipt.path}: {receipt.file_bytes} bytes")
