"""What edits come to, and what is wrong with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from .._core import Value
from ..base.errors import SurgeryError
from .expressions import OutputTensor


@dataclass(kw_only=True)
class Faults:
    """What was found on the way. blockers: why nothing can be written; warnings: what the user should look at; notes:
    what is as it should be, counted."""

    blockers: list[SurgeryError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def block(self, error: SurgeryError) -> None:
        self.blockers.append(error)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def add(self, other: Faults) -> None:
        """Those of a part, after the ones so far."""
        self.blockers += other.blockers
        self.warnings += other.warnings
        self.notes += other.notes


@dataclass
class Draft(Faults):
    """The output as far as it is decided: what every edit takes and gives back, with the faults that this edit found.
    With blockers the tensors are still the best description that can be given. An edit changes no draft in place."""

    tensors: list[OutputTensor]
    metadata: dict[str, Value]

    def copy(self) -> Draft:
        """The same output, to be changed; without the faults so far."""
        return Draft(list(self.tensors), dict(self.metadata))
