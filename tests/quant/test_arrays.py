"""pgs.quantize and pgs.dequantize: shapes, names, importance, errors. The bytes themselves: test_quant.py."""

import gguf
import numpy as np
import pytest

import pygguf_surgery as pgs
from pygguf_surgery import BadPlan, Unsupported, _core

Q = gguf.GGMLQuantizationType


def noise(*shape):
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64), (2, 1, 3, 64), (0, 64), (2, 0)])
def test_any_leading_shape(shape):
    x = noise(*shape)
    data = pgs.quantize(x, "Q8_0")
    assert data.dtype == np.uint8 and data.shape == (*shape[:-1], shape[-1] // 32 * 34)
    back = pgs.dequantize(data, "Q8_0")
    assert back.dtype == np.float32 and back.shape == shape
    if x.size:
        np.testing.assert_array_equal(data, gguf.quants.quantize(x, Q.Q8_0))
        np.testing.assert_array_equal(back, gguf.quants.dequantize(data, Q.Q8_0))


def test_names_of_types():
    x = noise(4, 256)
    expected = pgs.quantize(x, "Q4_K")
    for type in ("q4_k", Q.Q4_K, 12, int(Q.Q4_K)):
        np.testing.assert_array_equal(pgs.quantize(x, type), expected)
        np.testing.assert_array_equal(pgs.dequantize(expected, type), pgs.dequantize(expected, "Q4_K"))
    for type in ("Q4_KK", 9999, -1):
        with pytest.raises(Unsupported):
            pgs.quantize(x, type)
    for type in (None, 1.5, True):
        with pytest.raises(BadPlan):
            pgs.quantize(x, type)


def test_views_and_other_floats():
    x = noise(8, 128)
    np.testing.assert_array_equal(pgs.quantize(x[::2, ::2], "Q8_0"), pgs.quantize(x[::2, ::2].copy(), "Q8_0"))
    np.testing.assert_array_equal(pgs.quantize(np.asfortranarray(x), "Q8_0"), pgs.quantize(x, "Q8_0"))
    half = x.astype(np.float16)
    np.testing.assert_array_equal(pgs.quantize(half, "F16").view(np.float16), half)
    np.testing.assert_array_equal(pgs.quantize(x.astype(np.float64), "Q8_0"), pgs.quantize(x, "Q8_0"))
    data = pgs.quantize(x, "Q8_0")
    np.testing.assert_array_equal(pgs.dequantize(data[::2], "Q8_0"), pgs.dequantize(data, "Q8_0")[::2])


@pytest.mark.parametrize(
    "array",
    [
        np.float32(1),
        np.zeros((2, 33), np.float32),
        np.zeros((2, 32), np.int32),
        np.full((1, 32), np.nan, np.float32),
        np.full((1, 32), np.inf, np.float32),
        np.full((1, 32), 1e300),
    ],
)
def test_arrays_that_cannot_be_encoded(array):
    with pytest.raises(BadPlan):
        pgs.quantize(array, "Q8_0")


@pytest.mark.parametrize("array", [np.uint8(1), np.zeros((2, 33), np.uint8), np.zeros((2, 34), np.int8)])
def test_arrays_that_cannot_be_decoded(array):
    with pytest.raises(BadPlan):
        pgs.dequantize(array, "Q8_0")


def test_types_that_ggml_cannot_code():
    for name in ("I32", "F64", "Q8_K"):
        with pytest.raises(Unsupported):
            pgs.quantize(noise(1, 256), name)
    with pytest.raises(Unsupported):
        pgs.dequantize(np.zeros((1, 4), np.uint8), "I32")


def test_importance():
    x, columns = noise(2, 3, 256), np.abs(noise(2, 256)) + 0.1
    plain, weighted = pgs.quantize(x, "Q4_K"), pgs.quantize(x, "Q4_K", columns)
    assert (plain != weighted).any()
    for i in range(2):  # each expert has its own row
        np.testing.assert_array_equal(weighted[i], pgs.quantize(x[i], "Q4_K", imatrix=columns[i]))
    np.testing.assert_array_equal(pgs.quantize(x, "Q4_K", columns[:1]), pgs.quantize(x, "Q4_K", columns[0]))
    np.testing.assert_array_equal(pgs.quantize(x, "Q8_0", columns), pgs.quantize(x, "Q8_0"))
    bad = np.full(256, np.nan, np.float32)
    np.testing.assert_array_equal(pgs.quantize(x, "MXFP4", bad), pgs.quantize(x, "MXFP4"))


@pytest.mark.parametrize("imatrix", [np.ones(255), np.ones((3, 256)), np.ones((2, 3, 256)), np.float32(1)])
def test_importance_of_another_shape(imatrix):
    with pytest.raises(BadPlan) as e:
        pgs.quantize(noise(2, 3, 256), "Q4_K", imatrix)
    assert e.value.object == "imatrix"
    with pytest.raises(BadPlan):
        pgs.quantize(noise(3, 256), "Q4_K", np.ones((3, 256)))  # rows of a matrix have one importance


@pytest.mark.parametrize("value", [np.nan, np.inf, -1, 0])
def test_unfit_importance(value):
    with pytest.raises(BadPlan):
        pgs.quantize(noise(2, 256), "Q4_K", np.full(256, value, np.float32))


@pytest.mark.parametrize("name", [t.name for t in _core.types() if t.needs_importance])
def test_types_that_need_importance(name):
    with pytest.raises(BadPlan) as e:
        pgs.quantize(noise(1, 256), name)
    assert e.value.object == name


def test_threads_change_nothing():
    x = noise(64, 256)
    for name in ("MXFP4", "Q4_K"):
        np.testing.assert_array_equal(pgs.quantize(x, name, threads=1), pgs.quantize(x, name, threads=5))
