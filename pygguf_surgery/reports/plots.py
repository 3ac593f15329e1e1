"""Pictures, for people. matplotlib is the extra [report]."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from ..base.errors import BadPlan, Unsupported

if TYPE_CHECKING:
    from ..plan_data.choices import Keep


def check_picture(path: str) -> None:
    """Before anything is read: BadPlan for a name that is not that of a PNG, Unsupported without matplotlib."""
    if not path.lower().endswith(".png"):
        raise BadPlan("a picture is a PNG", path=path, expected="a name that ends in .png")
    _matplotlib()


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unsupported(
            "pictures need matplotlib", found=error, hint="pip install 'pygguf-surgery[report]'"
        ) from None
    return FigureCanvasAgg, Figure


def importance(keep: Keep) -> bytes:
    """A PNG of a choice of experts: a heat map, layers by experts, of each expert's place among its layer's scores, the
    dropped ones dimmed (1 is the highest score); beside it the share of the layer's saliency that stays. Unsupported
    without matplotlib, BadPlan for a choice that has no scores."""
    FigureCanvasAgg, Figure = _matplotlib()
    import numpy as np

    layers = [layer for layer in keep if layer in keep.scores]
    if not layers:
        raise BadPlan("a choice without scores cannot be drawn", object="plot", hint="choose the experts by a metric")
    scores = np.stack([keep.scores[layer] for layer in layers])
    place = scores.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable") / max(1, scores.shape[1] - 1)
    kept = np.zeros(scores.shape, bool)
    for row, layer in enumerate(layers):
        kept[row, list(keep[layer])] = True
    height = min(max(3.2, 0.22 * len(layers) + 1.2), 30)
    figure = Figure(figsize=(min(max(7, scores.shape[1] / 28 + 4), 24), height), layout="constrained")
    FigureCanvasAgg(figure)
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=(5, 1))
    image = heat.imshow(place, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=1)
    heat.imshow(
        np.ma.masked_where(kept, np.ones(kept.shape)),
        aspect="auto",
        interpolation="nearest",
        cmap="gray",
        vmin=0,
        vmax=1,
        alpha=0.75,
    )
    heat.set(
        title=f"experts by {keep.metric}, dropped ones dimmed",
        xlabel="expert",
        ylabel="layer",
        yticks=_ticks(layers),
        yticklabels=[str(layers[i]) for i in _ticks(layers)],
    )
    figure.colorbar(image, ax=heat, label="place in its layer")
    masses = [keep.mass(layer) for layer in layers]
    bars.barh(range(len(layers)), [100 * (m or 0) for m in masses], color="tab:blue")
    bars.set(title="% kept" if any(m is not None for m in masses) else "no shares", xlim=(0, 100))
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def _ticks(layers: list[int]) -> range:
    step = -(-len(layers) // 32)
    return range(0, len(layers), step)
