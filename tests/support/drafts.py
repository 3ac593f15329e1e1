"""One edit by itself, without a plan."""

from __future__ import annotations

from pygguf_surgery.edits.context import Context
from pygguf_surgery.files.companions import Companions
from pygguf_surgery.plan_data.outcome import Draft


def apply_edit(room, model, tensors, metadata, edit):
    """The draft that an edit makes of these tensors and metadata. room: its module, of pygguf_surgery.edits."""
    return room.apply(Draft(list(tensors), dict(metadata)), edit, Context(model, Companions()))
