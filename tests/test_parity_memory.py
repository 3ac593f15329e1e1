"""Caches and recurrent states against what llama.cpp prints when it allocates them, to the printed digits (pytest -m
parity). llama.cpp makes contexts here and computes nothing; most models are metadata alone."""

from __future__ import annotations

from itertools import product

import gguf
import pytest

import pygguf_surgery as pgs
from pygguf_surgery.architecture.cache import (
    CACHE_TYPES,
    DRAFTS,
    KNOWN,
    WITHOUT_CACHE,
    Use,
    caches,
    check_types,
    size_of,
)
from support import moe_models
from support.llama_memory import ARRAY, WORDS, Asked, mib, write_metadata
from support.places import SHARED

pytestmark = pytest.mark.parity

U64 = gguf.GGUFValueType.UINT64
# llama.cpp loads no model of these that is so small, or none at all (gptj, eagle3 alone).
NOT_HERE = {"eagle3", "gptj", "kimi-linear", "plm", "rwkv6qwen2", "t5"}
ARCHITECTURES = sorted(KNOWN - WITHOUT_CACHE - DRAFTS - NOT_HERE)
FAMILIES = ["qwen3next", "qwen35moe", "llama", "deepseek2", "gemma3", "gpt-oss", "mamba2"]
CONTEXTS = (256, 4096, 32768)
USES = [
    *(dict(context=n) for n in CONTEXTS),
    dict(context=300),
    dict(context=8192, sequences=3),
    dict(context=16384, sequences=64),  # so that small states show
    dict(context=8192, sequences=3, unified=True, batch=128),
    dict(context=1024, flash=False),
]
NOTHING = ("0.00",) * 4
# What one architecture can be beside the models of metadata_of.
VARIANTS = {
    "window listed": ("gemma3", dict(attention__sliding_window_pattern=[1, 1, 0, 1])),
    "window of gemma3": ("gemma3", dict(block_count=13, attention__sliding_window=1024)),
    "no window": ("gemma3", dict(attention__sliding_window=0)),
    "exaone4 of 64 layers": ("exaone4", dict(block_count=64)),
    "shared keys": ("gemma3n", dict(block_count=25)),
    "loops": ("nanbeige", dict(num_loops=3)),
    "interval": ("qwen3next", dict(full_attention_interval=2)),
    "recurrent layers listed": ("qwen35", WORDS["qwen35"] | dict(attention__recurrent_layers=[0, 1, 1, 0])),
    "recurrent without heads": ("jamba", dict(attention__head_count_kv=[0, 2, 0, 4])),
    "nemotron": ("nemotron_h_moe", dict(feed_forward_length=[0, 64, 0, 64], attention__head_count_kv=[0, 0, 2, 0])),
    "short convolution and window": ("lfm2", dict(attention__head_count_kv=[0, 2, 0, 2])),
    "heads of each layer": ("deci", dict(attention__head_count_kv=[1, 2, 4, 4])),
    "no indexer": ("hy_v4", dict(attention__indexer__top_k=0)),
    "indexers by the context": ("glm-dsa", dict(context_length=1 << 20)),
    "a history": (
        "qwen4exp",
        dict(
            ple__layers=[0], ple__ngram_size=3, ple__heads_per_ngram=2, ple__conv_kernel=4, ple__eos_token_id=0,
            embedding_length_per_layer_input=64,
            ple__layer_multipliers=([1, 3, 5], ARRAY, U64), ple__head_offsets=([0, 64, 128, 192], ARRAY, U64),
            ple__head_vocab_sizes=([64] * 4, ARRAY, U64),
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def llama():
    pytest.importorskip("llama_cpp")
    with Asked() as asked:
        yield asked


def ours(path, **options):
    """What `allocated` returns, as we compute it."""
    with pgs.open(path) as model:
        found = caches(model.architecture, model.metadata.exact())
        use = Use(**{{"key": "key_type", "value": "value_type"}.get(name, name): x for name, x in options.items()})
        check_types(model.architecture, found, use)
    sizes = [(len(cache.rows), size_of(cache, found, use)) for cache in found.attention]
    printed = [(s.cells, layers, s.streams, mib(s.key_bytes), mib(s.value_bytes)) for layers, s in sizes]
    states = {"convolution": 0, "state": 0, "history": 0}
    compressors = []
    for kind, layers, elements in found.states:
        nbytes = 4 * use.sequences * layers * elements
        if kind == "compressor":
            compressors.append(mib(nbytes))
        else:
            states[kind] += nbytes
    recurrent = tuple(map(mib, (sum(states.values()), *states.values())))
    return sorted(printed), [] if recurrent == NOTHING else [recurrent], sorted(compressors)


def theirs(llama, path, **options):
    found, states, compressors = llama.allocated(path, **options)
    return found, [s for s in states if s != NOTHING], compressors


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(llama, tmp_path, architecture):
    path = write_metadata(tmp_path / "model.gguf", architecture)
    for use in USES:
        assert ours(path, **use) == theirs(llama, path, weights=False, **use), use


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(llama, tmp_path, name):
    architecture, words = VARIANTS[name]
    path = write_metadata(tmp_path / "model.gguf", architecture, **words)
    plain = ours(write_metadata(tmp_path / "plain.gguf", architecture), **USES[1])
    assert ours(path, **USES[1]) != plain or name == "exaone4 of 64 layers"  # the variant says something
    for use in USES:
        assert ours(path, **use) == theirs(llama, path, weights=False, **use), use


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_all_types_of_caches(llama, tmp_path, architecture, context):
    path = write_metadata(tmp_path / "model.gguf", architecture)
    pairs = product(CACHE_TYPES, CACHE_TYPES) if context == 4096 else zip(CACHE_TYPES, CACHE_TYPES, strict=True)
    for key, value in pairs:
        if architecture == "deepseek2" and key != value:
            continue
        use = dict(context=context, key=key, value=value)
        assert ours(path, **use) == theirs(llama, path, weights=False, **use), use


HEADS_OF_40 = dict(attention__key_length=40, attention__value_length=40, rope__dimension_count=40)  # blocks have 32
REFUSED = [
    ("deepseek2", {}, dict(key="F16", value="Q8_0")),
    ("deepseek4", {}, dict(key="F16", value="Q8_0")),
    ("llama", {}, dict(value="Q8_0", flash=False)),
    ("grok", {}, dict(value="Q8_0")),
    ("llama", HEADS_OF_40, dict(key="Q8_0")),
    ("llama", HEADS_OF_40, dict(value="Q4_0")),
]


@pytest.mark.parametrize(("architecture", "words", "options"), REFUSED)
def test_types_that_llama_cpp_refuses(llama, tmp_path, architecture, words, options):
    path = write_metadata(tmp_path / "model.gguf", architecture, **words)
    with pytest.raises(RuntimeError):
        llama.allocated(path, weights=False, context=256, **options)
    with pytest.raises(pgs.BadPlan):
        ours(path, context=256, **options)
    fine = dict(context=256, key="F16", value="F16")
    assert ours(path, **fine) == theirs(llama, path, weights=False, **fine)


@pytest.mark.parametrize("name", [name for name in moe_models.LOADABLE if name not in ("deepseek2", "dots1")])
def test_files_with_weights(llama, tmp_path, name):
    """(deepseek2 and dots1 of moe_models have several heads, which llama.cpp loads and does not compute.)"""
    path = moe_models.ALL[name](tmp_path / "model.gguf")
    assert ours(path, context=4096) == theirs(llama, path, context=4096)


def test_mtp_layers_have_no_cache(llama, tmp_path):
    path = moe_models.qwen3next(tmp_path / "model.gguf", mtp=True)
    assert ours(path, context=32768) == theirs(llama, path, context=32768)


@pytest.mark.skipif(not SHARED.exists(), reason="the trained model is not here")
def test_a_trained_model(llama):
    path = SHARED / "models" / "tiny-qwen3next-bf16.gguf"
    for use in USES:
        assert ours(path, **use) == theirs(llama, path, **use), use
