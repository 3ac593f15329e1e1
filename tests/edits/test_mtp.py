"""Cutting the experts of MTP layers, and dropping these layers."""

import gguf
import pytest

import pygguf_surgery as pgs
from support import moe_models
from support.cuts import apply, block, cut, same_tensors, tensor, the_blocker
from support.gguf_files import read_gguf


@pytest.fixture(scope="module")
def mtp_file(tmp_path_factory):
    return moe_models.qwen3next(tmp_path_factory.mktemp("mtp") / "mtp.gguf", mtp=True)


def test_mtp_blocks_are_cut_with_the_rest(mtp_file, tmp_path):
    _, tensors = read_gguf(mtp_file)
    with pgs.open(mtp_file) as model:
        kept = pgs.experts.rank(model).keep(16)
        pgs.Plan(model).keep_experts(kept).write(tmp_path / "out.gguf")
    metadata, found = read_gguf(tmp_path / "out.gguf")
    assert len(kept[4]) == 16
    same_tensors(found, {n: (kind, cut(n, data, kept)) for n, (kind, data) in tensors.items()})
    assert metadata["qwen3next.block_count"] == 5 and metadata["qwen3next.nextn_predict_layers"] == 1


def test_mtp_blocks_are_never_left_behind(mtp_file):
    with pgs.open(mtp_file) as model:
        kept = dict(pgs.experts.rank(model).keep(16))
        del kept[4]
        error = the_blocker(pgs.Plan(model).keep_experts(kept).check())
    assert error.object == "blk.4" and "MTP" in str(error) and "drop" in error.hint


def test_dropping_mtp_equals_a_model_without(mtp_file, tmp_path):
    before, tensors = read_gguf(mtp_file)
    with pgs.open(mtp_file) as model:
        kept = pgs.experts.rank(model).keep(16)
        pgs.Plan(model).keep_experts(kept, mtp="drop").write(tmp_path / "out.gguf")
    metadata, found = read_gguf(tmp_path / "out.gguf")
    same_tensors(
        found, {n: (kind, cut(n, data, kept)) for n, (kind, data) in tensors.items() if not n.startswith("blk.4.")}
    )
    assert metadata["qwen3next.block_count"] == 4 and "qwen3next.nextn_predict_layers" not in metadata
    assert metadata["qwen3next.attention.recurrent_layers"] == before["qwen3next.attention.recurrent_layers"][:4]
    assert [k for k in metadata if k.startswith("pgs.experts.") and k.endswith("kept")] == [
        f"pgs.experts.{i}.kept" for i in range(4)
    ]


def test_dropping_mtp_and_keeping_all_experts_is_no_cut(mtp_file):
    with pgs.open(mtp_file) as model:
        checked = pgs.Plan(model).keep_experts({i: range(32) for i in range(4)}, mtp="drop").check()
    assert checked.blockers == [] and checked.metadata["qwen3next.block_count"].value == 4
    assert not any(k.startswith("pgs.") for k in checked.metadata)
    assert set(checked.actions()) == {"copy"}


def test_lists_of_tensors_follow_the_tensors(tmp_path):
    names = ["blk.0.attn_qkv.weight", "blk.4.attn_q.weight", "elsewhere"]
    array, string, boolean = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING, gguf.GGUFValueType.BOOL
    path = moe_models.qwen3next(
        tmp_path / "m.gguf",
        mtp=True,
        **{
            "general.tensor_extra.name": (names, array, string),
            "general.tensor_extra.prec_a4": ([False, True, False], array, boolean),
        },
    )
    with pgs.open(path) as model:
        plan = pgs.Plan(model).keep_experts(pgs.experts.rank(model).keep(16), mtp="drop")
        plan.write(tmp_path / "out.gguf")
        short = pgs.Plan(model).set_metadata({"general.tensor_extra.prec_a4": [True]}).check()
        assert pgs.Plan(model).check().metadata == model.metadata.exact()
    metadata, _ = read_gguf(tmp_path / "out.gguf")
    assert metadata["general.tensor_extra.name"] == [names[0], names[2]]
    assert metadata["general.tensor_extra.prec_a4"] == [False, False]
    assert the_blocker(short).object == "general.tensor_extra.prec_a4"


def mtp_model(*more, **keys):
    names = block(0, 4) + block(1, 4) + [tensor("blk.1.nextn.eh_proj.weight", 8, 16), *more]
    return apply(names, {0: (0, 1), 1: (0, 1)}, mtp="drop", **{"blocks": 2, "nextn_predict_layers": 1} | keys)


def test_arrays_per_block_are_cut_with_mtp():
    out = mtp_model(feed_forward_length=[5, 6], used=[2, 2], rope__dimension_sections=[1, 2], feed=[1, 2, 3])
    assert out.blockers == []
    assert {k: v.value for k, v in out.metadata.items() if v.type == "u32[]" and k.startswith("x.")} == {
        "x.feed_forward_length": [5],
        "x.expert_used_count": [2],
        "x.rope.dimension_sections": [1, 2],
        "x.feed": [1, 2, 3],
    }


@pytest.mark.parametrize(
    "keys, object",
    [
        ({"something_new": [1, 2]}, "x.something_new"),  # one per block, or not?
        ({"nextn_predict_layers": 2}, "x.nextn_predict_layers"),  # nothing would be left
        ({"block_count": None}, "x.block_count"),
    ],
)
def test_mtp_that_cannot_be_dropped(keys, object):
    assert the_blocker(mtp_model(**keys)).object == object


def test_a_last_block_without_nextn_tensors_is_not_dropped():
    out = apply(block(0, 4) + block(1, 4), {0: (0, 1), 1: (0, 1)}, mtp="drop", blocks=2, nextn_predict_layers=1)
    assert the_blocker(out).object == "blk.1"


def test_no_mtp_to_drop_is_said():
    out = apply(block(0, 4), {0: (0, 1)}, mtp="drop")
    assert out.blockers == [] and any("no MTP" in text for text in out.warnings)


def test_mtp_is_keep_or_drop():
    assert the_blocker(apply(block(0, 4), {0: (0, 1)}, mtp="maybe")).object == "mtp"
