"""Exact calibration without PyTorch: llama.cpp runs the text, its eval callback hands out what every expert did."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import cast

from ..architecture.experts import Layout, most_used
from ..base.errors import BadFile, BadPlan, SurgeryError
from ..base.progress import Progress, ProgressLike, as_progress
from ..base.units import MEMORY_OF_TEXTS, human, parse_memory
from ..files import stats as stats_file
from ..files.model import Model
from ..files.open import open_model
from ..files.outputs import check_output
from ..files.stats import LayerStats, Stats
from ..files.subjects import subject_of
from ..files.texts import TextLike, read_texts
from ..llama.apart import run_apart
from ..llama.session import BATCH, Losses, Session
from ..llama.taps import moe_layout
from ..llama.texts import Windows, check_texts, check_windows, warn_of_context, windows_of
from .recording import Recorder, memory_needed

CHECKPOINT_SECONDS = 60


def calibrate(
    path: str | os.PathLike[str],
    texts: Sequence[TextLike],
    out: str | os.PathLike[str] | None = None,
    *,
    n_ctx: int = 512,
    chunks: int | None = None,
    merge_stats: bool = False,
    pairs: bool = True,
    parse_special: bool = False,
    memory: int | str = MEMORY_OF_TEXTS,
    threads: int = 0,
    gpu_layers: int = 0,
    isolate: bool = False,
    overwrite: bool = False,
    progress: ProgressLike = None,
) -> Stats:
    """Runs texts through a GGUF model with llama.cpp and records what each expert of each MoE layer did.

    The model may be quantized: the statistics also rank the experts of its 16-bit original. texts: paths, bytes of
    UTF-8, or sequences of token ids. n_ctx: tokens of a window, each from an empty cache. chunks: at most so many
    windows of each text.
    merge_stats: also the sums that merging needs, [E, width] per layer. pairs: also what two experts do together, two
    times [E, E] per layer, which merging needs too. parse_special: special tokens in the text are such. memory: for the
    sums and a window of what they are made of, beside llama.cpp's own. gpu_layers: how many layers llama.cpp puts on a
    GPU, -1 for all. isolate: in a child process, so that a file that makes llama.cpp abort is an error.
    out: where the statistics go, every minute and when the run ends, for whatever reason; only whole windows count. A
    run that was stopped goes on from there when it is called again in the same way. A complete file, or one of another
    run, needs `overwrite`. progress: True, or a callable(windows done, windows in all).
    Errors: BadPlan for a model without experts, a text shorter than a window or too little memory, BadFile for a text
    that is none or a model that llama.cpp does not load, Unsupported without llama-cpp-python or where its graph lacks
    what is recorded.
    """
    if isolate:
        arguments = {name: value for name, value in locals().items() if name not in ("isolate", "progress")}
        with as_progress(progress, "calibrating", "windows") as report:
            function = "..studies.calibration:calibrate"
            return cast(Stats, run_apart(function, arguments, path=os.fsdecode(path), progress=report))
    check_windows(n_ctx, chunks, texts)
    budget = parse_memory(memory)
    if merge_stats and not pairs:
        raise BadPlan("merging needs the pairs", object="pairs", hint="leave out one of merge_stats and pairs=False")
    if out is not None:
        check_output([path, *texts], out, overwrite=True)  # what is there may be the start of this very run
    read = read_texts(texts)
    with open_model(path) as model:
        found, layers = moe_layout(model)
        check_texts(model, read, n_ctx)
        warn_of_context(model, n_ctx)
        _check_memory(model, found, layers, n_ctx, merge_stats, pairs, budget)
        stats = Stats(
            model.header_sha256,
            model.architecture,
            str(model.metadata.get("general.name") or ""),
            found.experts,
            n_ctx,
            {layer: LayerStats.empty(found.experts, pairs) for layer in layers},
            parse_special=parse_special,
            of=subject_of(model),
        )
        first = model.path
        if out is not None:
            check_output(model.paths, out, overwrite=True)
    earlier = None if out is None else _unfinished(out, overwrite)
    recorder = Recorder(stats.architecture, stats.layers, stats.experts, merge_stats=merge_stats, pairs=pairs)
    with (
        as_progress(progress, "calibrating", "windows") as report,
        Session(first, n_ctx=n_ctx, threads=threads, gpu_layers=gpu_layers, watch=recorder) as session,
    ):
        windows = windows_of(session, read, chunks, parse_special, progress)
        del read
        stats.texts = [w.text for w in windows]
        recorder.learn(session, windows[0].tokens[0])
        if earlier is not None and out is not None:
            _resume(stats, earlier, merge_stats, os.fsdecode(out), overwrite)
            del earlier
        saved = _Checkpoints(stats, out, overwrite)
        try:
            _run(session, recorder, windows, stats, saved, report)
            _check_tokens(stats)
            saved.write()
        except BaseException:  # what is whole is kept
            with suppress(SurgeryError, OSError):
                saved.write_rest()
            raise
    return stats


def _check_memory(
    model: Model, found: Layout, layers: Sequence[int], n_ctx: int, merge_stats: bool, pairs: bool, budget: int
) -> None:
    used = most_used(model.architecture, model.metadata.get)
    width = model.tensors[f"blk.{layers[0]}.ffn_down_exps.weight"].ne[1]

    def needed(pairs: bool) -> int:
        return memory_needed(
            len(layers), found.experts, used, width, n_ctx, BATCH, merge_stats=merge_stats, pairs=pairs
        )

    if (least := needed(pairs)) > budget:
        spare = pairs and not merge_stats and needed(False) <= budget
        raise BadPlan(
            "the statistics do not fit",
            object="memory",
            found=human(budget),
            expected=f"at least {human(least)} for {found.experts} experts in {len(layers)} layers",
            hint="or pairs=False (--no-pairs), which ranking does without" if spare else None,
        )


def _unfinished(path: str | os.PathLike[str], overwrite: bool) -> Stats | None:
    """What an earlier run left at `path`, or None; FileExistsError if it came to its end, unless it is replaced."""
    if not os.path.lexists(path):
        return None
    try:
        earlier = stats_file.open_stats(path)
    except (SurgeryError, OSError):
        if overwrite:
            return None
        raise
    if earlier.complete and not overwrite:
        raise FileExistsError(
            errno.EEXIST, "exists already and is complete; overwrite=True (--force) replaces it", os.fsdecode(path)
        )
    return None if earlier.complete else earlier


class _Checkpoints:
    """Writes the statistics of a run from time to time, where they are to be written at all."""

    def __init__(self, stats: Stats, path: str | os.PathLike[str] | None, overwrite: bool):
        self._stats, self._path, self._overwrite = stats, path, overwrite or stats.tokens > 0
        self._last, self._pause = time.monotonic(), float(CHECKPOINT_SECONDS)
        self._written = stats.tokens

    def write(self) -> None:
        tokens = self._stats.tokens
        if self._path is not None:
            self._stats.write(self._path, overwrite=self._overwrite)
            self._overwrite = True
        self._written = tokens

    def write_rest(self) -> None:
        """What is whole and not in the file yet."""
        if self._stats.tokens > self._written:
            self.write()

    def write_if_due(self) -> None:
        start = time.monotonic()
        if start - self._last > self._pause:
            self.write()
            self._last = time.monotonic()
            self._pause = max(
                CHECKPOINT_SECONDS, 20 * (self._last - start)
            )  # big statistics on a slow disk: less often


def _run(
    session: Session,
    recorder: Recorder,
    windows: Sequence[Windows],
    stats: Stats,
    saved: _Checkpoints,
    report: Progress | None,
) -> None:
    """Runs the windows that are not done yet; each is added to `stats` when it is whole."""
    total, done = sum(text.windows for text in stats.texts), sum(text.done for text in stats.texts)
    for number, part in enumerate(windows):

        def add(losses: Losses, number: int = number) -> None:
            recorder.add_window()
            stats.nll += losses.nll
            stats.nll_squares += losses.squares
            stats.predictions += losses.predictions
            stats.texts[number] = replace(stats.texts[number], done=stats.texts[number].done + 1)

        for window in part.tokens[stats.texts[number].done :]:
            session.run(window, add)
            done += 1
            if report is not None:
                report(done, total)
            if done < total:
                saved.write_if_due()


def _resume(stats: Stats, earlier: Stats, merge_stats: bool, path: str, overwrite: bool) -> None:
    """Takes over what an earlier run of the same call has done; BadPlan if it was another call or counted a window that
    was not whole, unless it is to be replaced."""
    same = all(
        getattr(stats, what) == getattr(earlier, what)
        for what in ("header_sha256", "experts", "n_ctx", "parse_special", "pairs")
    )
    same &= [replace(t, done=0) for t in stats.texts] == [replace(t, done=0) for t in earlier.texts]
    same &= merge_stats == any(s.gated_sum is not None for s in earlier.layers.values())
    same &= stats.layers.keys() == earlier.layers.keys()
    whole = all(s.tokens == earlier.tokens for s in earlier.layers.values())
    if same and whole:
        stats.layers.update(earlier.layers)
        stats.texts = earlier.texts
        stats.nll, stats.nll_squares, stats.predictions = earlier.nll, earlier.nll_squares, earlier.predictions
    elif not overwrite:
        raise BadPlan(
            "unfinished statistics of another run" if not same else "unfinished statistics with a part of a window",
            path=path,
            hint="overwrite=True (--force) replaces them",
        )


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
