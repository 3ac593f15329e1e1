"""Statistics of made-up numbers."""

from __future__ import annotations

import hashlib

import numpy as np

from pygguf_surgery.files import stats as stats_file
from pygguf_surgery.files.stats import LayerStats
from pygguf_surgery.studies import recording


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


def batch(seed, tokens, experts, used, width):
    """ids, gates, outputs and logits of made-up tokens."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(experts)[:used] for _ in range(tokens)]).astype(np.int32)
    return (
        ids,
        rng.random((tokens, used), np.float32),
        rng.standard_normal((tokens, used, width), np.float32),
        rng.standard_normal((tokens, experts), np.float32),
    )


def fold(stats, ids, gates, outputs, logits, *, merge_stats=False):
    """Adds tokens to statistics of a layer."""
    experts = len(stats.count)
    recording.observe(experts, ids, gates, outputs, logits).add_to(stats, gate_in_input=False)
    if merge_stats:
        if stats.gated_sum is None:
            stats.gated_sum = np.zeros((experts, outputs.shape[2]))
        recording.add_gated(stats.gated_sum, ids, gates, outputs, gate_in_input=False)


def some_stats(seed=0, *, text="a", experts=6, layers=(1, 3), merge_stats=True):
    """Complete statistics of no model."""
    stats = stats_file.Stats(
        "00" * 32,
        "test",
        "Test",
        experts,
        8,
        {},
        [stats_file.Text(hashlib.sha256(text.encode()).hexdigest(), 100, 5, 5)],
        12.5,
        30.25,
        20,
    )
    for layer in layers:
        stats.layers[layer] = LayerStats.empty(experts)
        fold(stats.layers[layer], *batch(seed + layer, 40, experts, 2, 5), merge_stats=merge_stats)
    return stats


def same(a, b):
    """Asserts that two statistics are equal."""
    assert {**vars(a), "layers": None} == {**vars(b), "layers": None} and a.layers.keys() == b.layers.keys()
    for layer, stats in a.layers.items():
        other = b.layers[layer]
        assert stats.tokens == other.tokens and stats.arrays().keys() == other.arrays().keys()
        for name, array in stats.arrays().items():
            np.testing.assert_array_equal(array, getattr(other, name))
