"""quality="best": the same format with less error; the default stays llama-quantize's bytes."""

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pygguf_surgery as pgs
from pygguf_surgery import BadPlan, Plan, imatrix
from support import moe_models
from support.kernels import SETS, with_kernels
from support.places import SHARED

VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float64)
VALUES = np.concatenate([VALUES, -VALUES])  # in halves, as ggml has them


def decoded(encoded):
    """MXFP4 by the text of the OCP standard (and ggml's doubled values): [rows, bytes] -> float64 [rows, blocks,
    32]."""
    blocks = encoded.reshape(encoded.shape[0], -1, 17)
    scale = 2.0 ** (blocks[..., :1].astype(np.float64) - 128)
    codes = np.concatenate([blocks[..., 1:] & 15, blocks[..., 1:] >> 4], axis=-1)
    return VALUES[codes] * scale


def errors(x, encoded, weights=1.0):
    """Weighted squared error of each block."""
    blocks = x.astype(np.float64).reshape(x.shape[0], -1, 32)
    w = np.broadcast_to(np.asarray(weights, np.float64), x.shape).reshape(blocks.shape)
    return (w * (blocks - decoded(encoded)) ** 2).sum(axis=-1)


def least(x, encoded, weights=1.0):
    """The least error of a block with ggml's exponent or one of its neighbours, by trying all 16 values."""
    blocks = x.astype(np.float64).reshape(x.shape[0], -1, 32)
    w = np.broadcast_to(np.asarray(weights, np.float64), x.shape).reshape(blocks.shape)
    exponents = encoded.reshape(encoded.shape[0], -1, 17)[..., 0].astype(np.float64)
    tried = []
    for step in (-1, 0, 1):
        scale = 2.0 ** (exponents + step - 128)
        nearest = np.abs(blocks[..., None] - VALUES * scale[..., None, None]).min(axis=-1)
        tried.append((w * nearest**2).sum(axis=-1))
    return np.min(tried, axis=0)


def rows(seed, shape=(64, 256), scale=0.05):
    rng = np.random.default_rng(seed)
    x = rng.standard_t(4, shape) * scale * np.exp(rng.normal(0, 2, (shape[0], 1)))
    return x.astype(np.float32)


@pytest.mark.parametrize("weighted", [False, True])
def test_error_is_the_least_of_the_neighbouring_exponents(weighted):
    x = rows(1)
    weights = np.random.default_rng(2).standard_exponential(x.shape[1]).astype(np.float32) if weighted else None
    plain, best = pgs.quantize(x, "MXFP4"), pgs.quantize(x, "MXFP4", weights, quality="best")
    w = 1.0 if weights is None else weights
    assert (errors(x, best, w) <= errors(x, plain, w) * (1 + 1e-5)).all()
    np.testing.assert_allclose(errors(x, best, w), least(x, plain, w), rtol=1e-5)
    gain = errors(x, best, w).sum(axis=1) / errors(x, plain, w).sum(axis=1)
    assert gain.mean() < 0.97


@given(st.integers(0, 2**32 - 1), st.integers(-30, 30), st.booleans())
def test_any_block_is_valid_and_never_worse(seed, power, weighted):
    rng = np.random.default_rng(seed)
    x = np.round(rng.standard_normal((4, 64)) * rng.choice([1, 4, 30])).astype(np.float32) * np.float32(2.0) ** power
    weights = rng.integers(0, 3, 64).astype(np.float32) if weighted else None
    if weighted:
        weights[0] = 1
    w = 1.0 if weights is None else weights
    plain, best = pgs.quantize(x, "MXFP4"), pgs.quantize(x, "MXFP4", weights, quality="best")
    assert (errors(x, best, w) <= errors(x, plain, w) * (1 + 1e-5)).all()
    assert (best.reshape(4, -1, 17)[..., 0] < 255).all()
    np.testing.assert_array_equal(
        pgs.dequantize(best, "MXFP4"), gguf.quants.dequantize(best, gguf.GGMLQuantizationType.MXFP4)
    )


def test_every_set_of_kernels_gives_the_same_bytes():
    x = rows(3, (33, 96))
    x[5] = 0
    x[6] *= 2.0**-120
    weights = np.random.default_rng(4).standard_exponential(96).astype(np.float32)
    for w in (None, weights):
        found = {
            name: with_kernels(name, lambda: pgs.quantize(x, "MXFP4", w, quality="best")).tobytes()
            for name in ("ggml", *SETS)
        }
        assert len(set(found.values())) == 1


def test_bytes_of_a_row_do_not_depend_on_the_others():
    """Numbers that only ggml encodes, and importance, stay a matter of their row."""
    x = rows(5, (40, 64))
    x[7, 3] = 2.0**60
    x[20] *= 2.0**90
    x[21, 40] = 2.0**-127
    together = pgs.quantize(x, "MXFP4", quality="best")
    for i in range(40):
        assert np.array_equal(pgs.quantize(x[i : i + 1], "MXFP4", quality="best")[0], together[i])


def test_types_without_a_better_encoder_keep_their_bytes():
    x = rows(6)
    assert np.array_equal(pgs.quantize(x, "Q4_K", quality="best"), pgs.quantize(x, "Q4_K"))
    with pytest.raises(BadPlan, match=r"quality: unknown choice .*'good'"):
        pgs.quantize(x, "Q4_K", quality="good")


@pytest.fixture
def model(tmp_path):
    with pgs.open(str(moe_models.qwen3next(tmp_path / "model.gguf", experts=8))) as opened:
        yield opened


def test_a_plan_encodes_each_expert_by_its_importance(model, tmp_path):
    name, rng = "blk.0.ffn_up_exps.weight", np.random.default_rng(0)
    experts, n, k = model.tensors[name].shape
    w = rng.standard_exponential((experts, k)).astype(np.float32)
    imatrix.write(tmp_path / "im.gguf", {name: (w, np.ones(experts, np.float32))})
    kept = {int(i): [1, 2, 5, 6, 7] for i in range(20) if f"blk.{i}.ffn_up_exps.weight" in model.tensors}
    plan = Plan(model).keep_experts(kept).quantize("MXFP4_MOE", quality="best", imatrix=tmp_path / "im.gguf")
    assert Plan.from_json(plan.to_json()) == plan
    checked = plan.check()
    assert not checked.blockers and any("quality best" in note for note in checked.notes)
    x = np.asarray(model.tensors[name].dequantize()).reshape(experts, n, k)
    expected = pgs.quantize(x[[1, 2, 5, 6, 7]], "MXFP4", w[[1, 2, 5, 6, 7]], quality="best")
    for i, options in enumerate(({}, {"threads": 1, "memory": "64MiB"})):
        plan.write(tmp_path / f"out{i}.gguf", **options)
        with pgs.open(str(tmp_path / f"out{i}.gguf")) as out:
            assert np.array_equal(out.tensors[name].bytes().ravel(), expected.ravel())
            other = "blk.0.ffn_down_exps.weight"
            plain = pgs.quantize(np.asarray(model.tensors[other].dequantize()), "MXFP4", quality="best")
            assert np.array_equal(out.tensors[other].bytes().size, plain.size // experts * 5)


def test_default_is_llama_quantizes_bytes_and_says_so(model, tmp_path):
    plan = Plan(model).quantize("MXFP4_MOE")
    assert plan == Plan(model).quantize("MXFP4_MOE", quality="default")
    assert not any("quality" in note for note in plan.check().notes)
    assert any(
        "quality best: no tensor" in text for text in Plan(model).quantize("Q8_0", quality="best").check().warnings
    )
    with pytest.raises(BadPlan, match="quality"):
        Plan(model).quantize("MXFP4_MOE", quality="high")


def test_a_recipe_may_ask_for_it(model, tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('type = "MXFP4_MOE"\nquality = "best"\n')
    assert Plan(model).recipe(path) == Plan(model).quantize("MXFP4_MOE", quality="best")
    assert Plan(model).recipe(path, quality="default") == Plan(model).quantize("MXFP4_MOE")
    path.write_text('type = "MXFP4_MOE"\nquality = "good"\n')
    with pytest.raises(BadPlan, match="quality"):
        Plan(model).recipe(path)


REAL = SHARED / "models" / "tiny-qwen3next-bf16.gguf"


@pytest.mark.skipif(not REAL.exists(), reason="needs the small trained model")
def test_error_falls_on_trained_weights():
    with pgs.open(str(REAL)) as real:
        x = np.asarray(real.tensors["blk.0.ffn_up_exps.weight"].dequantize())
    x = x.reshape(-1, x.shape[-1])
    assert errors(x, pgs.quantize(x, "MXFP4", quality="best")).sum() < 0.97 * errors(x, pgs.quantize(x, "MXFP4")).sum()
