"""Exact calibration without PyTorch: llama.cpp runs the text, its eval callback hands out what every expert did."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..container import check_output
from ..errors import BadFile, BadPlan, Unsupported
from . import roles, stats as stats_file
from .stats import LayerStats, Stats, Text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..llama import Session
    from ..model import Model

CHECKPOINT_SECONDS = 60
Progress = Callable[[int, int], object]
TextLike = Any  # a path, bytes of UTF-8, or an array of token ids

# llama.cpp's names (llama-graph.cpp, build_moe_ffn) of what is recorded. Where it computes something in steps, the last
# step of the graph that has one of the names is what the model uses.
_STEPS: Mapping[str, tuple[str, ...]] = {
    "logits": ("ffn_moe_logits", "ffn_moe_logits_biased"),
    "ids": ("ffn_moe_topk",),
    "gates": ("ffn_moe_weights", "ffn_moe_weights_softmax", "ffn_moe_weights_norm", "ffn_moe_weights_scaled"),
    "outputs": ("ffn_moe_down", "ffn_moe_down_scaled", "ffn_moe_down_biased"),
    "hidden": ("ffn_moe_swiglu", "ffn_moe_silu", "ffn_moe_geglu", "ffn_moe_gelu", "ffn_moe_swiglu_oai", "ffn_moe_reglu",
               "ffn_moe_relu", "ffn_moe_relu_sqr", "ffn_moe_situ", "ffn_moe_swiglu_limited"),
    "probs_biased": ("ffn_moe_probs_biased",),
    "sum": ("ffn_moe_out",),
}
# The gate multiplies the input of the expert, so that f has it already.
GATE_IN_INPUT = frozenset(("llama4",))


class Taps:
    """Finds the tensors of each MoE layer in llama.cpp's graph: a `watch` for Session that first learns the names.

    kinds: keys of _STEPS. optional: those of them that may be missing. `names`: kind and layer of each tensor, after
    `learn`. Subclasses define take(name, array).
    """

    def __init__(self, architecture: str, layers: Sequence[int], kinds: Iterable[str], optional: Iterable[str] = ()):
        self._architecture, self._layers, self._kinds = architecture, layers, tuple(kinds)
        self._optional = frozenset(optional)
        self._graph: list[str] | None = []
        self.names: dict[str, tuple[str, int]] = {}

    def wants(self, name: str) -> bool:
        if self._graph is not None:
            self._graph.append(name)
            return False
        return name in self.names

    def learn(self, session: Session, tokens: NDArray[np.int32]) -> None:
        """Runs a few tokens to see the graph. Unsupported where it lacks what is to be recorded."""
        session.run(tokens[:2])
        graph, self._graph = self._graph or [], None
        for layer in self._layers:
            for kind in self._kinds:
                found = [name for name in graph if name in {f"{step}-{layer}" for step in _STEPS[kind]}]
                if not found and kind in self._optional:
                    continue
                if not found or len(set(found)) != len(found):
                    raise Unsupported(
                        "llama.cpp does not compute this tensor for this architecture" if not found else
                        "llama.cpp computes this tensor twice in a layer for this architecture",
                        path=session.path, object=f"{_STEPS[kind][0]}-{layer}", found=self._architecture,
                        hint="its experts cannot be calibrated; rank by router-norm, aimer or an importance matrix")
                self.names[found[-1]] = (kind, layer)


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
                fold(self._stats[layer], parts["ids"], parts["gates"], parts["outputs"], parts["logits"],
                     gate_in_input=self._gate_in_input, merge_stats=self._merge_stats)
            except BadFile as error:
                error.object = f"blk.{layer}"
                raise


def fold(stats: LayerStats, ids: NDArray[np.int32], gates: NDArray[np.float32], outputs: NDArray[np.float32],
         logits: NDArray[np.float32], *, gate_in_input: bool = False, merge_stats: bool = False) -> None:
    """Adds T tokens to a layer's statistics. ids [T, used]: the experts of each token; gates [T, used]; outputs
    [T, used, width]: f, before the gate (with gate_in_input after it); logits [T, E]."""
    import numpy as np

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
    for total, values in ((stats.count, None), (stats.gate_sum, gates), (stats.norm_sum, norms),
                          (stats.norm_sq_sum, squares),
                          (stats.gated_norm_sum, norms if gate_in_input else gates * norms)):
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


@dataclass(frozen=True)
class Windows:
    """A text as calibration runs it: tokens [windows, n_ctx]."""

    text: Text
    tokens: NDArray[np.int32]


def read_texts(texts: Sequence[TextLike]) -> list[tuple[str, Any]]:
    """(name for errors, bytes or token ids) of each text: what cannot be read is found before a model is loaded."""
    return [(os.fsdecode(text), _read(text)) if isinstance(text, (str, os.PathLike)) else ("text", text)
            for text in texts]


def windows_of(session: Session, texts: Sequence[tuple[str, Any]], chunks: int | None,
               parse_special: bool) -> list[Windows]:
    """Each text cut into windows of the session's length, at most `chunks` of them. BadPlan for one that is too short."""
    out = []
    for name, text in texts:
        data = bytes(text)
        tokens = session.tokenize(data, parse_special) if isinstance(text, bytes) else _token_ids(text, session.n_vocab)
        n = len(tokens) // session.n_ctx
        if n == 0:
            raise BadPlan("the text is too short", path=name, found=f"{len(tokens)} tokens",
                          expected=f"at least {session.n_ctx}", hint="a longer text, or a smaller --ctx")
        windows = n if chunks is None else min(n, chunks)
        out.append(Windows(Text(hashlib.sha256(data).hexdigest(), len(tokens), windows),
                           tokens[:windows * session.n_ctx].reshape(windows, session.n_ctx)))
    if len({w.text.sha256 for w in out}) != len(out):
        raise BadPlan("the same text twice", object="texts", hint="its tokens would count twice")
    return out


def _token_ids(array: Any, n_vocab: int) -> NDArray[np.int32]:
    import numpy as np

    ids = np.asarray(array)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) and not (0 <= ids.min() and ids.max() < n_vocab):
        raise BadPlan("not token ids", object="texts", found=f"{ids.dtype} {list(ids.shape)}",
                      expected=f"one dimension of 0..{n_vocab - 1}")
    return ids.astype(np.int32)


def _read(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def moe_layout(model: Model) -> tuple[roles.Layout, list[int]]:
    """The layout of a model, and its MoE layers that llama.cpp runs: all but the MTP blocks. BadPlan without experts."""
    found = roles.layout(model.architecture, model.tensors, lambda key: model.metadata.get(key))
    layers = [layer for layer in found.layers if layer not in found.mtp]
    if not layers:
        raise BadPlan("the model has no experts", path=model.path, object=model.architecture or None)
    return found, layers


def check_numbers(n_ctx: int, chunks: int | None, texts: Sequence[Any]) -> None:
    for name, number, least in (("n_ctx", n_ctx, 8), ("chunks", chunks, 1)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < least):
            raise BadPlan("not a number of tokens" if name == "n_ctx" else "not a number of windows", object=name,
                          found=repr(number), expected=f"at least {least}")
    if not texts:
        raise BadPlan("no text to calibrate on", object="texts")


def calibrate(path: str | os.PathLike[str], texts: Sequence[TextLike],
              out: str | os.PathLike[str] | None = None, *, n_ctx: int = 512, chunks: int | None = None,
              merge_stats: bool = False, parse_special: bool = False, threads: int = 0, gpu_layers: int = 0,
              overwrite: bool = False, progress: Progress | None = None) -> Stats:
    """Runs texts through a GGUF model with llama.cpp and records what each expert of each MoE layer did.

    The model may be quantized: the statistics also rank the experts of its 16-bit original. texts: paths, bytes of
    UTF-8, or arrays of token ids. n_ctx: tokens of a window, each from an empty cache. chunks: at most so many windows of
    each text.
    merge_stats: also the sums that merging needs, [E, width] per layer. parse_special: special tokens in the text are
    such. gpu_layers: how many layers llama.cpp puts on a GPU, -1 for all.
    out: where the statistics go, every minute; a run that was stopped goes on from there when it is called again in the
    same way, and a complete file needs `overwrite`. progress: called with windows done and windows in all.
    Errors: BadPlan for a model without experts or a text shorter than a window, BadFile for a model that llama.cpp does
    not load, Unsupported without llama-cpp-python or where llama.cpp's graph lacks what is recorded.
    """
    from .. import model as models
    from ..llama import Session

    check_numbers(n_ctx, chunks, texts)
    if out is not None:
        check_output([path, *texts], out, overwrite=True)  # what is there may be the start of this very run
    texts = read_texts(texts)
    with models.open(path) as model:
        found, layers = moe_layout(model)
        stats = Stats(model.header_sha256, model.architecture, str(model.metadata.get("general.name") or ""),
                      found.experts, n_ctx, {layer: LayerStats.empty(found.experts) for layer in layers},
                      parse_special=parse_special)
        first = model.path
        if out is not None:
            check_output(model.paths, out, overwrite=True)
    earlier = None
    if out is not None and os.path.lexists(out) and not overwrite:
        earlier = stats_file.open(out)
        if earlier.complete:
            raise FileExistsError(errno.EEXIST, "exists already and is complete; overwrite=True (--force) replaces it",
                                  os.fsdecode(out))
    recorder = _Recorder(stats.architecture, stats.layers, stats.experts, merge_stats)
    with Session(first, n_ctx=n_ctx, threads=threads, gpu_layers=gpu_layers, watch=recorder) as session:
        windows = windows_of(session, texts, chunks, parse_special)
        stats.texts = [w.text for w in windows]
        recorder.learn(session, windows[0].tokens[0])
        if earlier is not None:
            _resume(stats, earlier, merge_stats, os.fsdecode(out))
        total = sum(text.windows for text in stats.texts)
        done = sum(text.done for text in stats.texts)
        saved, pause = time.monotonic(), CHECKPOINT_SECONDS
        for number, part in enumerate(windows):
            for window in part.tokens[stats.texts[number].done:]:
                sums = session.run(window)
                stats.nll, stats.nll_squares = stats.nll + sums[0], stats.nll_squares + sums[1]
                stats.predictions += sums[2]
                stats.texts[number] = replace(stats.texts[number], done=stats.texts[number].done + 1)
                done += 1
                if progress is not None:
                    progress(done, total)
                if out is not None and done < total and time.monotonic() - saved > pause:
                    start = time.monotonic()
                    stats.write(out, overwrite=overwrite or earlier is not None)
                    overwrite, saved = True, time.monotonic()
                    pause = max(CHECKPOINT_SECONDS, 20 * (saved - start))  # big statistics on a slow disk: less often
    _check_tokens(stats)
    if out is not None:
        stats.write(out, overwrite=overwrite or earlier is not None)
    return stats


def _resume(stats: Stats, earlier: Stats, merge_stats: bool, path: str) -> None:
    """Takes over what an earlier run of the same call has done; BadPlan if it was another call."""
    same = all(getattr(stats, what) == getattr(earlier, what)
               for what in ("header_sha256", "experts", "n_ctx", "parse_special"))
    same &= [replace(t, done=0) for t in stats.texts] == [replace(t, done=0) for t in earlier.texts]
    same &= merge_stats == any(s.gated_sum is not None for s in earlier.layers.values())
    if not same or stats.layers.keys() != earlier.layers.keys():
        raise BadPlan("unfinished statistics of another run", path=path, hint="overwrite=True (--force) replaces them")
    stats.layers.update(earlier.layers)
    stats.texts = earlier.texts
    stats.nll, stats.nll_squares, stats.predictions = earlier.nll, earlier.nll_squares, earlier.predictions


def _check_tokens(stats: Stats) -> None:
    """Every layer, the last one too, has seen every token: it would not if logits were asked for the last token only."""
    wrong = [layer for layer, s in stats.layers.items() if s.tokens != stats.tokens]
    if wrong:
        raise BadFile("llama.cpp did not run all tokens through a layer", object=f"blk.{wrong[0]}",
                      found=stats.layers[wrong[0]].tokens, expected=stats.tokens)
