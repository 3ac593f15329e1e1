"""Caches and states: published sizes of known models, and hostile numbers. What llama.cpp itself allocates is in
tests/test_parity_memory.py."""

from __future__ import annotations

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pygguf_surgery as pgs
from pygguf_surgery import Value
from pygguf_surgery.architecture.cache import (
    CACHE_TYPES,
    DRAFTS,
    KNOWN,
    WITHOUT_CACHE,
    Use,
    caches,
    check_types,
    size_of,
    state_bytes,
    token_bytes,
)
from support.llama_memory import NUMBERS, metadata_of

GIB, MIB, KIB = 1 << 30, 1 << 20, 1 << 10
TYPES = {gguf.GGUFValueType.UINT32: "u32", gguf.GGUFValueType.FLOAT32: "f32", gguf.GGUFValueType.BOOL: "bool"}


def values(architecture, **words):
    """The numbers and arrays of metadata_of as the package has them."""
    found = {}
    for key, (value, kind, *element) in metadata_of(architecture, **words).items():
        if kind in TYPES or element:
            found[key] = Value(value, TYPES[element[0]] + "[]" if element else TYPES[kind])
    return found


def numbers(architecture, **words):
    return {f"{architecture}.{word.replace('__', '.')}": Value(x, "u32") for word, x in words.items()}


CODER_NEXT = numbers(
    "qwen3next", block_count=48, embedding_length=2048, attention__head_count=16, attention__head_count_kv=2,
    attention__key_length=256, attention__value_length=256, ssm__conv_kernel=4, ssm__inner_size=4096,
    ssm__state_size=128, ssm__group_count=16,
)  # fmt: skip


def grown(found, use):
    """Bytes per token of context."""
    return sum(sum(token_bytes(cache, found, use)) for cache in found.attention)


@pytest.mark.parametrize(
    ("key", "value", "kib", "gib"),
    [("F16", "F16", 24, 6.0), ("Q8_0", "Q8_0", 12.75, 3.1875),
     ("Q8_0", "Q4_0", 9.75, 2.4375), ("Q4_0", "Q4_0", 6.75, 1.6875)],
)  # fmt: skip
def test_qwen3_coder_next(key, value, kib, gib):
    found, use = caches("qwen3next", CODER_NEXT), Use(262144, key_type=key, value_type=value)
    (attention,) = found.attention
    size = size_of(attention, found, use)
    assert len(attention.rows) == 12 and grown(found, use) == kib * KIB
    assert size.key_bytes + size.value_bytes == gib * GIB
    assert state_bytes(found, 1) == 75.375 * MIB and state_bytes(found, 3) == 3 * 75.375 * MIB


def test_mtp_layers_have_neither():
    more = CODER_NEXT | numbers("qwen3next", block_count=50, nextn_predict_layers=2)
    assert caches("qwen3next", more) == caches("qwen3next", CODER_NEXT)


def test_qwen36_27b_as_a_log_shows_it():
    metadata = {key.replace("qwen3next", "qwen35"): value for key, value in CODER_NEXT.items()}
    found = caches("qwen35", metadata | numbers("qwen35", block_count=64, ssm__inner_size=6144))
    assert found.states[0].layers == 48 and round(state_bytes(found, 4) / MIB, 1) == 598.5


def test_deepseek_v3():
    found = caches(
        "deepseek2",
        numbers(
            "deepseek2", block_count=61, embedding_length=7168, attention__head_count=128, attention__head_count_kv=1,
            attention__key_length=576, attention__value_length=512, attention__key_length_mla=192,
            attention__value_length_mla=128,
        ),
    )  # fmt: skip
    assert grown(found, Use(4096)) == 61 * 576 * 2
    with pytest.raises(pgs.BadPlan, match="only one type"):
        check_types("deepseek2", found, Use(4096, key_type="Q8_0"))


def test_windows_are_short():
    gemma3, use = caches("gemma3", values("gemma3", block_count=12, attention__sliding_window=1024)), Use(32768)
    full, window = gemma3.attention
    assert (len(full.rows), len(window.rows)) == (2, 10)
    assert size_of(full, gemma3, use).cells == 32768 and size_of(window, gemma3, use).cells == 1536
    # Each sequence has its window, in a cache of its own or in that of all.
    assert size_of(window, gemma3, Use(32768, 4))[:2] == (1536, 4)
    assert size_of(window, gemma3, Use(32768, 4, unified=True))[:2] == (4608, 1)
    assert size_of(window, gemma3, Use(512))[0] == 512


def test_every_known_architecture_is_answered():
    for architecture in sorted(KNOWN - DRAFTS):
        words = dict(feed_forward_length=0) if architecture.startswith("nemotron_h") else {}  # else no layer attends
        found = caches(architecture, values(architecture, **words))
        assert bool(found.attention or found.states) == (architecture not in WITHOUT_CACHE), architecture
        check_types(architecture, found, Use(4096))


@pytest.mark.parametrize("architecture", ["", "no-such", *sorted(DRAFTS)])
def test_others_are_an_error(architecture):
    with pytest.raises(pgs.Unsupported, match="not known"):
        caches(architecture, values(architecture))


@pytest.mark.parametrize(
    ("architecture", "words", "object"),
    [
        ("llama", dict(block_count=0), "block_count"),
        ("llama", dict(block_count=513), "block_count"),
        ("llama", dict(nextn_predict_layers=5), "nextn_predict_layers"),
        ("llama", dict(attention__head_count_kv=[1, 2]), "head_count_kv"),
        ("qwen3next", dict(full_attention_interval=0), "full_attention_interval"),
        ("gpt-oss", dict(attention__sliding_window_pattern=[0, 0, 0, 0]), "sliding_window_pattern"),
        ("maple", dict(attention__sliding_window_pattern=3), "sliding_window_pattern"),
        ("deepseek4", dict(attention__compress_ratios=[4, 4]), "compress_ratios"),
        ("nanbeige", dict(num_loops=1000), "num_loops"),
    ],
)
def test_numbers_that_llama_cpp_does_not_take(architecture, words, object):
    with pytest.raises(pgs.BadFile) as error:
        caches(architecture, values(architecture, **words))
    assert error.value.object.endswith(object)


PLAIN = st.one_of(
    st.integers(0, 600).map(lambda x: Value(x, "u32")),
    st.integers(0, (1 << 64) - 1).map(lambda x: Value(x, "u64")),
    st.integers(-(1 << 31), (1 << 31) - 1).map(lambda x: Value(x, "i32")),
    st.floats(width=32).map(lambda x: Value(x, "f32")),
    st.booleans().map(lambda x: Value(x, "bool")),
    st.text(max_size=4).map(lambda x: Value(x, "str")),
    st.lists(st.integers(0, 5), max_size=6).map(lambda x: Value(x, "u32[]")),
    st.lists(st.booleans(), max_size=6).map(lambda x: Value(x, "bool[]")),
    st.lists(st.text(max_size=2), max_size=5).map(lambda x: Value(x, "str[]")),
)
WORDS = [
    *NUMBERS, "nextn_predict_layers", "full_attention_interval", "num_loops", "attention.recurrent_layers",
    "attention.sliding_window_pattern", "attention.indexer.types", "attention.compress_ratios", "ple.layers",
    "attention.shared_kv_layers", "attention.key_length", "attention.value_length", "attention.key_length_mla",
]  # fmt: skip


@given(
    architecture=st.sampled_from(sorted(KNOWN)),
    changes=st.dictionaries(st.sampled_from(WORDS), PLAIN | st.none(), max_size=4),
    key=st.sampled_from(CACHE_TYPES),
    value=st.sampled_from(CACHE_TYPES),
    context=st.integers(1, 1 << 31),
    sequences=st.integers(1, 256),
    unified=st.booleans(),
    flash=st.booleans(),
)
def test_no_file_breaks_it(architecture, changes, key, value, context, sequences, unified, flash):
    """Numbers that are not understood are refused; what is not refused gives whole, positive sizes."""
    metadata = values(architecture)
    for word, change in changes.items():
        metadata.pop(f"{architecture}.{word}", None)
        if change is not None:
            metadata[f"{architecture}.{word}"] = change
    use = Use(context, sequences, unified, 512, key, value, flash)
    try:
        found = caches(architecture, metadata)
        check_types(architecture, found, use)
    except pgs.SurgeryError:
        return
    for cache in found.attention:
        size = size_of(cache, found, use)
        assert size.cells % 256 == 0 and size.cells > 0 and size.streams in (1, sequences)
        assert size.key_bytes >= 0 and size.value_bytes >= 0 and isinstance(size.key_bytes, int)
    assert state_bytes(found, sequences) == sequences * state_bytes(found, 1) >= 0
