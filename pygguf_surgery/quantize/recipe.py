"""Apply a Quantize edit: options and overrides, the file type's choice for the rest, fallbacks, importance."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .._core import Value
from .._core import types as _core_types
from ..errors import BadPlan, SurgeryError, Unsupported
from ..experts import roles
from ..plan_data import OutputTensor, Quantize, Stack, UseImatrix
from . import importance, mixes, parse_quality
from .recipe_file import compile_pattern

if TYPE_CHECKING:
    from ..imatrix import Imatrix
    from ..model import Model
    from .recipe_file import Recipe

QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION
_FLOATS = ("F32", "F16", "BF16")
_LISTED = 8  # overrides that work as they should are named one by one up to this number


@dataclass
class Outcome:
    tensors: list[OutputTensor]
    metadata: dict[str, Value]
    blockers: list[SurgeryError]
    warnings: list[str]
    notes: list[str] = field(default_factory=list)  # what is as it should be, counted


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
            compile_pattern(pattern)
        except re.error as error:
            raise BadPlan(f"not a regular expression: {error}", object=pattern) from None
        name = getattr(type, "name", type)  # also gguf.GGMLQuantizationType
        if not isinstance(name, str):
            raise BadPlan("a type is a name", object=pattern, found=repr(type))
        if name.lower() == "copy":
            parsed.append((pattern, "copy"))
        elif name.upper() not in facts:
            raise Unsupported("unknown type", object=name, hint=mixes.nearest(
                name.upper(), [known for known, t in facts.items() if t["encodes"]]))
        elif not facts[name.upper()]["encodes"]:
            raise Unsupported("ggml does not quantize to this type", object=name)
        else:
            parsed.append((pattern, name.upper()))
    return tuple(parsed)


def parse_type(type: Any, what: str) -> str | None:
    """The ggml type of an option such as output_type, as ggml writes it; None for None."""
    if type is None:
        return None
    (_, name), = parse_overrides([(what, type)])
    if name == "copy":
        raise BadPlan("a ggml type is needed", object=what, found=name)
    return name


def use_imatrix(imatrix: Any, missing: str, include: Iterable[str], exclude: Iterable[str]) -> UseImatrix | None:
    """What an edit keeps of an importance matrix, given as a path or open; it must be readable now."""
    include, exclude = _parts(include, "include_weights"), _parts(exclude, "exclude_weights")
    if imatrix is None:
        if include or exclude or missing != "default":
            raise BadPlan("an option of the importance matrix without one", object="imatrix")
        return None
    from .. import imatrix as reader

    if missing not in reader.POLICIES:
        raise BadPlan("unknown choice", object="imatrix_missing", found=repr(missing),
                      expected=", ".join(reader.POLICIES))
    if include and exclude:
        raise BadPlan("include_weights and exclude_weights exclude each other", object="imatrix")
    if isinstance(imatrix, reader.Imatrix):
        return UseImatrix(imatrix.path, imatrix.digest, missing, include, exclude)
    with reader.open(imatrix) as opened:
        return UseImatrix(opened.path, opened.digest, missing, include, exclude)


def _parts(names: Iterable[str], what: str) -> tuple[str, ...]:
    parts = (names,) if isinstance(names, str) else tuple(names)
    if not all(isinstance(part, str) and part for part in parts):
        raise BadPlan("not parts of names", object=what, found=repr(parts))
    return parts


def options_of(loaded: Recipe, names: Collection[str], type: str | None, overrides: Iterable[Sequence[str]],
               options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of Plan.quantize for a recipe; what the caller gives comes first. names: of the model's tensors,
    for the recipe's overrides that may match none."""
    own = [(o.pattern, o.type) for o in loaded.overrides
           if not o.optional or any(re.search(o.pattern, name) for name in names)]
    defaults = {name: value for name in ("pure", "output_type", "token_embedding_type", "leave_output",
                                         "allow_requantize", "quality") if (value := getattr(loaded, name))}
    base = type if type is not None else loaded.type
    if base is None:
        raise BadPlan("the recipe names no base type", object=loaded.name, hint="give one")
    return {**defaults, **options, "type": base, "overrides": [*overrides, *own]}


def apply(model: Model, tensors: list[OutputTensor], metadata: dict[str, Value], edit: Quantize, *,
          imatrix: Imatrix | None = None, file_order: bool = False) -> Outcome:
    """Pure, but for the counts and values of the importance matrix. What cannot be done is in the outcome's blockers,
    never raised. file_order: llama-quantize's --keep-split visits the tensors as they lie in the shards."""
    facts = {t["name"]: t for t in _core_types()}
    out = Outcome([], dict(metadata), [], [])
    try:
        file_type = mixes.file_type(edit.type, edit.pure)
        overrides = _Overrides(parse_overrides(edit.overrides))
        edit = replace(edit, **{what: parse_type(getattr(edit, what), what)
                                for what in ("output_type", "token_embedding_type")})
        parse_quality(edit.quality)
    except SurgeryError as error:  # a plan from JSON; Plan.quantize has refused it at once
        return Outcome(tensors, dict(metadata), [error], [])

    unreadable = edit.imatrix is not None and imatrix is None  # which is a blocker already
    entries = 0 if imatrix is None or edit.imatrix is None else importance.used_entries(imatrix, edit.imatrix)
    if imatrix is not None and not entries:
        out.warnings.append("no entry of the importance matrix is used: it is as if there were none")
        imatrix = None
    wanted = _wanted(model.architecture, tensors, metadata, edit, file_type, overrides, imatrix, file_order, out)
    requantized: list[OutputTensor] = []
    fallbacks: Counter[tuple[str, str]] = Counter()
    for tensor in tensors:
        type, notes = _fitting(tensor, wanted[tensor.name], facts, fallbacks, out.blockers)
        if type != tensor.source_type and facts[tensor.source_type]["quantized"]:
            requantized.append(tensor)
        best = edit.quality == "best" and type != tensor.source_type and facts[type]["has_best"]
        out.tensors.append(replace(tensor, type=type, notes=[*tensor.notes, *notes], best=best))
    if requantized and not edit.allow_requantize:
        out.blockers.append(BadPlan(
            f"already quantized{_with_others(requantized)}", object=requantized[0].name,
            found=requantized[0].source_type,
            hint="allow_requantize=True (--allow-requantize) decodes and encodes it again, at a loss; or override it "
                 'with "copy"'))
    if edit.quality == "best":
        count = sum(tensor.best for tensor in out.tensors)
        (out.notes if count else out.warnings).append(
            f"quality best: {_tensors(count)} with less error than llama-quantize's bytes" if count else
            "quality best: no tensor gets a type that it is for ("
            + ", ".join(name for name, t in facts.items() if t["has_best"]) + ")")
    if not unreadable:
        _weigh(model, edit, file_type, imatrix, facts, out)
    overrides.report(out, lambda: _dropped(model, tensors))
    for (wished, type), count in sorted(fallbacks.items()):
        out.warnings.append(f"{_tensors(count)} with rows that {wished} cannot hold became {type}")
    if any(t.type != t.source_type for t in out.tensors):
        if file_type.number is not None:
            out.metadata["general.file_type"] = Value(file_type.number, "u32")
        out.metadata["general.quantization_version"] = Value(QUANTIZATION_VERSION, "u32")
        if imatrix is not None:
            out.metadata.update(_imatrix_metadata(imatrix, entries))
    return out


def _dropped(model: Model, tensors: list[OutputTensor]) -> set[str]:
    """The model's tensors that no output tensor is made of."""
    refs: set[str] = set()
    for tensor in tensors:
        refs.update(tensor.expression.refs if isinstance(tensor.expression, Stack) else [tensor.expression.ref])
    return set(model.tensors) - refs


def _wanted(architecture: str, tensors: list[OutputTensor], metadata: dict[str, Value], edit: Quantize,
            file_type: mixes.FileType, overrides: _Overrides, imatrix: Imatrix | None, file_order: bool,
            out: Outcome) -> dict[str, str]:
    """The type that each tensor is to have, whether its rows can or not."""
    decided: dict[str, str] = {}
    for tensor in tensors:
        allowed = mixes.allows(architecture, tensor.name, tensor.shape, edit.leave_output)
        option = None
        if allowed and tensor.name in mixes.OUTPUT:
            option = edit.output_type
        elif allowed and tensor.name in mixes.TOKEN_EMBEDDING:
            option = edit.token_embedding_type
            if tensor.name != mixes.TOKEN_EMBEDDING[0] and overrides.names(tensor.name):
                option = None  # per_layer_token_embd follows only where no override names it
        type = option or overrides.type_for(tensor, allowed, out.blockers)
        if option:
            overrides.skip(tensor.name)
        if type is not None:
            decided[tensor.name] = tensor.source_type if type == "copy" else type
    wanted = {tensor.name: tensor.source_type for tensor in tensors}
    if file_type.type is not None:
        try:
            facts = mixes.model_facts(architecture, lambda key: metadata[key].value if key in metadata else None)
        except SurgeryError as error:
            out.blockers.append(error)
            return wanted | decided
        shapes = {tensor.name: tensor.shape for tensor in tensors}
        order = list(shapes) if file_order else mixes.loader_order(shapes)
        chosen, errors = mixes.choose_types(
            file_type, facts, [(name, shapes[name]) for name in order], decided=decided,
            has_imatrix=imatrix is not None, output_type=edit.output_type, leave_output=edit.leave_output)
        wanted |= chosen
        out.blockers += errors
    return wanted | decided


def _fitting(tensor: OutputTensor, wanted: str, facts: dict[str, dict[str, Any]], fallbacks: Counter[tuple[str, str]],
             blockers: list[SurgeryError]) -> tuple[str, list[str]]:
    """`wanted`, or what llama-quantize falls back to where a row is no multiple of its block; and what to note."""
    if wanted == tensor.source_type:  # it keeps its bytes, whatever its rows
        return wanted, []
    row = tensor.shape[-1] if tensor.shape else 1
    type = mixes.fallback(wanted, row, {name: t["block"] for name, t in facts.items()})
    block = facts[wanted]["block"]
    if type is None:
        blockers.append(BadPlan(
            f"a row is no multiple of the block of {wanted}, which has no fallback", object=tensor.name,
            found=f"{row} elements", expected=f"a multiple of {block}",
            hint=f'an override such as ("{re.escape(tensor.name)}", "Q8_0")'))
        return tensor.source_type, []
    if type == wanted:
        return type, []
    fallbacks[wanted, type] += 1
    return type, [f"{wanted} needs rows of a multiple of {block}, this has {row}: {type}"]


def _weigh(model: Model, edit: Quantize, file_type: mixes.FileType, imatrix: Imatrix | None,
           facts: dict[str, dict[str, Any]], out: Outcome) -> None:
    """Gives each encoded tensor its importance; what needs one and has none is a blocker."""
    encoded, refused = [t for t in out.tensors if t.encoded], set()
    if imatrix is not None and edit.imatrix is not None:
        if encoded and not _belongs(imatrix, model, out):
            return
        found = importance.resolve(imatrix, edit.imatrix, model, encoded)
        out.blockers += found.blockers
        refused = found.refused
        out.warnings += found.warnings
        out.notes += found.summary
        for tensor in encoded:
            tensor.importance = found.importance.get(tensor.name)
            tensor.notes += found.notes.get(tensor.name, [])
    without: dict[str, list[str]] = {}
    for tensor in encoded:
        needs = facts[tensor.type]["needs_importance"] or mixes.wants_importance(file_type, tensor.name, tensor.type)
        if needs and tensor.importance is None and tensor.name not in refused:
            without.setdefault(tensor.type, []).append(tensor.name)
    hint = "imatrix= (--imatrix) gives one" if imatrix is None else \
        "the one given has no entry for it; imatrix_missing= (--imatrix-missing) says what to do then"
    for type, names in without.items():
        out.blockers.append(BadPlan(f"{type} needs an importance matrix{_with_others(names)}", object=names[0],
                                    hint=hint))


def _belongs(imatrix: Imatrix, model: Model, out: Outcome) -> bool:
    """False, and a blocker, where the entries are those of another model; a warning where some have no tensor."""
    strangers = [name for name in imatrix.entries if name not in model.tensors]
    if len(strangers) == len(imatrix.entries):
        out.blockers.append(BadPlan("the importance matrix of another model", path=imatrix.path,
                                    found=f"entries such as {strangers[0]}", expected="names of the model's tensors"))
        return False
    block_count = model.metadata.get(f"{model.architecture}.block_count")
    if "pgs.layers.kept" in model.metadata and isinstance(block_count, int):  # the layers have other numbers now
        beyond = [name for name in strangers if (roles.layer_of(name) or 0) >= block_count]
        if beyond:
            out.blockers.append(BadPlan(
                "the importance matrix of the model before its layers were dropped", path=imatrix.path,
                object=beyond[0], hint="prune layers and quantize the original in one plan: the matrix follows then"))
            return False
    if strangers:
        first = ", ".join(strangers[:3]) + (", ..." if len(strangers) > 3 else "")
        out.warnings.append(f"importance: {len(strangers)} of {len(imatrix.entries)} entries belong to no tensor of "
                            f"the model ({first})")
    return True


def _imatrix_metadata(imatrix: Imatrix, entries: int) -> dict[str, Value]:
    """The keys that llama-quantize writes. It cuts texts at 127 bytes and gives the whole path; here neither."""
    keys = {"file": Value(os.path.basename(imatrix.path), "str")}
    if imatrix.datasets:
        keys["dataset"] = Value(imatrix.datasets[0], "str")
    keys["entries_count"] = Value(entries, "u32")
    if imatrix.chunk_count > 0:
        keys["chunks_count"] = Value(imatrix.chunk_count, "u32")
    return {f"quantize.imatrix.{name}": value for name, value in keys.items()}


class _Overrides:
    """The overrides of one edit and what became of them."""

    def __init__(self, pairs: Sequence[tuple[str, str]]):
        self.pairs = [(pattern, compile_pattern(pattern), type) for pattern, type in pairs]
        self.matched = [0] * len(pairs)  # tensors whose name the pattern finds
        self.first = [0] * len(pairs)    # of these, the ones that no earlier pattern took
        self.left = [0] * len(pairs)     # of these, the ones that llama-quantize would not quantize

    def names(self, name: str) -> bool:
        return any(regex.search(name) for _, regex, _ in self.pairs)

    def skip(self, name: str) -> None:
        """This tensor is decided by an option that comes before all overrides."""
        for i, (_, regex, _) in enumerate(self.pairs):
            self.matched[i] += bool(regex.search(name))

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

    def report(self, out: Outcome, dropped: Callable[[], Collection[str]]) -> None:
        plain = []
        for (pattern, regex, type), matched, first, left in zip(self.pairs, self.matched, self.first, self.left):
            if matched == 0 and (gone := sum(bool(regex.search(name)) for name in dropped())):
                out.warnings.append(f"override {pattern}={type}: no tensor, the plan drops the {gone} that it matches")
                continue
            if matched == 0:
                out.blockers.append(BadPlan("an override that matches no tensor", object=pattern,
                                            hint="patterns are Python's re.search and case-sensitive"))
                continue
            text = f"override {pattern}={type}: {_tensors(first)}"
            if first == matched and not left:
                plain.append((text, first))
                continue
            if first < matched:
                text += f", {matched - first} more belong to an earlier override or option"
            if left:
                text += f", {left} of them left as they are (norm, router, convolution or vector: give the full name)"
            out.warnings.append(text)
        if len(plain) <= _LISTED:
            out.notes += [text for text, _ in plain]
        else:
            out.notes.append(f"{len(plain)} overrides: {_tensors(sum(n for _, n in plain))}")


def _is_full_name(pattern: str, name: str) -> bool:
    return pattern.removeprefix("^").removesuffix("$") in (name, re.escape(name))


def _tensors(count: int) -> str:
    return "1 tensor" if count == 1 else f"{count} tensors"


def _with_others(items: Sequence[object]) -> str:
    more = len(items) - 1
    return f" (and {more} more tensor{'s' * (more > 1)})" if more else ""
