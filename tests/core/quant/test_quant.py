"""pgs.quantize / dequantize against gguf-py and against what ggml says of itself."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize as gguf_dequantize
from gguf.quants import quantize as gguf_quantize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pygguf_surgery import _core
from pygguf_surgery.base import errors
from pygguf_surgery.quant.types import tensor_type, type_of_name

TYPES = {t.name: t for t in _core.types()}
ENCODED = [n for n, t in TYPES.items() if t.encodes and t.quantized]
# What gguf-py can encode by itself.
GGUF_PY = ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]


def rows(n, k, seed=0, scale=0.02):
    return (scale * np.random.default_rng(seed).standard_normal((n, k))).astype(np.float32)


def encode(x, name, importance=None, threads=1):
    if importance is None and TYPES[name].needs_importance:
        importance = np.ones((1, x.shape[1]), np.float32)
    return _core.quantize(x, TYPES[name].id, importance, threads)


def test_every_type_that_ggml_encodes_is_there():
    expected = (
        "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S "
        "IQ4_NL IQ4_XS TQ1_0 TQ2_0 MXFP4 NVFP4 Q1_0 Q2_0"
    ).split()
    assert sorted(ENCODED) == sorted(expected)


def test_block_sizes_agree_with_gguf_py():
    for name, t in TYPES.items():
        kind = getattr(gguf.GGMLQuantizationType, name, None)
        if kind is not None and name != "Q8_1":  # gguf-py counts 40 bytes, ggml 36
            assert kind.value == t.id
            assert gguf.GGML_QUANT_SIZES[kind] == (t.block, t.block_bytes), name


@pytest.mark.parametrize("name", GGUF_PY)
def test_bytes_equal_gguf_py(name):
    x = rows(64, 512)
    expected = gguf_quantize(x, gguf.GGMLQuantizationType[name])
    assert np.array_equal(encode(x, name), expected.view(np.uint8).reshape(64, -1))


@pytest.mark.parametrize("name", sorted(set(ENCODED) - {"Q1_0", "Q2_0"}))
def test_decoding_equals_gguf_py(name):
    data = encode(rows(8, 512), name)
    ours = _core.dequantize(data, TYPES[name].id, 1)
    theirs = gguf_dequantize(data, gguf.GGMLQuantizationType[name])
    # gguf-py sums and multiplies in another order for some types: a few units in the last place.
    np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("name", ENCODED)
def test_threads_change_nothing(name):
    x = rows(97, 512)
    importance = np.random.default_rng(1).random((1, 512), np.float32) + 0.1
    assert np.array_equal(encode(x, name, importance, 1), encode(x, name, importance, 3))


@pytest.mark.parametrize("name", ENCODED)
def test_importance_matters_exactly_where_the_table_says(name):
    x = rows(16, 512)
    heavy = np.ones((1, 512), np.float32)
    heavy[0, ::3] = 50
    changed = not np.array_equal(encode(x, name, heavy), encode(x, name))
    assert changed == TYPES[name].uses_importance


def test_each_group_of_rows_has_its_own_importance():
    x = rows(4, 256)
    w = np.random.default_rng(2).random((2, 256), np.float32) + 0.01
    both = encode(x, "Q4_K", w)
    assert np.array_equal(both[:2], encode(x[:2], "Q4_K", w[:1]))
    assert np.array_equal(both[2:], encode(x[2:], "Q4_K", w[1:]))


@pytest.mark.parametrize("name", [*ENCODED, "F16", "BF16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_names_its_place(name, bad):
    x = rows(3, 256)
    x[2, 7] = bad
    with pytest.raises(errors.BadPlan, match="row 2, column 7"):
        encode(x, name)


@pytest.mark.parametrize("name", [n for n in ENCODED if TYPES[n].uses_importance])
@pytest.mark.parametrize(
    "bad, text", [(0, "all zero"), (-1, "negative"), (np.nan, "not a finite"), (np.inf, "not a finite")]
)
def test_unfit_importance_is_an_error(name, bad, text):
    w = np.full((1, 256), bad if bad == 0 else 1, np.float32)
    if bad != 0:
        w[0, 9] = bad
    with pytest.raises(errors.BadPlan, match=text):
        encode(rows(1, 256), name, w)


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e10, 1e30, 3e38])
def test_extreme_magnitudes_encode_or_raise_but_never_end_the_process(name, scale):
    x = (np.random.default_rng(3).standard_normal((2, 256)) * 0.3).astype(np.float32) * np.float32(scale)
    try:
        assert encode(x, name).shape[0] == 2
    except errors.BadPlan as error:
        assert error.problem


def test_a_half_that_overflows_is_an_error():
    x = np.full((1, 32), 70000, np.float32)
    with pytest.raises(errors.BadPlan, match="F16 has no valid encoding of the block in row 0, column 0"):
        encode(x, "F16")


def test_mxfp4_block_that_llama_cpp_would_refuse_names_the_block():
    x = np.ones((2, 64), np.float32)
    x[1, 32:] = np.float32(1.5 * 2.0**-126)
    with pytest.raises(errors.BadPlan, match="row 1, column 32"):
        encode(x, "MXFP4")


@pytest.mark.parametrize("name", ENCODED)
def test_type_names_in_any_case(name):
    assert type_of_name(name.lower()) is type_of_name(name) is tensor_type(name)


def test_unknown_type_names_the_nearest():
    with pytest.raises(errors.Unsupported, match="Q4_K"):
        type_of_name("Q4K")


def test_row_that_is_no_multiple_of_the_block():
    with pytest.raises(errors.BadPlan, match="multiple of 256"):
        encode(rows(1, 128), "Q4_K")


floats = hnp.arrays(
    np.float32,
    (2, 256),
    elements=st.one_of(
        st.floats(-1e4, 1e4, width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-140, 2.0**-10, 1e-30])
    ),
)


@given(floats, st.sampled_from(sorted(ENCODED)))
def test_any_reasonable_row_is_encoded_or_refused(x, name):
    try:
        data = encode(x, name)
    except errors.BadPlan:
        return
    assert np.isfinite(_core.dequantize(data, TYPES[name].id, 1)).all()


@given(floats)
def test_copy_types_are_exact(x):
    assert np.array_equal(_core.dequantize(encode(x, "F32"), TYPES["F32"].id, 1).view(np.uint32), x.view(np.uint32))


@pytest.mark.parametrize("block", [0, 4095, 4096, 9999])
def test_first_invalid_block(block):
    data = np.zeros((10000, TYPES["MXFP4"].block_bytes), np.uint8)
    assert _core.first_invalid_block(data, TYPES["MXFP4"].id) is None
    data[block:, 0] = 255  # the exponent that means NaN
    assert _core.first_invalid_block(data, TYPES["MXFP4"].id) == block


def test_first_invalid_element_of_floats():
    x = np.ones(9000, np.float32)
    x[8999] = np.nan
    assert _core.first_invalid_block(x.view(np.uint8), TYPES["F32"].id) == 8999
    assert _core.first_invalid_block(x[:8999].astype(np.float16).view(np.uint8), TYPES["F16"].id) is None
