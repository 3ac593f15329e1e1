"""llama-quantize's choice of a type for each tensor, as data and one small function per file type.

The facts are those of llama.cpp's src/llama-quant.cpp and include/llama.h of the linked version.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._core import types as _core_types
from ..errors import BadPlan, Unsupported

# llama-quantize's names -> (file-type number, the default type of its tensors). "Q4_K" and its like are aliases there.
FILE_TYPES: dict[str, tuple[int, str]] = {
    "F32": (0, "F32"), "F16": (1, "F16"), "BF16": (32, "BF16"),
    "Q4_0": (2, "Q4_0"), "Q4_1": (3, "Q4_1"), "Q5_0": (8, "Q5_0"), "Q5_1": (9, "Q5_1"), "Q8_0": (7, "Q8_0"),
    "Q1_0": (40, "Q1_0"), "Q2_0": (41, "Q2_0"), "MXFP4_MOE": (38, "MXFP4"),
    "Q2_K": (10, "Q2_K"), "Q2_K_S": (21, "Q2_K"),
    "Q3_K": (12, "Q3_K"), "Q3_K_S": (11, "Q3_K"), "Q3_K_M": (12, "Q3_K"), "Q3_K_L": (13, "Q3_K"),
    "Q4_K": (15, "Q4_K"), "Q4_K_S": (14, "Q4_K"), "Q4_K_M": (15, "Q4_K"),
    "Q5_K": (17, "Q5_K"), "Q5_K_S": (16, "Q5_K"), "Q5_K_M": (17, "Q5_K"), "Q6_K": (18, "Q6_K"),
    "IQ1_S": (24, "IQ1_S"), "IQ1_M": (31, "IQ1_M"),
    "IQ2_XXS": (19, "IQ2_XXS"), "IQ2_XS": (20, "IQ2_XS"), "IQ2_S": (28, "IQ2_XS"), "IQ2_M": (29, "IQ2_S"),
    "IQ3_XXS": (23, "IQ3_XXS"), "IQ3_XS": (22, "IQ3_S"), "IQ3_S": (26, "IQ3_S"), "IQ3_M": (27, "IQ3_S"),
    "IQ4_NL": (25, "IQ4_NL"), "IQ4_XS": (30, "IQ4_XS"), "TQ1_0": (36, "TQ1_0"), "TQ2_0": (37, "TQ2_0"),
}
# Types with a file-type number under another name, or without a name in llama-quantize.
_PLAIN_NUMBERS = {"MXFP4": 38, "NVFP4": 39}
# File types whose mixture is served here; the others only as plain types, with pure.
MIXTURES = ("MXFP4_MOE", "Q8_0", "F16", "BF16", "F32")

# Where a row is no multiple of the left type's block, the right one is used. A block of up to 32 needs no entry: F16.
FALLBACKS = {
    "IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ2_XXS": "IQ4_NL", "IQ2_XS": "IQ4_NL", "IQ2_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL",
    "Q2_0": "Q4_0", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0",
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}

# Tensors that llama-quantize never touches: a part of the name, or the whole.
NEVER_WITH = (
    "_norm.weight",
    "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight",  # routing
    "altup", "laurel", "per_layer_model_proj",  # small ones of gemma3n
    "ssm_conv1d", "shortconv.conv.weight",
    "indexer.k_proj.weight", "indexer.q_proj.weight",
    "time_mix_first.weight", "time_mix_w0.weight", "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight",
    "time_mix_v1.weight", "time_mix_v2.weight", "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight",
    "time_mix_g1.weight", "time_mix_g2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "attn_rel_b.weight",
    ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger",
    "a.rvq.codebook", "mm.a.code_embd",
)
NEVER_NAMED = ("position_embd.weight", "token_types.weight")
NEVER_WITH_IN = {
    "glm5-next": (
        "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate",
        "indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight",
        "ssm_beta.weight",
        "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight"),
}
# Not below Q8_0 in a mixture.
AT_LEAST_Q8_0_IN = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}

OUTPUT = ("output.weight",)
TOKEN_EMBEDDING = ("token_embd.weight", "per_layer_token_embd.weight")
_FFN = ("ffn_up", "ffn_gate", "ffn_down")
# Types that llama-quantize refuses to make without an importance matrix, token embedding and output apart; some of them
# ggml itself cannot make (_core.types: needs_importance).
WANT_IMPORTANCE = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")


@dataclass(frozen=True)
class FileType:
    """What a name given to Plan.quantize means. type is the default type (None: copy everything), number what
    general.file_type becomes (None: unchanged), mixture the rule, or None where every tensor gets `type`."""

    name: str
    type: str | None
    number: int | None
    mixture: str | None


def file_type(name: str, pure: bool) -> FileType:
    """The meaning of `name`, in any case. BadPlan for what is no name, Unsupported for one that is unknown or
    not served without `pure`."""
    name = getattr(name, "name", name)  # also gguf.GGMLQuantizationType
    if not isinstance(name, str):
        raise BadPlan("a file type is a name", object=repr(name), expected="such as MXFP4_MOE")
    name = name.upper()
    if name == "COPY":
        return FileType(name, None, None, None)
    facts = {t["name"]: t for t in _core_types()}
    if pure and name in facts and (name in FILE_TYPES or name in _PLAIN_NUMBERS):
        return FileType(name, name, FILE_TYPES[name][0] if name in FILE_TYPES else _PLAIN_NUMBERS[name], None)
    if pure and name in FILE_TYPES:
        number, type = FILE_TYPES[name]
        return FileType(name, type, number, None)
    if name in MIXTURES:
        number, type = FILE_TYPES[name]
        return FileType(name, type, number, name)
    if name in FILE_TYPES:
        raise Unsupported("the mixture of this file type is not there yet", object=name,
                          hint=f"pure=True (--pure) gives plain {FILE_TYPES[name][1]}; mixtures: "
                               f"{', '.join(MIXTURES)}, COPY")
    if name in _PLAIN_NUMBERS:
        also = ", or the file type MXFP4_MOE" if name == "MXFP4" else ""
        raise Unsupported("a ggml type, not a file type", object=name, hint=f"pure=True (--pure) gives it{also}")
    if name in facts:
        raise Unsupported("ggml does not quantize to this type", object=name)
    raise Unsupported("unknown file type", object=name, hint=nearest(name, [*FILE_TYPES, *_PLAIN_NUMBERS, "COPY"]))


def nearest(name: str, names: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, names, n=3, cutoff=0.3) or sorted(names)[:3]
    return f"nearest: {', '.join(close)}"


def dims(shape: tuple[int, ...]) -> int:
    """As ggml counts them: outermost ones do not count, a scalar has 1."""
    n = len(shape)
    while n > 1 and shape[len(shape) - n] == 1:
        n -= 1
    return max(1, n)


def allows(architecture: str, name: str, shape: tuple[int, ...]) -> bool:
    """Would llama-quantize quantize this tensor?"""
    return (dims(shape) >= 2 and name.endswith("weight") and name not in NEVER_NAMED
            and not any(part in name for part in NEVER_WITH)
            and not any(part in name for part in NEVER_WITH_IN.get(architecture, ())))


def choose(file_type: FileType, architecture: str, name: str, shape: tuple[int, ...], tied: bool) -> str:
    """The type of a tensor that may be quantized, before fallback(). tied: the model has no output.weight."""
    assert file_type.type is not None
    if file_type.mixture == "MXFP4_MOE":
        return _mxfp4_moe(architecture, name, shape, tied)
    # Q8_0: its exceptions (output, falcon, few experts) all say Q8_0 again. F16, BF16, F32: every tensor.
    return file_type.type


def _mxfp4_moe(architecture: str, name: str, shape: tuple[int, ...], tied: bool) -> str:
    if any(part in name for part in AT_LEAST_Q8_0_IN.get(architecture, ())):
        return "Q8_0"
    if name in OUTPUT or tied and name in TOKEN_EMBEDDING:
        return "Q8_0"
    three_dimensional = len(shape) >= 3 and shape[-3] > 1
    # Everywhere else the MLA projections, which are 3-D too, become MXFP4 like experts.
    expert = architecture != "bailingmoe3" or any(part in name for part in _FFN)
    return "MXFP4" if three_dimensional and expert else "Q8_0"


def fallback(type: str, row_elements: int, blocks: dict[str, int]) -> str | None:
    """`type`, or what llama-quantize takes where a row is no multiple of its block; None where it has no answer."""
    if row_elements % blocks[type] == 0:
        return type
    other = FALLBACKS.get(type)
    if other is None:
        return "F16" if blocks[type] <= 32 else None
    return other if row_elements % blocks[other] == 0 else "F16"


def wants_importance(file_type: FileType, name: str, type: str) -> bool:
    """Does llama-quantize refuse to make this tensor without an importance matrix?"""
    if name in OUTPUT or name in TOKEN_EMBEDDING:
        return False
    return type in WANT_IMPORTANCE or type == "Q2_K" and file_type.name == "Q2_K_S"
