"""compare: its numbers against numpy and gguf-py in one go, on cut, merged, repaired and re-encoded models."""

import math

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import pygguf_surgery as pgs
from pygguf_surgery import Value
from pygguf_surgery.cli.commands.demo_model import DemoShape, write_demo_model
from pygguf_surgery.files.gguf import write_gguf
from pygguf_surgery.plan_data.expressions import Group
from pygguf_surgery.reports import pairs
from pygguf_surgery.reports.comparison import Sums
from support import moe_models
from support.places import SHARED
from support.schemas import faults

compare = pgs.report.compare
SMALL = DemoShape(
    layers=4,
    embedding=64,
    experts=8,
    used=2,
    feed_forward=32,
    heads=2,
    heads_kv=1,
    head=32,
    state=32,
    key_heads=1,
    value_heads=2,
    vocabulary=300,
)
TRAINED = SHARED / "models" / "tiny-qwen3next-bf16.gguf"
UP, DOWN, ROUTER = (f"blk.1.ffn_{part}.weight" for part in ("up_exps", "down_exps", "gate_inp"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def pair(folder):
    write_demo_model(folder / "source.gguf", shape=SMALL)
    with pgs.open(folder / "source.gguf") as model:
        keep = pgs.experts.rank(model).keep(4)
        pgs.Plan(model).keep_experts(keep).quantize("MXFP4_MOE").write(folder / "result.gguf")
    return folder / "source.gguf", folder / "result.gguf", keep


def compared(a, b, **options):
    with pgs.open(a) as source, pgs.open(b) as result:
        found = compare(source, result, **options)
    assert not faults("compare", found.to_json())
    return found


def by_name(found):
    return {tensor["name"]: tensor for tensor in found.to_json()["tensors"]}


# --- the oracle: everything in memory, decoded by gguf-py ------------------------------------------------------------


def values(path):
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
        for t in gguf.GGUFReader(str(path)).tensors
        if t.tensor_type.name != "I32"
    }


def cut(tensors, kept):
    """Of the source (or of its importance, one row for a router) what the experts {layer: ids} are."""
    result = dict(tensors)
    for name, data in tensors.items():
        if data.ndim == 3 or (name.endswith("ffn_gate_inp.weight") and data.ndim == 2) or "exp_probs_b" in name:
            layer = int(name.split(".")[1])
            if layer in kept:
                result[name] = tensors[name][list(kept[layer])]
    return result


def expected(x, y, w=None):
    """The formulas, written once more. w: as x, or None."""
    d, xx = ((x - y) ** 2).sum(), (x * x).sum()
    weighted = None
    if w is not None:
        weighted = np.sqrt((w * (x - y) ** 2).sum() / (w * x * x).sum())
    return {
        "cosine": (x * y).sum() / np.sqrt(xx * (y * y).sum()),
        "snr_db": 10 * np.log10(xx / d) if d else None,
        "relative_error": np.sqrt(d / xx),
        "max_error": np.abs(x - y).max(),
        "weighted_error": weighted,
    }


def same(entry, numbers):
    for key, number in numbers.items():
        assert entry[key] == (number if number is None else pytest.approx(number, rel=1e-9, abs=1e-12)), (entry, key)


def same_table(found, x, y, w=None):
    """Each tensor and each role. w: name -> importance, of the shape of x or one that broadcasts."""
    w = {} if w is None else w
    whole = {name: np.broadcast_to(w[name], x[name].shape) for name in w if name in x}
    tensors = by_name(found)
    assert list(tensors) == list(y)
    for name, entry in tensors.items():
        same(entry, expected(x[name], y[name], whole.get(name)))
    for role in found.to_json()["roles"]:
        names = [name for name, entry in tensors.items() if entry["role"] == role["role"]]
        numbers = expected(*(np.concatenate([v[n].ravel() for n in names]) for v in (x, y)))
        weighted = [n for n in names if n in whole]
        if weighted:
            numbers["weighted_error"] = expected(
                *(np.concatenate([v[n].ravel() for n in weighted]) for v in (x, y, whole))
            )["weighted_error"]
        same(role, numbers)
        assert role["compared"] == role["tensors"] == len(names)


def importance(path):
    """Of an importance matrix {name: [slices, 1, row] or [row]}, by gguf-py; slices that were never seen are zeros."""
    tensors = {t.name: t.data for t in gguf.GGUFReader(str(path)).tensors}
    found = {}
    for name, sums in tensors.items():
        if name.endswith(".in_sum2"):
            counts = np.atleast_1d(np.round(tensors[name.removesuffix("in_sum2") + "counts"]).squeeze())
            sums = np.atleast_2d(sums)
            rows = np.zeros(sums.shape)
            rows[counts > 0] = (sums[counts > 0] / counts[counts > 0, None].astype(np.float32)).astype(np.float64)
            found[name.removesuffix(".in_sum2")] = rows[0] if len(counts) == 1 else rows[:, None]
    return found


# --- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk, piece", [(256, 256), (1 << 12, 1 << 13), (1 << 20, 1 << 20)])
def test_numbers_are_those_of_numpy_whatever_the_chunk(pair, monkeypatch, chunk, piece):
    monkeypatch.setattr(pairs, "CHUNK", chunk)
    monkeypatch.setattr(pairs, "PIECE", piece)
    source, result, keep = pair
    found = compared(source, result)
    assert not found.unmatched
    same_table(found, cut(values(source), keep), values(result))


def test_a_long_row_is_read_in_parts(folder, monkeypatch):
    monkeypatch.setattr(pairs, "CHUNK", 256)
    x = np.random.default_rng(0).standard_normal((3, 1000), np.float32)
    for name, y in (("a", x), ("b", x + np.float32(0.01))):
        write_gguf(folder / f"{name}.gguf", {"general.architecture": Value("llama", "str")}, {"output.weight": y})
    found = compared(folder / "a.gguf", folder / "b.gguf")
    same(by_name(found)["output.weight"], expected(x.astype(float), (x + np.float32(0.01)).astype(float)))


def test_a_file_against_itself_is_equal(pair):
    found = compared(pair[1], pair[1])
    for entry in found.to_json()["tensors"] + found.to_json()["roles"]:
        assert (entry["cosine"], entry["snr_db"], entry["relative_error"], entry["max_error"]) == (1.0, None, 0.0, 0.0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12, deadline=None)
@given(threads=st.integers(1, 4), memory=st.integers(64, 1 << 16), rows=st.sampled_from(["all", "sample"]))
def test_the_same_numbers_for_any_threads_and_memory(pair, monkeypatch, threads, memory, rows):
    monkeypatch.setattr(pairs, "CHUNK", 512)
    monkeypatch.setattr(pairs, "PIECE", 1024)
    monkeypatch.setattr(pairs, "SAMPLE_ROWS", 40)
    one = compared(*pair[:2], threads=1, rows=rows).to_json()
    assert compared(*pair[:2], threads=threads, memory=f"{memory}MiB", rows=rows).to_json() == one


def test_kept_can_be_given(pair, tmp_path):
    source_path, result_path, keep = pair
    with pgs.open(result_path) as model:
        keys = [key for key in model.metadata if key.startswith("pgs.")]
        pgs.Plan(model).remove_metadata(*keys).write(tmp_path / "anonymous.gguf")
    without = compared(source_path, tmp_path / "anonymous.gguf")
    assert {ROUTER, UP, DOWN} <= {one.name for one in without.unmatched if "no list of kept experts" in one.reason}
    assert "blk.1.attn_norm.weight" in by_name(without)
    named = compared(source_path, result_path)
    assert compared(source_path, tmp_path / "anonymous.gguf", kept=keep).to_json() == named.to_json()


def test_types_and_sizes_by_role(pair):
    with pgs.open(pair[0]) as source, pgs.open(pair[1]) as result:
        roles = {r["role"]: r for r in compare(source, result).to_json()["roles"]}
        assert sum(r["nbytes"] for r in roles.values()) == sum(t.nbytes for t in result.tensors.values())
        assert sum(r["source_nbytes"] for r in roles.values()) == sum(t.nbytes for t in source.tensors.values())
    assert roles["expert"]["source_types"] == ["BF16"] and roles["expert"]["types"] == ["MXFP4"]
    assert roles["expert"]["tensors"] == 12
    assert list(roles) == ["attention", "ssm", "router", "norm", "shared_expert", "expert", "embedding", "output"]


@given(st.data())
def test_pooled_sums_are_sums_of_the_whole(data):
    numbers = hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(-1e6, 1e6, width=32))
    x = data.draw(numbers)
    y = data.draw(hnp.arrays(np.float32, len(x), elements=st.floats(-1e6, 1e6, width=32)))
    cut = data.draw(st.integers(0, len(x)))
    whole, pooled = Sums(), Sums()
    whole.add(x, y)
    for part in (slice(None, cut), slice(cut, None)):
        sums = Sums()
        sums.add(x[part], y[part])
        pooled.pool(sums)
    for a, b in zip(whole.all_json().values(), pooled.all_json().values(), strict=True):
        assert a == b if a is None or b is None else a == pytest.approx(b, rel=1e-9)


any_float = st.floats(width=32, allow_subnormal=False)


@given(hnp.arrays(np.float32, (3, 7), elements=any_float), hnp.arrays(np.float32, (3, 7), elements=any_float))
def test_what_is_not_finite_is_counted_and_left_out(x, y):
    sums = Sums()
    sums.add(x.copy(), y.copy(), np.ones(7, np.float32))
    good = np.isfinite(x) & np.isfinite(y)
    assert (sums.source_nan, sums.source_inf) == (np.isnan(x).sum(), np.isinf(x).sum())
    assert (sums.nan, sums.inf, sums.left_out) == (np.isnan(y).sum(), np.isinf(y).sum(), (~good).sum())
    rest = Sums()
    rest.add(x[good], y[good])
    for a, b in zip(sums.to_json().values(), rest.to_json().values(), strict=True):
        assert a == b if a is None or b is None else a == pytest.approx(b, rel=1e-6)
    if not good.any():
        assert set(list(sums.all_json().values())[:5]) == {None}


@given(hnp.arrays(np.float32, (3, 7), elements=any_float))
def test_equal_numbers_cost_less_and_come_to_the_same(x):
    short, long = Sums(), Sums()
    short.add(x, x, np.ones(7, np.float32))
    long.add(x, x.copy(), np.ones(7, np.float32))
    assert short == long


def test_without_a_denominator_there_is_no_number():
    zero = np.zeros(4, np.float32)
    sums = Sums()
    sums.add(zero, zero)
    assert sums.to_json() == {"cosine": 1.0, "snr_db": None, "relative_error": 0.0, "max_error": 0.0}
    sums.add(zero, zero + 1)
    assert sums.to_json() == {"cosine": None, "snr_db": None, "relative_error": None, "max_error": 1.0}


# --- a sample --------------------------------------------------------------------------------------------------------


def sampled(rows, slices):
    """The rows that the documents state."""
    n = max(pairs.SLICE_ROWS, math.ceil(pairs.SAMPLE_ROWS / slices))
    step = math.ceil(rows / n)
    return slice(step // 2, None, step)


def test_a_sample_is_of_the_stated_rows(folder):
    rng = np.random.default_rng(1)
    shapes = {"output.weight": (700, 32), "blk.0.ffn_up_exps.weight": (40, 50, 64), "output_norm.weight": (5000,)}
    x = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    y = {name: data + rng.standard_normal(data.shape, np.float32) / 10 for name, data in x.items()}
    for name, tensors in (("x", x), ("y", y)):
        write_gguf(folder / f"{name}.gguf", {"general.architecture": Value("llama", "str")}, tensors)
    found = compared(folder / "x.gguf", folder / "y.gguf", rows="sample")
    assert found.to_json()["rows"] == "sample" and "of a sample of the rows" in found.summary()
    for name, entry in by_name(found).items():
        a, b = (tensors[name].astype(np.float64) for tensors in (x, y))
        if a.ndim == 2:
            a, b = (v[sampled(700, 1)] for v in (a, b))
        elif a.ndim == 3:
            a, b = (v[:, sampled(50, 40)] for v in (a, b))
        assert entry["elements"] == a.size
        same(entry, expected(a, b))
    assert by_name(found)["output.weight"]["elements"] == 233 * 32


# --- importance ------------------------------------------------------------------------------------------------------


def write_imatrix(path, model, *, unseen=(), of=None):
    """Of a model: random sums, one count for each slice; experts `unseen` of every tensor have none."""
    rng = np.random.default_rng(2)
    entries = {}
    for tensor in model.tensors.values():
        if len(tensor.shape) > 1 and tensor.name.startswith("blk.") and "norm" not in tensor.name:
            slices = math.prod(tensor.shape[:-2])
            counts = rng.integers(1, 9, slices).astype(np.float32)
            sums = rng.random((slices, tensor.shape[-1]), np.float32) + np.float32(0.01)
            if slices > 1:
                counts[list(unseen)] = 0
                sums[list(unseen)] = 0
            entries[tensor.name] = sums, counts
    pgs.imatrix.write(path, entries, of=of, overwrite=True)
    return path


def test_errors_are_weighted_by_importance_that_follows_the_cut(pair, folder):
    source, result, keep = pair
    with pgs.open(source) as model:
        matrix = write_imatrix(folder / "parent.gguf", model, unseen=(keep[1][0], keep[1][2]))
    w = cut(importance(matrix), keep)
    assert (w[UP][0] == 0).all() and (w[UP][1] > 0).all()
    x, y = cut(values(source), keep), values(result)
    found = compared(source, result, imatrix=matrix)
    same_table(found, x, y, w)
    with pgs.imatrix.open(matrix) as opened:
        assert compared(source, result, imatrix=opened).to_json() == found.to_json()
    sliced = folder / "child.gguf"  # says that it is of the result
    pgs.imatrix.slice(matrix, sliced, keep)
    with pgs.open(result) as model:
        by_size = write_imatrix(folder / "by-size.gguf", model)
    assert compared(source, result, imatrix=sliced).to_json() == found.to_json()
    same_table(compared(source, result, imatrix=by_size), x, y, importance(by_size))


def test_importance_of_another_model_is_refused_and_a_bad_entry_named(pair, folder):
    source, result, _ = pair
    with pgs.open(moe_models.qwen3moe(folder / "other.gguf")) as other:
        matrix = write_imatrix(folder / "other-imatrix.gguf", other)
    entries = {UP: (np.ones((8, 64), np.float32), np.ones(8)), DOWN: (np.full((8, 32), np.nan), np.ones(8))}
    pgs.imatrix.write(folder / "bad.gguf", entries)
    with pytest.warns(pgs.SurgeryWarning, match=f"{DOWN}.*not finite.*has no weighted error"):
        found = by_name(compared(source, result, imatrix=folder / "bad.gguf"))
    assert found[DOWN]["weighted_error"] is None
    assert found[UP]["weighted_error"] == pytest.approx(found[UP]["relative_error"], rel=1e-12)
    pgs.imatrix.write(folder / "stranger.gguf", {"blk.9.x.weight": (np.ones(4), 1), UP: (np.ones((8, 64)), np.ones(8))})
    with pytest.warns(pgs.SurgeryWarning, match=r"1 of 2 entries belong to no tensor .*blk\.9\.x\.weight"):
        compared(source, result, imatrix=folder / "stranger.gguf")
    pgs.imatrix.write(folder / "size.gguf", {"blk.0.ffn_up_exps.weight": (np.ones((3, 64), np.float32), np.ones(3))})
    for path in (matrix, folder / "size.gguf"):
        with pytest.raises(pgs.BadPlan):
            compared(source, result, imatrix=path)


# --- flags -----------------------------------------------------------------------------------------------------------


def test_flags(folder):
    x = {"blk.0.ffn_up_exps.weight": np.ones((6, 4, 8), np.float32), "output.weight": np.ones((3, 8), np.float32)}
    y = {name: data.copy() for name, data in x.items()}
    x["output.weight"][0, :3] = np.nan, -np.inf, np.inf
    y["output.weight"][1, :2] = np.nan, np.inf
    y["blk.0.ffn_up_exps.weight"][[1, 4]] = 0
    y["blk.0.ffn_up_exps.weight"][2] = 0
    y["blk.0.ffn_up_exps.weight"][2, 3, 7] = np.nan  # not all zero
    for name, tensors in (("flags-x", x), ("flags-y", y)):
        write_gguf(folder / f"{name}.gguf", {"general.architecture": Value("llama", "str")}, tensors)
    found = compared(folder / "flags-x.gguf", folder / "flags-y.gguf")
    tensors = by_name(found)
    head = tensors["output.weight"]
    assert [head[key] for key in ("source_nan", "source_inf", "nan", "inf")] == [1, 2, 1, 1]
    assert head["relative_error"] == 0 and head["elements"] == 24
    assert tensors["blk.0.ffn_up_exps.weight"]["zero_experts"] == 2
    table = found.summary(tensors=True)
    for words in ("1 NaN in the source, 2 Inf in the source, 1 NaN, 1 Inf", "1 NaN, 2 experts of zeros"):
        assert table.count(words) == 2, words


def test_experts_that_fill_up_are_neither_compared_nor_flagged(tmp_path):
    with pgs.open(moe_models.dots1(tmp_path / "in.gguf")) as model:
        layers = sorted(pgs.experts.rank(model).keep(4))
        keep = {layer: [1, 2, 3, 5] if layer == layers[0] else range(6) for layer in layers}
        pgs.Plan(model).keep_experts(keep).write(tmp_path / "out.gguf")
    found = compared(tmp_path / "in.gguf", tmp_path / "out.gguf")
    x, y = cut(values(tmp_path / "in.gguf"), keep), values(tmp_path / "out.gguf")
    tensors, filled = by_name(found), f"blk.{layers[0]}."
    for part in ("ffn_up_exps.weight", "ffn_gate_inp.weight", "exp_probs_b.bias"):
        entry = tensors[filled + part]
        assert entry["padding_experts"] == 2 and entry["zero_experts"] == 0
        assert entry["elements"] == x[filled + part].size and entry["relative_error"] == 0
        assert y[filled + part].shape[0] == 6
    assert tensors[f"blk.{layers[1]}.ffn_up_exps.weight"]["padding_experts"] == 0 and not found.unmatched


def test_an_expert_that_is_said_to_fill_up_and_does_not_is_listed(tmp_path):
    source, out = moe_models.qwen3moe(tmp_path / "in.gguf", type="F32"), tmp_path / "out.gguf"
    with pgs.open(source) as model:
        pgs.Plan(model).keep_experts({0: range(6), 1: range(6)}).write(out)
    exact, tensors = contents(out)
    exact |= {"pgs.experts.0.kept": Value([0, 1, 2, 3], "u32[]"), "pgs.experts.0.padded": Value(2, "u32")}
    write_gguf(tmp_path / "lies.gguf", exact, tensors)
    found = compared(source, tmp_path / "lies.gguf")
    names = ["blk.0.ffn_gate_inp.weight", *(f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up", "down"))]
    assert [(one.name, one.experts) for one in found.unmatched] == [(name, (4, 5)) for name in names]
    entry = by_name(found)["blk.0.ffn_up_exps.weight"]
    assert entry["padding_experts"] == 0 and entry["elements"] == values(out)["blk.0.ffn_up_exps.weight"][:4].size


# --- what belongs together -------------------------------------------------------------------------------------------

FIRST = {0: (0, 2, 4, 6, 8, 10, 12, 14), 1: (1, 3, 5, 7, 9, 11, 13, 15)}
THEN = {0: (0, 1, 3, 4, 7), 1: (1, 2, 5, 6, 7)}
BOTH = {layer: tuple(FIRST[layer][i] for i in ids) for layer, ids in THEN.items()}
ORDER = np.arange(moe_models.FF, dtype="<u2").tobytes()
GROUPS = {layer: tuple(Group((i, i + 1), (0.5, 0.5), (b"", ORDER)) for i in (0, 2)) + tuple(
    Group((i,), (1.0,), (b"",)) for i in range(4, 16)) for layer in (0, 1)}  # fmt: skip


@pytest.fixture(scope="module")
def chain(folder):
    """first, its cut, a second cut of that in Q8_0, and others."""
    first = moe_models.qwen3moe(folder / "first.gguf", type="F32")
    plans = {
        "cut": ("first", lambda plan: plan.keep_experts(FIRST)),
        "q8": ("first", lambda plan: plan.quantize("Q8_0")),
        "twice": ("cut", lambda plan: plan.keep_experts(THEN).quantize("Q8_0")),
        "cut-q8": ("cut", lambda plan: plan.quantize("Q8_0")),
        "sibling": ("first", lambda plan: plan.keep_experts({0: (0, 1, 2, 3, 4), 1: BOTH[1]})),
        "merged": ("first", lambda plan: plan.merge_experts(GROUPS)),
        "merged-q8": ("merged", lambda plan: plan.quantize("Q8_0")),
        "cut-merged": ("cut", lambda plan: plan.merge_experts({layer: some[:6] for layer, some in GROUPS.items()})),
        "short": ("cut", lambda plan: plan.prune_layers([0])),
        "shards": ("cut", lambda plan: plan.quantize("Q8_0").split(max_tensors=5)),
    }
    paths = {"first": first}
    for name, (source, edit) in plans.items():
        with pgs.open(paths[source]) as model:
            paths[name] = edit(pgs.Plan(model)).write(folder / f"chain-{name}.gguf").path
    return paths


@pytest.mark.parametrize(
    "a, b, kept",
    [
        ("cut", "twice", THEN),
        ("first", "twice", BOTH),
        ("first", "cut", FIRST),
        ("cut", "cut-q8", {}),
        ("cut-q8", "twice", THEN),
        ("merged", "merged-q8", {}),
        ("q8", "twice", BOTH),
        ("cut", "shards", {}),
        ("first", "shards", FIRST),
    ],
)
def test_a_cut_is_compared_with_every_model_before_it(chain, a, b, kept, recwarn):
    found = compared(chain[a], chain[b])
    with pgs.open(chain[b]) as model:
        y = {n: v for path in model.paths for n, v in values(path).items()}
    same_table(found, cut(values(chain[a]), kept), y)
    assert not found.unmatched
    other = [w for w in recwarn if issubclass(w.category, pgs.SurgeryWarning)]
    assert bool(other) == (a == "q8" or (a, b) == ("cut-q8", "twice")) or not other
    assert bool(other) == (a == "q8")


def test_layers_that_are_gone(chain):
    for a, kept in (("cut", {}), ("first", FIRST)):
        found = compared(chain[a], chain["short"])
        x = {n.replace("blk.1.", "blk.0."): v for n, v in cut(values(chain[a]), kept).items() if "blk.0." not in n}
        same_table(found, x, values(chain["short"]))
        gone = {one.name for one in found.unmatched}
        assert gone == {name for name in values(chain[a]) if name.startswith("blk.0.")}
        assert {(one.of, one.reason) for one in found.unmatched} == {("source", "its layer was dropped")}


def test_an_expert_merged_of_several_has_no_counterpart(chain):
    found = compared(chain["first"], chain["merged"])
    assert {(one.name, one.experts) for one in found.unmatched} == {
        (f"blk.{layer}.ffn_{part}_exps.weight", (0, 1)) for layer in (0, 1) for part in ("gate", "up", "down")
    }
    tensors = by_name(found)
    x = values(chain["first"])
    assert tensors[UP]["relative_error"] == 0 and tensors[UP]["elements"] == x[UP][4:].size  # the others are copied
    assert tensors[ROUTER]["relative_error"] == 0  # the centroids'
    assert "made of several of the source's: blk.0.ffn_gate_exps.weight (2 experts)" in found.summary()


def test_an_expert_merged_after_a_cut_has_none_in_the_first_model_either(chain):
    found = compared(chain["first"], chain["cut-merged"])
    assert {one.experts for one in found.unmatched} == {(0, 1)} and len(found.unmatched) == 6
    x = cut(values(chain["first"]), {layer: [ids[i] for i in (0, 2, 4, 5, 6, 7)] for layer, ids in FIRST.items()})
    y = values(chain["cut-merged"])
    for name, entry in by_name(found).items():
        whole = slice(2, None) if "_exps." in name else slice(None)
        same(entry, expected(x[name][whole], y[name][whole]))


def test_another_cut_of_the_same_model_is_compared_as_far_as_they_go_together(chain):
    found = compared(chain["cut"], chain["sibling"])
    lacks = {one.name: one.experts for one in found.unmatched}
    assert {one.reason for one in found.unmatched} == {"experts that the source lacks"}
    assert set(lacks.values()) == {(1, 3)} and all(name.startswith("blk.0.ffn_") for name in lacks)
    tensors, x, y = by_name(found), values(chain["cut"]), values(chain["sibling"])
    assert all(entry["relative_error"] == 0 for entry in tensors.values())
    for name in ("blk.0.ffn_up_exps.weight", "blk.0.ffn_gate_inp.weight"):
        assert tensors[name]["elements"] == x[name][[0, 1, 2]].size and np.array_equal(x[name][:3], y[name][::2])


def test_a_repaired_tensor_is_compared_and_flagged(chain, folder):
    rng = np.random.default_rng(4)
    with pgs.open(chain["first"]) as model:
        repair = repair_of(folder / "repair.gguf", model, FIRST, rng)
        pgs.Plan(model).keep_experts(FIRST, repair=repair).write(folder / "repaired.gguf")
    found = compared(chain["first"], folder / "repaired.gguf")
    assert {name for name, entry in by_name(found).items() if entry["repaired"]} == {
        f"blk.{layer}.ffn_down_exps.weight" for layer in FIRST
    }
    same_table(found, cut(values(chain["first"]), FIRST), values(folder / "repaired.gguf"))
    assert by_name(found)[DOWN]["relative_error"] > 1 and "2 repaired" in found.summary()
    # Beside the same cut without the repair it is the same tensors, and what is different is still on purpose.
    beside = by_name(compared(chain["cut"], folder / "repaired.gguf"))
    assert beside[DOWN]["repaired"] and not beside[UP]["repaired"] and beside[UP]["relative_error"] == 0
    with pgs.open(folder / "repaired.gguf") as model:
        pgs.Plan(model).quantize("Q8_0").write(folder / "repaired-q8.gguf")
    assert not any(t.repaired for t in compared(folder / "repaired.gguf", folder / "repaired-q8.gguf").tensors)


def repair_of(path, model, kept, rng):
    """The file of a repair, of random numbers."""
    keys = {
        "general.type": Value("expert_repair", "str"),
        "pgs.repair.format": Value(1, "u32"),
        "pgs.repair.model.header_sha256": Value(model.header_sha256, "str"),
        "pgs.repair.metric": Value("best", "str"),
        "pgs.repair.layers": Value(list(kept), "u32[]"),
        **{f"pgs.repair.{layer}.kept": Value(list(ids), "u32[]") for layer, ids in kept.items()},
    }
    tensors = {}
    for layer, ids in kept.items():
        name = f"blk.{layer}.ffn_down_exps.weight"
        tensors[name] = rng.standard_normal((len(ids), *model.tensors[name].shape[1:]), np.float32)
    write_gguf(path, keys, tensors, overwrite=True)
    return path


def contents(path):
    """Metadata and tensors, as write_gguf takes them."""
    with pgs.open(path) as model:
        return model.metadata.exact(), {t.name: (t.bytes(), t.type, t.shape) for t in model.tensors.values()}


def test_what_only_one_has_and_integers_are_listed(tmp_path):
    with pgs.open(moe_models.deepseek4(tmp_path / "in.gguf")) as model:
        pgs.Plan(model).keep_experts({layer: range(8) for layer in pgs.experts.rank(model).keep(8)}).write(
            tmp_path / "out.gguf"
        )
    found = compared(tmp_path / "in.gguf", tmp_path / "out.gguf")
    integers = {one.name for one in found.unmatched if one.reason == "numbers of type I32 are not compared"}
    assert integers == {"blk.0.ffn_gate_tid2eid.weight"} == {one.name for one in found.unmatched}
    exact, tensors = contents(tmp_path / "out.gguf")
    del tensors["output_norm.weight"]
    write_gguf(tmp_path / "less.gguf", exact, {**tensors, "new.weight": np.ones((2, 2), np.float32)})
    less = compared(tmp_path / "in.gguf", tmp_path / "less.gguf")
    assert {(one.name, one.of) for one in less.unmatched if one.name not in integers} == {
        ("output_norm.weight", "source"),
        ("new.weight", "result"),
    }
    names = {*by_name(less), *(one.name for one in less.unmatched)}
    assert names == {*tensors, "new.weight", "output_norm.weight"}


def test_what_cannot_be_compared_is_refused(chain, pair, folder):
    for a, b, words in (
        (chain["cut"], chain["first"], "give .* second"),
        (chain["first"], pair[0], "different architectures"),
    ):
        with pytest.raises(pgs.BadPlan, match=words):
            compared(a, b)
    with pytest.raises(pgs.BadPlan, match="rows"):
        compared(*pair[:2], rows="some")
    with pgs.open(pair[0]) as a, pgs.open(pair[1], metadata_only=True) as b, pytest.raises(pgs.BadPlan):
        compare(a, b)
    for name in "ab":
        write_gguf(folder / f"{name}-only.gguf", {}, {name: np.ones(3, np.float32)})
    with pytest.raises(pgs.BadPlan, match="nothing in these models can be compared"):
        compared(folder / "a-only.gguf", folder / "b-only.gguf")


KEYS = ["pgs.experts.0.kept", "pgs.experts.0.merged", "pgs.experts.0.padded", "pgs.layers.kept", "pgs.source.experts",
        "pgs.experts.0.origin", "pgs.origin.experts", "pgs.origin.layers", "pgs.origin.header_sha256",
        "pgs.source.header_sha256", "pgs.experts.0.repaired", "qwen3moe.expert_count"]  # fmt: skip
LIES = st.one_of(
    st.lists(st.integers(0, 20), max_size=20).map(lambda ids: Value(ids, "u32[]")),
    st.lists(st.integers(-3, 1 << 31), max_size=9).map(lambda ids: Value(ids, "i64[]")),
    st.integers(0, 1 << 32 - 1).map(lambda n: Value(n, "u32")),
    st.sampled_from(["", "ab", "0" * 64]).map(lambda text: Value(text, "str")),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    st.sampled_from(["cut", "twice", "merged", "short"]),
    st.dictionaries(st.sampled_from(KEYS), LIES, min_size=1, max_size=4),
)
@pytest.mark.filterwarnings("ignore::pygguf_surgery.SurgeryWarning")
def test_keys_that_lie_give_an_error_or_a_complete_list(chain, folder, name, lies):
    exact, tensors = contents(chain[name])
    write_gguf(folder / "lies.gguf", exact | lies, tensors, overwrite=True)
    for source in ("first", "cut"):
        try:
            found = compared(chain[source], folder / "lies.gguf")
        except pgs.SurgeryError:
            continue
        listed = {one.name for one in found.unmatched if one.of == "result"}
        assert {*by_name(found), *listed} == set(tensors)
        assert all(tensor.sums.elements for tensor in found.tensors)


# --- the trained model -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not TRAINED.exists(), reason=f"needs {TRAINED}")
@pytest.mark.parametrize("type", ["MXFP4_MOE", "Q4_K_M"])
@pytest.mark.parametrize("edit", ["all", "cut", "repaired"])
def test_the_tables_of_a_trained_model_are_those_of_numpy_and_gguf_py(tmp_path, type, edit):
    matrix, out = TRAINED.with_name("imatrix.gguf"), tmp_path / "out.gguf"
    with pgs.open(TRAINED) as model:
        plan, kept = pgs.Plan(model), {}
        if edit != "all":
            kept = {layer: ids for layer, ids in pgs.experts.rank(model).keep(16).items()}
            repair = None
            if edit == "repaired":
                repair = repair_of(tmp_path / "repair.gguf", model, kept, np.random.default_rng(5))
            plan = plan.keep_experts(kept, repair=repair)
        plan.quantize(type, imatrix=matrix).write(out)
    found = compared(TRAINED, out, imatrix=matrix)
    x, y = cut(values(TRAINED), kept), values(out)
    same_table(found, x, y, cut(importance(matrix), kept))
    assert {t.type for t in found.tensors if t.role == "expert"} & {"MXFP4", "Q4_K"}
    assert any(t.repaired for t in found.tensors) == (edit == "repaired")
