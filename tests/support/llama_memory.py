"""What llama.cpp says that it allocates for a context, and small files of metadata alone to ask it about."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys

import gguf

from support import llama_oracle
from support.gguf_files import make_gguf
from support.places import ROOT

T = gguf.GGUFValueType
U32, F32, STRING, ARRAY, BOOL = T.UINT32, T.FLOAT32, T.STRING, T.ARRAY, T.BOOL

_KV = re.compile(
    r"llama_kv_cache: size = .*\( *(\d+) cells, *(\d+) layers, *\d+/(\d+) seqs\), "
    r"K \(\w+\): *([\d.]+) MiB, V \(\w+\): *([\d.]+) MiB"
)
_STATE = re.compile(
    r"llama_memory_recurrent: size = *([\d.]+) MiB .*R \(f32\): *([\d.]+) MiB, S \(f32\): *([\d.]+) MiB, "
    r"P \(f32\): *([\d.]+) MiB"
)
_COMPRESSOR = re.compile(r"llama_dsv4_comp_state: .* layers = \d+, size = *([\d.]+) MiB")


_ANSWER = "answer "  # before each line of the child; ggml prints others when it aborts


class Asked:
    """llama.cpp in a process of its own, as it aborts on what it does not expect. A context manager."""

    def __init__(self):
        self._child = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._close()

    def _close(self):
        child, self._child = self._child, None
        if child is not None:
            with child:  # closes its pipes, and waits
                pass

    def allocated(self, path, **use):
        """What `allocated` returns. RuntimeError, with llama.cpp's words, where it refuses."""
        if self._child is None:
            command = [sys.executable, "-m", "support.llama_memory"]
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
            self._child = subprocess.Popen(command, cwd=ROOT / "tests", env=environment, **pipes)
        self._child.stdin.write(json.dumps([str(path), use]) + "\n")
        self._child.stdin.flush()
        answer = next((line for line in self._child.stdout if line.startswith(_ANSWER)), None)
        if answer is None:
            self._close()
            raise AssertionError(f"llama.cpp aborted: {use}")
        said = json.loads(answer.removeprefix(_ANSWER))
        if isinstance(said, str):
            raise RuntimeError(said)
        caches, states, compressors = said
        return [tuple(cache) for cache in caches], [tuple(state) for state in states], compressors


def allocated(
    llama, path, *, context, key="F16", value="F16", sequences=1, unified=False, batch=512, flash=True, weights=True
):
    """(caches, states, compressors) as printed: (cells, layers, streams, MiB of keys, of values) of each cache; (all,
    R, S, P) in MiB of the recurrent states. weights: False for a file of metadata alone. Nothing is computed. A text,
    llama.cpp's words, where it refuses."""
    llama.said.clear()
    model = _load(llama, path, weights)
    if not model:
        return "".join(llama.said)[-1500:]
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified, params.n_ubatch = context, sequences, unified, batch
    params.type_k, params.type_v = (gguf.GGMLQuantizationType[type] for type in (key, value))
    params.flash_attn_type, params.swa_full = int(flash), False
    params.n_threads = params.n_threads_batch = 1
    opened = llama.llama_init_from_model(model, params)
    said = "".join(llama.said)
    if opened:
        llama.llama_free(opened)
    llama.llama_model_free(model)
    if not opened:
        return said[-1500:]
    caches = sorted(
        (int(cells), int(layers), int(streams), key_mib, value_mib)
        for cells, layers, streams, key_mib, value_mib in _KV.findall(said)
        if int(layers)
    )
    return caches, _STATE.findall(said), sorted(_COMPRESSOR.findall(said))


def _load(llama, path, weights):
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    if weights:
        return llama.llama_model_load_from_file(str(path).encode(), params)
    lib = llama._lib
    lib.gguf_init_from_file.restype = lib.llama_model_init_from_user.restype = ctypes.c_void_p
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, _Init]
    lib.llama_model_init_from_user.argtypes = [ctypes.c_void_p, _FILL, ctypes.c_void_p, type(params)]
    lib.gguf_free.argtypes, lib.gguf_free.restype = [ctypes.c_void_p], None
    header = lib.gguf_init_from_file(str(path).encode(), _Init(True, None))
    model = lib.llama_model_init_from_user(header, _LEAVE, None, params)
    lib.gguf_free(header)
    return model


class _Init(ctypes.Structure):
    """struct gguf_init_params."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p)]


_FILL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)
_LEAVE = _FILL(lambda tensor, data: None)


def mib(nbytes):
    """As llama.cpp prints it: in float32, two digits."""
    return f"{ctypes.c_float(ctypes.c_float(nbytes).value / ctypes.c_float(1024.0 * 1024.0).value).value:.2f}"


# --- metadata of any architecture -------------------------------------------------------------------------------------

# fmt: off
NUMBERS = {
    "vocab_size": 64, "context_length": 4096, "embedding_length": 256, "features_length": 256,
    "feed_forward_length": 64, "block_count": 4, "leading_dense_block_count": 1, "embedding_length_per_layer_input": 32,
    "attention.head_count": 4, "attention.head_count_kv": 2, "attention.sliding_window": 100,
    "attention.q_lora_rank": 64, "attention.kv_lora_rank": 96, "attention.output_lora_rank": 32,
    "attention.output_group_count": 4, "attention.relative_buckets_count": 8, "attention.group_norm_groups": 8,
    "attention.indexer.head_count": 4, "attention.indexer.key_length": 64, "attention.indexer.top_k": 64,
    "attention.indexer.block_size": 4, "attention.indexer.local_blocks": 1, "attention.indexer.kpool": 4,
    "attention.decay_lora_rank": 32, "attention.iclr_lora_rank": 32, "attention.value_residual_mix_lora_rank": 32,
    "attention.gate_lora_rank": 32, "time_mix_extra_dim": 64, "time_decay_extra_dim": 64, "wkv.head_size": 64,
    "ssm.conv_kernel": 4, "ssm.inner_size": 512, "ssm.state_size": 128, "ssm.time_step_rank": 4, "ssm.group_count": 2,
    "kda.head_dim": 64, "shortconv.l_cache": 3, "attn_res.block_size": 2, "hash_layer_count": 0,
    "hyper_connection.count": 4, "hyper_connection.sinkhorn_iterations": 2, "hyper_connection.low_rank": 8,
}
EXPERTS = {
    "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64,
    "expert_shared_feed_forward_length": 64, "expert_shared_count": 1, "expert_gating_func": 2,
    "interleave_moe_layer_step": 2, "experts_per_group": 1,
    "expert_latent_length": 64,
}
FLOATS = {
    "attention.layer_norm_epsilon": 1e-5, "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.group_norm_epsilon": 1e-5, "attention.max_alibi_bias": 8.0, "attention.clamp_kqv": 1.0,
    "attention.compress_rope_freq_base": 160000.0, "rope.freq_base_swa": 10000.0, "hyper_connection.epsilon": 1e-6,
    "hyper_connection.magnitude": 2.0, "kda.gate_lower_bound": -5.0, "logit_scale": 1.0, "residual_scale": 1.0,
    "activation.situ_beta": 4.0, "activation.situ_linear_beta": 25.0, "expert_weights_scale": 1.0,
    "expert_group_scale": 1.0, "swiglu_clamp_exp": 7.0,
}
_DENSE = frozenset(("llama", "gemma3", "gemma2", "mamba", "mamba2", "rwkv7"))
_SECTIONS = {"rope__dimension_sections": [16, 16, 16, 16]}
_LATENT = {
    "attention__head_count_kv": 1, "attention__key_length": 160, "attention__value_length": 96,
    "attention__key_length_mla": 128, "attention__value_length_mla": 64, "rope__dimension_count": 64,
}
_HYBRID = {"attention__head_count_kv": [0, 1, 0, 1]}
_PATTERN = {"attention__sliding_window_pattern": [1, 0, 1, 1]}
_AS_MANY_HEADS = {"attention__head_count_kv": 4}
# What an architecture needs beside NUMBERS, or otherwise.
WORDS = {
    "arwkv7": {"token_shift_count": 1},
    "bailingmoe3": _LATENT | _HYBRID | {"rope__dimension_sections": [8, 12, 12, 0]},
    "chameleon": {"vocab_size": 10240},
    "deepseek2": _LATENT,
    "deepseek2-ocr": _AS_MANY_HEADS,
    "deepseek32": _LATENT,
    "deepseek4": {
        "attention__head_count_kv": 1, "attention__key_length": 64, "attention__value_length": 64,
        "rope__dimension_count": 32, "attention__compress_ratios": [0, 4, 128, 4], "expert_gating_func": 4,
    },
    "dots1": _AS_MANY_HEADS,
    "dots3note": _LATENT | _PATTERN | {
        "attention__kv_lora_rank_swa": 64, "attention__key_length_swa": 128, "attention__value_length_swa": 64,
        "attention__key_length_mla_swa": 128, "attention__value_length_mla_swa": 64,
        "attention__indexer__types": [0, 1, 0, 0],
    },
    "gemma4": {
        "attention__sliding_window_pattern": [0, 1, 0, 1], "attention__shared_kv_layers": 1,
        "attention__key_length_swa": 32, "attention__value_length_swa": 32,
    },
    "glm-dsa": _LATENT,
    "glm5-next": _LATENT | _HYBRID | {
        "attention__key_length": 96, "rope__dimension_count": 0, "attention__indexer__types": [1, 1, 1, 0],
    },
    "granite_swa": _PATTERN,
    "graniteswitch": {
        "adapters__count": 1, "adapters__lora_rank": 8, "adapters__token_ids_activate": [1],
        "adapters__token_ids_substitute": [2],
    },
    "hrm_text": {"block_count": 6, "hrm__layers_per_stack": 1, "hrm__h_cycles": 2, "hrm__l_cycles": 2},
    "hy_v4": _LATENT | {"attention__indexer__types": [1, 0, 1, 0], "attention__indexer__key_length": 96},
    "kimi-k3": _LATENT | _HYBRID,
    "maple": _PATTERN,
    "mimo2": _PATTERN,
    "minicpm3": _AS_MANY_HEADS | {
        "attention__key_length": 96, "attention__value_length": 64, "rope__dimension_count": 32,
    },
    "minimax-m3": {"attention__indexer__head_count": 2, "rope__dimension_count": 64},
    "mistral4": _LATENT,
    "olmoe": _AS_MANY_HEADS,
    "qwen2vl": _SECTIONS,
    "qwen35": _SECTIONS,
    "qwen35moe": _SECTIONS,
    "qwen3tts": _SECTIONS | {"vocab_size": 3072},
    "qwen3vl": _SECTIONS,
    "qwen3vlmoe": _SECTIONS,
    "qwen4exp": _SECTIONS | {
        "ssm__inner_size": 256, "ssm__time_step_rank": 2, "attention__compress_ratios": [4, 4, 4, 4],
    },
    "rwkv6": {"attention__head_count": 0, "attention__head_count_kv": 0},
    "spark2_5": _PATTERN,
    "step35": _PATTERN,
    "t5encoder": _AS_MANY_HEADS,
}
# fmt: on


def metadata_of(architecture, **words):
    """Metadata that llama.cpp takes for a small model of an architecture, most keys of which it never reads. words:
    keys under the architecture that are other than here, with __ for the dot: numbers, lists of them, or as make_gguf
    takes them."""
    numbers = NUMBERS if architecture in _DENSE else NUMBERS | EXPERTS
    values = {name: (x, U32) for name, x in numbers.items()} | {name: (x, F32) for name, x in FLOATS.items()}
    values |= {"use_parallel_residual": (False, BOOL), "expert_weights_norm": (True, BOOL)}
    for word, value in (WORDS.get(architecture, {}) | words).items():
        kind = (ARRAY, U32) if isinstance(value, list) else (U32,)
        values[word.replace("__", ".")] = value if isinstance(value, tuple) else (value, *kind)
    names = {f"{architecture}.{name}": value for name, value in values.items()}
    names |= {f"xielu.{name}": (1.0, F32) for name in ("alpha_n", "alpha_p", "beta", "eps")}
    return names | {"tokenizer.ggml.model": ("no_vocab", STRING)}


def write_metadata(path, architecture, **words):
    return make_gguf(path, architecture, metadata_of(architecture, **words))


if __name__ == "__main__":
    oracle = llama_oracle.load()
    for line in sys.stdin:
        path, use = json.loads(line)
        print(_ANSWER + json.dumps(allocated(oracle, path, **use)), flush=True)
