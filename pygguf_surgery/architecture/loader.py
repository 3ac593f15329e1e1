"""What llama.cpp's loader demands of a file: rules that the gate asks before a file is written and `verify` afterwards.

A rule takes facts of a header (the architecture, the metadata, names and shapes of tensors) and returns faults, without
the path of the file. Shapes are outermost first. The loader's code is in llama-model.cpp (load_hparams),
llama-model-loader.cpp (check_tensor_dims) and llama-vocab.cpp (load).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from .._core import Value
from ..base.errors import BadFile, BadPlan, SurgeryError, Unsupported
from ..base.words import nearest_multiples
from .experts import Layout, check_shape, is_single_expert, layout
from .keys import PER_LAYER_KEYS, WITHOUT_MTP_KEYS, Get, as_count, getter, mtp_fault, read_count
from .names import layer_of

if TYPE_CHECKING:
    from ..plan_data.choices import Ids

Metadata = Mapping[str, Value]
Shapes = Mapping[str, tuple[int, ...]]

NAME_BYTES = 63  # GGML_MAX_NAME, without the final zero
ALIGNMENT_LEAST = 32  # llama.cpp aborts on 4, and always writes 32
MAX_LAYERS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS


def check_file(architecture: str, metadata: Metadata, shapes: Shapes) -> list[SurgeryError]:
    """All faults of a complete file whose tensors have these shapes, but for names and alignment."""
    if not architecture:
        return [BadFile("missing key", object="general.architecture")]
    faults: list[SurgeryError] = []
    for word in ("block_count", "context_length", "embedding_length"):
        faults += _check_type(metadata, f"{architecture}.{word}", ("u32",), required=True)
    faults += check_layers(architecture, metadata, shapes)
    if "token_embd.weight" in shapes:
        faults += check_embedding(architecture, metadata, shapes["token_embd.weight"])
    return faults + check_experts(architecture, metadata, shapes)


# --- the container --------------------------------------------------------------------------------------------------


def check_name(tensor: str) -> SurgeryError | None:
    nbytes = len(tensor.encode("utf-8", "surrogateescape"))
    if 1 <= nbytes <= NAME_BYTES:
        return None
    return BadPlan(
        "a tensor name that llama.cpp cannot load", object=tensor, found=f"{nbytes} bytes", expected=f"1..{NAME_BYTES}"
    )


def check_alignment(alignment: int) -> SurgeryError | None:
    if alignment >= ALIGNMENT_LEAST:
        return None
    return BadFile(
        f"alignment below {ALIGNMENT_LEAST}: llama.cpp aborts on it", object="general.alignment", found=alignment
    )


# --- types of keys --------------------------------------------------------------------------------------------------

# Without these the loader stops.
REQUIRED = {
    "{arch}.context_length": "u32",
    "{arch}.embedding_length": "u32",
    "tokenizer.ggml.model": "str",
    "tokenizer.ggml.tokens": "str[]",
}


def check_required(architecture: str, before: Metadata, after: Metadata) -> list[SurgeryError]:
    """Required keys that are gone, or of a type that llama.cpp does not take, where they were not so before."""
    faults: list[SurgeryError] = []
    for pattern, type in REQUIRED.items():
        key = pattern.replace("{arch}", architecture)
        now = after[key].type if key in after else None
        if now != type and key in before and before[key].type != now:
            faults.append(
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
            faults.append(
                BadPlan("fewer elements than tokens", object=key, found=lengths[0], expected=f"at least {lengths[1]}")
            )
    return faults


def _check_type(metadata: Metadata, key: str, types: tuple[str, ...], *, required: bool = False) -> list[SurgeryError]:
    if key not in metadata:
        return [BadFile("missing key", object=key, expected=types[0])] if required else []
    if (type := metadata[key].type) in types:
        return []
    return [BadFile("wrong type for llama.cpp", object=key, found=type, expected=types[0])]


def _u32(metadata: Metadata, key: str) -> int | None:
    value = metadata.get(key)
    return value.value if value is not None and value.type == "u32" else None


# --- layers ---------------------------------------------------------------------------------------------------------


def check_layer_count(architecture: str, layers: int) -> SurgeryError | None:
    if 1 <= layers <= MAX_LAYERS:
        return None
    return BadFile(
        "out of llama.cpp's range", object=f"{architecture}.block_count", found=layers, expected=f"1..{MAX_LAYERS}"
    )


def check_layers(architecture: str, metadata: Metadata, names: Iterable[str]) -> list[SurgeryError]:
    """The layers that block_count counts are there and no others, and arrays have one element for each. names: of all
    tensors. A block_count that is missing or of another type is not judged."""
    key = f"{architecture}.block_count"
    layers = _u32(metadata, key)
    if layers is None:
        return []
    if fault := check_layer_count(architecture, layers):
        return [fault]
    everything = set(range(layers))
    present = {layer for name in names if (layer := layer_of(name)) is not None}
    faults: list[SurgeryError] = [
        BadFile(f"tensors of layer {layer}, which it does not count", object=key, found=layers)
        for layer in sorted(present - everything)
    ]
    nextn_key = f"{architecture}.nextn_predict_layers"
    faults += _check_type(metadata, nextn_key, ("u32",))
    nextn = _u32(metadata, nextn_key) or 0
    missing, trunk = everything - present, set(range(layers - nextn))
    # llama.cpp loads files without any MTP layer, and files with nothing else, whose block_count counts all of them.
    if not nextn or missing not in (trunk, everything - trunk):
        faults += [
            BadFile(f"no tensor of layer {layer}, which it counts", object=key, found=layers)
            for layer in sorted(missing)
        ]
    for word in sorted(PER_LAYER_KEYS):
        value = metadata.get(f"{architecture}.{word}")
        if value is None or not value.type.endswith("[]") or len(value) == layers:
            continue
        if word not in WITHOUT_MTP_KEYS or len(value) != layers - nextn:
            faults.append(
                BadFile(
                    "an array without one element per layer",
                    object=f"{architecture}.{word}",
                    found=len(value),
                    expected=layers,
                )
            )
    return faults


# --- experts --------------------------------------------------------------------------------------------------------

# Keys of an architecture that the loader checks against each other.
NUMBERS = (
    "block_count",
    "nextn_predict_layers",
    "expert_count",
    "expert_used_count",
    "expert_group_count",
    "expert_group_used_count",
)


def check_experts(architecture: str, metadata: Metadata, shapes: Shapes) -> list[SurgeryError]:
    """Counts of experts, the shapes of their tensors, and that the matrices of each layer fit each other."""
    faults: list[SurgeryError] = []
    for word in NUMBERS[2:]:
        per_layer = ("u32[]", "i32[]") if word == "expert_used_count" else ()
        faults += _check_type(metadata, f"{architecture}.{word}", ("u32", *per_layer))
    faults += check_numbers(architecture, metadata)
    single = [name for name in shapes if is_single_expert(name)]
    faults += [
        BadFile("one tensor per expert, a layout that llama.cpp no longer loads", object=name) for name in single
    ]
    try:
        experts = layout(architecture, shapes, getter(metadata))
    except SurgeryError as error:
        return faults if single else [*faults, error]
    faults += [fault for name, shape in shapes.items() if (fault := check_shape(name, shape, experts))]
    width = getter(metadata)(f"{architecture}.embedding_length")
    for layer in experts.layers:
        faults += _check_matrices(f"blk.{layer}.", shapes, width)
    return faults


def _check_matrices(layer: str, shapes: Shapes, width: object) -> list[SurgeryError]:
    """Those of one layer with experts: gate and up [E, n_ff, n], down [E, m, n_ff], router [E, n_embd].

    width: n_embd.
    """
    faults: list[SurgeryError] = []
    n_ff = next(iter(shapes[layer + "ffn_down_exps.weight"][-1:]), 1)
    parts = {name: shapes.get(f"{layer}ffn_{name}_exps.weight") for name in ("gate", "up", "gate_up")}
    if parts["up"] is None and parts["gate_up"] is None:
        faults.append(BadFile("missing expert matrix", object=layer + "ffn_up_exps.weight"))
    for name, shape in parts.items():
        rows = n_ff * (2 if name == "gate_up" else 1)
        if shape is not None and shape[-2:-1] != (rows,):
            faults.append(
                BadFile(
                    "its rows do not match the columns of ffn_down_exps",
                    object=f"{layer}ffn_{name}_exps.weight",
                    found=list(shape),
                    expected=f"{rows} rows per expert",
                )
            )
    router = shapes.get(layer + "ffn_gate_inp.weight")
    if router is None:
        faults.append(BadFile("missing router", object=layer + "ffn_gate_inp.weight"))
    elif isinstance(width, int) and router[-1:] != (width,):
        faults.append(
            BadFile(
                "its rows do not have embedding_length elements",
                object=layer + "ffn_gate_inp.weight",
                found=next(iter(router[-1:]), 1),
                expected=width,
            )
        )
    return faults


def check_numbers(architecture: str, metadata: Metadata) -> list[SurgeryError]:
    """Which of NUMBERS, as they are, llama.cpp's loader or its router cannot take."""
    faults: list[SurgeryError] = []
    get = getter(metadata)
    try:
        layers, nextn = (read_count(get, f"{architecture}.{name}", 0) for name in NUMBERS[:2])
        if fault := mtp_fault(architecture, layers, nextn, BadPlan):
            faults.append(fault)
        experts = read_count(get, f"{architecture}.expert_count", 0)
        key = f"{architecture}.expert_used_count"
        if not experts and get(key) in (None, 0):
            return faults
        if fault := check_expert_count(architecture, experts):
            faults.append(fault)
        used = used_experts(get, key)
        if used > experts:
            faults.append(
                BadPlan("more experts used than there are", object=key, found=used, expected=f"at most {experts}")
            )
        groups = read_count(get, f"{architecture}.expert_group_count", 0)
        if groups:
            faults += check_groups(architecture, Layout((), (), experts, groups, 1), {}, experts, used, get)
    except SurgeryError as error:
        faults.append(error)
    return faults


def check_expert_count(architecture: str, experts: int) -> SurgeryError | None:
    if experts <= MAX_EXPERTS:
        return None
    return Unsupported(
        "more experts than llama.cpp loads",
        object=f"{architecture}.expert_count",
        found=experts,
        expected=f"at most {MAX_EXPERTS}",
    )


def used_experts(get: Get, key: str) -> int:
    """The most experts per token of any layer. The value is one number or one per layer (0 in dense ones)."""
    value = get(key)
    used = max((as_count(x, key) for x in (value if isinstance(value, list) else [value])), default=0)
    if used < 1:
        raise BadFile("no expert is used", object=key, found=value)
    return used


def check_groups(architecture: str, experts: Layout, kept: Ids, n: int, used: int, get: Get) -> list[SurgeryError]:
    """A router group is a range of ids. The router first picks group_used of them, by their two best experts.

    kept: the ids that stay of `experts`, n in each layer, of which a token uses `used`. BadFile is raised where the
    file itself has an impossible number of used groups.
    """
    key, groups = f"{architecture}.expert_group_count", experts.groups
    if groups == 1:
        return [BadPlan("as many groups as experts", object=key, found=1, expected="fewer groups")] if n == 1 else []
    key_used = f"{architecture}.expert_group_used_count"
    per_group = n // groups
    if n % groups:
        hint = f"keep {nearest_multiples(n, groups, experts.experts)}"
        return [BadPlan(f"{n} experts do not divide into {groups} groups", object=key, hint=hint)]
    group_used = read_count(get, key_used)
    if not 0 < group_used < groups:
        raise BadFile(
            "llama.cpp does not load this number of groups",
            object=key_used,
            found=group_used,
            expected=f"1..{groups - 1}",
        )
    faults: list[SurgeryError] = []
    if per_group < 2:
        hint = f"a group is chosen by its two best experts: keep at least {2 * groups}"
        faults.append(BadPlan(f"{per_group} expert per group", object=key, hint=hint))
    if group_used * per_group < used:
        need = -(-used // group_used) * groups
        faults.append(
            BadPlan(
                f"{group_used} groups of {per_group} experts are fewer than the {used} used per token",
                object=key_used,
                hint=f"keep at least {need}",
            )
        )
    size = experts.experts // groups
    for layer, ids in kept.items():
        counts = Counter(i // size for i in ids)
        uneven = next((g for g in range(groups) if counts[g] != per_group), None)
        if uneven is not None:
            faults.append(
                BadPlan(
                    f"{counts[uneven]} experts kept in group {uneven} "
                    f"(ids {uneven * size}..{uneven * size + size - 1})",
                    object=f"blk.{layer}.ffn_down_exps.weight",
                    expected=per_group,
                    hint=f"keep the same number in each of the {groups} groups, or routing is re-partitioned",
                )
            )
    return faults


# --- token embeddings -----------------------------------------------------------------------------------------------


def check_embedding(architecture: str, metadata: Metadata, shape: tuple[int, ...]) -> list[SurgeryError]:
    """Keys that contradict token_embd.weight, whose shape is [tokens, embedding_length]."""
    faults: list[SurgeryError] = []
    if len(shape) != 2 or f"{architecture}.features_length" in metadata:  # there the rows are features (wavtokenizer)
        return faults
    for key, expected in ((f"{architecture}.embedding_length", shape[1]), ("tokenizer.ggml.tokens", shape[0])):
        value = metadata.get(key)
        if value is None:
            continue
        number = len(value) if value.type.endswith("[]") else value.value
        if number != expected:
            faults.append(
                BadPlan(
                    "does not fit token_embd.weight",
                    object=key,
                    found=number,
                    expected=f"{expected}, of shape {list(shape)}",
                )
            )
    return faults


# --- general.tensor_extra.*: "name" lists tensors, every other array there is parallel to it ------------------------

EXTRA_NAME = "general.tensor_extra.name"


def is_tensor_extra(key: str) -> bool:
    return key.startswith("general.tensor_extra.")


def check_tensor_extra(metadata: Metadata) -> list[SurgeryError]:
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
