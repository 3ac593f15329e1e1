"""Dropping layers: a pure function from output tensors and metadata to output tensors and metadata.

llama.cpp tells some layers from others by their position alone. What it would treat otherwise afterwards is refused:
the tables of architecture/layers.py say what its code makes of a layer's number.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import TYPE_CHECKING

from ..architecture.keys import getter, mtp_fault, mtp_layers, read_count, whole_numbers
from ..architecture.layers import KNOWN, RECURRENT, obstacles
from ..architecture.loader import check_layer_count
from ..architecture.names import layer_of
from ..base.errors import BadFile, BadPlan, SurgeryError
from ..files.lineage import drop_size_label, record_layers
from ..plan_data.edits import PruneLayers
from ..plan_data.outcome import Draft
from . import layers

if TYPE_CHECKING:
    from .context import Context


# --- the edit --------------------------------------------------------------------------------------------------------


def apply(draft: Draft, edit: PruneLayers, context: Context) -> Draft:
    """Drops the layers that `edit` names and numbers the rest from 0. Reads no tensor data, changes nothing in place.

    All that is per layer follows: names, arrays with one element per layer, counts of leading dense and of MTP layers,
    lists of kept experts, general.tensor_extra. The result lists the source's numbers of the layers that are left. What
    llama.cpp would not load or would compute otherwise becomes a blocker; nothing is raised.
    """
    out, tensors, metadata = draft.copy(), draft.tensors, draft.metadata
    model = context.model
    architecture = model.architecture
    try:
        count = read_count(getter(metadata), f"{architecture}.block_count")
        nextn = mtp_layers(architecture, getter(metadata))
        if fault := check_layer_count(architecture, count) or mtp_fault(architecture, count, nextn):
            raise fault
        dropped = _check_named(edit, count, nextn, [t.name for t in tensors])
        if not dropped:
            return out
        trunk = [layer for layer in range(count - nextn) if layer not in dropped]
        if len(trunk) < count - nextn:
            names = {t.name for t in tensors}
            out.blockers += obstacles(architecture, names, metadata, count - nextn, trunk)
            if architecture not in KNOWN:
                out.warn(
                    f"architecture {architecture!r} is not known: whether llama.cpp tells its layers "
                    "from each other by their position is not checked"
                )
        if out.blockers:
            return out
        layers.drop(architecture, out, dropped)
        _drop_interval(architecture, out, len(trunk))
        drop_size_label(out.metadata, out.warnings)
        record_layers(model, out.metadata, [layer for layer in range(count) if layer not in dropped])
    except SurgeryError as error:
        out.block(error)
    return out


def _check_named(edit: PruneLayers, count: int, nextn: int, names: list[str]) -> frozenset[int]:
    """The layers to drop, each of which is there."""
    try:
        named = [operator.index(layer) for layer in edit.layers]
    except TypeError:
        raise BadPlan("a layer is a whole number", object="prune_layers", found=repr(edit.layers)[:80]) from None
    if outside := [layer for layer in named if not 0 <= layer < count]:
        raise BadPlan(f"layer {outside[0]} out of range", object="prune_layers", expected=f"0..{count - 1}")
    if twice := [layer for layer, n in Counter(named).items() if n > 1]:
        raise BadPlan(f"layer {twice[0]} named twice", object="prune_layers")
    present = {layer_of(name) for name in names}
    # Some files count MTP layers and leave their tensors out.
    if missing := [layer for layer in named if layer not in present and layer < count - nextn]:
        raise BadPlan("a layer without tensors", object=f"blk.{missing[0]}")
    if beyond := [layer for layer in present if layer is not None and layer >= count]:
        raise BadFile(
            "tensors of a layer beyond the last one", object=f"blk.{min(beyond)}", expected=f"layers 0..{count - 1}"
        )
    if len(named) >= count - nextn and set(range(count - nextn)) <= set(named):
        raise BadPlan("no layer is left", object="prune_layers", found=f"all {count - nextn} dropped")
    return frozenset(named)


def _drop_interval(architecture: str, out: Draft, n: int) -> None:
    """Removes the interval of the full-attention layers where a list of layers overrules it and says otherwise now."""
    key = f"{architecture}.{RECURRENT.key}"
    listed = whole_numbers(out.metadata, f"{architecture}.{RECURRENT.listed_by}")
    if listed is None or key not in out.metadata:
        return
    interval = read_count(getter(out.metadata), key)
    if not interval or any(bool(x) == ((i + 1) % interval == 0) for i, x in enumerate(listed[:n])):
        out.warn(f"{key} {interval} is no longer true and is dropped: {RECURRENT.listed_by} overrules it")
        del out.metadata[key]
