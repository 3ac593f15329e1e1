"""Value: Python objects to the exact bytes of a file and back."""

import math
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given

from pygguf_surgery._core import TensorInfo, Value, encode_header
from pygguf_surgery.base.errors import BadPlan
from support import gguf_bytes as b
from support.strategies import INTEGERS, python_values


@given(python_values())
def test_a_value_is_what_was_given(case):
    kind, given_value = case
    value = Value(given_value, kind)
    assert value.type == kind
    assert value.value == given_value
    assert Value.from_raw(kind, value.raw) == value
    assert pickle.loads(pickle.dumps(value)) == value
    assert hash(Value(given_value, kind)) == hash(value)
    if kind.endswith("[]"):
        assert Value(given_value, kind[:-2]) == value
        assert len(value) == len(given_value)
        assert value.head(3) == given_value[:3]


@given(python_values())
def test_raw_is_the_encoding_in_a_file(case):
    kind, given_value = case

    def encode(element):
        if isinstance(element, str):
            element = element.encode("utf-8", "surrogateescape")
        return b.scalar(kind.removesuffix("[]"), element)

    if kind == "str":
        expected = given_value.encode("utf-8", "surrogateescape")
    elif kind.endswith("[]"):
        expected = b"".join(map(encode, given_value))
    else:
        expected = encode(given_value)
    assert Value(given_value, kind).raw == expected


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_out_of_range(kind):
    low, high = INTEGERS[kind]
    assert Value(low, kind).value == low and Value(high, kind).value == high
    for wrong in (low - 1, high + 1, 2**70, -(2**70)):
        with pytest.raises(BadPlan):
            Value(wrong, kind)
        with pytest.raises(BadPlan):
            Value([low, wrong], kind)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, "u8"),
        (1, "bool"),
        (1.0, "u32"),
        ("1", "u32"),
        (None, "u32"),
        (b"x", "str"),
        (1, "str"),
        (True, "f32"),
        (True, "f64"),
        ("x", "f32"),
        ("1", "f64"),
        (1e39, "f32"),
        (-1e39, "f32"),
        (2**24 + 1, "f32"),
        (2**53 + 1, "f64"),
        (10**400, "f64"),
        (1, "u8[]"),
        ("ab", "str[]"),
        ([[1]], "u8"),
        ([1, "a"], "u8"),
        ({1: 2}, "u8"),
        ({1}, "u8"),
        ("\ud800", "str"),
        (["\ud800"], "str"),
        (object(), "u8"),
        (b"ab", "u8"),
        (np.zeros((2, 2), "u1"), "u8"),
        (np.float32(1), "u32"),
        (1j, "f64"),
    ],
)
def test_what_does_not_fit_its_type(value, kind):
    with pytest.raises(BadPlan):
        Value(value, kind)


@pytest.mark.parametrize("kind", ["", "[]", "array", "int", "U8", "u8[][]", "u8 ", "str[]x"])
def test_unknown_type_names(kind):
    with pytest.raises(BadPlan, match="unknown value type"):
        Value([1], kind)


def test_the_error_says_what_was_found_and_expected():
    with pytest.raises(BadPlan) as caught:
        Value(300, "u8")
    assert (caught.value.found, caught.value.expected) == ("300", "u8")


def test_numpy_converts_where_it_is_exact():
    assert Value(np.int64(5), "u8") == Value(5, "u8")
    assert Value(np.bool_(True), "bool") == Value(True, "bool")
    assert Value(np.float32(0.1), "f32").raw == struct.pack("<f", np.float32(0.1))
    assert Value(np.str_("x"), "str") == Value("x", "str")
    assert Value(np.arange(3, dtype=">i8"), "u16") == Value([0, 1, 2], "u16")
    assert Value([np.uint64(2**64 - 1)], "u64").value == [2**64 - 1]
    assert Value(np.array(7), "i32") == Value(7, "i32")


def test_special_floats():
    for kind in ("f32", "f64"):
        assert math.isnan(Value(math.nan, kind).value)
        assert Value(math.inf, kind).value == math.inf and Value(-math.inf, kind).value == -math.inf
        assert math.copysign(1, Value(-0.0, kind).value) == -1
        assert Value(3, kind).value == 3.0
        assert Value(math.nan, kind) == Value(math.nan, kind)  # by their bytes
    assert Value(0.1, "f32").value == struct.unpack("<f", struct.pack("<f", 0.1))[0]
    assert Value(3.4028235e38, "f32").value == float(np.finfo("f4").max)


def test_values_differ_by_type():
    assert Value(1, "u32") != Value(1, "i32")
    assert Value([], "u8") != Value([], "i8")
    assert Value(1, "u8") != 1
    assert len({Value(1, "u32"), Value(1, "i32"), Value(1, "u32")}) == 2


@pytest.mark.parametrize(
    ("kind", "raw"),
    [
        ("u8", b""),
        ("u8", b"ab"),
        ("u32", b"abc"),
        ("u32[]", b"abcde"),
        ("f64", b"1234567"),
        ("str[]", b"abc"),
        ("str[]", b.u64(3) + b"ab"),
        ("str[]", b.u64(-1) + b"ab"),
        ("str[]", b.string("a") + b"x"),
        ("nonsense", b""),
    ],
)
def test_raw_bytes_that_are_no_value(kind, raw):
    with pytest.raises(BadPlan):
        Value.from_raw(kind, raw)


def test_raw_keeps_unusual_bytes():
    assert Value.from_raw("bool", b"\2").raw == b"\2" and Value.from_raw("bool", b"\2").value is True
    assert Value.from_raw("str", b"\xff\0").value == "\udcff\0"


def test_only_arrays_have_a_length():
    for use in (len, lambda v: v.head(1)):
        with pytest.raises(TypeError):
            use(Value(1, "u8"))
    assert Value([1, 2], "u8").head(0) == [] and Value([1, 2], "u8").head(-1) == []
    assert bool(Value([], "u8"))


def test_repr_is_short():
    assert repr(Value(7, "u16")) == "Value(7, 'u16')"
    assert repr(Value(["a"], "str")) == "Value(['a'], 'str[]')"
    assert len(repr(Value(list(range(10_000)), "u32"))) < 100


WRONG_HEADERS = {
    "empty key": ([("", Value(1, "u8"))], [], 32),
    "duplicate key": ([("k", Value(1, "u8")), ("k", Value(2, "u8"))], [], 32),
    "key with NUL": ([("a\0", Value(1, "u8"))], [], 32),
    "key not UTF-8": ([("\udcff", Value(1, "u8"))], [], 32),
    "key too long": ([("k" * 65536, Value(1, "u8"))], [], 32),
    "empty name": ([], [("", (1,), 0)], 32),
    "duplicate name": ([], [("t", (1,), 0), ("t", (1,), 0)], 32),
    "name of 64 bytes": ([], [("n" * 64, (1,), 0)], 32),
    "name of 32 characters and 64 bytes": ([], [("é" * 32, (1,), 0)], 32),
    "name with NUL": ([], [("a\0", (1,), 0)], 32),
    "5 dimensions": ([], [("t", (1,) * 5, 0)], 32),
    "dimension 2^63": ([], [("t", (2**63,), 0)], 32),
    "overflow": ([], [("t", (2**40, 2**40), 0)], 32),
    "sum overflows": ([], [("t", (2**62,), 24), ("u", (2**62,), 24)], 32),
    "unknown type": ([], [("t", (1,), 99)], 32),
    "removed type": ([], [("t", (32,), 31)], 32),
    "row no multiple of the block": ([], [("t", (33,), 2)], 32),
    "alignment 0": ([], [], 0),
    "alignment 16": ([], [], 16),
    "alignment 48": ([], [], 48),
    "alignment 2^21": ([], [], 2**21),
    "alignment not declared": ([], [], 64),
    "alignment declared otherwise": ([("general.alignment", Value(64, "u32"))], [], 32),
    "alignment declared as u64": ([("general.alignment", Value(32, "u64"))], [], 32),
    "alignment declared as an array": ([("general.alignment", Value([32], "u32"))], [], 32),
}


@pytest.mark.parametrize("case", WRONG_HEADERS)
def test_what_a_canonical_file_cannot_hold(case):
    metadata, tensors, alignment = WRONG_HEADERS[case]
    with pytest.raises(BadPlan):
        encode_header(metadata, [TensorInfo(*tensor) for tensor in tensors], alignment)


def test_negative_dimension():
    with pytest.raises(BadPlan):
        TensorInfo("t", (-1,), 0)


def test_encode_header_fills_the_tensors():
    tensors = [
        TensorInfo("a", (3,), 0),
        TensorInfo("b", (), 1),
        TensorInfo("z", (0, 5), 0),
        TensorInfo("c", (32, 2), 2),
    ]
    header, offsets, file_bytes = encode_header([("general.alignment", Value(64, "u32"))], tensors, 64)
    assert [(t.offset, t.nbytes) for t in tensors] == [(0, 12), (64, 2), (128, 0), (128, 36)]
    assert offsets == [len(header) + t.offset for t in tensors]
    assert len(header) % 64 == 0 and file_bytes == len(header) + 192


def test_tensor_info_pickles():
    tensor = TensorInfo("blk.0.é", (4, 2), 1)
    encode_header([], [TensorInfo("a", (1,), 0), tensor], 32)
    again = pickle.loads(pickle.dumps(tensor))
    assert all(getattr(again, field) == getattr(tensor, field) for field in ("name", "ne", "type", "offset", "nbytes"))
