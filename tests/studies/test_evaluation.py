"""Perplexity, KLD and loops: against logits in numpy, against llama-perplexity's figures, and what is refused."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import pygguf_surgery as pgs
from pygguf_surgery.cli import main
from pygguf_surgery.studies import evaluation
from support import moe_models
from support.json_schema import FOLDER
from support.llama_oracle import TOKENS, Tap
from support.places import SHARED

TRAINED = SHARED / "models" / "tiny-qwen3next-bf16.gguf"
OTHER = np.random.default_rng(3).integers(0, moe_models.VOCAB, 130)


@pytest.fixture
def pair(tmp_path):
    """A model and a coarser one."""
    pytest.importorskip("llama_cpp")
    path = moe_models.dots1(tmp_path / "model.gguf")
    with pgs.open(path) as model:
        pgs.Plan(model).quantize("Q4_0", pure=True).write(tmp_path / "small.gguf")
    return str(path), str(tmp_path / "small.gguf")


# --- against numpy ---------------------------------------------------------------------------------------------------


def predictions(path, tokens, n_ctx):
    """log softmax [n, n_vocab] of the predictions that count, and the tokens that followed."""
    logits = Tap(path, ["result_output"], tokens, n_ctx)["result_output"]
    logits = logits.reshape(-1, n_ctx, logits.shape[-1])[:, n_ctx // 2 : -1].reshape(-1, logits.shape[-1])
    logits -= logits.max(axis=1, keepdims=True)
    followed = np.stack([w[n_ctx // 2 + 1 :] for w in tokens[: len(tokens) // n_ctx * n_ctx].reshape(-1, n_ctx)])
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), followed.ravel()


def by_formula(p, q, followed):
    """The numbers of llama-perplexity --kl-divergence."""
    kld, rows = (np.exp(p) * (p - q)).sum(axis=1), np.arange(len(followed))
    a, b = -q[rows, followed], -p[rows, followed]
    ratio = math.exp(a.mean() - b.mean())
    return {
        "mean": kld.mean(),
        "mean_error": kld.std() / math.sqrt(len(kld) - 1),
        "median": np.median(kld),
        "p90": np.percentile(kld, 90),
        "p99": np.percentile(kld, 99),
        "p999": np.percentile(kld, 99.9),
        "max": kld.max(),
        "same_top": (p.argmax(axis=1) == q.argmax(axis=1)).mean(),
        "delta_p_rms": math.sqrt(np.square(np.exp(-a) - np.exp(-b)).mean()),
        "perplexity_ratio": ratio,
        "perplexity_ratio_error": ratio * (a - b).std() / math.sqrt(len(kld) - 1),
    }


@pytest.mark.parity
def test_all_numbers_are_those_of_the_logits(pair):
    found = evaluation.perplexity([pair[1]], [TOKENS, OTHER], baseline=pair[0], n_ctx=40, threads=1)
    assert found["windows"] == 5 + 3 and found["tokens"] == 320 and len(found["models"]) == 1
    logs = [[predictions(path, text, 40) for text in (TOKENS, OTHER)] for path in pair]
    for entry, texts in zip((found["baseline"], found["models"][0]), logs, strict=True):
        nll = [-q[np.arange(len(t)), t] for q, t in texts]
        for part, its in zip((entry, *entry["texts"]), (np.concatenate(nll), *nll), strict=True):
            assert part["perplexity"] == pytest.approx(math.exp(its.mean()), rel=1e-9)
            assert part["perplexity_error"] == pytest.approx(
                part["perplexity"] * its.std() / math.sqrt(len(its) - 1), rel=1e-9
            )
    (p, q), followed = ([np.concatenate([x for x, _ in texts]) for texts in logs]), [t for _, t in logs[0]]
    assert found["baseline"]["kld"] is None
    assert found["models"][0]["kld"] == pytest.approx(by_formula(p, q, np.concatenate(followed)), rel=1e-6, abs=1e-12)
    for i, part in enumerate(found["models"][0]["texts"]):
        expected = by_formula(logs[0][i][0], logs[1][i][0], followed[i])
        assert part["kld"] == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parity
def test_a_model_is_no_way_from_itself(pair):
    found = evaluation.perplexity([pair[0], pair[1], pair[0]], [TOKENS], baseline=pair[0], n_ctx=40, threads=1)
    first, small, last = found["models"]
    assert first == last and first["kld"] == pytest.approx(
        dict.fromkeys(first["kld"], 0) | {"same_top": 1, "perplexity_ratio": 1}, abs=1e-12
    )
    assert small["kld"]["mean"] > 1e-6
    alone = evaluation.perplexity([pair[1]], [TOKENS], n_ctx=40, threads=1)
    assert alone["baseline"] is None and alone["models"][0] == {
        **small,
        "kld": None,
        "texts": [{**small["texts"][0], "kld": None}],
    }
    apart = evaluation.perplexity([pair[1]], [TOKENS], baseline=pair[0], n_ctx=40, threads=1, isolate=True)
    assert apart["models"] == [small]


@given(st.integers(2, 40), st.integers(2, 30), st.integers(0, 2**32 - 1))
def test_distances_depend_neither_on_pieces_nor_on_threads(rows, vocabulary, seed):
    rng = np.random.default_rng(seed)
    p, q = (10 * rng.standard_normal((2, rows, vocabulary))).astype(np.float32)
    followed = rng.integers(0, vocabulary, rows)

    def distances(step, threads, block):
        parent, found = [], evaluation._Distances()
        with ThreadPoolExecutor(threads) as pool, pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, "_BLOCK", block)
            by_rows = evaluation._Rows(pool)
            keep, at = evaluation._Keeper(by_rows, parent), range(0, rows, step)
            losses = [keep(p[i : i + step], followed[i : i + step]) for i in at]
            compare = evaluation._Comparison(by_rows, parent, found)
            losses += [compare(q[i : i + step], followed[i : i + step]) for i in at]
        return found, np.concatenate(losses)

    (whole, losses), (pieces, other) = distances(rows, 1, 1 << 20), distances(7, 3, 40)
    np.testing.assert_array_equal(np.concatenate(pieces.kld), whole.kld[0])
    np.testing.assert_array_equal(losses, other)
    assert (whole.kld[0] > -1e-9).all() and pieces.same_top == whole.same_top
    log_p, log_q = (z - np.log(np.exp(z.astype(float)).sum(axis=1, keepdims=True)) for z in (p.astype(float), q))
    np.testing.assert_allclose(whole.kld[0], (np.exp(log_p) * (log_p - log_q)).sum(axis=1), rtol=1e-6, atol=1e-9)


# --- loops -----------------------------------------------------------------------------------------------------------


def test_distinct_4_grams():
    said = {1: [1, 2, 3, 4, 5, 6, 7], 2: [1, 2] * 5, 3: [9, 9, 9], 4: []}
    session = SimpleNamespace(generate=lambda prompt, most: np.array(said[int(prompt[0])], np.int32)[:most])
    found = evaluation._loops(session, [np.array([i]) for i in said])
    assert found == {"prompts": 4, "tokens": 20, "distinct_4": (4 + 2) / (4 + 7)}
    assert evaluation._loops(session, [np.array([4])])["distinct_4"] is None


@pytest.mark.parity
def test_the_continuation_is_the_most_likely_one(pair):
    from pygguf_surgery.llama.session import Session

    with Session(pair[0], n_ctx=80, threads=1) as session:
        made = session.generate(TOKENS[:10].astype(np.int32), 12)
        assert len(made) == 12 and (made == session.generate(TOKENS[:10].astype(np.int32), 12)).all()
        text = np.concatenate([TOKENS[:10], made]).astype(np.int32)
    logits = Tap(pair[0], ["result_output"], text, len(text))["result_output"]
    assert (logits.argmax(axis=1)[9:-1] == made).all()
    found = evaluation.perplexity([pair[1]], [TOKENS], baseline=pair[0], n_ctx=40, threads=1, loops=True)
    for entry in (found["baseline"], *found["models"]):
        assert entry["loops"]["prompts"] == 8 and 0 < entry["loops"]["distinct_4"] <= 1


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parity
def test_another_vocabulary_is_refused_before_a_model_is_loaded(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "Session", lambda *_, **__: pytest.fail("a model was loaded"))
    with pgs.open(pair[0]) as model:
        plan = pgs.Plan(model).set_metadata({"tokenizer.ggml.tokens": ["a"] * moe_models.VOCAB})
        plan.write(tmp_path / "other.gguf")
    with pytest.raises(pgs.BadPlan, match="another vocabulary") as caught:
        evaluation.perplexity([pair[1], str(tmp_path / "other.gguf")], [TOKENS], baseline=pair[0], n_ctx=40)
    assert caught.value.path == str(tmp_path / "other.gguf")
    for models in ([], pair[0], None):
        with pytest.raises(pgs.BadPlan, match="not a list of models"):
            evaluation.perplexity(models, [TOKENS], n_ctx=40)


@pytest.mark.parity
def test_an_error_of_progress_ends_it(pair):
    error, calls = ValueError("mine"), []

    def stop(done, total):
        calls.append((done, total))
        if done == 3:
            raise error

    with pytest.raises(ValueError) as caught:
        evaluation.perplexity([pair[1]], [TOKENS], baseline=pair[0], n_ctx=40, progress=stop)
    assert caught.value is error and calls == [(1, 10), (2, 10), (3, 10)]


# --- the shell -------------------------------------------------------------------------------------------------------


def test_models_come_first_and_then_texts(tmp_path, capsys):
    (tmp_path / "m").write_bytes(b"GGUF")
    (tmp_path / "t").write_bytes(b"text")
    m, t = str(tmp_path / "m"), str(tmp_path / "t")
    for words, what in (([m], "a TEXT"), ([t], "a MODEL"), ([t, m], "a MODEL"), ([m, m], "a TEXT")):
        assert main(["perplexity", *words]) == 2
        assert capsys.readouterr().err == f"gguf-surgery: error: perplexity needs {what}\n"
    assert main(["perplexity", m, str(tmp_path / "none")]) == 3


@pytest.mark.parity
def test_from_the_shell(tmp_path, capsys):
    pytest.importorskip("llama_cpp")
    if not TRAINED.exists():
        pytest.skip(f"{TRAINED.name} is not here")
    with pgs.open(TRAINED) as model:
        pgs.Plan(model).quantize("Q4_K_M").write(tmp_path / "q4.gguf")
    for name in ("eval", "calib"):
        (tmp_path / name).write_bytes((TRAINED.parent / f"{name}.txt").read_bytes()[:3000])
    command = ["perplexity", str(tmp_path / "q4.gguf"), str(tmp_path / "eval"), str(tmp_path / "calib"), "--ctx", "64"]
    command += ["--chunks", "3", "--quiet", "--baseline", str(TRAINED)]
    assert main([*command, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    schema = json.loads((FOLDER / "perplexity.schema.json").read_text())
    assert not list(Draft202012Validator(schema).iter_errors(data))
    assert main([*command, "--loops"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 windows of 64 tokens" and len(lines) == 8 and "distinct-4" in lines[1]
    assert f"{data['models'][0]['kld']['mean']:.6f}" in lines[5] and lines[6].startswith("  eval")
