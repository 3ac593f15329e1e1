"""What an edit may look at beside the draft that it changes."""

from __future__ import annotations

from dataclasses import dataclass

from ..files.companions import Companions
from ..files.model import Model


@dataclass(frozen=True)
class Context:
    """model: the source, of which edits read headers only. companions: the files that edits name. keep_split: the
    output is split as the source is, in whose order llama-quantize then visits the tensors."""

    model: Model
    companions: Companions
    keep_split: bool = False
