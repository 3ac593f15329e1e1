"""write_gguf and read_gguf: a small file in one call."""

import os

import numpy as np
import pytest

from pygguf_surgery._core import Source, Value, read_header
from pygguf_surgery.base.errors import BadFile, BadPlan
from pygguf_surgery.files.gguf import read_gguf, write_gguf
from support import gguf_files
from support.places import SHARED

METADATA = {
    "general.architecture": Value("test", "str"),
    "test.block_count": Value(2, "u32"),
    "test.words": Value(["a", "é"], "str"),
    "test.empty": Value([], "f32"),
}


def test_round_trip_of_numpy_types(tmp_path):
    tensors = {
        dtype: np.arange(24).reshape(2, 3, 4).astype(dtype)
        for dtype in ("float32", "float16", "float64", "int8", "int16", "int32", "int64")
    }
    tensors |= {"scalar": np.array(1.5, np.float32), "none": np.zeros((0, 3), np.float32)}
    write_gguf(tmp_path / "a.gguf", METADATA, tensors)
    metadata, read = read_gguf(tmp_path / "a.gguf")
    assert metadata == METADATA and list(metadata) == list(METADATA)
    assert list(read) == list(tensors)
    for name, array in tensors.items():
        assert read[name].dtype == array.dtype and read[name].shape == array.shape
        assert np.array_equal(read[name], array)
    assert read_header(Source(str(tmp_path / "a.gguf")), strict=True).version == 3


def test_gguf_py_reads_it(tmp_path):
    tensors = {"f": np.arange(6, dtype=np.float32).reshape(2, 3), "h": np.ones(3, np.float16)}
    quantized = np.arange(4 * 34, dtype=np.uint8).reshape(2, 2, 34)
    write_gguf(
        tmp_path / "a.gguf",
        {"general.architecture": Value("test", "str"), "k": Value([1, 2], "i16")},
        {**tensors, "q": (quantized, "Q8_0", (2, 2, 32))},
    )
    metadata, read = gguf_files.read_gguf(tmp_path / "a.gguf")
    assert metadata == {"general.architecture": "test", "k": [1, 2]}
    for name, array in tensors.items():
        assert np.array_equal(read[name][1], array)
    assert read["q"][0] == "Q8_0" and np.array_equal(read["q"][1], quantized)


def test_other_types_are_rows_of_bytes(tmp_path):
    quantized = np.arange(4 * 34, dtype=np.uint8).reshape(2, 2, 34)
    half = np.arange(6, dtype=np.uint8)
    write_gguf(
        tmp_path / "a.gguf",
        {},
        {"q": (quantized, "q8_0", (2, 2, 32)), "b": (half, "BF16", (3,)), "s": (half[:2], "BF16", ())},
    )
    _, read = read_gguf(tmp_path / "a.gguf")
    assert np.array_equal(read["q"], quantized)
    assert np.array_equal(read["b"], half) and np.array_equal(read["s"], half[:2])


def test_not_contiguous_and_big_endian_arrays(tmp_path):
    array = np.arange(12, dtype=">f4").reshape(3, 4).T
    write_gguf(tmp_path / "a.gguf", {}, {"t": array})
    assert np.array_equal(read_gguf(tmp_path / "a.gguf")[1]["t"], array)


def pieces():
    for i in range(4):
        yield np.full((2, 4), i, np.float32)
        yield b""


@pytest.mark.parametrize(
    "data",
    [
        pieces,
        pieces(),
        [piece.tobytes() if hasattr(piece, "tobytes") else piece for piece in pieces()],
        np.repeat(np.arange(4), 8).astype("f4"),
    ],
    ids=["function", "generator", "list of bytes", "array"],
)
def test_data_in_pieces(tmp_path, data):
    write_gguf(
        tmp_path / "a.gguf",
        {},
        {"before": np.ones(3, np.float32), "t": (data, "F32", (8, 4)), "after": np.ones(3, np.float32)},
    )
    _, read = read_gguf(tmp_path / "a.gguf")
    assert np.array_equal(read["t"], np.repeat(np.arange(4), 8).reshape(8, 4))
    assert np.array_equal(read["before"], np.ones(3)) and np.array_equal(read["after"], np.ones(3))


@pytest.mark.parametrize(("shape", "problem"), [((8, 3), "longer"), ((8, 5), "shorter")])
def test_data_of_another_size_leaves_nothing(tmp_path, shape, problem):
    with pytest.raises(BadPlan, match=problem):
        write_gguf(tmp_path / "a.gguf", {}, {"t": (pieces, "F32", shape)})
    assert os.listdir(tmp_path) == []


def test_an_error_while_producing_leaves_the_old_file(tmp_path):
    write_gguf(tmp_path / "a.gguf", METADATA, {})
    old = (tmp_path / "a.gguf").read_bytes()

    def broken():
        yield np.zeros(8, np.float32)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_gguf(tmp_path / "a.gguf", {}, {"t": (broken, "F32", (16,))}, overwrite=True)
    assert os.listdir(tmp_path) == ["a.gguf"] and (tmp_path / "a.gguf").read_bytes() == old


def test_an_existing_file_needs_overwrite(tmp_path):
    write_gguf(tmp_path / "a.gguf", METADATA, {})
    with pytest.raises(FileExistsError):
        write_gguf(tmp_path / "a.gguf", {}, {})
    assert read_gguf(tmp_path / "a.gguf")[0] == METADATA
    write_gguf(tmp_path / "a.gguf", {}, {}, overwrite=True)
    assert read_gguf(tmp_path / "a.gguf") == ({}, {})


def test_alignment_is_declared(tmp_path):
    write_gguf(tmp_path / "a.gguf", {}, {"a": np.ones(1, np.float32), "b": np.ones(1, np.float32)}, alignment=128)
    header = read_header(Source(str(tmp_path / "a.gguf")), strict=True)
    assert header.alignment == 128 and [t.offset for t in header.tensors] == [0, 128]
    assert dict(header.metadata)["general.alignment"] == Value(128, "u32")


def test_array_type_that_ggml_lacks(tmp_path):
    with pytest.raises(BadPlan) as caught:
        write_gguf(tmp_path / "a.gguf", {}, {"t": np.ones(3, np.uint16)})
    assert caught.value.object == "t" and caught.value.found == "uint16"
    assert os.listdir(tmp_path) == []


def test_read_refuses_a_broken_file(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadFile):
        read_gguf(tmp_path / "a.gguf")


@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="needs the shared models")
@pytest.mark.parametrize("name", ["tiny-qwen3next-bf16.gguf", "imatrix.gguf"])
def test_real_files_are_canonical(name, tmp_path):
    """A file of llama.cpp's own tools: read without a warning, written again byte for byte."""
    path = SHARED / "models" / name
    source = Source(str(path))
    header = read_header(source, strict=True)
    kinds = {t.name: t.type for t in header.tensors}
    from pygguf_surgery._core import types

    names = {fact.id: fact.name for fact in types()}
    tensors = {
        t.name: (source.read(header.data_offset + t.offset, t.nbytes), names[kinds[t.name]], t.ne[::-1])
        for t in header.tensors
    }
    write_gguf(tmp_path / "again.gguf", dict(header.metadata), tensors, alignment=header.alignment)
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_paths_of_any_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("a.gguf", b"b.gguf", tmp_path / "c.gguf"):
        write_gguf(path, {"general.architecture": Value("test", "str")}, {})
        assert read_gguf(path)[0] == {"general.architecture": Value("test", "str")}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf", "b.gguf", "c.gguf"]
