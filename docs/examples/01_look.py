"""Look into a model: 01_look.py MODEL.gguf

Opening reads the headers only, whatever the size of the file. Of a split model, name any shard.
"""

from __future__ import annotations

import sys
from collections import Counter

import pygguf_surgery as pgs

(path,) = sys.argv[1:]

with pgs.open(path) as model:
    print(f"{model.name}: architecture {model.architecture}, {len(model.tensors)} tensors, {model.file_bytes} bytes")
    print("types:", dict(Counter(tensor.type for tensor in model.tensors.values())))
    print("experts:", model.get("expert_count", 0), "of which a token uses", model.get("expert_used_count", 0))

    # The roles say where the bytes are. A role follows from the name of a tensor alone.
    by_role: Counter[str] = Counter()
    for tensor in model.tensors.values():
        by_role[pgs.experts.role_of(tensor.name)] += tensor.nbytes
    for role, nbytes in by_role.most_common():
        print(f"{role:>14}: {nbytes} bytes")

    # Numbers are decoded when they are asked for: here two experts of the first tensor that has experts.
    for name, tensor in model.tensors.items():
        if name.endswith("_exps.weight"):
            values = tensor.dequantize(experts=[0, 1])  # float32, [2, rows, columns]
            print(f"{name}: {tensor.type} {list(tensor.shape)}, largest value {abs(values).max():.3f}")
            break
