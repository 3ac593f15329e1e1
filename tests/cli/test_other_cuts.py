"""What belongs to another cut of a model with the same shapes is refused, what belongs to the same in other types is
taken: statistics, repairs, importance matrices and rankings."""

import json
import warnings

import numpy as np
import pytest

import pygguf_surgery as pgs
from pygguf_surgery import BadPlan, SurgeryWarning, Value
from pygguf_surgery.cli import main
from pygguf_surgery.files.gguf import write_gguf
from pygguf_surgery.files.subjects import subject_of, write_subject
from support import moe_models
from support.expert_stats import stats_for

A = {0: (0, 2, 4, 6, 8, 10, 12, 14), 1: (1, 3, 5, 7, 9, 11, 13, 15)}
B = {0: A[0], 1: (0, 2, 4, 6, 8, 10, 12, 14)}
KEPT = {0: (0, 1, 2, 3), 1: (2, 3, 4, 5)}  # of eight
NAMES = [f"blk.{layer}.ffn_{part}_exps.weight" for layer in (0, 1) for part in ("gate", "up", "down")]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """uncut; a and b, two cuts of one shape; twin, a in another type; merged, of groups around the experts of a; old,
    a as an older version wrote it; cut twice, from a."""
    folder = tmp_path_factory.mktemp("cuts")
    found = {name: folder / f"{name}.gguf" for name in ("uncut", "a", "b", "twin", "merged", "old", "twice")}
    moe_models.qwen3moe(found["uncut"], type="F32")
    with pgs.open(found["uncut"]) as model:
        pgs.Plan(model).keep_experts(A).write(found["a"])
        pgs.Plan(model).keep_experts(B).write(found["b"])
        order = np.arange(moe_models.FF, dtype="<u2").tobytes()
        groups = {
            layer: tuple(
                pgs.plan.Group((e, other), (0.5, 0.5), (b"", order))
                for e, other in zip(ids, sorted(set(range(16)) - set(ids)), strict=True)
            )
            for layer, ids in A.items()
        }
        pgs.Plan(model).merge_experts(groups).write(found["merged"])
    with pgs.open(found["a"]) as model:
        pgs.Plan(model).quantize("Q8_0").write(found["twin"])
        pgs.Plan(model).remove_metadata("pgs.source.experts").write(found["old"])
        pgs.Plan(model).keep_experts(KEPT).write(found["twice"])
    return found


@pytest.fixture
def models(paths):
    opened = {name: pgs.open(path) for name, path in paths.items()}
    yield opened
    for model in opened.values():
        model.close()


def refused(match="another cut"):
    return pytest.raises(BadPlan, match=match)


# --- statistics -------------------------------------------------------------------------------------------------------


def stats_of(path, model, *, older=False):
    stats = stats_for(model)
    stats.of = None if older else subject_of(model)
    stats.write(path)
    return path


@pytest.mark.parametrize(
    "of, other, fine", [("a", "b", 0), ("a", "merged", 0), ("merged", "a", 0), ("a", "twin", 1), ("twin", "a", 1)]
)
def test_statistics(models, tmp_path, of, other, fine):
    path = stats_of(tmp_path / "s.gguf", models[of])
    assert pgs.experts.open_stats(path).of == subject_of(models[of])
    pgs.experts.rank(models[of], "reap", stats=path)
    if fine:
        assert "another file" in pgs.experts.rank(models[other], "reap", stats=path).keep(4).summary()
        return
    with refused("another (cut|merge)") as error:
        pgs.experts.rank(models[other], "reap", stats=path)
    assert error.value.path == str(path) and error.value.object.startswith("blk.")


def test_statistics_of_another_cut_group_nothing(models, tmp_path):
    stats = stats_for(models["a"])
    stats.of = subject_of(models["a"])
    for layer in stats.layers.values():
        layer.gated_sum = np.ones((8, 32))
    pytest.importorskip("scipy")
    with refused():
        pgs.experts.group(models["b"], 4, stats=stats)


def test_older_statistics_are_taken_with_a_warning_where_it_matters(models, paths, tmp_path, capsys):
    path = stats_of(tmp_path / "s.gguf", models["a"], older=True)
    assert pgs.experts.open_stats(path).of is None
    pgs.experts.rank(models["a"], "reap", stats=path)  # the header says it
    with pytest.warns(SurgeryWarning, match="older version"):
        pgs.experts.rank(models["b"], "reap", stats=path)
    uncut = stats_of(tmp_path / "u.gguf", models["uncut"], older=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pgs.experts.rank(models["uncut"], "reap", stats=uncut)
    assert main(["plan", str(paths["b"]), "--keep", "4", "--by", "reap", "--stats", str(path)]) == 0
    assert capsys.readouterr().err.count(f"warning: {path}: an older version") == 1


def test_merging_names_the_file_that_does_not_belong(models, tmp_path, capsys):
    a, b = stats_of(tmp_path / "a.gguf", models["a"]), stats_of(tmp_path / "b.gguf", models["b"])
    assert main(["stats", "merge", str(tmp_path / "out.gguf"), str(a), str(b)]) == 4
    assert str(b) in capsys.readouterr().err and not (tmp_path / "out.gguf").exists()
    stats = pgs.experts.open_stats(a)
    again = pgs.experts.open_stats(stats_of(tmp_path / "again.gguf", models["a"], older=True))
    again.texts = [pgs.files.stats.Text("11", 100, 5, 5)]
    assert stats.merge(again).of == again.merge(stats).of == stats.of


# --- repairs ----------------------------------------------------------------------------------------------------------


def repair_of(path, model, kept=KEPT, *, older=False):
    rng = np.random.default_rng(0)
    keys = {
        "general.type": Value("expert_repair", "str"),
        "pgs.repair.format": Value(1, "u32"),
        "pgs.repair.metric": Value("best", "str"),
        "pgs.repair.layers": Value(list(kept), "u32[]"),
        **{f"pgs.repair.{layer}.kept": Value(list(ids), "u32[]") for layer, ids in kept.items()},
        **write_subject(subject_of(model), "pgs.repair.model."),
    }
    if older:
        keys = {
            key: value for key, value in keys.items() if ".model." not in key or key.endswith(".model.header_sha256")
        }
    tensors = {
        f"blk.{i}.ffn_down_exps.weight": rng.standard_normal((len(ids), 32, 32), np.float32) for i, ids in kept.items()
    }
    write_gguf(path, keys, tensors)
    return path


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize(
    "of, other, fine", [("a", "b", 0), ("a", "merged", 0), ("merged", "a", 0), ("uncut", "a", 0), ("a", "twin", 1)]
)
def test_repairs(models, paths, tmp_path, capsys, of, other, fine, older):
    path = repair_of(tmp_path / "r.gguf", models[of], older=older)
    assert not pgs.Plan(models[of]).keep_experts(KEPT, repair=path).check().blockers
    checked = pgs.Plan(models[other]).keep_experts(KEPT, repair=path).check()
    if fine and not older:
        assert not checked.blockers and "another file (Tiny qwen3moe)" in " ".join(checked.warnings)
        assert main(["plan", str(paths[other]), "--repair", str(path)]) == 0
        return
    assert len(checked.blockers) == 1 and "the repair is of another" in str(checked.blockers[0])
    out = tmp_path / "out.gguf"
    capsys.readouterr()
    assert main(["prune", str(paths[other]), str(out), "--repair", str(path)]) == 4 and not out.exists()
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 1 and "error:" in shown[0] and str(path) in shown[0]


def test_an_older_repair_of_another_file_goes_with_an_uncut_model(models, tmp_path):
    with pgs.open(models["uncut"].path) as model:
        pgs.Plan(model).set_metadata({"general.name": "renamed"}).write(tmp_path / "renamed.gguf")
        path = repair_of(tmp_path / "r.gguf", model, older=True)
    with pgs.open(tmp_path / "renamed.gguf") as model:
        checked = pgs.Plan(model).keep_experts(KEPT, repair=path).check()
    assert not checked.blockers and "does not say" in " ".join(checked.warnings)


def test_a_repair_of_the_wrong_cut_is_one_line_whatever_else_is_asked(models, paths, tmp_path, capsys):
    path = repair_of(tmp_path / "r.gguf", models["uncut"], {0: (8, 9, 10, 15), 1: (8, 9, 10, 15)})
    assert main(["prune", str(paths["a"]), str(tmp_path / "out.gguf"), "--repair", str(path), "--keep", "4"]) == 4
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


# --- importance matrices ----------------------------------------------------------------------------------------------


def values(experts, seed=0):
    rng = np.random.default_rng(seed)
    return {name: (rng.random((experts, 32)).astype(np.float32) + 1, rng.integers(1, 99, experts)) for name in NAMES}


@pytest.fixture
def whole(tmp_path):
    """As llama-imatrix makes it of the uncut model: it does not say what it is of."""
    pgs.imatrix.write(tmp_path / "whole.gguf", values(16))
    return tmp_path / "whole.gguf"


def slice_by(path, out, by):
    assert main(["imatrix", "slice", str(path), str(out), "--by", str(by), "--force"]) == 0
    return out


def rows(path, name=NAMES[0]):
    with pgs.imatrix.open(path) as imatrix:
        return imatrix.sums(name).reshape(-1, 32)


@pytest.mark.parametrize("other, fine", [("b", 0), ("merged", 0), ("twin", 1)])
def test_importance_matrices(models, paths, tmp_path, whole, capsys, other, fine):
    path = slice_by(whole, tmp_path / "i.gguf", paths["a"])
    with pgs.imatrix.open(path) as imatrix:
        assert imatrix.of == subject_of(models["a"])
    for name in ("a", other):
        plan = pgs.Plan(models[name]).quantize("Q4_0", imatrix=path, allow_requantize=True)
        if name == "a" or fine:
            assert not plan.check().blockers
            pgs.experts.rank(models[name], "frequency", imatrix=path)
            continue
        blockers = plan.check().blockers
        assert len(blockers) == 1 and "importance matrix is of another" in str(blockers[0])
        for by in ("frequency", "imatrix-msan"):
            with refused("another (cut|merge)") as error:
                pgs.experts.rank(models[name], by, imatrix=path)
            assert error.value.path == str(path)


def test_an_importance_matrix_may_be_that_of_the_result(models, paths, tmp_path, whole):
    path = slice_by(whole, tmp_path / "i.gguf", paths["a"])

    def blockers(kept):
        return pgs.Plan(models["uncut"]).keep_experts(kept).quantize("Q4_0", imatrix=path).check().blockers

    assert not blockers(A) and "of another cut" in str(blockers(B)[0])


def test_an_importance_matrix_of_nobody_knows_what_is_taken_with_a_note(models, tmp_path):
    pgs.imatrix.write(tmp_path / "i.gguf", values(8))
    checked = pgs.Plan(models["a"]).quantize("Q4_0", imatrix=tmp_path / "i.gguf").check()
    assert not checked.blockers and "does not say of which cut" in " ".join(checked.notes)
    assert "does not say" in pgs.experts.rank(models["a"], "frequency", imatrix=tmp_path / "i.gguf").keep(4).summary()
    pgs.imatrix.write(tmp_path / "w.gguf", values(16))
    checked = pgs.Plan(models["uncut"]).quantize("Q4_0", imatrix=tmp_path / "w.gguf").check()
    assert not checked.blockers and "does not say" not in " ".join(checked.notes)


def test_merging_and_converting_keep_what_it_is_of(models, paths, tmp_path, whole):
    a, b = (slice_by(whole, tmp_path / f"{name}.gguf", paths[name]) for name in "ab")
    out = tmp_path / "out.gguf"
    with refused() as error:
        pgs.imatrix.merge([a, b], out)
    assert error.value.path == str(b) and not out.exists()
    pgs.imatrix.merge([a, slice_by(whole, tmp_path / "t.gguf", paths["twin"])], out)
    pgs.imatrix.convert(out, tmp_path / "again.gguf")
    for path in (out, tmp_path / "again.gguf"):
        with pgs.imatrix.open(path) as imatrix:
            assert imatrix.of == subject_of(models["a"])
    pgs.imatrix.write(tmp_path / "unknown.gguf", values(8))
    with pytest.warns(SurgeryWarning, match="unknown.gguf: does not say"):
        pgs.imatrix.merge([a, tmp_path / "unknown.gguf"], out, overwrite=True)
    with pgs.imatrix.open(out) as imatrix:
        assert imatrix.of is not None
    with pytest.warns(SurgeryWarning, match="older format"):
        pgs.imatrix.convert(a, tmp_path / "a.dat")


def test_a_plain_file_has_no_other_keys(tmp_path):
    pgs.imatrix.write(tmp_path / "w.gguf", values(16))
    assert not [key for key in pgs.files.gguf.read_gguf(tmp_path / "w.gguf")[0] if key.startswith("pgs.")]


# --- slicing by a later cut -------------------------------------------------------------------------------------------


def report_of(path, model, kept):
    path.write_text(pgs.experts.rank(model, by={"kept": kept}).keep().to_json())
    return path


def test_a_second_cut_finds_its_experts_in_the_first_importance_matrix(models, paths, tmp_path, whole):
    """By the model or by the report of the cut, in that of any model of the chain."""
    of_a = slice_by(whole, tmp_path / "ia.gguf", paths["a"])
    report = report_of(tmp_path / "b.json", models["a"], KEPT)
    expected = rows(whole)[[A[0][i] for i in KEPT[0]]]
    unknown = tmp_path / "unknown.gguf"  # llama-imatrix on the file that was cut once
    pgs.imatrix.write(unknown, values(8, seed=1))
    for by in (paths["twice"], report):
        for source in (whole, of_a):
            np.testing.assert_array_equal(rows(slice_by(source, tmp_path / "o.gguf", by)), expected)
            with pgs.imatrix.open(tmp_path / "o.gguf") as imatrix:
                assert imatrix.of.fault(subject_of(models["twice"])) is None
                assert imatrix.of.fault(subject_of(models["b"])) is not None
        np.testing.assert_array_equal(rows(slice_by(unknown, tmp_path / "o.gguf", by)), rows(unknown)[list(KEPT[0])])


def test_dropped_layers_are_told_from_the_layers_of_the_importance_matrix(paths, tmp_path, whole):
    with pgs.open(paths["uncut"]) as model:
        pgs.Plan(model).prune_layers([0]).write(tmp_path / "one.gguf")
    with pgs.open(tmp_path / "one.gguf") as model:
        pgs.Plan(model).keep_experts({0: A[1]}).write(tmp_path / "cut.gguf")
    unknown = tmp_path / "unknown.gguf"
    pgs.imatrix.write(unknown, {name: x for name, x in values(16).items() if "blk.0" in name})
    path = slice_by(unknown, tmp_path / "o.gguf", tmp_path / "cut.gguf")
    np.testing.assert_array_equal(rows(path), rows(unknown)[list(A[1])])
    with pgs.open(tmp_path / "cut.gguf") as model, pgs.imatrix.open(path) as imatrix:
        assert not pgs.Plan(model).quantize("Q4_0", imatrix=path).check().blockers
        assert imatrix.of == subject_of(model)
    with pgs.open(paths["uncut"]) as model:  # comes to the same, but an entry has the name of the layer before
        plan = pgs.Plan(model).prune_layers([0]).keep_experts({0: A[1]}).quantize("Q4_0", imatrix=path)
        assert "other layers" in str(plan.check().blockers[0])
    out = tmp_path / "no.gguf"
    assert main(["imatrix", "slice", str(whole), str(out), "--by", str(tmp_path / "cut.gguf")]) == 4


def test_slicing_what_lacks_the_experts_or_is_of_another_number_is_refused(models, paths, tmp_path, whole, capsys):
    of_b = slice_by(whole, tmp_path / "ib.gguf", paths["b"])
    pgs.imatrix.write(tmp_path / "twelve.gguf", values(12))
    report = report_of(tmp_path / "r.json", models["a"], KEPT)
    out = tmp_path / "out.gguf"
    for by in (paths["twice"], report):
        for source, words in ((of_b, "not among its experts"), (tmp_path / "twelve.gguf", "another number of experts")):
            assert main(["imatrix", "slice", str(source), str(out), "--by", str(by)]) == 4 and not out.exists()
            shown = capsys.readouterr().err
            assert words in shown and str(source) in shown and len(shown.strip().splitlines()) == 1
    assert main(["imatrix", "slice", str(whole), str(out), "--by", str(paths["merged"])]) == 4
    assert "merged" in capsys.readouterr().err


def test_a_keep_is_found_like_its_report(models, tmp_path, whole):
    keep = pgs.experts.rank(models["a"], by={"kept": KEPT}).keep()
    pgs.imatrix.slice(whole, tmp_path / "o.gguf", keep)
    np.testing.assert_array_equal(rows(tmp_path / "o.gguf"), rows(whole)[[A[0][i] for i in KEPT[0]]])


def test_plain_lists_are_in_the_numbers_of_the_importance_matrix(models, paths, tmp_path, whole):
    (tmp_path / "a.json").write_text(json.dumps({"kept": A}))
    (tmp_path / "then.json").write_text(json.dumps({"kept": KEPT}))
    one = slice_by(whole, tmp_path / "1.gguf", tmp_path / "a.json")
    two = slice_by(one, tmp_path / "2.gguf", tmp_path / "then.json")
    np.testing.assert_array_equal(rows(two), rows(whole)[[A[0][i] for i in KEPT[0]]])
    for path, name, other in ((one, "a", "b"), (two, "twice", None)):  # it can be told whose cut that was
        assert not pgs.Plan(models[name]).quantize("Q4_0", imatrix=path).check().blockers
        if other is not None:
            assert "another cut" in str(pgs.Plan(models[other]).quantize("Q4_0", imatrix=path).check().blockers[0])
    pgs.imatrix.write(tmp_path / "u.gguf", values(8))  # of the file cut once: its numbers are not those of the first
    other = slice_by(tmp_path / "u.gguf", tmp_path / "o.gguf", tmp_path / "then.json")
    assert not pgs.Plan(models["twice"]).quantize("Q4_0", imatrix=other).check().blockers


def test_a_file_of_an_older_version_counts_as_cut_from_what_the_importance_matrix_is_of(paths, tmp_path, whole):
    with pytest.warns(SurgeryWarning, match="older version"):
        pgs.imatrix.slice(whole, tmp_path / "o.gguf", read(paths["old"]))
    np.testing.assert_array_equal(rows(tmp_path / "o.gguf"), rows(whole)[list(A[0])])


def read(path):
    from pygguf_surgery.cli.commands.imatrix import read_kept

    return read_kept(str(path))


@pytest.mark.parametrize(
    "model", [5, {}, {"experts": -1}, {"experts": 8, "origin": {"kept": {"0": [1, 0]}}}, {"experts": 4}]
)
def test_a_report_with_nonsense_for_its_model(tmp_path, whole, model):
    (tmp_path / "r.json").write_text(json.dumps({"kept": {"0": [0, 5], "1": [0, 5]}, "model": model}))
    with pytest.raises(BadPlan) as error:
        read(tmp_path / "r.json")
    assert error.value.path == str(tmp_path / "r.json")


# --- rankings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ranking", "keep"])
@pytest.mark.parametrize("other, fine", [("b", 0), ("merged", 0), ("twin", 1)])
def test_rankings(models, paths, tmp_path, capsys, other, fine, form):
    ranking = pgs.experts.rank(models["a"])
    path = tmp_path / "r.json"
    path.write_text(ranking.to_json() if form == "ranking" else ranking.keep(4).to_json())
    data = json.loads(path.read_text())
    assert data["model"] == subject_of(models["a"]).to_json()
    again = pgs.experts.rank(models["a"], by=path)
    assert again.keep(4) == ranking.keep(4) and again.to_json() == path.read_text().replace("router-norm", again.metric)
    plain = {key: value for key, value in data.items() if key != "model"}
    assert pgs.experts.rank(models[other], by=plain).keep(4) == ranking.keep(4)  # somebody's own list
    if fine:
        assert pgs.experts.rank(models[other], by=path).keep(4) == ranking.keep(4)
        return
    for by in (path, data):
        with refused("the ranking is of another (cut|merge)"):
            pgs.experts.rank(models[other], by=by)
    assert main(["plan", str(paths[other]), "--keep", "4", "--by", str(path)]) == 4
    shown = capsys.readouterr().err
    assert str(path) in shown and len(shown.strip().splitlines()) == 1


def test_a_choice_of_another_cut_is_no_first_edit(models):
    keep = pgs.experts.rank(models["a"]).keep(4)
    with refused("the choice of experts is of another cut"):
        pgs.Plan(models["b"]).keep_experts(keep)
    pgs.Plan(models["twin"]).keep_experts(keep)
    assert not pgs.Plan(models["uncut"]).keep_experts(A).keep_experts(keep).check().blockers  # a later one is
