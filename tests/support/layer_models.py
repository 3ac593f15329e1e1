"""Models to drop layers of: which of them, and what the metadata says then."""

from __future__ import annotations

import re

import gguf
import numpy as np

import pygguf_surgery as pgs
from support import moe_models
from support.gguf_files import make_gguf

BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
# fmt: off
# What can be dropped of the models in moe_models, and the arrays that must follow. Most have their blocks twice here.
CASES = {
    "qwen3moe": ([0, 3], {}), "deepseek2": ([0, 2], {}), "gpt_oss": ([0, 1], {}), "llama4": ([0, 1, 2, 3], {}),
    "gemma4": ([0], {"attention.sliding_window_pattern": [False, True, False]}),
    "granitehybrid": ([0, 4], {"attention.head_count_kv": [0, 2, 0, 2]}), "grovemoe": ([1], {}),
    "nemotron": ([0], {"attention.head_count_kv": [0, 2, 0], "feed_forward_length": [32, 0, 32]}),
    "qwen3next": ([0, 1, 2, 3], {}),
    "mtp": ([0, 2], {"attention.recurrent_layers": [True, False, False]}),
}
# fmt: on
ONCE = ("deepseek2", "mtp")


def build(name, path):
    if name == "mtp":
        return str(moe_models.qwen3next(path, mtp=True))
    return str(moe_models.ALL[name](path)) if name in ONCE else twice(name, path)


def twice(name, path):
    """A model with its blocks once more behind them, a little larger, so that all differ."""
    reader = gguf.GGUFReader(moe_models.ALL[name](path.with_suffix(".once")))
    architecture = reader.get_field("general.architecture").contents()
    key = f"{architecture}.block_count"
    blocks, metadata, tensors = reader.get_field(key).contents(), {}, {}
    for f in reader.fields.values():
        if not f.name.startswith("GGUF.") and f.name != "general.architecture":
            array, contents = f.types[0] == gguf.GGUFValueType.ARRAY, f.contents()
            contents = 2 * contents if (array and len(contents) == blocks) or f.name == key else contents
            metadata[f.name] = (contents, f.types[0], *(f.types[1:] if array else ()))
    for copy in range(2):
        for t in reader.tensors:
            data, match = t.data, BLOCK.fullmatch(t.name)
            if copy and match and data.dtype.kind == "f":
                data = (data * 1.25).astype(data.dtype)
            new = f"blk.{int(match[1]) + copy * blocks}.{match[2]}" if match else t.name
            tensors[new] = (np.array(data), t.tensor_type)
    return str(make_gguf(path, architecture, metadata, tensors))


def prune(source, target, dropped):
    with pgs.open(str(source)) as opened:
        return pgs.Plan(opened).prune_layers(dropped).write(str(target))
