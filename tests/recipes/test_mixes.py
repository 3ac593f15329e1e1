"""llama-quantize's choice of types, by name; overrides; fallbacks. Facts: llama.cpp's llama-quant.cpp."""

import re
from types import SimpleNamespace

import gguf
import pytest

from pygguf_surgery import BadFile, BadPlan, Unsupported, Value, _core
from pygguf_surgery.edits import quantize as recipe
from pygguf_surgery.plan_data.edits import Quantize
from pygguf_surgery.plan_data.expressions import Copy, OutputTensor
from pygguf_surgery.recipes import mixes
from pygguf_surgery.recipes.overrides import parse_overrides
from support.drafts import apply_edit

TYPES = {t.name: t for t in _core.types()}


def tensor(name, *shape, type="F16"):
    return OutputTensor(name, shape, type, type, Copy(name))


def quantize(tensors, type, architecture="qwen3next", metadata=None, **options):
    model = SimpleNamespace(architecture=architecture, tensors={})
    return apply_edit(recipe, model, tensors, metadata or {}, Quantize(type, **options))


def types(tensors, type, architecture="qwen3next", **options):
    out = quantize(tensors, type, architecture, **options)
    assert out.blockers == []
    return [t.type for t in out.tensors]


def test_file_type_numbers_are_those_of_gguf_py():
    for name, (number, type) in mixes.FILE_TYPES.items():
        for candidate in (f"MOSTLY_{name}", f"ALL_{name}", f"MOSTLY_{name}_M"):
            if hasattr(gguf.LlamaFileType, candidate):
                assert getattr(gguf.LlamaFileType, candidate) == number, name
                break
        else:
            assert name in ("Q1_0", "Q2_0", "Q3_K")  # newer than gguf-py, and an alias of Q3_K_M
        assert TYPES[type].encodes
    assert mixes.FILE_TYPES["Q3_K"] == mixes.FILE_TYPES["Q3_K_M"]


# fmt: off
NOT_QUANTIZED = """
    blk.0.attn_norm.weight blk.0.ffn_gate_inp.weight blk.0.ffn_gate_tid2eid.weight altup_proj.weight
    blk.0.laurel_l.weight
    per_layer_model_proj.weight position_embd.weight token_types.weight blk.0.ssm_conv1d.weight
    blk.0.shortconv.conv.weight blk.0.indexer.k_proj.weight blk.0.indexer.q_proj.weight blk.0.time_mix_first.weight
    blk.0.time_mix_w1.weight blk.0.time_mix_decay_w2.weight blk.0.time_mix_lerp_fused.weight dec.blk.0.attn_rel_b.weight
    v.position_embd.weight v.sam.pos_embd.weight v.sam.neck.0.weight v.blk.0.attn.rel_pos_h.weight v.patch_embd.weight
    mm.patch_merger.weight a.rvq.codebook.weight mm.a.code_embd.weight
    blk.0.ssm_a blk.0.ffn_up_exps.bias blk.0.exp_probs_b.bias ffn_up.scale""".split()
# fmt: on
# fmt: off
QUANTIZED = """
    token_embd.weight output.weight blk.0.attn_q.weight blk.0.ffn_up_exps.weight blk.0.ffn_gate_inp_shexp.weight
    blk.0.ssm_out.weight blk.0.ssm_ba.weight blk.0.indexer.attn_k.weight blk.0.attn_k_b.weight
    blk.0.nextn.eh_proj.weight
    blk.0.time_mix_key.weight per_layer_token_embd.weight""".split()
# fmt: on


@pytest.mark.parametrize("name", NOT_QUANTIZED)
def test_never_quantized(name):
    assert not mixes.allows("llama", name, (64, 64))


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized(name):
    assert mixes.allows("llama", name, (64, 64))
    assert not mixes.allows("llama", name, (64,))


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.hc_attn_fn.weight",
        "blk.0.indexer.attn_q_b.weight",
        "blk.0.attn_k_b.weight",
        "blk.0.attn_kv_a_mqa.weight",
        "blk.0.ssm_beta.weight",
        "blk.0.ssm_f_a.weight",
    ],
)
def test_glm5_next_keeps_more(name):
    assert mixes.allows("llama", name, (64, 64)) and not mixes.allows("glm5-next", name, (64, 64))


def test_two_dimensions_as_ggml_counts_them():
    assert [mixes.dims(s) for s in ((), (5,), (1, 5), (5, 1), (1, 1), (1, 1, 3, 5), (2, 1, 5), (1,))] == [
        1,
        1,
        1,
        2,
        1,
        2,
        3,
        1,
    ]
    assert not mixes.allows("llama", "blk.0.attn_q.weight", (1, 64))
    assert mixes.allows("llama", "blk.0.attn_q.weight", (64, 1))


def test_mxfp4_moe():
    tensors = [
        tensor("token_embd.weight", 100, 64),
        tensor("output.weight", 100, 64),
        tensor("blk.0.attn_q.weight", 64, 64),
        tensor("blk.0.ffn_up_exps.weight", 8, 64, 64),
        tensor("blk.0.ffn_gate_inp.weight", 8, 64, type="F32"),
        tensor("blk.0.attn_norm.weight", 64, type="F32"),
        tensor("blk.0.attn_k_b.weight", 4, 64, 64),
        tensor("blk.0.ffn_down_exps.weight", 1, 64, 64),
        tensor("blk.0.ffn_up_shexp.weight", 64, 64),
    ]
    assert types(tensors, "MXFP4_MOE", "deepseek2") == [
        "Q8_0",
        "Q8_0",
        "Q8_0",
        "MXFP4",
        "F32",
        "F32",
        "MXFP4",
        "Q8_0",
        "Q8_0",
    ]
    assert types(tensors, "mxfp4_moe", "bailingmoe3") == [
        "Q8_0",
        "Q8_0",
        "Q8_0",
        "MXFP4",
        "F32",
        "F32",
        "Q8_0",
        "Q8_0",
        "Q8_0",
    ]


def test_mxfp4_moe_with_an_output_of_three_dimensions():
    three = [tensor("output.weight", 2, 10, 64)]
    assert types(three, "MXFP4_MOE") == ["Q8_0"]
    tied = [tensor("token_embd.weight", 2, 10, 64)]
    assert types(tied, "MXFP4_MOE") == ["Q8_0"] and types(tied + three, "MXFP4_MOE") == ["MXFP4", "Q8_0"]


def test_mxfp4_moe_in_glm5_next():
    names = ["blk.0.attn_q_a.weight", "blk.0.attn_q_b.weight", "blk.0.nextn.eh_proj.weight", "blk.0.ffn_up_exps.weight"]
    assert types([tensor(n, 4, 64, 64) for n in names], "MXFP4_MOE", "glm5-next") == ["Q8_0", "Q8_0", "Q8_0", "MXFP4"]


@pytest.mark.parametrize("type", ["Q8_0", "F16", "BF16", "F32"])
@pytest.mark.parametrize("architecture", ["falcon", "llama"])
def test_one_type_for_all(type, architecture):
    tensors = [tensor(n, 64, 64, type="F32") for n in QUANTIZED] + [
        tensor(n, 64, 64, type="F32") for n in NOT_QUANTIZED
    ]
    assert types(tensors, type, architecture) == [type] * len(QUANTIZED) + ["F32"] * len(NOT_QUANTIZED)


def test_copy_copies_everything():
    tensors = [tensor("token_embd.weight", 4, 64), tensor("output.weight", 4, 64, type="Q4_K")]
    out = quantize(tensors, "COPY", metadata={"general.file_type": Value(1, "u32")})
    assert out.tensors == tensors and out.metadata == {"general.file_type": Value(1, "u32")}


@pytest.mark.parametrize(
    "type", [n for n, t in TYPES.items() if t.encodes and not t.needs_importance and n not in mixes.WANT_IMPORTANCE]
)
def test_pure_gives_every_tensor_the_plain_type(type):
    tensors = [
        tensor("token_embd.weight", 4, 256),
        tensor("output.weight", 4, 256),
        tensor("output_norm.weight", 256),
        tensor("blk.0.ffn_up_exps.weight", 2, 4, 256),
    ]
    assert types(tensors, type, pure=True) == [type, type, "F16", type]


def test_pure_with_a_file_type_that_is_no_type():
    assert types([tensor("output.weight", 4, 256)], "Q4_K_S", pure=True) == ["Q4_K"]
    assert types([tensor("output.weight", 4, 256)], "MXFP4_MOE", pure=True) == ["MXFP4"]


@pytest.mark.parametrize(
    "type, pure, number",
    [
        ("MXFP4_MOE", False, 38),
        ("Q8_0", False, 7),
        ("F16", False, 1),
        ("BF16", False, 32),
        ("F32", False, 0),
        ("Q4_K", True, 15),
        ("Q4_K_S", True, 14),
        ("Q3_K", True, 12),
        ("Q5_K", True, 17),
        ("MXFP4", True, 38),
        ("NVFP4", True, 39),
        ("Q1_0", True, 40),
        ("Q2_0", True, 41),
        ("IQ4_NL", True, 25),
    ],
)
def test_metadata_of_quantizing(type, pure, number):
    source = "Q4_0" if type == "F16" else "F16"
    before = {"general.file_type": Value(1, "u32"), "general.name": Value("x", "str")}
    out = quantize(
        [tensor("output.weight", 4, 256, type=source)],
        type,
        metadata=before,
        pure=pure,
        allow_requantize=True,
        overrides=(("nothing|output", "Q8_0"),),
    )
    assert out.blockers == []
    assert out.metadata == {
        "general.file_type": Value(number, "u32"),
        "general.name": Value("x", "str"),
        "general.quantization_version": Value(2, "u32"),
    }
    assert list(out.metadata) == ["general.file_type", "general.name", "general.quantization_version"]


def test_nothing_encoded_changes_no_metadata():
    out = quantize([tensor("output.weight", 4, 256), tensor("output_norm.weight", 256, type="F32")], "F16")
    assert out.metadata == {} and [t.type for t in out.tensors] == ["F16", "F32"]


def test_copy_with_an_override_keeps_the_file_type():
    out = quantize(
        [tensor("output.weight", 4, 256)],
        "COPY",
        metadata={"general.file_type": Value(1, "u32")},
        overrides=(("output", "Q8_0"),),
    )
    assert out.metadata == {"general.file_type": Value(1, "u32"), "general.quantization_version": Value(2, "u32")}


@pytest.mark.parametrize(
    "name, pure", [("NVFP4", False), ("MXFP4", False), ("Q8_K", True), ("I32", True), ("F64", True)]
)
def test_file_types_that_are_not_served(name, pure):
    with pytest.raises(Unsupported) as e:
        mixes.file_type(name, pure)
    assert e.value.object == name and (pure or ("pure" in e.value.hint and name + "_MOE" in e.value.hint))


@pytest.mark.parametrize(
    "name, number, type, mixture",
    [
        ("q4_k", 15, "Q4_K", "Q4_K_M"),
        ("15", 15, "Q4_K", "Q4_K_M"),
        ("IQ2_S", 28, "IQ2_XS", "IQ2_S"),
        ("0", 0, "F32", "F32"),
        ("38", 38, "MXFP4", "MXFP4_MOE"),
        ("NVFP4_MOE", 39, "NVFP4", "NVFP4_MOE"),
        ("COPY", None, None, None),
    ],
)
def test_a_file_type_by_name_or_number(name, number, type, mixture):
    found = mixes.file_type(name, False)
    assert (found.number, found.type, found.mixture, found.ours) == (number, type, mixture, name == "NVFP4_MOE")
    assert mixes.file_type(found.name, False) == found and mixes.file_type(name, True).mixture is None


@pytest.mark.parametrize("number", ["4", "39", "1000", "-7"])
def test_numbers_without_a_file_type(number):
    with pytest.raises(Unsupported):
        mixes.file_type(number, False)


def test_pure_takes_a_name_for_the_type():
    assert mixes.file_type("IQ2_S", True).type == "IQ2_S" and mixes.file_type("IQ2_M", True).type == "IQ2_S"


def test_a_file_type_is_a_name_or_gguf_py_s_type():
    assert mixes.file_type(gguf.GGMLQuantizationType.Q8_0, False).name == "Q8_0"
    for name in (None, 7, b"Q8_0"):
        with pytest.raises(BadPlan):
            mixes.file_type(name, False)


def test_unknown_names_get_the_nearest():
    for pure in (False, True):
        with pytest.raises(Unsupported) as e:
            mixes.file_type("MXFP4_MO", pure)
        assert "MXFP4_MOE" in e.value.hint


# --- the model ------------------------------------------------------------------------------------------------------


def facts(architecture, **keys):
    return mixes.model_facts(architecture, {f"{architecture}.{k.replace('__', '.')}": v for k, v in keys.items()}.get)


def test_model_facts():
    got = facts("qwen3next", block_count=49, expert_count=512, attention__head_count=16, attention__head_count_kv=2)
    assert got == mixes.ModelFacts("qwen3next", 49, 512, 8, False)
    assert facts("x") == mixes.ModelFacts("x", 0, 0, 0, False)
    assert facts("llama", attention__head_count=32).gqa == 1  # as many key heads as heads
    for heads, key_heads, gqa in ((71, 1, 71), (32, 0, 0), ([32, 8], [8, 8], 4), (40, [0, 8], 0), ([], [], 0)):
        assert facts("x", attention__head_count=heads, attention__head_count_kv=key_heads).gqa == gqa
    with pytest.raises(BadFile):
        facts("llama", block_count="many")


@pytest.mark.parametrize(
    "is_70b, architecture, keys",
    [
        (True, "llama", dict(block_count=80, attention__head_count=64, attention__head_count_kv=8)),
        (
            True,
            "llama",
            dict(block_count=81, nextn_predict_layers=1, attention__head_count=64, attention__head_count_kv=8),
        ),
        (False, "llama", dict(block_count=80, attention__head_count=64)),
        (False, "llama", dict(block_count=80, expert_count=8, attention__head_count=64, attention__head_count_kv=8)),
        (False, "llama4", dict(block_count=80, attention__head_count=64, attention__head_count_kv=8)),
        (True, "qwen2", dict(block_count=80)),
        (True, "jais2", dict(block_count=68)),
        (False, "jais2", dict(block_count=80)),
    ],
)
def test_which_models_are_70b(is_70b, architecture, keys):
    assert facts(architecture, **keys).is_70b == is_70b


def test_architectures_that_count_their_blocks_otherwise():
    assert facts("nanbeige", block_count=22, num_loops=2).blocks == 44
    assert (
        facts("graniteswitch", block_count=40).blocks
        == facts("graniteswitch", block_count=41, nextn_predict_layers=1).blocks
        == 41
    )


def test_loader_order():
    names = [
        "output.weight",
        "blk.10.a",
        "blk.9.b",
        "blk.9.a",
        "blk.07.z",
        "blk.x",
        "BLK.1.a",
        "blk.7.a",
        "blk.-2.a",
        "blk.3x",
        "blk. 8",
        "a\udcff",
        "é",
        "v.blk.0.a",
        "blk.7.é",
    ]
    assert mixes.loader_order(names) == [
        "blk.-2.a",
        "BLK.1.a",
        "a\udcff",
        "blk.x",
        "output.weight",
        "v.blk.0.a",
        "é",  # by bytes: "é" is C3 A9
        "blk.3x",
        "blk.07.z",
        "blk.7.a",
        "blk.7.é",
        "blk. 8",
        "blk.9.a",
        "blk.9.b",
        "blk.10.a",
    ]


# --- mixtures: cases from llama.cpp's source ------------------------------------------------------------------------

DENSE = mixes.ModelFacts("llama", 24, 0, 1, False)
ROW = (4, 256)


def chosen(file_type, names, model=DENSE, shapes=None, **options):
    """The types of `names` in this order, in a model with an output.weight of its own."""
    tensors = [("output.weight", ROW), *((n, (shapes or {}).get(n, ROW)) for n in names)]
    types, errors = mixes.choose_types(mixes.file_type(file_type, False), model, tensors, **options)
    assert errors == []
    return [types[n] for n in names]


def blocks(part, n=24):
    return [f"blk.{i}.{part}.weight" for i in range(n)]


def test_every_file_type_serves_every_category():
    names = [
        "token_embd.weight",
        *(
            f"blk.0.{p}.weight"
            for p in (
                "attn_v",
                "attn_k",
                "attn_q",
                "attn_qkv",
                "attn_output",
                "ffn_up",
                "ffn_gate",
                "ffn_down",
                "ssm_out",
            )
        ),
    ]
    for file_type, (_, default) in (mixes.FILE_TYPES | mixes.OUR_FILE_TYPES).items():
        types = chosen(file_type, names)
        assert types[-1] == ("Q8_0" if file_type.endswith("_MOE") else default)
        assert all(TYPES[type].encodes for type in types)


def test_q4_k_m_gives_more_bits_to_some_layers():
    expected = ["Q6_K" if i < 3 or i >= 21 or (i - 3) % 3 == 2 else "Q4_K" for i in range(24)]
    assert chosen("Q4_K_M", blocks("attn_v")) == chosen("Q4_K", blocks("ffn_down")) == expected
    assert chosen("Q4_K_M", blocks("attn_q") + blocks("ffn_up")) == ["Q4_K"] * 48


def test_what_is_decided_elsewhere_is_not_counted():
    names = blocks("attn_v")
    types, _ = mixes.choose_types(mixes.file_type("Q4_K_S", False), DENSE, [(n, ROW) for n in names], decided=names[:2])
    assert list(types) == names[2:]
    assert list(types.values()) == ["Q5_K"] * 4 + ["Q4_K"] * 18  # the first four that are left
    types, _ = mixes.choose_types(mixes.file_type("Q4_K_M", False), DENSE, [(n, ROW) for n in names], decided=names[1:])
    assert types == {names[0]: "Q6_K"}


def test_layers_of_experts_come_from_the_names():
    moe = mixes.ModelFacts("qwen3moe", 24, 64, 8, False)
    names = ["blk.20.ffn_down_exps.weight", "blk.02.ffn_down_exps.weight", "blk.23.ffn_down_exps.weight"]
    assert chosen("Q4_K_S", names, moe) == ["Q4_K", "Q5_K", "Q4_K"]
    assert chosen("IQ2_M", names, moe) == ["IQ3_S", "IQ3_S", "IQ3_S"]  # here they are counted


@pytest.mark.parametrize(
    "name", ["blk.24.ffn_up_exps.weight", "blk.-1.ffn_gate_exps.weight", "enc.blk.0.ffn_down.weight"]
)
def test_a_layer_that_the_model_has_not_is_an_error(name):
    moe = mixes.ModelFacts("qwen3moe", 24, 64, 8, False)
    _, errors = mixes.choose_types(mixes.file_type("Q4_0", False), moe, [("blk.0.ffn_up.weight", ROW), (name, ROW)])
    assert [(type(e), e.object) for e in errors] == [(BadPlan, name)]
    chosen("Q4_0", [name])  # llama-quantize asks for it only where there are experts,
    chosen("MXFP4_MOE", [name], moe)  # and where the layer matters
    chosen("IQ1_S", [name], moe)


def test_grouped_queries_get_a_better_value():
    def values(gqa, file_type, **options):
        return chosen(file_type, blocks("attn_v", 1), mixes.ModelFacts("llama", 24, 0, gqa, False), **options)[0]

    assert [values(3, "Q2_K"), values(4, "Q2_K")] == ["Q3_K", "Q4_K"]
    assert [values(3, "IQ4_XS"), values(4, "IQ4_XS")] == ["IQ4_XS", "Q5_K"]
    assert [values(1, "IQ3_XXS"), values(1, "IQ3_XXS", has_imatrix=True), values(4, "IQ3_XXS")] == [
        "IQ3_S",
        "IQ3_XXS",
        "Q4_K",
    ]
    assert [values(1, "IQ2_XXS"), values(1, "IQ2_S"), values(4, "IQ2_S")] == ["Q2_K", "IQ3_S", "Q4_K"]


def test_values_of_a_70b_model():
    big = mixes.ModelFacts("llama", 80, 0, 8, True)
    assert chosen("Q2_K", blocks("attn_v", 1), big) == ["Q5_K"]
    assert chosen("IQ2_XXS", blocks("attn_v", 1), big) == ["Q4_K"]  # the rule is not for these
    assert set(chosen("Q3_K_S", blocks("attn_v") + blocks("attn_q"), big)) == {"Q5_K", "Q3_K"}


def test_models_of_eight_experts():
    eight = mixes.ModelFacts("llama", 24, 8, 4, False)
    names = [f"blk.0.{p}.weight" for p in ("attn_v", "attn_k", "attn_q", "attn_output")]
    assert chosen("Q4_K_M", names, eight) == ["Q8_0", "Q8_0", "Q4_K", "Q5_K"]
    assert chosen("Q3_K_L", names, eight) == ["Q8_0", "Q8_0", "Q3_K", "Q3_K"]
    assert chosen("IQ1_S", names, eight) == ["Q4_K", "Q4_K", "IQ1_S", "Q5_K"]


def test_falcon_has_rules_of_its_own():
    falcon = mixes.ModelFacts("falcon", 32, 0, 8, False)
    assert chosen("Q4_K_M", blocks("ffn_down", 32), falcon)[:6] == ["Q6_K"] * 2 + ["Q5_K"] * 2 + ["Q4_K"] * 2
    assert chosen("Q4_K_S", blocks("ffn_down", 32), falcon) == ["Q4_K"] * 32
    assert chosen("Q3_K_M", blocks("attn_output", 2), falcon) == ["Q3_K"] * 2
    assert mixes.choose_types(mixes.file_type("Q4_0", False), falcon, [("output.weight", ROW)])[0] == {
        "output.weight": "Q8_0"
    }


def test_an_importance_matrix_changes_types():
    for file_type, without, given in (
        ("Q4_0", "Q4_0", "Q4_1"),
        ("Q5_0", "Q5_0", "Q5_1"),
        ("IQ4_XS", "Q5_K", "IQ4_XS"),
        ("IQ3_XXS", "Q4_K", "IQ3_XXS"),
    ):
        assert chosen(file_type, blocks("ffn_down"))[:3] == [without] * 3
        assert chosen(file_type, blocks("ffn_down"), has_imatrix=True)[:3] == [given] * 3


def test_a_tied_embedding_is_the_output():
    def types(file_type, *tensors, **options):
        return mixes.choose_types(mixes.file_type(file_type, False), DENSE, tensors, **options)[0]

    embedding, output = ("token_embd.weight", ROW), ("output.weight", ROW)
    assert types("Q4_0", embedding) == {"token_embd.weight": "Q6_K"}
    assert types("Q4_0", embedding, output) == {"token_embd.weight": "Q4_0", "output.weight": "Q6_K"}
    assert types("IQ2_S", embedding) == {"token_embd.weight": "Q5_K"}
    assert types("IQ2_S", embedding, output) == {"token_embd.weight": "IQ3_S", "output.weight": "Q5_K"}
    assert types("Q4_K", ("output.weight", (4, 96))) == {"output.weight": "Q8_0"}  # its rows do not fit Q4_K
    assert types("Q4_K", embedding, output_type="Q5_1") == {"token_embd.weight": "Q5_1"}
    assert types("F16", embedding, output_type="Q5_1") == {"token_embd.weight": "F16"}
    assert types("F16", output, output_type="Q5_1") == {"output.weight": "Q5_1"}
    assert types("Q4_0", embedding, output, leave_output=True) == {"token_embd.weight": "Q4_0"}


def test_nvfp4_moe_is_for_experts_only():
    names = [f"blk.0.{p}.weight" for p in ("ffn_up_exps", "attn_k_b", "ffn_up_shexp", "attn_q", "ffn_down_exps")]
    assert chosen(
        "NVFP4_MOE",
        ["token_embd.weight", *names],
        mixes.ModelFacts("deepseek2", 1, 2, 1, False),
        dict.fromkeys((names[0], names[1], names[4]), (2, 4, 256)),
    ) == ["Q8_0", "NVFP4", "Q8_0", "Q8_0", "Q8_0", "NVFP4"]


# --- fallbacks ------------------------------------------------------------------------------------------------------

# fmt: off
FALLBACK_TABLE = {  # the type: for a row of 96 (no multiple of 64 or 256), and for a row of 48 (none of 32)
    **dict.fromkeys(["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"], ("IQ4_NL", "F16")),
    **dict.fromkeys(["Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"], ("Q4_0", "F16")),
    "Q4_K": ("Q5_0", "F16"), "Q5_K": ("Q5_1", "F16"), "Q6_K": ("Q8_0", "F16"),
    **{t: (t, "F16") for t in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4")},
    **{t: (t, t) for t in ("F32", "F16", "BF16")},
    "NVFP4": (None, None), "Q1_0": (None, None),
}
# fmt: on


@pytest.mark.parametrize("type", [n for n, t in TYPES.items() if t.encodes])
def test_fallback_table(type):
    assert (mixes.fallback(type, 96), mixes.fallback(type, 48)) == FALLBACK_TABLE[type]
    assert mixes.fallback(type, 256) == type


def test_fallbacks_are_named():
    out = quantize([tensor("output.weight", 4, 96), tensor("blk.0.attn_q.weight", 4, 96)], "Q4_K", pure=True)
    assert [t.type for t in out.tensors] == ["Q5_0", "Q5_0"] and all("Q4_K" in t.notes[0] for t in out.tensors)
    assert [w for w in out.warnings if "2 tensors" in w and "Q4_K" in w and "Q5_0" in w]


@pytest.mark.parametrize("type", ["Q1_0", "NVFP4"])
def test_a_type_without_a_fallback(type):
    out = quantize([tensor("output.weight", 4, 96), tensor("blk.0.attn_q.weight", 4, 128)], type, pure=True)
    assert [b.object for b in out.blockers] == ["output.weight"]
    pattern, name = re.search(r'\("(.*)", "(.*)"\)', out.blockers[0].hint).groups()
    assert types(
        [tensor("output.weight", 4, 96), tensor("blk.0.attn_q.weight", 4, 128)],
        type,
        pure=True,
        overrides=((pattern, name),),
    ) == ["Q8_0", type]


def test_a_tensor_of_the_right_type_needs_no_fallback():
    assert types([tensor("output.weight", 4, 32, type="Q8_0")], "Q8_0") == ["Q8_0"]


# --- what is refused ------------------------------------------------------------------------------------------------


def test_requantizing_needs_permission():
    tensors = [
        tensor("output.weight", 4, 256, type="Q4_K"),
        tensor("blk.0.attn_q.weight", 4, 256, type="Q6_K"),
        tensor("blk.0.attn_k.weight", 4, 256, type="Q8_0"),
    ]
    out = quantize(tensors, "Q8_0")
    assert [(type(b), b.object, b.found) for b in out.blockers] == [(BadPlan, "output.weight", "Q4_K")]
    assert "1 more tensor" in out.blockers[0].problem
    assert types(tensors, "Q8_0", allow_requantize=True) == ["Q8_0"] * 3
    assert types(tensors, "Q8_0", overrides=(("output|attn_q", "copy"),)) == ["Q4_K", "Q6_K", "Q8_0"]


@pytest.mark.parametrize("type", mixes.WANT_IMPORTANCE)
def test_types_that_need_an_importance_matrix(type):
    tensors = [tensor("blk.0.attn_q.weight", 4, 256), tensor("output.weight", 4, 256)]
    out = quantize(tensors, type, pure=True)
    assert out.blockers[0].object == "blk.0.attn_q.weight"
    # llama-quantize exempts the output, which ggml itself can only make of some of these types
    alone = quantize(tensors[1:], type, pure=True)
    assert bool(alone.blockers) == TYPES[type].needs_importance


# --- overrides ------------------------------------------------------------------------------------------------------

MODEL = [
    tensor("token_embd.weight", 8, 64),
    tensor("blk.0.attn_q.weight", 64, 64),
    tensor("blk.0.attn_norm.weight", 64, type="F32"),
    tensor("blk.0.ffn_gate_inp.weight", 4, 64, type="F32"),
    tensor("blk.0.ffn_up_exps.weight", 4, 64, 64),
    tensor("output.weight", 8, 64),
]


@pytest.mark.parametrize("base", ["MXFP4_MOE", "Q8_0", "F16", "BF16", "F32", "COPY"])
def test_overrides_work_on_any_base(base):
    plain = types(MODEL, base)
    got = types(MODEL, base, overrides=(("attn_q", "Q4_0"), ("exps", "copy")))
    assert got == [plain[0], "Q4_0", *plain[2:4], "F16", plain[5]]


def test_the_first_match_wins():
    out = quantize(MODEL, "Q8_0", overrides=((r"blk\.0\.attn_q", "Q5_0"), ("attn|exps", "Q4_0")))
    assert [t.type for t in out.tensors] == ["Q8_0", "Q5_0", "F32", "F32", "Q4_0", "Q8_0"]


def test_patterns_are_searched_and_case_sensitive():
    assert types(MODEL, "COPY", overrides=((r"\.\d+\.attn_q\.", "Q4_0"),))[1] == "Q4_0"
    out = quantize(MODEL, "COPY", overrides=(("ATTN_Q", "Q4_0"),))
    assert [(type(b), b.object) for b in out.blockers] == [(BadPlan, "ATTN_Q")]


def test_an_override_leaves_what_llama_quantize_leaves_and_says_so():
    out = quantize(MODEL, "Q8_0", overrides=(("blk", "Q4_0"),))
    assert out.blockers == [] and [t.type for t in out.tensors] == ["Q8_0", "Q4_0", "F32", "F32", "Q4_0", "Q8_0"]
    assert [w for w in out.warnings if "4 tensors" in w and "2 of them" in w]


@pytest.mark.parametrize("pattern", ["blk.0.attn_norm.weight", r"^blk\.0\.attn_norm\.weight$"])
def test_a_norm_changes_under_its_full_name(pattern):
    assert types(MODEL, "Q8_0", overrides=((pattern, "BF16"),))[2] == "BF16"
    out = quantize(MODEL, "Q8_0", overrides=((pattern, "Q8_0"),))
    assert [(type(b), b.object, b.found) for b in out.blockers] == [(BadPlan, "blk.0.attn_norm.weight", "Q8_0")]


def test_overrides_fall_back_too():
    assert types([tensor("output.weight", 4, 96)], "F16", overrides=(("output", "Q6_K"),)) == ["Q8_0"]


def test_overrides_are_parsed_at_once():
    assert parse_overrides([("a", "q4_k"), ["b", "COPY"], ("c", gguf.GGMLQuantizationType.Q8_0)]) == (
        ("a", "Q4_K"),
        ("b", "copy"),
        ("c", "Q8_0"),
    )
    for bad in [("(", "Q8_0"), (5, "Q8_0"), ("a", 5), ("a",), "abc", 5]:
        with pytest.raises(BadPlan):
            parse_overrides([bad])
    for name, hint in (("Q4_KK", "Q4_K"), ("Q8_K", None), ("I32", None)):
        with pytest.raises(Unsupported) as e:
            parse_overrides([("a", name)])
        assert hint is None or hint in e.value.hint


def test_apply_changes_nothing_in_place():
    before = [OutputTensor(t.name, t.shape, t.type, t.source_type, t.expression, t.role, list(t.notes)) for t in MODEL]
    metadata = {"general.file_type": Value(1, "u32")}
    quantize(MODEL, "Q6_K", metadata=metadata, pure=True)
    assert before == MODEL and metadata == {"general.file_type": Value(1, "u32")}
