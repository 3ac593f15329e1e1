"""What a plan comes to once it is checked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .._core import Job, Value
from ..base.limits import Limits
from ..base.printed import abbreviate, error_for_json, value_for_json
from ..base.units import human
from ..files.companions import Companion
from ..plan_data.codec import expression_to_json, plan_to_json
from ..plan_data.edits import PlanData
from ..plan_data.expressions import OutputTensor
from ..plan_data.outcome import Faults


@dataclass(repr=False)  # it would show the whole header
class OutputFile:
    """One file of the output. tensors: indices of CheckedPlan.tensors. header: up to the data, padding included; empty
    if none can be made."""

    tensors: list[int]
    metadata: dict[str, Value]
    header: bytes
    file_bytes: int


@dataclass(repr=False, kw_only=True)
class CheckedPlan(Faults):
    """What a plan comes to. With blockers it can be described and not written; its numbers are then best guesses."""

    data: PlanData
    limits: Limits  # those of the run
    tensors: list[OutputTensor]
    nbytes: list[int]  # of each tensor, without padding
    offsets: list[int] = field(default_factory=list)  # of each in its file; empty if no header can be made
    metadata: dict[str, Value]
    alignment: int
    files: list[OutputFile] = field(default_factory=list)  # one, or the shards
    split: bool = False  # shards, whatever their number: their names say so
    file_bytes: int = 0  # of all files
    peak_memory_bytes: int = 0  # over the interpreter's own: buffers, header, lists
    source_bytes: int  # of the input's tensors
    architecture: str
    experts: tuple[int | None, int | None]  # before, after
    jobs: list[Job] = field(default_factory=list)  # for the engine; none with blockers
    companions: tuple[Companion, ...] = ()  # what the jobs read beside the model, in the order of their numbers

    def __repr__(self) -> str:
        return (
            f"<CheckedPlan of {len(self.tensors)} tensors, {human(self.file_bytes)}, {len(self.blockers)} blockers, "
            f"{len(self.warnings)} warnings>"
        )

    @property
    def elements(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    def actions(self) -> dict[str, int]:
        """How many tensors are copied, taken, encoded, ..."""
        return dict(Counter(tensor.action for tensor in self.tensors))

    def summary(self) -> str:
        """The plan in words: sizes by role, types, bits per weight, experts, peak memory, warnings, blockers."""
        lines = [
            f"{self.data.source}",
            f"{self.architecture or 'no architecture'}: {len(self.tensors)} tensors, "
            f"{human(self.source_bytes)} -> {human(sum(self.nbytes))} ({human(self.file_bytes)} file)",
        ]
        if self.experts[0] is not None:
            lines.append(
                f"experts: {self.experts[0]} -> {self.experts[1]}"
                if self.experts[0] != self.experts[1]
                else f"experts: {self.experts[0]}"
            )
        if self.elements:
            lines.append(
                f"{self.elements / 1e9:.3f} billion weights, {8 * sum(self.nbytes) / self.elements:.3f} bits per weight"
            )
        if self.split:
            lines.append(f"shards: {len(self.files)}, the largest {human(max(f.file_bytes for f in self.files))}")
        lines.append("tensors: " + ", ".join(f"{count} {name}" for name, count in sorted(self.actions().items())))
        lines.append(f"peak memory: {human(self.peak_memory_bytes)}")
        lines += ["", f"{'role':<14} {'tensors':>7} {'size':>11} {'share':>6}  types"]
        total = sum(self.nbytes) or 1
        by_role: dict[str, list[int]] = {}
        for i, tensor in enumerate(self.tensors):
            by_role.setdefault(tensor.role, []).append(i)
        for role, indices in sorted(by_role.items(), key=lambda item: -sum(self.nbytes[i] for i in item[1])):
            size = sum(self.nbytes[i] for i in indices)
            types = Counter(self.tensors[i].type for i in indices)
            lines.append(
                f"{role:<14} {len(indices):>7} {human(size):>11} {100 * size / total:>5.1f}%  "
                + ", ".join(f"{type} x{count}" for type, count in types.most_common())
            )
        if self.notes:
            lines += ["", "notes:"] + [f"  {text}" for text in self.notes]
        if self.warnings:
            lines += ["", "warnings:"] + [f"  {text}" for text in self.warnings]
        if self.blockers:
            lines += ["", "cannot be written:"] + [f"  {error}" for error in self.blockers]
        return "\n".join(lines)

    def to_json(self, full: bool = False) -> dict[str, Any]:
        """JSON-ready. Without `full`, arrays over 32 elements in metadata, expressions and plan are
        {"type", "length", "head"}."""
        shorten: Callable[[Any], Any] = (lambda x: x) if full else abbreviate
        return {
            "tensors": [
                {
                    "name": t.name,
                    "role": t.role,
                    "type": t.type,
                    "shape": list(t.shape),
                    "nbytes": n,
                    "action": t.action,
                    "source_type": t.source_type,
                    "expression": shorten(expression_to_json(t.expression)),
                    **({"importance": t.importance.ref} if t.importance else {}),
                    **({"notes": t.notes} if t.notes else {}),
                }
                for t, n in zip(self.tensors, self.nbytes, strict=True)
            ],
            "metadata": {key: value_for_json(value, full) for key, value in self.metadata.items()},
            "file_bytes": self.file_bytes,
            **(
                {"shards": [{"tensors": len(f.tensors), "file_bytes": f.file_bytes} for f in self.files]}
                if self.split
                else {}
            ),
            "peak_memory_bytes": self.peak_memory_bytes,
            "blockers": [error_for_json(error) for error in self.blockers],
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "plan": shorten(plan_to_json(self.data) if full else _without_groups(plan_to_json(self.data))),
        }


def _without_groups(plan: dict[str, Any]) -> dict[str, Any]:
    """Groups of experts only counted: the orders of their neurons are megabytes."""
    for edit in plan["edits"]:
        if edit["edit"] == "merge_experts":
            edit["groups"] = {
                layer: {"type": "group", "length": len(groups), "head": []} for layer, groups in edit["groups"].items()
            }
    return plan
