"""What llama.cpp's loader demands of a file. The gate and `verify` ask the same rules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from .._core import Value
from ..base.errors import BadFile, BadPlan, SurgeryError, Unsupported
from ..base.words import nearest_multiples
from .experts import Layout
from .keys import getter, read_count

if TYPE_CHECKING:
    from ..plan_data.choices import Ids


NAME_BYTES = 63  # llama.cpp's limit of a tensor name
ALIGNMENT_LEAST = 32  # llama.cpp aborts on 4, and always writes 32

MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS

# Keys of an architecture that llama.cpp's loader checks against each other (llama-model.cpp, load_hparams).
NUMBERS = (
    "block_count",
    "nextn_predict_layers",
    "expert_count",
    "expert_used_count",
    "expert_group_count",
    "expert_group_used_count",
)


def check_numbers(architecture: str, metadata: dict[str, Value]) -> list[SurgeryError]:
    """Which of these numbers, as they are, llama.cpp's loader or its router cannot take."""
    found: list[SurgeryError] = []
    get = getter(metadata)
    try:
        blocks, nextn = (read_count(get, f"{architecture}.{name}", 0) for name in NUMBERS[:2])
        if nextn > blocks:
            found.append(
                BadPlan(
                    "more MTP blocks than blocks",
                    object=f"{architecture}.nextn_predict_layers",
                    found=nextn,
                    expected=f"at most {blocks}",
                )
            )
        experts = read_count(get, f"{architecture}.expert_count", 0)
        key = f"{architecture}.expert_used_count"
        if not experts and get(key) in (None, 0):
            return found
        if experts > MAX_EXPERTS:
            found.append(
                Unsupported(
                    "more experts than llama.cpp loads",
                    object=f"{architecture}.expert_count",
                    found=experts,
                    expected=f"at most {MAX_EXPERTS}",
                )
            )
        used = used_experts(get, key)
        if used > experts:
            found.append(
                BadPlan("more experts used than there are", object=key, found=used, expected=f"at most {experts}")
            )
        groups = read_count(get, f"{architecture}.expert_group_count", 0)
        if groups:
            check_groups(architecture, Layout((), (), experts, groups, 1), {}, experts, used, found, get)
    except SurgeryError as error:
        found.append(error)
    return found


def used_experts(get: Callable[[str], Any], key: str) -> int:
    """The most experts per token of any layer. The value is one number or one per block (0 in dense ones)."""
    value = get(key)
    numbers = value if isinstance(value, list) else [value]
    used = max((read_count(lambda _, x=x: x, key) for x in numbers), default=0)
    if used < 1:
        raise BadFile("no expert is used", object=key, found=value)
    return used


def check_groups(
    architecture: str,
    found: Layout,
    kept: Ids,
    n: int,
    used: int,
    blockers: list[SurgeryError],
    get: Callable[[str], Any],
) -> None:
    """A group is a contiguous range of ids; the router first picks group_used groups, by their two best experts."""
    key, groups = f"{architecture}.expert_group_count", found.groups
    if groups == 1:
        if n == 1:
            blockers.append(BadPlan("as many groups as experts", object=key, found=1, expected="fewer groups"))
        return
    key_used = f"{architecture}.expert_group_used_count"
    per_group = n // groups
    if n % groups:
        blockers.append(
            BadPlan(
                f"{n} experts do not divide into {groups} groups",
                object=key,
                hint=f"keep {nearest_multiples(n, groups, found.experts)}",
            )
        )
        return
    group_used = read_count(get, key_used)
    if not 0 < group_used < groups:
        raise BadFile(
            "llama.cpp does not load this number of groups",
            object=key_used,
            found=group_used,
            expected=f"1..{groups - 1}",
        )
    if per_group < 2:
        blockers.append(
            BadPlan(
                f"{per_group} expert per group",
                object=key,
                hint=f"a group is chosen by its two best experts: keep at least {2 * groups}",
            )
        )
    if group_used * per_group < used:
        need = -(-used // group_used) * groups
        blockers.append(
            BadPlan(
                f"{group_used} groups of {per_group} experts are fewer than the {used} used per token",
                object=key_used,
                hint=f"keep at least {need}",
            )
        )
    size = found.experts // groups
    for layer, ids in kept.items():
        counts = Counter(i // size for i in ids)
        uneven = next((g for g in range(groups) if counts[g] != per_group), None)
        if uneven is not None:
            blockers.append(
                BadPlan(
                    f"{counts[uneven]} experts kept in group {uneven} (ids {uneven * size}..{uneven * size + size - 1})",
                    object=f"blk.{layer}.ffn_down_exps.weight",
                    expected=per_group,
                    hint=f"keep the same number in each of the {groups} groups, or routing is re-partitioned",
                )
            )


MAX_LAYERS = 512  # LLAMA_MAX_LAYERS

# Without these llama.cpp's loader stops (llama-model.cpp load_hparams, llama-vocab.cpp load).
REQUIRED = {
    "{arch}.context_length": "u32",
    "{arch}.embedding_length": "u32",
    "tokenizer.ggml.model": "str",
    "tokenizer.ggml.tokens": "str[]",
}


def check_required(architecture: str, before: Mapping[str, Value], after: Mapping[str, Value]) -> list[SurgeryError]:
    """Required keys that are gone, or of a type that llama.cpp does not take, where they were not so before."""
    found: list[SurgeryError] = []
    for pattern, type in REQUIRED.items():
        key = pattern.replace("{arch}", architecture)
        now = after[key].type if key in after else None
        if now != type and key in before and before[key].type != now:
            found.append(
                BadPlan(
                    "llama.cpp does not load a model without this key",
                    object=key,
                    found=now,
                    expected=type,
                    hint="set another value instead of removing it",
                )
            )
    tokens = after.get("tokenizer.ggml.tokens")
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        value, old = after.get(key), before.get("tokenizer.ggml.tokens")
        if tokens is None or value is None or (value, tokens) == (before.get(key), old):
            continue
        lengths = [len(v) if v.type.endswith("[]") else 0 for v in (value, tokens)]
        if lengths[0] < lengths[1]:
            found.append(
                BadPlan("fewer elements than tokens", object=key, found=lengths[0], expected=f"at least {lengths[1]}")
            )
    return found


def check_embedding(architecture: str, metadata: Mapping[str, Value], shape: tuple[int, ...]) -> list[SurgeryError]:
    """Keys that contradict token_embd.weight, whose shape is [tokens, embedding_length]."""
    found: list[SurgeryError] = []
    if len(shape) != 2 or f"{architecture}.features_length" in metadata:  # there the rows are features (wavtokenizer)
        return found
    for key, expected in ((f"{architecture}.embedding_length", shape[1]), ("tokenizer.ggml.tokens", shape[0])):
        value = metadata.get(key)
        if value is None:
            continue
        number = len(value) if value.type.endswith("[]") else value.value
        if number != expected:
            found.append(
                BadPlan(
                    "does not fit token_embd.weight",
                    object=key,
                    found=number,
                    expected=f"{expected}, of shape {list(shape)}",
                )
            )
    return found


# --- general.tensor_extra.*: "name" lists tensors, every other array there is parallel to it ------------------------

EXTRA_NAME = "general.tensor_extra.name"


def is_tensor_extra(key: str) -> bool:
    return key.startswith("general.tensor_extra.")


def check_tensor_extra(metadata: Mapping[str, Value]) -> list[SurgeryError]:
    """Arrays of another length than the names: llama.cpp does not load them."""
    names = metadata.get(EXTRA_NAME)
    if names is None:
        return []
    length = len(names) if names.type.endswith("[]") else 0
    lengths = {
        key: len(value) if value.type.endswith("[]") else None
        for key, value in metadata.items()
        if is_tensor_extra(key)
    }
    return [
        BadPlan("not one element per tensor", object=key, found=n, expected=f"{length}, as {EXTRA_NAME} has")
        for key, n in lengths.items()
        if n is None or n != length
    ]
