"""The tensors of the MoE layers in llama.cpp's graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..architecture.experts import Layout, layout
from ..base.errors import BadPlan, Unsupported
from ..files.model import Model
from .session import Session

# llama.cpp's names (llama-graph.cpp, build_moe_ffn) of what is recorded. Where it computes something in steps, the last
# step of the graph that has one of the names is what the model uses.
_STEPS: Mapping[str, tuple[str, ...]] = {
    "logits": ("ffn_moe_logits", "ffn_moe_logits_biased"),
    "ids": ("ffn_moe_topk",),
    "gates": ("ffn_moe_weights", "ffn_moe_weights_softmax", "ffn_moe_weights_norm", "ffn_moe_weights_scaled"),
    "outputs": ("ffn_moe_down", "ffn_moe_down_scaled", "ffn_moe_down_biased"),
    "hidden": (
        "ffn_moe_swiglu",
        "ffn_moe_silu",
        "ffn_moe_geglu",
        "ffn_moe_gelu",
        "ffn_moe_swiglu_oai",
        "ffn_moe_reglu",
        "ffn_moe_relu",
        "ffn_moe_relu_sqr",
        "ffn_moe_situ",
        "ffn_moe_swiglu_limited",
    ),
    "probs_biased": ("ffn_moe_probs_biased",),
    "sum": ("ffn_moe_out",),
}


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
                        "llama.cpp does not compute this tensor for this architecture"
                        if not found
                        else "llama.cpp computes this tensor twice in a layer for this architecture",
                        path=session.path,
                        object=f"{_STEPS[kind][0]}-{layer}",
                        found=self._architecture,
                        hint="its experts cannot be calibrated; rank by router-norm, aimer or an importance matrix",
                    )
                self.names[found[-1]] = (kind, layer)


def moe_layout(model: Model) -> tuple[Layout, list[int]]:
    """The layout of a model, and its MoE layers that llama.cpp runs: all but the MTP layers. BadPlan without
    experts."""
    found = layout(model.architecture, model.tensors, model.metadata.get)
    layers = [layer for layer in found.layers if layer not in found.mtp]
    if not layers:
        raise BadPlan("the model has no experts", path=model.path, object=model.architecture or None)
    return found, layers
