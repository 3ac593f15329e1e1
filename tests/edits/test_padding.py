"""Layers that keep different numbers of experts: padded where the router can be kept from the padding, else refused."""

import numpy as np
import pytest

import pygguf_surgery as pgs
from pygguf_surgery import _core
from pygguf_surgery.reports.verification import verify
from support import moe_models
from support.expert_stats import stats_for
from support.gguf_files import read_gguf
from support.imatrices import imatrix_of

UNEVEN = {1: (0, 2, 3, 5, 7, 8, 9, 12, 15), 2: (1, 4, 6, 7, 14)}


def written(tmp_path, path, kept, **options):
    out = tmp_path / "out.gguf"
    with pgs.open(path) as model:
        plan = pgs.Plan(model).keep_experts(kept)
        if options:
            plan = plan.quantize(**options)
        checked = plan.check()
        assert not checked.blockers and any("saves no bytes" in text for text in checked.warnings)
        plan.write(out, overwrite=True)
    return out


def test_the_padding_is_zeros_and_a_bias_that_is_never_picked(tmp_path):
    path = moe_models.dots1(tmp_path / "in.gguf")
    out = written(tmp_path, path, UNEVEN)
    (_, before), (metadata, after) = read_gguf(path), read_gguf(out)
    assert metadata["dots1.expert_count"] == 9
    assert metadata["pgs.experts.2.kept"] == list(UNEVEN[2]) and metadata["pgs.experts.2.padded"] == 4
    assert "pgs.experts.1.padded" not in metadata
    for name, (_, data) in after.items():
        if name.startswith("blk.2.") and ("_exps" in name or "gate_inp" in name or "probs" in name):
            np.testing.assert_array_equal(data[:5], before[name][1][list(UNEVEN[2])])
            assert (data[5:] == (-3e4 if "probs" in name else 0)).all() and data.shape[0] == 9
    report = verify(out, path)
    assert report.good and report.equal_tensors == len(after)
    with open(out, "r+b") as file, pgs.open(out) as model:
        file.seek(model.tensors["blk.2.exp_probs_b.bias"].offset + 4 * 8)
        file.write(b"\0\0\0\0")
    assert not verify(out, path).good


@pytest.mark.parametrize(
    "key, value",
    [
        ("pgs.experts.2.padded", 1 << 40),
        ("pgs.experts.2.padded", "four"),
        ("pgs.experts.2.merged", 7),
        ("pgs.experts.2.repaired", 7),
    ],
)
def test_keys_that_somebody_changed_are_no_trap(tmp_path, key, value):
    path = moe_models.dots1(tmp_path / "in.gguf")
    with pgs.open(written(tmp_path, path, UNEVEN)) as model:
        plan = pgs.Plan(model).remove_metadata(key) if key in model.metadata else pgs.Plan(model)
        kind = "str" if isinstance(value, str) else "u64"
        plan.set_metadata({key: pgs.Value(value, kind)}).write(tmp_path / "changed.gguf")
    report = verify(tmp_path / "changed.gguf", path)
    assert report.good == (not key.endswith("padded"))


def test_quantized_padding_decodes_to_zero(tmp_path):
    path = moe_models.dots1(tmp_path / "in.gguf")
    entries = {
        f"blk.{i}.ffn_{p}_exps.weight": (np.ones((16, 32)), np.ones(16)) for i in (1, 2) for p in ("gate", "up", "down")
    }
    out = written(tmp_path, path, UNEVEN, type="Q4_0", imatrix=imatrix_of(tmp_path / "i.gguf", None, entries))
    with pgs.open(out) as model:
        tensor = model.tensors["blk.2.ffn_up_exps.weight"]
        assert tensor.type == "Q4_0" and (tensor.dequantize(experts=range(5, 9)) == 0).all()
        assert (tensor.dequantize(experts=range(5)) != 0).any()


@pytest.mark.parametrize("type", [f.name for f in _core.types() if f.decodes])
def test_zero_bytes_are_zeros_in_every_type(type):
    """What the padding of a tensor that is not encoded is made of."""
    facts = next(f for f in _core.types() if f.name == type)
    assert (pgs.dequantize(np.zeros((1, facts.block_bytes), np.uint8), type) == 0).all()


def test_a_second_cut_of_a_padded_model(tmp_path):
    path = moe_models.dots1(tmp_path / "in.gguf")
    with pgs.open(path) as model:
        plan = pgs.Plan(model).keep_experts(UNEVEN).keep_experts({1: [0, 1, 2, 3, 8], 2: [0, 1, 2, 3, 4]})
        plan.write(tmp_path / "out.gguf")
        direct = pgs.Plan(model).keep_experts({1: [0, 2, 3, 5, 15], 2: UNEVEN[2]})
        direct.write(tmp_path / "direct.gguf")
    metadata, tensors = read_gguf(tmp_path / "out.gguf")
    assert metadata["pgs.experts.1.kept"] == [0, 2, 3, 5, 15] and "pgs.experts.2.padded" not in metadata
    for name, (_, data) in read_gguf(tmp_path / "direct.gguf")[1].items():
        np.testing.assert_array_equal(tensors[name][1], data)
    with pgs.open(path) as model:
        merged = pgs.Plan(model).keep_experts(UNEVEN).merge_experts({1: _groups(), 2: _groups()})
        assert "padding" in str(merged.check().blockers[0])


def _groups():
    from pygguf_surgery.plan_data.expressions import Group

    return tuple(Group((i, i + 4), (0.5, 0.5), (b"", b"")) for i in range(4))


@pytest.mark.parametrize(
    "name, kept, match",
    [
        ("qwen3moe", {0: range(8), 1: range(9)}, "does not say how gates"),
        ("deepseek2", {1: range(8), 2: range(4)}, "groups"),
        ("grovemoe", {0: range(8), 1: range(10)}, "chunk"),
        ("deepseek4", {0: range(8), 1: range(9)}, "looked up by token"),
    ],
)
def test_where_padding_is_not_exact_it_is_refused_with_the_reason(tmp_path, name, kept, match):
    with pgs.open(moe_models.ALL[name](tmp_path / "in.gguf")) as model:
        blocker = pgs.Plan(model).keep_experts(kept).check().blockers[0]
    assert isinstance(blocker, pgs.Unsupported) and match in str(blocker) and "different number" in str(blocker)


@pytest.mark.parametrize(
    "gate, norm, match",
    [(1, False, "not renormalised"), (1, True, None), (2, False, None), (3, True, "does not say"), (4, False, None)],
)
def test_the_gate_decides(tmp_path, gate, norm, match):
    path = moe_models.dots1(tmp_path / "in.gguf")
    with pgs.open(path) as model:
        plan = pgs.Plan(model).set_metadata({"dots1.expert_gating_func": gate, "dots1.expert_weights_norm": norm})
        blockers = plan.keep_experts(UNEVEN).check().blockers
    assert (match is None and not blockers) or match in str(blockers[0])


def test_each_layer_keeps_as_many_as_a_token_uses(tmp_path):
    with pgs.open(moe_models.dots1(tmp_path / "in.gguf")) as model:
        blocker = pgs.Plan(model).keep_experts({1: range(8), 2: range(3)}).check().blockers[0]
    assert "3 experts kept and 4 used" in str(blocker)


def test_a_global_budget_is_realised_by_padding(tmp_path):
    with pgs.open(moe_models.dots1(tmp_path / "in.gguf")) as model:
        stats = stats_for(model)
        stats.layers[2].gated_norm_sum[:4] = 1e6  # almost all of this layer's is in four experts
        keep = pgs.experts.rank(model, "reap-sum", stats=stats).keep(8, budget="global")
        sizes = {layer: len(ids) for layer, ids in keep.items()}
        assert sum(sizes.values()) == 16 and len(set(sizes.values())) == 2
        pgs.Plan(model).keep_experts(keep).write(tmp_path / "out.gguf")
    metadata, _ = read_gguf(tmp_path / "out.gguf")
    assert metadata["dots1.expert_count"] == max(sizes.values())
    assert verify(tmp_path / "out.gguf", tmp_path / "in.gguf").good


@pytest.mark.parity
@pytest.mark.parametrize("name", ["dots1", "gpt_oss"])
def test_llama_cpp_computes_the_same_with_padding(tmp_path, name):
    """A layer of 9 and one of 5 experts, padded to 9: each MoE layer gives what it gives in a file of its own count."""
    pytest.importorskip("llama_cpp")
    from support.llama_oracle import TOKENS, Tap

    path = moe_models.ALL[name](tmp_path / "in.gguf")
    first, second = (1, 2) if name == "dots1" else (0, 1)
    uneven = {first: UNEVEN[2], second: UNEVEN[1]}  # the first MoE layer, whose inputs are the same in all, is padded
    with pgs.open(path) as model:
        pgs.Plan(model).keep_experts(uneven).write(tmp_path / "padded.gguf")
        pgs.Plan(model).keep_experts({first: UNEVEN[2], second: UNEVEN[2]}).write(tmp_path / "even.gguf")
    names = [f"ffn_moe_{what}-{first}" for what in ("out", "topk")]
    padded, even = (Tap(tmp_path / f, names, TOKENS, 40) for f in ("padded.gguf", "even.gguf"))
    np.testing.assert_array_equal(padded[names[1]], even[names[1]])
    np.testing.assert_array_equal(padded[names[0]], even[names[0]])
