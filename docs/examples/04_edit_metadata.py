"""Set and remove metadata, write shards, and prove that no weight changed: 04_edit_metadata.py MODEL.gguf OUT

OUT is the part of the shards' names before -00001-of-00002.gguf. `gguf-surgery verify` checks more than this does.
"""

from __future__ import annotations

import sys

import pygguf_surgery as pgs

source, out = sys.argv[1:]

with pgs.open(source) as model:
    keys = {
        "general.name": "An edited model",  # an existing key keeps its type
        "my.tags": ["edited", "split"],  # a new key gets the type of its value
        "my.version": pgs.Value(2, "u16"),  # or exactly this one
    }
    plan = pgs.Plan(model).set_metadata(keys)
    if "general.size_label" in model.metadata:
        plan = plan.remove_metadata("general.size_label")
    receipt = plan.split(max_tensors=(len(model.tensors) + 1) // 2).write(out)
    print("\n".join(receipt.paths))

    # Opening one shard opens all. strict: what is otherwise a warning is an error.
    with pgs.open(receipt.path, strict=True) as result:
        assert result.metadata["general.name"] == "An edited model"
        assert result.metadata.value("my.version").type == "u16"
        for name, tensor in model.tensors.items():
            assert (tensor.bytes() == result.tensors[name].bytes()).all(), name
    print(f"{len(model.tensors)} tensors, each with the bytes that it had")
