"""What llama.cpp's loader demands, asked of plain facts. tests of verify and of the gate ask it of files and plans."""

import pytest

from pygguf_surgery import BadFile, BadPlan, Value
from pygguf_surgery.architecture import loader


def u32(n):
    return Value(n, "u32")


DENSE = {"llama.block_count": u32(2), "llama.context_length": u32(8), "llama.embedding_length": u32(4)}
NAMES = {"token_embd.weight": (6, 4), "blk.0.attn_norm.weight": (4,), "blk.1.attn_norm.weight": (4,)}
EXPERTS = {"llama.expert_count": u32(3), "llama.expert_used_count": u32(2)}
MATRICES = {
    f"blk.{i}.{name}": shape
    for i in range(2)
    for name, shape in (
        ("ffn_gate_inp.weight", (3, 4)),
        ("ffn_gate_exps.weight", (3, 5, 4)),
        ("ffn_up_exps.weight", (3, 5, 4)),
        ("ffn_down_exps.weight", (3, 4, 5)),
    )
}


def test_good_files_have_no_faults():
    assert loader.check_file("llama", DENSE, NAMES) == []
    assert loader.check_file("llama", DENSE | EXPERTS, NAMES | MATRICES) == []


@pytest.mark.parametrize(
    "metadata, shapes, objects",
    [
        ({"llama.block_count": Value(2, "u64")}, {}, ["llama.block_count"]),
        ({"llama.block_count": u32(513)}, {}, ["llama.block_count"]),
        ({"llama.block_count": u32(1)}, {}, ["llama.block_count"]),
        ({"llama.context_length": None}, {}, ["llama.context_length"]),
        ({"llama.embedding_length": u32(5)}, {}, ["llama.embedding_length"]),
        ({"llama.nextn_predict_layers": u32(3)}, {}, ["llama.nextn_predict_layers"]),
        ({"llama.attention.head_count": Value([1], "u32[]")}, {}, ["llama.attention.head_count"]),
        ({"llama.attention.indexer.types": Value([1], "i32[]"), "llama.nextn_predict_layers": u32(1)}, {}, []),
        ({}, {"blk.3.attn_norm.weight": (4,)}, ["llama.block_count"]),
        ({}, {"blk.1.ffn_up.0.weight": (4, 4)}, ["blk.1.ffn_up.0.weight"]),
        (
            EXPERTS,
            MATRICES | {"blk.0.ffn_down_exps.weight": ()},
            ["blk.0.ffn_down_exps.weight", "blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"],
        ),
        (EXPERTS, MATRICES | {"blk.0.ffn_gate_inp.weight": (3, 5)}, ["blk.0.ffn_gate_inp.weight"]),
        (EXPERTS | {"llama.expert_used_count": Value([1, 2], "u32[]")}, MATRICES, []),
        (EXPERTS | {"llama.expert_count": Value(3, "i32")}, MATRICES, ["llama.expert_count"]),
    ],
)
def test_each_fault_names_its_place(metadata, shapes, objects):
    keys = {key: value for key, value in (DENSE | metadata).items() if value is not None}
    assert [fault.object for fault in loader.check_file("llama", keys, NAMES | shapes)] == objects


def test_limits():
    assert loader.check_name("x") is None and loader.check_name("x" * 63) is None
    assert isinstance(loader.check_name(""), BadPlan) and isinstance(loader.check_name("é" * 32), BadPlan)
    assert loader.check_alignment(32) is None and isinstance(loader.check_alignment(16), BadFile)
    assert loader.check_layer_count("x", 1) is None and loader.check_layer_count("x", 512) is None
    assert loader.check_layer_count("x", 0) and loader.check_layer_count("x", 513)
    assert loader.check_expert_count("x", 1024) is None and loader.check_expert_count("x", 1025)


def test_a_file_without_an_architecture():
    assert [fault.object for fault in loader.check_file("", {}, {})] == ["general.architecture"]
