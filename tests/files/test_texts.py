"""Texts as people give them: paths, bytes, token ids; and everything that is none."""

import array
import codecs
import hashlib
import os
import re
import threading
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import pygguf_surgery as pgs
from pygguf_surgery.base.errors import SurgeryWarning
from pygguf_surgery.files import texts as module
from pygguf_surgery.files.texts import GivenText, check_list, read_texts

TEXT = "Ein Text,\nzwei Zeilen: ä, 漢字, 🦆.\n"
UTF8 = TEXT.encode()
IDS = [0, 1, 300, 99_999, 2**31 - 1]


def read(text):
    check_list([text])
    return read_texts([text])[0]


def digest(data):
    return hashlib.sha256(data).hexdigest()


# --- text -----------------------------------------------------------------------------------------------------------


def test_every_form_of_a_text_is_the_same_text(tmp_path):
    (tmp_path / "text").write_bytes(UTF8)
    strided = memoryview(bytes(b for c in UTF8 for b in (c, 0)))[::2]
    for given_as in (str(tmp_path / "text"), tmp_path / "text", UTF8, bytearray(UTF8), memoryview(UTF8), strided):
        text = read(given_as)
        assert (text.content, text.sha256) == (UTF8, digest(UTF8)) and type(text.content) is bytes
    assert read(tmp_path / "text").path == str(tmp_path / "text") == read(tmp_path / "text").name
    assert (read(UTF8).path, read(UTF8).name) == (None, "texts[0]")
    assert read(text) is text


def test_a_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(UTF8))
    writer.start()
    assert read(tmp_path / "pipe").content == UTF8
    writer.join()


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("piece", [4, 7, 1 << 20])
def test_what_its_byte_order_mark_tells_is_converted(tmp_path, monkeypatch, encoding, piece):
    monkeypatch.setattr(module, "_PIECE", piece)
    raw = ("\ufeff" + TEXT).encode(encoding)
    (tmp_path / "text").write_bytes(raw)
    for given_as, name in ((tmp_path / "text", str(tmp_path / "text")), (raw, "texts[0]")):
        with pytest.warns(SurgeryWarning, match=re.escape(f"{name}: {encoding.upper()}, converted to UTF-8")):
            text = read(given_as)
        assert (text.content, text.sha256) == (UTF8, digest(UTF8))
    with pytest.raises(pgs.BadFile) as error:
        read(raw[:-1])
    assert error.value.problem == f"not a text in {encoding.upper()}" and error.value.offset < len(raw)


def test_a_mark_of_utf_8_is_left_out():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(codecs.BOM_UTF8 + UTF8).content == UTF8


@given(raw=st.binary(max_size=40) | st.text(max_size=20).map(str.encode), piece=st.integers(4, 50))
@example(raw=b"abc\xe6\xbc", piece=4)
@example(raw=codecs.BOM_UTF8 + b"abc\xff", piece=4)
def test_where_a_text_is_not_utf_8(raw, piece):
    module_piece, module._PIECE = module._PIECE, piece
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SurgeryWarning)
            text, error = read(raw), None
    except pgs.BadFile as found:
        text, error = None, found
    finally:
        module._PIECE = module_piece
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        return
    try:
        raw.decode()
    except UnicodeDecodeError as expected:
        assert error is not None and (error.problem == "not a text" or error.offset == expected.start)
    else:
        if error is None:
            assert text.content == raw.removeprefix(codecs.BOM_UTF8)
        else:
            assert error.problem in ("not a text", "an empty text") and error.path is None


@pytest.mark.parametrize(
    "raw, problem, hint",
    [
        (b"", "an empty text", None),
        (codecs.BOM_UTF8, "an empty text", None),
        (b"GGUF\3\0\0\0" + bytes(100), "a GGUF file", "the model comes first"),
        (b"text \xe4 text", "not a text in UTF-8", "save it as UTF-8"),
        (TEXT.encode("latin-1", "ignore"), "not a text in UTF-8", "save it as UTF-8"),
        ("Plain words.\n".encode("utf-16-le") * 9, "not a text", "UTF-16 without a byte order mark"),
        ("Plain words \u00e4.\n".encode("utf-16-be") * 9, "not a text", "UTF-16 without a byte order mark"),
        (b"a" * 998 + b"\0", "not a text", None),
        (b"a" * 98 + b"\7", "not a text", None),
        (bytes(5000), "not a text", None),
        (("\ufeff" + "a" * 998 + "\0").encode("utf-16-le"), "not a text", None),
    ],
)
def test_what_is_no_text(tmp_path, raw, problem, hint):
    (tmp_path / "text").write_bytes(raw)
    for given_as, path, object in ((tmp_path / "text", str(tmp_path / "text"), None), (raw, None, "texts[0]")):
        with pytest.raises(pgs.BadFile) as error:
            read(given_as)
        assert error.value.problem.startswith(problem) and (error.value.path, error.value.object) == (path, object)
        assert (hint or "") in (error.value.hint or "") and (error.value.hint is None) == (hint is None)


def test_what_is_a_text_all_the_same():
    for raw in (
        b"a" * 999 + b"\0",
        b"a" * 99 + b"\7",
        b"\x1b[1mred\x1b[0m\t\f\r\n" * 9,
        b"GGUF is a format",
        "\u0085\u200b\ufeffx".encode(),
    ):
        assert read(raw).content == raw


def test_what_is_no_text_is_found_without_reading_all_of_it():
    tracemalloc.start()
    with pytest.raises(pgs.BadFile, match="NUL"):
        read("/dev/zero")
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(IsADirectoryError):
        read(tmp_path)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")
    for path in ("a\0b", "\udfff\ud800"):
        with pytest.raises(pgs.BadPlan, match="not a valid path"):
            read(path)


# --- token ids ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids",
    [
        tuple(IDS),
        array.array("i", IDS),
        array.array("Q", IDS),
        [np.int64(i) for i in IDS],
        [np.uint32(IDS[0]), *IDS[1:]],
        np.array(IDS, object),
        np.array([[i, 7] for i in IDS])[:, 0],
        *(np.array(IDS, dtype) for dtype in ("<i4", ">i4", "<u4", "<i8", ">i8", "<u8")),
    ],
    ids=repr,
)
def test_every_form_of_token_ids_is_the_same_text(ids):
    text = read(ids)
    assert text.content.dtype == np.int32 and text.content.tolist() == IDS
    assert text.sha256 == digest(b"".join(i.to_bytes(4, "little") for i in IDS))


def test_small_token_ids_of_every_size():
    expected = read(list(range(3, 100, 2))).sha256
    for ids in (range(3, 100, 2), array.array("b", range(3, 100, 2)), *(np.arange(3, 100, 2, d) for d in "bBhHiIlLqQ")):
        assert read(ids).sha256 == expected


@pytest.mark.parametrize(
    "ids",
    [
        [1.5, 2],
        [1.0, 2],
        [True, False],
        [3, np.True_],
        ["1", "2"],
        ["a path.txt"],
        [b"text"],
        [None],
        [-1],
        [3, 2**31],
        [2**70],
        [[1, 2], [3, 4]],
        [[1, 2], [3]],
        np.array([1.0]),
        np.array([True]),
        np.array(["1"]),
        np.array([[1, 2]]),
        np.array(5),
        np.array([1.5, None], object),
        np.array([-1], np.int8),
        np.array([2**63], np.uint64),
        np.empty(0),
        array.array("f", [1]),
        array.array("u", "ab"),
        memoryview(array.array("i", [1])),
        {1: 2},
        {1, 2},
        iter([1]),
        5,
        5.5,
        None,
        object(),
    ],
    ids=repr,
)
def test_what_is_no_token_ids(ids):
    with pytest.raises(pgs.BadPlan) as error:
        read(ids)
    assert error.value.object == "texts[0]" and error.value.found is not None and "\n" not in str(error.value)


def test_the_first_wrong_id_is_named():
    with pytest.raises(pgs.BadPlan, match=r"found float 2.5 at 3,"):
        read([1, 2, 3, 2.5, -7])
    with pytest.raises(pgs.BadPlan, match=r"found .*-7.* at 1,"):
        read(np.array([1, -7, 3]))


def test_a_released_view_is_no_text():
    view = memoryview(b"text")
    view.release()
    with pytest.raises(pgs.BadPlan, match="not bytes of UTF-8"):
        read(view)


# --- several --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "texts",
    [
        "text",
        Path("text"),
        b"text",
        bytearray(b"text"),
        memoryview(b"text"),
        np.arange(4),
        {"text"},
        iter("text"),
        None,
        5,
    ],
    ids=repr,
)
def test_one_text_is_no_list(texts):
    for call in (check_list, lambda texts: pgs.experts.calibrate("no model", texts)):
        with pytest.raises(pgs.BadPlan, match="put it in a list"):
            call(texts)


def test_ids_without_a_list_around_them():
    for ids in ([300, 301], range(4), array.array("i", [1])):
        with pytest.raises(pgs.BadPlan, match="a list in the list"):
            read_texts(ids)


def test_the_same_text_twice(tmp_path):
    (tmp_path / "text").write_bytes(UTF8)
    for texts in ([tmp_path / "text", UTF8], [[1, 2], np.array([1, 2], np.int64)]):
        with pytest.raises(pgs.BadPlan, match="the same text twice"):
            read_texts(texts)


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3)
OBJECTS = st.recursive(
    SCALARS | st.binary() | st.integers(0, 2**31 - 1),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.sets(SCALARS, max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=2)
        | st.lists(st.integers() | st.floats() | st.booleans(), min_size=1, max_size=4).map(
            lambda x: np.array(x, object if any(type(i) is int and abs(i) > 2**62 for i in x) else None)
        )
    ),
    max_leaves=8,
)


@given(st.lists(OBJECTS, max_size=3) | OBJECTS)
def test_anything_else_is_an_error_of_ours(texts):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurgeryWarning)
        try:
            check_list(texts)
            found = read_texts(texts)
        except (pgs.SurgeryError, OSError):
            return
    assert len(found) == len(texts)
    for text, given_as in zip(found, texts, strict=True):
        assert isinstance(text, GivenText) and len(text.sha256) == 64
        if isinstance(text.content, np.ndarray):
            assert text.content.tolist() == [int(i) for i in given_as] and (text.content >= 0).all()
        else:
            assert text.content.decode()
