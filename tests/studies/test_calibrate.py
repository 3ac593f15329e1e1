"""Calibration: what is recorded against an independent forward pass in numpy; stops, resumes, errors."""

import importlib
import json
import re
import tracemalloc

import gguf
import numpy as np
import pytest

import pygguf_surgery as pgs
from pygguf_surgery.files.gguf import read_gguf, write_gguf
from pygguf_surgery.files.stats import LayerStats
from pygguf_surgery.llama import taps
from pygguf_surgery.studies import recording
from support import moe_models
from support.expert_stats import batch, fold, same, some_stats
from support.llama_oracle import TOKENS, Tap
from support.places import ROOT, SHARED

calibration = importlib.import_module("pygguf_surgery.studies.calibration")

TRAINED = SHARED / "models" / "tiny-qwen3next-bf16.gguf"
SUMS = ("count", "gate_sum", "norm_sum", "norm_sq_sum", "gated_norm_sum", "max_activation", "coactivation")


# --- observations, against loops -------------------------------------------------------------------------------------


def loops(ids, gates, outputs, logits, experts):
    s = LayerStats.empty(experts)
    s.gated_sum = np.zeros((experts, outputs.shape[2]))
    for t in range(len(ids)):
        s.tokens += 1
        s.logit_gram += np.outer(logits[t].astype(np.float64), logits[t].astype(np.float64))
        for u, e in enumerate(ids[t]):
            f, g = outputs[t, u].astype(np.float64), float(gates[t, u])
            norm = np.sqrt((f * f).sum())
            s.count[e] += 1
            s.gate_sum[e] += g
            s.norm_sum[e] += norm
            s.norm_sq_sum[e] += norm * norm
            s.gated_norm_sum[e] += g * norm
            s.max_activation[e] = max(s.max_activation[e], np.abs(f).max())
            s.gated_sum[e] += g * f
            for other in ids[t]:
                s.coactivation[e, other] += 1
    return s


@pytest.mark.parametrize("tokens, experts, used, width", [(1, 4, 1, 3), (1, 4, 4, 3), (7, 5, 2, 1), (40, 16, 4, 9)])
def test_fold_is_the_sum_over_tokens(tokens, experts, used, width):
    parts = batch(0, tokens, experts, used, width)
    found, expected = LayerStats.empty(experts), loops(*parts, experts)
    half = tokens // 2
    for piece in [slice(0, half), slice(half, None)] if half else [slice(None)]:
        fold(found, *(p[piece] for p in parts), merge_stats=True)
    assert found.tokens == tokens
    for name, array in expected.arrays().items():
        np.testing.assert_allclose(getattr(found, name), array, rtol=2e-6, atol=1e-6, err_msg=name)
    assert (found.coactivation.diagonal() == found.count).all() and found.count.sum() == tokens * used


def test_activations_beyond_float32_squares_are_finite():
    ids, gates, outputs, logits = batch(0, 4, 4, 1, 3)
    stats = LayerStats.empty(4)
    fold(stats, ids, gates, np.full_like(outputs, 1e25), logits)
    np.testing.assert_allclose(stats.norm_sum, stats.count * 1e25 * np.sqrt(3), rtol=1e-6)


@pytest.mark.parametrize("where", ["outputs", "gates"])
def test_activations_that_are_not_finite_are_an_error(where):
    ids, gates, outputs, logits = batch(0, 4, 4, 1, 3)
    {"outputs": outputs[2, 0], "gates": gates[2]}[where][...] = np.nan
    with pytest.raises(pgs.BadFile, match=f"in expert {ids[2, 0]}"):
        fold(LayerStats.empty(4), ids, gates, outputs, logits)


@pytest.mark.parametrize("merge_stats, pairs", [(False, True), (True, True), (False, False)])
def test_memory_needed_is_what_it_takes(merge_stats, pairs):
    layers, experts, used, width, n_ctx, size = 6, 256, 8, 512, 256, 64
    stats = {layer: LayerStats.empty(experts, pairs) for layer in range(layers)}
    parts = dict(zip(("ids", "gates", "outputs", "logits"), batch(0, size, experts, used, width), strict=True))

    def run_window():
        for _ in range(n_ctx // size):
            for layer in range(layers):
                for kind, values in parts.items():
                    recorder.take(f"{kind}-{layer}", values.copy())
        recorder.add_window()

    tracemalloc.start()
    try:
        recorder = recording.Recorder("test", stats, experts, merge_stats=merge_stats, pairs=pairs)
        recorder.names = {f"{kind}-{layer}": (kind, layer) for kind in parts for layer in range(layers)}
        for _ in range(2):
            run_window()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    empty = sum(
        array.nbytes for layer in stats.values() for array in LayerStats.empty(experts, pairs).arrays().values()
    )
    needed = recording.memory_needed(layers, experts, used, width, n_ctx, size, merge_stats=merge_stats, pairs=pairs)
    assert 0.5 * needed < peak + empty < needed * 1.1, (peak + empty, needed)
    assert all(layer.tokens == 2 * n_ctx and (layer.logit_gram is not None) == pairs for layer in stats.values())


@pytest.mark.parity
def test_statistics_without_pairs_rank_and_fit_into_less(model, tmp_path):
    with_pairs = pgs.experts.calibrate(model, [TOKENS], n_ctx=40, threads=1)
    out = tmp_path / "stats.gguf"
    stats = pgs.experts.calibrate(model, [TOKENS], out, n_ctx=40, threads=1, pairs=False)
    same(pgs.experts.open_stats(out), stats)
    assert stats.layers[1].coactivation is None and not stats.pairs and with_pairs.pairs
    with pgs.open(model) as opened:
        ranked = [pgs.experts.rank(opened, "reap", stats=s).scores for s in (stats, with_pairs)]
        assert all((ranked[0][layer] == ranked[1][layer]).all() for layer in (1, 2))
        with pytest.raises(pgs.BadPlan, match="merging needs"):
            pgs.experts.group(opened, 8, stats=stats)
    with pytest.raises(pgs.BadPlan, match="merging needs the pairs"):
        pgs.experts.calibrate(model, [TOKENS], n_ctx=40, merge_stats=True, pairs=False)


def test_too_little_memory_is_refused_before_anything_runs(tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(calibration, "Session", lambda *_, **__: pytest.fail("a model was loaded"))
    path = moe_models.qwen3moe(tmp_path / "model.gguf", experts=512)
    long = {"n_ctx": 32768, "texts": [np.zeros(40000, int)]}
    with pytest.raises(pgs.BadPlan, match="at least 64MiB"):
        pgs.experts.calibrate(path, memory="1MiB", **long)
    with pytest.raises(pgs.BadPlan, match="do not fit") as caught, pytest.warns(pgs.SurgeryWarning, match="longer"):
        pgs.experts.calibrate(path, memory="64MiB", **long)
    assert "--no-pairs" in caught.value.hint
    with pytest.raises(pgs.BadPlan, match="do not fit") as caught, pytest.warns(pgs.SurgeryWarning, match="longer"):
        pgs.experts.calibrate(path, memory="64MiB", n_ctx=1 << 20, pairs=False, texts=[np.zeros(1 << 20, int)])
    assert caught.value.hint is None


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge_stats", [False, True])
def test_a_file_gives_back_what_was_written_and_gguf_py_reads_it(tmp_path, merge_stats):
    stats = some_stats(merge_stats=merge_stats)
    stats.write(tmp_path / "stats.gguf")
    same(pgs.experts.open_stats(tmp_path / "stats.gguf"), stats)
    reader = gguf.GGUFReader(tmp_path / "stats.gguf")
    assert reader.get_field("general.type").contents() == "expert_stats"
    found = {t.name: t.data for t in reader.tensors}
    np.testing.assert_array_equal(found["blk.3.gated_norm_sum"], stats.layers[3].gated_norm_sum)
    assert ("blk.3.gated_sum" in found) == merge_stats


def test_merging_adds_texts():
    a, b = some_stats(0, text="a"), some_stats(10, text="b")
    both = a.merge(b)
    assert both.tokens == a.tokens + b.tokens == 80 and len(both.texts) == 2 and both.predictions == 40
    np.testing.assert_array_equal(both.layers[1].count, a.layers[1].count + b.layers[1].count)
    np.testing.assert_array_equal(
        both.layers[3].max_activation, np.maximum(a.layers[3].max_activation, b.layers[3].max_activation)
    )
    same(a.merge(), a)
    assert both.perplexity()[0] == pytest.approx(np.exp(25 / 40))


@pytest.mark.parametrize(
    "other, object",
    [(dict(text="a"), "texts"), (dict(text="b", experts=7), "experts"), (dict(text="b", layers=(1, 2)), None)],
)
def test_what_does_not_belong_together_is_not_merged(other, object):
    with pytest.raises(pgs.BadPlan) as error:
        some_stats().merge(some_stats(**other))
    assert error.value.object == object


def test_another_file_is_no_statistics(tmp_path):
    with pytest.raises(pgs.BadFile, match="not statistics"):
        pgs.experts.open_stats(moe_models.qwen3moe(tmp_path / "model.gguf"))
    stats = some_stats()
    stats.layers[1].count = stats.layers[1].count[:-1]
    stats.write(tmp_path / "short.gguf")
    with pytest.raises(pgs.BadFile) as error:
        pgs.experts.open_stats(tmp_path / "short.gguf")
    assert error.value.object == "blk.1.count" and error.value.path == str(tmp_path / "short.gguf")
    stats = some_stats()
    stats.layers[1].norm_sum[0] = np.nan
    stats.write(tmp_path / "nan.gguf")
    with pytest.raises(pgs.BadFile, match="cannot be sums"):
        pgs.experts.open_stats(tmp_path / "nan.gguf")


@pytest.mark.parametrize(
    "key, value",
    [
        ("layers", pgs.Value(["1", "3"], "str[]")),
        ("tokens", pgs.Value([1.5, 2.0], "f32[]")),
        ("text.done", pgs.Value([True], "bool[]")),
        ("text.sha256", pgs.Value([1], "u32[]")),
        ("layers", pgs.Value([1], "u32[]")),
        ("experts", pgs.Value("6", "str")),
    ],
)
def test_statistics_with_keys_of_another_type(tmp_path, key, value):
    some_stats().write(tmp_path / "stats.gguf")
    metadata, tensors = read_gguf(tmp_path / "stats.gguf")
    metadata["pgs.stats." + key] = value
    write_gguf(tmp_path / "changed.gguf", metadata, tensors)
    with pytest.raises(pgs.BadFile):
        pgs.experts.open_stats(tmp_path / "changed.gguf")


def test_without_llama_cpp_python_the_error_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(pgs.Unsupported, match=r"pygguf-surgery\[llama\]"):
        pgs.experts.calibrate(moe_models.qwen3moe(tmp_path / "model.gguf"), [b"text"])


def test_no_input_is_ever_replaced(tmp_path, capsys):
    from pygguf_surgery.cli import main

    model, text = str(moe_models.qwen3moe(tmp_path / "model.gguf")), str(tmp_path / "text")
    (tmp_path / "text").write_bytes(b"text")
    before = (tmp_path / "model.gguf").read_bytes()
    for command in (
        ["calibrate", model, text, "-o", model],
        ["calibrate", model, text, "-o", text],
        ["repair", model, text, "-o", model, "--keep", "8"],
        ["repair", model, text, "-o", text, "--keep", "8"],
        ["repair", model, text, "-o", str(tmp_path / "r"), "--keep", "8", "--run", str(tmp_path / "r")],
        ["plan", model, "--keep", "8", "--report", model],
        ["plan", model, "--keep", "8", "--plot", model],
    ):
        (tmp_path / "r").write_bytes(before)
        assert main([*command, "--force"]) == 4 and "one of the inputs" in capsys.readouterr().err, command
    assert (tmp_path / "model.gguf").read_bytes() == before == (tmp_path / "r").read_bytes()
    assert (tmp_path / "text").read_bytes() == b"text"


@pytest.mark.parametrize(
    "out, texts, error",
    [("no/such/folder.gguf", [b"text"], FileNotFoundError), ("out.gguf", ["no such text"], FileNotFoundError)],
)
def test_what_would_fail_at_the_end_fails_at_the_start(tmp_path, out, texts, error):
    with pytest.raises(error):
        pgs.experts.calibrate(tmp_path / "no model.gguf", texts, tmp_path / out)


# --- llama.cpp -------------------------------------------------------------------------------------------------------


def forward(model, layer, inputs, ids, gates, logits):
    """The layer's statistics in numpy, float64, from dequantized weights, what goes into its experts, ids and gates."""
    part = {
        p: model.tensors[f"blk.{layer}.ffn_{p}_exps.weight"].dequantize().astype(np.float64)
        for p in ("gate", "up", "down")
    }
    experts = len(part["up"])
    outputs = np.zeros((*ids.shape, inputs.shape[1]))
    for e in range(experts):
        t, u = np.nonzero(ids == e)
        x = inputs[t]
        gate = x @ part["gate"][e].T
        outputs[t, u] = (gate / (1 + np.exp(-gate)) * (x @ part["up"][e].T)) @ part["down"][e].T
    return loops(ids, gates, outputs, logits, experts)


def router_gates(model, layer, logits, ids):
    """The gates of the routed experts as the architecture defines them."""
    if model.architecture == "dots1":  # sigmoid, renormalised, scaled; the bias only selects
        chosen = np.take_along_axis(1 / (1 + np.exp(-logits)), ids, axis=1)
        return 1.5 * chosen / chosen.sum(axis=1, keepdims=True)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    chosen = np.take_along_axis(p / p.sum(axis=1, keepdims=True), ids, axis=1)
    return chosen / chosen.sum(axis=1, keepdims=True)


INPUT = {"qwen3next": "attn_post_norm", "qwen3moe": "ffn_norm", "dots1": "ffn_norm"}


def compare(path, tokens, n_ctx, **options):
    """{layer: (largest relative difference of REAP's sum and of the other sums, the same of experts with fewer than 8
    tokens, of the gates)}"""
    stats = pgs.experts.calibrate(path, [tokens], n_ctx=n_ctx, **options)
    out = {}
    with pgs.open(path) as model:
        names = [
            f"{kind}-{layer}"
            for layer in stats.layers
            for kind in (
                INPUT[model.architecture],
                "ffn_moe_topk",
                "ffn_moe_logits",
                "ffn_moe_weights_norm",
                "ffn_moe_weights_scaled",
            )
        ]
        tap = Tap(path, names, tokens, n_ctx)
        for layer, found in stats.layers.items():
            ids = tap[f"ffn_moe_topk-{layer}"].astype(np.int64)
            scaled = f"ffn_moe_weights_scaled-{layer}"
            gates = tap[scaled if scaled in tap.found else f"ffn_moe_weights_norm-{layer}"].reshape(ids.shape)
            logits = tap[f"ffn_moe_logits-{layer}"]
            expected = forward(model, layer, tap[f"{INPUT[model.architecture]}-{layer}"], ids, gates, logits)
            assert found.tokens == stats.tokens == len(ids)
            np.testing.assert_array_equal(found.count, expected.count)
            np.testing.assert_array_equal(found.coactivation, expected.coactivation)
            np.testing.assert_allclose(found.gate_sum, expected.gate_sum, rtol=1e-9)
            np.testing.assert_allclose(found.logit_gram, expected.logit_gram, rtol=1e-9, atol=1e-6)
            worst = np.zeros(stats.experts)
            for name in ("norm_sum", "gated_norm_sum", "norm_sq_sum"):
                a, b = getattr(found, name), getattr(expected, name)
                seen = b > 0
                worst[seen] = np.maximum(worst[seen], np.abs(a[seen] / b[seen] - 1) / (2 if "sq" in name else 1))
            few = found.count < 8
            own = router_gates(model, layer, logits, ids)
            out[layer] = (
                worst[~few].max(),
                worst[few & (found.count > 0)].max(initial=0),
                np.abs(gates / own - 1).max(),
            )
    return out


@pytest.mark.parity
@pytest.mark.parametrize("name", ["qwen3moe", "dots1"])
def test_reap_is_that_of_a_numpy_forward(tmp_path, name):
    pytest.importorskip("llama_cpp")
    path = moe_models.ALL[name](tmp_path / "model.gguf", **({"type": "F32"} if name == "qwen3moe" else {}))
    for layer, (many, few, gates) in compare(path, TOKENS, 40).items():
        assert many <= 1e-4 and few <= 1e-4 and gates <= 1e-5, layer


@pytest.mark.parity
@pytest.mark.parametrize("type, limit", [("F32", 1e-4), ("BF16", 1e-2), ("Q8_0", 1e-2)])
def test_reap_of_a_trained_model(tmp_path, type, limit, capsys):
    pytest.importorskip("llama_cpp")
    if not TRAINED.exists():
        pytest.skip(f"{TRAINED.name} is not here")
    path, text = TRAINED, (TRAINED.parent / "calib.txt").read_bytes()[:40_000]
    if type != "BF16":
        path = tmp_path / "model.gguf"
        with pgs.open(TRAINED) as model:
            pgs.Plan(model).quantize(type).write(path)
    found = compare(path, text, 256, chunks=40)
    with capsys.disabled():
        for layer, (many, few, gates) in found.items():
            print(
                f"\n{type} layer {layer}: REAP {many:.2e}, experts of fewer than 8 tokens {few:.2e}, gates {gates:.2e}",
                end="",
            )
    assert list(found) == [0, 1, 2, 3]
    for layer, (many, _, gates) in found.items():
        assert many <= limit and gates <= 1e-4, layer


@pytest.mark.parity
def test_what_llama_perplexity_would_say_comes_along(tmp_path):
    pytest.importorskip("llama_cpp")
    if not TRAINED.exists():
        pytest.skip(f"{TRAINED.name} is not here")
    stats = pgs.experts.calibrate(TRAINED, [TRAINED.parent / "eval.txt"], n_ctx=256, chunks=120)
    assert stats.perplexity()[0] == pytest.approx(14.12, abs=0.01) and stats.complete
    assert not stats.unseen() and "perplexity" in stats.summary()


@pytest.fixture
def model(tmp_path):
    pytest.importorskip("llama_cpp")
    return moe_models.dots1(tmp_path / "model.gguf")


@pytest.mark.parity
def test_texts_add_up_and_merge(model):
    a, b = (pgs.experts.calibrate(model, [t], n_ctx=40, threads=1) for t in (TOKENS, TOKENS[:90]))
    both, joined = a.merge(b), pgs.experts.calibrate(model, [TOKENS, TOKENS[:90]], n_ctx=40, threads=1)
    assert both.texts == joined.texts and both.tokens == joined.tokens and both.nll == pytest.approx(joined.nll)
    for name in SUMS:
        np.testing.assert_allclose(getattr(both.layers[2], name), getattr(joined.layers[2], name), rtol=1e-9)


@pytest.mark.parity
def test_windows_longer_than_a_batch_give_the_same_sums(model, monkeypatch):
    from pygguf_surgery.llama import session as llama

    whole = pgs.experts.calibrate(model, [TOKENS], n_ctx=80, threads=1)
    monkeypatch.setattr(llama, "BATCH", 32)
    parts = pgs.experts.calibrate(model, [TOKENS], n_ctx=80, threads=1)
    assert parts.nll == pytest.approx(whole.nll, rel=1e-5) and parts.predictions == whole.predictions == 2 * 39
    for name in SUMS:
        np.testing.assert_allclose(getattr(parts.layers[2], name), getattr(whole.layers[2], name), rtol=1e-2)


@pytest.mark.parity
@pytest.mark.parametrize(
    "texts, options, error, match",
    [
        ([TOKENS[:39]], {}, pgs.BadPlan, "too short"),
        ([TOKENS, TOKENS], {}, pgs.BadPlan, "twice"),
        ([np.array([0, 48])], {}, pgs.BadPlan, "not token ids"),
    ],
)
def test_what_cannot_be_run_is_refused(model, texts, options, error, match):
    with pytest.raises(error, match=match):
        pgs.experts.calibrate(model, texts, **{"n_ctx": 40, **options})


@pytest.mark.parametrize(
    "texts, options, match",
    [([], {}, "no text"), ([TOKENS], {"chunks": 0}, "chunks"), ([TOKENS], {"n_ctx": 2}, "n_ctx")],
)
def test_what_makes_no_sense_is_refused_before_a_file_is_opened(tmp_path, texts, options, match):
    with pytest.raises(pgs.BadPlan, match=match):
        pgs.experts.calibrate(tmp_path / "none.gguf", texts, **{"n_ctx": 40, **options})
    with pgs.open(moe_models.qwen3moe(tmp_path / "m.gguf")) as opened, pytest.raises(pgs.BadPlan, match=match):
        kept = {0: [0, 1], 1: [0, 1]}
        pgs.experts.repair(opened, kept, texts, tmp_path / "r.gguf", **{"n_ctx": 40, **options})


@pytest.mark.parity
def test_a_dense_model_and_a_file_that_llama_cpp_refuses(tmp_path):
    pytest.importorskip("llama_cpp")
    b = moe_models.Builder("llama", blocks=1, experts=0, used=0)
    b.dense(0)
    with pytest.raises(pgs.BadPlan, match="no experts"):
        pgs.experts.calibrate(b.write(tmp_path / "dense.gguf"), [TOKENS])
    b = moe_models.Builder("qwen3moe", blocks=1, experts=4, used=2)
    b.moe(0)
    with pytest.raises(pgs.BadFile, match=r"llama\.cpp does not load it"):
        pgs.experts.calibrate(b.write(tmp_path / "no attention.gguf"), [TOKENS], n_ctx=40)


@pytest.mark.parity
def test_a_tensor_that_the_graph_lacks_is_named(model, monkeypatch):
    monkeypatch.setitem(taps._STEPS, "gates", ("ffn_moe_other",))
    with pytest.raises(pgs.Unsupported, match="does not compute") as error:
        pgs.experts.calibrate(model, [TOKENS], n_ctx=40)
    assert error.value.object == "ffn_moe_other-1" and error.value.found == "dots1"


@pytest.mark.parity
@pytest.mark.parametrize("name", ["gpt_oss", "llama4", "gemma4", "nvfp4_scales"])
def test_other_architectures_route_every_token(tmp_path, name):
    pytest.importorskip("llama_cpp")
    path = moe_models.ALL[name](tmp_path / "model.gguf")
    with pgs.open(path) as opened:
        used = opened.get("expert_used_count")
    stats = pgs.experts.calibrate(path, [TOKENS], n_ctx=40)
    assert stats.layers and all(s.tokens == 200 and s.count.sum() == 200 * used for s in stats.layers.values())


@pytest.mark.parity
def test_from_the_shell(tmp_path, capsys):
    pytest.importorskip("llama_cpp")
    if not TRAINED.exists():
        pytest.skip(f"{TRAINED.name} is not here")
    from pygguf_surgery.cli import main

    text = (TRAINED.parent / "calib.txt").read_bytes()
    paths = {
        name: str(tmp_path / name) for name in ("a.txt", "b.txt", "a.gguf", "b.gguf", "all.gguf", "out.gguf", "r.json")
    }
    for name, part in (("a", text[:9000]), ("b", text[9000:18000])):
        (tmp_path / f"{name}.txt").write_bytes(part)
        assert main(["calibrate", str(TRAINED), paths[f"{name}.txt"], "-o", paths[f"{name}.gguf"], "--ctx", "128"]) == 0
    assert "32 experts in 4 layers" in capsys.readouterr().out
    assert main(["calibrate", str(TRAINED), paths["a.txt"], "-o", paths["a.gguf"], "--ctx", "128"]) == 4
    assert "--force" in capsys.readouterr().err
    assert main(["stats", "merge", paths["all.gguf"], paths["a.gguf"], paths["b.gguf"]]) == 0
    capsys.readouterr()
    assert main(["stats", "show", "--json", paths["all.gguf"]]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == sum(
        pgs.experts.open_stats(paths[name]).tokens for name in ("a.gguf", "b.gguf")
    )
    prune = ["prune", str(TRAINED), paths["out.gguf"], "--by", "reap-sum", "--stats", paths["all.gguf"], "--keep", "16"]
    assert main([*prune, "--report", paths["r.json"]]) == 0
    assert "experts kept by reap-sum" in capsys.readouterr().err
    with pgs.open(paths["out.gguf"]) as model, open(paths["r.json"]) as file:
        decision = json.load(file)
        for layer in range(4):
            assert list(model.metadata[f"pgs.experts.{layer}.kept"]) == decision["kept"][str(layer)]
            assert list(model.metadata[f"pgs.experts.{layer}.scores"]) == decision["scores"][str(layer)]
    before = (tmp_path / "out.gguf").read_bytes()
    assert main(["prune", str(TRAINED), paths["out.gguf"], "--by", paths["r.json"], "--force"]) == 0
    assert (tmp_path / "out.gguf").read_bytes() == before


@pytest.mark.parity
def test_the_readme_s_example_runs(tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp")
    if not TRAINED.exists():
        pytest.skip(f"{TRAINED.name} is not here")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.txt").write_bytes((TRAINED.parent / "calib.txt").read_bytes()[:40_000])
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    for written, here in (("model-Q8_0.gguf", str(TRAINED)), ("keep(256", "keep(16"), ("model, 384", "model, 24")):
        assert written in code
        code = code.replace(written, here)
    with pgs.open(TRAINED) as model:
        exec(compile(code, "README.md", "exec"), {"pgs": pgs, "model": model})
    for name, experts in (("half.gguf", 16), ("merged.gguf", 24)):
        made = pgs.experts.calibrate(name, [tmp_path / "code.txt"], n_ctx=256, chunks=10)
        assert made.experts == experts and made.perplexity()[0] < 40
