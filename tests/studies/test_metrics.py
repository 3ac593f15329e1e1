"""Scores from statistics and importance matrices, and what a choice says of itself."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pygguf_surgery as pgs
from pygguf_surgery.architecture.experts import Layout
from pygguf_surgery.cli import main, options
from pygguf_surgery.files import stats as stats_file
from pygguf_surgery.plan_data.choices import Seen
from pygguf_surgery.studies import metrics
from pygguf_surgery.studies.ranking import Ranking
from support import moe_models
from support.expert_stats import stats_for
from support.imatrices import imatrix_of
from support.places import ROOT


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    with pgs.open(moe_models.qwen3moe(tmp_path_factory.mktemp("m") / "qwen3moe.gguf")) as model:
        yield model


@pytest.mark.parametrize(
    "by, formula",
    [
        ("reap", lambda s, i: s.gated_norm_sum[i] / s.count[i]),
        ("reap-sum", lambda s, i: s.gated_norm_sum[i]),
        ("ean-sum", lambda s, i: s.norm_sum[i]),
        ("ean-mean", lambda s, i: s.norm_sum[i] / s.count[i]),
        ("msan", lambda s, i: s.norm_sq_sum[i] / s.count[i]),
        ("weighted-frequency", lambda s, i: s.gate_sum[i]),
        ("frequency", lambda s, i: s.count[i]),
    ],
)
def test_scores_from_statistics(qwen, tmp_path, by, formula):
    stats = stats_for(qwen, unseen=[3])
    stats.write(tmp_path / "stats.gguf")
    ranking = pgs.experts.rank(qwen, by, stats=tmp_path / "stats.gguf")
    assert ranking.metric == by and list(ranking.scores) == [0, 1]
    for layer, scores in ranking.scores.items():
        s = stats.layers[layer]
        assert scores[3] == 0 and [scores[i] for i in range(16) if i != 3] == [
            formula(s, i) for i in range(16) if i != 3
        ]
    assert ranking.seen.unseen == {0: (3,), 1: (3,)}


def test_imatrix_msan_is_the_sum_over_columns(qwen, tmp_path):
    rng = np.random.default_rng(0)
    sums, counts = rng.random((16, 32)) * 100, rng.integers(1, 50, 16).astype(float)
    counts[5], sums[5] = 0, 0
    path = imatrix_of(tmp_path / "i.gguf", qwen, {f"blk.{i}.ffn_down_exps.weight": (sums, counts) for i in range(2)})
    by_msan = pgs.experts.rank(qwen, "imatrix-msan", imatrix=path)
    assert by_msan.seen.unseen == {0: (5,), 1: (5,)} and "1, kept 0" in by_msan.keep(8).summary()
    for layer in range(2):
        down = qwen.tensors[f"blk.{layer}.ffn_down_exps.weight"].dequantize().astype(np.float64)
        mean = (sums.astype(np.float32) / np.maximum(counts, 1).astype(np.float32)[:, None]).astype(np.float64)
        expected = ((down**2).sum(axis=1) * mean).sum(axis=1)
        expected[5] = 0
        np.testing.assert_allclose(by_msan.scores[layer], expected, rtol=1e-12)
    with pgs.imatrix.open(path) as opened:
        assert pgs.experts.rank(qwen, "frequency", imatrix=opened).scores[1].tolist() == counts.tolist()
        assert opened.entries  # rank did not close what it did not open


def test_scales_of_the_down_projection_count(tmp_path):
    with pgs.open(moe_models.nvfp4_scales(tmp_path / "m.gguf")) as model:
        path = imatrix_of(tmp_path / "i.gguf", model, {"blk.0.ffn_down_exps.weight": (np.ones((16, 32)), np.ones(16))})
        scores = pgs.experts.rank(model, "imatrix-msan", imatrix=path).scores[0]
        down = model.tensors["blk.0.ffn_down_exps.weight"].dequantize().astype(np.float64)
        scale = model.tensors["blk.0.ffn_down_exps.scale"].dequantize().astype(np.float64)
    np.testing.assert_allclose(scores, (down**2).sum(axis=(1, 2)) * scale**2, rtol=1e-12)


@pytest.mark.parametrize(
    "change, object",
    [
        (dict(architecture="qwen2moe"), "architecture"),
        (dict(experts=8), "experts"),
        (dict(layers={}), "layers"),
        (dict(texts=[stats_file.Text("00", 100, 5, 4)]), "stats"),
    ],
)
def test_statistics_of_another_model_are_refused(qwen, change, object):
    stats = stats_for(qwen)
    vars(stats).update(change)
    with pytest.raises(pgs.BadPlan) as error:
        pgs.experts.rank(qwen, "reap", stats=stats)
    assert error.value.object == object


def test_statistics_of_a_quantized_twin_are_taken_with_a_note(qwen):
    stats = stats_for(qwen)
    stats.header_sha256 = "11" * 32
    assert "another file" in pgs.experts.rank(qwen, "reap", stats=stats).keep(8).summary()


@pytest.mark.parametrize(
    "entries, match",
    [
        ({"blk.0.ffn_down_exps.weight": (np.ones((16, 32)), np.ones(16))}, "nothing is known"),
        ({f"blk.{i}.ffn_down_exps.weight": (np.ones((8, 32)), np.ones(8)) for i in range(2)}, "another model"),
        ({f"blk.{i}.ffn_down_exps.weight": (np.ones((16, 16)), np.ones(16)) for i in range(2)}, "another size"),
    ],
)
def test_an_importance_matrix_that_does_not_fit(qwen, tmp_path, entries, match):
    with pytest.raises(pgs.BadPlan, match=match):
        pgs.experts.rank(qwen, "imatrix-msan", imatrix=imatrix_of(tmp_path / "i.gguf", qwen, entries))


def test_the_old_format_has_no_counts(qwen, tmp_path):
    path = imatrix_of(
        tmp_path / "i.gguf", qwen, {f"blk.{i}.ffn_down_exps.weight": (np.ones((16, 32)), np.ones(16)) for i in range(2)}
    )
    pgs.imatrix.convert(path, tmp_path / "i.dat")
    with pytest.raises(pgs.Unsupported, match="lost the counts"):
        pgs.experts.rank(qwen, "frequency", imatrix=tmp_path / "i.dat")


def test_mtp_blocks_are_scored_by_aimer(tmp_path):
    with pgs.open(moe_models.qwen3next(tmp_path / "mtp.gguf", mtp=True)) as model:
        stats = stats_for(model)
        assert list(stats.layers) == [0, 1, 2, 3]
        ranking = pgs.experts.rank(model, "reap", stats=stats)
        np.testing.assert_array_equal(ranking.scores[4], pgs.experts.rank(model, "aimer").scores[4])
        assert "blk.4 (MTP): by aimer" in ranking.keep(8).summary()
        dropped = pgs.experts.rank(model, "reap", stats=stats, mtp="drop").keep(8)
        assert list(dropped) == [0, 1, 2, 3] and "aimer" not in dropped.summary()
        assert not pgs.Plan(model).keep_experts(dropped, mtp="drop").check().blockers


@pytest.mark.parametrize("by", ["router-norm", {"kept": {layer: [0, 1, 2, 3] for layer in range(4)}}])
def test_a_choice_carries_what_becomes_of_mtp_layers(tmp_path, by):
    with pgs.open(moe_models.qwen3next(tmp_path / "mtp.gguf", mtp=True)) as model:
        keep = pgs.experts.rank(model, by, mtp="drop").keep(4)
        plan = pgs.Plan(model).keep_experts(keep)
        assert keep.mtp == "drop" and plan == pgs.Plan(model).keep_experts(keep, mtp="drop")
        assert not plan.check().blockers and not any(t.name.startswith("blk.4.") for t in plan.check().tensors)
        assert "no experts named" in str(pgs.Plan(model).keep_experts(keep, mtp="keep").check().blockers[0])
        assert pgs.Plan(model).keep_experts(dict(keep)) == pgs.Plan(model).keep_experts(dict(keep), mtp="keep")
        groups = pgs.experts.group(model, 12, weights_only=True, mtp="drop")
        assert not pgs.Plan(model).merge_experts(groups).check().blockers and groups.mtp == "drop"
        for bad in (lambda: pgs.experts.rank(model, mtp="cut"), lambda: pgs.Plan(model).keep_experts(keep, mtp=False)):
            with pytest.raises(pgs.BadPlan, match=r'mtp: unknown choice .*expected "keep" or "drop"'):
                bad()


# --- the registry ----------------------------------------------------------------------------------------------------


def test_the_readme_lists_the_metrics_of_the_registry():
    """In its order, with what each needs."""
    rows = re.findall(
        r"^\| (`.*?`) \| (.*?) \| (.*) \|$", (ROOT / "README.md").read_text().split("| `--by` |")[1], re.MULTILINE
    )
    found = {name: (needs, score) for names, needs, score in rows for name in re.findall("`(.*?)`", names)}
    assert list(found) == list(metrics.METRICS) == list(pgs.experts.METRICS)
    for name, metric in metrics.METRICS.items():
        needs, score = found[name]
        assert {word.strip("`-") for word in re.split(" or |, ", needs)} == {
            *metric.needs,
            *["repair"] * metric.repaired,
        }
        assert metric.paper is None or metric.paper in score


def test_the_help_and_the_errors_list_the_metrics_of_the_registry(qwen, capsys):
    help = options.BY["--by"]["help"]()
    assert main(["prune", "--help"]) == 0
    assert "".join(help.split()) in "".join(capsys.readouterr().out.split())
    with pytest.raises(pgs.BadPlan) as error:
        pgs.experts.rank(qwen, "nonsense")
    assert error.value.expected == f"{', '.join(metrics.METRICS)}, or a JSON file"
    assert set(re.findall(r"[a-z]+(?:-[a-z]+)*", help)) >= set(metrics.METRICS)
    assert "; frequency or imatrix-msan with --imatrix;" in help and "; best with --stats and --repair;" in help


def test_a_metric_is_named_once(qwen):
    """A toy one: rank takes it, and the plan keeps its name."""
    toy = metrics.Metric(
        "toy",
        ("weights",),
        "nothing",
        "its number",
        lambda given, layers: {i: np.arange(given.reduce.layout.experts, dtype=float) for i in layers},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(metrics.METRICS, "toy", toy)
        assert pgs.experts.rank(qwen, "toy").keep(2) == {0: (14, 15), 1: (14, 15)}
        assert not toy.takes_long and metrics.METRICS["aimer"].takes_long and metrics.names("weights")[-1] == "toy"


# --- the choice ------------------------------------------------------------------------------------------------------


def ranking(scores, *, groups=0, chunk=1, mtp=(), **kwargs):
    layers = tuple(range(len(scores)))
    return Ranking(
        "test",
        Layout(layers, mtp, len(scores[0]), groups, chunk),
        scores={i: np.array(s, np.float64) for i, s in enumerate(scores)},
        **kwargs,
    )


def test_protected_experts_stay():
    r = ranking([[5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5]])
    assert r.keep(3, protect=[5]) == {0: (0, 1, 5), 1: (3, 4, 5)}
    assert r.keep(3, protect={0: [5, 4]}) == {0: (0, 4, 5), 1: (3, 4, 5)}
    assert ranking([[5, 4, 3, 2, 1, 0]], groups=2).keep(4, protect=[2, 5]) == {0: (0, 2, 3, 5)}
    assert ranking([[5, 5, 3, 3, 0, 0]], chunk=2).keep(4, protect=[5]) == {0: (0, 1, 4, 5)}
    for bad, match in (({7: [0]}, "no layer"), ([6], "out of range"), ([0, 1, 2, 3], "4 experts are protected")):
        with pytest.raises(pgs.BadPlan, match=match):
            r.keep(3, protect=bad)
    with pytest.raises(pgs.BadPlan, match="in one group"):
        ranking([[5, 4, 3, 2, 1, 0]], groups=2).keep(4, protect=[0, 1, 2])


def test_super_experts_are_those_with_massive_activations(qwen):
    stats = stats_for(qwen)
    for s in stats.layers.values():
        s.max_activation[:] = 1
        s.gated_norm_sum[7] = 0
    stats.layers[1].max_activation[7] = 500
    assert metrics.super_experts(stats) == {0: (), 1: (7,)}
    r = pgs.experts.rank(qwen, "reap", stats=stats)
    plain = r.keep(4)
    assert 7 not in plain[1] and "dropped in layer 1 in spite of massive activations: 7" in plain.summary()
    assert 7 in r.keep(4, super_experts=True)[1] and 7 not in r.keep(4, super_experts=True)[0]
    with pytest.raises(pgs.BadPlan, match="only calibration"):
        pgs.experts.rank(qwen).keep(4, super_experts=True)


def test_super_experts_stay_in_a_ranking_of_the_user_s_own(qwen):
    stats = stats_for(qwen)
    stats.layers[1].max_activation[7] = 1e6
    scores = {"scores": {layer: [0 if i == 7 else 1 for i in range(16)] for layer in range(2)}}
    keep = pgs.experts.rank(qwen, scores, stats=stats).keep(4, super_experts=True)
    assert 7 in keep[1] and 7 not in keep[0]


def test_groups_are_never_mixed():
    with pytest.raises(pgs.Unsupported, match="2 groups"):
        ranking([[5, 4, 3, 2]], groups=2).keep(2, per_group=False)
    assert ranking([[5, 4, 3, 2]], groups=2).keep(2, per_group=True) == {0: (0, 2)}


def test_mass_and_ties():
    keep = ranking([[4, 1, 1, 1, 1], [-1, 0, 0, 0, 0]]).keep(2)
    assert keep.mass(0) == pytest.approx(5 / 8) and keep.mass(1) is None
    assert keep.ties(0) == 3 and keep.ties(1) == 2
    assert "62.5%" in keep.summary()
    assert "2, kept 1" in ranking([[4, 1, 1, 1, 1]], seen=Seen({0: (1, 4)}, {0: ()})).keep(2).summary()


def test_a_global_budget_keeps_the_largest_shares():
    r = ranking([[10, 1, 1, 0, 0, 0], [2, 2, 2, 2, 2, 2]])
    assert r.keep(3, budget="global") == {0: (0,), 1: (0, 1, 2, 3, 4)}
    assert r.keep(3)._everywhere == {0: 1, 1: 5}
    assert ranking([[10, 1, 1, 0, 0, 0], [2] * 6], used=2).keep(3, budget="global") == {0: (0, 1), 1: (0, 1, 2, 3)}
    with pytest.raises(pgs.Unsupported, match="tie experts together"):
        ranking([[5, 4, 3, 2]], groups=2).keep(2, budget="global")


@given(
    scores=st.lists(st.lists(st.floats(0, 100), min_size=8, max_size=8), min_size=1, max_size=4),
    n=st.integers(1, 8),
    used=st.integers(1, 8),
)
def test_a_global_budget_spends_all_of_it(scores, n, used):
    keep = ranking(scores, used=used).keep(n, budget="global")
    sizes = [len(ids) for ids in keep.values()]
    assert sum(sizes) == n * len(scores) and min(sizes) >= min(used, n) and max(sizes) <= 8


def test_a_decision_comes_back(qwen, tmp_path):
    keep = pgs.experts.rank(qwen, "reap", stats=stats_for(qwen)).keep(5)
    (tmp_path / "decision.json").write_text(keep.to_json())
    again = pgs.experts.rank(qwen, tmp_path / "decision.json").keep()
    assert (
        again == keep
        and again.metric == "reap"
        and again.summary().splitlines()[2].split()[:3] == ["0", "5/16", f"{100 * keep.mass(0):.1f}%"]
    )
    assert json.loads(again.to_json()) == json.loads(keep.to_json())
    with pytest.raises(pgs.BadPlan, match="named already"):
        pgs.experts.rank(qwen, tmp_path / "decision.json").keep(5, protect=[1])
