"""Statistics of made-up numbers that fit a model."""

from __future__ import annotations

import numpy as np

from pygguf_surgery.files import stats as stats_file
from pygguf_surgery.files.stats import LayerStats


def moe_layers(model):
    return sorted({int(name.split(".")[1]) for name in model.tensors if name.endswith("ffn_down_exps.weight")})


def stats_for(model, seed=0, *, unseen=()):
    """Statistics of made-up numbers that fit a model."""
    rng, experts = np.random.default_rng(seed), model.get("expert_count")
    found = [layer for layer in moe_layers(model) if f"blk.{layer}.nextn.eh_proj.weight" not in model.tensors]
    stats = stats_file.Stats(
        model.header_sha256, model.architecture, "Test", experts, 8, {}, [stats_file.Text("00", 100, 5, 5)], 1.0, 1.0, 4
    )
    for layer in found:
        s = LayerStats.empty(experts)
        for name in ("count", "gate_sum", "norm_sum", "norm_sq_sum", "gated_norm_sum", "max_activation"):
            getattr(s, name)[:] = rng.integers(1, 1000, experts)
        for e in unseen:
            for array in s.arrays().values():
                array[e] = 0
        stats.layers[layer] = s
    return stats
