"""What llama.cpp keeps of the tokens that it has seen: caches of keys and values, and recurrent states. Their sizes
follow from metadata alone.

The rules are those of create_memory (llama-model.cpp), llama-hparams.cpp, llama-kv-cache*.cpp, llama-memory-*.cpp, and
load_arch_hparams of each architecture (src/models).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from .._core import Value
from ..base.errors import BadFile, BadPlan, Unsupported
from ..quant.types import row_bytes, tensor_type
from .keys import NOT_MTP, Get, as_count, getter, mtp_fault
from .layers import KNOWN, PERIODS, RECURRENT_WITHOUT_HEADS
from .loader import MAX_LAYERS, check_layer_count

CELLS = 256  # caches are padded to a multiple of these
CACHE_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL")  # of --cache-type-k and -v


class Row(NamedTuple):
    """The elements that a cell has in one layer. value 0: the keys serve as values too (MLA)."""

    key: int
    value: int


@dataclass(frozen=True)
class Cache:
    """One of llama.cpp's caches. kind: "attention" (all tokens), "window" (of a sliding window), "indexer" (the keys by
    which sparse attention finds tokens), "compressed" (a cell for several tokens).

    rows: of each layer that is in it. widest: elements of all its values where they are transposed, without flash
    attention. window: tokens of the sliding window, or None. ratio: tokens of a cell. apart: each sequence has cells of
    its own, even where sequences share a cache otherwise.
    """

    kind: str
    rows: tuple[Row, ...]
    widest: int = 0
    window: int | None = None
    ratio: int = 1
    apart: bool = False


class State(NamedTuple):
    """float32 numbers that each sequence has in each of so many layers, whatever its length."""

    kind: str  # "convolution", "state", "history", "compressor"
    layers: int
    elements: int


@dataclass(frozen=True)
class Caches:
    """All of a model. heads: the lengths of a key's and a value's head that a type must divide. same_types: keys and
    values must have the same type. flash: False where llama.cpp never uses flash attention."""

    attention: tuple[Cache, ...] = ()
    states: tuple[State, ...] = ()
    heads: tuple[Row, ...] = ()
    same_types: bool = False
    flash: bool = True


@dataclass(frozen=True)
class Use:
    """How a context is opened: its options in llama.cpp's programs. context: tokens of all sequences together.
    unified: they share one cache. batch: --ubatch-size."""

    context: int
    sequences: int = 1
    unified: bool = False
    batch: int = 512
    key_type: str = "F16"
    value_type: str = "F16"
    flash: bool = True

    @property
    def per_sequence(self) -> int:
        """Tokens that one sequence can have."""
        return padded(self.context) if self.unified else padded(padded(self.context) // self.sequences)

    @property
    def total(self) -> int:
        """Tokens that the context has room for, padding included."""
        return self.per_sequence if self.unified else self.per_sequence * self.sequences


def padded(n: int) -> int:
    return -(-n // CELLS) * CELLS


# --- sizes ------------------------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """Of one cache. streams: how many times it is there, one for each sequence that has its own."""

    cells: int
    streams: int
    key_bytes: int
    value_bytes: int


def size_of(cache: Cache, caches: Caches, use: Use) -> Size:
    """What llama.cpp allocates. The types of `use` are those that check_types lets pass."""
    streams = use.sequences if cache.apart or not use.unified else 1
    cells = use.per_sequence
    if cache.window is not None:
        shared = use.sequences if streams == 1 else 1
        cells = min(cells, cache.window * shared + min(use.context, use.batch))
    cells = padded(max(1, -(-cells // cache.ratio)))
    key, value = token_bytes(cache, caches, use)
    return Size(cells, streams, cells * streams * key, cells * streams * value)


def token_bytes(cache: Cache, caches: Caches, use: Use) -> tuple[int, int]:
    """The bytes of the keys and of the values of one cell, in all layers."""
    flash = use.flash and caches.flash
    key = sum(row_bytes(use.key_type, row.key) for row in cache.rows)
    values = (row.value if flash else cache.widest for row in cache.rows if row.value)
    return key, sum(row_bytes(use.value_type, n) for n in values)


def state_bytes(caches: Caches, sequences: int) -> int:
    return 4 * sequences * sum(state.layers * state.elements for state in caches.states)


def check_types(architecture: str, caches: Caches, use: Use) -> None:
    """BadPlan for types of caches that llama.cpp refuses for this model."""
    key, value = tensor_type(use.key_type), tensor_type(use.value_type)
    if not caches.attention:
        return
    if caches.same_types and use.key_type != use.value_type:
        raise BadPlan(
            "llama.cpp takes only one type for the keys and values of this model",
            object=architecture,
            found=f"{use.key_type} and {use.value_type}",
        )
    flash = use.flash and caches.flash
    if value.quantized and not flash:
        raise BadPlan("values can only be quantized with flash attention", object=architecture, found=use.value_type)
    rows = [row for cache in caches.attention for row in cache.rows] + [*(caches.heads if flash else ())]
    for what, facts, lengths in (("key", key, {r.key for r in rows}), ("value", value, {r.value for r in rows})):
        for length in sorted(lengths):
            if facts.quantized and length % facts.block:
                raise BadPlan(
                    f"a {what} is not a multiple of the block of the cache's type",
                    object=architecture,
                    found=f"{length} elements",
                    expected=f"a multiple of {facts.block} ({facts.name})",
                )


# --- what a file says -------------------------------------------------------------------------------------------------

_MOST = 1 << 32  # llama.cpp reads these keys as u32


class _Keys:
    """The numbers of one model, checked. layers: all that llama.cpp counts; trunk: those before the MTP layers."""

    def __init__(self, architecture: str, metadata: Mapping[str, Value]):
        self.architecture = architecture
        self.get: Get = getter(metadata)
        blocks, nextn = self.count("block_count"), self.count("nextn_predict_layers", 0)
        for fault in (check_layer_count(architecture, blocks), mtp_fault(architecture, blocks, nextn)):
            if fault is not None:
                raise fault
        self.blocks, self.layers, self.trunk = blocks, blocks, blocks - nextn
        self.heads = self.per_layer("attention.head_count", 0)
        self.kv_heads = self.per_layer("attention.head_count_kv", self.heads)
        self.embedding = self.count("embedding_length")
        self._expand()
        head = self.embedding // self.heads[0] if self.heads[0] else 0
        self.key = self.count("attention.key_length", head) if head or architecture == "plamo2" else 0
        self.value = self.count("attention.value_length", head) if head or architecture == "plamo2" else 0
        if architecture in VALUE_IS_LATENT:
            self.value = self.count("attention.kv_lora_rank")
        self.window_key = self.count("attention.key_length_swa", self.key)
        self.window_value = self.count("attention.value_length_swa", self.value)
        self.latent = architecture in LATENT and all(
            self.count(f"attention.{part}_length_mla", 0) for part in ("key", "value")
        )

    def _expand(self) -> None:
        """Layers that are in no file: loops over the same ones, and the router of adapters."""
        if self.architecture == "nanbeige":
            loops = self.count("num_loops", 1)
            if not 1 <= loops * self.trunk <= MAX_LAYERS:
                raise BadFile("out of llama.cpp's range", object=self.name("num_loops"), found=loops)
            if loops > 1:
                self.heads, self.kv_heads = (x[: self.trunk] * loops for x in (self.heads, self.kv_heads))
                self.trunk, self.layers = self.trunk * loops - (self.blocks - self.trunk), self.trunk * loops
        if self.architecture in NOT_MTP:
            self.heads, self.kv_heads = ([*x[: self.trunk], 1] for x in (self.heads, self.kv_heads))
            self.layers = self.trunk = self.trunk + 1

    def name(self, word: str) -> str:
        return f"{self.architecture}.{word}"

    def count(self, word: str, default: int | None = None) -> int:
        value = self.get(self.name(word))
        return default if value is None and default is not None else self._number(value, word)

    def _number(self, value: object, word: str) -> int:
        number = as_count(value, self.name(word))
        if number >= _MOST:
            raise BadFile("more than llama.cpp takes", object=self.name(word), found=number)
        return number

    def array(self, word: str) -> list[int] | None:
        """The numbers or truth values of an array; None where there is none, or a single value."""
        value = self.get(self.name(word))
        if not isinstance(value, list):
            return None
        return [int(x) if isinstance(x, bool) else self._number(x, word) for x in value]

    def per_layer(self, word: str, default: int | list[int] | None = None) -> list[int]:
        """One number for each layer of the file."""
        found = self.array(word)
        if found is None:
            if isinstance(default, list) and self.get(self.name(word)) is None:
                return default
            return [self.count(word, None if isinstance(default, list) else default)] * self.blocks
        if len(found) != self.blocks:
            raise BadFile(
                "an array without one element per layer", object=self.name(word), found=len(found), expected=self.blocks
            )
        return found

    def row(self, layer: int, windowed: bool) -> Row:
        key, value = (self.window_key, self.window_value) if windowed else (self.key, self.value)
        return Row(key * self.kv_heads[layer], 0 if self.latent else value * self.kv_heads[layer])


# --- which architecture has what --------------------------------------------------------------------------------------

# fmt: off
WITHOUT_CACHE = frozenset((
    "bert", "dream", "eurobert", "gemma-embedding", "jina-bert-v2", "jina-bert-v3", "llada", "llada-moe", "modern-bert",
    "neo-bert", "nomic-bert", "nomic-bert-moe", "rnd1", "wavtokenizer-dec"))
DRAFTS = frozenset(("dflash", "gemma4-assistant"))  # what they allocate depends on the model that they draft for
ALL_RECURRENT = frozenset(("arwkv7", "mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7"))
# Every nth layer has attention, the others are recurrent.
INTERVALS = {"minimax-01": 8, "qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "qwen4exp": 4}
# Keys are the compressed latent, which is the value too, where the file has the lengths of MLA.
LATENT = frozenset((
    "bailingmoe3", "deepseek2", "deepseek32", "dots3note", "glm-dsa", "glm5-next", "hy_v4", "kimi-k3",
    "kimi-linear", "mistral4"))
VALUE_IS_LATENT = frozenset(("glm5-next", "kimi-k3"))
SPARSE = frozenset(("deepseek32", "dots3note", "glm-dsa", "hy_v4"))  # MLA with an indexer (DSA)
# Grok's flash attention is off whatever is asked for.
WITHOUT_FLASH = frozenset(("grok",))
# How long a sliding window is: None, as attention.sliding_window says, which must be there; 0, the same, and no window
# without it; else this, where the key does not say otherwise.
WINDOWS: Mapping[str, int | None] = {
    "afmoe": 0, "cohere2": None, "cohere2moe": None, "deepseek4": None, "dots3note": None, "exaone-moe": None,
    "exaone4": 4096, "gemma2": 4096, "gemma3": 0, "gemma3n": None, "gemma4": None, "gpt-oss": None, "granite_swa": None,
    "laguna": 0, "lfm2": 0, "llama4": 8192, "maple": None, "mellum": 0, "mimo2": None, "muse-glimmer": None, "olmo2": 0,
    "plamo3": 0, "smallthinker": 0, "spark2_5": None, "step35": None,
}
FIXED_WINDOWS = {"llama4": 8192, "smallthinker": 4096}  # whatever the key says, but for 0
# Which of n layers sees everything, and n, where PERIODS (layers.py) does not say.
_MORE_PERIODS = {"exaone4": ("last", 4), "gemma3n": ("last", 5)}
# fmt: on
_PATTERN, _WINDOW = "attention.sliding_window_pattern", "attention.sliding_window"


def caches(architecture: str, metadata: Mapping[str, Value]) -> Caches:
    """What llama.cpp allocates for a model. BadFile for numbers that it cannot take, Unsupported for an architecture
    whose caches are not known."""
    if architecture in DRAFTS or architecture not in KNOWN:
        raise Unsupported(
            "the caches of this architecture are not known",
            object=architecture or "general.architecture",
            hint="those of a draft depend on the model that it drafts for" if architecture in DRAFTS else None,
        )
    if architecture in WITHOUT_CACHE:
        return Caches()
    keys = _Keys(architecture, metadata)
    if architecture == "deepseek4":
        return _compressed(keys)
    window, windowed = _windowed(keys)
    recurrent, attending = _layers(keys)
    rows = [(layer, keys.row(layer, layer in windowed)) for layer in attending]
    widest = max((keys.row(layer, layer in windowed).value for layer in range(keys.layers)), default=0)
    found = [
        Cache("attention", tuple(row for layer, row in rows if layer not in windowed), widest),
        Cache("window", tuple(row for layer, row in rows if layer in windowed), widest, window),
        Cache("indexer", _indexer(keys, [layer for layer in attending if layer not in windowed]), keys.value),
    ]
    if window is not None and attending and not windowed and not recurrent:
        raise BadFile("a sliding window, and no layer that has one", object=keys.name(_PATTERN))
    return Caches(
        attention=tuple(cache for cache in found if cache.rows),
        states=tuple(state for state in _states(keys, len(recurrent)) if state.layers and state.elements),
        heads=_heads(keys, windowed),
        same_types=keys.latent,
        flash=architecture not in WITHOUT_FLASH,
    )


def _heads(keys: _Keys, windowed: frozenset[int]) -> tuple[Row, ...]:
    lengths = (
        (keys.window_key, keys.window_value) if i in windowed else (keys.key, keys.value) for i in range(keys.trunk)
    )
    return tuple(sorted({Row(*pair) for pair in lengths}))


def _windowed(keys: _Keys) -> tuple[int | None, frozenset[int]]:
    """The length of the sliding window, and which layers have it; (None, none) without one."""
    architecture, none = keys.architecture, frozenset[int]()
    if architecture not in WINDOWS or (architecture == "exaone4" and keys.trunk != 64):
        return None, none
    default = WINDOWS[architecture]
    window = keys.count(_WINDOW, default)
    if not window and (default == 0 or architecture == "llama4"):
        return None, none
    window = FIXED_WINDOWS.get(architecture, window)
    if architecture == "lfm2":
        return window, frozenset(i for i in range(keys.trunk) if keys.kv_heads[i])
    listed = keys.array(_PATTERN)
    if listed is not None:
        return window, frozenset(i for i, x in enumerate(listed[: keys.layers]) if x)
    special, n = _MORE_PERIODS.get(architecture, ("", 0))
    for rule in PERIODS.get(architecture, ()):
        if rule.listed_by == _PATTERN:
            special, n = rule.special, rule.default
    if not special:
        raise BadFile("missing metadata", object=keys.name(_PATTERN), expected="one element per layer")
    n = keys.count(_PATTERN, n)
    full = {"first": 0, "last": n - 1}[special]
    return window, frozenset(i for i in range(keys.trunk) if n == 0 or i % n != full)


def _layers(keys: _Keys) -> tuple[list[int], list[int]]:
    """The recurrent layers, and those with keys and values."""
    architecture, everything, trunk = keys.architecture, range(keys.layers), range(keys.trunk)
    if architecture in ALL_RECURRENT:
        return list(trunk), []
    if architecture == "falcon-h1":
        return list(trunk), list(everything)
    if architecture in INTERVALS:
        listed = keys.get(keys.name("attention.recurrent_layers"))
        interval = keys.count("full_attention_interval", INTERVALS[architecture])
        if listed is None and not interval:
            raise BadFile("not an interval", object=keys.name("full_attention_interval"), found=0)
        kinds = keys.per_layer("attention.recurrent_layers") if listed is not None else None
        recurrent = [i for i in trunk if (kinds[i] if kinds is not None else (i + 1) % interval)]
        return recurrent, [i for i in trunk if i not in recurrent]
    if architecture.startswith("nemotron_h"):
        ffn = keys.per_layer("feed_forward_length", 0)
        recurrent = [i for i in trunk if not keys.kv_heads[i] and not ffn[i]]
        return recurrent, [i for i in everything if not ffn[i] and i not in recurrent]
    if architecture in RECURRENT_WITHOUT_HEADS:
        recurrent = [i for i in trunk if not keys.kv_heads[i]]
        last = trunk if architecture == "glm5-next" else everything
        return recurrent, [i for i in last if i not in recurrent]
    # A file may be nothing but MTP layers.
    some = everything if not trunk or architecture in ("hy_v4", "minimax-m3") else trunk
    if architecture == "gemma3n":
        return [], [i for i in some if i < 20]
    if architecture == "gemma4":
        return [], [i for i in some if i < keys.layers - keys.count("attention.shared_kv_layers", 0)]
    return [], list(some)


def _indexer(keys: _Keys, attending: list[int]) -> tuple[Row, ...]:
    """The rows of the keys by which sparse attention finds its tokens: one head of its own."""
    architecture = keys.architecture
    if architecture == "hy_v4" and not keys.count("attention.indexer.top_k", 0):
        return ()
    if architecture not in (*SPARSE, "glm5-next", "qwen4exp", "minimax-m3"):
        return ()
    length = keys.count("attention.indexer.key_length")
    if architecture == "minimax-m3":
        lead = keys.count("leading_dense_block_count", 0)
        return tuple(Row(length, keys.value) for i in attending if i >= lead)
    full: Callable[[int], bool] = _full_indexers(keys)
    # glm5-next keeps a key, a gate and a pooled key.
    row = Row(
        length * 3 if architecture == "glm5-next" else length,
        0 if keys.latent or architecture == "qwen4exp" else keys.value,
    )
    return tuple(row for i in attending if i < keys.trunk and full(i)) if length else ()


def _full_indexers(keys: _Keys) -> Callable[[int], bool]:
    """Which layers have an indexer of their own; the others use that of a layer before."""
    architecture = keys.architecture
    if architecture in ("deepseek32", "qwen4exp"):
        return lambda layer: True
    word = "attention.indexer.types"
    listed = keys.array(word)
    if listed is None and keys.get(keys.name(word)) is not None:
        listed = [keys.count(word)] * keys.trunk
    if listed is not None:
        return lambda layer: layer < len(listed) and listed[layer] != 0
    if architecture == "glm-dsa" and keys.count("context_length") >= 1 << 20:
        return lambda layer: layer < 2 or layer % 4 == 2
    if architecture in ("glm-dsa", "glm5-next"):
        return lambda layer: True
    raise BadFile("missing metadata", object=keys.name(word), expected="one element per layer")


def _states(keys: _Keys, layers: int) -> Iterable[State]:
    """What each sequence has in a recurrent layer: the last inputs of a convolution (or of a shift), and the state."""
    if not layers:
        return
    architecture = keys.architecture
    if architecture in ALL_RECURRENT and not architecture.startswith("mamba"):
        size = keys.count("wkv.head_size")
        yield State("convolution", layers, keys.count("token_shift_count", 2) * keys.embedding)
        yield State("state", layers, keys.embedding * size)
    elif architecture in ("lfm2", "lfm2moe"):
        yield State("convolution", layers, keys.embedding * (max(1, keys.count("shortconv.l_cache")) - 1))
    elif architecture == "minimax-01":
        yield State("state", layers, keys.key**2 * keys.heads[0])
    elif architecture in ("bailingmoe3", "glm5-next", "kimi-k3", "kimi-linear"):
        head, kernel = keys.count("kda.head_dim"), keys.count("ssm.conv_kernel")
        yield State("convolution", layers, 3 * (kernel - 1 if kernel else 3) * keys.heads[0] * head)
        yield State("state", layers, head**2 * keys.heads[0])
    else:
        kernel, inner, size = (keys.count(f"ssm.{word}") for word in ("conv_kernel", "inner_size", "state_size"))
        groups = 0 if architecture in ("jamba", "mamba") else keys.count("ssm.group_count")
        yield State("convolution", layers, max(0, kernel - 1) * (inner + 2 * groups * size))
        yield State("state", layers, size * inner)
    if architecture == "qwen4exp" and (listed := keys.array("ple.layers")):
        kernel, ngram = keys.count("ple.conv_kernel"), keys.count("ple.ngram_size")
        rows = max(0, kernel - 1) * ngram * keys.count("hyper_connection.count")
        yield State("history", len(set(listed)), rows * keys.embedding)


def _compressed(keys: _Keys) -> Caches:
    """deepseek4: a window of all layers, and of some a cell for each 4 or 128 tokens, with what is not yet a cell."""
    window = keys.count(_WINDOW)
    ratios = keys.array("attention.compress_ratios")
    if ratios is None or len(ratios) < keys.layers:
        raise BadFile("fewer elements than layers", object=keys.name("attention.compress_ratios"), expected=keys.layers)
    keys.latent = True
    rows = [keys.row(layer, True) for layer in range(keys.layers)]
    indexer = keys.count("attention.indexer.key_length")
    found = [Cache("window", tuple(rows), window=window, apart=True)]
    states = []
    for ratio, states_of_cell in ((4, 2), (128, 1)):
        those = [i for i in range(keys.layers) if ratios[i] == ratio]
        found.append(Cache("compressed", tuple(rows[i] for i in those), ratio=ratio, apart=True))
        trunk = sum(i < keys.trunk for i in those)
        elements = 2 * states_of_cell**2 * ratio  # two tensors, of rows twice as long and twice as many for ratio 4
        states.append(State("compressor", trunk, elements * keys.window_key))
        if ratio == 4:
            found.append(Cache("indexer", (Row(indexer, 0),) * len(those), ratio=ratio, apart=True))
            states.append(State("compressor", trunk, elements * indexer))
    return Caches(
        attention=tuple(cache for cache in found if cache.rows),
        states=tuple(state for state in states if state.layers and state.elements),
        heads=_heads(keys, frozenset(range(keys.trunk))),
        same_types=True,
    )
