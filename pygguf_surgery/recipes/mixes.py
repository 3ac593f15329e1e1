"""llama-quantize's choice of a type for each tensor: tables, and one walk over the tensors that looks them up.

The facts are those of llama.cpp's src/llama-quant.cpp and include/llama.h of the linked version.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..architecture.keys import read_count
from ..architecture.names import role_of
from ..base.errors import BadPlan, SurgeryError, Unsupported
from ..base.words import nearest_names
from ..quant.types import TYPES, tensor_type

# --- the names ------------------------------------------------------------------------------------------------------

# fmt: off
# llama-quantize's names -> (file-type number, default type of the tensors). The first name of a number stands for it.
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
# fmt: on
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
# Not llama-quantize's: MXFP4_MOE with NVFP4. ggml has the type and the number, llama-quantize no name for it.
OUR_FILE_TYPES: dict[str, tuple[int, str]] = {"NVFP4_MOE": (39, "NVFP4")}
_ALL_FILE_TYPES = FILE_TYPES | OUR_FILE_TYPES
# Types with a file-type number under another name, or without a name in llama-quantize.
_PLAIN_NUMBERS = {"MXFP4": 38, "NVFP4": 39}


@dataclass(frozen=True)
class FileType:
    """What a name given to Plan.quantize means. type is the default type (None: copy everything), number what
    general.file_type becomes (None: unchanged), mixture the file type whose rules apply ("Q4_K_M" for Q4_K), or None
    where every tensor gets `type`. ours: llama-quantize has no such file type."""

    name: str
    type: str | None
    number: int | None
    mixture: str | None
    ours: bool = False


def file_type(name: str, pure: bool) -> FileType:
    """The meaning of `name`, in any case, or a number such as "15". BadPlan for what is not a name, Unsupported for one
    that is unknown or needs `pure`."""
    name = getattr(name, "name", name)  # also gguf.GGMLQuantizationType
    if not isinstance(name, str):
        raise BadPlan("a file type is a name", object=repr(name), expected="such as MXFP4_MOE")
    name = name.upper()
    if name.isdecimal():
        name = next((n for n, (number, _) in FILE_TYPES.items() if str(number) == (name.lstrip("0") or "0")), name)
    if name == "COPY":
        return FileType(name, None, None, None)
    if pure and name in TYPES and (name in FILE_TYPES or name in _PLAIN_NUMBERS):
        # Under pure a name is a ggml type first: llama-quantize's IQ2_S would be IQ2_XS everywhere.
        return FileType(name, name, FILE_TYPES[name][0] if name in FILE_TYPES else _PLAIN_NUMBERS[name], None)
    if name in _ALL_FILE_TYPES:
        number, type = _ALL_FILE_TYPES[name]
        return FileType(name, type, number, None if pure else ALIASES.get(name, name), name in OUR_FILE_TYPES)
    if name in _PLAIN_NUMBERS:
        raise Unsupported(
            "a ggml type, not a file type",
            object=name,
            hint=f"pure=True (--pure) gives it, or the file type {name}_MOE",
        )
    if name in TYPES:
        raise Unsupported("ggml does not quantize to this type", object=name)
    raise Unsupported("unknown file type", object=name, hint=nearest(name, [*_ALL_FILE_TYPES, *_PLAIN_NUMBERS, "COPY"]))


def nearest(name: str, names: list[str]) -> str:
    """The hint of an error, whatever was written."""
    return nearest_names(name, names, 0.3) or f"nearest: {', '.join(sorted(names)[:3])}"


# --- which tensors --------------------------------------------------------------------------------------------------

# fmt: off
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
# fmt: on
NEVER_NAMED = ("position_embd.weight", "token_types.weight")
# fmt: off
NEVER_WITH_IN = {
    "glm5-next": (
        "hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate",
        "indexer_compressor_ape", "ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight",
        "ssm_beta.weight",
        "attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight"),
}
# fmt: on
OUTPUT = ("output.weight",)
TOKEN_EMBEDDING = ("token_embd.weight", "per_layer_token_embd.weight")


def dims(shape: tuple[int, ...]) -> int:
    """As ggml counts them: outermost ones do not count, a scalar has 1."""
    n = len(shape)
    while n > 1 and shape[len(shape) - n] == 1:
        n -= 1
    return max(1, n)


def allows(architecture: str, name: str, shape: tuple[int, ...], leave_output: bool = False) -> bool:
    """Would llama-quantize quantize this tensor? leave_output: its --leave-output-tensor."""
    return (
        dims(shape) >= 2
        and name.endswith("weight")
        and name not in NEVER_NAMED
        and not (leave_output and name in OUTPUT)
        and not any(part in name for part in NEVER_WITH)
        and not any(part in name for part in NEVER_WITH_IN.get(architecture, ()))
    )


# --- the model ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFacts:
    """What the choice depends on beside names and shapes. blocks: llama.cpp's n_layer_all, MTP layers included.
    experts: n_expert, 0 in a dense model. gqa: query heads per key head in the first block, 0 if it has none."""

    architecture: str
    blocks: int
    experts: int
    gqa: int
    is_70b: bool


# The number of blocks at which llama.cpp calls a model of the architecture 70B.
BLOCKS_OF_70B = {"llama": 80, "llama-embed": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


def model_facts(architecture: str, get: Callable[[str], Any]) -> ModelFacts:
    """get: a full metadata key -> its plain value, or None. What is missing counts as 0, as in llama.cpp; BadFile for a
    value that is not a count."""

    def count(key: str, default: int = 0) -> int:
        return read_count(get, f"{architecture}.{key}", default)

    def of_first_block(key: str, default: int) -> int:
        name = f"{architecture}.{key}"
        value = get(name)
        if isinstance(value, list):  # one number per block
            value = value[0] if value else 0
        return read_count(lambda _: value, name, default)

    blocks, experts = count("block_count"), count("expert_count")
    without_mtp = max(0, blocks - count("nextn_predict_layers"))
    heads = of_first_block("attention.head_count", 0)
    key_heads = of_first_block("attention.head_count_kv", heads)
    is_70b = BLOCKS_OF_70B.get(architecture) == without_mtp
    if architecture in ("llama", "llama-embed"):
        is_70b = is_70b and experts != 8 and heads != key_heads
    if architecture == "graniteswitch":  # its adapter router is one block more
        blocks = without_mtp + 1
    elif architecture == "nanbeige" and (loops := count("num_loops", 1)) > 1:  # the same blocks several times
        blocks = without_mtp * loops
    return ModelFacts(architecture, blocks, experts, heads // key_heads if key_heads else 0, is_70b)


_LAYER = re.compile(r"blk\.[ \t\n\v\f\r]*([+-]?[0-9]+)")


def _layer(name: str) -> int | None:
    """As C's sscanf reads "blk.%d.": "blk.07" is 7 and the last dot need not be there."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def loader_order(names: Iterable[str]) -> list[str]:
    """The order in which llama.cpp keeps the tensors of a model: by layer number, those without one first, then by the
    bytes of the name."""

    def key(name: str) -> tuple[int, bytes]:
        layer = _layer(name)
        return -1 if layer is None else layer, name.encode("utf-8", "surrogateescape")

    return sorted(names, key=key)


# --- the rules ------------------------------------------------------------------------------------------------------

# fmt: off
# The first part that a name contains gives its category. attn_qkv and attn_kv_b count as attention values.
CATEGORIES = (
    ("attn_qkv.weight", "attn_v"), ("attn_kv_b.weight", "attn_v"), ("attn_v.weight", "attn_v"),
    ("attn_k.weight", "attn_k"), ("attn_q.weight", "attn_q"), ("attn_output.weight", "attn_output"),
    ("ffn_up", "ffn_up"), ("ffn_gate", "ffn_gate"), ("ffn_down", "ffn_down"),
)
# fmt: on

# Three groups of file types that share rules.
_IQ2_S = ("IQ2_S", "IQ2_M")
_IQ1 = ("IQ1_S", "IQ1_M")
VERY_LOW_BIT = ("IQ2_XXS", "IQ2_XS", *_IQ1, *_IQ2_S)
_UNQUANTIZED = ("F32", "F16", "BF16")
_ANY = tuple(n for n in FILE_TYPES if n not in (*ALIASES, *_UNQUANTIZED, "MXFP4_MOE"))
_OTHERS = tuple(n for n in _ANY if n not in VERY_LOW_BIT)


def _each(*groups: tuple[Sequence[str], str]) -> dict[str, str]:
    return {file_type: type for names, type in groups for file_type in names}


# A rule is (condition, {file type: type}). Of the rules of a category whose condition holds the last that has the file
# type decides, the default type where none has. Conditions: _Walk.true, _Walk._place. "more_bits" is llama.cpp's choice
# of layers that get more: the first eighth, the last eighth, and every third between.
Rules = Sequence[tuple[str, Mapping[str, str]]]

_FFN_GATE_UP: Rules = (("middle", {"IQ3_XS": "IQ3_XXS"}),)
_VERY_LOW_BIT_OUTPUT = _each((_IQ1, "IQ2_XXS"), (_IQ2_S, "IQ3_S"))

# fmt: off
RULES: dict[str, Rules] = {
    "output": (
        ("always", _each((_ANY, "Q6_K"), (VERY_LOW_BIT, "Q5_K"), (("IQ3_XXS",), "Q5_K"), (("Q8_0",), "Q8_0"))),
        ("unfit_row", _each((_ANY, "Q8_0"))),
    ),
    "token_embd": (
        ("always", _each((VERY_LOW_BIT, "Q2_K"), ((*_IQ2_S, "IQ3_XXS"), "IQ3_S"),
                         (("TQ1_0", "TQ2_0", "Q2_0"), "Q4_K"))),
    ),
    "attn_v": (
        ("always", _each((VERY_LOW_BIT, "Q2_K"), (_IQ2_S, "IQ3_S"), (("Q2_K",), "Q3_K"), (("Q3_K_L",), "Q5_K"),
                         (("IQ3_M", "Q3_K_M"), "Q4_K"))),
        ("no_imatrix", {"IQ3_XXS": "IQ3_S"}),
        ("gqa>=4", _each(((*VERY_LOW_BIT, "Q2_K", "Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S"), "Q4_K"),
                         (("IQ4_NL", "IQ4_XS"), "Q5_K"))),
        ("experts>=4", _each((VERY_LOW_BIT, "Q4_K"))),
        ("more_bits", {"Q4_K_M": "Q6_K", "Q5_K_M": "Q6_K"}),
        ("first_2", {"Q3_K_M": "Q5_K"}),
        ("first_4", {"Q4_K_S": "Q5_K"}),
        ("experts=8", _each((_OTHERS, "Q8_0"))),
    ),
    "attn_k": (
        ("always", {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}),
        ("experts=8", _each((_OTHERS, "Q8_0"), (VERY_LOW_BIT, "Q4_K"))),
    ),
    "attn_q": (
        ("always", {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}),
    ),
    "attn_output": (
        ("experts!=8", _VERY_LOW_BIT_OUTPUT | {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K",
                                               "IQ3_M": "Q4_K"}),
        ("experts=8", _each(((*VERY_LOW_BIT, "Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M",
                              "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS"), "Q5_K"))),
    ),
    "ffn_down": (
        ("always", {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}),
        ("no_imatrix", {"IQ3_XXS": "Q3_K"}),
        ("more_bits", {"Q4_K_M": "Q6_K", "Q5_K_M": "Q6_K"}),
        ("more_bits,experts=8", {"IQ3_M": "Q4_K"}),
        ("first_8th", _each((VERY_LOW_BIT, "Q2_K"), (_IQ2_S, "IQ3_S"), (("Q2_K_S", "IQ3_M"), "Q4_K"),
                            (("Q4_K_S",), "Q5_K"))),
        ("first_8th,no_imatrix", {"IQ3_XXS": "Q4_K", "IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K"}),
        ("first_8th,imatrix", {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}),
        ("first_16th", {"Q3_K_M": "Q5_K"}),
    ),
    "ffn_gate": _FFN_GATE_UP,
    "ffn_up": _FFN_GATE_UP,
}
# fmt: on

# fmt: off
FALCON_RULES: dict[str, Rules] = {
    "output": (("always", _each((_ANY, "Q8_0"))),),
    "attn_output": (
        ("always", _VERY_LOW_BIT_OUTPUT | {"Q3_K_L": "Q4_K"}),
        ("experts=8", _each((VERY_LOW_BIT, "Q5_K"))),
    ),
    "ffn_down": (
        *((condition, {f: t for f, t in types.items() if f not in ("Q3_K_M", "Q3_K_L", "Q4_K_M", "Q4_K_S")})
          for condition, types in RULES["ffn_down"]),
        ("always", {"Q3_K_L": "Q4_K"}),
        ("more_bits", {"Q3_K_M": "Q4_K", "Q4_K_M": "Q5_K"}),
        ("first_16th", {"Q3_K_M": "Q5_K", "Q4_K_M": "Q6_K"}),
    ),
}
# fmt: on
RULES_IN = {"falcon": RULES | FALCON_RULES}

# Not below Q8_0 in a mixture.
AT_LEAST_Q8_0_IN = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}


def category(name: str) -> str:
    """The key of RULES that a name belongs to, or "other"."""
    if name in OUTPUT:
        return "output"
    if name in TOKEN_EMBEDDING:
        return "token_embd"
    return next((category for part, category in CATEGORIES if part in name), "other")


class _Walk:
    """One walk over a model's tensors, with the counts of attention values and FFN tensors seen so far."""

    def __init__(
        self,
        mixture: str,
        default: str,
        model: ModelFacts,
        names: Iterable[str],
        has_imatrix: bool,
        output_type: str | None,
    ):
        self.mixture, self.default, self.model, self.output_type = mixture, default, model, output_type
        self.categories = {name: category(name) for name in names}
        self.tied = "output" not in self.categories.values()
        self.attention_values = sum(c == "attn_v" for c in self.categories.values())
        self.seen: Counter[str] = Counter()
        self.block = tensor_type(default).block
        self.rules = RULES_IN.get(model.architecture, RULES)
        self.true = {
            "always",
            "imatrix" if has_imatrix else "no_imatrix",
            "experts=8" if model.experts == 8 else "experts!=8",
        }
        if model.gqa >= 4:
            self.true.add("gqa>=4")
        if model.experts >= 4:
            self.true.add("experts>=4")

    def type_of(self, name: str, shape: tuple[int, ...]) -> str:
        """BadPlan where llama-quantize gives up: an FFN tensor of a model with experts whose layer is not known."""
        if any(part in name for part in AT_LEAST_Q8_0_IN.get(self.model.architecture, ())):
            return "Q8_0"
        category = self.categories[name]
        if category == "token_embd" and self.tied:
            category = "output"
        if category == "output" and self.output_type is not None:
            return self.output_type
        if self.mixture.endswith("_MOE"):
            return self._moe(name, shape, category)
        true = self.true | self._place(name, category)
        if category == "output" and shape[-1] % self.block:
            true.add("unfit_row")
        type = self.default
        for condition, types in self.rules.get(category, ()):
            if true.issuperset(condition.split(",")):
                type = types.get(self.mixture, type)
        if category == "attn_v" and self.model.is_70b and self.mixture in _OTHERS and type in ("Q3_K", "Q4_K"):
            type = "Q5_K"  # 8 heads share these weights: more bits cost little
        return type

    def _moe(self, name: str, shape: tuple[int, ...], category: str) -> str:
        """The default type for experts, Q8_0 for all the rest."""
        if self.mixture in OUR_FILE_TYPES:
            expert = role_of(name) == "expert" and dims(shape) == 3
        else:
            # Whatever has three dimensions, MLA projections included, but in bailingmoe3.
            expert = (
                len(shape) >= 3
                and shape[-3] > 1
                and (self.model.architecture != "bailingmoe3" or category in ("ffn_up", "ffn_gate", "ffn_down"))
            )
        return self.default if expert and category != "output" else "Q8_0"

    def _place(self, name: str, category: str) -> set[str]:
        """The conditions that depend on the tensor's place in the model; counts the tensor."""
        if category == "attn_v":
            i, n = self.seen[category], self.attention_values
        elif category in ("ffn_down", "ffn_gate", "ffn_up"):
            i, n = self.seen[category], self.model.blocks
            if self.model.experts > 1 and self.mixture not in VERY_LOW_BIT:  # experts come in no reliable order
                layer = _layer(name)
                if layer is None or not 0 <= layer < n:
                    raise BadPlan(
                        "llama-quantize finds no layer of the model in this name",
                        object=name,
                        found=layer,
                        expected=f"blk.N. with N from 0 to {n - 1}",
                    )
                i = layer
        else:
            return set()
        self.seen[category] += 1
        place = {
            "first_2": i < 2,
            "first_4": i < 4,
            "first_8th": i < n // 8,
            "first_16th": i < n // 16,
            "middle": n // 8 <= i < 7 * n // 8,
            "more_bits": i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2,
        }
        return {condition for condition, holds in place.items() if holds}


def choose_types(
    file_type: FileType,
    model: ModelFacts,
    tensors: Sequence[tuple[str, tuple[int, ...]]],
    *,
    decided: Collection[str] = (),
    has_imatrix: bool = False,
    output_type: str | None = None,
    leave_output: bool = False,
) -> tuple[dict[str, str], list[SurgeryError]]:
    """The type of every tensor that llama-quantize would quantize, before fallback(), and what it refuses.

    tensors: all of the model's, (name, shape outermost first), in the order in which llama-quantize visits them:
    loader_order(), or the file's order where it keeps the shards. decided: names with a type from elsewhere; they are
    not in the result and are not counted. has_imatrix, output_type, leave_output: as llama-quantize's options.
    """
    types: dict[str, str] = {}
    errors: list[SurgeryError] = []
    if file_type.type is None:
        return types, errors
    walk = None
    if file_type.mixture is not None and file_type.mixture not in _UNQUANTIZED:
        walk = _Walk(file_type.mixture, file_type.type, model, (name for name, _ in tensors), has_imatrix, output_type)
    decided = frozenset(decided)
    for name, shape in tensors:
        if name in decided or not allows(model.architecture, name, shape, leave_output):
            continue
        types[name] = file_type.type
        if name in OUTPUT and output_type is not None:
            types[name] = output_type
        elif walk is not None:
            try:
                types[name] = walk.type_of(name, shape)
            except SurgeryError as error:
                errors.append(error)
    return types, errors


# --- afterwards -----------------------------------------------------------------------------------------------------

# fmt: off
# Where a row is not a multiple of the left type's block, the right one is used. Up to 32 none is needed: F16.
FALLBACKS = {
    "IQ1_S": "IQ4_NL", "IQ1_M": "IQ4_NL", "IQ2_XXS": "IQ4_NL", "IQ2_XS": "IQ4_NL", "IQ2_S": "IQ4_NL",
    "IQ3_XXS": "IQ4_NL", "IQ3_S": "IQ4_NL", "IQ4_XS": "IQ4_NL",
    "Q2_0": "Q4_0", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0",
    "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0",
}
# fmt: on
# Types that llama-quantize refuses to make without an importance matrix, token embedding and output apart; some of them
# ggml itself cannot make (_core.types: needs_importance).
WANT_IMPORTANCE = ("IQ3_XXS", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_M", "IQ1_S")


def fallback(type: str, row_elements: int) -> str | None:
    """`type`, or what llama-quantize takes where a row is not a multiple of its block; None where it has no answer."""
    if row_elements % tensor_type(type).block == 0:
        return type
    other = FALLBACKS.get(type)
    if other is None:
        return "F16" if tensor_type(type).block <= 32 else None
    return other if row_elements % tensor_type(other).block == 0 else "F16"


def wants_importance(file_type: FileType, name: str, type: str) -> bool:
    """Does llama-quantize refuse to make this tensor without an importance matrix?"""
    if name in OUTPUT or name in TOKEN_EMBEDDING:
        return False
    return type in WANT_IMPORTANCE or (type == "Q2_K" and file_type.name == "Q2_K_S")
