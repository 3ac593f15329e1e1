"""Every set of kernels gives the linked ggml's bytes, and the forced set is the one that runs."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pygguf_surgery import _core, errors

MXFP4, F16 = _core.type_id("MXFP4"), _core.type_id("F16")


def available(name):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGS_KERNELS", name)
        try:
            return _core.kernels() == name
        except errors.Unsupported:
            return False


SETS = [name for name in ("scalar", "avx2", "avx512") if available(name)]


def with_kernels(name, work):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PGS_KERNELS", name)
        assert _core.kernels() == name
        return work()


def mxfp4(x):
    return _core.quantize(x, MXFP4, None, 1)


def assert_all_sets_equal(x):
    expected = with_kernels("ggml", lambda: mxfp4(x))
    for name in SETS:
        found = with_kernels(name, lambda: mxfp4(x))
        assert np.array_equal(found, expected), name


def test_default_is_the_best_set(monkeypatch):
    monkeypatch.delenv("PGS_KERNELS", raising=False)
    assert _core.kernels() == SETS[-1]


@pytest.mark.parametrize("name", ["", "AVX2", "fast"])
def test_unknown_set_is_an_error_and_empty_means_default(monkeypatch, name):
    monkeypatch.setenv("PGS_KERNELS", name)
    if name == "":
        assert _core.kernels() == SETS[-1]
    else:
        with pytest.raises(errors.Unsupported, match="PGS_KERNELS: no such kernels .*scalar"):
            mxfp4(np.zeros((1, 32), np.float32))


def test_mxfp4_on_every_exponent_and_where_log2f_rounds_up():
    """The largest value of a block runs over all normal exponents, with the 64 largest mantissas and others."""
    rng = np.random.default_rng(0)
    # Exponents 1 and 2 give a scale that llama.cpp refuses or that wraps; the error paths are in test_quant.
    exponents = np.arange(3, 255, dtype=np.uint32)
    mantissas = np.concatenate([0x7FFFFF - np.arange(64), rng.integers(0, 0x800000, 64), [0, 1, 2]]).astype(np.uint32)
    largest = ((exponents[:, None] << 23) | mantissas[None, :]).ravel().view(np.float32)
    x = (rng.uniform(-1, 1, (len(largest), 32)).astype(np.float32) * largest[:, None]).astype(np.float32)
    x[np.arange(len(largest)), rng.integers(0, 32, len(largest))] = largest * rng.choice([-1, 1], len(largest))
    assert_all_sets_equal(x)


def test_mxfp4_at_and_beside_every_midpoint():
    """Ties go to the smaller magnitude; a float above or below does not."""
    for power in (-120, -20, -1, 0, 3, 100):
        d = np.float32(2.0) ** power
        points = np.array([0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 7.9999], np.float32) * d
        near = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))])
        x = np.zeros((2 * len(near), 32), np.float32)
        x[:, 0] = 7.5 * d  # fixes the exponent
        x[:, 5:11] = np.concatenate([near, -near])[:, None]
        assert_all_sets_equal(x)


def test_mxfp4_of_many_weights():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2048, 1024), np.float32)
    x *= np.exp(rng.normal(0, 8, (2048, 1))).astype(np.float32)  # scales over many powers of two
    x[rng.random(x.shape) < 0.05] = 0
    x[rng.random(x.shape) < 0.01] *= 1000
    assert_all_sets_equal(x)


blocks = hnp.arrays(np.float32, (2, 64), elements=st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([0.0, -0.0, 1.0, -6.0, 0.75, 2.0**-149]),
    st.integers(-24, 24).map(lambda n: n / 4)))


@given(blocks)
def test_mxfp4_of_any_block(x):
    results = []
    for name in ("ggml", *SETS):
        try:
            results.append(with_kernels(name, lambda: mxfp4(x)).tobytes())
        except errors.BadPlan as error:
            results.append(str(error))
    assert len(set(results)) == 1


@pytest.mark.parametrize("name", SETS)
def test_every_half_decodes_to_the_same_bits(name):
    halves = np.arange(1 << 16, dtype=np.uint16)
    for extra in (0, 7):  # also where the length is no multiple of a vector
        data = halves[: len(halves) - extra].view(np.uint8)[None]
        expected = with_kernels("ggml", lambda: _core.dequantize(data, F16, 1))
        found = with_kernels(name, lambda: _core.dequantize(data, F16, 1))
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", ["ggml", *SETS])
@pytest.mark.parametrize("place", [0, 5, 31])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_every_set_finds_what_is_no_number(name, place, bad):
    x = np.ones((1, 32), np.float32)
    x[0, place] = bad
    with pytest.raises(errors.BadPlan, match=f"row 0, column {place}"):
        with_kernels(name, lambda: mxfp4(x))
