"""compare: the four numbers against numpy in one go, on cut and re-encoded models."""

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import pygguf_surgery as pgs
from pygguf_surgery.cli.commands.demo_model import DemoShape, write_demo_model
from pygguf_surgery.reports import origin as room
from pygguf_surgery.reports.comparison import Sums, compare

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


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    write_demo_model(folder / "source.gguf", shape=SMALL)
    with pgs.open(folder / "source.gguf") as model:
        keep = pgs.experts.rank(model).keep(4)
        pgs.Plan(model).keep_experts(keep).quantize("MXFP4_MOE").write(folder / "result.gguf")
    return folder / "source.gguf", folder / "result.gguf", keep


def values(path):
    return {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
        for t in gguf.GGUFReader(str(path)).tensors
    }


def expected(x, y):
    """The formulas, written once more."""
    d, xx = ((x - y) ** 2).sum(), (x * x).sum()
    return {
        "cosine": (x * y).sum() / np.sqrt(xx * (y * y).sum()),
        "snr_db": 10 * np.log10(xx / d) if d else None,
        "relative_error": np.sqrt(d / xx),
        "max_error": np.abs(x - y).max(),
    }


def same(entry, numbers):
    for key, number in numbers.items():
        assert entry[key] == (number if number is None else pytest.approx(number, rel=1e-9, abs=1e-12)), (entry, key)


@pytest.mark.parametrize("chunk", [64, 1000, 1 << 20])
def test_numbers_are_those_of_numpy_whatever_the_chunk(pair, monkeypatch, chunk):
    monkeypatch.setattr(room, "CHUNK", chunk)
    source_path, result_path, keep = pair
    x, y = values(source_path), values(result_path)
    for name in x:
        if "_exps." in name or name.endswith("ffn_gate_inp.weight"):
            x[name] = x[name][list(keep[int(name.split(".")[1])])]
    with pgs.open(source_path) as source, pgs.open(result_path) as result:
        found = compare(source, result)
    assert [t["name"] for t in found["tensors"]] == list(y)
    for entry in found["tensors"]:
        same(entry, expected(x[entry["name"]], y[entry["name"]]))
    by_role = {}
    for entry in found["tensors"]:
        by_role.setdefault(entry["role"], []).append(entry["name"])
    assert {r["role"] for r in found["roles"]} == set(by_role)
    for r in found["roles"]:
        names = by_role[r["role"]]
        same(r, expected(*(np.concatenate([v[n].ravel() for n in names]) for v in (x, y))))


def test_a_file_against_itself_is_equal(pair):
    with pgs.open(pair[1]) as a, pgs.open(pair[1]) as b:
        found = compare(a, b)
    for entry in found["tensors"] + found["roles"]:
        assert (entry["cosine"], entry["snr_db"], entry["relative_error"], entry["max_error"]) == (1.0, None, 0.0, 0.0)


def test_kept_can_be_given(pair, tmp_path):
    source_path, result_path, keep = pair
    with pgs.open(result_path) as model:
        keys = [key for key in model.metadata if key.startswith("pgs.")]
        pgs.Plan(model).remove_metadata(*keys).write(tmp_path / "anonymous.gguf")
    with (
        pgs.open(source_path) as source,
        pgs.open(tmp_path / "anonymous.gguf") as result,
        pgs.open(result_path) as named,
    ):
        with pytest.raises(pgs.BadPlan) as error:
            compare(source, result)
        assert error.value.object == "blk.0.ffn_gate_inp.weight"
        assert compare(source, result, kept=keep) == compare(source, named)


def test_types_and_sizes_by_role(pair):
    with pgs.open(pair[0]) as source, pgs.open(pair[1]) as result:
        roles = {r["role"]: r for r in compare(source, result)["roles"]}
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
    for a, b in zip(whole.to_json().values(), pooled.to_json().values(), strict=True):
        assert a == b if a is None or b is None else a == pytest.approx(b, rel=1e-9)


def test_without_a_denominator_there_is_no_number():
    zero = np.zeros(4, np.float32)
    sums = Sums()
    sums.add(zero, zero)
    assert sums.to_json() == {"cosine": 1.0, "snr_db": None, "relative_error": 0.0, "max_error": 0.0}
    sums.add(zero, zero + 1)
    assert sums.to_json() == {"cosine": None, "snr_db": None, "relative_error": None, "max_error": 1.0}
