"""Dropping layers: everything per block follows, and what llama.cpp would compute otherwise is refused."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pygguf_surgery as pgs
from pygguf_surgery import Value, imatrix
from pygguf_surgery.architecture.keys import PER_LAYER_KEYS
from pygguf_surgery.architecture.layers import KNOWN
from pygguf_surgery.edits import prune_layers as layers
from pygguf_surgery.files import gguf as container
from pygguf_surgery.plan_data.edits import PruneLayers
from pygguf_surgery.plan_data.expressions import Copy, OutputTensor, Take
from pygguf_surgery.plan_data.outcome import Draft
from pygguf_surgery.reports.comparison import compare
from pygguf_surgery.reports.verification import verify
from support.drafts import apply_edit
from support.gguf_files import read_gguf
from support.layer_models import BLOCK, CASES, build, prune

# --- apply, without a file ------------------------------------------------------------------------------------------


class Source:
    """What apply asks of a model."""

    def __init__(self, architecture, metadata):
        self.architecture, self.name, self.header_sha256 = architecture, "Tiny", "0" * 64
        self.metadata = {key: value.value for key, value in metadata.items()}


def tensor(name, *shape):
    return OutputTensor(name, shape or (32,), "F32", "F32", Copy(name))


def model(architecture, blocks, *, names=("attn_norm.weight",), extra=(), **keys):
    """(tensors, metadata) of a model. keys: of the architecture, "__" stands for a dot; plain ints are u32."""
    tensors = [tensor("token_embd.weight")]
    tensors += [tensor(f"blk.{i}.{name}") for i in range(blocks) for name in names]
    tensors += [tensor(name) for name in extra]
    metadata = {f"{architecture}.block_count": Value(blocks, "u32")}
    for key, value in keys.items():
        metadata[f"{architecture}.{key.replace('__', '.')}"] = (
            value
            if isinstance(value, Value)
            else Value(
                value,
                "bool[]"
                if isinstance(value, list) and isinstance(value[0], bool)
                else "i32[]"
                if isinstance(value, list)
                else "u32",
            )
        )
    return tensors, metadata


def drop(architecture, blocks, dropped, *, names=("attn_norm.weight",), extra=(), more=(), source=None, **keys):
    tensors, metadata = model(architecture, blocks, names=names, extra=extra, **keys)
    metadata.update(more)
    return apply_edit(layers, source or Source(architecture, metadata), tensors, metadata, PruneLayers(tuple(dropped)))


def the_blocker(outcome):
    assert len(outcome.blockers) == 1, [str(b) for b in outcome.blockers]
    return outcome.blockers[0]


def value(outcome, key):
    return outcome.metadata[key].value


def test_the_rest_is_numbered_from_zero_and_comes_from_where_it_was():
    out = drop("qwen3", 5, [1, 3])
    assert not out.blockers and not out.warnings
    assert [(t.name, t.expression.ref) for t in out.tensors] == [
        ("token_embd.weight", "token_embd.weight"),
        ("blk.0.attn_norm.weight", "blk.0.attn_norm.weight"),
        ("blk.1.attn_norm.weight", "blk.2.attn_norm.weight"),
        ("blk.2.attn_norm.weight", "blk.4.attn_norm.weight"),
    ]
    assert out.metadata["qwen3.block_count"] == Value(3, "u32")
    assert out.metadata["pgs.layers.kept"] == Value([0, 2, 4], "u32[]")
    assert value(out, "pgs.source.header_sha256") == "0" * 64 and value(out, "pgs.version") == pgs.__version__


def test_nothing_named_is_no_change():
    out = drop("qwen3", 3, [])
    assert not out.blockers and out.metadata == {"qwen3.block_count": Value(3, "u32")} and len(out.tensors) == 4


def test_apply_changes_nothing_in_place():
    tensors, metadata = model("qwen3moe", 3, expert_used_count=[2, 3, 4])
    before = ([t.name for t in tensors], dict(metadata))
    apply_edit(layers, Source("qwen3moe", metadata), tensors, metadata, PruneLayers((0,)))
    assert ([t.name for t in tensors], metadata) == before


@pytest.mark.parametrize(
    "dropped, words",
    [
        ([5], "layer 5 out of range"),
        ([-1], "layer -1 out of range"),
        ([1, 1], "layer 1 named twice"),
        ([0, 1, 2, 3, 4], "no layer is left"),
        ([1.5], "a layer is a whole number"),
    ],
)
def test_numbers_that_are_wrong(dropped, words):
    out = drop("qwen3", 5, dropped)
    assert the_blocker(out).problem == words and isinstance(out.blockers[0], pgs.BadPlan)
    assert len(out.tensors) == 6  # as it was


@pytest.mark.parametrize(
    "keys",
    [
        {"block_count": Value("five", "str")},
        {"block_count": 0},
        {"block_count": 2**31},
        {"nextn_predict_layers": 9},
        {"leading_dense_block_count": Value(-1, "i32")},
        {"full_attention_interval": Value(1.5, "f32")},
    ],
)
def test_metadata_that_is_no_count_is_a_blocker(keys):
    assert isinstance(the_blocker(drop("qwen3next", 5, [4], **keys)), pgs.BadFile)


def test_a_model_without_block_count():
    out = apply_edit(layers, Source("clip", {}), [tensor("v.blk.0.attn_q.weight")], {}, PruneLayers((0,)))
    assert the_blocker(out).object == "clip.block_count"


def test_a_layer_without_tensors_is_no_layer():
    tensors, metadata = model("qwen3", 3)
    tensors = [t for t in tensors if not t.name.startswith("blk.1.")]
    out = apply_edit(layers, Source("qwen3", metadata), tensors, metadata, PruneLayers((1,)))
    assert the_blocker(out).object == "blk.1"


def test_tensors_beyond_the_last_block():
    assert isinstance(the_blocker(drop("qwen3", 3, [0], extra=["blk.7.attn_q.weight"])), pgs.BadFile)


# --- arrays and counts ----------------------------------------------------------------------------------------------


def test_arrays_per_block_are_cut_by_index_and_others_stay():
    out = drop(
        "lfm2",
        4,
        [0, 3],
        attention__head_count_kv=[0, 8, 0, 8],
        feed_forward_length=[1, 2, 3, 4],
        rope__dimension_sections=[1, 2, 3, 4],
        more={"tokenizer.ggml.four": Value([1, 2, 3, 4], "i32[]")},
    )
    assert not out.blockers
    assert value(out, "lfm2.attention.head_count_kv") == [8, 0] and value(out, "lfm2.feed_forward_length") == [2, 3]
    assert value(out, "lfm2.rope.dimension_sections") == value(out, "tokenizer.ggml.four") == [1, 2, 3, 4]
    assert out.metadata["lfm2.feed_forward_length"].type == "i32[]"


def test_arrays_of_other_lengths_are_cut_by_index_too():
    """deepseek4's ratios may go on beyond the last block; glm-dsa's types leave the MTP block out."""
    out = drop("deepseek4", 3, [1], attention__compress_ratios=[0, 4, 128, 0, 9])
    assert value(out, "deepseek4.attention.compress_ratios") == [0, 128, 0, 9]
    out = drop("glm-dsa", 4, [0, 3], nextn_predict_layers=1, attention__indexer__types=[1, 0, 1])
    assert value(out, "glm-dsa.attention.indexer.types") == [0, 1]


def test_xielu_is_per_block_though_it_is_not_under_the_architecture():
    out = drop("apertus", 3, [1], more={"xielu.beta": Value([1.0, 2.0, 3.0], "f32[]")})
    assert value(out, "xielu.beta") == [1.0, 3.0]


@pytest.mark.parametrize("nextn, length", [(0, 4), (1, 4), (1, 3)])
def test_an_unknown_array_that_may_be_per_block_is_refused(nextn, length):
    error = the_blocker(drop("qwen3", 4, [1], nextn_predict_layers=nextn, attention__new=[7] * length))
    assert isinstance(error, pgs.Unsupported) and error.object == "qwen3.attention.new"


def test_leading_blocks_are_counted_again():
    for dropped, dense in (([0], 2), ([2, 4], 2), ([3, 4], 3), ([0, 1, 2], 0)):
        out = drop("deepseek2", 6, dropped, leading_dense_block_count=3)
        assert value(out, "deepseek2.leading_dense_block_count") == dense
    assert value(drop("deepseek4", 4, [1, 3], hash_layer_count=2), "deepseek4.hash_layer_count") == 1


def test_mtp_blocks_are_counted_again():
    for dropped, left in (([0], 2), ([4], 1), ([2, 3], 1), ([3, 4], None)):
        out = drop("qwen3moe", 5, dropped, nextn_predict_layers=2)
        assert not out.blockers and value(out, "qwen3moe.block_count") == 5 - len(dropped)
        found = out.metadata.get("qwen3moe.nextn_predict_layers")
        assert (found and found.value) == left
    assert the_blocker(drop("qwen3moe", 4, [0, 1], nextn_predict_layers=2)).problem == "no layer is left"


def test_mtp_blocks_without_tensors_can_be_dropped():
    tensors, metadata = model("qwen3moe", 4, nextn_predict_layers=1)
    out = apply_edit(layers, Source("qwen3moe", metadata), tensors[:-1], metadata, PruneLayers((3,)))
    assert not out.blockers and "qwen3moe.nextn_predict_layers" not in out.metadata


def test_block_numbers_in_an_array_are_renumbered():
    keys = dict(ple__layers=[5], attention__recurrent_layers=[True] * 8)
    assert value(drop("qwen4exp", 8, [1, 3, 7], **keys), "qwen4exp.ple.layers") == [3]
    assert the_blocker(drop("qwen4exp", 8, [5], **keys)).object == "qwen4exp.ple.layers"


# --- provenance -----------------------------------------------------------------------------------------------------


def test_twice_is_once():
    tensors, metadata = model("qwen3moe", 8, feed_forward_length=list(range(8)))
    source = Source("qwen3moe", metadata)
    first = apply_edit(layers, source, tensors, metadata, PruneLayers((0, 5)))
    twice = apply_edit(layers, source, first.tensors, first.metadata, PruneLayers((1, 4)))  # 2 and 6 of the source
    once = apply_edit(layers, source, tensors, metadata, PruneLayers((0, 2, 5, 6)))
    assert value(twice, "pgs.layers.kept") == [1, 3, 4, 7]
    assert twice.tensors == once.tensors and twice.metadata == once.metadata


@given(st.data())
def test_two_drops_are_one(data):
    n = data.draw(st.integers(2, 12))
    tensors, metadata = model("qwen3moe", n, feed_forward_length=list(range(n)), leading_dense_block_count=min(3, n))
    source, left = Source("qwen3moe", metadata), list(range(n))
    dropped, out = [], Draft(tensors, metadata)
    for _ in range(2):
        some = data.draw(st.lists(st.sampled_from(range(len(left))), unique=True, max_size=len(left) - 1))
        out = apply_edit(layers, source, out.tensors, out.metadata, PruneLayers(tuple(some)))
        dropped += [left[i] for i in some]
        left = [x for i, x in enumerate(left) if i not in some]
    once = apply_edit(layers, source, tensors, metadata, PruneLayers(tuple(dropped)))
    assert (out.tensors, out.metadata, out.blockers) == (once.tensors, once.metadata, [])
    assert value(out, "qwen3moe.feed_forward_length") == left
    assert [t.expression.ref for t in out.tensors[1:]] == [f"blk.{i}.attn_norm.weight" for i in left]


def test_lists_of_kept_experts_move_with_their_block():
    tensors, metadata = model("qwen3moe", 3)
    source = Source("qwen3moe", metadata)
    metadata["pgs.source.header_sha256"] = Value(source.header_sha256, "str")  # cut in this plan
    for i in range(3):
        metadata[f"pgs.experts.{i}.kept"] = Value([i, i + 7], "u32[]")
    out = apply_edit(layers, source, tensors, metadata, PruneLayers((1,)))
    assert {k: v.value for k, v in out.metadata.items() if k.startswith("pgs.experts.")} == {
        "pgs.experts.0.kept": [0, 7],
        "pgs.experts.1.kept": [2, 9],
    }


def test_what_the_source_says_of_its_own_source_goes():
    earlier = {
        "pgs.source.header_sha256": Value("f" * 64, "str"),
        "pgs.layers.kept": Value([0, 5, 9], "u32[]"),
        "pgs.experts.0.kept": Value([1], "u32[]"),
        "general.uuid": Value("x", "str"),
        "general.size_label": Value("8B", "str"),
        "general.name": Value("Tiny", "str"),
    }
    out = drop("qwen3", 3, [1], more=earlier)
    assert value(out, "pgs.layers.kept") == [0, 2] and "pgs.experts.0.kept" not in out.metadata
    assert "general.uuid" not in out.metadata and value(out, "general.base_model.0.name") == "Tiny"
    assert "general.size_label" not in out.metadata and "'8B'" in out.warnings[0]


def test_lists_of_tensors_name_them_anew():
    extra = {
        "general.tensor_extra.name": Value(
            [f"blk.{i}.attn_norm.weight" for i in (2, 1, 0)] + ["output.weight"], "str[]"
        ),
        "general.tensor_extra.prec_a4": Value([True, False, True, False], "bool[]"),
    }
    out = drop("qwen3", 3, [1], more=extra)
    assert value(out, "general.tensor_extra.name") == [
        "blk.1.attn_norm.weight",
        "blk.0.attn_norm.weight",
        "output.weight",
    ]
    assert value(out, "general.tensor_extra.prec_a4") == [True, True, False]


def test_an_expression_of_an_earlier_cut_stays():
    tensors, metadata = model("qwen3moe", 2)
    tensors.append(
        OutputTensor("blk.1.ffn_up_exps.weight", (2, 32, 32), "F32", "F32", Take("blk.1.ffn_up_exps.weight", (3, 5)))
    )
    out = apply_edit(layers, Source("qwen3moe", metadata), tensors, metadata, PruneLayers((0,)))
    assert out.tensors[-1].name == "blk.0.ffn_up_exps.weight"
    assert out.tensors[-1].expression == Take("blk.1.ffn_up_exps.weight", (3, 5))


# --- layers that llama.cpp tells apart by their number --------------------------------------------------------------

SWA = "attention__sliding_window_pattern"


@pytest.mark.parametrize(
    "architecture, blocks, keys, good, bad",
    [
        ("gpt-oss", 8, {}, [2, 3], [3]),
        ("gemma2", 8, {}, [0, 1, 6, 7], [0]),
        ("gemma3", 12, {"attention__sliding_window": 512}, [0, 1, 2, 3, 4, 5], [4, 5]),
        ("gemma3", 12, {"attention__sliding_window": 512, SWA: 3}, [3, 4, 5], [0]),
        ("cohere2moe", 8, {}, [0, 1, 2, 3], [0]),
        ("qwen3next", 8, {}, [4, 5, 6, 7], [2]),
        ("qwen35moe", 8, {"full_attention_interval": 2}, [0, 1], [0]),
        ("llama4", 8, {"interleave_moe_layer_step": 2}, [0, 1, 2, 3], [0, 1]),
        ("llama4", 8, {"interleave_moe_layer_step": 2, "attention__sliding_window": 0}, [0, 1], [0]),
        ("ernie4_5-moe", 8, {"interleave_moe_layer_step": 2}, [2, 3], [2]),
        ("nomic-bert-moe", 8, {"moe_every_n_layers": 2}, [2, 3], [2]),
        ("smollm3", 8, {}, [0, 1, 2, 3], [0, 1]),
        ("afmoe", 8, {SWA: [True, False] * 4, "attention__sliding_window": 8}, [0, 1, 2, 3], [0]),
        ("smallthinker", 8, {"attention__sliding_window": 8}, [1, 2, 3, 4], [1, 2]),
        ("modern-bert", 9, {"attention__sliding_window": 8}, [3, 4, 5], [4]),
        ("kimi-k3", 8, {"attn_res__block_size": 4}, [0, 1, 2, 3], [0]),
        ("rwkv6", 12, {"rescale_every_n_layers": 6}, [11], [0]),
        ("rwkv7", 4, {}, [2], [0]),
        ("qwen3vl", 8, {"n_deepstack_layers": 3}, [3], [1]),
        ("granite", 6, {"deepstack_mapping": [-1, 0, -1, 1, -1, -1]}, [2], [3]),
        ("granite", 6, {"deepstack_mapping": [0, 1, -1, -1, -1, -1]}, [2], [0]),
        ("deepseek2", 30, {}, [0], [0, 1, 2]),  # 27 layers: taken for a lite model
        ("exaone4", 65, {}, [0, 1], [0]),  # 64 layers: a sliding window
        ("command-r", 66, {}, [0], [0, 1, 2]),
        ("gemma3", 64, {}, [0], [0, 1]),  # 62 layers: another scale
        ("baichuan", 34, {}, [0], [0, 1]),
        ("minicpm", 8, {"residual_scale": Value(0.5, "f32")}, [0], None),
        ("minicpm", 8, {}, None, [0]),
        ("minimax-01", 16, {}, None, list(range(8))),
        ("gemma3n", 30, {}, None, [29]),
        ("hrm_text", 8, {}, None, [0]),
        ("glm-dsa", 12, {"context_length": 1 << 20}, [2, 3, 4, 5], [0]),
        ("glm-dsa", 12, {"context_length": 4096}, [0], None),
        ("gemma4", 6, {SWA: [True] * 6}, [0], None),
        ("gemma4", 6, {SWA: [True] * 6, "attention__shared_kv_layers": 2}, None, [0]),
        ("t5", 6, {}, None, [0]),
        ("gemma4-assistant", 4, {}, None, [0]),
    ],
)
def test_positions(architecture, blocks, keys, good, bad):
    for dropped in (good, good and good[::-1]):
        if dropped is not None:
            out = drop(architecture, blocks, dropped, **keys)
            assert not out.blockers and not out.warnings, [str(b) for b in out.blockers]
            assert value(out, f"{architecture}.block_count") == blocks - len(dropped)
    if bad is not None:
        out = drop(architecture, blocks, bad, **keys)
        assert out.blockers and len(out.tensors) == blocks + 1


@pytest.mark.parametrize(
    "architecture, key",
    [
        ("qwen3next", "attention__recurrent_layers"),
        ("gpt-oss", SWA),
        ("cohere2", SWA),
        ("qwen35", "attention__recurrent_layers"),
    ],
)
def test_a_pattern_that_is_written_out_is_cut(architecture, key):
    pattern = [True, False, False, True, False, True]
    out = drop(architecture, 6, [1, 5], **{key: pattern})
    assert not out.blockers
    assert value(out, f"{architecture}.{key.replace('__', '.')}") == [True, False, True, False]


def test_an_interval_that_the_list_contradicts_goes():
    def drop_of(dropped):
        return drop(
            "qwen3next",
            8,
            dropped,
            attention__recurrent_layers=[True, True, True, False] * 2,
            full_attention_interval=4,
        )

    out = drop_of([0])
    assert not out.blockers and "full_attention_interval 4" in out.warnings[0]
    assert "qwen3next.full_attention_interval" not in out.metadata
    out = drop_of([0, 1, 2, 3])
    assert not out.warnings and value(out, "qwen3next.full_attention_interval") == 4


def test_the_message_says_what_would_be_right():
    error = the_blocker(drop("qwen3next", 8, [1], full_attention_interval=4))
    assert str(error) == (
        "qwen3next.full_attention_interval: layers alternate with period 4 "
        "(found layer 3 becomes layer 2); drop whole periods: 4 consecutive layers, or the last ones"
    )
    error = the_blocker(drop("minicpm", 40, [1]))
    assert error.hint == "set minicpm.residual_scale to 0.221359, what it is with 40 layers"


@given(st.data())
def test_what_is_allowed_keeps_every_layer_what_it_was(data):
    """By the definitions in llama.cpp (set_swa_pattern and the like), written once more."""
    kind = {
        "gpt-oss": lambda i: i % 2 < 1,
        "cohere2": lambda i: i % 4 < 3,
        "cohere2moe": lambda i: i % 4 != 0,
        "smollm3": lambda i: (i + 1) % 4 != 0,
        "qwen3next": lambda i: (i + 1) % 4 != 0,
        "gemma-embedding": lambda i: i % 6 < 5,
    }
    architecture = data.draw(st.sampled_from(sorted(kind)))
    n = data.draw(st.integers(2, 14))
    dropped = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1))
    kept = [i for i in range(n) if i not in dropped]
    same = all(kind[architecture](old) == kind[architecture](new) for new, old in enumerate(kept))
    if architecture != "smollm3":  # and no kind of attention may vanish
        same &= {kind[architecture](i) for i in kept} == {kind[architecture](i) for i in range(n)}
    assert same == (not drop(architecture, n, dropped).blockers)


@pytest.mark.parametrize(
    "architecture, keys, dropped",
    [
        ("qwen3next", {}, [3]),
        ("granitehybrid", {"attention__head_count_kv": [0, 0, 2, 0]}, [2]),
        ("granitehybrid", {"attention__head_count_kv": [2, 0, 2, 2]}, [1]),
        ("gemma4", {SWA: [True, True, False, True]}, [2]),
        ("gpt-oss", {SWA: [1, 0, 0, 0]}, [0]),
        ("nemotron_h", {"attention__head_count_kv": [2, 0, 0, 2], "feed_forward_length": [0, 0, 9, 0]}, [1]),
    ],
)
def test_a_kind_of_attention_may_not_vanish(architecture, keys, dropped):
    """llama.cpp aborts: it asserts that there is a cache of each kind."""
    error = the_blocker(drop(architecture, 4, dropped, **keys))
    assert error.hint == f"keep at least one of {dropped[0]}"


def test_dropping_mtp_blocks_alone_moves_nothing():
    out = drop("qwen3next", 5, [4], nextn_predict_layers=1)
    assert not out.blockers and value(out, "pgs.layers.kept") == [0, 1, 2, 3]


def test_a_tensor_with_columns_of_every_layer():
    out = drop("gemma4", 4, [0], extra=["per_layer_token_embd.weight"], **{SWA: [True] * 4})
    assert the_blocker(out).object == "per_layer_token_embd.weight"
    assert drop("bert", 4, [0], extra=["enc.blk.0.attn_q.weight"]).blockers


# fmt: off
KEYS = sorted({
    *PER_LAYER_KEYS, "ple.layers", "leading_dense_block_count", "nextn_predict_layers", "context_length",
    "full_attention_interval", "attention.sliding_window", "residual_scale", "expert_gating_func", "vocab_size",
    "n_deepstack_layers", "rescale_every_n_layers", "attention.shared_kv_layers", "block_count", "attn_res.block_size",
    "interleave_moe_layer_step", "moe_every_n_layers"})
# fmt: on
# fmt: off
VALUES = st.one_of(
    st.integers(0, 9).map(lambda x: Value(x, "u32")), st.integers(-9, 2**31 - 1).map(lambda x: Value(x, "i32")),
    st.lists(st.integers(-2, 9), max_size=7).map(lambda x: Value(x, "i32[]")),
    st.lists(st.booleans(), max_size=7).map(lambda x: Value(x, "bool[]")),
    st.lists(st.floats(width=32), max_size=6).map(lambda x: Value(x, "f32[]")),
    st.lists(st.text(max_size=3), max_size=6).map(lambda x: Value(x, "str[]")),
    st.text(max_size=3).map(lambda x: Value(x, "str")), st.floats(width=32).map(lambda x: Value(x, "f32")))
# fmt: on


@given(
    st.sampled_from(sorted(KNOWN)),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6),
    st.lists(st.integers(-1, 6), max_size=4),
)
def test_whatever_the_metadata_nothing_is_raised(architecture, keys, dropped):
    tensors, metadata = model(architecture, 6)
    metadata |= {f"{architecture}.{key}": value for key, value in keys.items()}
    out = apply_edit(layers, Source(architecture, metadata), tensors, metadata, PruneLayers(tuple(dropped)))
    if dropped and not out.blockers:
        count = metadata[f"{architecture}.block_count"].value - len(dropped)
        assert value(out, f"{architecture}.block_count") == len(value(out, "pgs.layers.kept")) == count > 0
        assert len(out.tensors) == 7 - sum(i < 6 for i in dropped)


@pytest.mark.parity
def test_every_architecture_of_gguf_py_has_been_looked_at():
    """A new one here: read its code in llama.cpp and put it into a table of layers.py."""
    assert set(gguf.MODEL_ARCH_NAMES.values()) - KNOWN <= {"clip", "mmproj"}


def test_an_unknown_architecture_is_said():
    out = drop("brandnew", 4, [0])
    assert not out.blockers and "'brandnew'" in out.warnings[0]


# --- whole files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_written_file(tmp_path, name):
    source, target = build(name, tmp_path / "in.gguf"), tmp_path / "out.gguf"
    dropped, arrays = CASES[name]
    prune(source, target, dropped)
    (before, old), (after, new) = read_gguf(source), read_gguf(target)
    blocks = before[f"{before['general.architecture']}.block_count"]
    kept = [i for i in range(blocks) if i not in dropped]
    expected = {}
    for tensor_name, data in old.items():
        match = BLOCK.fullmatch(tensor_name)
        if match is None:
            expected[tensor_name] = data
        elif int(match[1]) in kept:
            expected[f"blk.{kept.index(int(match[1]))}.{match[2]}"] = data
    assert new.keys() == expected.keys()
    for tensor_name, (kind, data) in new.items():
        assert kind == expected[tensor_name][0] and np.array_equal(data, expected[tensor_name][1]), tensor_name
    architecture = before["general.architecture"]
    changed = {f"{architecture}.block_count": len(kept), **{f"{architecture}.{k}": v for k, v in arrays.items()}}
    if name == "deepseek2":
        changed["deepseek2.leading_dense_block_count"] = 0
    if name == "mtp":
        del before["qwen3next.full_attention_interval"]
    label = before.pop("general.size_label")
    provenance = {k: v for k, v in after.items() if k.startswith(("pgs.", "general.base_model."))}
    assert label not in after.values() and {**before, **changed, **provenance} == after
    assert after["pgs.layers.kept"] == kept


@pytest.mark.parametrize("name", ["deepseek2", "mtp"])
def test_verify_and_compare_find_the_source_of_each_layer(tmp_path, name):
    source, target = build(name, tmp_path / "in.gguf"), tmp_path / "out.gguf"
    prune(source, target, CASES[name][0])
    report = verify(target, source)
    assert report.good, [str(p) for p in report.problems]
    assert report.equal_tensors == report.tensors and report.removed
    with pgs.open(str(source)) as a, pgs.open(str(target)) as b:
        assert {t.sums.largest for t in compare(a, b).tensors} == {0.0}


def test_verify_sees_a_list_that_lies(tmp_path):
    source, target = build("deepseek2", tmp_path / "in.gguf"), tmp_path / "out.gguf"
    prune(source, target, [1])
    metadata, tensors = container.read_gguf(target)
    for name, kept in (("wrong", [0, 1]), ("long", [0, 2, 1])):
        container.write_gguf(tmp_path / f"{name}.gguf", metadata | {"pgs.layers.kept": Value(kept, "u32[]")}, tensors)
        assert not verify(tmp_path / f"{name}.gguf", source).good
    assert not verify(source, target).good


def test_with_experts_and_quantizing_in_one_plan(tmp_path):
    source, target = build("mtp", tmp_path / "in.gguf"), tmp_path / "out.gguf"
    kept = {0: [1, 2, 3, 5, 8], 1: [0, 1, 2, 3, 4], 2: [9, 10, 11, 12, 13]}
    with pgs.open(source) as opened:
        plan = pgs.Plan(opened).prune_layers([1, 2]).keep_experts(kept).quantize("Q8_0")
        plan.write(str(target))
        assert pgs.Plan.from_json(plan.to_json()) == plan
    metadata, _ = read_gguf(target)
    assert metadata["pgs.layers.kept"] == [0, 3, 4] and metadata["pgs.experts.2.kept"] == kept[2]
    report = verify(target, source)
    assert report.good, [str(p) for p in report.problems]
    assert all(e["reproduced"] for e in report.encoded) and report.equal_experts == 3 * 5  # the routers are copied
    # Experts first, named by their old layers: the same file.
    with pgs.open(source) as opened:
        old = {0: kept[0], 1: range(5), 2: range(5), 3: kept[1], 4: kept[2]}
        pgs.Plan(opened).keep_experts(old).prune_layers([1, 2]).quantize("Q8_0").write(str(tmp_path / "other.gguf"))
    ours, theirs = (container.read_gguf(p) for p in (target, tmp_path / "other.gguf"))
    assert ours[0] == theirs[0] and all(np.array_equal(ours[1][k], theirs[1][k]) for k in theirs[1])
    assert ours[1].keys() == theirs[1].keys()


def test_mtp_dropped_after_layers(tmp_path):
    source = build("mtp", tmp_path / "in.gguf")
    with pgs.open(source) as opened:
        kept = {0: range(8), 1: range(8)}
        pgs.Plan(opened).prune_layers([0, 2]).keep_experts(kept, mtp="drop").write(str(tmp_path / "out.gguf"))
    metadata, _ = read_gguf(tmp_path / "out.gguf")
    assert metadata["pgs.layers.kept"] == [1, 3] and metadata["qwen3next.block_count"] == 2
    assert verify(tmp_path / "out.gguf", source).good


def test_the_importance_matrix_of_the_source_follows(tmp_path):
    source = build("qwen3moe", tmp_path / "in.gguf")
    rng, entries, renamed = np.random.default_rng(1), {}, {}
    kept = [1, 2]
    with pgs.open(source) as opened:
        for name, t in opened.tensors.items():
            if (match := BLOCK.fullmatch(name)) and len(t.shape) > 1 and "ffn_gate_inp" not in name:
                rows = t.shape[0] if len(t.shape) == 3 else 1
                entries[name] = rng.random((rows, t.shape[-1]), np.float32) + 0.01, np.full(rows, 7, np.float32)
                if int(match[1]) in kept:
                    renamed[f"blk.{kept.index(int(match[1]))}.{match[2]}"] = entries[name]
        imatrix.write(tmp_path / "all.imatrix", entries)
        imatrix.write(tmp_path / "kept.imatrix", renamed)
        plan = pgs.Plan(opened).prune_layers([0, 3])
        plan.write(str(tmp_path / "small.gguf"))
        plan.quantize("IQ4_NL", imatrix=str(tmp_path / "all.imatrix")).write(str(tmp_path / "one.gguf"))
        plan.quantize("IQ4_NL").write(str(tmp_path / "without.gguf"))
    with pgs.open(str(tmp_path / "small.gguf")) as opened:
        pgs.Plan(opened).quantize("IQ4_NL", imatrix=str(tmp_path / "kept.imatrix")).write(str(tmp_path / "two.gguf"))
    one, two, without = (read_gguf(tmp_path / f"{name}.gguf")[1] for name in ("one", "two", "without"))
    assert one.keys() == two.keys()
    assert all(one[n][0] == two[n][0] and np.array_equal(one[n][1], two[n][1]) for n in one)
    assert not np.array_equal(one["blk.0.attn_q.weight"][1], without["blk.0.attn_q.weight"][1])


def test_a_blocked_plan_says_so_and_writes_nothing(tmp_path):
    source = build("qwen3next", tmp_path / "in.gguf")
    with pgs.open(source) as opened:
        plan = pgs.Plan(opened).prune_layers([0])
        assert {b.object for b in plan.check().blockers} == {"qwen3next.full_attention_interval"}
        with pytest.raises(pgs.BadPlan, match="period 4"):
            plan.write(str(tmp_path / "out.gguf"))
    assert not (tmp_path / "out.gguf").exists()
