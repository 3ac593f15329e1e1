"""Repair of a cut: the fit against numpy, what llama.cpp is asked, and how a plan takes the result."""

import importlib
import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pygguf_surgery as pgs
from pygguf_surgery._core import Value
from pygguf_surgery.files.gguf import write_gguf
from support import moe_models
from support.gguf_files import read_gguf
from support.places import SHARED

repairing = importlib.import_module("pygguf_surgery.studies.repairs")
TRAINED = SHARED / "models" / "tiny-qwen3next-bf16.gguf"


# --- the fit ---------------------------------------------------------------------------------------------------------


def samples(ids, inputs, outputs):
    s = repairing.Samples(
        len(ids), range(ids.max() + 1), int(ids.max()) + 1, gate_in_input=False, scales=None, biases=None
    )
    for part in np.array_split(np.arange(len(ids)), 3):
        s.add(ids[part], np.ones(ids[part].shape, np.float32), inputs[part], outputs[part])
    return s


def problem(seed, tokens=400, n=5, used=2, features=6, width=4, noise=0.0):
    """Outputs that some down projections explain up to noise, and old ones that are others."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(n)[:used] for _ in range(tokens)]).astype(np.int32)
    inputs = rng.standard_normal((tokens, used, features), np.float32)
    truth = rng.standard_normal((n, width, features), np.float32)
    outputs = np.einsum("tuwf,tuf->tw", truth[ids], inputs) + noise * rng.standard_normal((tokens, width), np.float32)
    return (
        rng.standard_normal((n, width, features), np.float32),
        truth,
        samples(ids, inputs, outputs.astype(np.float32)),
    )


def joint_ridge(old, s, train, ridge):
    """The same regression, all experts at once."""
    n, width, features = old.shape
    z = np.zeros((s.tokens, n, features))
    np.put_along_axis(z, s.ids[:, :, None].astype(np.int64), s.inputs.astype(np.float64), axis=1)
    z = z.reshape(s.tokens, -1)[:train]
    mu = ridge * np.square(z).sum() / (n * features)
    start = old.transpose(0, 2, 1).reshape(-1, width).astype(np.float64)
    gram = z.T @ z + mu * np.eye(n * features)
    found = np.linalg.solve(gram, z.T @ s.outputs[:train].astype(np.float64) + mu * start)
    return found.reshape(n, features, width).transpose(0, 2, 1)


def test_the_fit_is_the_joint_ridge_regression(monkeypatch):
    old, _, s = problem(0, noise=0.3)
    monkeypatch.setattr(repairing, "RIDGES", (1e-2,) * 60)  # many sweeps: converged, unless it stops before
    new, (before, after) = repairing.fit(old, s, 40)
    expected = joint_ridge(old, s, 360, 1e-2)
    np.testing.assert_allclose(new, expected, atol=0.02)
    assert after < 0.1 < before


def test_what_can_be_explained_is_found():
    old, truth, s = problem(1, tokens=3000)
    new, (before, after) = repairing.fit(old, s, 300)
    assert after < 1e-3 < before and np.abs(new - truth).max() < 0.1


@given(seed=st.integers(0, 1000), tokens=st.integers(10, 60), noise=st.sampled_from([0.0, 1.0, 30.0]))
def test_the_tokens_held_back_are_never_predicted_worse(seed, tokens, noise):
    old, _, s = problem(seed, tokens=tokens, noise=noise)
    new, (before, after) = repairing.fit(old, s, max(1, tokens // 10))
    assert after <= before and np.isfinite(new).all() and new.shape == old.shape


def test_an_expert_without_tokens_stays():
    old, _, s = problem(2)
    old = np.concatenate([old, old[:1]])
    new, _ = repairing.fit(old, s, 40)
    np.testing.assert_array_equal(new[5], old[5])


def test_scales_and_biases_are_not_the_weights_to_explain():
    rng = np.random.default_rng(3)
    ids, gates = rng.integers(0, 4, (50, 1)).astype(np.int32), rng.random((50, 1), np.float32)
    hidden, scales, biases = (
        rng.random((50, 1, 6), np.float32),
        rng.random(4, np.float32),
        rng.random((4, 3), np.float32),
    )
    truth = rng.standard_normal((4, 3, 6), np.float32)
    outputs = np.stack(
        [g[0] * (scales[e] * truth[e] @ h[0] + biases[e]) for (e,), g, h in zip(ids, gates, hidden, strict=True)]
    ).astype(np.float32)
    s = repairing.Samples(50, range(4), 4, gate_in_input=False, scales=scales, biases=biases)
    s.add(ids, gates, hidden, outputs)
    _, (before, _) = repairing.fit(truth, s, 10)
    assert before < 1e-10


# --- the plan --------------------------------------------------------------------------------------------------------


def write_repair(path, model, kept, *, type="F32", seed=0, **changes):
    """A repair of random numbers, in the format of experts.repair."""
    rng = np.random.default_rng(seed)
    keys = {
        "general.type": Value("expert_repair", "str"),
        "pgs.repair.format": Value(1, "u32"),
        "pgs.repair.model.header_sha256": Value(model.header_sha256, "str"),
        "pgs.repair.metric": Value("best", "str"),
        "pgs.repair.layers": Value(list(kept), "u32[]"),
        **{f"pgs.repair.{layer}.kept": Value(list(ids), "u32[]") for layer, ids in kept.items()},
    }
    keys |= {key: value for key, value in changes.items() if "." in key}
    tensors = {}
    for layer, ids in kept.items():
        shape = (len(ids), *model.tensors[f"blk.{layer}.ffn_down_exps.weight"].shape[1:])
        values = rng.standard_normal(shape, np.float32)
        tensors[f"blk.{layer}.ffn_down_exps.weight"] = (pgs.quantize(values, type), type, shape)
    tensors["errors"] = np.array([[0.5, 0.25]] * len(kept))
    write_gguf(path, keys, tensors, overwrite=True)
    return path


KEPT = {0: (1, 2, 5, 9), 1: (0, 3, 4, 15)}
DOWN = "blk.1.ffn_down_exps.weight"


@pytest.fixture
def qwen(tmp_path):
    with pgs.open(moe_models.qwen3moe(tmp_path / "qwen3moe.gguf")) as model:
        yield model


def test_the_down_projections_are_those_of_the_repair(qwen, tmp_path):
    repair = write_repair(tmp_path / "r.gguf", qwen, KEPT, type="F16")
    opened = pgs.experts.open_repair(repair)
    assert opened.kept == KEPT and opened.keep() == KEPT and opened.errors == {0: (0.5, 0.25), 1: (0.5, 0.25)}
    plan = pgs.Plan(qwen).keep_experts(opened.keep(), repair=repair)
    checked = plan.check()
    assert checked.actions()["repair"] == 2 and not checked.blockers
    plan.write(tmp_path / "out.gguf")
    metadata, tensors = read_gguf(tmp_path / "out.gguf")
    values = read_gguf(repair)[1][DOWN][1]
    assert tensors[DOWN][0] == "F16"  # as the source has it
    np.testing.assert_array_equal(tensors[DOWN][1], values)
    up = qwen.tensors["blk.1.ffn_up_exps.weight"].dequantize(experts=KEPT[1])
    np.testing.assert_array_equal(tensors["blk.1.ffn_up_exps.weight"][1].astype(np.float32), up)
    assert metadata["pgs.experts.metric"] == "best" and metadata["pgs.experts.0.repaired"] is True
    from pygguf_surgery.reports.verification import verify

    report = verify(tmp_path / "out.gguf", qwen.path)
    assert report.good and len(report.repaired) == 2 and "2 repaired" in report.summary()
    with pgs.open(tmp_path / "out.gguf") as again:  # a copy of a repaired file is compared like any other
        pgs.Plan(again).write(tmp_path / "copy.gguf")
    assert not verify(tmp_path / "copy.gguf", tmp_path / "out.gguf").repaired


@pytest.mark.parametrize("type", ["F16", "Q8_0", "Q4_K"])
def test_a_repair_of_another_type_is_encoded_with_the_plan(qwen, tmp_path, type):
    repair = write_repair(tmp_path / "r.gguf", qwen, KEPT, type="BF16")
    plan = pgs.Plan(qwen).keep_experts(KEPT, repair=repair)
    plan = plan if type == "F16" else plan.quantize("Q8_0", pure=True)
    plan.write(tmp_path / "out.gguf")
    with pgs.open(tmp_path / "out.gguf") as out:
        source = pgs.dequantize(read_gguf(repair)[1][DOWN][1].view(np.uint8), "BF16")
        expected = pgs.quantize(source, out.tensors[DOWN].type)
        np.testing.assert_array_equal(out.tensors[DOWN].bytes(), expected.ravel())


def test_a_quantized_source_gets_its_own_type_again(tmp_path):
    with pgs.open(moe_models.qwen3moe(tmp_path / "q8.gguf", type="Q8_0")) as model:
        repair = write_repair(tmp_path / "r.gguf", model, KEPT)
        pgs.Plan(model).keep_experts(KEPT, repair=repair).write(tmp_path / "out.gguf")
        with pgs.open(tmp_path / "out.gguf") as out:
            assert out.tensors[DOWN].type == "Q8_0"
            np.testing.assert_array_equal(
                out.tensors[DOWN].bytes(), pgs.quantize(read_gguf(repair)[1][DOWN][1], "Q8_0").ravel()
            )


def test_a_second_cut_takes_from_the_repaired(qwen, tmp_path):
    repair = write_repair(tmp_path / "r.gguf", qwen, KEPT)
    plan = pgs.Plan(qwen).keep_experts(KEPT, repair=repair).keep_experts({0: [0, 1, 2, 3], 1: [0, 1, 2, 3]})
    plan.write(tmp_path / "same.gguf")
    values = read_gguf(repair)[1][DOWN][1]
    np.testing.assert_array_equal(read_gguf(tmp_path / "same.gguf")[1][DOWN][1], values.astype(np.float16))
    more = {0: range(8), 1: range(8)}
    repair = write_repair(tmp_path / "r8.gguf", qwen, {k: tuple(v) for k, v in more.items()})
    pgs.Plan(qwen).keep_experts(more, repair=repair).keep_experts({0: [1, 3, 5, 7], 1: [0, 2, 4, 6]}).write(
        tmp_path / "less.gguf"
    )
    values = read_gguf(repair)[1][DOWN][1][[0, 2, 4, 6]]
    np.testing.assert_array_equal(read_gguf(tmp_path / "less.gguf")[1][DOWN][1], values.astype(np.float16))
    first = pgs.Plan(qwen).keep_experts(more)
    assert "first cut" in str(
        first.keep_experts(
            {k: range(4) for k in KEPT},
            repair=write_repair(tmp_path / "late.gguf", qwen, {k: tuple(range(4)) for k in KEPT}),
        )
        .check()
        .blockers[0]
    )


def test_a_plan_with_a_repair_is_data(qwen, tmp_path):
    repair = write_repair(tmp_path / "r.gguf", qwen, KEPT)
    plan = pgs.Plan(qwen).keep_experts(KEPT, repair=repair)
    assert pgs.Plan.from_json(plan.to_json(), qwen) == plan == pickle.loads(pickle.dumps(plan))
    text = json.loads(plan.to_json())
    assert text["edits"][0]["repair"]["path"] == str(repair)
    write_repair(repair, qwen, KEPT, seed=1)
    blocker = plan.check().blockers[0]
    assert isinstance(blocker, pgs.SourceChanged) and blocker.path == str(repair)
    repair.unlink()
    assert isinstance(plan.check().blockers[0], pgs.BadFile)


def test_a_repair_that_does_not_fit_is_refused(qwen, tmp_path):
    repair = write_repair(tmp_path / "r.gguf", qwen, KEPT)

    def blocker(kept, path):
        return str(pgs.Plan(qwen).keep_experts(kept, repair=path).check().blockers[0])

    assert "for other experts" in blocker({0: (1, 2, 5, 8), 1: KEPT[1]}, repair)
    with pytest.raises(pgs.BadFile, match="not a repair"):
        pgs.Plan(qwen).keep_experts(KEPT, repair=qwen.path)


@pytest.mark.parametrize(
    "key, value",
    [
        ("pgs.repair.layers", Value(["0", "1"], "str[]")),
        ("pgs.repair.layers", Value(2, "u32")),
        ("pgs.repair.0.kept", Value(["a"], "str[]")),
        ("pgs.repair.1.kept", Value([], "u32[]")),
    ],
)
def test_a_repair_that_contradicts_itself(qwen, tmp_path, key, value):
    repair = write_repair(tmp_path / "r.gguf", qwen, KEPT, **{key: value})
    with pytest.raises(pgs.BadFile) as error:
        pgs.experts.open_repair(repair)
    assert error.value.object == key and error.value.path == str(repair)


def test_a_repair_alone_takes_no_statistics(qwen, tmp_path, capsys):
    from pygguf_surgery.cli import main

    repair = write_repair(tmp_path / "r.gguf", qwen, KEPT)
    assert main(["plan", qwen.path, "--repair", str(repair), "--super-experts"]) == 2
    assert "names the experts" in capsys.readouterr().err
    assert main(["plan", qwen.path, "--repair", str(repair)]) == 0 and "repaired" in capsys.readouterr().err


def test_best_without_a_repair_is_no_choice(qwen):
    with pytest.raises(pgs.BadPlan, match="repaired"):
        pgs.Plan(qwen).keep_experts(pgs.experts.Keep(KEPT, "best"))


# --- llama.cpp -------------------------------------------------------------------------------------------------------

TOKENS = np.random.default_rng(7).integers(0, moe_models.VOCAB, 480)
HALF = {1: tuple(range(0, 16, 2)), 2: tuple(range(1, 16, 2))}


@pytest.mark.parity
@pytest.mark.parametrize("groups", [0, 4])
def test_masked_experts_route_as_in_the_pruned_file(tmp_path, groups, monkeypatch):
    """In the first MoE layer, whose inputs are the same in both."""
    pytest.importorskip("llama_cpp")
    from support.llama_oracle import Tap

    path, seen = moe_models.dots1(tmp_path / "model.gguf", groups=groups), {}
    kept = {layer: (0, 1, 5, 7, 8, 11, 12, 13) for layer in (1, 2)} if groups else HALF

    def keep(old, s, held_back):
        seen[len(seen) + 1] = s
        return old, (0.0, 0.0)

    monkeypatch.setattr(repairing, "fit", keep)
    with pgs.open(path) as model:
        pgs.experts.repair(model, kept, [TOKENS], tmp_path / "r.gguf", n_ctx=40)
        pgs.Plan(model).keep_experts(kept).write(tmp_path / "pruned.gguf")
        down = model.tensors["blk.1.ffn_down_exps.weight"].dequantize(experts=kept[1])
    tap = Tap(tmp_path / "pruned.gguf", ["ffn_moe_topk-1", "ffn_moe_weights_scaled-1", "ffn_moe_out-1"], TOKENS, 40)
    windows = np.arange(480).reshape(12, 40)
    order = np.concatenate([np.delete(windows, [5], axis=0).ravel(), windows[5]])  # the sixth is held back
    np.testing.assert_array_equal(seen[1].ids, tap["ffn_moe_topk-1"][order])
    y = np.einsum("tuf,tuwf->tw", seen[1].inputs, down[seen[1].ids])
    np.testing.assert_allclose(y, tap["ffn_moe_out-1"][order], rtol=1e-3, atol=1e-4)
    original = Tap(path, ["ffn_moe_out-1", "ffn_moe_out-2"], TOKENS, 40)
    for layer in (1, 2):
        np.testing.assert_allclose(seen[layer].outputs, original[f"ffn_moe_out-{layer}"][order], rtol=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["dots1", "qwen3moe", "gpt_oss", "nvfp4_scales", "gemma4", "llama4"])
def test_without_a_cut_there_is_nothing_to_repair(tmp_path, name):
    pytest.importorskip("llama_cpp")
    with pgs.open(moe_models.ALL[name](tmp_path / "model.gguf")) as model:
        found = pgs.experts.rank(model).keep(model.get("expert_count"))
        errors = pgs.experts.repair(model, found, [TOKENS], tmp_path / "r.gguf", n_ctx=40)
    assert errors and all(before < 1e-3 for before, _ in errors.values()), errors


@pytest.mark.parity
def test_layers_in_several_passes_give_the_same(tmp_path):
    pytest.importorskip("llama_cpp")
    with pgs.open(moe_models.dots1(tmp_path / "model.gguf")) as model:
        both = pgs.experts.repair(model, HALF, [TOKENS], tmp_path / "a.gguf", n_ctx=40, threads=1)
        one = 480 * 4 * (4 * (32 + 1) + 32) + 4 * 480 * 32 + 3 * 4 * 8 * 32 * 32
        calls = []
        each = pgs.experts.repair(
            model,
            HALF,
            [TOKENS],
            tmp_path / "b.gguf",
            n_ctx=40,
            memory=one,
            threads=1,
            progress=lambda done, total: calls.append((done, total)),
        )
        assert both == each and calls[-1] == (24, 24)
        assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
        with pytest.raises(pgs.BadPlan, match="do not fit"):
            pgs.experts.repair(model, HALF, [TOKENS], tmp_path / "c.gguf", n_ctx=40, memory=one - 1)
        with pytest.raises(pgs.BadPlan, match="too short"):
            pgs.experts.repair(model, HALF, [TOKENS[:80]], tmp_path / "c.gguf", n_ctx=40)
        with pytest.raises(pgs.BadPlan, match="not ascending"):
            pgs.experts.repair(model, {1: [3, 2], 2: [0, 1]}, [TOKENS], tmp_path / "c.gguf", n_ctx=40)
    assert not (tmp_path / "c.gguf").exists()


@pytest.mark.parity
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_stopped_repair_goes_on_with_the_layers_that_it_lacks(tmp_path, error):
    pytest.importorskip("llama_cpp")
    one = 480 * 4 * (4 * (32 + 1) + 32) + 4 * 480 * 32 + 3 * 4 * 8 * 32 * 32  # of the two layers
    out, raised = tmp_path / "out.gguf", error("mine")
    with pgs.open(moe_models.dots1(tmp_path / "model.gguf")) as model:

        def run(out=out, texts=(TOKENS,), **options):
            return pgs.experts.repair(model, HALF, texts, out, n_ctx=40, memory=one, threads=1, **options)

        def stop_at(number):
            def stop(done, total):
                assert total == 24
                if done == number:
                    raise raised

            return stop

        whole = run(tmp_path / "whole.gguf")
        for number, kept in ((5, False), (17, True)):
            with pytest.raises(error) as caught:
                run(progress=stop_at(number))
            assert caught.value is raised and not out.exists()
            assert (tmp_path / "out.gguf.partial").exists() == kept
        with pytest.raises(pgs.BadPlan, match="another run"):
            run(texts=[TOKENS[::-1]])
        with pytest.raises(pgs.BadPlan, match="one of the inputs"):
            run(texts=[tmp_path / "out.gguf.partial"])
        calls = []
        assert run(progress=lambda *now: calls.append(now)) == whole
        assert calls == [(done, 12) for done in range(1, 13)]
        assert out.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
        assert not (tmp_path / "out.gguf.partial").exists()


@pytest.mark.parity
def test_a_quantized_twin_may_run_in_its_place(tmp_path):
    pytest.importorskip("llama_cpp")
    path = moe_models.dots1(tmp_path / "model.gguf")
    with pgs.open(path) as model:
        pgs.Plan(model).quantize("Q8_0").write(tmp_path / "q8.gguf")
        errors = pgs.experts.repair(model, HALF, [TOKENS], tmp_path / "r.gguf", run=tmp_path / "q8.gguf", n_ctx=40)
        assert all(after <= before for before, after in errors.values())
        pgs.Plan(model).keep_experts(HALF, repair=tmp_path / "r.gguf").write(tmp_path / "out.gguf")
        other = moe_models.qwen3moe(tmp_path / "other.gguf")
        with pytest.raises(pgs.BadPlan, match="not the same model"):
            pgs.experts.repair(model, HALF, [TOKENS], tmp_path / "r2.gguf", run=other, n_ctx=40)


@pytest.mark.parity
def test_a_repaired_cut_of_a_trained_model_is_far_better(tmp_path, capsys):
    pytest.importorskip("llama_cpp")
    if not TRAINED.exists():
        pytest.skip(f"{TRAINED.name} is not here")
    from pygguf_surgery.cli import main

    (tmp_path / "text").write_bytes((TRAINED.parent / "calib.txt").read_bytes()[:80_000])
    stats, repair, out = (str(tmp_path / name) for name in ("s.gguf", "r.gguf", "out.gguf"))
    text, evaluation, model = str(tmp_path / "text"), TRAINED.parent / "eval.txt", str(TRAINED)
    choice = ["--keep", "16", "--by", "best", "--stats", stats]
    assert main(["calibrate", model, text, "-o", stats, "--ctx", "256"]) == 0
    assert main(["repair", model, text, "-o", repair, "--ctx", "256", *choice]) == 0
    assert "repaired" in capsys.readouterr().out
    assert main(["prune", model, out, "--repair", repair]) == 0
    with pgs.open(out) as cut:
        assert cut.metadata["pgs.experts.metric"] == "best"
    assert main(["prune", model, out, "--repair", repair, *choice, "--force"]) == 0  # the same experts by name
    assert (
        main(["prune", model, str(tmp_path / "plain.gguf"), "--keep", "16", "--by", "reap-sum", "--stats", stats]) == 0
    )

    def perplexity(path):
        return pgs.experts.calibrate(path, [evaluation], n_ctx=256, chunks=20).perplexity()[0]

    plain, repaired = perplexity(tmp_path / "plain.gguf"), perplexity(out)
    assert repaired < 0.6 * plain, (repaired, plain)
