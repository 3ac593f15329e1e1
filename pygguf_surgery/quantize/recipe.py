"""Apply a Quantize edit: the file type's choice, then the overrides, then the fallbacks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from .._core import Value
from .._core import types as _core_types
from ..errors import BadPlan, SurgeryError, Unsupported
from ..plan_data import OutputTensor, Quantize
from . import mixes

QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION
_FLOATS = ("F32", "F16", "BF16")


@dataclass
class Outcome:
    tensors: list[OutputTensor]
    metadata: dict[str, Value]
    blockers: list[SurgeryError]
    warnings: list[str]


def parse_overrides(overrides: Iterable[Sequence[str]]) -> tuple[tuple[str, str], ...]:
    """(pattern, type or "copy") pairs with the type's name as ggml writes it. BadPlan for an invalid regular
    expression, Unsupported for an unknown type."""
    facts = {t["name"]: t for t in _core_types()}
    parsed = []
    for override in overrides:
        try:
            pattern, type = override
        except (TypeError, ValueError):
            raise BadPlan("an override is a pair: pattern, type", object=repr(override)) from None
        if not isinstance(pattern, str):
            raise BadPlan("a pattern is a string", object=repr(pattern))
        try:
            re.compile(pattern)
        except re.error as error:
            raise BadPlan(f"not a regular expression: {error}", object=pattern) from None
        name = getattr(type, "name", type)  # also gguf.GGMLQuantizationType
        if not isinstance(name, str):
            raise BadPlan("a type is a name", object=pattern, found=repr(type))
        if name.lower() == "copy":
            parsed.append((pattern, "copy"))
        elif name.upper() not in facts:
            raise Unsupported("unknown type", object=name, hint=mixes.nearest(name.upper(), list(facts)))
        elif not facts[name.upper()]["encodes"]:
            raise Unsupported("ggml does not quantize to this type", object=name)
        else:
            parsed.append((pattern, name.upper()))
    return tuple(parsed)


def apply(architecture: str, tensors: list[OutputTensor], metadata: dict[str, Value], edit: Quantize) -> Outcome:
    """Pure. What cannot be done is in the outcome's blockers, never raised."""
    facts = {t["name"]: t for t in _core_types()}
    blocks = {name: t["block"] for name, t in facts.items()}
    out = Outcome([], dict(metadata), [], [])
    try:
        file_type = mixes.file_type(edit.type, edit.pure)
        overrides = _Overrides(parse_overrides(edit.overrides))
    except SurgeryError as error:  # a plan from JSON; Plan.quantize has refused it at once
        return Outcome(tensors, dict(metadata), [error], [])

    tied = not any(t.name in mixes.OUTPUT for t in tensors)
    requantized: list[OutputTensor] = []
    unweighted: dict[str, list[str]] = {}
    fallbacks: Counter[tuple[str, str]] = Counter()
    for tensor in tensors:
        allowed = mixes.allows(architecture, tensor.name, tensor.shape)
        wanted = overrides.type_for(tensor, allowed, out.blockers)
        if wanted is None:
            wanted = tensor.source_type
            if allowed and file_type.type is not None:
                wanted = mixes.choose(file_type, architecture, tensor.name, tensor.shape, tied)
        elif wanted == "copy":
            wanted = tensor.source_type
        row = tensor.shape[-1] if tensor.shape else 1
        # A tensor that keeps its type keeps its bytes, whatever its rows.
        type = wanted if wanted == tensor.source_type else mixes.fallback(wanted, row, blocks)
        notes = list(tensor.notes)
        if type is None:
            out.blockers.append(BadPlan(
                f"a row is no multiple of the block of {wanted}, which has no fallback", object=tensor.name,
                found=f"{row} elements", expected=f"a multiple of {blocks[wanted]}",
                hint=f'an override such as ("{re.escape(tensor.name)}", "Q8_0")'))
            type = tensor.source_type
        elif type != wanted:
            fallbacks[wanted, type] += 1
            notes.append(f"{wanted} needs rows of a multiple of {blocks[wanted]}, this has {row}: {type}")
        if type != tensor.source_type:
            if facts[tensor.source_type]["quantized"]:
                requantized.append(tensor)
            if facts[type]["needs_importance"] or mixes.wants_importance(file_type, tensor.name, type):
                unweighted.setdefault(type, []).append(tensor.name)
        out.tensors.append(replace(tensor, type=type, notes=notes))

    if requantized and not edit.allow_requantize:
        out.blockers.append(BadPlan(
            f"already quantized{_with_others(requantized)}", object=requantized[0].name,
            found=requantized[0].source_type,
            hint="allow_requantize=True (--allow-requantize) decodes and encodes it again, at a loss; or override it "
                 'with "copy"'))
    for type, names in unweighted.items():
        out.blockers.append(Unsupported(
            f"{type} needs an importance matrix{_with_others(names)}", object=names[0],
            hint="this version reads none: choose another type"))
    overrides.report(out)
    for (wanted, type), count in sorted(fallbacks.items()):
        out.warnings.append(f"{_tensors(count)} with rows that {wanted} cannot hold became {type}")
    if any(t.type != t.source_type for t in out.tensors):
        if file_type.number is not None:
            out.metadata["general.file_type"] = Value(file_type.number, "u32")
        out.metadata["general.quantization_version"] = Value(QUANTIZATION_VERSION, "u32")
    return out


class _Overrides:
    """The overrides of one edit and what became of them."""

    def __init__(self, pairs: Sequence[tuple[str, str]]):
        self.pairs = [(pattern, re.compile(pattern), type) for pattern, type in pairs]
        self.matched = [0] * len(pairs)  # tensors whose name the pattern finds
        self.first = [0] * len(pairs)    # of these, the ones that no earlier pattern took
        self.left = [0] * len(pairs)     # of these, the ones that llama-quantize would not quantize

    def type_for(self, tensor: OutputTensor, allowed: bool, blockers: list[SurgeryError]) -> str | None:
        """The type that the first matching override gives, "copy", or None."""
        hits = [i for i, (_, regex, _) in enumerate(self.pairs) if regex.search(tensor.name)]
        for i in hits:
            self.matched[i] += 1
        if not hits:
            return None
        i = hits[0]
        self.first[i] += 1
        pattern, _, type = self.pairs[i]
        if type == "copy" or allowed or type == tensor.source_type:
            return type
        if not _is_full_name(pattern, tensor.name):
            self.left[i] += 1
            return "copy"
        if type not in _FLOATS:
            blockers.append(BadPlan("this tensor can only become F32, F16 or BF16", object=tensor.name, found=type,
                                    hint="llama.cpp keeps norms, routers, convolutions and vectors unquantized"))
            return "copy"
        return type

    def report(self, out: Outcome) -> None:
        for (pattern, _, type), matched, first, left in zip(self.pairs, self.matched, self.first, self.left):
            if matched == 0:
                out.blockers.append(BadPlan("an override that matches no tensor", object=pattern,
                                            hint="patterns are Python's re.search and case-sensitive"))
                continue
            text = f"override {pattern}={type}: {_tensors(first)}"
            if first < matched:
                text += f", {matched - first} more belong to an earlier override"
            if left:
                text += f", {left} of them left as they are (norm, router, convolution or vector: give the full name)"
            out.warnings.append(text)


def _is_full_name(pattern: str, name: str) -> bool:
    return pattern.removeprefix("^").removesuffix("$") in (name, re.escape(name))


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"


def _with_others(items: Sequence[object]) -> str:
    return f" (as {_tensors(len(items) - 1)} more)" if len(items) > 1 else ""
