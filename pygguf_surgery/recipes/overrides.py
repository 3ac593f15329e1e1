"""Types that the user decides: pairs of a pattern and a type."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..base.errors import BadPlan, Unsupported
from ..base.words import counted
from ..plan_data.expressions import OutputTensor
from ..quant.types import TYPES, tensor_type
from . import mixes

if TYPE_CHECKING:
    from ..plan_data.outcome import Faults


# --- the choice as overrides -----------------------------------------------------------------------------------------

_LAYER = re.compile(r"blk\.([0-9]+)\.(.+)", re.DOTALL)
_SPECIAL = re.compile(r"[\\^$.*+?()\[\]{}|]")


def patterns(types: dict[str, str], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Overrides that give each tensor of `types` its type and touch no other of `names`. No two match the same tensor;
    layers with the same type share one. They mean the same to Python's re.search and to C++'s std::regex."""
    groups: dict[str, dict[str, list[str]]] = {}  # what follows the layer -> type -> layers
    for name, type in types.items():
        type = type if tensor_type(type).encodes else "copy"
        match = _LAYER.fullmatch(name)
        if match is None:
            yield f"^{escape(name)}$", type
        else:
            groups.setdefault(match[2], {}).setdefault(type, []).append(match[1])
    others = {match[2] for name in names if name not in types and (match := _LAYER.fullmatch(name))}
    for rest, by_type in groups.items():
        for type, layers in by_type.items():
            if len(layers) == 1:
                number = layers[0]
            elif len(by_type) == 1 and rest not in others:
                number = "[0-9]+"
            else:
                number = f"({'|'.join(sorted(layers, key=int))})"
            yield rf"^blk\.{number}\.{escape(rest)}$", type


def escape(name: str) -> str:
    return _SPECIAL.sub(r"\\\g<0>", name)


_FLOATS = ("F32", "F16", "BF16")
_LISTED = 8  # overrides that work as they should are named one by one up to this number


def parse_overrides(overrides: Iterable[Sequence[str]]) -> tuple[tuple[str, str], ...]:
    """(pattern, type or "copy") pairs with the type's name as ggml writes it. BadPlan for an invalid regular
    expression, Unsupported for an unknown type."""
    parsed = []
    for override in overrides:
        try:
            pattern, type = override
        except (TypeError, ValueError):
            raise BadPlan("an override is a pair: pattern, type", object=repr(override)) from None
        if not isinstance(pattern, str):
            raise BadPlan("a pattern is a string", object=repr(pattern))
        try:
            compile_pattern(pattern)
        except re.error as error:
            raise BadPlan(f"not a regular expression: {error}", object=pattern) from None
        name = getattr(type, "name", type)  # also gguf.GGMLQuantizationType
        if not isinstance(name, str):
            raise BadPlan("a type is a name", object=pattern, found=repr(type))
        if name.lower() == "copy":
            parsed.append((pattern, "copy"))
        elif name.upper() not in TYPES:
            raise Unsupported(
                "unknown type",
                object=name,
                hint=mixes.nearest(name.upper(), [known for known, t in TYPES.items() if t.encodes]),
            )
        elif not tensor_type(name.upper()).encodes:
            raise Unsupported("ggml does not quantize to this type", object=name)
        else:
            parsed.append((pattern, name.upper()))
    return tuple(parsed)


def parse_type(type: Any, what: str) -> str | None:
    """The ggml type of an option such as output_type, as ggml writes it; None for None."""
    if type is None:
        return None
    ((_, name),) = parse_overrides([(what, type)])
    if name == "copy":
        raise BadPlan("a ggml type is needed", object=what, found=name)
    return name


@dataclass
class _Use:
    """What became of one override. matched: tensors whose name the pattern finds; first: of these, the ones that no
    earlier pattern took; left: of these, the ones that llama-quantize would not quantize."""

    pattern: str
    regex: re.Pattern[str]
    type: str
    matched: int = 0
    first: int = 0
    left: int = 0

    def finds(self, name: str) -> bool:
        return self.regex.search(name) is not None


class Overrides:
    """The overrides of one edit and what became of them."""

    def __init__(self, pairs: Sequence[tuple[str, str]]):
        self.uses = [_Use(pattern, compile_pattern(pattern), type) for pattern, type in pairs]

    def names(self, name: str) -> bool:
        return any(use.finds(name) for use in self.uses)

    def skip(self, name: str) -> None:
        """This tensor is decided by an option that comes before all overrides."""
        for use in self.uses:
            use.matched += use.finds(name)

    def type_for(self, tensor: OutputTensor, allowed: bool, faults: Faults) -> str | None:
        """The type that the first matching override gives, "copy", or None."""
        hits = [use for use in self.uses if use.finds(tensor.name)]
        for use in hits:
            use.matched += 1
        if not hits:
            return None
        use = hits[0]
        use.first += 1
        if use.type == "copy" or allowed or use.type == tensor.source_type:
            return use.type
        if not _is_full_name(use.pattern, tensor.name):
            use.left += 1
            return "copy"
        if use.type not in _FLOATS:
            faults.block(
                BadPlan(
                    "this tensor can only become F32, F16 or BF16",
                    object=tensor.name,
                    found=use.type,
                    hint="llama.cpp keeps norms, routers, convolutions and vectors unquantized",
                )
            )
            return "copy"
        return use.type

    def report(self, faults: Faults, dropped: Callable[[], Collection[str]]) -> None:
        """Says of each override what it did. dropped: the source's tensors that the plan drops."""
        plain = []
        for use in self.uses:
            name = f"override {use.pattern}={use.type}"
            if use.matched == 0 and (gone := sum(use.finds(tensor) for tensor in dropped())):
                faults.warn(f"{name}: no tensor, the plan drops the {gone} that it matches")
                continue
            if use.matched == 0:
                faults.block(
                    BadPlan(
                        "an override that matches no tensor",
                        object=use.pattern,
                        hint="patterns are Python's re.search and case-sensitive",
                    )
                )
                continue
            text = f"{name}: {counted(use.first, 'tensor')}"
            if use.first == use.matched and not use.left:
                plain.append((text, use.first))
                continue
            if use.first < use.matched:
                text += f", {use.matched - use.first} more belong to an earlier override or option"
            if use.left:
                text += (
                    f", {use.left} of them left as they are (norm, router, convolution or vector: give the full name)"
                )
            faults.warn(text)
        if len(plain) <= _LISTED:
            faults.notes += [text for text, _ in plain]
        else:
            faults.note(f"{len(plain)} overrides: {counted(sum(n for _, n in plain), 'tensor')}")


def _is_full_name(pattern: str, name: str) -> bool:
    return pattern.removeprefix("^").removesuffix("$") in (name, re.escape(name))


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """re.compile, with re.error for all that it refuses."""
    try:
        return re.compile(pattern)
    except (OverflowError, RecursionError) as error:  # x{99999999999}, ((((...
        raise re.error(str(error)) from None
