"""Merging experts: the groups, the matching of neurons, and the bytes that come out."""

import json
import pickle

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pygguf_surgery as pgs
from pygguf_surgery.files import stats as stats_file
from pygguf_surgery.files.stats import LayerStats
from pygguf_surgery.plan_data.expressions import Group
from pygguf_surgery.reports.verification import verify
from pygguf_surgery.studies import ream
from support import moe_models
from support.definitions import merged
from support.gguf_files import make_gguf, read_gguf
from support.imatrices import imatrix_of
from support.places import SHARED

TRAINED = SHARED / "models" / "tiny-qwen3next-bf16.gguf"
PARTS = ("gate", "up", "down")


def order_of(numbers):
    return np.asarray(numbers, "<u2").tobytes()


def some_groups(rng, experts, n, neurons, layers=(0, 1)):
    """Random groups with random weights and orders, by ascending centroid."""
    out = {}
    for layer in layers:
        ids = rng.permutation(experts).tolist()
        centroids, rest = sorted(ids[:n]), ids[n:]
        members = {c: [c] for c in centroids}
        for e in rest:
            members[centroids[rng.integers(n)]].append(e)
        groups = []
        for group in members.values():
            weights = rng.random(len(group)) + 0.1
            groups.append(
                Group(
                    tuple(group),
                    tuple((weights / weights.sum()).tolist()),
                    (b"", *(order_of(rng.permutation(neurons)) for _ in group[1:])),
                )
            )
        out[layer] = tuple(groups)
    return out


AXES = {"gate": "rows", "up": "rows", "gate_up": "half rows", "down": "columns"}
BIAS_AXES = {"gate": "columns", "up": "columns", "gate_up": "half columns", "down": "none"}


def check_output(source, out, groups, type=None):
    """Every tensor of experts is the oracle's, encoded; the router is the centroids'."""
    with pgs.open(source) as model, pgs.open(out) as result:
        for layer, some in groups.items():
            single = [len(g.members) == 1 for g in some]
            for name, tensor in model.tensors.items():
                parts = name.split(".")
                if not name.startswith(f"blk.{layer}.") or (
                    "_exps." not in name and "gate_inp" not in name and "exp_probs" not in name
                ):
                    continue
                made = result.tensors[name]
                if "_exps." not in name:
                    np.testing.assert_array_equal(made.dequantize(), tensor.dequantize()[[g.members[0] for g in some]])
                    continue
                part = parts[2].removeprefix("ffn_").removesuffix("_exps")
                axis = (AXES if parts[3] == "weight" else BIAS_AXES)[part]
                slices = merged(tensor.dequantize(), some, axis)
                expected = pgs.quantize(slices, made.type).reshape(len(some), -1)
                assert type is None or made.type == type or parts[3] == "bias"
                found = made.bytes().reshape(len(some), -1)
                if made.type == tensor.type:  # experts alone are copies
                    source_bytes = tensor.bytes().reshape(tensor.shape[0], -1)
                    for i, group in enumerate(some):
                        if single[i]:
                            expected[i] = source_bytes[group.members[0]]
                np.testing.assert_array_equal(found, expected, err_msg=name)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 10_000),
    type=st.sampled_from(["F32", "F16", "Q8_0", "Q4_0"]),
    n=st.integers(4, 16),
    threads=st.integers(1, 3),
    target=st.sampled_from([None, "Q5_1"]),
)
def test_the_engine_gives_what_numpy_gives(tmp_path_factory, seed, type, n, threads, target):
    folder = tmp_path_factory.mktemp("merge")
    source = moe_models.qwen3moe(folder / "in.gguf", type=type)
    groups = some_groups(np.random.default_rng(seed), 16, n, moe_models.FF)
    with pgs.open(source) as model:
        plan = pgs.Plan(model).merge_experts(groups)
        if target is not None:
            plan = plan.quantize(target, pure=True, allow_requantize=True)
        assert not plan.check().blockers
        plan.write(folder / "out.gguf", threads=threads)
    check_output(source, folder / "out.gguf", groups, target)


@pytest.mark.parametrize("name", ["gpt_oss", "granitehybrid", "dots1"])
def test_biases_and_other_layouts(tmp_path, name):
    path = moe_models.ALL[name](tmp_path / "in.gguf")
    rng = np.random.default_rng(1)
    with pgs.open(path) as model:
        experts = model.get("expert_count")
        layers = sorted({int(t.split(".")[1]) for t in model.tensors if "down_exps" in t})
        groups = some_groups(rng, experts, experts // 2, moe_models.FF, layers)
        pgs.Plan(model).merge_experts(groups).write(tmp_path / "out.gguf")
    check_output(path, tmp_path / "out.gguf", groups)


def test_fused_gate_and_up(tmp_path):
    b = moe_models.Builder("qwen3moe", blocks=1, experts=8, used=2)
    b.moe(0, parts=("gate_up", "down"), bias=True)
    path = b.write(tmp_path / "in.gguf")
    groups = some_groups(np.random.default_rng(2), 8, 4, moe_models.FF, [0])
    with pgs.open(path) as model:
        pgs.Plan(model).merge_experts(groups).write(tmp_path / "out.gguf")
    check_output(path, tmp_path / "out.gguf", groups)


def large_layer(path, experts, neurons, width, type="F32"):
    """Slices larger than a tile, so that rows come from all over a slice."""
    rng = np.random.default_rng(0)
    u32 = gguf.GGUFValueType.UINT32
    tensors = {"blk.0.ffn_gate_inp.weight": rng.standard_normal((experts, width), np.float32)}
    for part in PARTS:
        shape = (experts, width, neurons) if part == "down" else (experts, neurons, width)
        tensors[f"blk.0.ffn_{part}_exps.weight"] = rng.standard_normal(shape, np.float32)
    return make_gguf(
        path,
        "qwen3moe",
        {
            f"qwen3moe.{key}": (value, u32)
            for key, value in (("block_count", 1), ("expert_count", experts), ("expert_used_count", 1))
        },
        tensors,
    )


def test_slices_larger_than_a_tile_and_any_budget_give_the_same_bytes(tmp_path):
    path = large_layer(tmp_path / "in.gguf", 3, 700, 1600)  # 4.5 MB a slice
    groups = {
        0: (
            Group((0, 2), (0.25, 0.75), (b"", order_of(np.random.default_rng(1).permutation(700)))),
            Group((1,), (1.0,), (b"",)),
        )
    }
    with pgs.open(path) as model:
        plan = pgs.Plan(model).merge_experts(groups)
        for out, memory, threads in (("a.gguf", "64MiB", 1), ("b.gguf", "512MiB", 2), ("c.gguf", "64MiB", 2)):
            receipt = plan.write(tmp_path / out, memory=memory, threads=threads)
            assert receipt.actions["merge"] == 3 and receipt.buffer_bytes <= (64 if memory == "64MiB" else 512) << 20
    assert (
        (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes() == (tmp_path / "c.gguf").read_bytes()
    )
    check_output(path, tmp_path / "a.gguf", groups)


# --- laws -----------------------------------------------------------------------------------------------------------


def handmade(tmp_path, copies, *, type="F32", seed=0, noise=0.0):
    """One layer whose expert i is expert copies[i] of a few random ones, its neurons in another order."""
    rng = np.random.default_rng(seed)
    made, orders = {part: [] for part in PARTS}, []
    base = {part: rng.standard_normal((max(copies) + 1, 32, 32), np.float32) for part in PARTS}
    for i, which in enumerate(copies):
        p = np.arange(32) if which not in copies[:i] else rng.permutation(32)
        orders.append(p)
        for part in PARTS:
            w = base[part][which] + noise * rng.standard_normal((32, 32), np.float32)
            made[part].append(w[:, p] if part == "down" else w[p])
    b = moe_models.Builder("qwen3moe", blocks=1, experts=len(copies), used=1)
    b.attention(0, norms=True)
    b.add("blk.0.ffn_norm.weight", 32)
    b.add("blk.0.ffn_gate_inp.weight", data=rng.standard_normal((len(copies), 32), np.float32))
    for part in PARTS:
        b.add(f"blk.0.ffn_{part}_exps.weight", data=np.stack(made[part]), type=type)
    return b.write(tmp_path / "handmade.gguf"), made, orders


def function(gate, up, down, x):
    g = x @ gate.T
    return (g / (1 + np.exp(-g)) * (x @ up.T)) @ down.T


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), type=st.sampled_from(["F32", "F16", "Q8_0"]))
def test_merging_permuted_copies_changes_nothing(tmp_path_factory, seed, type):
    """The matching finds how the neurons of a copy were permuted; the mean of equal experts is each of them, bit for
    bit."""
    folder = tmp_path_factory.mktemp("copies")
    path, _, _ = handmade(folder, [0, 1, 0, 2, 1, 0], type="F32", seed=seed)
    if type != "F32":  # quantized rows of the permuted down projection are others: merge at 32 bits into the type
        with pgs.open(path) as model:
            pgs.Plan(model).quantize(type, pure=True).write(folder / "typed.gguf")
    with pgs.open(path) as model:
        experts = ream._Experts(model, model.sources, 0)
        groups = {
            0: tuple(
                Group(m, w, (b"", *(ream.match(experts, m[0], e) for e in m[1:])))
                for m, w in (((0, 2, 5), (0.5, 0.3, 0.2)), ((1, 4), (0.1, 0.9)), ((3,), (1.0,)))
            )
        }
        plan = pgs.Plan(model).merge_experts(groups)
        plan = plan if type == "F32" else plan.quantize(type, pure=True)
        plan.write(folder / "out.gguf")
    with pgs.open(folder / "out.gguf") as out, pgs.open(path if type == "F32" else folder / "typed.gguf") as source:
        for part in PARTS:
            name = f"blk.0.ffn_{part}_exps.weight"
            expected = source.tensors[name].bytes().reshape(6, -1)[[0, 1, 3]]
            np.testing.assert_array_equal(out.tensors[name].bytes().reshape(3, -1), expected)


@given(seed=st.integers(0, 1000))
def test_a_permuted_expert_is_the_same_function(tmp_path_factory, seed):
    path, made, orders = handmade(tmp_path_factory.mktemp("permuted"), [0, 0], seed=seed)
    x = np.random.default_rng(seed).standard_normal((5, 32))
    a, b = (function(*(made[part][i].astype(np.float64) for part in PARTS), x) for i in (0, 1))
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)
    with pgs.open(path) as model:
        found = np.frombuffer(ream.match(ream._Experts(model, model.sources, 0), 0, 1), "<u2")
    np.testing.assert_array_equal(orders[1][found], np.arange(32))


def test_the_matching_is_the_best_assignment(tmp_path):
    from itertools import permutations

    path, made, _ = handmade(tmp_path, [0, 1])
    with pgs.open(path) as model:
        experts = ream._Experts(model, model.sources, 0)
        experts.neurons = 6
        experts.read = lambda part, e, read=experts.read: read(part, e)[:6]
        order = np.frombuffer(ream.match(experts, 0, 1), "<u2")
    rows = [np.concatenate([made["gate"][e][:6], made["up"][e][:6], made["down"][e].T[:6]], axis=1) for e in (0, 1)]
    rows = [r / np.linalg.norm(r, axis=1, keepdims=True) for r in rows]
    cost = np.linalg.norm(rows[0][:, None] - rows[1][None], axis=2)
    best = min(permutations(range(6)), key=lambda p: cost[range(6), p].sum())
    assert tuple(order) == best


@given(
    scores=st.lists(st.floats(0, 100), min_size=4, max_size=24),
    seed=st.integers(0, 100),
    size=st.integers(1, 24),
    share=st.floats(0.1, 1),
)
def test_every_expert_is_in_one_group(scores, seed, size, share):
    saliency = ream._positive(np.array(scores))
    assert (saliency > 0).all()
    experts, n = len(scores), max(1, int(len(scores) * share))
    centroids = sorted(np.argsort(-saliency, kind="stable")[:n].tolist())
    similarity = np.random.default_rng(seed).random((experts, experts))
    if experts > n * size:
        with pytest.raises(pgs.BadPlan, match="too small"):
            ream.assign(saliency, centroids, similarity, size)
        return
    groups = ream.assign(saliency, centroids, similarity, size)
    assert sorted(e for group in groups for e in group) == list(range(experts))
    assert [g[0] for g in groups] == centroids and max(map(len, groups)) <= size


def test_the_most_salient_centroid_takes_the_nearest_first():
    similarity = np.zeros((5, 5))
    similarity[0] = [0, 0, 0.1, 0.9, 0.5]
    similarity[1] = [0, 0, 0.9, 0.8, 0.7]
    assert ream.assign(np.array([9.0, 8.0, 1.0, 1.0, 1.0]), [0, 1], similarity, 3) == [[0, 3, 4], [1, 2]]
    assert ream.assign(np.array([8.0, 9.0, 1.0, 1.0, 1.0]), [0, 1], similarity, 3) == [[0, 4], [1, 2, 3]]


def merge_stats(model, *, layers, experts, width=32, seed=0):
    rng = np.random.default_rng(seed)
    stats = stats_file.Stats(
        model.header_sha256, model.architecture, "Test", experts, 8, {}, [stats_file.Text("00", 100, 5, 5)], 1.0, 1.0, 4
    )
    for layer in layers:
        s = LayerStats.empty(experts)
        s.count[:], s.gated_norm_sum[:] = rng.integers(1, 50, experts), rng.random(experts)
        logits = rng.standard_normal((40, experts))
        s.logit_gram[:] = logits.T @ logits
        s.gated_sum = rng.standard_normal((experts, width))
        stats.layers[layer] = s
    return stats


def test_similarity_is_ream_s():
    class Model:
        header_sha256, architecture = "00", "test"

    s = merge_stats(Model, layers=[0], experts=6).layers[0]
    found = ream._similarity(s)
    logits = np.linalg.cholesky(s.logit_gram).T  # any matrix with this Gram matrix
    logits = logits / np.linalg.norm(logits, axis=0)
    d = np.linalg.norm(logits[:, :, None] - logits[:, None, :], axis=0)
    for i in range(6):
        for j in range(6):
            a, b = s.gated_sum[i], s.gated_sum[j]
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            assert found[i, j] == pytest.approx(((cosine + 1) / 2 + 1 - d[i, j] / d.max()) / 2, abs=1e-6)


# --- groups of a model ------------------------------------------------------------------------------------------------


def test_groups_with_statistics(tmp_path):
    with pgs.open(moe_models.qwen3moe(tmp_path / "in.gguf", type="F32")) as model:
        stats = merge_stats(model, layers=[0, 1], experts=16)
        stats.layers[0].gated_norm_sum[3] = stats.layers[0].count[3] = 0
        groups = pgs.experts.group(model, 12, stats=stats, group_size=3)
        assert groups.metric == "ream reap" and "16 -> 12" in groups.summary()
        for layer, some in groups.items():
            s = stats.layers[layer]
            reap = s.gated_norm_sum / np.maximum(s.count, 1)
            assert [g.members[0] for g in some] == sorted(np.argsort(-reap, kind="stable")[:12].tolist())
            for g in some:
                assert sum(g.weights) == pytest.approx(1, abs=1e-12)
                positive = ream._positive(reap)
                np.testing.assert_allclose(g.weights, positive[list(g.members)] / positive[list(g.members)].sum())
        calls = []
        again = pgs.experts.group(
            model, 12, stats=stats, group_size=3, threads=2, progress=lambda done, total: calls.append((done, total))
        )
        assert again == groups and calls[-1] == (8, 8)
        plan = pgs.Plan(model).merge_experts(groups)
        receipt = plan.write(tmp_path / "out.gguf")
        assert receipt.actions["merge"] == 6
        assert pgs.Plan.from_json(plan.to_json(), model) == plan == pickle.loads(pickle.dumps(plan))
        json.dumps(plan.check().to_json())
    check_output(tmp_path / "in.gguf", tmp_path / "out.gguf", groups)
    metadata, _ = read_gguf(tmp_path / "out.gguf")
    assert metadata["qwen3moe.expert_count"] == 12 and metadata["pgs.experts.metric"] == "ream reap"
    new = metadata["pgs.experts.0.merged"]
    assert (
        [new[g.members[-1]] for g in groups[0]] == list(range(12)) == [new[i] for i in metadata["pgs.experts.0.kept"]]
    )
    report = verify(tmp_path / "out.gguf", tmp_path / "in.gguf")
    assert report.good and len(report.merged) == 6 and "6 with merged experts" in report.summary()
    with open(tmp_path / "out.gguf", "r+b") as file, pgs.open(tmp_path / "out.gguf") as out:
        tensor = out.tensors["blk.0.ffn_up_exps.weight"]
        single = next(i for i, g in enumerate(groups[0]) if len(g.members) == 1)
        file.seek(tensor.offset + single * tensor.nbytes // 12)
        file.write(b"\0\0\0\1")
    assert not verify(tmp_path / "out.gguf", tmp_path / "in.gguf").good


def test_groups_from_the_weights_alone(tmp_path):
    path, _, _ = handmade(tmp_path, [0, 1, 2, 3, 0, 1])
    with pgs.open(path) as model:
        router = model.tensors["blk.0.ffn_gate_inp.weight"].dequantize()
        groups = pgs.experts.group(model, 4, weights_only=True, group_size=2)
        assert groups.metric == "ream weights-only" and len(router) == 6
        experts = ream._Experts(model, model.sources, 0)
        work = ream._Work(model, 1 << 30, 1, "pread", None)
        similarity = work.blind_similarity(experts)
        # The order of neurons does not count: copies are the most similar, but for their router rows.
        cosine = (router @ router.T) / np.outer(*[np.linalg.norm(router, axis=1)] * 2)
        assert 2 * similarity[0, 4] - (cosine[0, 4] + 1) / 2 == pytest.approx(1, abs=1e-5)
        pgs.Plan(model).merge_experts(groups).write(tmp_path / "out.gguf")
    check_output(path, tmp_path / "out.gguf", groups)


def test_mtp_blocks_are_grouped_from_their_weights(tmp_path):
    with pgs.open(moe_models.qwen3next(tmp_path / "mtp.gguf", mtp=True)) as model:
        stats = merge_stats(model, layers=range(4), experts=32)
        groups = pgs.experts.group(model, 24, stats=stats)
        assert list(groups) == [0, 1, 2, 3, 4] and "blk.4 (MTP)" in groups.summary()
        assert not pgs.Plan(model).merge_experts(groups).check().blockers
        trunk = pgs.experts.group(model, 24, stats=stats, mtp="drop")
        assert list(trunk) == [0, 1, 2, 3] and not trunk.notes
        assert not pgs.Plan(model).merge_experts(trunk, mtp="drop").check().blockers


def test_routing_groups_keep_their_share(tmp_path):
    with pgs.open(moe_models.dots1(tmp_path / "in.gguf", groups=4)) as model:
        groups = pgs.experts.group(model, 12, weights_only=True)
        for some in groups.values():
            assert np.bincount([g.members[0] // 4 for g in some]).tolist() == [3, 3, 3, 3]
        assert not pgs.Plan(model).merge_experts(groups).check().blockers


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({}, pgs.BadPlan, "needs statistics"),
        ({"stats": "plain"}, pgs.BadPlan, "lack what merging needs"),
        ({"stats": "full", "by": "aimer"}, pgs.BadPlan, "not a metric"),
        ({"stats": "full", "group_size": 0}, pgs.BadPlan, "number"),
        ({"stats": "full", "n": 2, "group_size": 4}, pgs.BadPlan, "too small"),
        ({"stats": "full", "weights_only": True}, pgs.BadPlan, "of no use"),
        ({"stats": "full", "n": 17}, pgs.BadPlan, "1..16"),
    ],
)
def test_what_cannot_be_grouped(tmp_path, options, error, match):
    with pgs.open(moe_models.qwen3moe(tmp_path / "in.gguf")) as model:
        stats = merge_stats(model, layers=[0, 1], experts=16)
        if options.get("stats") == "plain":
            for s in stats.layers.values():
                s.gated_sum = None
        options = {"n": 12, **options}
        if "stats" in options:
            options["stats"] = stats
        with pytest.raises(error, match=match):
            pgs.experts.group(model, options.pop("n"), **options)


def test_without_scipy_the_error_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    path = moe_models.qwen3moe(tmp_path / "in.gguf")
    with pgs.open(path) as model, pytest.raises(pgs.Unsupported, match=r"pygguf-surgery\[merge\]"):
        pgs.experts.group(model, 8, weights_only=True)


# --- the plan -------------------------------------------------------------------------------------------------------

IDENTITY = (b"", order_of(range(32)))
GOOD = tuple(Group((i, i + 8), (0.5, 0.5), IDENTITY) for i in range(8))


@pytest.mark.parametrize(
    "groups, match",
    [
        (GOOD[:1] + GOOD[:1], "ascending"),
        ((Group((0, 0), (0.5, 0.5), IDENTITY),), "in two groups"),
        ((Group((16,), (1.0,), (b"",)),), "out of range"),
        ((Group((), (), ()),), "without members"),
        ((Group((0, 1), (0.5, 0.6), IDENTITY),), "not shares"),
        ((Group((0, 1), (float("nan"), 0.5), IDENTITY),), "not shares"),
        ((Group((0, 1), (1.5, -0.5), IDENTITY),), "not shares"),
        ((Group((0, 1), (0.5, 0.5), (b"", b"\0")),), "not a permutation"),
        ((Group((0, 1), (0.5, 0.5), (b"", order_of([0] * 32))),), "not a permutation"),
        ((Group((0, 1), (0.5, 0.5), IDENTITY[::-1]),), "stay in their order"),
    ],
)
def test_bad_groups_are_blockers(tmp_path, groups, match):
    with pgs.open(moe_models.qwen3moe(tmp_path / "in.gguf")) as model:
        checked = pgs.Plan(model).merge_experts({0: groups, 1: GOOD}).check()
        assert match in str(checked.blockers[0]) and checked.blockers[0].object == "blk.0.ffn_down_exps.weight"


def test_merges_that_the_tensors_do_not_allow(tmp_path):
    with pgs.open(moe_models.nvfp4_scales(tmp_path / "scales.gguf")) as model:
        blockers = pgs.Plan(model).merge_experts({0: GOOD}).check().blockers
        assert "scale" in blockers[0].object and isinstance(blockers[0], pgs.Unsupported)
    with pgs.open(moe_models.grovemoe(tmp_path / "grove.gguf")) as model:
        with pytest.raises(pgs.Unsupported, match="chunk experts"):
            pgs.experts.group(model, 8, weights_only=True)
        assert pgs.Plan(model).merge_experts({0: GOOD, 1: GOOD}).check().blockers
    with pgs.open(moe_models.qwen3moe(tmp_path / "in.gguf")) as model:
        twice = pgs.Plan(model).merge_experts({0: GOOD, 1: GOOD})
        half = tuple(Group((i, i + 4), (0.5, 0.5), IDENTITY) for i in range(4))
        assert "not plain copies" in str(twice.merge_experts({0: half, 1: half}).check().blockers[0])
        for bad in ({}, {0: [1, 2]}, [GOOD]):
            with pytest.raises(pgs.BadPlan):
                pgs.Plan(model).merge_experts(bad)


def test_cuts_before_and_after_a_merge(tmp_path):
    path = moe_models.qwen3moe(tmp_path / "in.gguf", type="F32")
    rng = np.random.default_rng(3)
    kept = {0: list(range(0, 16, 2)), 1: list(range(1, 16, 2))}
    groups = some_groups(rng, 8, 6, moe_models.FF)
    then = {0: [0, 1, 2, 4, 5], 1: [1, 2, 3, 4, 5]}
    with pgs.open(path) as model:
        plan = pgs.Plan(model).keep_experts(kept).merge_experts(groups).keep_experts(then)
        assert not plan.check().blockers
        plan.write(tmp_path / "out.gguf")
    final = {
        layer: tuple(
            Group(tuple(kept[layer][m] for m in some[i].members), some[i].weights, some[i].orders) for i in then[layer]
        )
        for layer, some in groups.items()
    }
    check_output(path, tmp_path / "out.gguf", final)
    metadata, _ = read_gguf(tmp_path / "out.gguf")
    assert metadata["pgs.experts.0.kept"] == [g.members[0] for g in final[0]]
    assert verify(tmp_path / "out.gguf", path).good


def test_the_importance_matrix_is_merged_too(tmp_path):
    path = moe_models.qwen3moe(tmp_path / "in.gguf", type="F32")
    rng = np.random.default_rng(4)
    entries = {
        f"blk.{i}.ffn_{p}_exps.weight": (rng.random((16, 32)) * 50, rng.integers(1, 9, 16).astype(float))
        for i in range(2)
        for p in PARTS
    }
    for sums, counts in entries.values():
        counts[5] = 0  # never seen: it adds nothing
        sums[5] = 0
    matrix = imatrix_of(tmp_path / "i.gguf", None, entries)
    groups = some_groups(rng, 16, 6, moe_models.FF)
    with pgs.open(path) as model:
        pgs.Plan(model).merge_experts(groups).quantize("Q4_1", imatrix=matrix, imatrix_missing="ones").write(
            tmp_path / "out.gguf"
        )
        with pgs.open(tmp_path / "out.gguf") as out:
            for name, (sums, counts) in entries.items():
                layer, part = int(name.split(".")[1]), name.split("_")[1]
                slices = merged(model.tensors[name].dequantize(), groups[layer], AXES[part])
                weights = []
                for g in groups[layer]:
                    total, tokens = np.zeros(32, np.float32), 0.0
                    for e, order in zip(g.members, g.orders, strict=True):
                        row = sums[e].astype(np.float32)
                        total += row[np.frombuffer(order, "<u2")] if order and part == "down" else row
                        tokens += counts[e]
                    weights.append(total / np.float32(tokens) if tokens else np.ones(32, np.float32))
                assert out.tensors[name].type == "Q4_1"
                expected = pgs.quantize(slices, "Q4_1", imatrix=np.stack(weights))
                np.testing.assert_array_equal(out.tensors[name].bytes(), expected.ravel(), err_msg=name)


def test_a_type_that_needs_importance_is_a_blocker_where_it_is_encoded_again(tmp_path):
    b = moe_models.Builder("qwen3moe", blocks=1, experts=4, used=1)
    rng = np.random.default_rng(0)
    b.add("blk.0.ffn_gate_inp.weight", 4, 256)
    for part in PARTS:
        b.add(f"blk.0.ffn_{part}_exps.weight", data=rng.standard_normal((4, 256, 256), np.float32))
    with pgs.open(b.write(tmp_path / "f32.gguf")) as model:
        ones = {f"blk.0.ffn_{p}_exps.weight": (np.ones((4, 256)), np.ones(4)) for p in PARTS}
        matrix = imatrix_of(tmp_path / "i.gguf", None, ones)
        pgs.Plan(model).quantize("IQ2_XS", pure=True, imatrix=matrix, overrides=[("inp", "F32")]).write(
            tmp_path / "iq2.gguf"
        )
    identity = (b"", order_of(range(256)))
    groups = {0: (Group((0, 1), (0.5, 0.5), identity), Group((2,), (1.0,), (b"",)), Group((3,), (1.0,), (b"",)))}
    with pgs.open(tmp_path / "iq2.gguf") as model:
        plan = pgs.Plan(model).merge_experts(groups)
        assert model.tensors["blk.0.ffn_up_exps.weight"].type == "IQ2_XS"
        assert [b.object for b in plan.check().blockers] == [f"blk.0.ffn_{p}_exps.weight" for p in PARTS]
        plan.quantize("COPY", imatrix=matrix, allow_requantize=True).write(tmp_path / "merged.gguf")
        with pgs.open(tmp_path / "merged.gguf") as out:
            tensor, made = model.tensors["blk.0.ffn_up_exps.weight"], out.tensors["blk.0.ffn_up_exps.weight"]
            slices = merged(tensor.dequantize(), groups[0], "rows")[:1]
            expected = pgs.quantize(slices, "IQ2_XS", imatrix=np.ones(256, np.float32)).ravel()
            np.testing.assert_array_equal(made.bytes()[: len(expected)], expected)
            np.testing.assert_array_equal(made.bytes()[len(expected) :], tensor.bytes()[2 * len(expected) :])
        pgs.Plan(model).merge_experts(groups).quantize("Q8_0", allow_requantize=True).write(tmp_path / "q8.gguf")


def test_slicing_an_importance_matrix_by_a_merged_model_is_refused(tmp_path):
    from pygguf_surgery.cli import main

    path = moe_models.qwen3moe(tmp_path / "in.gguf")
    with pgs.open(path) as model:
        pgs.Plan(model).merge_experts({0: GOOD, 1: GOOD}).write(tmp_path / "out.gguf")
    matrix = imatrix_of(tmp_path / "i.gguf", None, {"blk.0.ffn_down_exps.weight": (np.ones((16, 32)), np.ones(16))})
    assert main(["imatrix", "slice", str(matrix), str(tmp_path / "j.gguf"), "--by", str(tmp_path / "out.gguf")]) == 4


def test_from_the_shell(tmp_path, capsys):
    from pygguf_surgery.cli import main

    path, out = str(moe_models.qwen3moe(tmp_path / "in.gguf", type="F32")), str(tmp_path / "out.gguf")
    with pgs.open(path) as model:
        merge_stats(model, layers=[0, 1], experts=16).write(tmp_path / "s.gguf")
    stats = str(tmp_path / "s.gguf")
    assert main(["merge", path, out, "--keep", "12"]) == 2 and main(["merge", path, out, "--stats", stats]) == 2
    assert main(["merge", path, out, "--keep", "12", "--stats", stats, "--type", "Q8_0"]) == 0
    assert "experts merged by ream reap" in capsys.readouterr().err
    assert main(["merge", path, out, "--keep", "12", "--stats", stats]) == 4  # it exists
    assert main(["merge", path, out, "--ratio", "0.5", "--weights-only", "--force", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["qwen3moe.expert_count"] == 8
    assert main(["merge", path, str(tmp_path / "x.gguf"), "--keep", "17", "--weights-only"]) == 4


@pytest.mark.parity
def test_llama_cpp_says_the_same_of_merged_copies(tmp_path):
    """A model of 4 different experts among 8, each twice, its neurons permuted, and the one with 4: every token takes
    all."""
    pytest.importorskip("llama_cpp")
    from support.llama_oracle import Tap

    path, _, _ = handmade(tmp_path, [0, 1, 0, 1])
    with pgs.open(path) as model:
        experts = ream._Experts(model, model.sources, 0)
        groups = {0: tuple(Group((c, c + 2), (0.5, 0.5), (b"", ream.match(experts, c, c + 2))) for c in (0, 1))}
        pgs.Plan(model).merge_experts(groups).write(tmp_path / "out.gguf")
        pgs.Plan(model).keep_experts({0: [0, 1]}).write(tmp_path / "cut.gguf")
    tokens = np.random.default_rng(7).integers(0, moe_models.VOCAB, 80)
    merged, cut = (
        Tap(tmp_path / name, ["ffn_moe_out-0"], tokens, 40)["ffn_moe_out-0"] for name in ("out.gguf", "cut.gguf")
    )
    np.testing.assert_array_equal(merged, cut)


@pytest.mark.parity
def test_a_trained_model_merged_with_its_statistics(tmp_path):
    pytest.importorskip("llama_cpp")
    if not TRAINED.exists():
        pytest.skip(f"{TRAINED.name} is not here")
    text = (TRAINED.parent / "calib.txt").read_bytes()[:40_000]
    stats = pgs.experts.calibrate(TRAINED, [text], n_ctx=256, merge_stats=True)
    with pgs.open(TRAINED) as model:
        groups = pgs.experts.group(model, 24, stats=stats, by="reap-sum")
        pgs.Plan(model).merge_experts(groups).write(tmp_path / "out.gguf")
    made = pgs.experts.calibrate(tmp_path / "out.gguf", [text], n_ctx=256, chunks=20)
    assert made.experts == 24 and made.perplexity()[0] < 40
