"""What the reader refuses (R), accepts (A), and accepts with a warning (W), case by case, on bytes made by hand."""

import os
import stat
import struct

import pytest

from pygguf_surgery._core import Source, read_header
from pygguf_surgery.base.errors import BadFile
from support import gguf_bytes as b
from support.gguf_bytes import F32, I8, Q4_0, gguf, header, info, kv, pad, string, u32, u64

A = kv("general.architecture", "str", "test")
T = info("t")  # one row of 32 float32
DATA = bytes(128)


def read(tmp_path, data, **options):
    path = tmp_path / "case.gguf"
    path.write_bytes(data)
    return read_header(Source(str(path)), **options)


def raw_kv(body, key="k"):
    return string(key) + body


def one(ne, kind=F32, **more):
    return [info("t", ne, kind, **more)]


REFUSED = {
    # name: (bytes, part of the problem, object, offset)
    "empty file": (b"", "empty", None, 0),
    "three bytes": (b"GGU", "not a GGUF", "magic", 0),
    "magic only": (b"GGUF", "ends inside its header", None, 0),
    "one byte short of a header": (header()[:-1], "ends inside its header", None, 0),
    "wrong magic": (header(magic=b"FUGG"), "not a GGUF", "magic", 0),
    "version 0": (gguf(version=0), "unknown GGUF version", "version", 4),
    "version 1": (gguf(version=1), "version 1", "version", 4),
    "version 4": (gguf(version=4), "unknown GGUF version", "version", 4),
    "version 2^32-1": (gguf(version=2**32 - 1), "unknown GGUF version", "version", 4),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian", "version", 4),
    # counts
    **{
        f"{field} {text}": (gguf([A], **{field: n}), "too short for this count", field, at)
        for field, at in (("n_tensors", 8), ("n_kv", 16))
        for text, n in (
            ("-1", -1),
            ("2^63-1", 2**63 - 1),
            ("2^63", 2**63),
            ("2^64/14+1", 2**64 // 14 + 1),
            ("2^64/24+1", 2**64 // 24 + 1),
            ("10^6", 10**6),
            ("10^9", 10**9),
        )
    },
    "counts that fit only one at a time": (
        header([kv("k", "str", "x" * 200)], n_tensors=8, n_kv=15),
        "too short for its keys and tensors",
        None,
        8,
    ),
    "n_kv one too many": (gguf([A], n_kv=2), "is empty", None, None),
    # keys
    "key length -1": (gguf([u64(-1) + bytes(40)]), "key runs past the end", "key 0", 24),
    "key length one beyond the file": (header([u64(21) + bytes(20)]), "key runs past the end", "key 0", 24),
    "key empty": (gguf([raw_kv(u32(0) + b"\1", "")]), "empty", None, 24),
    "key with NUL": (gguf([kv("a\0b", "u8", 1)]), "NUL", r"a\x00b", 24),
    "key not UTF-8": (gguf([kv(b"a\xff", "u8", 1)]), "not UTF-8", r"a\xff", 24),
    "key with a surrogate": (gguf([kv(b"\xed\xa0\x80", "u8", 1)]), "not UTF-8", None, 24),
    "key with an overlong form": (gguf([kv(b"\xc0\x80", "u8", 1)]), "not UTF-8", None, 24),
    "duplicate key": (gguf([A, kv("k", "u8", 1), kv("k", "u8", 2)]), "duplicate key", "k", None),
    "duplicate key of another type": (gguf([kv("k", "u8", 1), kv("k", "str", "x")]), "duplicate key", "k", None),
    # values
    "value type 13": (gguf([raw_kv(u32(13) + bytes(8))]), "unknown value type", "k", 33),
    "value type -1": (gguf([raw_kv(u32(-1) + bytes(8))]), "unknown value type", "k", 33),
    "file ends inside a value type": (header([string("general.architecture1") + b"\0"]), "ends inside", None, None),
    "file ends inside a u64": (header([kv("k", "u64", 7)])[:-1], "ends inside a value", "k", 37),
    "string length -1": (gguf([raw_kv(u32(8) + u64(-1))]), "string runs past the end", "k", 37),
    "string length wraps": (gguf([raw_kv(u32(8) + u64(2**64 - 45))]), "string runs past the end", "k", 37),
    "string one byte beyond the end": (header([kv("k", "str", "abc")])[:-1], "string runs past the end", "k", 37),
    # arrays
    "array of u64, n wraps": (gguf([raw_kv(u32(9) + u32(10) + u64(2**61 + 1) + bytes(8))]), "array runs past", "k", 41),
    "array of u8, n = 10^9": (gguf([raw_kv(u32(9) + u32(0) + u64(10**9))]), "array runs past", "k", 41),
    "array of u8, n = -1": (gguf([raw_kv(u32(9) + u32(0) + u64(-1))]), "array runs past", "k", 41),
    "array of strings, n = 2^61": (gguf([raw_kv(u32(9) + u32(8) + u64(2**61))]), "array runs past", "k", 41),
    "array one byte short": (header([kv("k", "u32[]", [1, 2, 3])])[:-1], "array runs past", "k", 41),
    "array of strings, last one beyond the end": (
        header([kv("k", "str[]", ["a", "bc"])])[:-1],
        "string runs past",
        "k",
        58,
    ),
    "array of arrays": (gguf([raw_kv(u32(9) + u32(9) + u64(1) + u32(0) + u64(0))]), "array of arrays", "k", 37),
    "array of arrays, empty": (gguf([raw_kv(u32(9) + u32(9) + u64(0))]), "array of arrays", "k", 37),
    "arrays nested 100 000 deep": (gguf([raw_kv(u32(9) + (u32(9) + u64(1)) * 100_000)]), "array of arrays", "k", 37),
    "unknown element type": (gguf([raw_kv(u32(9) + u32(13) + u64(1) + bytes(8))]), "unknown value type", "k", 37),
    "unknown element type, n = 0": (gguf([raw_kv(u32(9) + u32(99) + u64(0))]), "unknown value type", "k", 37),
    # alignment
    **{
        f"alignment {n}": (gguf([kv("general.alignment", "u32", n)]), "unusable alignment", "general.alignment", 53)
        for n in (0, 3, 13, 48, 2**20 + 1, 2**21, 2**31, 2**32 - 1)
    },
    **{
        f"alignment as {kind}": (
            gguf([kv("general.alignment", kind, value)]),
            "wrong value type",
            "general.alignment",
            49,
        )
        for kind, value in (
            ("i32", 32),
            ("u64", 32),
            ("u16", 32),
            ("f32", 32.0),
            ("str", "32"),
            ("bool", 1),
            ("u32[]", [32]),
        )
    },
    # tensor names and shapes
    "tensor name length -1": (gguf((), [u64(-1) + bytes(40)]), "tensor name runs past", "tensor 0", 24),
    "duplicate tensor": (gguf((), [T, info("t", offset=128)], bytes(256)), "duplicate tensor name", "t", None),
    "tensor name with NUL": (gguf((), [info("a\0b")], DATA), "NUL", None, 24),
    "tensor name not UTF-8": (gguf((), [info(b"\xfft")], DATA), "not UTF-8", None, 24),
    "5 dimensions": (gguf((), one((1,) * 5), bytes(32)), "too many dimensions", "t", 33),
    "2^32-1 dimensions": (gguf((), [string("t") + u32(-1) + bytes(60)]), "too many dimensions", "t", 33),
    "file ends inside the dimensions": (header((), one((1, 1, 1, 1)))[:49], "ends inside the dimensions", "t", 45),
    "dimension -1": (gguf((), one((-1,)), DATA), "negative dimension", "t", 33),
    "dimension -32 with a zero": (gguf((), one((0, -32)), DATA), "negative dimension", "t", 33),
    "product overflows": (gguf((), one((4, 1, 2**62, 2**62)), DATA), "overflow", "t", 33),
    "product overflows, F32 [4, 0, 2^62, 2^62]": (gguf((), one((4, 0, 2**62, 2**62)), DATA), "overflow", "t", 33),
    "product overflows, first dimension 0": (gguf((), one((0, 2**40, 2**40)), DATA), "overflow", "t", 33),
    "bytes overflow": (gguf((), one((2**62, 1)), DATA), "overflow", "t", 33),
    "bytes overflow with a zero": (gguf((), one((2**62, 0)), DATA), "overflow", "t", 33),
    "padding overflows": (gguf((), one((4, 2**30 - 1, 2**30 + 1)), DATA), "overflow", "t", None),
    "sum of sizes overflows": (
        gguf((), [info(f"t{i}", (2**63 - 64,), I8, (2**63 - 64) * (i % 2)) for i in range(3)], DATA),
        "overflow",
        "t1",
        None,
    ),
    # types
    **{f"type {n}": (gguf((), one((32,), n), DATA), "unknown tensor type", "t", 45) for n in (-1, 43, 999, 2**31 - 1)},
    **{
        f"removed type {n} {name}": (gguf((), one((32,), n), DATA), f"{name} was removed", "t", 45)
        for n, name in (
            (4, "Q4_2"),
            (5, "Q4_3"),
            (31, "Q4_0_4_4"),
            (32, "Q4_0_4_8"),
            (33, "Q4_0_8_8"),
            (36, "IQ4_NL_4_4"),
            (37, "IQ4_NL_4_8"),
            (38, "IQ4_NL_8_8"),
        )
    },
    "row no multiple of the block": (gguf((), one((33,), Q4_0), DATA), "multiple of the block", "t", 33),
    "row of 1, block of 32": (gguf((), one((1, 32), Q4_0), DATA), "multiple of the block", "t", 33),
    "scalar of a type with blocks": (gguf((), one((), Q4_0), DATA), "multiple of the block", "t", 33),
    # offsets
    "offset not aligned": (gguf((), one((32,), offset=4), DATA + bytes(32)), "not aligned", "t", 49),
    "offset 2^64-1": (gguf((), one((32,), offset=-1), DATA), "not aligned", "t", 49),
    "offset 2^64-32": (gguf((), one((32,), offset=-32), DATA), "overflow", "t", 49),
    "offset 2^63": (gguf((), one((32,), offset=2**63), DATA), "beyond the file", "t", 49),
    "offset beyond the end": (gguf((), one((32,), offset=256), DATA), "beyond the file", "t", 49),
    "0 bytes far beyond the end": (gguf((), one((0,), offset=2**40), b""), "beyond the end", "t", 49),
    "data one byte short": (gguf((), [T], DATA[:-1]), "beyond the file", "t", 49),
    "no data section": (gguf((), [T]), "no tensor data", "t", 49),
    "no data section and no header padding": (header((), [T]), "no tensor data", "t", 49),
    "overlap": (gguf((), [T, info("u", offset=96)], bytes(256)), "overlap", "u", None),
    "overlap inside": (gguf((), [T, info("u", (8,), offset=32)], bytes(256)), "overlap", "u", None),
    "overlap, out of order": (gguf((), [info("u", offset=96), T], bytes(256)), "overlap", "u", 49),
    "equal offsets": (gguf((), [T, info("u")], bytes(256)), "overlap", None, None),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    data, problem, object, offset = REFUSED[case]
    with pytest.raises(BadFile) as caught:
        read(tmp_path, data)
    error = caught.value
    assert problem in error.problem
    assert error.path == str(tmp_path / "case.gguf")
    assert error.offset is not None and 0 <= error.offset <= len(data)
    if object is not None:
        assert error.object == object
    if offset is not None:
        assert error.offset == offset


ACCEPTED = {
    "no keys, no tensors": gguf(),
    "no keys, no tensors, no padding": header(),
    "version 2": gguf([A], [T], DATA, version=2),
    "one of everything": gguf(
        [
            A,
            *(kv(f"k.{kind}", kind, 1) for kind in b.FORMATS if kind != "bool"),
            kv("k.bool", "bool", 1),
            kv("k.str", "str", "é"),
        ],
        [T],
        DATA,
    ),
    "string with NUL": gguf([kv("k", "str", "a\0b")]),
    "string empty": gguf([kv("k", "str", "")]),
    "array of strings with NUL": gguf([kv("k", "str[]", ["\0", "a\0"])]),
    "200 000 short strings": gguf([kv("k", "str[]", ["ab"] * 200_000)]),
    "array of long strings": gguf([kv("k", "str[]", ["é" * 200, "x" * 127, "x" * 128])]),
    **{f"empty array of {kind}": gguf([kv("k", f"{kind}[]", [])]) for kind in b.FORMATS | {"str": ""}},
    **{
        f"alignment {n}": gguf([kv("general.alignment", "u32", n)], [T], pad(DATA, n), alignment=n)
        for n in (1, 4, 32, 64, 4096, 2**20)
    },
    "scalar": gguf((), one(()), bytes(32)),
    "four dimensions": gguf((), one((2, 2, 2, 2)), bytes(64)),
    "a zero dimension": gguf((), one((4, 0)), b""),
    "a zero dimension and large ones": gguf((), one((4, 0, 2**30)), b""),
    "0 bytes between two tensors": gguf((), [T, info("z", (0,), offset=128), info("u", offset=128)], bytes(256)),
    "0 bytes at the end": gguf((), [T, info("z", (0,), offset=128)], DATA),
    "0 bytes inside another": gguf((), [T, info("z", (0,), offset=32)], DATA),
    "two of 0 bytes at one offset": gguf((), [info("y", (0,)), info("z", (0,))]),
    "a type with blocks": gguf((), one((64,), Q4_0), bytes(64)),
    "name of 63 bytes": gguf((), [info("n" * 63)], DATA),
    "key with the hyphen of its architecture": gguf(
        [kv("general.architecture", "str", "gpt-oss"), kv("gpt-oss.block_count", "u32", 1)]
    ),
    "the same, before general.architecture": gguf(
        [kv("gpt-oss.block_count", "u32", 1), kv("general.architecture", "str", "gpt-oss")]
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted(tmp_path, case):
    header = read(tmp_path, ACCEPTED[case], strict=True)
    assert header.warnings == []
    assert header.data_offset % header.alignment == 0


WARNED = {
    # name: (bytes, part of the warning, offset in strict mode)
    "key longer than 65 535 bytes": (gguf([kv("k" * 65536, "u8", 1)]), "longer than 65535", 24),
    **{
        f"key {key!r}": (gguf([kv(key, "u8", 1)]), "lower_snake.dot", 24)
        for key in ("Key", "a b", "a..b", ".a", "a.", "é", "a-b", "general.a-b", "a/b")
    },
    "value not UTF-8": (gguf([kv("k", "str", b"a\xff")]), "not UTF-8", 37),
    "array with a string that is not UTF-8": (
        gguf([kv("k", "str[]", ["a", b"\xff", b"\xc3"])]),
        "2 strings that are not UTF-8",
        58,
    ),
    "UTF-8 cut in two by a string's end": (gguf([kv("k", "str[]", [b"\xc3", b"\xa9"])]), "2 strings", 49),
    "UTF-8 joined by a length": (gguf([kv("k", "str[]", [b"\xc3", b"\x80" * 128])]), "2 strings", 49),
    "bool 2": (gguf([kv("k", "bool", 2)]), "neither 0 nor 1", 37),
    "bool 255 in an array": (gguf([kv("k", "bool[]", [1, 0, 255])]), "neither 0 nor 1", 51),
    "name of 64 bytes": (gguf((), [info("n" * 64)], DATA), "longer than 63 bytes", 24),
    "name empty": (gguf((), [info("")], DATA), "empty", 24),
    "gap": (gguf((), [T, info("u", offset=160)], bytes(288)), "1 gaps", None),
    "out of order": (gguf((), [info("u", offset=128), T], bytes(256)), "order", 49),
    "first not at 0": (gguf((), one((32,), offset=32), bytes(160)), "not at the start", 49),
    "bytes after the last tensor": (gguf((), [T], DATA + b"\0"), "1 bytes after", 192),
    "bytes after a header without tensors": (gguf((), (), b"\0" * 7), "7 bytes after", 32),
    "non-zero padding of the header": (header((), [T]) + bytes(6) + b"\1" + DATA, "header padding", 63),
    "non-zero padding of a tensor": (
        gguf((), [info("t", (1,)), info("u", (8,), offset=32)], bytes(31) + b"\1" + bytes(32)),
        "padding is not zero",
        127,
    ),
    "non-zero padding of the last tensor": (
        gguf((), [info("t", (1,))], bytes(4) + b"\1" + bytes(27)),
        "padding is not zero",
        68,
    ),
    "last padding missing": (gguf((), [info("t", (1,))], bytes(4)), "lacks the padding", 68),
    "last padding cut": (gguf((), [info("t", (1,))], bytes(8)), "lacks the padding", 72),
    "padding of the header missing, 0 bytes of data": (header((), one((0,))), "lacks the padding", 57),
}


@pytest.mark.parametrize("case", WARNED)
def test_warned(tmp_path, case):
    data, warning, offset = WARNED[case]
    header = read(tmp_path, data)
    assert len(header.warnings) == 1 and warning in header.warnings[0]
    with pytest.raises(BadFile) as caught:
        read(tmp_path, data, strict=True)
    assert warning in caught.value.problem
    if offset is not None:
        assert caught.value.offset == offset


def test_unusual_bytes_are_kept(tmp_path):
    header = read(
        tmp_path,
        gguf(
            [
                kv("s", "str", b"a\xff"),
                kv("b", "bool", 2),
                kv("a", "bool[]", [1, 0, 255]),
                kv("l", "str[]", [b"\xfe", "x"]),
                kv("e", "i16[]", []),
            ]
        ),
    )
    values = dict(header.metadata)
    assert values["s"].raw == b"a\xff" and values["s"].value == "a\udcff"
    assert values["b"].raw == b"\2" and values["b"].value is True
    assert values["a"].raw == b"\1\0\xff" and values["a"].value == [True, False, True]
    assert values["l"].value == ["\udcfe", "x"]
    assert values["e"].type == "i16[]" and values["e"].value == [] and len(values["e"]) == 0


def test_values_have_their_types(tmp_path):
    extremes = {
        "u8": 255,
        "i8": -128,
        "u16": 65535,
        "i16": -32768,
        "u32": 2**32 - 1,
        "i32": -(2**31),
        "f32": 0.5,
        "u64": 2**64 - 1,
        "i64": -(2**63),
        "f64": 0.1,
        "str": "é",
    }
    header = read(
        tmp_path,
        gguf(
            [kv(kind, kind, value) for kind, value in extremes.items()]
            + [kv(f"a.{kind}", f"{kind}[]", [value] * 3) for kind, value in extremes.items()]
        ),
    )
    values = dict(header.metadata)
    for kind, value in extremes.items():
        assert (values[kind].type, values[kind].value) == (kind, value)
        assert (values[f"a.{kind}"].type, values[f"a.{kind}"].value) == (f"{kind}[]", [value] * 3)
        assert values[f"a.{kind}"].head(2) == [value] * 2


def test_many_warnings_are_counted(tmp_path):
    header = read(tmp_path, gguf([kv(f"K{i}", "u8", 0) for i in range(1000)]))
    assert len(header.warnings) == 201 and header.warnings[-1] == "and 800 more warnings"


LOOKS = {
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs"),
    "HTML page": (b"\n<!DOCTYPE html><html><body>Sign in", "HTML"),
    "HTML page without a doctype": (b"<html><head>", "HTML"),
    "safetensors": (u64(60) + b'{"a":{"dtype":"F32"' + b" " * 60, "safetensors"),
    "zip": (b"PK\x03\x04" + bytes(30), "zip"),
    "pickle": (b"\x80\x02}q\x00(X" + bytes(30), "pickle"),
    "ggml of before GGUF": (b"tjgg" + bytes(30), "before GGUF"),
}


@pytest.mark.parametrize("case", LOOKS)
def test_wrong_magic_says_what_it_looks_like(tmp_path, case):
    data, hint = LOOKS[case]
    with pytest.raises(BadFile) as caught:
        read(tmp_path, data)
    assert caught.value.object == "magic" and hint in caught.value.hint


def test_version_1_says_what_to_do(tmp_path):
    with pytest.raises(BadFile) as caught:
        read(tmp_path, gguf(version=1))
    assert caught.value.hint == "convert the model again"


@pytest.mark.parametrize(
    "data", [gguf((), [T]), header((), [T]), gguf((), [T], DATA[:-1])], ids=["no data", "no padding", "cut data"]
)
def test_metadata_only_accepts_a_file_without_its_data(tmp_path, data):
    header = read(tmp_path, data, metadata_only=True, strict=True)
    assert [(t.name, t.ne, t.type, t.nbytes) for t in header.tensors] == [("t", (32,), F32, 128)]


@pytest.mark.parametrize(
    "case", ["overlap", "offset not aligned", "offset 2^64-32", "product overflows", "duplicate key"]
)
def test_metadata_only_checks_the_header_all_the_same(tmp_path, case):
    with pytest.raises(BadFile):
        read(tmp_path, REFUSED[case][0], metadata_only=True)


def test_sparse_file_of_1_tib_opens(tmp_path):
    path = tmp_path / "sparse.gguf"
    rows = 2**38 // 1024
    head = gguf([A], [info("t", (1024, rows))])
    with open(path, "wb") as file:
        file.write(head)
        try:
            file.truncate(len(head) + 2**40)
        except OSError:
            pytest.skip("the file system has no sparse file of 1 TiB")
    header = read_header(Source(str(path)), strict=True)
    assert header.tensors[0].nbytes == 2**40


def test_sparse_file_of_1_tib_full_of_nothing_is_refused(tmp_path):
    """10^10 tensors of 24 zero bytes each would fit; the second is a duplicate."""
    path = tmp_path / "sparse.gguf"
    with open(path, "wb") as file:
        file.write(header(n_tensors=10**10))
        try:
            file.truncate(2**40)
        except OSError:
            pytest.skip("the file system has no sparse file of 1 TiB")
    with pytest.raises(BadFile, match="duplicate tensor name"):
        read_header(Source(str(path)))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Source(str(tmp_path / "missing.gguf"))


def test_directory(tmp_path):
    with pytest.raises((BadFile, IsADirectoryError)):
        Source(str(tmp_path))


def test_fifo_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadFile):
        Source(str(tmp_path / "pipe"))


def test_device():
    with pytest.raises(BadFile):
        Source("/dev/zero")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    path = tmp_path / "secret.gguf"
    path.write_bytes(gguf())
    path.chmod(stat.S_IWUSR)
    with pytest.raises(PermissionError):
        Source(str(path))
