"""Small MoE models of several architectures, with the tensor names and shapes that llama.cpp's src/models/*.cpp load.

Each function writes a GGUF file with gguf-py and returns its path. Weights are seeded noise, so a test can tell slices
apart. llama.cpp loads those in LOADABLE; the others have only the tensors that a rule is about.
"""

from __future__ import annotations

import gguf
import numpy as np

from support.gguf_files import make_gguf

T = gguf.GGUFValueType
U32, F32, STRING, ARRAY, BOOL = T.UINT32, T.FLOAT32, T.STRING, T.ARRAY, T.BOOL

D, FF, VOCAB = 32, 32, 48  # n_embd, n_ff_exp, n_vocab


class Builder:
    """Collects tensors (shapes outermost first) and metadata of one model."""

    def __init__(self, architecture, *, blocks, experts, used, seed=0):
        self.architecture, self.experts = architecture, experts
        self.rng = np.random.default_rng(seed)
        self.tensors = {}
        self.metadata = {
            "general.name": (f"Tiny {architecture}", STRING),
            "general.size_label": (f"{experts}x1.5M", STRING),
            f"{architecture}.block_count": (blocks, U32),
            f"{architecture}.context_length": (256, U32),
            f"{architecture}.embedding_length": (D, U32),
            f"{architecture}.feed_forward_length": (FF, U32),
            f"{architecture}.expert_feed_forward_length": (FF, U32),
            f"{architecture}.attention.head_count": (4, U32),
            f"{architecture}.attention.head_count_kv": (2, U32),
            f"{architecture}.attention.key_length": (8, U32),
            f"{architecture}.attention.value_length": (8, U32),
            f"{architecture}.rope.dimension_count": (8, U32),
            f"{architecture}.vocab_size": (VOCAB, U32),
            "tokenizer.ggml.model": ("no_vocab", STRING),
            f"{architecture}.expert_count": (experts, U32),
            f"{architecture}.expert_used_count": (used, U32),
            f"{architecture}.attention.layer_norm_rms_epsilon": (1e-6, F32),
        }
        self.add("token_embd.weight", VOCAB, D, type="F16")
        self.add("output_norm.weight", D)
        self.add("output.weight", VOCAB, D, type="F16")

    def key(self, name, value, *kind):
        self.metadata[f"{self.architecture}.{name}"] = (value, *kind)

    def add(self, name, *shape, type="F32", data=None):
        if data is None:
            data = self.rng.standard_normal(shape, dtype=np.float32)
        if type == "F16":
            data = data.astype(np.float16)
        elif type not in ("F32", "I32"):
            kind = gguf.GGMLQuantizationType[type]
            data = (gguf.quants.quantize(data, kind), kind)
        self.tensors[name] = data

    def attention(self, i, *, q=32, norms=False):
        for part, rows, columns in (("q", q, D), ("k", 16, D), ("v", 16, D), ("output", D, 32)):
            self.add(f"blk.{i}.attn_{part}.weight", rows, columns, type="F16")
        self.add(f"blk.{i}.attn_norm.weight", D)
        if norms:
            self.add(f"blk.{i}.attn_q_norm.weight", 8)
            self.add(f"blk.{i}.attn_k_norm.weight", 8)

    def dense(self, i):
        self.add(f"blk.{i}.ffn_norm.weight", D)
        for part in ("gate", "up", "down"):
            self.add(f"blk.{i}.ffn_{part}.weight", FF, D, type="F16")

    def moe(self, i, *, parts=("gate", "up", "down"), type="F16", bias=False, width=D):
        e, b = self.experts, f"blk.{i}."
        self.add(b + "ffn_gate_inp.weight", e, D)
        for part in parts:
            rows, columns = (width, FF) if part == "down" else (2 * FF if part == "gate_up" else FF, width)
            self.add(f"{b}ffn_{part}_exps.weight", e, rows, columns, type=type)
            if bias:
                self.add(f"{b}ffn_{part}_exps.bias", e, rows)
        if bias:
            self.add(b + "ffn_gate_inp.bias", e)

    def shared(self, i, *, router=False, parts=("gate", "up", "down")):
        if router:
            self.add(f"blk.{i}.ffn_gate_inp_shexp.weight", D)
        for part in parts:
            rows, columns = (D, FF) if part == "down" else (FF, D)
            self.add(f"blk.{i}.ffn_{part}_shexp.weight", rows, columns, type="F16")

    def nextn(self, i):
        self.add(f"blk.{i}.nextn.eh_proj.weight", D, 2 * D, type="F16")
        self.add(f"blk.{i}.nextn.enorm.weight", D)
        self.add(f"blk.{i}.nextn.hnorm.weight", D)
        self.add(f"blk.{i}.nextn.shared_head_norm.weight", D)

    def write(self, path):
        return make_gguf(path, self.architecture, self.metadata, self.tensors)


def qwen3next(path, *, experts=32, mtp=False, type="F16", **extra):
    """Linear attention, every fourth block full attention, shared expert; at 32 experts the slowest axes of the
    shared expert and of others have 32 elements too. mtp: one more block, the MTP one."""
    b = Builder("qwen3next", blocks=5 if mtp else 4, experts=experts, used=4)
    b.key("expert_shared_feed_forward_length", FF, U32)
    for key, value in (
        ("ssm.conv_kernel", 4),
        ("ssm.inner_size", 32),
        ("ssm.state_size", 8),
        ("ssm.time_step_rank", 4),
        ("ssm.group_count", 2),
        ("full_attention_interval", 4),
    ):
        b.key(key, value, U32)
    if mtp:
        b.key("nextn_predict_layers", 1, U32)
        b.key("attention.recurrent_layers", [True, True, True, False, False], ARRAY, BOOL)
    for i in range(5 if mtp else 4):
        if i < 3:
            b.add(f"blk.{i}.attn_norm.weight", D)
            b.add(f"blk.{i}.attn_qkv.weight", 64, D, type="F16")
            b.add(f"blk.{i}.attn_gate.weight", 32, D, type="F16")
            b.add(f"blk.{i}.ssm_conv1d.weight", 64, 4)
            b.add(f"blk.{i}.ssm_dt.bias", 4)
            b.add(f"blk.{i}.ssm_a", 4)
            b.add(f"blk.{i}.ssm_ba.weight", 8, D, type="F16")
            b.add(f"blk.{i}.ssm_norm.weight", 8)
            b.add(f"blk.{i}.ssm_out.weight", D, 32, type="F16")
        else:
            b.attention(i, q=64, norms=True)
        b.add(f"blk.{i}.post_attention_norm.weight", D)
        b.moe(i, type=type)
        b.shared(i, router=True)
    if mtp:
        b.nextn(4)
    b.metadata.update(extra)
    return b.write(path)


def qwen3moe(path, *, experts=16, type="F16"):
    b = Builder("qwen3moe", blocks=2, experts=experts, used=4)
    for i in range(2):
        b.attention(i, norms=True)
        b.add(f"blk.{i}.ffn_norm.weight", D)
        b.moe(i, type=type)
    return b.write(path)


def deepseek2(path, *, experts=16, groups=4, group_used=2):
    """MLA, one leading dense block, sigmoid router with selection bias and groups."""
    b = Builder("deepseek2", blocks=3, experts=experts, used=4)
    for key, value in (
        ("leading_dense_block_count", 1),
        ("expert_shared_count", 1),
        ("expert_gating_func", 2),
        ("attention.q_lora_rank", 16),
        ("attention.kv_lora_rank", 16),
        ("attention.key_length", 20),
        ("attention.value_length", 16),
        ("rope.dimension_count", 4),
        ("attention.key_length_mla", 12),
        ("attention.value_length_mla", 8),
        ("expert_group_count", groups),
        ("expert_group_used_count", group_used),
    ):
        b.key(key, value, U32)
    for i in range(3):
        for name, *shape in (
            ("attn_norm", D),
            ("attn_q_a_norm", 16),
            ("attn_kv_a_norm", 16),
            ("attn_q_a", 16, D),
            ("attn_q_b", 48, 16),
            ("attn_kv_a_mqa", 20, D),
            ("attn_k_b", 4, 16, 8),
            ("attn_v_b", 4, 8, 16),
            ("attn_output", D, 32),
            ("ffn_norm", D),
        ):
            b.add(f"blk.{i}.{name}.weight", *shape)
        if i == 0:
            b.dense(i)
        else:
            b.moe(i)
            b.add(f"blk.{i}.exp_probs_b.bias", experts)
            b.shared(i)
    return b.write(path)


def dots1(path, *, experts=16, groups=0):
    """Attention as in llama, one leading dense block, sigmoid router with a selection bias. It computes finite numbers,
    so that it can be run. groups: the router picks half of as many groups first."""
    b = Builder("dots1", blocks=3, experts=experts, used=4)
    for key, value in (
        ("leading_dense_block_count", 1),
        ("expert_shared_count", 1),
        ("expert_gating_func", 2),
        ("attention.head_count_kv", 4),
    ):
        b.key(key, value, U32)
    if groups:
        b.key("expert_group_count", groups, U32)
        b.key("expert_group_used_count", groups // 2, U32)
    b.key("expert_weights_scale", 1.5, F32)
    b.key("expert_weights_norm", True, BOOL)
    for i in range(3):
        for part in ("q", "k", "v", "output"):
            b.add(f"blk.{i}.attn_{part}.weight", 32, D)
        for name, n in (("attn_norm", D), ("attn_q_norm", 8), ("attn_k_norm", 8), ("ffn_norm", D)):
            b.add(f"blk.{i}.{name}.weight", n)
        if i == 0:
            b.dense(i)
        else:
            b.moe(i, type="F32")
            b.add(f"blk.{i}.exp_probs_b.bias", experts)
            b.shared(i)
    for name, data in b.tensors.items():
        if "norm" in name:
            data[:] = 1 + 0.1 * data
        elif data.ndim > 1:
            data *= 0.3
    return b.write(path)


def gpt_oss(path, *, experts=16):
    """Biases of experts and router, attention sinks."""
    b = Builder("gpt-oss", blocks=2, experts=experts, used=4)
    b.key("attention.sliding_window", 128, U32)
    for i in range(2):
        b.attention(i)
        b.add(f"blk.{i}.attn_output.bias", D)
        b.add(f"blk.{i}.attn_sinks.weight", 4)
        b.add(f"blk.{i}.post_attention_norm.weight", D)
        b.moe(i, type="MXFP4", bias=True)
    return b.write(path)


def llama4(path, *, experts=16):
    """Every second block has experts."""
    b = Builder("llama4", blocks=4, experts=experts, used=1)
    b.key("interleave_moe_layer_step", 2, U32)
    for i in range(4):
        b.attention(i)
        if i % 2:
            b.add(f"blk.{i}.ffn_norm.weight", D)
            b.moe(i)
            b.shared(i)
        else:
            b.dense(i)
    return b.write(path)


def gemma4(path, *, experts=32):
    """Fused gate and up, a dense FFN beside the experts, router scale over n_embd (= E here), scale per expert."""
    b = Builder("gemma4", blocks=2, experts=experts, used=4)
    b.key("attention.sliding_window_pattern", [True, False], ARRAY, BOOL)
    for key, value in (
        ("attention.sliding_window", 128),
        ("attention.key_length_swa", 8),
        ("attention.value_length_swa", 8),
        ("embedding_length_per_layer_input", 0),
    ):
        b.key(key, value, U32)
    b.add("rope_freqs.weight", 4)
    for i in range(2):
        b.attention(i, norms=True)
        b.add(f"blk.{i}.post_attention_norm.weight", D)
        b.dense(i)
        b.add(f"blk.{i}.post_ffw_norm.weight", D)
        b.moe(i, parts=("gate_up", "down"))
        b.add(f"blk.{i}.ffn_gate_inp.scale", D)
        b.add(f"blk.{i}.ffn_down_exps.scale", experts)
        b.add(f"blk.{i}.pre_ffw_norm_2.weight", D)
        b.add(f"blk.{i}.post_ffw_norm_1.weight", D)
        b.add(f"blk.{i}.post_ffw_norm_2.weight", D)
        b.add(f"blk.{i}.layer_output_scale.weight", 1)
    return b.write(path)


def granitehybrid(path, *, experts=8):
    """Mamba and attention blocks, all with experts; the number of KV heads is per block."""
    b = Builder("granitehybrid", blocks=3, experts=experts, used=2)
    b.key("attention.head_count_kv", [0, 0, 2], ARRAY, U32)
    b.key("logit_scale", 1.0, F32)
    for key, value in (
        ("ssm.conv_kernel", 4),
        ("ssm.inner_size", 64),
        ("ssm.state_size", 8),
        ("ssm.time_step_rank", 8),
        ("ssm.group_count", 1),
        ("expert_shared_feed_forward_length", FF),
    ):
        b.key(key, value, U32)
    for i in range(3):
        if i < 2:
            b.add(f"blk.{i}.attn_norm.weight", D)
            for name, *shape in (
                ("ssm_in.weight", 152, D),
                ("ssm_conv1d.weight", 80, 4),
                ("ssm_conv1d.bias", 80),
                ("ssm_dt.bias", 8),
                ("ssm_a", 8, 1),
                ("ssm_d", 8, 1),
                ("ssm_norm.weight", 1, 64),
                ("ssm_out.weight", D, 64),
            ):
                b.add(f"blk.{i}.{name}", *shape)
        else:
            b.attention(i)
        b.add(f"blk.{i}.ffn_norm.weight", D)
        b.moe(i)
        b.shared(i)
    return b.write(path)


def deepseek4(path, *, experts=16, used=4, vocab=VOCAB):
    """The first block looks its experts up by token id (tid2eid); the second has a selection bias, also for images."""
    b = Builder("deepseek4", blocks=2, experts=experts, used=used)
    b.key("hash_layer_count", 1, U32)
    for i in range(2):
        b.attention(i)
        b.moe(i)
        b.shared(i)
        if i == 0:
            table = np.stack([b.rng.permutation(experts)[:used] for _ in range(vocab)]).astype(np.int32)
            b.add("blk.0.ffn_gate_tid2eid.weight", data=table, type="I32")
        else:
            b.add("blk.1.exp_probs_b.bias", experts)
            b.add("blk.1.exp_probs_b_vl.bias", experts)
    return b.write(path)


def grovemoe(path, *, experts=16, per_group=2):
    """Every `per_group` experts share one chunk expert."""
    b = Builder("grovemoe", blocks=2, experts=experts, used=4)
    b.key("experts_per_group", per_group, U32)
    b.key("expert_group_scale", 0.05, F32)
    b.key("expert_chunk_feed_forward_length", FF, U32)
    for i in range(2):
        b.attention(i, norms=True)
        b.add(f"blk.{i}.ffn_norm.weight", D)
        b.moe(i)
        for part in ("gate", "up", "down"):
            rows, columns = (D, FF) if part == "down" else (FF, D)
            b.add(f"blk.{i}.ffn_{part}_chexps.weight", experts // per_group, rows, columns, type="F16")
    return b.write(path)


def nvfp4_scales(path, *, experts=16):
    """Scales per expert of the weights and of their input, as NVFP4 files have them."""
    b = Builder("qwen3moe", blocks=1, experts=experts, used=4)
    b.attention(0, norms=True)
    b.add("blk.0.ffn_norm.weight", D)
    b.moe(0)
    for part in ("gate", "up", "down"):
        b.add(f"blk.0.ffn_{part}_exps.scale", experts)
        b.add(f"blk.0.ffn_{part}_exps.input_scale", experts)
    return b.write(path)


def nemotron(path, *, experts=16):
    """No gate; experts work in a latent space between two dense tensors whose slowest axis is as long as E."""
    b = Builder("nemotron_h_moe", blocks=2, experts=experts, used=4)
    b.key("attention.head_count_kv", [2, 0], ARRAY, U32)
    b.key("feed_forward_length", [0, FF], ARRAY, U32)
    b.key("attention.layer_norm_epsilon", 1e-6, F32)
    for key, value in (
        ("ssm.conv_kernel", 4),
        ("ssm.inner_size", 64),
        ("ssm.state_size", 8),
        ("ssm.group_count", 1),
        ("ssm.time_step_rank", 8),
        ("expert_shared_feed_forward_length", FF),
        ("expert_shared_count", 1),
        ("moe_latent_size", experts),
    ):
        b.key(key, value, U32)
    b.attention(0)
    b.add("blk.1.attn_norm.weight", D)
    b.moe(1, parts=("up", "down"), width=experts)
    b.add("blk.1.exp_probs_b.bias", experts)
    b.add("blk.1.ffn_latent_down.weight", experts, D)
    b.add("blk.1.ffn_latent_up.weight", D, experts)
    b.shared(1, parts=("up", "down"))
    return b.write(path)


ALL = {
    f.__name__: f
    for f in (
        qwen3next,
        qwen3moe,
        deepseek2,
        dots1,
        gpt_oss,
        llama4,
        gemma4,
        granitehybrid,
        deepseek4,
        grovemoe,
        nvfp4_scales,
        nemotron,
    )
}
LOADABLE = [name for name in ALL if name != "deepseek4"]
