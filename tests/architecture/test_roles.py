"""Roles of names, and the table of tensors with an expert axis."""

import pytest

from pygguf_surgery.architecture import experts as roles
from pygguf_surgery.architecture.names import ROLES, layer_of, role_of
from pygguf_surgery.base.errors import BadFile, Unsupported

# Names of llama.cpp's LLM_TENSOR_NAMES (src/llama-arch.cpp), one block's worth, by role.
NAMES = {
    "attention": """
        attn_q.weight attn_k.weight attn_v.weight attn_q.bias attn_output.weight attn_qkv.weight attn_gate.weight
        attn_rot_embd attn_sinks.weight attn_q_a.weight attn_q_b.weight attn_kv_a_mqa.weight attn_kv_b.weight
        attn_kv.weight attn_k_b.weight attn_v_b.weight attn_output_a.weight attn_output_b.weight
        attn_compressor_kv.weight attn_compressor_ape.weight attn_res_score.weight attn_conv_base.weight
        vis_attn_qkv.weight vis_attn_output.weight indexer.proj.weight indexer.attn_k.weight indexer.attn_q_b.weight
        indexer_compressor_kv.weight indexer_compressor_gate.weight attn_q.scale attn_q.input_scale
        """,
    "ssm": """
        ssm_a ssm_d ssm_dt.bias ssm_conv1d.weight ssm_conv1d_q.weight ssm_ba.weight ssm_alpha.weight ssm_beta.weight
        ssm_in.weight ssm_out.weight ssm_x.weight ssm_f_a.weight ssm_g.weight shortconv.conv.weight
        shortconv.in_proj.weight time_mix_w1.weight time_mix_lerp_fused.weight time_mix_ln.weight
        time_mix_output.weight
        """,
    "router": """
        ffn_gate_inp.weight ffn_gate_inp.bias ffn_gate_inp.scale exp_probs_b.bias exp_probs_b exp_probs_b_vl.bias
        ffn_gate_tid2eid.weight
        """,
    "norm": """
        attn_norm.weight attn_norm.bias attn_norm_2.weight post_attention_norm.weight attn_q_norm.weight
        attn_q_a_norm.weight attn_kv_a_norm.weight attn_output_norm.weight layer_output_norm.weight ffn_norm.weight
        ffn_norm_exps.weight ffn_sub_norm.weight post_ffw_norm.weight post_ffw_norm_1.weight pre_ffw_norm_2.weight
        post_norm.weight ssm_norm.weight ssm_dt_norm.weight indexer.k_norm.weight indexer_compressor_norm.weight
        ffn_routed_norm.weight laurel_post_norm.weight altup_router_norm.weight ple_norm_key.weight
        hc_attn_norm.weight
        """,
    "shared_expert": """
        ffn_gate_shexp.weight ffn_up_shexp.weight ffn_down_shexp.weight ffn_gate_inp_shexp.weight
        ffn_down_shexp.scale
        """,
    "expert": """
        ffn_gate_exps.weight ffn_up_exps.weight ffn_down_exps.weight ffn_gate_up_exps.weight ffn_down_exps.bias
        ffn_down_exps.scale ffn_up_exps.input_scale ffn_gate_chexps.weight ffn_down_chexps.weight ffn_gate.3.weight
        ffn_down.11.weight
        """,
    "ffn": """
        ffn_gate.weight ffn_up.weight ffn_down.weight ffn_down.bias ffn_up.scale ffn.act ffn_latent_down.weight
        ffn_routed_up.weight ffn_res_score.weight channel_mix_key.weight vis_gate.weight vis_down.weight
        """,
    "mtp": """
        nextn.eh_proj.weight nextn.embed_tokens.weight nextn.enorm.weight nextn.hnorm.weight
        nextn.shared_head_head.weight nextn.shared_head_norm.weight
        """,
    "other": """
        inp_gate.weight proj.weight laurel_l.weight altup_correct_coef.weight layer_output_scale.weight
        hc_attn_fn.weight hc_ffn_scale.weight ple_key.weight something_new.weight
        """,
}
OUTSIDE = {
    "token_embd.weight": "embedding",
    "per_layer_token_embd.weight": "embedding",
    "position_embd.weight": "embedding",
    "token_types.weight": "embedding",
    "token_embd_norm.weight": "norm",
    "output_norm.weight": "norm",
    "output.weight": "output",
    "output.bias": "output",
    "cls.weight": "output",
    "cls.output.weight": "output",
    "cls.norm.weight": "norm",
    "per_layer_proj_norm.weight": "norm",
    "per_layer_model_proj.weight": "other",
    "rope_freqs.weight": "other",
    "nextn.pre_projection.weight": "mtp",
    "enc.output_norm.weight": "norm",
    "enc.blk.0.attn_q.weight": "attention",
    "enc.blk.0.ffn_down.weight": "ffn",
    "dec.blk.3.cross_attn_q.weight": "attention",
    "dec.blk.3.cross_attn_norm.weight": "norm",
    "v.patch_embd": "other",
    "": "other",
    "blk.x.attn_q.weight": "other",
}


@pytest.mark.parametrize(
    "name, role", [(f"blk.7.{n}", r) for r, names in NAMES.items() for n in names.split()] + list(OUTSIDE.items())
)
def test_role(name, role):
    assert role_of(name) == role
    assert role in ROLES


def test_every_rule_belongs_to_router_or_expert():
    assert {role_of(f"blk.0.{name}") for name in roles.EXPERT_RULES} == {"router", "expert"}


@pytest.mark.parametrize(
    "name, layer",
    [
        ("blk.0.attn_q.weight", 0),
        ("blk.47.ssm_a", 47),
        ("token_embd.weight", None),
        ("enc.blk.3.attn_q.weight", None),
        ("blk.x.attn_q.weight", None),
        ("blk.3", None),
        ("xblk.3.attn_q", None),
    ],
)
def test_layer(name, layer):
    assert layer_of(name) == layer


MODEL = roles.Layout(layers=(1, 2), mtp=(2,), experts=32, groups=0, chunk=1)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("blk.1.ffn_down_exps.weight", (32, 8, 4)),
        ("blk.1.ffn_down_exps.bias", (32, 8)),
        ("blk.1.ffn_gate_inp.weight", (32, 8)),
        ("blk.1.exp_probs_b", (32,)),
        ("blk.1.ffn_gate_tid2eid.weight", (99, 4)),
        ("blk.1.ffn_gate_inp.scale", (8,)),
        # As long as E by chance, and never judged by it.
        ("blk.1.attn_k.weight", (32, 8)),
        ("blk.1.ffn_gate_shexp.weight", (32, 8)),
        ("blk.1.ffn_norm.weight", (32,)),
        ("blk.1.ffn_latent_down.weight", (32, 8)),
        ("blk.1.ffn_gate.weight", (32, 8)),
        ("blk.1.ssm_ba.weight", (32, 8)),
        ("blk.2.nextn.eh_proj.weight", (32, 64)),
        ("blk.1.ffn_norm_exps.weight", (32,)),
        ("blk.1.ffn_gate_inp_shexp.weight", (32,)),
        ("blk.1.ffn_res_score.weight", (32,)),
        # Unknown, and not as long as E.
        ("blk.1.ffn_new.weight", (33, 8)),
        ("blk.0.ffn_new.weight", (32, 8)),
        ("token_embd.weight", (32, 8)),
    ],
)
def test_tensors_that_are_right(name, shape):
    assert roles.check_shape(name, shape, MODEL) is None


@pytest.mark.parametrize(
    "name, shape, kind",
    [
        ("blk.1.ffn_down_exps.weight", (31, 8, 4), BadFile),  # another count than the metadata says
        ("blk.1.ffn_down_exps.weight", (32, 8), BadFile),  # an axis is missing
        ("blk.1.ffn_gate_inp.weight", (8, 32), BadFile),  # the wrong way round
        ("blk.1.ffn_new.weight", (32, 8), Unsupported),  # may have an expert axis
        ("blk.1.exp_new.bias", (32,), Unsupported),
        ("blk.1.ffn_gate_up_exps.scale", (32,), Unsupported),
        ("blk.1.ffn_down_exps.zero_point", (1, 8), Unsupported),  # belongs to experts, whatever its size
        ("blk.0.ffn_up_exps.weight", (32, 8, 4), BadFile),  # block 0 has no ffn_down_exps
        ("blk.0.ffn_gate_inp.weight", (32, 8), BadFile),
    ],
)
def test_tensors_that_are_wrong(name, shape, kind):
    error = roles.check_shape(name, shape, MODEL)
    assert type(error) is kind and error.object == name


def layout(names=("blk.0.ffn_down_exps.weight",), **values):
    metadata = {"x.expert_count": 8, "x.block_count": 2} | {f"x.{k}": v for k, v in values.items()}
    return roles.layout("x", names, metadata.get)


def test_layout_finds_blocks_by_name_and_mtp_by_number():
    names = [f"blk.{i}.ffn_down_exps.weight" for i in (3, 1, 4)] + ["blk.0.ffn_down.weight", "output.weight"]
    found = layout(names, block_count=5, nextn_predict_layers=2)
    assert found == roles.Layout(layers=(1, 3, 4), mtp=(3, 4), experts=8, groups=0, chunk=1)


def test_layout_of_a_dense_model_has_no_layers():
    assert layout(["blk.0.ffn_down.weight"]).layers == ()


def test_nextn_of_graniteswitch_is_no_mtp():
    metadata = {
        f"graniteswitch.{key}": n for key, n in (("expert_count", 8), ("block_count", 2), ("nextn_predict_layers", 1))
    }
    assert roles.layout("graniteswitch", ["blk.1.ffn_down_exps.weight"], metadata.get).mtp == ()


@pytest.mark.parametrize(
    "values, key",
    [
        ({"expert_count": None}, "x.expert_count"),
        ({"expert_count": "8"}, "x.expert_count"),
        ({"expert_count": True}, "x.expert_count"),
        ({"block_count": -1}, "x.block_count"),
        ({"nextn_predict_layers": 3}, "x.nextn_predict_layers"),
        ({"expert_group_count": 3}, "x.expert_group_count"),
        ({"block_count": 0}, "blk.0.ffn_down_exps.weight"),
    ],
)
def test_layout_of_metadata_that_contradicts_itself(values, key):
    with pytest.raises(BadFile) as error:
        layout(**values)
    assert error.value.object == key


@pytest.mark.parametrize("per_group", [None, 0, 3])
def test_chunk_experts_need_their_number(per_group):
    with pytest.raises(BadFile) as error:
        layout(("blk.0.ffn_down_exps.weight", "blk.0.ffn_up_chexps.weight"), experts_per_group=per_group)
    assert error.value.object == "x.experts_per_group"


def test_one_tensor_per_expert_is_refused_by_name():
    with pytest.raises(Unsupported) as error:
        layout(("blk.0.ffn_gate_inp.weight", "blk.0.ffn_down.0.weight", "blk.0.ffn_down.1.weight"))
    assert error.value.object == "blk.0.ffn_down.0.weight"
