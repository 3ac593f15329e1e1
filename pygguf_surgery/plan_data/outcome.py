"""What an edit comes to."""

from __future__ import annotations

from dataclasses import dataclass, field

from .._core import Value
from ..base.errors import SurgeryError
from .expressions import OutputTensor


@dataclass
class Outcome:
    """What an edit comes to. With blockers the tensors are still the best description that can be given."""

    tensors: list[OutputTensor]
    metadata: dict[str, Value]
    blockers: list[SurgeryError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # what is as it should be, counted
