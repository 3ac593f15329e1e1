"""What each tensor is for, and which tensors change when experts do. Data first; the names are llama.cpp's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BadFile, SurgeryError, Unsupported

# --- the role of a name ---------------------------------------------------------------------------------------------

ROLES = ("attention", "ssm", "router", "norm", "shared_expert", "expert", "ffn", "embedding", "output", "mtp", "other")

# First match wins. The name is without "blk.N." and without what follows the last word (".weight", ".bias", ...).
_ROLE_PATTERNS = tuple((role, re.compile(pattern)) for role, pattern in (
    ("mtp", r"nextn\."),
    ("norm", r"(.*[._])?norm\d?(_[a-z0-9]+)*$"),                         # attn_norm, post_ffw_norm_1, ffn_norm_exps
    ("shared_expert", r"ffn_(gate|up|down|gate_up|gate_inp)_shexp$"),
    ("expert", r"ffn_(gate|up|down|gate_up)_(exps|chexps)$"),
    ("expert", r"ffn_(gate|up|down)\.[0-9]+$"),                             # one tensor per expert: files of 2023
    ("router", r"(ffn_gate_inp|exp_probs_b|exp_probs_b_vl|ffn_gate_tid2eid)$"),
    ("attention", r"(vis_|cross_)?attn_|indexer[._]"),
    ("ssm", r"ssm_|shortconv\.|time_mix_"),
    ("ffn", r"ffn[._]|channel_mix_|vis_(gate|up|down)$"),
    ("embedding", r"(token_embd|per_layer_token_embd|position_embd|token_types)$"),
    ("output", r"(output|cls|cls\.output|dense_2|dense_3)$"),
))
_BLOCK = re.compile(r"(?:(?:enc|dec)\.)?blk\.([0-9]+)\.(.+)", re.DOTALL)
_SUFFIX = re.compile(r"\.(weight|bias|scale|input_scale|a|b)$")


def role_of(name: str) -> str:
    """One of ROLES, from the name alone; a name that llama.cpp does not know is "other"."""
    block = _BLOCK.fullmatch(name)
    word = _SUFFIX.sub("", block[2] if block else name)
    return next((role for role, pattern in _ROLE_PATTERNS if pattern.match(word)), "other")


def layer_of(name: str) -> int | None:
    """N of "blk.N.": the decoder blocks, where experts are. None for every other name."""
    block = _BLOCK.fullmatch(name)
    return int(block[1]) if block and name.startswith("blk.") else None


# --- which tensors have an expert axis ------------------------------------------------------------------------------

@dataclass(frozen=True)
class ExpertRule:
    """How one tensor of a MoE block follows a cut. axis: "experts" (slowest axis has E slices, cut them), "groups"
    (slowest axis has E / experts_per_group), "values" (no axis, its values are expert ids) or "none" (untouched)."""

    axis: str
    ndim: int


EXPERT_RULES: Mapping[str, ExpertRule] = {
    **{f"ffn_{part}_exps.weight": ExpertRule("experts", 3) for part in ("gate", "up", "gate_up", "down")},
    **{f"ffn_{part}_exps.bias": ExpertRule("experts", 2) for part in ("gate", "up", "gate_up", "down")},
    **{f"ffn_{part}_exps.{scale}": ExpertRule("experts", 1)
       for part in ("gate", "up", "down") for scale in ("scale", "input_scale")},
    **{f"ffn_{part}_chexps.weight": ExpertRule("groups", 3) for part in ("gate", "up", "down")},
    "ffn_gate_inp.weight": ExpertRule("experts", 2),
    "ffn_gate_inp.bias": ExpertRule("experts", 1),
    "ffn_gate_inp.scale": ExpertRule("none", 1),            # gemma4: over n_embd
    "exp_probs_b": ExpertRule("experts", 1),                # hy_v3 has no suffix
    "exp_probs_b.bias": ExpertRule("experts", 1),
    "exp_probs_b_vl.bias": ExpertRule("experts", 1),
    "ffn_gate_tid2eid.weight": ExpertRule("values", 2),
}

# Tensors of a MoE block that start like expert tensors and have no expert axis, whatever their size.
_DENSE = re.compile(
    r"ffn_(gate|up|down|norm|sub_norm|norm_exps|res_score|latent_(up|down)|routed_(up|down|norm)|conv_(base|proj)"
    r"|(gate|up|down|gate_up|gate_inp)_shexp)(\.(weight|bias|scale|input_scale))?")
_ONE_EXPERT = re.compile(r"ffn_(gate|up|down)\.[0-9]+\.")
_EXPERT_WORD = re.compile(r"(ffn_\w+_(exps|chexps)|ffn_gate_inp|ffn_gate_tid2eid|exp_probs_b\w*)(\.|$)")


def _local(name: str) -> str:
    return name.split(".", 2)[2]


def expert_rule(name: str) -> ExpertRule | None:
    """The rule of a tensor that belongs to experts, None for any other."""
    return EXPERT_RULES.get(_local(name)) if layer_of(name) is not None else None


# Arrays under "{architecture}." with one element per block, MTP blocks included: cut when those are dropped.
PER_BLOCK_KEYS = frozenset((
    "activation_sparsity_scale", "attention.compress_ratios", "attention.head_count", "attention.head_count_kv",
    "attention.indexer.types", "attention.recurrent_layers", "attention.rope_pattern",
    "attention.sliding_window_pattern", "deepstack_mapping", "expert_feed_forward_length", "expert_used_count",
    "feed_forward_length", "swiglu_clamp_exp", "swiglu_clamp_shexp"))
# Arrays under "{architecture}." that have another meaning, even where their length happens to be the number of blocks.
OTHER_ARRAYS = frozenset((
    "adapters.token_ids_activate", "adapters.token_ids_substitute", "classifier.output_labels", "ple.head_offsets",
    "ple.head_vocab_sizes", "ple.layer_multipliers", "ple.layers", "rope.dimension_sections", "target_layers"))
# Here nextn_predict_layers counts the adapter router's layer, not MTP blocks.
NOT_MTP = frozenset(("graniteswitch",))


# --- the experts of one model ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Layout:
    """layers: the MoE blocks, ascending, MTP ones included. mtp: all MTP blocks. groups: expert_group_count (0: routing
    has no groups). chunk: experts_per_group of grovemoe (1: none), the experts that share one chunk expert."""

    layers: tuple[int, ...]
    mtp: tuple[int, ...]
    experts: int
    groups: int
    chunk: int


def count(get: Callable[[str], Any], key: str, default: int | None = None) -> int:
    """The value of `key` as a count; BadFile where it is missing (without a default) or no whole number >= 0."""
    value = get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise BadFile("missing metadata", object=key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadFile("not a count", object=key, found=repr(value)[:80])
    return value


def moe_layers(names: Iterable[str]) -> tuple[int, ...]:
    """Blocks with experts: those that have ffn_down_exps. Dense, interleaved and attention-only blocks exist."""
    return tuple(sorted({layer for name in names
                         if (layer := layer_of(name)) is not None and _local(name) == "ffn_down_exps.weight"}))


def layout(architecture: str, names: Iterable[str], get: Callable[[str], Any]) -> Layout:
    """names: all tensors; get(key): a metadata value or None.

    BadFile for metadata that contradicts itself, Unsupported for one tensor per expert (files of 2023).
    layers is empty for a model without experts.
    """
    names = list(names)
    for name in names:
        if layer_of(name) is not None and _ONE_EXPERT.match(_local(name)):
            raise Unsupported("one tensor per expert, a layout that llama.cpp no longer loads", object=name,
                              hint="convert the original model again")
    layers = moe_layers(names)
    if not layers:
        return Layout((), (), 0, 0, 1)
    experts = count(get, f"{architecture}.expert_count")
    blocks = count(get, f"{architecture}.block_count")
    nextn = 0 if architecture in NOT_MTP else count(get, f"{architecture}.nextn_predict_layers", 0)
    if nextn > blocks:
        raise BadFile("more MTP blocks than blocks", object=f"{architecture}.nextn_predict_layers", found=nextn,
                      expected=f"at most {blocks}")
    if layers[-1] >= blocks:
        raise BadFile("a block with experts beyond the last one", object=f"blk.{layers[-1]}.ffn_down_exps.weight",
                      expected=f"blocks 0..{blocks - 1}")
    groups = count(get, f"{architecture}.expert_group_count", 0)
    chunk = 1
    if any((rule := expert_rule(name)) and rule.axis == "groups" for name in names):
        chunk = count(get, f"{architecture}.experts_per_group")
        if chunk < 1 or experts % chunk:
            raise BadFile("experts do not divide into chunks", object=f"{architecture}.experts_per_group", found=chunk,
                          expected=f"a divisor of {experts}")
    if groups > 1 and experts % groups:
        raise BadFile("experts do not divide into groups", object=f"{architecture}.expert_group_count", found=groups,
                      expected=f"a divisor of {experts}")
    if groups > 1 and chunk > 1:
        raise Unsupported("routing groups and chunk experts in one model", object=f"{architecture}.experts_per_group")
    return Layout(layers, tuple(range(blocks - nextn, blocks)), experts, groups, chunk)


def check_shape(name: str, shape: tuple[int, ...], model: Layout) -> SurgeryError | None:
    """What is wrong with one tensor of a model with experts. shape is outermost first.

    A tensor of a MoE block that may have an expert axis and that no rule knows is an error, never a guess; attention,
    SSM, norm, shared-expert and nextn tensors are not judged by size: at 512 experts some of theirs are 512 too.
    """
    layer = layer_of(name)
    if layer is None:
        return None
    local, rule = _local(name), expert_rule(name)
    if layer not in model.layers:
        if rule and rule.axis != "none" or _EXPERT_WORD.match(local) and not _DENSE.fullmatch(local):
            return BadFile("an expert tensor in a block without ffn_down_exps", object=name)
        return None
    if rule is None:
        unknown = _EXPERT_WORD.match(local) or (
            local.startswith(("ffn_", "exp_")) and shape[:1] == (model.experts,))
        if unknown and not _DENSE.fullmatch(local):
            return Unsupported("unknown tensor in a block with experts", object=name, found=f"shape {list(shape)}",
                               hint=f"it may have an axis over the {model.experts} experts")
        return None
    if rule.axis not in ("experts", "groups"):
        return None
    expected = model.experts if rule.axis == "experts" else model.experts // model.chunk
    # ggml drops trailing axes of length 1: with one expert the axis may be absent.
    if (len(shape) != rule.ndim or shape[0] != expected) and not (expected == 1 and len(shape) == rule.ndim - 1):
        return BadFile("wrong shape for an expert tensor", object=name, found=list(shape),
                       expected=f"{rule.ndim} axes, the slowest {expected}")
    return None
