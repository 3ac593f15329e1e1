"""Exact calibration without PyTorch: llama.cpp runs the text, its eval callback hands out what every expert did."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..architecture.experts import GATE_IN_INPUT
from ..base.errors import BadFile, BadPlan
from ..base.progress import Progress, ProgressLike, as_progress
from ..files import stats as stats_file
from ..files.open import open_model
from ..files.outputs import check_output
from ..files.stats import LayerStats, Stats
from ..llama.session import Session
from ..llama.taps import Taps, moe_layout
from ..llama.texts import TextLike, Windows, check_windows, read_texts, windows_of

CHECKPOINT_SECONDS = 60


class _Recorder(Taps):
    """Folds the tensors of each layer into its statistics as soon as they are all there."""

    def __init__(self, architecture: str, layers: Mapping[int, LayerStats], experts: int, merge_stats: bool):
        super().__init__(architecture, tuple(layers), ("logits", "ids", "gates", "outputs"))
        self._stats, self._experts, self._merge_stats = layers, experts, merge_stats
        self._gate_in_input = architecture in GATE_IN_INPUT
        self._waiting: dict[int, dict[str, NDArray[Any]]] = {}

    def take(self, name: str, values: NDArray[Any]) -> None:
        kind, layer = self.names[name]
        parts = self._waiting.setdefault(layer, {})
        parts[kind] = values
        if len(parts) == 4:
            del self._waiting[layer]
            try:
                fold(
                    self._stats[layer],
                    parts["ids"],
                    parts["gates"],
                    parts["outputs"],
                    parts["logits"],
                    gate_in_input=self._gate_in_input,
                    merge_stats=self._merge_stats,
                )
            except BadFile as error:
                error.object = f"blk.{layer}"
                raise


def fold(
    stats: LayerStats,
    ids: NDArray[np.int32],
    gates: NDArray[np.float32],
    outputs: NDArray[np.float32],
    logits: NDArray[np.float32],
    *,
    gate_in_input: bool = False,
    merge_stats: bool = False,
) -> None:
    """Adds T tokens to a layer's statistics. ids [T, used]: the experts of each token; gates [T, used]; outputs
    [T, used, width]: f, before the gate (with gate_in_input after it); logits [T, E]."""
    experts, used = len(stats.count), ids.shape[-1]
    ids = ids.reshape(-1, used)
    tokens = len(ids)
    gates = gates.reshape(tokens, used).astype(np.float64)
    outputs = outputs.reshape(tokens, used, -1)
    if not ((ids >= 0) & (ids < experts)).all():
        raise BadFile("llama.cpp routed to an expert that does not exist", found=int(ids.max()))
    squares = np.einsum("tuw,tuw->tu", outputs, outputs).astype(np.float64)
    if not (np.isfinite(squares).all() and np.isfinite(gates).all()):  # NaN, or squares beyond float32
        squares = np.square(outputs, dtype=np.float64).sum(axis=2)
        if not np.isfinite(squares).all() or not np.isfinite(gates).all():
            bad = ids[~(np.isfinite(squares) & np.isfinite(gates))]
            raise BadFile("activations that are not finite", found=f"in expert {bad[0]}")
    norms = np.sqrt(squares)
    flat = ids.ravel()
    for total, values in (
        (stats.count, None),
        (stats.gate_sum, gates),
        (stats.norm_sum, norms),
        (stats.norm_sq_sum, squares),
        (stats.gated_norm_sum, norms if gate_in_input else gates * norms),
    ):
        total += np.bincount(flat, None if values is None else values.ravel(), experts)
    np.maximum.at(stats.max_activation, flat, np.maximum(outputs.max(axis=2), -outputs.min(axis=2)).ravel())
    routed = np.zeros((tokens, experts), np.float32)  # sums of ones are exact in float32
    np.put_along_axis(routed, ids, 1, axis=1)
    stats.coactivation += routed.T @ routed
    wide = logits.reshape(tokens, experts).astype(np.float64)
    stats.logit_gram += wide.T @ wide
    stats.tokens += tokens
    if merge_stats:
        if stats.gated_sum is None:
            stats.gated_sum = np.zeros((experts, outputs.shape[2]))
        order = np.argsort(flat, kind="stable")
        gated = outputs.reshape(tokens * used, -1)[order]
        if not gate_in_input:
            gated *= gates.ravel()[order, None].astype(np.float32)
        first = np.flatnonzero(np.diff(flat[order], prepend=-1))
        stats.gated_sum[flat[order][first]] += np.add.reduceat(gated, first, axis=0, dtype=np.float64)


def calibrate(
    path: str | os.PathLike[str],
    texts: Sequence[TextLike],
    out: str | os.PathLike[str] | None = None,
    *,
    n_ctx: int = 512,
    chunks: int | None = None,
    merge_stats: bool = False,
    parse_special: bool = False,
    threads: int = 0,
    gpu_layers: int = 0,
    overwrite: bool = False,
    progress: ProgressLike = None,
) -> Stats:
    """Runs texts through a GGUF model with llama.cpp and records what each expert of each MoE layer did.

    The model may be quantized: the statistics also rank the experts of its 16-bit original. texts: paths, bytes of
    UTF-8, or arrays of token ids. n_ctx: tokens of a window, each from an empty cache. chunks: at most so many windows
    of each text.
    merge_stats: also the sums that merging needs, [E, width] per layer. parse_special: special tokens in the text are
    such. gpu_layers: how many layers llama.cpp puts on a GPU, -1 for all.
    out: where the statistics go, every minute; a run that was stopped goes on from there when it is called again in the
    same way, and a complete file needs `overwrite`. progress: True, or a callable(windows done, windows in all).
    Errors: BadPlan for a model without experts or a text shorter than a window, BadFile for a model that llama.cpp does
    not load, Unsupported without llama-cpp-python or where llama.cpp's graph lacks what is recorded.
    """
    check_windows(n_ctx, chunks, texts)
    if out is not None:
        check_output([path, *texts], out, overwrite=True)  # what is there may be the start of this very run
    texts = read_texts(texts)
    with open_model(path) as model:
        found, layers = moe_layout(model)
        stats = Stats(
            model.header_sha256,
            model.architecture,
            str(model.metadata.get("general.name") or ""),
            found.experts,
            n_ctx,
            {layer: LayerStats.empty(found.experts) for layer in layers},
            parse_special=parse_special,
        )
        first = model.path
        if out is not None:
            check_output(model.paths, out, overwrite=True)
    earlier = None if out is None or overwrite else _unfinished(out)
    recorder = _Recorder(stats.architecture, stats.layers, stats.experts, merge_stats)
    saved = _Checkpoints(stats, out, overwrite or earlier is not None)
    with (
        as_progress(progress, "calibrating", "windows") as report,
        Session(first, n_ctx=n_ctx, threads=threads, gpu_layers=gpu_layers, watch=recorder) as session,
    ):
        windows = windows_of(session, texts, chunks, parse_special)
        stats.texts = [w.text for w in windows]
        recorder.learn(session, windows[0].tokens[0])
        if earlier is not None and out is not None:
            _resume(stats, earlier, merge_stats, os.fsdecode(out))
        _run(session, windows, stats, saved, report)
    _check_tokens(stats)
    saved.write()
    return stats


def _unfinished(path: str | os.PathLike[str]) -> Stats | None:
    """What an earlier run left at `path`; FileExistsError if it came to its end."""
    if not os.path.lexists(path):
        return None
    earlier = stats_file.open_stats(path)
    if earlier.complete:
        raise FileExistsError(
            errno.EEXIST, "exists already and is complete; overwrite=True (--force) replaces it", os.fsdecode(path)
        )
    return earlier


class _Checkpoints:
    """Writes the statistics of a run from time to time, where they are to be written at all."""

    def __init__(self, stats: Stats, path: str | os.PathLike[str] | None, overwrite: bool):
        self._stats, self._path, self._overwrite = stats, path, overwrite
        self._last, self._pause = time.monotonic(), float(CHECKPOINT_SECONDS)

    def write(self) -> None:
        if self._path is not None:
            self._stats.write(self._path, overwrite=self._overwrite)
            self._overwrite = True

    def write_if_due(self) -> None:
        start = time.monotonic()
        if start - self._last > self._pause:
            self.write()
            self._last = time.monotonic()
            self._pause = max(
                CHECKPOINT_SECONDS, 20 * (self._last - start)
            )  # big statistics on a slow disk: less often


def _run(
    session: Session, windows: Sequence[Windows], stats: Stats, saved: _Checkpoints, report: Progress | None
) -> None:
    """Runs the windows that are not done yet; the session's recorder folds what their tokens do into `stats`."""
    total, done = sum(text.windows for text in stats.texts), sum(text.done for text in stats.texts)
    for number, part in enumerate(windows):
        for window in part.tokens[stats.texts[number].done :]:
            nll, squares, predictions = session.run(window)
            stats.nll += nll
            stats.nll_squares += squares
            stats.predictions += predictions
            stats.texts[number] = replace(stats.texts[number], done=stats.texts[number].done + 1)
            done += 1
            if report is not None:
                report(done, total)
            if done < total:
                saved.write_if_due()


def _resume(stats: Stats, earlier: Stats, merge_stats: bool, path: str) -> None:
    """Takes over what an earlier run of the same call has done; BadPlan if it was another call."""
    same = all(
        getattr(stats, what) == getattr(earlier, what)
        for what in ("header_sha256", "experts", "n_ctx", "parse_special")
    )
    same &= [replace(t, done=0) for t in stats.texts] == [replace(t, done=0) for t in earlier.texts]
    same &= merge_stats == any(s.gated_sum is not None for s in earlier.layers.values())
    if not same or stats.layers.keys() != earlier.layers.keys():
        raise BadPlan("unfinished statistics of another run", path=path, hint="overwrite=True (--force) replaces them")
    stats.layers.update(earlier.layers)
    stats.texts = earlier.texts
    stats.nll, stats.nll_squares, stats.predictions = earlier.nll, earlier.nll_squares, earlier.predictions


def _check_tokens(stats: Stats) -> None:
    """Every layer, the last one too, has seen every token: it would not if logits were asked for the last token
    only."""
    wrong = [layer for layer, s in stats.layers.items() if s.tokens != stats.tokens]
    if wrong:
        raise BadFile(
            "llama.cpp did not run all tokens through a layer",
            object=f"blk.{wrong[0]}",
            found=stats.layers[wrong[0]].tokens,
            expected=stats.tokens,
        )
