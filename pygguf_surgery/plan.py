"""class Plan: what the user writes. Each method is one line that calls the room that knows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import metadata as metadata_rules
from ._core import Value
from .check import CheckedPlan, check
from .errors import BadPlan, SourceChanged, Unsupported
from .model import Model, open as open_model
from .plan_data import Edit, KeepExperts, PlanData, Quantize, RemoveMetadata, SetMetadata, plan_from_json, plan_to_json
from .quantize import mixes, recipe
from .units import MEMORY
from .write import Progress, Receipt, write

if TYPE_CHECKING:
    from .experts.rank import Keep


class Plan:
    """What to do with a model, as data. Immutable: every edit returns a new plan, and none reads tensor data.

    Pickles by the path of its source. What is wrong with an edit by itself is raised by its method; what only the whole
    shows (a tensor that llama.cpp could not load, an override that matches nothing) is a blocker of check().
    """

    __slots__ = ("data", "model")

    model: Model
    data: PlanData

    def __init__(self, model: Model, data: PlanData | None = None):
        if not isinstance(model, Model):
            raise TypeError(f"a Plan takes a model, as pygguf_surgery.open() returns, not {type(model).__name__}")
        if data is None:
            data = PlanData(model.path, model.header_sha256)
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "data", data)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Plan is immutable: {name} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Plan is immutable: {name} cannot be deleted")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.data == other.data

    def __hash__(self) -> int:
        return hash((self.data.source, self.data.header_sha256, len(self.data.edits)))

    def __repr__(self) -> str:
        return f"<Plan for {self.data.source} of {len(self.data.edits)} edits>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan.from_json, (self.to_json(),)

    # --- edits -----------------------------------------------------------------------------------------------------

    def keep_experts(self, keep: Keep | Mapping[int, Sequence[int]], *, mtp: str = "keep") -> Plan:
        """Keep these experts, {layer: ids}, and drop the others; the ids of a second cut are those after the first.

        mtp: "keep" cuts the MTP blocks like the rest (`keep` names them too), "drop" removes these blocks.
        """
        if mtp not in ("keep", "drop"):
            raise BadPlan("unknown choice", object="mtp", found=repr(mtp), expected='"keep" or "drop"')
        if not isinstance(keep, Mapping) or not keep:
            raise BadPlan("not the experts to keep", object="keep", found=type(keep).__name__, expected="{layer: ids}",
                          hint=".keep(n) of a ranking chooses them" if hasattr(keep, "keep") else None)
        kept = {_whole(layer, "layer"): _ids(layer, ids) for layer, ids in keep.items()}
        order = {layer: tuple(ids) for layer, ids in getattr(keep, "order", {}).items()}
        return self._with(KeepExperts(dict(sorted(kept.items())), str(getattr(keep, "metric", "given")), mtp, order))

    def set_metadata(self, items: Mapping[str, Any]) -> Plan:
        """Set keys. An existing key keeps its type; a new one gets bool -> bool, int -> u32, else i32, u64, i64,
        float -> f32, str -> str, list -> an array of those, pgs.Value(x, "u16") -> exactly that."""
        if not isinstance(items, Mapping):
            raise BadPlan("not metadata", object="items", found=type(items).__name__, expected="{key: value}")
        now = self._metadata()
        values = []
        for key, obj in items.items():
            metadata_rules.check_key(self.model.architecture, key, now, new=True)
            values.append((key, metadata_rules.to_value(obj, now.get(key), key=key)))
        return self._with(SetMetadata(tuple(values)))

    def set_metadata_text(self, assignments: Iterable[str]) -> Plan:
        """Set keys as the shell writes them: KEY=VALUE (an existing key keeps its type, a new one is a str) or
        KEY:TYPE=VALUE, arrays as KEY:u32[]=1,2,3."""
        now = self._metadata()
        items = {}
        for text in assignments:
            key, value = metadata_rules.parse_assignment(text)
            items[key] = metadata_rules.text_to_value(value, now.get(key), key=key) if isinstance(value, str) else value
        return self.set_metadata(items)

    def remove_metadata(self, *keys: str) -> Plan:
        """Remove keys, each of which must be there."""
        now = self._metadata()
        for key in keys:
            metadata_rules.check_key(self.model.architecture, key, now, new=False)
            del now[key]
        return self._with(RemoveMetadata(keys))

    def quantize(self, type: str, *, imatrix: None = None, overrides: Iterable[Sequence[str]] = (), pure: bool = False,
                 allow_requantize: bool = False) -> Plan:
        """Give every tensor the type that llama-quantize would give it for the file type `type`.

        pure: `type` is a plain ggml type, for every tensor that llama-quantize would quantize. overrides: (regular
        expression, ggml type or "copy") pairs, the first that matches (re.search) wins. allow_requantize: also encode
        tensors that are already quantized, at a loss.
        """
        if imatrix is not None:
            raise Unsupported("importance matrices are not there yet", object="imatrix")
        if any(isinstance(edit, Quantize) for edit in self.data.edits):
            raise BadPlan("a plan quantizes at most once", object="quantize")
        name = mixes.file_type(type, pure).name
        return self._with(Quantize(name, bool(pure), recipe.parse_overrides(overrides), bool(allow_requantize)))

    def _with(self, edit: Edit) -> Plan:
        return Plan(self.model, replace(self.data, edits=(*self.data.edits, edit)))

    def _metadata(self) -> dict[str, Value]:
        """The metadata after the edits so far of set_metadata and remove_metadata."""
        now = self.model.metadata.exact()
        for edit in self.data.edits:
            if isinstance(edit, (SetMetadata, RemoveMetadata)):
                now = metadata_rules.apply(self.model.architecture, now, edit, [])
        return now

    # --- describe, run, keep ---------------------------------------------------------------------------------------

    def check(self, *, memory: int | str = MEMORY, threads: int = 0, io: str = "auto") -> CheckedPlan:
        """Everything about the output, before a byte of it exists: types, sizes, peak memory, warnings, blockers."""
        return check(self.model, self.data, memory=memory, threads=threads, io=io)

    def write(self, path: str | os.PathLike[str], *, overwrite: bool = False, memory: int | str = MEMORY,
              threads: int = 0, io: str = "auto", progress: bool | Progress | None = False) -> Receipt:
        """Check, then write the file at `path`: whole, or not at all. Raises the first blocker.

        memory bounds all buffers of the run (at least 64MiB). threads: 0 is PGS_THREADS or all CPUs. io: how the input
        is read, "auto" | "mmap" | "pread" | "direct". progress: True, or a callable(done_bytes, total_bytes).
        """
        checked = self.check(memory=memory, threads=threads, io=io)
        return write(self.model, checked, path, overwrite=overwrite, memory=memory, threads=threads, io=io,
                     progress=progress)

    def to_json(self) -> str:
        """Lossless and versioned; for Plan.from_json."""
        return json.dumps(plan_to_json(self.data), allow_nan=False)

    @classmethod
    def from_json(cls, text: str, model: Model | None = None) -> Plan:
        """The plan of to_json(). Opens its source unless `model` is given. SourceChanged if the header is another."""
        try:
            data = plan_from_json(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise BadPlan(f"not JSON: {error}") from None
        if model is None:
            model = open_model(data.source)
        if model.header_sha256 != data.header_sha256:
            raise SourceChanged("not the file that the plan was made for", path=model.path, object="header",
                                found=model.header_sha256[:16], expected=data.header_sha256[:16])
        return cls(model, data)


def _whole(number: Any, what: str) -> int:
    if isinstance(number, bool) or not hasattr(number, "__index__"):
        raise BadPlan("not a whole number", object=what, found=repr(number))
    return number.__index__()


def _ids(layer: Any, ids: Any) -> tuple[int, ...]:
    try:
        whole = sorted(_whole(i, f"layer {layer}") for i in ids)
    except TypeError:
        raise BadPlan("not a list of expert ids", object=f"layer {layer}", found=repr(ids)) from None
    if len(set(whole)) != len(whole):
        twice = next(a for a, b in zip(whole, whole[1:]) if a == b)
        raise BadPlan(f"expert {twice} is kept twice", object=f"layer {layer}")
    return tuple(whole)
