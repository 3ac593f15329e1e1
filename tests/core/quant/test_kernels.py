"""Every set of kernels gives the linked ggml's bytes, and the forced set is the one that runs."""

import functools
import hashlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pygguf_surgery import _core
from pygguf_surgery.base import errors
from support import kernel_data
from support.kernels import CASES, DECODED, SETS, TYPES, UNDEFINED, defined, encode, outcome, with_kernels
from support.strategies import WEIGHTS, rows_of

F16 = TYPES["F16"].id


def assert_all_sets_equal(work):
    expected = with_kernels("ggml", lambda: outcome(work))
    for name in SETS:
        found = with_kernels(name, lambda: outcome(work))
        if found != expected:
            assert isinstance(found, bytes) and isinstance(expected, bytes), (name, found[:200], expected[:200])
            a, b = np.frombuffer(found, np.uint8), np.frombuffer(expected, np.uint8)
            raise AssertionError(f"{name}: {(a != b).sum()} of {a.size} bytes differ, first at {np.argmax(a != b)}")


# --- which set runs ------------------------------------------------------------------------------------------------


def test_default_is_the_best_set(monkeypatch):
    monkeypatch.delenv("PGS_KERNELS", raising=False)
    assert _core.kernels() == SETS[-1]


@pytest.mark.parametrize("name", ["", "AVX2", "fast"])
def test_unknown_set_is_an_error_and_empty_means_default(monkeypatch, name):
    monkeypatch.setenv("PGS_KERNELS", name)
    if name == "":
        assert _core.kernels() == SETS[-1]
    else:
        with pytest.raises(errors.Unsupported, match=r"PGS_KERNELS: no such kernels .*scalar"):
            encode("MXFP4", np.zeros((1, 32), np.float32))


def test_a_set_of_another_machine_is_an_error(monkeypatch):
    monkeypatch.setenv("PGS_KERNELS", "avx2" if "neon" in SETS else "neon")
    with pytest.raises(errors.Unsupported, match="PGS_KERNELS"):
        encode("MXFP4", np.zeros((1, 32), np.float32))


# --- every type ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "weighted"), CASES)
@pytest.mark.parametrize("kind", ["ordinary", "strange", "huge", "tiny"])
def test_bytes_of_rows(name, weighted, kind):
    """Rows of one block, of several, of an odd number; fewer blocks than lanes, and more."""
    block = TYPES[name].block
    for seed, (rows, blocks) in enumerate([(1, 1), (3, 1), (37, 1), (5, 3), (2, 8)]):
        k = block * blocks
        x = defined(name, getattr(kernel_data, kind)(rows, k, seed))
        weights = kernel_data.importance(k, seed, seed % 3)[None] if weighted else None
        assert_all_sets_equal(lambda: encode(name, x, weights))


@pytest.mark.parametrize(("name", "weighted"), CASES)
@given(st.data())
@settings(max_examples=20)
def test_bytes_of_any_block(name, weighted, data):
    x = defined(name, data.draw(rows_of(TYPES[name].block)))
    importance = None
    if weighted:
        few = data.draw(st.lists(WEIGHTS, min_size=1, max_size=6).filter(any))
        choice = data.draw(hnp.arrays(np.uint8, (1, x.shape[1]), elements=st.integers(0, 255), fill=st.just(0)))
        importance = np.array(few, np.float32)[choice % len(few)]
    assert_all_sets_equal(lambda: encode(name, x, importance))


@pytest.mark.parametrize("name", UNDEFINED)
@pytest.mark.parametrize("kernels", SETS)
def test_bytes_where_ggml_is_undefined_are_those_of_gcc_on_x86(name, kernels):
    x = kernel_data.tiny(40, 512, 11)
    found = with_kernels(kernels, lambda: encode(name, x)).tobytes()
    assert hashlib.sha256(found).hexdigest()[:16] == UNDEFINED[name]


@pytest.mark.parametrize("name", DECODED)
@given(st.data())
def test_numbers_of_any_bytes(name, data):
    size = TYPES[name].block_bytes
    blocks = data.draw(hnp.arrays(np.uint8, (data.draw(st.integers(1, 3)), size * data.draw(st.integers(1, 20)))))
    decoded = [with_kernels(s, lambda: _core.dequantize(blocks, TYPES[name].id, 1)) for s in ("ggml", *SETS)]
    for found in decoded[1:]:
        assert np.array_equal(found.view(np.uint32), decoded[0].view(np.uint32)) or (
            np.array_equal(found, decoded[0], equal_nan=True) and np.isnan(found).any()
        )


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
        with_kernels(name, lambda: encode("MXFP4", x))


MANY = (512, 2048)


@functools.cache
def many(seed):
    return (kernel_data.strange if seed % 2 else kernel_data.ordinary)(*MANY, seed + 1000)


@pytest.mark.campaign
@pytest.mark.parametrize(("name", "weighted"), CASES)
def test_bytes_of_a_hundred_million_weights(name, weighted):
    """In every set, half of them ordinary; PGS_KERNEL_WEIGHTS takes another number."""
    wanted, threads = int(float(os.environ.get("PGS_KERNEL_WEIGHTS", 1e8))), len(os.sched_getaffinity(0))
    for seed in range(-(-wanted // (MANY[0] * MANY[1]))):
        x = defined(name, many(seed))
        weights = kernel_data.importance(MANY[1], seed, seed % 3)[None] if weighted else None

        def work():
            return _core.quantize(x, TYPES[name].id, weights, threads)

        expected = with_kernels("ggml", work)
        for kernels in SETS:
            assert np.array_equal(with_kernels(kernels, work), expected), (kernels, seed)


# --- MXFP4 ---------------------------------------------------------------------------------------------------------


def test_mxfp4_on_every_exponent_and_where_log2f_rounds_up():
    """The largest value of a block runs over all normal exponents, with the 64 largest mantissas and others."""
    rng = np.random.default_rng(0)
    exponents = np.arange(2, 255, dtype=np.uint32)  # 1 gives a scale that llama.cpp refuses: test_quant
    mantissas = np.concatenate([0x7FFFFF - np.arange(64), rng.integers(0, 0x800000, 64), [0, 1, 2]]).astype(np.uint32)
    largest = ((exponents[:, None] << 23) | mantissas[None, :]).view(np.float32)
    for row in largest:  # an exponent at a time: those above 2^48 are ggml's own
        x = (rng.uniform(-1, 1, (len(row), 32)).astype(np.float32) * row[:, None]).astype(np.float32)
        x[np.arange(len(row)), rng.integers(0, 32, len(row))] = row * rng.choice([-1, 1], len(row))
        assert_all_sets_equal(lambda: encode("MXFP4", x))


def test_mxfp4_of_denormals():
    """Beside each power of two; log2f rounds up there too. The scale wraps as a cast does on x86."""
    near = (2 ** np.arange(1, 24)[:, None] + np.arange(-30, 4)).ravel()
    largest = near[(near > 0) & (near < 1 << 23)].astype(np.uint32).view(np.float32)
    x = np.zeros((len(largest), 32), np.float32)
    x[:, 3] = largest
    assert_all_sets_equal(lambda: encode("MXFP4", x[largest.view(np.uint32) < (1 << 23) - 30]))
    for row in x[largest.view(np.uint32) >= (1 << 23) - 30]:  # some of these have no valid scale
        assert_all_sets_equal(lambda: encode("MXFP4", row[None]))


def test_mxfp4_at_and_beside_every_midpoint():
    """Ties go to the smaller magnitude; a float above or below does not."""
    for power in (-120, -20, -1, 0, 3, 40, 100):
        d = np.float32(2.0) ** power
        points = np.array([0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 7.9999], np.float32) * d
        near = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))])
        x = np.zeros((2 * len(near), 32), np.float32)
        x[:, 0] = 7.5 * d  # fixes the exponent
        x[:, 5:11] = np.concatenate([near, -near])[:, None]
        assert_all_sets_equal(lambda: encode("MXFP4", x))
