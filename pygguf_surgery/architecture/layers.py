"""What llama.cpp makes of a layer's number, architecture by architecture (src/models)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from .._core import Value
from ..base.errors import BadPlan, SurgeryError, Unsupported
from ..base.words import ranges
from .keys import Get, getter, read_count, whole_numbers

Metadata = Mapping[str, Value]


# --- what llama.cpp makes of a layer's number -------------------------------------------------------------------------


@dataclass(frozen=True)
class Period:
    """One layer of every n differs from the others: the "first", "second" or "last" of each n. key, under
    "{architecture}.": where n is; `default` where it is missing (0: all layers are alike). listed_by: an array of one
    element per layer that llama.cpp reads in place of n. window: only where attention.sliding_window is not 0."""

    special: str
    default: int
    key: str | None = None
    listed_by: str | None = None
    window: bool = False


def _swa(default: int, *, special: str = "last", window: bool = False) -> Period:
    key = "attention.sliding_window_pattern"
    return Period(special, default, key, key, window)


RECURRENT = Period("last", 4, "full_attention_interval", "attention.recurrent_layers")

# fmt: off
PERIODS: Mapping[str, tuple[Period, ...]] = {
    "afmoe": (_swa(4, window=True), Period("last", 4)),                  # every fourth: no rope
    "cohere2": (_swa(4),),
    "cohere2moe": (_swa(4, special="first"),),
    "ernie4_5-moe": (Period("last", 0, "interleave_moe_layer_step"),),
    "exaone-moe": (_swa(4),),
    "exaone4": (),                                                       # only with 64 layers: BY_COUNT
    "gemma-embedding": (_swa(6),),
    "gemma2": (_swa(2),),
    "gemma3": (_swa(6, window=True),),
    "gpt-oss": (_swa(2),),
    "kimi-k3": (Period("first", 0, "attn_res.block_size"),),
    "laguna": (_swa(4, special="first", window=True),),
    "llama4": (Period("last", 0, "interleave_moe_layer_step"), _swa(4, window=True), Period("last", 4, window=True)),
    "mellum": (_swa(4, window=True),),
    "modern-bert": (_swa(3, special="first", window=True),),
    "muse-glimmer": (_swa(4),),
    "nomic-bert-moe": (Period("second", 0, "moe_every_n_layers"),),
    "olmo2": (_swa(4, window=True),),
    "plamo3": (_swa(8, window=True),),
    "qwen3next": (RECURRENT,),
    "qwen35": (RECURRENT,),
    "qwen35moe": (RECURRENT,),
    "qwen4exp": (RECURRENT,),
    "smallthinker": (_swa(4, special="first", window=True), Period("first", 4, window=True)),  # the latter: no rope
    "smollm3": (Period("last", 4),),                                     # every fourth: no rope
}
# fmt: on


def _tokens(architecture: str, metadata: Metadata) -> object:
    if (value := metadata.get(f"{architecture}.vocab_size")) is not None:
        return value.value
    tokens = metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if tokens is not None and tokens.type.endswith("[]") else 0


def _deepseek2(architecture: str, metadata: Metadata, n: int) -> object:
    tokens = _tokens(architecture, metadata)
    lite = n in (26, 27) or (n == 48 and tokens == 128256)
    gating = f"{architecture}.expert_gating_func"
    return lite, gating not in metadata and n in (47, 48) and tokens == 154880


def _minicpm(architecture: str, metadata: Metadata, n: int) -> object:
    return None if f"{architecture}.residual_scale" in metadata else n


def _last(architecture: str, metadata: Metadata, n: int) -> object:
    return n


# fmt: off
# What llama.cpp derives from the number of layers (n, without MTP layers): it must come to the same afterwards.
BY_COUNT: Mapping[str, tuple[str, Callable[[str, Metadata, int], object]]] = {
    "baichuan": ("position encoding", lambda _, __, n: n if n in (32, 40) else None),
    "command-r": ("norms of query and key", lambda _, __, n: n >= 64),
    "deepseek2": ("kind of attention and gate", _deepseek2),
    "mistral4": ("kind of attention and gate", _deepseek2),
    "exaone4": ("sliding window", lambda _, __, n: n == 64),
    "gemma2": ("scale of attention", lambda _, __, n: n == 46),
    "gemma3": ("scale of attention", lambda _, __, n: n == 62),
    "gemma3n": ("caches, sparsity and embedding of each layer", _last),
    "hrm_text": ("stacks and cycles", _last),
    "minicpm": ("residual scale", _minicpm),
    "minicpm3": ("residual scale", _last),
    "minimax-01": ("decay of attention", _last),
}
# fmt: on

# Layers without KV heads are recurrent (nemotron_h: if they have no FFN either).
RECURRENT_WITHOUT_HEADS = frozenset(
    (
        "bailingmoe3",
        "glm5-next",
        "granitehybrid",
        "jamba",
        "kimi-k3",
        "kimi-linear",
        "lfm2",
        "lfm2moe",
        "nemotron_h",
        "nemotron_h_moe",
        "plamo2",
    )
)
_NUMBERED_APART, _DRAFT = "encoder and decoder are numbered apart", "a draft model belongs to the layers of another"
# fmt: off
NEVER: Mapping[str, str] = {
    "t5": _NUMBERED_APART, "t5encoder": _NUMBERED_APART, "wavtokenizer-dec": "its blocks are not layers",
    "dflash": _DRAFT, "eagle3": _DRAFT, "gemma4-assistant": _DRAFT,
}
# fmt: on

# fmt: off
# Architectures whose layers are alike, or differ only by arrays with one element per layer and by their tensors.
UNIFORM = frozenset("""
    apertus arcee arctic bailingmoe bailingmoe2 bailingmoe3 bert bitnet bloom chameleon chatglm codeshell cogvlm
    dbrx deci deepseek deepseek2-ocr deepseek32 deepseek4 dots1 dots3note dream ernie4_5 eurobert exaone falcon
    falcon-h1 gemma gemma4 glm-dsa glm4 glm4moe glm5-next gpt2 gptj gptneox granite granite_swa granitehybrid
    granitemoe graniteswitch grok grovemoe hunyuan-dense hunyuan-moe hunyuan_vl hy_v3 hy_v4 internlm2 jais jais2
    jamba jina-bert-v2 jina-bert-v3 kimi-linear lfm2 lfm2moe llada llada-moe llama llama-embed maincoder mamba
    mamba2 maple mimo2 minimax-m2 minimax-m3 mistral3 mpt nanbeige nemotron nemotron_h nemotron_h_moe neo-bert
    nomic-bert olmo olmoe openelm orion paddleocr pangu-embedded phi2 phi3 phimoe plamo plamo2 plm pockettts qwen
    qwen2 qwen2moe qwen2vl qwen3 qwen3moe refact rnd1 rwkv6 rwkv6qwen2 seed_oss spark2_5 stablelm starcoder
    starcoder2 step35 talkie xverse
""".split())  # noqa: SIM905
# fmt: on

# --- rules of single architectures ----------------------------------------------------------------------------------


def _moved(kept: list[int], facts: Sequence[object]) -> str | None:
    """In words, the first layer that comes to a place of which another fact holds. facts: of each place."""
    moves = (f"layer {old} becomes layer {new}" for new, old in enumerate(kept) if facts[old] != facts[new])
    return next(moves, None)


def _first_stays(architecture: str, metadata: Metadata, n: int, kept: list[int]) -> SurgeryError | None:
    """Layer 0 is built otherwise: its values are those that all other layers mix in."""
    if kept[0] == 0:
        return None
    return BadPlan("the first layer is not like the others and must stay", object="blk.0")


def _last_without_rope(architecture: str, metadata: Metadata, n: int, kept: list[int]) -> SurgeryError | None:
    if _window(architecture, getter(metadata)) or kept[-1] == n - 1:
        return None
    return BadPlan("llama.cpp uses no rope in the last layer: it must stay", object=f"blk.{n - 1}")


def _rescaled(architecture: str, metadata: Metadata, n: int, kept: list[int]) -> SurgeryError | None:
    """The converter divided the weights of layer i by 2^(i // step), and llama.cpp halves the state as it goes."""
    key = f"{architecture}.rescale_every_n_layers"
    step = read_count(getter(metadata), key, 0)
    moved = _moved(kept, [layer // step for layer in range(n)]) if step else None
    if moved is None:
        return None
    return BadPlan(f"the weights are scaled for their place, every {step} layers", object=key, found=moved)


def _deep_stack(architecture: str, metadata: Metadata, n: int, kept: list[int]) -> SurgeryError | None:
    """The first n_deepstack_layers take the layers of an image's embedding, one each."""
    key = f"{architecture}.n_deepstack_layers"
    deep = read_count(getter(metadata), key, 0)
    moved = _moved(kept, [min(layer, deep) for layer in range(n)])
    if moved is None:
        return None
    return BadPlan(f"the first {deep} layers take embeddings of images and must stay", object=key, found=moved)


def _full_indexers(architecture: str, metadata: Metadata, n: int, kept: list[int]) -> SurgeryError | None:
    """Without a list llama.cpp has its own table for long contexts: the first two, then one of every four."""
    key = f"{architecture}.attention.indexer.types"
    if key in metadata or read_count(getter(metadata), f"{architecture}.context_length", 0) < 1 << 20:
        return None
    moved = _moved(kept, [layer < 2 or layer % 4 == 2 for layer in range(n)])
    if moved is None:
        return None
    return BadPlan(
        "layers alternate with period 4 after the first two",
        object=key,
        found=moved,
        hint="drop whole periods: 4 consecutive layers, or the last ones",
    )


# What llama.cpp makes of a place, beside periods. A rule takes architecture, metadata, the number of layers and the
# layers that stay, and says why those would not compute what they did.
BY_PLACE: Mapping[str, Callable[[str, Metadata, int, list[int]], SurgeryError | None]] = {
    "rwkv7": _first_stays,
    "arwkv7": _first_stays,
    "llama4": _last_without_rope,
    "rwkv6": _rescaled,
    "qwen3vl": _deep_stack,
    "qwen3vlmoe": _deep_stack,
    "qwen3tts": _deep_stack,
    "glm-dsa": _full_indexers,
}

KNOWN = frozenset((*PERIODS, *BY_COUNT, *BY_PLACE, *NEVER, *UNIFORM))


# --- what must not change --------------------------------------------------------------------------------------------


def obstacles(
    architecture: str, names: Collection[str], metadata: Metadata, n: int, kept: list[int]
) -> Iterable[SurgeryError]:
    """Why llama.cpp would not compute with the layers `kept` of n what it did. Numbers are those without MTP layers.
    names: of all tensors."""
    if architecture in NEVER:
        yield Unsupported(
            "layers of this architecture cannot be dropped", object=architecture, hint=NEVER[architecture]
        )
        return
    if any(name.startswith(("enc.blk.", "dec.blk.")) for name in names):
        yield Unsupported(
            "layers of an encoder or decoder cannot be dropped", object=architecture, hint="they are numbered apart"
        )
    for name in ("per_layer_token_embd.weight", "per_layer_model_proj.weight"):
        if name in names:
            yield Unsupported(
                "one tensor has columns of every layer", object=name, hint="layers of such a model cannot be dropped"
            )
    get = getter(metadata)
    if shared := read_count(get, f"{architecture}.attention.shared_kv_layers", 0):
        yield Unsupported(
            f"the last {shared} layers use the keys and values of earlier ones",
            object=f"{architecture}.attention.shared_kv_layers",
            hint="its layers cannot be dropped",
        )
    yield from _count_obstacles(architecture, metadata, n, kept)
    yield from _period_obstacles(architecture, metadata, n, kept)
    yield from _kind_obstacles(architecture, metadata, n, kept)
    if architecture in BY_PLACE and (fault := BY_PLACE[architecture](architecture, metadata, n, kept)):
        yield fault
    yield from _image_obstacles(architecture, metadata, n, kept)


def _count_obstacles(architecture: str, metadata: Metadata, n: int, kept: list[int]) -> Iterable[SurgeryError]:
    if architecture not in BY_COUNT:
        return
    what, fact = BY_COUNT[architecture]
    if fact(architecture, metadata, n) == fact(architecture, metadata, len(kept)):
        return
    hint = None
    if architecture == "minicpm":
        hint = f"set {architecture}.residual_scale to {1.4 / n**0.5:.6g}, what it is with {n} layers"
    yield BadPlan(
        f"llama.cpp chooses the {what} by the number of layers",
        object=f"{architecture}.block_count",
        found=f"{n} layers, then {len(kept)}",
        hint=hint,
    )


def periods(architecture: str, metadata: Metadata) -> list[tuple[Period, str | None, int, int]]:
    """(rule, key, n, r) of each rule of PERIODS that holds for this model: layers with number % n == r differ."""
    get = getter(metadata)
    found = []
    for rule in PERIODS.get(architecture, ()):
        listed = metadata.get(f"{architecture}.{rule.listed_by}")
        if listed is not None and (listed.type.endswith("[]") or rule.key != rule.listed_by):
            continue
        if rule.window and not _window(architecture, get):
            continue
        key = None if rule.key is None else f"{architecture}.{rule.key}"
        n = rule.default if key is None else read_count(get, key, rule.default)
        if n > 1:
            found.append((rule, key, n, {"first": 0, "second": 1, "last": n - 1}[rule.special]))
    return found


def _window(architecture: str, get: Get) -> bool:
    # llama4 without the key has its window of 8192, all others none.
    return read_count(get, f"{architecture}.attention.sliding_window", int(architecture == "llama4")) > 0


def _period_obstacles(architecture: str, metadata: Metadata, n: int, kept: list[int]) -> Iterable[SurgeryError]:
    for _, key, period, special in periods(architecture, metadata):
        if moved := _moved(kept, [layer % period == special for layer in range(n)]):
            yield BadPlan(
                f"layers alternate with period {period}",
                object=key or architecture,
                found=moved,
                hint=f"drop whole periods: {period} consecutive layers, or the last ones",
            )


def _kinds(architecture: str, metadata: Metadata, n: int) -> Iterable[tuple[str, Sequence[object]]]:
    """(key, kind of each layer) of what decides which attention a layer has."""
    for rule, key, period, special in periods(architecture, metadata):
        if rule.listed_by:
            yield key or architecture, [layer % period == special for layer in range(n)]
    for word in ("attention.sliding_window_pattern", "attention.recurrent_layers"):
        if (listed := whole_numbers(metadata, f"{architecture}.{word}")) is not None:
            yield f"{architecture}.{word}", [bool(x) for x in listed[:n]]
    heads, ffn = (
        whole_numbers(metadata, f"{architecture}.{word}") for word in ("attention.head_count_kv", "feed_forward_length")
    )
    if architecture in RECURRENT_WITHOUT_HEADS and heads is not None:
        has_ffn = ffn if ffn is not None and architecture.startswith("nemotron_h") else [0] * len(heads)
        kinds = [(x > 0, y > 0) for x, y in zip(heads[:n], has_ffn, strict=False)]  # the file may list more or fewer
        yield f"{architecture}.attention.head_count_kv", kinds


def _kind_obstacles(architecture: str, metadata: Metadata, n: int, kept: list[int]) -> Iterable[SurgeryError]:
    for key, kinds in _kinds(architecture, metadata, n):
        lost = set(kinds) - {kinds[layer] for layer in kept if layer < len(kinds)}
        if lost:
            alone = [layer for layer, kind in enumerate(kinds) if kind in lost]
            yield BadPlan(
                "llama.cpp stops where no layer of a kind is left",
                object=key,
                hint="keep at least one of " + ranges(alone),
            )


def _image_obstacles(architecture: str, metadata: Metadata, n: int, kept: list[int]) -> Iterable[SurgeryError]:
    """deepstack_mapping says which layer takes which part of an image's embedding."""
    key = f"{architecture}.deepstack_mapping"
    if (mapping := whole_numbers(metadata, key)) is None:
        return
    # Layer 0 takes none, whatever its element says.
    taking = {layer for layer, index in enumerate(mapping[:n]) if index >= 0 and layer > 0}
    if lost := taking - {old for new, old in enumerate(kept) if new > 0}:
        yield BadPlan("layers that take embeddings of images must stay", object=key, found=f"layer {min(lost)}")
    elif kept[0] != 0 and mapping[:1] and mapping[0] >= 0:
        yield BadPlan("layers that take embeddings of images must stay", object=key, found="layer 0")
