"""A small mixture-of-experts model to try things on: shaped like Qwen3-Next, seeded, untrained, loads in llama.cpp."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..._core import Value
from ..._core import quantize as encode
from ...files.gguf import write_gguf
from ...quant.types import tensor_type


@dataclass(frozen=True)
class DemoShape:
    """Sizes of the model; the defaults give about 100 MB in BF16. Every fourth layer is attention, the others are gated
    DeltaNet (SSM)."""

    layers: int = 4
    embedding: int = 256
    experts: int = 64
    used: int = 8
    feed_forward: int = 256  # of an expert, and of the shared one
    heads: int = 4
    heads_kv: int = 2
    head: int = 64
    state: int = 64  # SSM head size
    key_heads: int = 2
    value_heads: int = 4
    vocabulary: int = 512


def write_demo_model(
    path: str | os.PathLike[str], *, seed: int = 0, shape: DemoShape = DemoShape(), overwrite: bool = False
) -> None:
    """Writes the model to `path`; the same seed gives the same bytes. Matrices are BF16, vectors and routers F32.

    Router rows have lognormal norms (sigma 0.6): as in trained models a few experts are far more likely than the rest.
    """
    tensors = {
        name: (_data(seed, number, dims, kind), "BF16" if kind == "matrix" else "F32", dims)
        for number, (name, dims, kind) in enumerate(_tensors(shape))
    }
    write_gguf(path, _metadata(shape), tensors, overwrite=overwrite)


def _tensors(s: DemoShape) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """(name, shape outermost first, kind) in file order."""
    d, ff = s.embedding, s.feed_forward
    key, value = s.state * s.key_heads, s.state * s.value_heads
    yield "token_embd.weight", (s.vocabulary, d), "matrix"
    for layer in range(s.layers):
        block = f"blk.{layer}."
        yield block + "attn_norm.weight", (d,), "norm"
        yield block + "post_attention_norm.weight", (d,), "norm"
        if layer % 4 == 3:
            yield block + "attn_q.weight", (2 * s.heads * s.head, d), "matrix"
            yield block + "attn_k.weight", (s.heads_kv * s.head, d), "matrix"
            yield block + "attn_v.weight", (s.heads_kv * s.head, d), "matrix"
            yield block + "attn_output.weight", (d, s.heads * s.head), "matrix"
            yield block + "attn_q_norm.weight", (s.head,), "norm"
            yield block + "attn_k_norm.weight", (s.head,), "norm"
        else:
            yield block + "attn_qkv.weight", (2 * key + value, d), "matrix"
            yield block + "attn_gate.weight", (value, d), "matrix"
            yield block + "ssm_conv1d.weight", (2 * key + value, 4), "vector"
            yield block + "ssm_dt.bias", (s.value_heads,), "vector"
            yield block + "ssm_a", (s.value_heads,), "decay"
            yield block + "ssm_ba.weight", (2 * s.value_heads, d), "matrix"
            yield block + "ssm_norm.weight", (s.state,), "norm"
            yield block + "ssm_out.weight", (d, value), "matrix"
        yield block + "ffn_gate_inp.weight", (s.experts, d), "router"
        yield block + "ffn_gate_exps.weight", (s.experts, ff, d), "matrix"
        yield block + "ffn_up_exps.weight", (s.experts, ff, d), "matrix"
        yield block + "ffn_down_exps.weight", (s.experts, d, ff), "matrix"
        yield block + "ffn_gate_inp_shexp.weight", (d,), "vector"
        yield block + "ffn_gate_shexp.weight", (ff, d), "matrix"
        yield block + "ffn_up_shexp.weight", (ff, d), "matrix"
        yield block + "ffn_down_shexp.weight", (d, ff), "matrix"
    yield "output_norm.weight", (d,), "norm"
    yield "output.weight", (s.vocabulary, d), "matrix"


def _data(seed: int, number: int, dims: tuple[int, ...], kind: str) -> Callable[[], NDArray[Any]]:
    def make() -> NDArray[Any]:
        random = np.random.default_rng((seed, number))
        x = random.standard_normal(dims, dtype=np.float32)
        if kind == "norm":
            x = 1 + np.float32(0.05) * x
        elif kind == "decay":
            x = -np.exp(x)
        else:
            x *= np.float32(0.02)
        if kind == "router":
            x *= random.lognormal(0, 0.6, (dims[0], 1)).astype(np.float32)
        if kind == "matrix":
            return encode(x.reshape(-1, dims[-1]), tensor_type("BF16").id, None, 0)
        return x.view(np.uint8)

    return make


def _metadata(s: DemoShape) -> dict[str, Value]:
    tokens = _vocabulary(s.vocabulary)
    u32 = {
        "block_count": s.layers,
        "context_length": 4096,
        "embedding_length": s.embedding,
        "feed_forward_length": 4 * s.feed_forward,
        "attention.head_count": s.heads,
        "attention.head_count_kv": s.heads_kv,
        "attention.key_length": s.head,
        "attention.value_length": s.head,
        "rope.dimension_count": s.head // 4,
        "expert_count": s.experts,
        "expert_used_count": s.used,
        "expert_feed_forward_length": s.feed_forward,
        "expert_shared_feed_forward_length": s.feed_forward,
        "ssm.conv_kernel": 4,
        "ssm.inner_size": s.state * s.value_heads,
        "ssm.state_size": s.state,
        "ssm.time_step_rank": s.value_heads,
        "ssm.group_count": s.key_heads,
        "full_attention_interval": 4,
    }
    return {
        "general.architecture": Value("qwen3next", "str"),
        "general.type": Value("model", "str"),
        "general.name": Value("demo", "str"),
        **{f"qwen3next.{key}": Value(number, "u32") for key, number in u32.items()},
        "qwen3next.attention.layer_norm_rms_epsilon": Value(1e-6, "f32"),
        "qwen3next.rope.freq_base": Value(1e6, "f32"),
        "general.file_type": Value(32, "u32"),  # MOSTLY_BF16
        "general.quantization_version": Value(2, "u32"),
        "tokenizer.ggml.model": Value("gpt2", "str"),
        "tokenizer.ggml.pre": Value("qwen2", "str"),
        "tokenizer.ggml.tokens": Value(tokens, "str"),
        "tokenizer.ggml.token_type": Value([3 if t.startswith("<|") else 1 for t in tokens], "i32"),  # control, normal
        "tokenizer.ggml.merges": Value(["e r", "i n"], "str"),
        "tokenizer.ggml.eos_token_id": Value(256, "u32"),
        "tokenizer.ggml.add_bos_token": Value(False, "bool"),
    }


def _vocabulary(size: int) -> list[str]:
    """The 256 bytes as GPT-2 spells them (printable ones as themselves, the rest from U+0100), two merges, fillers."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spelled, spare = [], 0x100
    for byte in range(256):
        if byte in printable:
            spelled.append(chr(byte))
        else:
            spelled.append(chr(spare))
            spare += 1
    tokens = [*spelled, "<|end|>", "er", "in"]
    return [*tokens, *(f"<|{n}|>" for n in range(len(tokens), size))]
