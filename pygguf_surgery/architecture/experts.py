"""Which tensors change when experts do, and how; what their router does with them. Data first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..base.errors import BadFile, SurgeryError, Unsupported
from .keys import Get, mtp_fault, mtp_layers, read_count
from .names import layer_of, local_name

# --- which tensors have an expert axis ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertRule:
    """How one tensor of a MoE layer follows a cut. axis: "experts" (slowest axis has E slices, cut them), "groups"
    (slowest axis has E / experts_per_group), "values" (no axis, its values are expert ids) or "none" (untouched)."""

    axis: str
    ndim: int


# fmt: off
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
# fmt: on

# Tensors of a MoE layer that start like expert tensors and have no expert axis, whatever their size.
_DENSE = re.compile(
    r"ffn_(gate|up|down|norm|sub_norm|norm_exps|res_score|latent_(up|down)|routed_(up|down|norm)|conv_(base|proj)"
    r"|(gate|up|down|gate_up|gate_inp)_shexp)(\.(weight|bias|scale|input_scale))?"
)
_ONE_EXPERT = re.compile(r"ffn_(gate|up|down)\.[0-9]+\.")
_EXPERT_WORD = re.compile(r"(ffn_\w+_(exps|chexps)|ffn_gate_inp|ffn_gate_tid2eid|exp_probs_b\w*)(\.|$)")


def expert_rule(name: str) -> ExpertRule | None:
    """The rule of a tensor that belongs to experts, None for any other."""
    return EXPERT_RULES.get(local_name(name)) if layer_of(name) is not None else None


def is_single_expert(name: str) -> bool:
    """A tensor that is one expert, as in files of 2023."""
    return layer_of(name) is not None and _ONE_EXPERT.match(local_name(name)) is not None


# --- the experts of one model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """layers: the MoE layers, ascending, MTP ones included. mtp: all MTP layers. groups: expert_group_count (0: routing
    has no groups). chunk: experts_per_group of grovemoe (1: none), the experts that share one chunk expert."""

    layers: tuple[int, ...]
    mtp: tuple[int, ...]
    experts: int
    groups: int
    chunk: int


def moe_layers(names: Iterable[str]) -> tuple[int, ...]:
    """Layers with experts: those that have ffn_down_exps. Dense, interleaved and attention-only layers exist."""
    return tuple(
        sorted(
            {
                layer
                for name in names
                if (layer := layer_of(name)) is not None and local_name(name) == "ffn_down_exps.weight"
            }
        )
    )


def layout(architecture: str, names: Iterable[str], get: Get) -> Layout:
    """names: all tensors; get(key): a metadata value or None.

    BadFile for metadata that contradicts itself, Unsupported for one tensor per expert (files of 2023).
    layers is empty for a model without experts.
    """
    names = list(names)
    for name in names:
        if is_single_expert(name):
            raise Unsupported(
                "one tensor per expert, a layout that llama.cpp no longer loads",
                object=name,
                hint="convert the original model again",
            )
    layers = moe_layers(names)
    if not layers:
        return Layout((), (), 0, 0, 1)
    experts = read_count(get, f"{architecture}.expert_count")
    count, nextn = read_count(get, f"{architecture}.block_count"), mtp_layers(architecture, get)
    if fault := mtp_fault(architecture, count, nextn):
        raise fault
    if layers[-1] >= count:
        raise BadFile(
            "a layer with experts beyond the last one",
            object=f"blk.{layers[-1]}.ffn_down_exps.weight",
            expected=f"layers 0..{count - 1}",
        )
    groups = read_count(get, f"{architecture}.expert_group_count", 0)
    chunk = 1
    if any((rule := expert_rule(name)) and rule.axis == "groups" for name in names):
        chunk = read_count(get, f"{architecture}.experts_per_group")
        if chunk < 1 or experts % chunk:
            raise BadFile(
                "experts do not divide into chunks",
                object=f"{architecture}.experts_per_group",
                found=chunk,
                expected=f"a divisor of {experts}",
            )
    if groups > 1 and experts % groups:
        raise BadFile(
            "experts do not divide into groups",
            object=f"{architecture}.expert_group_count",
            found=groups,
            expected=f"a divisor of {experts}",
        )
    if groups > 1 and chunk > 1:
        raise Unsupported("routing groups and chunk experts in one model", object=f"{architecture}.experts_per_group")
    return Layout(layers, tuple(range(count - nextn, count)), experts, groups, chunk)


def check_shape(name: str, shape: tuple[int, ...], model: Layout) -> SurgeryError | None:
    """What is wrong with one tensor of a model with experts. shape is outermost first.

    A tensor of a MoE layer that may have an expert axis and that no rule knows is an error, never a guess; attention,
    SSM, norm, shared-expert and nextn tensors are not judged by size: at 512 experts some of theirs are 512 too.
    """
    layer = layer_of(name)
    if layer is None:
        return None
    local, rule = local_name(name), expert_rule(name)
    if layer not in model.layers:
        if (rule and rule.axis != "none") or (_EXPERT_WORD.match(local) and not _DENSE.fullmatch(local)):
            return BadFile("an expert tensor in a layer without ffn_down_exps", object=name)
        return None
    if rule is None:
        unknown = _EXPERT_WORD.match(local) or (local.startswith(("ffn_", "exp_")) and shape[:1] == (model.experts,))
        if unknown and not _DENSE.fullmatch(local):
            return Unsupported(
                "unknown tensor in a layer with experts",
                object=name,
                found=f"shape {list(shape)}",
                hint=f"it may have an axis over the {model.experts} experts",
            )
        return None
    if rule.axis not in ("experts", "groups"):
        return None
    expected = model.experts if rule.axis == "experts" else model.experts // model.chunk
    # ggml drops trailing axes of length 1: with one expert the axis may be absent.
    if (len(shape) != rule.ndim or shape[0] != expected) and not (expected == 1 and len(shape) == rule.ndim - 1):
        return BadFile(
            "wrong shape for an expert tensor",
            object=name,
            found=list(shape),
            expected=f"{rule.ndim} axes, the slowest {expected}",
        )
    return None


# --- neurons of an expert -------------------------------------------------------------------------------------------

# fmt: off
# The axis of a slice along which its neurons lie. "half": gate and up, one after the other, each with all neurons.
NEURON_AXES: Mapping[str, str] = {
    "ffn_gate_exps.weight": "rows", "ffn_up_exps.weight": "rows", "ffn_gate_up_exps.weight": "half rows",
    "ffn_down_exps.weight": "columns", "ffn_gate_exps.bias": "columns", "ffn_up_exps.bias": "columns",
    "ffn_gate_up_exps.bias": "half columns", "ffn_down_exps.bias": "none"}
# fmt: on
# Tensors of experts that no average of weights can follow.
_WITHOUT_MEAN = frozenset(
    (
        *(f"ffn_{part}_exps.{scale}" for part in ("gate", "up", "down") for scale in ("scale", "input_scale")),
        *(f"ffn_{part}_chexps.weight" for part in ("gate", "up", "down")),
        "ffn_gate_tid2eid.weight",
    )
)


def has_mean(name: str) -> bool:
    """False for a tensor of experts that cannot be made one by the mean of their weights."""
    return local_name(name) not in _WITHOUT_MEAN


# --- what the router does with them ---------------------------------------------------------------------------------

# {architecture}.expert_gating_func, llama.cpp's llama_expert_gating_func_type
SOFTMAX, SIGMOID, SQRT_SOFTPLUS = 1, 2, 4
# The softmax is over the logits of the experts that are picked, so that no other logit enters their gates.
SOFTMAX_OVER_PICKED = frozenset(("gpt-oss",))
# What is added to the scores by which the router picks, by architecture.
_SELECTION_BIASES = ("exp_probs_b.bias", "exp_probs_b", "exp_probs_b_vl.bias")
_OTHER_SELECTION_BIASES: Mapping[str, tuple[str, ...]] = {"gpt-oss": ("ffn_gate_inp.bias",)}
_NEVER_PICKED = -3e4  # finite, as llama.cpp's check of tensors wants it


def selection_biases(architecture: str) -> tuple[str, ...]:
    return _OTHER_SELECTION_BIASES.get(architecture, _SELECTION_BIASES)


def pad_value(architecture: str, name: str) -> float:
    """What the padding experts of this tensor hold."""
    return _NEVER_PICKED if local_name(name) in selection_biases(architecture) else 0.0


def padding_obstacle(
    architecture: str, experts: Layout, layers: Iterable[int], types: Mapping[str, str], get: Get
) -> str | None:
    """Why experts of zeros in these layers would change what the model computes; None where they do not: a bias keeps
    the router from them, and a zero logit does not enter the gates of the others. types: of the tensors, by name."""
    if experts.groups > 1 or experts.chunk > 1:
        return "the router picks groups" if experts.groups > 1 else "experts share chunk experts"
    if any(name.endswith(".ffn_gate_tid2eid.weight") for name in types):
        return "experts are looked up by token"
    if architecture not in SOFTMAX_OVER_PICKED:
        gate = get(f"{architecture}.expert_gating_func")
        if gate == SOFTMAX and not get(f"{architecture}.expert_weights_norm"):
            return "the softmax over all experts is not renormalised"
        if gate not in (SOFTMAX, SIGMOID, SQRT_SOFTPLUS):
            return "the file does not say how gates are computed"
    for layer in layers:
        names = [f"blk.{layer}.{bias}" for bias in selection_biases(architecture)]
        biases = [types[name] for name in names if name in types]
        if not biases:
            return f"layer {layer} has no selection bias"
        if any(type != "F32" for type in biases):
            return f"the selection bias of layer {layer} is not F32"
    return None


# The gate multiplies the input of the expert, so that its output has it already.
GATE_IN_INPUT = frozenset(("llama4",))


def most_used(architecture: str, get: Get) -> int:
    """The most experts per token, or 1 where the file does not say."""
    value = get(f"{architecture}.expert_used_count")
    numbers_of = value if isinstance(value, list) else [value]
    return max((n for n in numbers_of if isinstance(n, int) and not isinstance(n, bool)), default=1)
