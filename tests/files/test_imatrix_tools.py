"""What can be done with importance matrices: merge, convert, slice, coverage, and the commands."""

import errno
import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pygguf_surgery import BadFile, BadPlan, imatrix
from pygguf_surgery._core import Value
from pygguf_surgery.cli.commands import imatrix as cli
from pygguf_surgery.files import imatrix as files
from pygguf_surgery.files.gguf import write_gguf
from support.imatrices import ONE, UP, contents, legacy, put, same, trailer
from support.strategies import ENTRIES, ENTRY_NAMES, entry

# --- merge ----------------------------------------------------------------------------------------------------------


@st.composite
def related(draw):
    """Files of one model: some entries are missing, or have one count for all rows."""
    shapes = draw(st.dictionaries(ENTRY_NAMES, st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4))
    result = []
    for _ in range(draw(st.integers(1, 3))):
        chosen = draw(st.sets(st.sampled_from(sorted(shapes)), min_size=1))
        entries = {}
        for name in sorted(chosen):
            rows, columns = shapes[name]
            number = draw(st.sampled_from([1, rows]))
            counts = draw(st.lists(st.integers(0, 1000), min_size=number, max_size=number))
            sums = draw(st.lists(st.integers(0, 1000), min_size=rows * columns, max_size=rows * columns))
            entries[name] = np.array(sums, np.float32), np.array(counts, np.float32)  # small: sums are exact
        result.append(entries)
    return result


@given(related())
def test_merge_adds_whatever_the_order(tmp_path, several):
    paths = []
    for i, entries in enumerate(several):
        paths.append(tmp_path / f"{i}.gguf")
        imatrix.write(paths[-1], entries, datasets=[f"{i}.txt"], chunk_count=i + 1, overwrite=True)
    out, other, step = tmp_path / "out.gguf", tmp_path / "other.gguf", tmp_path / "step.gguf"
    imatrix.merge(paths, out, overwrite=True)
    found, metadata = contents(out)
    assert set(found) == {name for entries in several for name in entries}
    for name, (sums, counts) in found.items():
        having = [entries[name] for entries in several if name in entries]
        rows = max(len(c) for _, c in having)
        assert same(sums.ravel(), sum(s for s, _ in having))
        assert same(counts, sum(np.broadcast_to(c, rows) for _, c in having))
    assert metadata["imatrix.datasets"] == [f"{i}.txt" for i in range(len(several))]
    assert metadata["imatrix.chunk_count"] == sum(range(1, len(several) + 1))
    imatrix.merge(paths[::-1], other, overwrite=True)  # sums are exact here, so the order leaves no trace
    assert contents_equal(out, other)
    imatrix.merge(paths[:1], step, overwrite=True)
    for path in paths[1:]:
        imatrix.merge([step, path], other, overwrite=True)
        os.replace(other, step)
    assert step.read_bytes() == out.read_bytes()


def contents_equal(a, b):
    a, b = contents(a)[0], contents(b)[0]
    return a.keys() == b.keys() and all(same(a[n][0].ravel(), b[n][0].ravel()) and same(a[n][1], b[n][1]) for n in a)


def test_merge_refuses_what_does_not_belong_together(tmp_path):
    a, b, out = tmp_path / "a.gguf", tmp_path / "b.gguf", tmp_path / "out.gguf"
    imatrix.write(a, {"x": (np.ones((4, 2)), np.ones(4))})
    for entries, size, object in (
        ({"x": (np.ones(6), 1)}, 512, "x"),
        ({"x": (np.ones((2, 4)), [1, 1])}, 512, "x"),
        ({"x": (np.ones((4, 2)), np.ones(4))}, 256, "imatrix.chunk_size"),
    ):
        imatrix.write(b, entries, chunk_size=size, overwrite=True)
        for paths in ([a, b], [b, a]):
            with pytest.raises(BadPlan) as caught:
                imatrix.merge(paths, out)
            assert caught.value.object == object and caught.value.path == str(paths[1])
    with pytest.raises(BadPlan, match="nothing to merge"):
        imatrix.merge([], out)
    with pytest.raises(BadPlan, match="the output is one of the inputs"):
        imatrix.merge([a, b], a, overwrite=True)
    imatrix.merge([a, a], out)
    with pytest.raises(FileExistsError):
        imatrix.merge([a], out)
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "b.gguf", "out.gguf"]


def test_a_legacy_file_merges_as_it_converts(tmp_path):
    old = put(tmp_path, legacy([("x", 3, [1, 2, 3, 4])], trailer(3, "old.txt")))
    new, out, converted, expected = (tmp_path / n for n in ("new.gguf", "out.gguf", "converted.gguf", "expected.gguf"))
    imatrix.write(new, {"x": ([[5, 6], [7, 8]], [1, 2])}, chunk_size=128)
    imatrix.merge([old, new], out)
    imatrix.convert(old, converted, chunk_size=128)
    imatrix.merge([converted, new], expected)
    assert contents_equal(out, expected)
    assert contents(out)[1]["imatrix.chunk_size"] == 128


# --- convert --------------------------------------------------------------------------------------------------------


@given(entries=st.dictionaries(ENTRY_NAMES, st.tuples(st.integers(-1, 2**14), entry()), min_size=1, max_size=4))
def test_converting_keeps_the_importance(tmp_path, entries):
    old = put(tmp_path, legacy([(n, calls, s.ravel()) for n, (calls, (s, _)) in entries.items()], trailer(3, "a")))
    imatrix.convert(old, tmp_path / "new.gguf", overwrite=True)
    with imatrix.open(old) as a, imatrix.open(tmp_path / "new.gguf") as b:
        assert b.format == "gguf" and b.chunk_size == 512 and b.datasets == ["a"]
        assert a.entries.keys() == b.entries.keys()
        assert all(same(a.importance(name), b.importance(name)) for name in a.entries)


@given(entries=ENTRIES, size=st.sampled_from([None, 1, 256, 1000]))
def test_the_legacy_form_has_the_same_importance_once_rounded(tmp_path, entries, size):
    new, old = tmp_path / "new.gguf", tmp_path / "old.dat"
    imatrix.write(new, entries, chunk_size=512, overwrite=True)
    seen = {name for name, (_, counts) in entries.items() if counts.any()}
    if not seen:
        with pytest.raises(BadPlan):
            imatrix.convert(new, old, chunk_size=size, overwrite=True)
        return
    imatrix.convert(new, old, chunk_size=size, overwrite=True)
    with imatrix.open(new) as a, imatrix.open(old) as b:
        assert b.format == "legacy" and set(b.entries) == seen  # llama-imatrix leaves the others out
        for name in seen:
            np.testing.assert_allclose(b.importance(name), a.importance(name), rtol=3e-7, atol=1e-43)


def test_convert_refuses(tmp_path):
    new, old = tmp_path / "x.gguf", tmp_path / "x.dat"
    imatrix.write(new, {"x": ([1], 1)}, chunk_size=256)
    old.write_bytes(ONE)
    for arguments, options in (
        ((new, tmp_path / "y.gguf"), dict(chunk_size=512)),
        ((old, tmp_path / "y.dat"), {}),
        ((old, old), dict(overwrite=True)),
        ((old, tmp_path / "y"), dict(chunk_size=-1)),
    ):
        with pytest.raises(BadPlan):
            imatrix.convert(*arguments, **options)
    assert sorted(os.listdir(tmp_path)) == ["x.dat", "x.gguf"]


def test_what_is_not_finite_is_not_passed_on(tmp_path):
    new, old, out = tmp_path / "x.gguf", tmp_path / "x.dat", tmp_path / "out.gguf"
    most = np.finfo(np.float32).max
    for value in (most, np.inf, np.nan):
        imatrix.write(new, {"x": ([value], 1)}, overwrite=True)
        old.write_bytes(legacy([("x", 1, [value])]))
        for call in (lambda: imatrix.merge([new, new], out), lambda: imatrix.convert(old, out)):
            with pytest.raises(BadFile) as caught:
                call()
            assert caught.value.object == "x"
    assert sorted(os.listdir(tmp_path)) == ["x.dat", "x.gguf"]


# --- slice ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [8, 20, 1 << 24])
@given(data=st.data(), one_count=st.booleans())
def test_slicing_and_importance_commute(tmp_path, piece, data, one_count):
    experts, columns = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 5))
    kept = {i: sorted(data.draw(st.sets(st.integers(0, experts - 1), min_size=1))) for i in (0, 2)}
    entries = {"blk.0.attn_q.weight": data.draw(entry()), "blk.2.ffn_up_shexp.weight": data.draw(entry())}
    for name in ("blk.0.ffn_up_exps.weight", "blk.0.ffn_down_exps.weight", "blk.2.ffn_gate_up_exps.weight"):
        entries[name] = data.draw(entry(experts, columns))
    if one_count:
        entries[UP] = entries[UP][0], entries[UP][1][:1]
    path, out = tmp_path / "x.gguf", tmp_path / "out.gguf"
    imatrix.write(path, entries, datasets=["a"], chunk_count=5, chunk_size=64, overwrite=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_PIECE", piece)
        assert imatrix.slice(path, out, {**kept, 9: [0]}, experts=experts, overwrite=True) == [9]
    with imatrix.open(path) as a, imatrix.open(out) as b:
        assert (b.datasets, b.chunk_count, b.chunk_size) == (["a"], 5, 64) and a.entries.keys() == b.entries.keys()
        for name, e in a.entries.items():
            expected = a.importance(name)
            if "_exps" in name:
                ids = kept[int(name.split(".")[1])]
                expected = expected.reshape(experts, -1)[ids].ravel()
                assert same(b.entries[name].counts, e.counts if len(e.counts) == 1 else e.counts[ids])
            assert same(b.importance(name), expected)


def test_slice_refuses(tmp_path):
    path, out = tmp_path / "x.gguf", tmp_path / "out.gguf"
    same_size = np.ones((4, 2)), np.ones(4)
    imatrix.write(path, {UP: same_size, "blk.1.ffn_down_exps.weight": same_size})
    for kept, text in (
        ({0: [0]}, "kept: layer 1 is missing (expected the 2 layers with experts)"),
        ({0: [4], 1: [0]}, f"{UP}: expert 4 out of range (found 4 experts, expected 0..3)"),
        ({0: [-1], 1: [0]}, f"{UP}: expert -1 out of range (found 4 experts, expected 0..3)"),
        ({0: [1, 1], 1: [0]}, f"{UP}: expert 1 named twice"),
        ({0: [], 1: [0]}, f"{UP}: no expert is kept"),
    ):
        with pytest.raises(BadPlan) as caught:
            imatrix.slice(path, out, kept)
        assert text in str(caught.value)
    with pytest.raises(BadPlan, match="another number of experts"):
        imatrix.slice(path, out, {0: [0], 1: [0]}, experts=8)
    old = put(tmp_path, legacy([(UP, 1, np.ones(8))]))
    with pytest.raises(BadPlan, match="it does not say how many"):
        imatrix.slice(old, out, {0: [1]})
    imatrix.write(out, {"x": ([1], 1)})
    with pytest.raises(BadPlan, match="without experts"):
        imatrix.slice(out, tmp_path / "y.gguf", {0: [0]})
    assert sorted(os.listdir(tmp_path)) == ["out.gguf", "x.gguf", "x.imatrix"]


def test_a_legacy_file_is_sliced_into_gguf(tmp_path):
    old = put(tmp_path, legacy([(UP, 3, [1, 2, 3, 4, 5, 6]), ("blk.0.attn_q.weight", 3, [1, 2, 3])]))
    imatrix.slice(old, tmp_path / "out.gguf", {0: [2, 0]}, experts=3)
    with imatrix.open(tmp_path / "out.gguf") as m, imatrix.open(old) as before:
        assert m.format == "gguf" and same(m.importance(UP), before.importance(UP)[[0, 1, 4, 5]])


def test_experts_that_share_a_chunk_expert_are_sliced_together(tmp_path):
    path, out = tmp_path / "x.gguf", tmp_path / "out.gguf"
    chunks = "blk.0.ffn_up_chexps.weight"
    imatrix.write(path, {UP: (np.arange(6), np.ones(6)), chunks: (np.arange(3), np.ones(3))})
    imatrix.slice(path, out, {0: [0, 1, 4, 5]})
    with imatrix.open(out) as m:
        assert m.sums(UP).tolist() == [0, 1, 4, 5] and m.sums(chunks).tolist() == [0, 2]
    with pytest.raises(BadPlan, match="share one chunk expert"):
        imatrix.slice(path, out, {0: [0, 1, 4]}, overwrite=True)


# --- coverage and the command line ----------------------------------------------------------------------------------


def test_coverage_names_the_experts_never_seen(tmp_path):
    path = tmp_path / "x.gguf"
    imatrix.write(
        path,
        {
            UP: (np.ones((4, 2)), [5, 0, 7, 0]),
            "blk.0.ffn_down_exps.weight": (np.ones((4, 2)), [5, 0, 7, 1]),
            "blk.1.ffn_up_exps.weight": (np.ones((4, 2)), [1, 2, 3, 4]),
            "a": (np.ones(2), 12),
        },
        datasets=["d"],
        chunk_count=2,
        chunk_size=6,
    )
    with imatrix.open(path) as m:
        data = json.loads(json.dumps(imatrix.coverage(m)))
    assert data["layers"] == [
        {"layer": 0, "experts": 4, "seen": 2, "least": 0, "most": 7, "never": [1, 3], "tokens": [5, 0, 7, 0]},
        {"layer": 1, "experts": 4, "seen": 4, "least": 1, "most": 4, "never": [], "tokens": [1, 2, 3, 4]},
    ]
    assert data["entries"][0] == {"name": "a", "size": 2, "rows": 1, "least": 12, "most": 12}
    assert (data["format"], data["datasets"], data["chunk_count"], data["chunk_size"]) == ("gguf", ["d"], 2, 6)
    with imatrix.open(put(tmp_path, ONE)) as m:
        data = imatrix.coverage(m)
    assert data["layers"] == []
    assert data["entries"] == [{"name": "ab", "size": 2, "rows": 1, "least": None, "most": None}]


class Args:
    json = full = force = False
    chunk_size = experts = None

    def __init__(self, **given):
        self.__dict__.update({k: str(v) if k in ("input", "output", "by") else v for k, v in given.items()})


def test_the_commands(tmp_path, capsys):
    path, out, kept = tmp_path / "x.gguf", tmp_path / "out.gguf", tmp_path / "kept.json"
    imatrix.write(path, {UP: (np.ones((4, 2)), [5, 0, 7, 0])}, datasets=["d.txt"], chunk_count=2, chunk_size=6)
    assert cli.show(Args(input=path)) == 0
    shown = capsys.readouterr()
    assert "2 chunks of 6 tokens" in shown.out and "2 of 4" in shown.out and "1, 3" in shown.out and shown.err == ""
    assert cli.show(Args(input=path, json=True)) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["never"] == [1, 3]
    kept.write_text('{"kept": {"0": [0, 2], "5": [1]}, "metric": "frequency"}')
    assert cli.slice(Args(input=path, output=out, by=kept)) == 0
    shown = capsys.readouterr()
    assert "2 of 2" in shown.out and "without an entry: 5" in shown.err
    pruned = tmp_path / "pruned.gguf"
    keys = {"pgs.source.experts": Value(4, "u32"), "pgs.experts.0.kept": Value([0, 2], "u32[]")}
    write_gguf(pruned, {"general.architecture": Value("x", "str"), **keys}, {"t": np.zeros(1, np.float32)})
    before = tmp_path / "before.gguf"
    before.write_bytes(out.read_bytes())
    with pytest.raises(FileExistsError) as caught:
        cli.slice(Args(input=path, output=out, by=pruned))
    assert caught.value.errno == errno.EEXIST and "--force" in str(caught.value)
    assert cli.slice(Args(input=path, output=out, by=pruned, force=True)) == 0 and contents_equal(out, before)
    assert cli.merge(Args(inputs=[str(path), str(path)], output=tmp_path / "sum.gguf")) == 0
    assert cli.convert(Args(input=path, output=tmp_path / "x.dat")) == 0
    assert "lost how often" in capsys.readouterr().out
    assert contents(tmp_path / "sum.gguf")[0][UP][1].tolist() == [10, 0, 14, 0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"kept": [1]}',
        '{"kept": {"x": [1]}}',
        '{"kept": {"0": 1}}',
        '{"kept": {"0": ["1"]}}',
        '{"kept": {"0": [true]}}',
        '{"scores": {"0": [1.0]}}',
    ],
)
def test_a_list_of_experts_must_be_one(tmp_path, text):
    (tmp_path / "kept.json").write_text(text)
    with pytest.raises(BadPlan, match="not a list of experts"):
        cli.read_kept(str(tmp_path / "kept.json"))


def test_an_unpruned_model_is_no_list_of_experts(tmp_path):
    path = tmp_path / "m.gguf"
    write_gguf(path, {"general.architecture": Value("x", "str")}, {"t": np.zeros(1, np.float32)})
    with pytest.raises(BadPlan, match="does not say which experts it kept"):
        cli.read_kept(str(path))


@pytest.mark.parametrize("chunk_size", [0, -1, 2**31])
def test_merge_refuses_what_is_no_chunk_size(tmp_path, chunk_size):
    imatrix.write(tmp_path / "a.gguf", {UP: (np.ones(4), [1, 2])})
    with pytest.raises(BadPlan, match="not a chunk size"):
        imatrix.merge([tmp_path / "a.gguf"], tmp_path / "out.gguf", chunk_size=chunk_size)


@pytest.mark.parametrize("experts", [0, -1])
def test_slice_refuses_what_is_no_number_of_experts(tmp_path, experts):
    imatrix.write(tmp_path / "a.gguf", {UP: (np.ones(4), [1, 2])})
    with pytest.raises(BadPlan, match="not a number of experts"):
        imatrix.slice(tmp_path / "a.gguf", tmp_path / "out.gguf", {0: [0]}, experts=experts)


@pytest.mark.parametrize(
    "metadata",
    [
        {"pgs.experts.0.kept": Value("abc", "str")},
        {"pgs.experts.0.kept": Value(3, "u32")},
        {"pgs.experts.0.kept": Value([0.5], "f32[]")},
        {"pgs.experts.0.kept": Value([True], "bool[]")},
        {"pgs.experts.0.kept": Value([0], "u32[]"), "pgs.layers.kept": Value(3, "u32")},
        {"pgs.experts." + "9" * 5000 + ".kept": Value([0], "u32[]")},
    ],
)
def test_a_pruned_model_with_nonsense_for_its_kept_experts(tmp_path, metadata):
    path = tmp_path / "m.gguf"
    write_gguf(
        path,
        {"general.architecture": Value("llama", "str"), **metadata},
        {"x": (np.ones(32, np.float32), "F32", (32,))},
    )
    with pytest.raises((BadFile, BadPlan)) as caught:
        cli.read_kept(str(path))
    assert caught.value.path == str(path)
