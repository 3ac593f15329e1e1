"""What calibration recorded about the experts of a model: sums over the tokens of texts, kept in a GGUF file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

from .._core import Source, Value, read_header
from ..base.errors import BadFile, BadPlan, SurgeryError
from ..base.words import columns
from ..plan_data.subject import Subject
from .gguf import read_gguf, write_gguf
from .subjects import read_subject, write_subject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


FORMAT = 1
_PREFIX = "pgs.stats."
_MODEL = "pgs.stats.model."
Kind = TypeVar("Kind")


@dataclass
class LayerStats:
    """Sums over the tokens t that one MoE layer saw, in float64. f is an expert's output before its gate, g the gate
    that the model multiplied it with; ||.|| is the L2 norm over the width of f. E experts.

    count [E]: tokens routed to the expert. gate_sum: sum g. norm_sum: sum ||f||. norm_sq_sum: sum ||f||^2.
    gated_norm_sum: sum g ||f||, which over count is REAP (arXiv 2510.13999). max_activation: max |f|.
    coactivation [E, E]: tokens routed to both. logit_gram [E, E]: sum over all tokens of the products of two router
    logits; both only with pairs. gated_sum [E, width], only with merge_stats: sum g f.
    """

    count: NDArray[np.float64]
    gate_sum: NDArray[np.float64]
    norm_sum: NDArray[np.float64]
    norm_sq_sum: NDArray[np.float64]
    gated_norm_sum: NDArray[np.float64]
    max_activation: NDArray[np.float64]
    coactivation: NDArray[np.float64] | None = None
    logit_gram: NDArray[np.float64] | None = None
    gated_sum: NDArray[np.float64] | None = None
    tokens: int = 0

    @classmethod
    def empty(cls, experts: int, pairs: bool = True) -> LayerStats:
        import numpy as np

        count, gate, norm, norm_sq, gated_norm, most = np.zeros((6, experts))
        coactivation, logit_gram = np.zeros((2, experts, experts)) if pairs else (None, None)
        return cls(count, gate, norm, norm_sq, gated_norm, most, coactivation, logit_gram)

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        return {
            f.name: array for f in fields(self) if f.name != "tokens" and (array := getattr(self, f.name)) is not None
        }

    def plus(self, other: LayerStats) -> LayerStats:
        import numpy as np

        mine, theirs = self.arrays(), other.arrays()
        joined = {
            name: (np.maximum if name == "max_activation" else np.add)(mine[name], theirs[name])
            for name in mine.keys() & theirs.keys()
        }
        return LayerStats(**joined, tokens=self.tokens + other.tokens)


@dataclass(frozen=True)
class Text:
    """A text that was run. sha256: of its bytes. tokens: of all of it. windows: to run; done: those that were."""

    sha256: str
    tokens: int
    windows: int
    done: int = 0


@dataclass
class Stats:
    """Statistics of one model over texts. layers: those that were run, which MTP layers are not. nll, nll_squares,
    predictions: sums of -log p over the second half of each window, as llama-perplexity counts. of: the model and what
    its experts are in the one that it was cut from; None in files of older versions."""

    header_sha256: str
    architecture: str
    name: str  # general.name of the model
    experts: int
    n_ctx: int
    layers: dict[int, LayerStats]
    texts: list[Text] = field(default_factory=list)
    nll: float = 0.0
    nll_squares: float = 0.0
    predictions: int = 0
    parse_special: bool = False
    of: Subject | None = None

    def __repr__(self) -> str:
        return (
            f"<Stats of {self.experts} experts in {len(self.layers)} layers over {self.tokens} tokens of "
            f"{len(self.texts)} texts>"
        )

    @property
    def tokens(self) -> int:
        return sum(text.done for text in self.texts) * self.n_ctx

    @property
    def complete(self) -> bool:
        return all(text.done == text.windows for text in self.texts)

    @property
    def pairs(self) -> bool:
        """Whether all layers have what is recorded of pairs of experts."""
        return all(stats.logit_gram is not None for stats in self.layers.values())

    def perplexity(self) -> tuple[float, float] | None:
        """(perplexity of the texts, its standard error), or None before the first window."""
        return perplexity(self.nll, self.nll_squares, self.predictions) if self.predictions else None

    def unseen(self) -> dict[int, list[int]]:
        """layer -> the experts that no token was routed to; layers without such are left out."""
        return {
            layer: ids
            for layer, stats in self.layers.items()
            if (ids := [i for i, n in enumerate(stats.count.tolist()) if n == 0])
        }

    def summary(self) -> str:
        lines = [
            f"{self.name or 'a model'} ({self.architecture}): {self.experts} experts in {len(self.layers)} layers, "
            f"{self.tokens} tokens in windows of {self.n_ctx}"
        ]
        if (value := self.perplexity()) is not None:
            lines.append(f"perplexity of the text: {value[0]:.4f} +/- {value[1]:.4f}")
        if not self.complete:
            lines.append(
                f"not complete: {sum(t.done for t in self.texts)} of {sum(t.windows for t in self.texts)} windows"
            )
        widths = (5, 9, 6, 8, 8, 8)
        lines.append(columns(widths, ("layer", "tokens", "unseen", "least", "median", "most")) + "  tokens per expert")
        unseen = self.unseen()
        for layer, stats in self.layers.items():
            counts = sorted(stats.count.tolist())
            spread = [f"{counts[i]:.0f}" for i in (0, len(counts) // 2, -1)]
            lines.append(columns(widths, (layer, stats.tokens, len(unseen.get(layer, ())), *spread)))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        value = self.perplexity()
        return {
            "architecture": self.architecture,
            "name": self.name,
            "header_sha256": self.header_sha256,
            "model": None if self.of is None else self.of.to_json(),
            "experts": self.experts,
            "n_ctx": self.n_ctx,
            "tokens": self.tokens,
            "complete": self.complete,
            "perplexity": value[0] if value else None,
            "perplexity_error": value[1] if value else None,
            "texts": [vars(text) for text in self.texts],
            "layers": {
                str(layer): {"tokens": stats.tokens, "count": stats.count.tolist()}
                for layer, stats in self.layers.items()
            },
        }

    # --- several ----------------------------------------------------------------------------------------------------

    def merge(self, *others: Stats) -> Stats:
        """The statistics of all texts together. BadPlan for another model, another window, or a text that is in two."""
        joined = Stats(
            self.header_sha256,
            self.architecture,
            self.name,
            self.experts,
            self.n_ctx,
            dict(self.layers),
            list(self.texts),
            self.nll,
            self.nll_squares,
            self.predictions,
            self.parse_special,
            self.of,
        )
        for other in others:
            for what in ("header_sha256", "architecture", "experts", "n_ctx", "parse_special"):
                mine, theirs = getattr(joined, what), getattr(other, what)
                if mine != theirs:
                    raise BadPlan("statistics that do not belong together", object=what, found=theirs, expected=mine)
            joined.of = joined.of or other.of
            if joined.layers.keys() != other.layers.keys():
                raise BadPlan("statistics of other layers", found=list(other.layers), expected=list(joined.layers))
            if {text.sha256 for text in joined.texts} & {text.sha256 for text in other.texts}:
                raise BadPlan("the same text twice", object="texts", hint="its tokens would count twice")
            for layer, stats in other.layers.items():
                joined.layers[layer] = joined.layers[layer].plus(stats)
            joined.texts += other.texts
            joined.nll += other.nll
            joined.nll_squares += other.nll_squares
            joined.predictions += other.predictions
        return joined

    # --- the file ---------------------------------------------------------------------------------------------------

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """A GGUF file: `blk.N.COUNT` and so on as F64 tensors named like the fields of LayerStats, the rest as keys."""
        import numpy as np

        keys = {"general.type": Value("expert_stats", "str"), _PREFIX + "format": Value(FORMAT, "u32")}
        for name, value, kind in (
            ("model.header_sha256", self.header_sha256, "str"),
            ("model.architecture", self.architecture, "str"),
            ("model.name", self.name, "str"),
            ("experts", self.experts, "u32"),
            ("n_ctx", self.n_ctx, "u32"),
            ("layers", list(self.layers), "u32[]"),
            ("tokens", [s.tokens for s in self.layers.values()], "u64[]"),
            ("parse_special", self.parse_special, "bool"),
            ("text.sha256", [t.sha256 for t in self.texts], "str[]"),
            ("text.tokens", [t.tokens for t in self.texts], "u64[]"),
            ("text.windows", [t.windows for t in self.texts], "u32[]"),
            ("text.done", [t.done for t in self.texts], "u32[]"),
            ("nll", self.nll, "f64"),
            ("nll_squares", self.nll_squares, "f64"),
            ("predictions", self.predictions, "u64"),
        ):
            keys[_PREFIX + name] = Value(value, kind)
        keys |= write_subject(self.of, _MODEL)
        tensors = {
            f"blk.{layer}.{name}": np.ascontiguousarray(array, np.float64)
            for layer, stats in self.layers.items()
            for name, array in stats.arrays().items()
        }
        write_gguf(path, keys, tensors, overwrite=overwrite)


def open_stats(path: str | os.PathLike[str]) -> Stats:
    """The statistics in a file. BadFile for a file of another kind, one that contradicts itself, or one with numbers
    that are not finite."""
    metadata, tensors = read_gguf(path)
    try:
        stats = _read(metadata, tensors)
        stats.of = read_subject(metadata, _MODEL)
    except SurgeryError as error:
        error.path = os.fsdecode(path)
        raise
    return stats


def windows_done(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """(windows that were run, windows in all) of a file of statistics, from its metadata; None for any other file."""
    try:
        source = Source(os.fsdecode(path))
        try:
            metadata = dict(read_header(source).metadata)
        finally:
            source.close()
        done, total = (sum(metadata[f"{_PREFIX}text.{what}"].value) for what in ("done", "windows"))
    except (OSError, SurgeryError, LookupError, TypeError):
        return None
    return done, total


def _read(metadata: Mapping[str, Value], tensors: Mapping[str, NDArray[Any]]) -> Stats:
    import numpy as np

    def get(name: str, kind: type[Kind]) -> Kind:
        value = metadata.get(_PREFIX + name)
        if value is None or not isinstance(value.value, kind):
            raise BadFile(
                "not statistics of experts",
                object=_PREFIX + name,
                found=None if value is None else f"{value.value!r:.80}",
                expected=f"a {kind.__name__}",
                hint="gguf-surgery calibrate makes them",
            )
        return value.value

    version = get("format", int)
    if version != FORMAT:
        raise BadFile("statistics of another version", object=_PREFIX + "format", found=version, expected=FORMAT)
    experts, layers, tokens = get("experts", int), get("layers", list), get("tokens", list)
    columns = [get(f"text.{name}", list) for name in ("sha256", "tokens", "windows", "done")]
    if not all(type(x) is int for column in (layers, tokens, *columns[1:]) for x in column) or not all(
        isinstance(x, str) for x in columns[0]
    ):
        raise BadFile("lists of another type", object=_PREFIX + "text")
    if len({len(column) for column in columns}) != 1 or len(layers) != len(tokens):
        raise BadFile("lists of different lengths", object=_PREFIX + "text")
    stats = Stats(
        get("model.header_sha256", str),
        get("model.architecture", str),
        get("model.name", str),
        experts,
        get("n_ctx", int),
        {},
        [Text(*row) for row in zip(*columns, strict=True)],
        get("nll", float),
        get("nll_squares", float),
        get("predictions", int),
        get("parse_special", bool),
    )
    for layer, seen in zip(layers, tokens, strict=True):
        arrays: dict[str, NDArray[np.float64]] = {}
        for item in fields(LayerStats):
            name = f"blk.{layer}.{item.name}"
            array = tensors.get(name)
            optional = item.name in ("gated_sum", "coactivation", "logit_gram")
            if item.name == "tokens" or (array is None and optional):
                continue
            shape = (experts,) * (2 if item.name in ("coactivation", "logit_gram") else 1)
            if (
                array is None
                or array.dtype != np.float64
                or array.shape[: len(shape)] != shape
                or array.ndim != len(shape) + (item.name == "gated_sum")
            ):
                raise BadFile(
                    "statistics that are missing or of another shape",
                    object=name,
                    found=None if array is None else f"{array.dtype} {list(array.shape)}",
                    expected=f"float64 {list(shape)}",
                )
            if not np.isfinite(array).all() or (item.name not in ("logit_gram", "gated_sum") and (array < 0).any()):
                raise BadFile("statistics that cannot be sums", object=name)
            arrays[item.name] = array
        if ("coactivation" in arrays) != ("logit_gram" in arrays):
            raise BadFile("statistics with one half of the pairs", object=f"blk.{layer}")
        stats.layers[layer] = LayerStats(**arrays, tokens=seen)
    return stats


def perplexity(nll: float, squares: float, count: int) -> tuple[float, float]:
    """(perplexity, its standard error) of sums over predictions, as llama-perplexity prints them."""
    mean = nll / count
    spread = math.sqrt(max(squares / count - mean * mean, 0.0) / max(count - 1, 1))
    return math.exp(mean), math.exp(mean) * spread
