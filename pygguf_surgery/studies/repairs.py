"""Repair of a cut: new down projections with which the kept experts give what all experts gave, as far as they can.

After a cut the layer's output is y'(t) = sum_e g'_e(t) W_e h_e(t) over the kept experts that the router now picks. It
is linear in the down projections W_e, so those that bring it closest to the output y(t) before the cut, over the tokens
of a text, are a ridge regression: min sum_t |y(t) - y'(t)|^2 + mu sum_e |W_e - W_e^old|^2. No gradients, no training
loop; gate and up projections, router and everything else stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from .._core import TensorInfo, Value, encode_header
from .._core import quantize as encode
from ..architecture.experts import GATE_IN_INPUT, most_used
from ..base.errors import BadFile, BadPlan
from ..base.progress import Progress, ProgressLike, as_progress
from ..base.units import MEMORY_MOST, MEMORY_OF_TEXTS, human, parse_size
from ..files.model import Model, Tensor
from ..files.open import open_model
from ..files.outputs import check_output
from ..files.partial import Partial, partial_path
from ..files.repair import FORMAT, MODEL, PREFIX
from ..files.subjects import subject_of, write_subject
from ..files.texts import TextLike, path_of, read_texts
from ..llama.apart import run_apart
from ..llama.session import Session
from ..llama.taps import Taps, moe_layout
from ..llama.texts import Windows, check_texts, check_windows, warn_of_context, windows_of
from ..plan_data.choices import Keep
from ..quant.types import tensor_type

# One sweep over the experts with each, from a strong pull to the old weights to a weak one; relative to the mean of the
# Gram matrices' diagonals. It ends where the tokens that were held back are predicted worse.
RIDGES = (1e-1, 1e-2, 1e-2, 1e-3, 1e-3, 1e-3)
HELD_BACK = 10  # one in so many windows decides which sweep was the best
_ALIGNMENT = 32  # of its tensors
_DROPPED = -1e30  # router logit of an expert that the cut has not


class _Replay(Taps):
    """Runs each window twice. `record` keeps what the MoE layers give. `replay` takes the dropped experts from the
    router in the layers of `masked`, hands out what the kept ones do, and puts the recorded output in the place of
    theirs: so every layer sees the inputs that it had before the cut."""

    def __init__(self, architecture: str, layers: Sequence[int], experts: int, kept: Mapping[int, Sequence[int]]):
        super().__init__(
            architecture,
            layers,
            ("logits", "probs_biased", "ids", "gates", "hidden", "sum"),
            optional=("probs_biased",),
        )
        self._dropped = {layer: sorted(set(range(experts)) - set(ids)) for layer, ids in kept.items()}
        self.masked: dict[int, Samples] = {}
        self._recorded: dict[int, list[NDArray[np.float32]]] = {}
        self._parts: dict[int, dict[str, NDArray[Any]]] = {}
        self._replaying = False

    def run(self, session: Session, window: NDArray[np.int32]) -> None:
        self._recorded, self._replaying = {}, False
        session.run(window)
        self._parts, self._replaying = {}, True
        session.run(window)

    def wants(self, name: str) -> bool:
        if not super().wants(name):
            return False
        kind, layer = self.names[name]
        return layer in self.masked and (self._replaying or kind == "sum")

    def take(self, name: str, values: NDArray[Any]) -> NDArray[Any] | None:
        kind, layer = self.names[name]
        if not self._replaying:
            self._recorded.setdefault(layer, []).append(values.copy())
            return None
        if kind in ("logits", "probs_biased"):
            masked: NDArray[Any] = values.copy()
            masked[..., self._dropped[layer]] = _DROPPED
            return masked
        parts = self._parts.setdefault(layer, {})
        parts[kind] = values
        if kind != "sum":
            return None
        output = self._recorded[layer].pop(0)
        self.masked[layer].add(parts["ids"], parts["gates"], parts["hidden"], output)
        del self._parts[layer]
        return output


class Samples:
    """The tokens of one layer. ids [T, used]: places in `kept`; inputs [T, used, F]: g h, what the down projection is
    multiplied with; outputs [T, width]: what the layer gave before the cut."""

    def __init__(
        self,
        tokens: int,
        kept: Sequence[int],
        experts: int,
        *,
        gate_in_input: bool,
        scales: NDArray[np.float32] | None,
        biases: NDArray[np.float32] | None,
    ):
        self.tokens, self.done = tokens, 0
        self._place = np.full(experts, -1, np.int32)
        self._place[list(kept)] = np.arange(len(kept))
        self._gate_in_input, self._scales, self._biases = gate_in_input, scales, biases
        self.ids = self.inputs = self.outputs = np.empty(0)

    def add(
        self,
        ids: NDArray[np.int32],
        gates: NDArray[np.float32],
        hidden: NDArray[np.float32],
        output: NDArray[np.float32],
    ) -> None:
        used = ids.shape[-1]
        ids, output = ids.reshape(-1, used), output.reshape(-1, output.shape[-1])
        gates, hidden = gates.reshape(len(ids), used), hidden.reshape(len(ids), used, -1)
        if not self.done:
            self.ids = np.empty((self.tokens, used), np.int32)
            self.inputs = np.empty((self.tokens, used, hidden.shape[-1]), np.float32)
            self.outputs = np.empty((self.tokens, output.shape[-1]), np.float32)
        here = slice(self.done, self.done + len(ids))
        self.ids[here] = self._place[ids]
        if (self.ids[here] < 0).any():
            raise BadFile("llama.cpp routed to an expert that was masked", found=int(ids[self.ids[here] < 0][0]))
        factor = np.ones_like(gates) if self._gate_in_input else gates
        self.outputs[here] = output
        if self._biases is not None:  # y = sum g (W h + b): what the biases give is not W's to explain
            self.outputs[here] -= np.einsum("tu,tuw->tw", factor, self._biases[ids])
        if self._scales is not None:
            factor = factor * self._scales[ids]
        np.multiply(hidden, factor[:, :, None], out=self.inputs[here])
        if not (np.isfinite(self.inputs[here]).all() and np.isfinite(output).all()):
            raise BadFile("activations that are not finite")
        self.done += len(ids)


def fit(old: NDArray[np.float32], samples: Samples, held_back: int) -> tuple[NDArray[np.float32], tuple[float, float]]:
    """The down projections [n, width, F] for these samples, from the old ones, and the squared error before and after,
    as a share of the output's squares, of the last `held_back` tokens, which the fit does not see.

    Block coordinate descent on the ridge regression above: expert after expert is solved exactly against what the
    others leave over, so that only one Gram matrix, F x F, is in memory. For the few sweeps that it takes see
    docs/experts.md.
    """
    n, _, features = old.shape
    inputs, rest = samples.inputs[: samples.done], samples.outputs[: samples.done].copy()
    train = len(rest) - held_back
    start = old.transpose(0, 2, 1)  # [n, F, width]
    weights = start.copy()
    where = [np.nonzero(samples.ids[: samples.done] == e) for e in range(n)]
    total = float(np.square(rest[train:], dtype=np.float64).sum()) or 1.0
    scale = sum(float(np.square(inputs[t[t < train], u[t < train]]).sum(dtype=np.float64)) for t, u in where)
    for e, (t, u) in enumerate(where):
        rest[t] -= inputs[t, u] @ weights[e]

    def error() -> float:
        return float(np.square(rest[train:], dtype=np.float64).sum()) / total

    before = best = error()
    chosen = start
    for ridge in RIDGES:
        mu = max(ridge * scale / (n * features), 1e-30)
        for e, (t, u) in enumerate(where):
            seen = int(np.searchsorted(t, train))
            if not seen:
                continue
            z = inputs[t, u]
            gram = (z[:seen].T @ z[:seen]).astype(np.float64)
            gram[np.diag_indices(features)] += mu
            left = rest[t]
            slope = (z[:seen].T @ left[:seen]).astype(np.float64) - mu * (weights[e] - start[e])
            step = np.linalg.solve(gram, slope).astype(np.float32)
            weights[e] += step
            left -= z @ step
            rest[t] = left
        if (now := error()) >= best:
            break
        best, chosen = now, weights.copy()
    return chosen.transpose(0, 2, 1), (before, best)


def repair(
    model: Model,
    keep: Keep | Mapping[int, Sequence[int]],
    texts: Sequence[TextLike],
    out: str | os.PathLike[str],
    *,
    run: str | os.PathLike[str] | None = None,
    n_ctx: int = 512,
    chunks: int | None = None,
    parse_special: bool = False,
    memory: int | str = MEMORY_OF_TEXTS,
    threads: int = 0,
    gpu_layers: int = 0,
    isolate: bool = False,
    overwrite: bool = False,
    progress: ProgressLike = None,
) -> dict[int, tuple[float, float]]:
    """Computes new down projections for the experts that `keep` names and writes them to a GGUF file, which
    Plan.keep_experts(keep, repair=out) takes. Returns {layer: (error before, error after)}, the squared error of the
    layer's output as a share of its squares, on tokens that were held back.

    model: the one to be cut, whose weights are the start. run: a file of the same model that llama.cpp runs in its
    place, such as a quantized one. texts, n_ctx, chunks, parse_special, gpu_layers, isolate: as in `calibrate`; as many
    tokens as can be had, since the fit has kept x F parameters per output (F: width of an expert). memory: for the
    tokens of the layers that are worked on at once, beside llama.cpp's own; each pass over the text runs it twice.
    MTP layers, which llama.cpp does not run, keep their down projections. progress: True, or a callable(windows done,
    windows in all).
    out: until all layers are finished they are kept in OUT.partial; a run that was stopped goes on from there when it
    is called again in the same way. What another run left there needs `overwrite`.
    Errors: as in `calibrate`, and BadPlan if the tokens of one layer do not fit `memory`.
    """
    if isolate:
        arguments = {name: value for name, value in locals().items() if name not in ("model", "isolate", "progress")}
        arguments["path"], path = model.path, model.path if run is None else os.fsdecode(run)
        with as_progress(progress, "repairing", "windows") as report:
            function = "..studies.repairs:_repair_file"
            return cast(dict[int, tuple[float, float]], run_apart(function, arguments, path=path, progress=report))
    check_windows(n_ctx, chunks, texts)
    budget = parse_size(memory)
    if not 0 < budget <= MEMORY_MOST:
        raise BadPlan("not a size", object="memory", found=memory)
    found, layers = moe_layout(model)
    kept = {layer: tuple(int(i) for i in ids) for layer, ids in keep.items()}
    for layer in layers:
        ids = kept.get(layer, ())
        if list(ids) != sorted(set(ids)) or not ids or ids[0] < 0 or ids[-1] >= found.experts:
            raise BadPlan("not ascending ids of experts", object=f"keep {layer}", found=repr(ids)[:80])
    inputs = [*model.paths, *map(path_of, texts), run]
    check_output(inputs, out, overwrite)
    check_output(inputs, partial_path(out), overwrite=True)
    read = read_texts(texts)
    runs, run_sha256 = model.path, model.header_sha256
    if run is not None:
        runs, run_sha256 = os.fsdecode(run), _check_twin(model, run, found.experts, layers)
    with nullcontext(model) if run is None else open_model(run) as running:
        check_texts(running, read, n_ctx)
        warn_of_context(running, n_ctx)
    replay = _Replay(model.architecture, layers, found.experts, {layer: kept[layer] for layer in layers})
    with (
        as_progress(progress, "repairing", "windows") as report,
        Session(runs, n_ctx=n_ctx, threads=threads, gpu_layers=gpu_layers, watch=replay) as session,
    ):
        windows = windows_of(session, read, chunks, parse_special, progress)
        del read
        replay.learn(session, windows[0].tokens[0])
        work = _Work(model, session, replay, windows, kept, layers, budget, report)
        header, offsets, size = work.layout(str(getattr(keep, "metric", "given")), parse_special, run_sha256)
        with Partial(out, header, size, len(layers), overwrite=overwrite) as file:
            work.run(file, offsets)
            errors = {layer: (float(a), float(b)) for layer, (a, b) in zip(layers, file.journal(), strict=True)}
            file.complete()
    return errors


def _repair_file(path: str, **arguments: Any) -> dict[int, tuple[float, float]]:
    """In a child process."""
    with open_model(path) as model:
        return repair(model, **arguments)


def _check_twin(model: Model, path: str | os.PathLike[str], experts: int, layers: Sequence[int]) -> str:
    """The digest of its header; BadPlan if it is not the same model."""
    with open_model(path) as other:
        found, others = moe_layout(other)
        for what, a, b in (
            ("architecture", other.architecture, model.architecture),
            ("experts", found.experts, experts),
            ("layers", others, list(layers)),
        ):
            if a != b:
                raise BadPlan("not the same model", path=other.path, object=what, found=a, expected=b)
        subject_of(other).check_same(subject_of(model), "not the same model: it is", path=other.path)
        return other.header_sha256


class _Work:
    """The passes over the text, each for as many layers as fit the memory, whose tokens are then held and solved one
    layer after the other."""

    def __init__(
        self,
        model: Model,
        session: Session,
        replay: _Replay,
        windows: Sequence[Windows],
        kept: Mapping[int, tuple[int, ...]],
        layers: Sequence[int],
        budget: int,
        progress: Progress | None,
    ):
        self.model, self.session, self.replay, self.windows = model, session, replay, windows
        self.kept, self.layers, self.progress = kept, list(layers), progress
        self.tokens = sum(w.tokens.size for w in windows)
        self.order, self.held_back = self._order()
        self._step = self._layers_at_once(budget)

    def down(self, layer: int) -> Tensor:
        return self.model.tensors[f"blk.{layer}.ffn_down_exps.weight"]

    def _layers_at_once(self, budget: int) -> int:
        """A layer's tokens are held as Samples; the fit holds another copy of the outputs, and old, new and best
        weights."""
        used = most_used(self.model.architecture, self.model.metadata.get)
        features, width = self.down(self.layers[0]).ne[:2]
        samples = self.tokens * 4 * (used * (features + 1) + width)
        working = 4 * self.tokens * width + 3 * 4 * len(self.kept[self.layers[0]]) * features * width
        if samples + working > budget:
            raise BadPlan(
                "the tokens of one layer do not fit",
                object="memory",
                found=human(budget),
                expected=f"at least {human(samples + working)} for {self.tokens} tokens",
                hint="or fewer windows (chunks=, --chunks)",
            )
        return (budget - working) // samples

    def run(self, file: Partial, offsets: Sequence[int]) -> None:
        """Solves the layers that the file lacks."""
        finished = set(file.finished())
        missing = [i for i in range(len(self.layers)) if i not in finished]
        total = -(-len(missing) // self._step) * len(self.order)
        for number, first in enumerate(range(0, len(missing), self._step)):
            parts = missing[first : first + self._step]
            samples = self._pass_over([self.layers[i] for i in parts], number * len(self.order), total)
            for i in parts:
                layer = self.layers[i]
                old = self.down(layer).dequantize(experts=list(self.kept[layer]))
                new, errors = fit(old, samples.pop(layer), self.held_back)
                if not np.isfinite(errors).all():
                    raise BadFile("activations beyond what float32 holds", object=f"blk.{layer}")
                at, type = offsets[i], tensor_type(self._type(layer)).id
                for expert in new:
                    data = encode(np.ascontiguousarray(expert), type, None, 1, False)
                    file.write(at, data)
                    at += data.nbytes
                file.finish(i, errors)

    def _pass_over(self, layers: Sequence[int], done: int, total: int) -> dict[int, Samples]:
        """The tokens of these layers."""

        def extra(layer: int, part: str) -> NDArray[np.float32] | None:
            tensor = self.model.tensors.get(f"blk.{layer}.ffn_down_exps.{part}")
            return None if tensor is None else tensor.dequantize()

        samples = {
            layer: Samples(
                self.tokens,
                self.kept[layer],
                self.down(layer).shape[0],
                gate_in_input=self.model.architecture in GATE_IN_INPUT,
                scales=extra(layer, "scale"),
                biases=extra(layer, "bias"),
            )
            for layer in layers
        }
        self.replay.masked = samples
        for number, window in enumerate(self.order, 1):
            self.replay.run(self.session, window)
            if self.progress is not None:
                self.progress(done + number, total)
        self.replay.masked = {}
        return samples

    def _order(self) -> tuple[list[NDArray[np.int32]], int]:
        """All windows, those that are held back last, spread over the texts, which differ from part to part; and how
        many tokens are held back."""
        every = [window for part in self.windows for window in part.tokens]
        if len(every) < HELD_BACK:
            raise BadPlan(
                "the text is too short for a repair",
                object="texts",
                found=f"{len(every)} windows",
                expected=f"at least {HELD_BACK}, and better thousands",
            )
        back = range(HELD_BACK // 2, len(every), HELD_BACK)
        order = [w for i, w in enumerate(every) if i not in back] + [every[i] for i in back]
        return order, len(back) * self.session.n_ctx

    def _type(self, layer: int) -> str:
        type = self.down(layer).type
        return type if type in ("F32", "F16", "BF16") else "F32"

    def layout(self, metric: str, parse_special: bool, run_sha256: str) -> tuple[bytes, list[int], int]:
        """The header of the file, which says what the down projections depend on, where each tensor begins, and the
        size of the file. Its last tensor are the errors of each layer, before and after."""
        model, texts = self.model, [w.text for w in self.windows]
        metadata = {
            "general.type": Value("expert_repair", "str"),
            PREFIX + "format": Value(FORMAT, "u32"),
            **write_subject(subject_of(model), MODEL),
            PREFIX + "run.header_sha256": Value(run_sha256, "str"),
            PREFIX + "metric": Value(metric, "str"),
            PREFIX + "text.sha256": Value([t.sha256 for t in texts], "str[]"),
            PREFIX + "text.windows": Value([t.windows for t in texts], "u32[]"),
            PREFIX + "tokens": Value(self.tokens, "u64"),
            PREFIX + "n_ctx": Value(self.session.n_ctx, "u32"),
            PREFIX + "parse_special": Value(parse_special, "bool"),
            PREFIX + "layers": Value(list(self.kept), "u32[]"),
            **{f"{PREFIX}{layer}.kept": Value(list(ids), "u32[]") for layer, ids in self.kept.items()},
        }
        infos = [
            TensorInfo(
                self.down(layer).name,
                (*self.down(layer).ne[:2], len(self.kept[layer])),
                tensor_type(self._type(layer)).id,
            )
            for layer in self.layers
        ]
        infos.append(TensorInfo("errors", (2, len(self.layers)), tensor_type("F64").id))
        header, offsets, size = encode_header(list(metadata.items()), infos, _ALIGNMENT)
        return header, list(offsets), size
