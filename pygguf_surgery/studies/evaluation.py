"""How well models predict texts, and how far they are from a parent: perplexity, KLD, loops. llama.cpp runs them."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .._core import thread_count
from ..base.errors import BadPlan
from ..base.progress import Progress, ProgressLike, as_progress
from ..base.units import parse_threads
from ..files.model import Model
from ..files.open import open_model
from ..files.stats import perplexity as perplexity_of
from ..files.texts import GivenText, TextLike, read_texts
from ..llama.apart import run_apart
from ..llama.session import Look, Losses, Session, losses_of
from ..llama.texts import Windows, check_texts, check_windows, warn_of_context, windows_of

_BLOCK = 1 << 17  # float64 numbers that are worked on at once
LOOP_PROMPTS, LOOP_PROMPT, LOOP_TOKENS, LOOP_GRAM = 8, 64, 256, 4  # prompts, their tokens, tokens made, n of n-grams


def perplexity(
    models: Sequence[str | os.PathLike[str]],
    texts: Sequence[TextLike],
    *,
    baseline: str | os.PathLike[str] | None = None,
    n_ctx: int = 512,
    chunks: int | None = None,
    parse_special: bool = False,
    loops: bool = False,
    threads: int = 0,
    gpu_layers: int = 0,
    isolate: bool = False,
    progress: ProgressLike = None,
) -> dict[str, Any]:
    """Perplexity of GGUF models over texts, counted as llama-perplexity does, and against a baseline their KLD.

    Windows of n_ctx tokens, each from an empty cache; the predictions of a window's second half count. texts, chunks,
    parse_special, gpu_layers, isolate: as in `calibrate`. baseline: the parent, a model of the same vocabulary. All
    models run each window one after the other, so that only the parent's logits of one window are held beside
    llama.cpp's own; numbers are float64. loops: also what each model says at temperature 0 to 8 prompts of 64 tokens
    cut out of the texts: the share of distinct 4-grams in 256 tokens, low where it repeats itself.

    {"n_ctx", "windows", "tokens", "baseline": entry or null, "models": [entry]}; an entry is {"path", "perplexity",
    "perplexity_error", "texts": [{"sha256", "windows", "perplexity", "perplexity_error", "kld"}], "kld", "loops"}. kld
    is null without a baseline, else {"mean", "mean_error", "median", "p90", "p99", "p999", "max", "same_top" (share of
    predictions with the same most likely token), "delta_p_rms" (of the probability of the token that followed),
    "perplexity_ratio", "perplexity_ratio_error"}; loops is null or {"prompts", "tokens", "distinct_4"}.
    progress: True, or a callable(windows done, windows in all), each window of each model one.
    Errors: as in `calibrate`; BadPlan for a baseline of another vocabulary.
    """
    if isolate:
        arguments = {name: value for name, value in locals().items() if name not in ("isolate", "progress")}
        with as_progress(progress, "perplexity", "windows") as report:
            function = "..studies.evaluation:perplexity"
            path = ", ".join(map(os.fsdecode, models))
            return cast(dict[str, Any], run_apart(function, arguments, path=path, progress=report))
    if isinstance(models, (str, bytes, os.PathLike)) or not models:
        raise BadPlan("not a list of models", object="models", found=repr(models)[:80])
    check_windows(n_ctx, chunks, texts)
    read = read_texts(texts)
    paths = [*([] if baseline is None else [baseline]), *models]
    firsts = _check_models(paths, read, n_ctx)
    n_cells = max(n_ctx, LOOP_PROMPT + LOOP_TOKENS) if loops else n_ctx
    with ExitStack() as stack:
        report = stack.enter_context(as_progress(progress, "perplexity", "windows"))
        sessions = [
            stack.enter_context(Session(path, n_ctx=n_ctx, n_cells=n_cells, threads=threads, gpu_layers=gpu_layers))
            for path in firsts
        ]
        windows = windows_of(sessions[0], read, chunks, parse_special, progress)
        _check_tokens(sessions, read, parse_special)
        runs = [_Run(os.fsdecode(path), session, len(read)) for path, session in zip(paths, sessions, strict=True)]
        parent = None if baseline is None else runs[0]
        pool = stack.enter_context(ThreadPoolExecutor(thread_count(parse_threads(threads))))
        _run(runs, parent, windows, _Rows(pool), report)
        if loops:
            prompts = _prompts(windows)
            for run in runs:
                run.loops = _loops(run.session, prompts)
    entries = [run.to_json(None if run is parent else parent, windows) for run in runs]
    return {
        "n_ctx": n_ctx,
        "windows": sum(len(w.tokens) for w in windows),
        "tokens": sum(w.tokens.size for w in windows),
        "baseline": None if parent is None else entries.pop(0),
        "models": entries,
    }


def _check_models(paths: Sequence[str | os.PathLike[str]], texts: Sequence[GivenText], n_ctx: int) -> list[str]:
    """The first file of each, as llama.cpp takes it. What can be told from headers is told before one is loaded."""
    firsts: list[str] = []
    vocabulary: object = None
    for path in paths:
        with open_model(path) as model:
            check_texts(model, texts, n_ctx)
            warn_of_context(model, n_ctx)
            tokens = _vocabulary(model)
            if firsts and tokens != vocabulary:
                raise BadPlan("another vocabulary", path=model.path, expected=f"that of {firsts[0]}")
            vocabulary = tokens
            firsts.append(model.path)
    return firsts


def _vocabulary(model: Model) -> object:
    """What makes two models split and spell a text alike."""
    keys = ("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens")
    return [model.metadata.get(key) for key in keys]


def _check_tokens(sessions: Sequence[Session], texts: Sequence[GivenText], parse_special: bool) -> None:
    """That the models are asked to predict the same tokens."""
    first = sessions[0]
    samples = [t.content[:4096].decode(errors="ignore").encode() for t in texts if isinstance(t.content, bytes)]
    for other in sessions[1:]:
        alike = all(
            np.array_equal(first.tokenize(sample, parse_special), other.tokenize(sample, parse_special))
            for sample in samples
        )
        if other.n_vocab != first.n_vocab or not alike:
            raise BadPlan("another vocabulary", path=other.path, expected=f"that of {first.path}")


# --- windows --------------------------------------------------------------------------------------------------------


@dataclass
class _Distances:
    """Of each prediction of a text, in order: KLD from the parent, whether the top token is its, and the change of the
    probability of the token that followed."""

    kld: list[NDArray[np.float64]] = field(default_factory=list)
    same_top: int = 0
    delta_p_squares: float = 0.0
    products: float = 0.0  # of the two models' -log p


@dataclass
class _Sums:
    nll: float = 0.0
    squares: float = 0.0
    predictions: int = 0

    def add(self, other: Losses | _Sums) -> None:
        self.nll, self.squares = self.nll + other.nll, self.squares + other.squares
        self.predictions += other.predictions


class _Run:
    """A model and what it has done so far, by text."""

    def __init__(self, path: str, session: Session, texts: int):
        self.path, self.session = path, session
        self.sums = [_Sums() for _ in range(texts)]
        self.distances = [_Distances() for _ in range(texts)]
        self.loops: dict[str, Any] | None = None

    def to_json(self, parent: _Run | None, windows: Sequence[Windows]) -> dict[str, Any]:
        every = range(len(self.sums))
        value, error = _perplexity(self.sums)
        texts = []
        for i, part in zip(every, windows, strict=True):
            its, its_error = _perplexity(self.sums[i : i + 1])
            texts.append(
                {
                    "sha256": part.text.sha256,
                    "windows": len(part.tokens),
                    "perplexity": its,
                    "perplexity_error": its_error,
                    "kld": None if parent is None else _kld(self, parent, [i]),
                }
            )
        return {
            "path": self.path,
            "perplexity": value,
            "perplexity_error": error,
            "texts": texts,
            "kld": None if parent is None else _kld(self, parent, every),
            "loops": self.loops,
        }


def _run(
    runs: Sequence[_Run], parent: _Run | None, windows: Sequence[Windows], rows: _Rows, report: Progress | None
) -> None:
    total, done = len(runs) * sum(len(part.tokens) for part in windows), 0
    for text, part in enumerate(windows):
        for window in part.tokens:
            kept: list[_Predictions] = []  # of the parent
            for run in runs:
                look: Look = rows.losses
                if run is parent:
                    look = _Keeper(rows, kept)
                elif parent is not None:
                    look = _Comparison(rows, kept, run.distances[text])
                run.sums[text].add(run.session.run(window, look=look))
                done += 1
                if report is not None:
                    report(done, total)


class _Rows:
    """Does something to rows of logits in blocks that fit a processor's cache, by several threads; what it comes to is
    the same for any number of them."""

    def __init__(self, pool: ThreadPoolExecutor):
        self._pool = pool

    def map(self, function: Callable[..., tuple[NDArray[Any], ...]], *arrays: NDArray[Any]) -> list[NDArray[Any]]:
        """function's results for blocks of the rows of all arrays, joined."""
        step = max(1, _BLOCK // arrays[0].shape[1])
        blocks = [[array[i : i + step] for array in arrays] for i in range(0, len(arrays[0]), step)]
        parts = list(self._pool.map(lambda block: function(*block), blocks))
        return [np.concatenate(several) for several in zip(*parts, strict=True)]

    def losses(self, logits: NDArray[np.float32], targets: NDArray[np.int32]) -> NDArray[np.float64]:
        return self.map(lambda z, t: (losses_of(z, t),), logits, targets)[0]


@dataclass(frozen=True)
class _Predictions:
    """The parent's, of some rows. normalizers: log of the sum of exp(logits) of each row."""

    logits: NDArray[np.float32]
    normalizers: NDArray[np.float64]


class _Keeper:
    """Copies the parent's logits of a window."""

    def __init__(self, rows: _Rows, kept: list[_Predictions]):
        self._rows, self._kept = rows, kept

    def __call__(self, logits: NDArray[np.float32], targets: NDArray[np.int32]) -> NDArray[np.float64]:
        normalizers = self._rows.map(lambda z: (_normalizers(z.astype(np.float64)),), logits)[0]
        self._kept.append(_Predictions(logits.copy(), normalizers))
        losses: NDArray[np.float64] = normalizers - logits[np.arange(len(targets)), targets]
        return losses


class _Comparison:
    """Compares logits, as they come, with the parent's of the same rows."""

    def __init__(self, rows: _Rows, kept: Sequence[_Predictions], found: _Distances):
        self._rows, self._kept, self._found = rows, iter(kept), found

    def __call__(self, logits: NDArray[np.float32], targets: NDArray[np.int32]) -> NDArray[np.float64]:
        parent = next(self._kept)
        kld, theirs, mine, same = self._rows.map(_distances, logits, targets, parent.logits, parent.normalizers)
        found = self._found
        found.kld.append(kld)
        found.same_top += int(same.sum())
        found.delta_p_squares += float(np.square(np.exp(-mine) - np.exp(-theirs)).sum())
        found.products += float((theirs * mine).sum())
        return mine


def _normalizers(z: NDArray[np.float64]) -> NDArray[np.float64]:
    most = z.max(axis=1)
    total: NDArray[np.float64] = np.log(np.exp(z - most[:, None]).sum(axis=1)) + most
    return total


def _distances(
    logits: NDArray[np.float32],
    targets: NDArray[np.int32],
    parent: NDArray[np.float32],
    normalizers: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """KLD from the parent, both models' losses, and whether the most likely token is the same, of each row."""
    rows = np.arange(len(targets))
    q = logits.astype(np.float64)
    q -= _normalizers(q)[:, None]
    p = parent.astype(np.float64)
    p -= normalizers[:, None]
    losses = -p[rows, targets], -q[rows, targets]
    same = parent.argmax(axis=1) == logits.argmax(axis=1)
    np.subtract(p, q, out=q)
    return np.einsum("ij,ij->i", np.exp(p, out=p), q), *losses, same


# --- numbers --------------------------------------------------------------------------------------------------------


def _perplexity(parts: Sequence[_Sums]) -> tuple[float, float]:
    total = _Sums()
    for part in parts:
        total.add(part)
    return perplexity_of(total.nll, total.squares, total.predictions)


def _kld(run: _Run, parent: _Run, texts: Sequence[int]) -> dict[str, float]:
    """The numbers of llama-perplexity --kl-divergence, by its formulas."""
    klds = np.concatenate([kld for i in texts for kld in run.distances[i].kld])
    n = len(klds)
    mine, theirs = _Sums(), _Sums()
    for i in texts:
        mine.add(run.sums[i])
        theirs.add(parent.sums[i])
    products = sum(run.distances[i].products for i in texts)
    rest = max(n - 1, 1)
    covariance = (products / n - mine.nll / n * (theirs.nll / n)) / rest
    variances = [max(s.squares / n - (s.nll / n) ** 2, 0.0) / rest for s in (mine, theirs)]
    ratio = math.exp((mine.nll - theirs.nll) / n)
    median, p90, p99, p999 = np.quantile(klds, (0.5, 0.9, 0.99, 0.999)).tolist()
    return {
        "mean": float(klds.mean()),
        "mean_error": float(klds.std() / math.sqrt(rest)),
        "median": median,
        "p90": p90,
        "p99": p99,
        "p999": p999,
        "max": float(klds.max()),
        "same_top": sum(run.distances[i].same_top for i in texts) / n,
        "delta_p_rms": math.sqrt(sum(run.distances[i].delta_p_squares for i in texts) / n),
        "perplexity_ratio": ratio,
        "perplexity_ratio_error": ratio * math.sqrt(max(sum(variances) - 2 * covariance, 0.0)),
    }


# --- loops ----------------------------------------------------------------------------------------------------------


def _prompts(windows: Sequence[Windows]) -> list[NDArray[np.int32]]:
    """Prompts at equal distances in the texts."""
    tokens = np.concatenate([part.tokens.ravel() for part in windows])
    length = min(LOOP_PROMPT, len(tokens))
    starts = np.linspace(0, len(tokens) - length, LOOP_PROMPTS).astype(int)
    return [tokens[start : start + length] for start in sorted(set(starts.tolist()))]


def _loops(session: Session, prompts: Sequence[NDArray[np.int32]]) -> dict[str, Any]:
    distinct = every = made = 0
    for prompt in prompts:
        tokens = session.generate(prompt, LOOP_TOKENS).tolist()
        grams = [tuple(tokens[i : i + LOOP_GRAM]) for i in range(len(tokens) - LOOP_GRAM + 1)]
        distinct, every, made = distinct + len(set(grams)), every + len(grams), made + len(tokens)
    return {"prompts": len(prompts), "tokens": made, "distinct_4": distinct / every if every else None}
