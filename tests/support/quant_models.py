"""Small models for the choice of types: enough blocks for the rules about the first and last ones, few and short rows.

llama.cpp's quantizer reads the metadata of an architecture and checks no shapes, so rows are 256 elements where a real
model has thousands. Some are multiples of 32 only (96, 288), some not even that (40): those fall back. Source types are
mixed. Each model comes with an importance matrix as llama-imatrix writes it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import gguf
import numpy as np

from support.gguf_files import make_gguf

T = gguf.GGUFValueType
BF16 = gguf.GGMLQuantizationType.BF16
D = 256  # elements of most rows
NEVER_SEEN = 1  # the expert with a count of zero, wherever there are experts


@dataclass
class Model:
    """tensors: name -> shape, outermost first; no_entry: names that the importance matrix leaves out."""

    architecture: str
    metadata: dict = field(default_factory=dict)
    tensors: dict = field(default_factory=dict)
    no_entry: set = field(default_factory=lambda: {"token_embd.weight", "output.weight"})

    def count(self, **keys):
        """Metadata: "__" in a key is a dot; lists are arrays."""
        for key, value in keys.items():
            key = f"{self.architecture}.{key.replace('__', '.')}"
            self.metadata[key] = (value, T.ARRAY, T.UINT32) if isinstance(value, list) else (value, T.UINT32)

    def real(self, **keys):
        for key, value in keys.items():
            self.metadata[f"{self.architecture}.{key.replace('__', '.')}"] = (value, T.FLOAT32)

    def add(self, block, **rows):
        """blk.{block}.{name}.weight; a number is the row length of a matrix of two rows, a tuple the whole shape."""
        for name, shape in rows.items():
            self.tensors[f"blk.{block}.{name}.weight"] = shape if isinstance(shape, tuple) else (2, shape)

    def values(self, name, shape):
        """Float32, a different sequence for every name."""
        return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)

    def write(self, path):
        encoded = {}
        for i, (name, shape) in enumerate(self.tensors.items()):
            x = self.values(name, shape)
            if len(shape) == 1 or name.endswith("ffn_gate_inp.weight") or i % 3 == 0:
                encoded[name] = x
            elif i % 3 == 1:
                encoded[name] = x.astype(np.float16)
            else:
                encoded[name] = (gguf.quants.quantize(x, BF16), BF16)
        return make_gguf(path, self.architecture, self.metadata, encoded)

    def sums_and_counts(self):
        """name -> float32 [E, row], float32 [E, 1]; E is 1 for a matrix."""
        for name, shape in self.tensors.items():
            if len(shape) < 2 or name in self.no_entry:
                continue
            experts = shape[0] if len(shape) == 3 else 1
            counts = np.arange(3, 3 + experts, dtype=np.float32).reshape(experts, 1)
            sums = self.values("imatrix of " + name, (experts, shape[-1])) ** 2 * counts
            if experts > 1:
                counts[NEVER_SEEN] = 0
                sums[NEVER_SEEN] = 0
            yield name, sums, counts

    def write_imatrix(self, path):
        metadata = {
            "general.type": ("imatrix", T.STRING),
            "imatrix.datasets": (["a.txt", "b.txt"], T.ARRAY, T.STRING),
            "imatrix.chunk_count": (7, T.UINT32),
            "imatrix.chunk_size": (512, T.UINT32),
        }
        tensors = {}
        for name, sums, counts in self.sums_and_counts():
            tensors[name + ".in_sum2"], tensors[name + ".counts"] = sums, counts
        writer = gguf.GGUFWriter(str(path), "imatrix")
        for key, (value, *kind) in metadata.items():
            writer.add_key_value(key, value, kind[0], sub_type=kind[1] if kind[1:] else None)
        for name, x in tensors.items():
            writer.add_tensor(name, x)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def importance(self):
        """name -> float32 [E, row]: what llama-quantize hands to ggml. An expert never seen weighs all alike."""
        out = {}
        for name, sums, counts in self.sums_and_counts():
            rows = np.ones_like(sums)
            seen = counts[:, 0] > 0
            rows[seen] = sums[seen] / counts[seen]
            out[name] = rows
        return out


def model(architecture, *, blocks, heads=8, key_heads=2, experts=0, tied=False, row=D):
    m = Model(architecture)
    m.metadata["tokenizer.ggml.model"] = ("no_vocab", T.STRING)
    m.count(
        block_count=blocks,
        context_length=256,
        embedding_length=row,
        feed_forward_length=D,
        vocab_size=4,
        attention__head_count=heads,
        attention__head_count_kv=key_heads,
        attention__key_length=32,
        attention__value_length=32,
        rope__dimension_count=32,
    )
    m.real(attention__layer_norm_rms_epsilon=1e-6)
    if experts:
        m.count(expert_count=experts, expert_used_count=2, expert_feed_forward_length=D)
    m.tensors["token_embd.weight"] = (4, row)
    m.tensors["output_norm.weight"] = (row,)
    if not tied:
        m.tensors["output.weight"] = (4, row)
    return m


def attention(m, i, row=D):
    m.add(i, attn_norm=(row,), attn_q=row, attn_k=row, attn_v=row, attn_output=D)


def ffn(m, i, row=D):
    m.add(i, ffn_norm=(row,), ffn_gate=row, ffn_up=row, ffn_down=D)


def moe(m, i, experts, row=D, down=D):
    m.add(
        i,
        ffn_norm=(row,),
        ffn_gate_inp=(experts, row),
        ffn_gate_exps=(experts, 2, row),
        ffn_up_exps=(experts, 2, row),
        ffn_down_exps=(experts, 2, down),
    )


def llama():
    """Dense, 4 query heads per key head."""
    m = model("llama", blocks=24, heads=8, key_heads=2)
    for i in range(24):
        attention(m, i)
        ffn(m, i)
    return m


def llama_8_experts():
    """As Mixtral; some blocks have no experts."""
    m = model("llama", blocks=18, heads=8, key_heads=4, experts=8)
    for i in range(18):
        attention(m, i)
        ffn(m, i, row=96) if i % 7 == 3 else moe(m, i, 8)
    return m


def qwen3moe():
    m = model("qwen3moe", blocks=20, heads=4, key_heads=2, experts=3)
    for i in range(20):
        attention(m, i)
        m.add(i, attn_q_norm=(32,), attn_k_norm=(32,))
        moe(m, i, 3, down=96)
    return m


def qwen3next():
    """Linear attention, every fourth block full attention, shared experts, one MTP block."""
    m = model("qwen3next", blocks=19, heads=16, key_heads=2, experts=6)
    m.count(
        nextn_predict_layers=1,
        expert_shared_feed_forward_length=D,
        ssm__conv_kernel=4,
        ssm__inner_size=D,
        ssm__state_size=32,
        ssm__time_step_rank=8,
        ssm__group_count=2,
    )
    m.metadata["qwen3next.attention.recurrent_layers"] = ([i % 4 != 3 and i < 18 for i in range(19)], T.ARRAY, T.BOOL)
    for i in range(19):
        if i % 4 == 3 or i == 18:
            attention(m, i)
        else:
            m.add(i, attn_norm=(D,), attn_qkv=D, attn_gate=D, ssm_conv1d=(D, 4), ssm_ba=288, ssm_norm=(32,), ssm_out=40)
        moe(m, i, 6)
        m.add(i, ffn_gate_inp_shexp=(D,), ffn_gate_shexp=D, ffn_up_shexp=D, ffn_down_shexp=D)
    m.tensors["blk.18.nextn.eh_proj.weight"] = (2, 2 * D)
    m.no_entry |= {"blk.3.attn_v.weight", "blk.7.attn_v.weight"}  # with many heads or experts they need none
    return m


def deepseek2():
    """MLA: attn_k_b and attn_v_b have three dimensions; the first blocks as in older files, with attn_kv_b."""
    m = model("deepseek2", blocks=18, heads=4, key_heads=1, experts=5)
    m.count(
        leading_dense_block_count=2,
        expert_shared_count=1,
        expert_gating_func=2,
        attention__q_lora_rank=D,
        attention__kv_lora_rank=D,
        attention__key_length_mla=96,
        attention__value_length_mla=32,
    )
    for i in range(18):
        m.add(
            i,
            attn_norm=(D,),
            attn_q_a_norm=(D,),
            attn_kv_a_norm=(D,),
            attn_q_a=D,
            attn_q_b=D,
            attn_kv_a_mqa=D,
            attn_output=D,
        )
        m.add(i, attn_kv_b=D) if i < 9 else m.add(i, attn_k_b=(4, 2, 96), attn_v_b=(4, 2, D))
        if i < 2:
            ffn(m, i)
        else:
            moe(m, i, 5)
            m.add(i, ffn_gate_shexp=D, ffn_up_shexp=D, ffn_down_shexp=D)
            m.tensors[f"blk.{i}.exp_probs_b.bias"] = (5,)
    return m


def gemma():
    """Tied: the token embedding is the output. As many key heads as query heads."""
    m = model("gemma", blocks=18, heads=4, key_heads=4, tied=True)
    for i in range(18):
        attention(m, i)
        ffn(m, i)
    return m


def falcon():
    """Fused q, k, v; no gate; rules of its own."""
    m = model("falcon", blocks=32, heads=8, key_heads=1)
    m.real(attention__layer_norm_epsilon=1e-5)
    for i in range(32):
        m.add(i, attn_norm=(D,), attn_qkv=D, attn_output=D, ffn_up=D, ffn_down=D)
    return m


def gpt_oss():
    """Rows of 288, as the 2880 of the real ones no multiple of 256, nor of 64 in the experts: everything falls back."""
    m = model("gpt-oss", blocks=18, heads=8, key_heads=1, experts=4, row=288)
    m.count(attention__sliding_window=128)
    for i in range(18):
        attention(m, i, row=288)
        moe(m, i, 4, row=288, down=288)
        m.tensors[f"blk.{i}.attn_sinks.weight"] = (8,)
        m.tensors[f"blk.{i}.ffn_down_exps.bias"] = (4, 2)
    return m


ALL = {f.__name__: f for f in (llama, llama_8_experts, qwen3moe, qwen3next, deepseek2, gemma, falcon, gpt_oss)}
