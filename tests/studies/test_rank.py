"""Scores of experts and the choice they lead to."""

import json
import math
import pickle

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pygguf_surgery as pgs
from pygguf_surgery.architecture import experts as roles
from pygguf_surgery.studies.ranking import Ranking
from support import moe_models
from support.gguf_files import read_gguf


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: build(folder / f"{name}.gguf") for name, build in moe_models.ALL.items()}


@pytest.fixture(scope="module")
def qwen(files):
    with pgs.open(files["qwen3moe"]) as model:
        yield model


def handmade(tmp_path, router, *, gate=None, up=None, down=None, type="F32", scales=None):
    """One block; arrays [E, rows, columns], by default noise."""
    b = moe_models.Builder("qwen3moe", blocks=1, experts=len(router), used=1)
    b.add("blk.0.ffn_gate_inp.weight", data=np.asarray(router, np.float32))
    for name, data in (("gate", gate), ("up", up), ("down", down)):
        if data is None:
            data = np.ones((len(router), 2, 32), np.float32)
        b.add(f"blk.0.ffn_{name}_exps.weight", data=np.asarray(data, np.float32), type=type)
    for name, data in (scales or {}).items():
        b.add(f"blk.0.{name}", data=np.asarray(data, np.float32))
    return pgs.open(b.write(tmp_path / "handmade.gguf"))


# --- router-norm ----------------------------------------------------------------------------------------------------


def test_router_norm_by_hand(tmp_path):
    with handmade(tmp_path, [[3, 4, 0], [0, 0, 1], [0, -13, 0], [0, 0, 0]]) as model:
        ranking = pgs.experts.rank(model)
        assert ranking.metric == "router-norm"
        assert ranking.scores[0].tolist() == [5, 1, 13, 0] and ranking.scores[0].dtype == np.float64
        keep = ranking.keep(2)
    assert keep == {0: (0, 2)} and keep.metric == "router-norm"


def test_equal_norms_keep_the_lower_id(tmp_path):
    with handmade(tmp_path, [[1], [2], [-1], [2], [1]]) as model:
        ranking = pgs.experts.rank(model)
    assert [ranking.keep(n)[0] for n in range(1, 6)] == [(1,), (1, 3), (0, 1, 3), (0, 1, 2, 3), (0, 1, 2, 3, 4)]


def test_router_norm_is_computed_in_float64(tmp_path):
    # In float32 the squares overflow to infinity, or vanish.
    with handmade(tmp_path, [[3e30, 4e30], [3e-30, 4e-30]]) as model:
        assert pgs.experts.rank(model).scores[0] == pytest.approx([5e30, 5e-30], rel=1e-6)


@pytest.mark.parametrize("name", moe_models.ALL)
def test_router_norm_of_every_architecture(files, name):
    _, tensors = read_gguf(files[name])
    expected = {
        int(n.split(".")[1]): np.linalg.norm(data.astype(np.float64), axis=1)
        for n, (_, data) in tensors.items()
        if n.endswith("ffn_gate_inp.weight")
    }
    with pgs.open(files[name]) as model:
        scores = pgs.experts.rank(model).scores
    assert scores.keys() == expected.keys()
    for layer in scores:
        np.testing.assert_allclose(scores[layer], expected[layer], rtol=1e-12)


def mixed(tmp_path, bad_layer=None):
    """Four blocks whose routers differ in type."""
    b = moe_models.Builder("qwen3moe", blocks=4, experts=4, used=1)
    for i, kind in enumerate(("F32", "F16", "F32", "F16")):
        data = np.arange(4 * 32, dtype=np.float32).reshape(4, 32) * (i + 1)
        if i == bad_layer:
            data[3, 5] = np.nan
        b.add(f"blk.{i}.ffn_gate_inp.weight", data=data, type=kind)
        b.add(f"blk.{i}.ffn_down_exps.weight", 4, 32, 32)
    return pgs.open(b.write(tmp_path / "mixed.gguf"))


def test_routers_of_different_types_and_layers_do_not_mix(tmp_path):
    with mixed(tmp_path) as model:
        scores = pgs.experts.rank(model).scores
    expected = np.linalg.norm(np.arange(4 * 32.0).reshape(4, 32), axis=1)
    assert list(scores) == [0, 1, 2, 3]
    for i in range(4):
        np.testing.assert_allclose(scores[i], expected * (i + 1), rtol=1e-12)


@pytest.mark.parametrize("layer", range(4))
def test_the_layer_and_expert_that_are_not_finite_are_named(tmp_path, layer):
    with mixed(tmp_path, layer) as model, pytest.raises(pgs.BadFile) as error:
        pgs.experts.rank(model)
    assert (error.value.object, error.value.found) == (f"blk.{layer}.ffn_gate_inp.weight", "in expert 3")


def test_mtp_blocks_are_ranked_too(tmp_path):
    with pgs.open(moe_models.qwen3next(tmp_path / "mtp.gguf", mtp=True)) as model:
        assert list(pgs.experts.rank(model).keep(8)) == [0, 1, 2, 3, 4]


# --- aimer ----------------------------------------------------------------------------------------------------------


def test_aimer_by_hand(tmp_path):
    n = 3 * 2 * 32  # weights of one expert
    gate, up, down = (np.zeros((4, 2, 32), np.float32) for _ in range(3))
    for part in (gate, up, down):
        part[0] = 0.5  # constant magnitude: mean = rms, ratio 1
        part[1, 0, ::2], part[1, 1, 1::2] = 2, -2  # half of the weights: mean 1, rms sqrt(2)
    down[2, 1, 7] = -3  # one weight: mean 3/n, rms 3/sqrt(n)
    with handmade(tmp_path, np.eye(4), gate=gate, up=up, down=down) as model:
        ranking = pgs.experts.rank(model, by="aimer")
    np.testing.assert_allclose(ranking.scores[0][:3], [-1, -1 / math.sqrt(2), -1 / math.sqrt(n)], rtol=1e-12)
    assert ranking.keep(1) == {0: (2,)}
    assert ranking.keep(3) == {0: (0, 1, 2)}, "an expert without weights is the first to go"


def aimer_oracle(parts):
    w = np.concatenate([p.reshape(len(p), -1).astype(np.float64) for p in parts], axis=1)
    return -np.abs(w).mean(axis=1) / np.sqrt((w * w).mean(axis=1))


@pytest.mark.parametrize("name", moe_models.ALL)
def test_aimer_of_every_architecture(files, name):
    """Fused gate and up, no gate, a scale per expert, MXFP4: all against gguf-py's decoding."""
    parts, scales = {}, {}
    for t in gguf.GGUFReader(files[name]).tensors:
        if "_exps.weight" in t.name:
            parts[t.name] = gguf.quants.dequantize(t.data, t.tensor_type)
        elif t.name.endswith("_exps.scale"):
            scales[t.name.replace("scale", "weight")] = np.array(t.data)
    with pgs.open(files[name]) as model:
        scores = pgs.experts.rank(model, by="aimer").scores
    for layer in scores:
        mine = [
            data * scales[n][:, None, None].astype(np.float64) if n in scales else data
            for n, data in parts.items()
            if n.startswith(f"blk.{layer}.")
        ]
        np.testing.assert_allclose(scores[layer], aimer_oracle(mine), rtol=1e-6)


def test_quantized_weights_are_decoded(tmp_path):
    rng = np.random.default_rng(1)
    parts = [rng.standard_normal((6, 2, 32)).astype(np.float32) for _ in range(3)]
    kind = gguf.GGMLQuantizationType.Q8_0
    decoded = [gguf.quants.dequantize(gguf.quants.quantize(p, kind), kind) for p in parts]
    with handmade(tmp_path, np.ones((6, 4)), gate=parts[0], up=parts[1], down=parts[2], type="Q8_0") as model:
        scores = pgs.experts.rank(model, by="aimer").scores[0]
    np.testing.assert_allclose(scores, aimer_oracle(decoded), rtol=1e-12)


# --- what the weights and the caller can get wrong ------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_named(tmp_path, bad):
    with handmade(tmp_path, [[1, 2], [3, bad], [5, 6]]) as model, pytest.raises(pgs.BadFile) as error:
        pgs.experts.rank(model)
    assert error.value.object == "blk.0.ffn_gate_inp.weight"


def test_scales_that_are_not_finite_are_named(tmp_path):
    scales = {"ffn_up_exps.scale": [1, math.nan]}
    with handmade(tmp_path, [[1], [2]], scales=scales) as model, pytest.raises(pgs.BadFile) as error:
        pgs.experts.rank(model, by="aimer")
    assert error.value.object == "blk.0.ffn_up_exps.scale"


def test_unknown_metric_names_the_nearest(qwen):
    with pytest.raises(pgs.BadPlan) as error:
        pgs.experts.rank(qwen, by="router-nrom")
    assert "router-norm" in error.value.hint and "aimer" in error.value.expected


@pytest.mark.parametrize("by", [None, 3, ["aimer"]])
def test_a_metric_is_a_name(qwen, by):
    with pytest.raises(pgs.BadPlan):
        pgs.experts.rank(qwen, by=by)


@pytest.mark.parametrize(
    "by, what",
    [("reap", "stats="), ("ean-sum", "stats="), ("imatrix-msan", "imatrix="), ("frequency", "imatrix=.*stats=")],
)
def test_what_a_metric_needs_is_said(qwen, by, what):
    with pytest.raises(pgs.BadPlan, match=what) as error:
        pgs.experts.rank(qwen, by=by)
    assert error.value.object == by


def test_a_dense_model_has_nothing_to_rank(tmp_path):
    b = moe_models.Builder("llama", blocks=1, experts=0, used=0)
    b.dense(0)
    with pgs.open(b.write(tmp_path / "dense.gguf")) as model, pytest.raises(pgs.BadPlan, match="no experts"):
        pgs.experts.rank(model)


def test_a_block_without_a_router(tmp_path):
    b = moe_models.Builder("x", blocks=1, experts=4, used=1)
    b.add("blk.0.ffn_down_exps.weight", 4, 4, 32)
    with pgs.open(b.write(tmp_path / "x.gguf")) as model, pytest.raises(pgs.BadFile) as error:
        pgs.experts.rank(model)
    assert error.value.object == "blk.0.ffn_gate_inp.weight"


def test_progress_counts_bytes_and_can_stop_the_run(qwen):
    seen = []
    pgs.experts.rank(qwen, by="aimer", progress=lambda done, total: seen.append((done, total)))
    total = sum(t.nbytes for t in qwen.tensors.values() if "_exps.weight" in t.name)
    assert seen[-1] == (total, total) and seen == sorted(seen)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pgs.experts.rank(qwen, by="aimer", progress=stop)


@pytest.mark.parametrize(
    "options",
    [{"threads": 1}, {"threads": 3}, {"memory": "64MiB"}, {"memory": 64 << 20}, {"io": "mmap"}, {"io": "pread"}],
)
def test_scores_do_not_depend_on_how_they_are_read(qwen, options):
    expected = pgs.experts.rank(qwen, by="aimer").scores
    scores = pgs.experts.rank(qwen, by="aimer", **options).scores
    assert all(scores[layer].tobytes() == expected[layer].tobytes() for layer in expected)


@pytest.mark.parametrize("memory", ["much", "12 parsecs", "", "64QiB"])
def test_memory_is_a_size(qwen, memory):
    with pytest.raises(pgs.BadPlan):
        pgs.experts.rank(qwen, memory=memory)


# --- keep -----------------------------------------------------------------------------------------------------------


def ranking(scores, *, groups=0, chunk=1, tables=()):
    scores = {layer: np.array(s, np.float64) for layer, s in scores.items()}
    layout = roles.Layout(tuple(scores), (), len(next(iter(scores.values()))), groups, chunk)
    return Ranking("test", layout, scores=scores, tables=tables)


def test_groups_keep_the_same_number_each():
    r = ranking({0: [9, 8, 7, 6, 1, 2, 3, 4]}, groups=2)
    assert r.keep(2) == {0: (0, 7)}
    assert r.keep(4) == {0: (0, 1, 6, 7)}
    with pytest.raises(pgs.BadPlan) as error:
        r.keep(3)
    assert error.value.expected == "2 or 4"


def test_chunks_stay_or_go_together():
    r = ranking({0: [9, 0, 5, 5, 1, 1, 0, 8]}, chunk=2)  # means 4.5, 5, 1, 4
    assert r.keep(2) == {0: (2, 3)}
    assert r.keep(4) == {0: (0, 1, 2, 3)}
    with pytest.raises(pgs.BadPlan) as error:
        r.keep(5)
    assert error.value.expected == "4 or 6"


def test_groups_and_chunks_come_from_the_model(files):
    for name in ("deepseek2", "grovemoe"):
        with pgs.open(files[name]) as model:
            r = pgs.experts.rank(model)
            with pytest.raises(pgs.BadPlan):
                r.keep(9)
            assert pgs.Plan(model).keep_experts(r.keep(8)).check().blockers == []


@pytest.mark.parametrize("n", [0, -1, 9, True, 2.5, "4", None])
def test_numbers_that_cannot_be_kept(n):
    with pytest.raises(pgs.BadPlan):
        ranking({0: range(8)}).keep(n)


@pytest.mark.parametrize("ratio, n", [(1, 8), (0.5, 4), (0.3, 2), (0.32, 3), (0.01, 1), (1.0, 8)])
def test_ratio_is_rounded_to_the_nearest(ratio, n):
    assert len(ranking({0: range(8)}).keep(ratio=ratio)[0]) == n


def test_ratio_respects_groups():
    r = ranking({0: range(8)}, groups=4)
    assert [len(r.keep(ratio=x)[0]) for x in (0.01, 0.5, 0.6, 0.65, 1)] == [4, 4, 4, 4, 8]


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, math.nan, "half", True])
def test_ratios_that_are_no_share(ratio):
    with pytest.raises(pgs.BadPlan):
        ranking({0: range(8)}).keep(ratio=ratio)


def test_number_and_ratio_exclude_each_other():
    with pytest.raises(pgs.BadPlan):
        ranking({0: range(8)}).keep(4, ratio=0.5)


@given(st.lists(st.sampled_from([-1.5, 0.0, -0.0, 0.25, 3.0]), min_size=1, max_size=20), st.data())
def test_keep_is_the_head_of_a_stable_sort(scores, data):
    n = data.draw(st.integers(1, len(scores)))
    expected = sorted(sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:n])
    assert ranking({3: scores}).keep(n) == {3: tuple(expected)}


@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_each_group_is_a_ranking_of_its_own(groups, size, data):
    scores = data.draw(st.lists(st.integers(-3, 3), min_size=groups * size, max_size=groups * size))
    per_group = data.draw(st.integers(1, size))
    kept = ranking({0: scores}, groups=groups).keep(per_group * groups)[0]
    for g in range(groups):
        part = ranking({0: scores[g * size : (g + 1) * size]}).keep(per_group)[0]
        assert [e for e in kept if e // size == g] == [e + g * size for e in part]


def test_order_is_given_where_ids_are_values(files):
    with pgs.open(files["deepseek4"]) as model:
        r = pgs.experts.rank(model)
        keep = r.keep(6)
    assert list(keep.order) == [0] and sorted(keep.order[0]) == list(keep[0])
    best_first = [r.scores[0][e] for e in keep.order[0]]
    assert best_first == sorted(best_first, reverse=True)


def test_keep_pickles():
    keep = ranking({0: [1, 2, 3]}, tables=(0,)).keep(2)
    again = pickle.loads(pickle.dumps(keep))
    assert (again, again.metric, again.order) == ({0: (1, 2)}, "test", {0: (2, 1)})


# --- rankings of the user -------------------------------------------------------------------------------------------


def test_scores_in_a_dict(qwen):
    up, down = list(range(16)), list(range(16, 0, -1))
    r = pgs.experts.rank(qwen, by={"scores": {"0": up, 1: np.array(down)}})
    assert r.metric == "dict" and r.keep(2) == {0: (14, 15), 1: (0, 1)}


def test_named_experts_in_a_file(qwen, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"kept": {"0": [5, 2, 9, 11], "1": [0, 1, 2, 3]}, "metric": "coding"}))
    for by in (path, str(path)):
        r = pgs.experts.rank(qwen, by=by)
        assert r.keep() == r.keep(4) == {0: (2, 5, 9, 11), 1: (0, 1, 2, 3)}
        assert r.keep().metric == "coding" and r.scores == {}
    with pytest.raises(pgs.BadPlan, match="named already"):
        r.keep(5)
    with pytest.raises(pgs.BadPlan, match="named already"):
        r.keep(ratio=0.5)


def test_a_file_without_a_metric_is_called_file(qwen, tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({"scores": {"0": [0] * 16, "1": [0] * 16}}))
    assert pgs.experts.rank(qwen, by=path).metric == "file"


@pytest.mark.parametrize("by", ["router-norm", "aimer", {"kept": {0: [3, 1], 1: [4, 5]}}])
def test_a_ranking_survives_its_json(qwen, tmp_path, by):
    r = pgs.experts.rank(qwen, by=by)
    path = tmp_path / "ranking.json"
    path.write_text(r.to_json())
    again = pgs.experts.rank(qwen, by=path)
    assert again.to_json() == r.to_json() and again.metric == r.metric
    assert again.keep(2) == r.keep(2)
    assert {k: v.tolist() for k, v in again.scores.items()} == {k: v.tolist() for k, v in r.scores.items()}


S = [0.0] * 16


@pytest.mark.parametrize(
    "data, object",
    [
        ({}, None),
        ({"kept": {}, "scores": {}}, "kept"),
        ({"kept": {}, "extra": 1}, None),
        ([], None),
        ({"scores": {}}, "scores"),
        ({"scores": []}, "scores"),
        ({"scores": {"0": S}}, "scores"),
        ({"scores": {"0": S, "1": S, "2": S}}, "scores"),
        ({"scores": {"0": S, "01": S}}, "scores"),
        ({"scores": {"0": S, "x": S}}, "scores"),
        ({"scores": {"0": S, "-1": S}}, "scores"),
        ({"scores": {"0": S, "1": S[:15]}}, "scores.1"),
        ({"scores": {"0": S, "1": [*S[:15], "a"]}}, "scores.1"),
        ({"scores": {"0": S, "1": [*S[:15], None]}}, "scores.1"),
        ({"scores": {"0": S, "1": [*S[:15], True]}}, "scores.1"),
        ({"scores": {"0": S, "1": [*S[:15], 10**400]}}, "scores.1"),
        ({"scores": {"0": S, "1": "abc"}}, "scores.1"),
        ({"scores": {"0": S, "1": 3}}, "scores.1"),
        ({"scores": {"0": S, "1": S}, "metric": 3}, "metric"),
        ({"kept": {"0": [16], "1": [0]}}, "kept.0"),
        ({"kept": {"0": [-1], "1": [0]}}, "kept.0"),
        ({"kept": {"0": [1, 1], "1": [0]}}, "kept.0"),
        ({"kept": {"0": [1.0], "1": [0]}}, "kept.0"),
        ({"kept": {"0": [True], "1": [0]}}, "kept.0"),
        ({"kept": {"0": ["1"], "1": [0]}}, "kept.0"),
    ],
)
def test_anything_else_is_refused_precisely(qwen, tmp_path, data, object):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(data))
    with pytest.raises(pgs.BadPlan) as error:
        pgs.experts.rank(qwen, by=path)
    assert error.value.path == str(path) and error.value.object == object


@pytest.mark.parametrize(
    "text, object",
    [
        ("", None),
        ("{", None),
        ('{"kept": {"0": [1], "0": [2]}}', "0"),
        ('{"scores": {"0": [NaN]}}', None),
        ("[" * 100000, None),
        (b"\xff\xfe", None),
        ('{"kept": {"0": [' + "9" * 5000 + "]}}", None),
    ],
)
def test_files_that_are_no_json(qwen, tmp_path, text, object):
    path = tmp_path / "bad.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(pgs.BadPlan) as error:
        pgs.experts.rank(qwen, by=path)
    assert error.value.path == str(path) and error.value.object == object


def test_scores_that_are_not_finite(qwen):
    with pytest.raises(pgs.BadPlan, match="not finite"):
        pgs.experts.rank(qwen, by={"scores": {"0": S, "1": [*S[:15], math.nan]}})


@pytest.mark.parametrize("by", ["missing.json", "folder/missing"])
def test_a_missing_file_is_an_os_error(qwen, tmp_path, by):
    with pytest.raises(FileNotFoundError):
        pgs.experts.rank(qwen, by=str(tmp_path / by))


def test_the_mtp_block_may_be_left_out(tmp_path):
    with pgs.open(moe_models.qwen3next(tmp_path / "mtp.gguf", mtp=True)) as model:
        by = {"kept": {i: range(8) for i in range(4)}}
        keep = pgs.experts.rank(model, by=by).keep()
        plan = pgs.Plan(model)
        assert [error.object for error in plan.keep_experts(keep).check().blockers] == ["blk.4"]
        assert plan.keep_experts(keep, mtp="drop").check().blockers == []
