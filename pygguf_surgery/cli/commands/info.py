"""`gguf-surgery info`: what is in a model. Only headers are read, and of long arrays only the first elements."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

from ...base.printed import abbreviate, value_for_json
from ...base.units import human
from ...base.words import magnitude, short, table
from ...files.model import Model
from ...files.open import open_model
from .. import words
from ..command import Command
from ..common import warn
from ..options import FULL, IN, JSON


def run(args: Namespace) -> int:
    with open_model(args.input) as model:
        if args.json:
            words.print_json(to_json(model, args.full))
        else:
            words.show(describe(model))
            warn(model.warnings)
    return 0


COMMAND = Command("info", "what is in a model", run, (IN,), {"": JSON | FULL})


def to_json(model: Model, full: bool = False) -> dict[str, Any]:
    return {
        "path": model.path,
        "architecture": model.architecture,
        "name": model.name,
        "parameters": parameters(model),
        "experts": experts(model) if full else abbreviate(experts(model)),
        "layers": model.get("block_count"),
        "tensors": len(model.tensors),
        "file_bytes": model.file_bytes,
        "bits_per_weight": bits_per_weight(model),
        "types": types(model),
        "shards": len(model.paths),
        "alignment": model.alignment,
        "metadata": {key: value_for_json(model.metadata.value(key), full) for key in model.metadata},
        "warnings": model.warnings,
    }


def describe(model: Model) -> str:
    size = human(model.file_bytes) + (f" in {len(model.paths)} shards" if len(model.paths) > 1 else "")
    moe, total, bits = experts(model), parameters(model), bits_per_weight(model)
    rows = [
        ("file", f"{os.path.basename(model.path)}, {size}"),
        ("architecture", model.architecture or "(none)"),
        ("name", model.name or "(none)"),
        ("parameters", f"{magnitude(total)} ({total:,})"),
        ("experts", f"{_used(moe)} of {moe['count']} used, in {len(moe['layers'])} layers" if moe else "none"),
        ("layers", str(model.get("block_count", "(unknown)"))),
        ("context", str(model.get("context_length", "(unknown)"))),
        ("tensors", str(len(model.tensors)) + (f", {bits:.2f} bits per weight" if bits is not None else "")),
    ]
    histogram = [("type", "tensors", "bytes", "share")] + [
        (name, str(t["tensors"]), human(t["nbytes"]), f"{100 * t['nbytes'] / max(1, model.file_bytes):.1f} %")
        for name, t in types(model).items()
    ]
    metadata = [(key, short(model.metadata.value(key))) for key in model.metadata]
    return "\n\n".join(table(part, left) for part, left in ((rows, 2), (histogram, 1), (metadata, 2)) if part)


def parameters(model: Model) -> int:
    return sum(tensor.elements for tensor in model.tensors.values())


def bits_per_weight(model: Model) -> float | None:
    total = parameters(model)
    return 8 * sum(tensor.nbytes for tensor in model.tensors.values()) / total if total else None


def experts(model: Model) -> dict[str, Any] | None:
    """{"count", "used" (a number, or one per layer), "layers": layers with experts}; None without experts."""
    from ...architecture.experts import moe_layers  # with its dataclasses: other commands start faster without

    layers = moe_layers(model.tensors)
    if not layers and not model.get("expert_count"):
        return None
    return {"count": model.get("expert_count"), "used": model.get("expert_used_count"), "layers": list(layers)}


def _used(moe: dict[str, Any]) -> str:
    used = moe["used"]
    return f"{min(used)} to {max(used)}" if isinstance(used, list) and used else str(used)


def types(model: Model) -> dict[str, dict[str, int]]:
    """type -> {"tensors", "nbytes"}, most bytes first."""
    result: dict[str, dict[str, int]] = {}
    for tensor in model.tensors.values():
        entry = result.setdefault(tensor.type, {"tensors": 0, "nbytes": 0})
        entry["tensors"] += 1
        entry["nbytes"] += tensor.nbytes
    return dict(sorted(result.items(), key=lambda item: -item[1]["nbytes"]))
