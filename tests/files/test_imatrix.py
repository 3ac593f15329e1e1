"""Importance matrices: both formats read as llama-quantize reads them, written as llama-imatrix writes them."""

import contextlib
import os
import struct
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pygguf_surgery import BadFile, BadPlan, SurgeryError, imatrix
from pygguf_surgery.files import imatrix as files
from support.gguf_bytes import gguf as build
from support.gguf_bytes import info, kv
from support.imatrices import LEGACY, METADATA, ONE, REAL, UP, by_hand, contents, legacy, put, real, same, trailer
from support.strategies import DATASETS, ENTRIES, ENTRY_NAMES, entry


def refused(path):
    with pytest.raises(BadFile) as caught:
        imatrix.open(path)
    return caught.value


# --- read and write -------------------------------------------------------------------------------------------------


@given(entries=ENTRIES, datasets=DATASETS, chunks=st.integers(0, 2**32 - 1), size=st.integers(0, 2**32 - 1))
def test_what_is_written_is_read(tmp_path, entries, datasets, chunks, size):
    path = tmp_path / "x.gguf"
    imatrix.write(path, entries, datasets=datasets, chunk_count=chunks, chunk_size=size, overwrite=True)
    with imatrix.open(path) as m:
        assert (m.format, m.datasets, m.chunk_count, m.chunk_size) == ("gguf", datasets, chunks, size)
        assert list(m.entries) == sorted(entries, key=str.encode)
        for name, (sums, counts) in entries.items():
            assert same(m.sums(name), sums.ravel()) and same(m.entries[name].counts, counts)
            with np.errstate(divide="ignore", invalid="ignore"):
                expected = np.where(counts[:, None] > 0, sums / counts[:, None], np.float32(1))
            assert same(m.importance(name), expected.ravel())
            k = sums.shape[1]
            assert m.entries[name].rows(k) == len(counts)
            assert [m.entries[name].divisor(r, k) for r in range(len(counts))] == counts.tolist()
            assert m.unseen(name, k) == [r for r in range(len(counts)) if counts[r] == 0]
        digest = m.digest
    found, metadata = contents(path)  # gguf-py agrees
    assert all(same(found[n][0].ravel(), s.ravel()) and same(found[n][1], c) for n, (s, c) in entries.items())
    assert list(metadata) == ["general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"]
    with imatrix.open(path) as m:
        assert m.digest == digest
        again = {n: ((e.size, lambda n=n: m.pieces(n)), e.counts) for n, e in m.entries.items()}
        imatrix.write(
            tmp_path / "y.gguf",
            again,
            datasets=m.datasets,
            chunk_count=m.chunk_count,
            chunk_size=m.chunk_size,
            overwrite=True,
        )
    assert (tmp_path / "y.gguf").read_bytes() == path.read_bytes()


@given(
    entries=st.dictionaries(ENTRY_NAMES, st.tuples(st.integers(-2, 2**31 - 1), entry()), min_size=1, max_size=4),
    end=st.sampled_from([b"", struct.pack("<i", 7), trailer(7, ""), trailer(7, "é.txt")]),
)
def test_legacy_files_are_read(tmp_path, entries, end):
    data = legacy([(n, calls, sums.ravel()) for n, (calls, (sums, _)) in entries.items()], end)
    with imatrix.open(put(tmp_path, data)) as m:
        assert m.format == "legacy" and m.chunk_count == (7 if end else 0)
        assert m.datasets == (["é.txt"] if len(end) > 8 else []) and m.chunk_size == 0
        assert set(m.entries) == set(entries)
        for name, (calls, (sums, _)) in entries.items():
            expected = sums.ravel() / np.float32(calls) if calls > 0 else sums.ravel()
            assert same(m.importance(name), expected)
            assert m.entries[name].divisor(0, sums.shape[1]) == (float(np.float32(calls)) if calls > 0 else 1.0)


@real
def test_the_real_files():
    reader = gguf.GGUFReader(str(REAL))
    tensors = {t.name: np.array(t.data, np.float32) for t in reader.tensors}
    with imatrix.open(REAL) as m, imatrix.open(LEGACY) as old:
        assert len(m.entries) == len(old.entries) == len(tensors) // 2 == 48
        assert (m.datasets, m.chunk_count, m.chunk_size, old.datasets) == (["calib.txt"], 367, 256, ["calib.txt"])
        assert m.digest != old.digest
        for name, e in m.entries.items():
            counts = tensors[name + ".counts"].reshape(-1, 1)
            expected = (tensors[name + ".in_sum2"].reshape(len(counts), -1) / counts).ravel()
            assert same(m.importance(name), expected)
            np.testing.assert_allclose(old.importance(name), expected, rtol=3e-7)
            assert m.problem(name) is None and m.zero_rows(name, 256) == [] and m.unseen(name, 256) == []
            assert e.rows(256) == len(counts)
            mean = tensors[name + ".in_sum2"].reshape(-1, 256).astype(np.float64).sum(axis=0) / counts.sum(dtype=float)
            np.testing.assert_array_equal(m.mean_row(name, 256), mean.astype(np.float32))


@real
def test_writing_gives_the_bytes_of_llama_imatrix(tmp_path):
    with imatrix.open(REAL) as m:
        imatrix.write(
            tmp_path / "a.gguf",
            {n: (m.sums(n), e.counts) for n, e in m.entries.items()},
            datasets=m.datasets,
            chunk_count=m.chunk_count,
            chunk_size=m.chunk_size,
        )
    assert (tmp_path / "a.gguf").read_bytes() == REAL.read_bytes()
    imatrix.convert(REAL, tmp_path / "a.dat", chunk_size=512)  # llama-imatrix with its default context made the .dat
    assert (tmp_path / "a.dat").read_bytes() == LEGACY.read_bytes()


def test_counts_are_rounded_as_llama_quantize_does(tmp_path):
    data = by_hand([("x.in_sum2", (2, 4), np.arange(8)), ("x.counts", (1, 4), [0.49, 0.5, 2.5, 1e7 + 1])])
    with imatrix.open(put(tmp_path, data)) as m:
        assert m.entries["x"].counts.tolist() == [0, 1, 3, 1e7 + 1]
        assert m.entries["x"].divisor(1, 2) == 1.0 and m.entries["x"].divisor(0, 2) == 0.0
        assert m.importance("x").tolist()[:6] == [1, 1, 2, 3, np.float32(4) / 3, np.float32(5) / 3]


def test_one_count_serves_all_rows_and_rows_must_fit_the_counts(tmp_path):
    path = tmp_path / "x.gguf"
    imatrix.write(path, {"one": (np.ones(12), 4), "three": (np.ones((3, 4)), [1, 2, 3])})
    with imatrix.open(path) as m:
        assert m.entries["one"].rows(4) == 3 and [m.entries["one"].divisor(r, 4) for r in range(3)] == [4, 4, 4]
        assert m.entries["three"].rows(2) == 6
        assert [m.entries["three"].divisor(r, 2) for r in range(6)] == [1, 1, 2, 2, 3, 3]
        for name, row in (("one", 5), ("three", 12), ("three", 6), ("one", 0)):
            with pytest.raises(BadPlan) as caught:
                m.entries[name].rows(row)
            assert caught.value.object == name and caught.value.expected == f"rows of {row}"


def test_the_mean_leaves_out_what_was_never_seen(tmp_path):
    path = tmp_path / "x.gguf"
    imatrix.write(path, {"x": ([[2, 4], [9, 9], [6, 8]], [1, 0, 3]), "none": (np.zeros((2, 2)), [0, 0])})
    with imatrix.open(path) as m:
        assert m.mean_row("x", 2).tolist() == [2, 3]
        assert m.mean_row("none", 2).tolist() == [1, 1]
    # A legacy file marks what was never seen: the number of chunks in each column.
    with imatrix.open(put(tmp_path, legacy([("x", 2, [2, 4, 2, 2, 6, 8]), ("dense", 2, [2, 2])]))) as m:
        assert m.unseen("x", 2) == [1] and m.unseen("dense", 2) == []
        assert m.mean_row("x", 2).tolist() == [2, 3]


@pytest.mark.parametrize("piece", [8, 16, 1 << 24])
def test_sums_are_streamed_in_pieces(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(files, "_PIECE", piece)
    sums = np.arange(1, 25, dtype=np.float32).reshape(6, 4)
    sums[2] = 0
    path = tmp_path / "x.gguf"
    imatrix.write(path, {"x": (sums, [1, 2, 3, 0, 5, 6])})
    with imatrix.open(path) as m:
        source, sizes = m.source, []
        m.source = SimpleNamespace(read=lambda at, n: sizes.append(n) or source.read(at, n), close=source.close)
        assert same(np.concatenate(list(m.pieces("x"))), sums.ravel())
        assert m.zero_rows("x", 4) == [2] and m.problem("x") is None
        assert m.mean_row("x", 4).tolist() == (sums[[0, 1, 2, 4, 5]].sum(axis=0) / np.float32(17)).tolist()
        assert max(sizes) <= max(piece, 16)


def test_the_digest_tells_two_texts_of_the_same_length_apart(tmp_path):
    digests = set()
    for i, sums in enumerate(([1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 4])):
        path = tmp_path / f"{i}.gguf"
        imatrix.write(path, {"x": (np.array(sums, np.float32), [3])}, datasets=["text"], chunk_count=1, chunk_size=3)
        with imatrix.open(path) as m:
            digests.add(m.digest)
    assert len(digests) == 2


def test_opening_reads_only_the_first_sums(tmp_path):
    path = tmp_path / "x.gguf"
    with open(path, "wb") as file:  # a hole of 64 GiB
        head = build(METADATA, [info("x.in_sum2", (2**34,)), info("x.counts", (1,), offset=2**36)])
        file.write(head)
        file.truncate(len(head) + 2**36)
        file.seek(len(head) + 2**36)
        file.write(np.float32(3).tobytes() + bytes(28))
    with imatrix.open(path) as m:
        assert m.entries["x"].size == 2**34 and m.entries["x"].counts.tolist() == [3]


# --- what is wrong with values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, text",
    [
        (np.nan, "importance that is not finite (found nan in element 5"),
        (np.inf, "importance that is not finite (found inf in element 5"),
        (-np.inf, "importance that is not finite (found -inf in element 5"),
        (-1, "importance that is negative (found -1.0 in element 5"),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_a_bad_value_is_named(tmp_path, value, text, old):
    values = np.ones(8, np.float32)
    values[5] = value
    values[7] = np.nan
    data = (
        legacy([(UP, 2, values)])
        if old
        else by_hand([(UP + ".in_sum2", (2, 4), values), (UP + ".counts", (1, 4), np.ones(4))])
    )
    path = put(tmp_path, data)
    with imatrix.open(path) as m:
        for _ in range(2):
            error = m.problem(UP)
            assert isinstance(error, BadFile) and f"{UP}: {text}" in str(error)
            assert np.array_equal(np.fromfile(path, "<f4", 1, offset=error.offset), [np.float32(value)], equal_nan=True)


def test_rows_of_zeros_are_listed_if_they_were_counted(tmp_path):
    path = tmp_path / "x.gguf"
    tiny = np.float32(1e-45)  # over 100 it is 0
    imatrix.write(path, {"x": ([[0, 0], [1, 0], [0, 0], [tiny, 0], [tiny, 0]], [5, 5, 0, 100, 1])})
    with imatrix.open(path) as m:
        assert m.zero_rows("x", 2) == [0, 3]
        assert m.unseen("x", 2) == [2]
        assert m.problem("x") is None


# --- files that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leave_out", ["imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"])
def test_missing_metadata_is_named(tmp_path, leave_out):
    kvs = [item for item in METADATA if leave_out.encode() not in item]
    error = refused(put(tmp_path, by_hand([("x.in_sum2", (1,), [1]), ("x.counts", (1,), [1])], kvs)))
    assert error.object == leave_out and error.problem == "missing metadata of an importance matrix"
    assert error.hint is None


def test_a_model_is_no_importance_matrix(tmp_path):
    error = refused(put(tmp_path, build([kv("general.architecture", "str", "llama")], [info("x")], bytes(128))))
    assert error.hint == "this is a model, not an importance matrix"


@pytest.mark.parametrize(
    "entries, object, problem",
    [
        ([("x.in_sum2", (2,), [1, 1])], "x.counts", "an entry without one of its two tensors"),
        ([("x.counts", (1,), [1])], "x.in_sum2", "an entry without one of its two tensors"),
        ([("x.in_sum2", (3,), [1, 1, 1]), ("x.counts", (1, 2), [1, 1])], "x", "sums and counts that do not fit"),
        ([("x.in_sum2", (1,), [1]), ("x.counts", (1, 2), [1, 1])], "x", "sums and counts that do not fit"),
        ([("x.in_sum2", (1,), [1]), ("x.counts", (1,), [-1])], "x.counts", "not a count"),
        ([("x.in_sum2", (1,), [1]), ("x.counts", (1,), [np.nan])], "x.counts", "not a count"),
        ([("x.in_sum2", (1,), [1]), ("x.counts", (1,), [np.inf])], "x.counts", "not a count"),
        ([("x.in_sum2", (1,), [1]), ("x.counts", (1,), [1e30])], "x.counts", "not a count"),
        ([("x", (1,), [1])], None, "an importance matrix without entries"),
        ([], None, "an importance matrix without entries"),
    ],
)
def test_contradictions_are_named(tmp_path, entries, object, problem):
    error = refused(put(tmp_path, by_hand(entries)))
    assert (error.object, error.problem) == (object, problem)


def test_only_f32_sums(tmp_path):
    data = build(METADATA, [info("x.in_sum2", (32,), 1), info("x.counts", (1,), offset=64)], bytes(96))
    assert refused(put(tmp_path, data)).object == "x.in_sum2"
    data = build(
        [*METADATA[:2], kv("imatrix.chunk_count", "str", "3"), *METADATA[3:]], [info("x.in_sum2", (1,))], bytes(32)
    )
    assert refused(put(tmp_path, data)).expected == "u32"


def test_other_tensors_are_a_warning(tmp_path):
    data = by_hand([("x.in_sum2", (1,), [1]), ("x.counts", (1,), [1]), ("y", (1,), [1])])
    with imatrix.open(put(tmp_path, data)) as m:
        assert m.warnings == ["1 tensors that are neither sums nor counts"] and list(m.entries) == ["x"]


@pytest.mark.parametrize(
    "data, found",
    [
        (b"", "an empty file"),
        (b"\1\0", None),
        (b"PK\3\4" + bytes(40), "a PyTorch or zip file"),
        (struct.pack("<Q", 60) + b'{"a": {}}' + bytes(60), "a safetensors file"),
        (b"lmgg" + bytes(30), "a model of 2023"),
        (b"Once upon a time there was", "text"),
        (struct.pack("<i", 0), None),
        (struct.pack("<i", -5) + bytes(99), None),
        (struct.pack("<ii", 1, 0) + bytes(30), None),
        (struct.pack("<ii", 2, 5) + b"short", None),
    ],
)
def test_files_of_other_kinds(tmp_path, data, found):
    error = refused(put(tmp_path, data))
    assert (error.problem, error.found) == ("not an importance matrix", found)
    assert error.expected == "a GGUF or .dat file of llama-imatrix"


@pytest.mark.parametrize(
    "data, offset, problem",
    [
        (ONE[:-1], 18, "the file ends inside an entry"),
        (ONE[:14] + struct.pack("<i", 0) + ONE[18:], 14, "an entry without values"),
        (ONE[:14] + struct.pack("<i", -1) + ONE[18:], 14, "an entry without values"),
        (ONE[:14] + struct.pack("<i", 2**31 - 1) + ONE[18:], 18, "the file ends inside an entry"),
        (legacy([("ab", 3, [1, 2]), ("ab", 3, [1, 2])]), 26, "duplicate entry"),
        (legacy([("ab", 3, [1, 2]), (b"a\0", 3, [1, 2])]), 26, "a name with a zero byte"),
        (legacy([("ab", 3, [1, 2]), ("", 3, [1, 2, 3])]), 26, "not a length"),
        (ONE + b"\1", 26, "the file ends inside an entry"),
        (ONE + trailer(1, "abc")[:-1], 34, "the file ends inside an entry"),
        (ONE + struct.pack("<ii", 1, -1), 30, "not a length"),
        (ONE + trailer(1, "abc") + b"\1", 37, "bytes after the end"),
    ],
)
def test_a_broken_legacy_file_is_an_error_with_its_byte(tmp_path, data, offset, problem):
    error = refused(put(tmp_path, data))
    assert (error.problem, error.offset) == (problem, offset)


def use_everything(path):
    with imatrix.open(path) as m:
        imatrix.coverage(m)
        for name, e in m.entries.items():
            m.importance(name), m.problem(name), m.zero_rows(name, e.size // len(e.counts))
            m.mean_row(name, e.size // len(e.counts))


@given(data=st.binary(max_size=200) | st.builds(lambda a, b: a + b, st.just(ONE[:8]), st.binary(max_size=60)))
def test_any_bytes_are_an_error_or_an_importance_matrix(tmp_path, data):
    with contextlib.suppress(BadFile):
        use_everything(put(tmp_path, data))


@given(old=st.booleans(), at=st.integers(0, 10**6), byte=st.integers(0, 255), end=st.none() | st.integers(0, 10**6))
@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")
def test_a_damaged_file_is_an_error_or_an_importance_matrix(tmp_path, old, at, byte, end):
    data = bytearray(
        legacy([("a", 3, [1, 2]), ("b", 4, [1, 2, 3])], trailer(1, "abc"))
        if old
        else by_hand([("x.in_sum2", (2, 4), np.arange(8)), ("x.counts", (1, 4), [0, 1, 2, 3])])
    )
    data[at % len(data)] = byte
    data = bytes(data[: end and end % len(data)])
    with contextlib.suppress(BadFile):
        use_everything(put(tmp_path, data))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError):
        imatrix.open(tmp_path / "none")
    with pytest.raises((SurgeryError, OSError)):
        imatrix.open(tmp_path)


def test_write_refuses_what_contradicts_itself(tmp_path):
    path = tmp_path / "x.gguf"
    for entries in (
        {},
        {"x": ([1, 2, 3], [1, 1])},
        {"x": ([], [])},
        {"x": ([1], [-1])},
        {"x": ([1], [np.nan])},
        {"x": ((4, lambda: [np.ones(3, np.float32)]), 1)},
        {"x": ((2, lambda: [np.ones(3, np.float32)]), 1)},
    ):
        with pytest.raises(BadPlan):
            imatrix.write(path, entries)
    assert os.listdir(tmp_path) == []
    imatrix.write(path, {"x": ([1], 1)})
    with pytest.raises(FileExistsError):
        imatrix.write(path, {"x": ([1], 1)})
