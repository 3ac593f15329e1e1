"""What the experts of each layer do in a window, and how it is added to their statistics once the window is whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..architecture.experts import GATE_IN_INPUT
from ..base.errors import BadFile
from ..files.stats import LayerStats
from ..llama.taps import Taps


@dataclass
class Observation:
    """T tokens of one layer, by the experts they are routed to, E experts in all. ids, gates, squares (of the norm of
    an expert's output f before its gate), peaks (max |f|): [T, used]. logits: [T, E], where pairs are recorded."""

    ids: NDArray[np.int32]
    gates: NDArray[np.float32]
    squares: NDArray[np.float64]
    peaks: NDArray[np.float32]
    logits: NDArray[np.float32] | None

    def add_to(self, stats: LayerStats, gate_in_input: bool) -> None:
        tokens, experts = len(self.ids), len(stats.count)
        gates, norms, flat = self.gates.astype(np.float64), np.sqrt(self.squares), self.ids.ravel()
        for total, values in (
            (stats.count, None),
            (stats.gate_sum, gates),
            (stats.norm_sum, norms),
            (stats.norm_sq_sum, self.squares),
            (stats.gated_norm_sum, norms if gate_in_input else gates * norms),
        ):
            total += np.bincount(flat, None if values is None else values.ravel(), experts)
        np.maximum.at(stats.max_activation, flat, self.peaks.ravel())
        if self.logits is not None and stats.coactivation is not None and stats.logit_gram is not None:
            routed = np.zeros((tokens, experts), np.float32)  # sums of ones are exact in float32
            np.put_along_axis(routed, self.ids, 1, axis=1)
            stats.coactivation += routed.T @ routed
            wide = self.logits.astype(np.float64)
            stats.logit_gram += wide.T @ wide
        stats.tokens += tokens


def observe(
    experts: int,
    ids: NDArray[np.int32],
    gates: NDArray[np.float32],
    outputs: NDArray[np.float32],
    logits: NDArray[np.float32] | None,
) -> Observation:
    """ids [T, used]: the experts of each token; gates [T, used]; outputs [T, used, width]: f, before the gate; logits
    [T, E]. BadFile for what no sum can hold."""
    used = ids.shape[-1]
    ids = ids.reshape(-1, used)
    gates, outputs = gates.reshape(len(ids), used), outputs.reshape(len(ids), used, -1)
    if not ((ids >= 0) & (ids < experts)).all():
        raise BadFile("llama.cpp routed to an expert that does not exist", found=int(ids.max()))
    squares = np.einsum("tuw,tuw->tu", outputs, outputs).astype(np.float64)
    if not (np.isfinite(squares).all() and np.isfinite(gates).all()):  # NaN, or squares beyond float32
        squares = np.square(outputs, dtype=np.float64).sum(axis=2)
        if not np.isfinite(squares).all() or not np.isfinite(gates).all():
            bad = ids[~(np.isfinite(squares) & np.isfinite(gates))]
            raise BadFile("activations that are not finite", found=f"in expert {bad[0]}")
    peaks = np.maximum(outputs.max(axis=2), -outputs.min(axis=2))
    return Observation(ids, gates, squares, peaks, None if logits is None else logits.reshape(len(ids), experts))


def add_gated(
    total: NDArray[np.float64],
    ids: NDArray[np.int32],
    gates: NDArray[np.float32],
    outputs: NDArray[np.float32],
    gate_in_input: bool,
) -> None:
    """Adds sum g f over the tokens of each expert to total [E, width]; arguments as in `observe`."""
    flat = ids.ravel()
    order = np.argsort(flat, kind="stable")
    gated = outputs.reshape(len(flat), -1)[order]
    if not gate_in_input:
        gated *= gates.ravel()[order, None].astype(np.float32)
    first = np.flatnonzero(np.diff(flat[order], prepend=-1))
    total[flat[order][first]] += np.add.reduceat(gated, first, axis=0, dtype=np.float64)


class Recorder(Taps):
    """Observes a window as llama.cpp runs it, and adds it to the statistics when it is told that it was whole."""

    def __init__(
        self, architecture: str, layers: Mapping[int, LayerStats], experts: int, *, merge_stats: bool, pairs: bool
    ):
        super().__init__(architecture, tuple(layers), ("logits", "ids", "gates", "outputs"))
        self.stats = layers
        self._experts, self._merge_stats, self._pairs = experts, merge_stats, pairs
        self._gate_in_input = architecture in GATE_IN_INPUT
        self._waiting: dict[int, dict[str, NDArray[Any]]] = {}
        self._window: dict[int, list[Observation]] = {}
        self._gated: dict[int, NDArray[np.float64]] = {}

    def take(self, name: str, values: NDArray[Any]) -> None:
        kind, layer = self.names[name]
        parts = self._waiting.setdefault(layer, {})
        parts[kind] = values
        if len(parts) < 4:
            return
        del self._waiting[layer]
        ids, gates, outputs = parts["ids"], parts["gates"], parts["outputs"]
        try:
            seen = observe(self._experts, ids, gates, outputs, parts["logits"] if self._pairs else None)
        except BadFile as error:
            error.object = f"blk.{layer}"
            raise
        self._window.setdefault(layer, []).append(seen)
        if self._merge_stats:
            if layer not in self._gated:
                self._gated[layer] = np.zeros((self._experts, outputs.shape[-1]))
            add_gated(self._gated[layer], ids, gates, outputs, self._gate_in_input)

    def add_window(self) -> None:
        """Called between windows, when the one that was run is whole."""
        for layer, seen in self._window.items():
            for observation in seen:
                observation.add_to(self.stats[layer], self._gate_in_input)
        for layer, gated in self._gated.items():
            stats = self.stats[layer]
            if stats.gated_sum is None:
                stats.gated_sum = np.zeros_like(gated)
            stats.gated_sum += gated
        self._window, self._gated = {}, {}


def memory_needed(
    layers: int, experts: int, used: int, width: int, n_ctx: int, batch: int, *, merge_stats: bool, pairs: bool
) -> int:
    """Bytes of the sums, of a window that is not whole yet, and of the batch of a layer that is looked at."""
    gated = 8 * experts * width * merge_stats
    sums = 8 * (6 * experts + 2 * experts * experts * pairs) + gated
    window = n_ctx * (used * (4 + 4 + 8 + 4) + 4 * experts * pairs) + gated
    at_work = 4 * min(n_ctx, batch) * (used * width * (2 + merge_stats) + 3 * experts) + 16 * experts**2 * pairs
    return layers * (sums + window) + at_work
