"""class Plan: what the user writes. Each method is one line that calls the room that knows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ._core import Value
from .base.checks import whole_number
from .base.codec import loads
from .base.errors import BadPlan, SourceChanged
from .base.limits import Limits
from .base.progress import ProgressLike
from .base.units import MEMORY, parse_size
from .edits import metadata as metadata_rules
from .edits import quantize as quantize_edit
from .edits.context import Context
from .files.companions import Companions
from .files.model import Model
from .files.open import open_model
from .files.subjects import subject_of
from .gate.check import check
from .gate.checked import CheckedPlan
from .plan_data.choices import parse_mtp, plain_ids
from .plan_data.codec import plan_from_json, plan_to_json
from .plan_data.edits import (
    Edit,
    KeepExperts,
    MergeExperts,
    PlanData,
    PruneLayers,
    Quantize,
    RemoveMetadata,
    SetMetadata,
    Split,
    UseRepair,
)
from .plan_data.expressions import Group
from .plan_data.outcome import Draft
from .quant.arrays import parse_quality
from .recipes import mixes
from .recipes import recipe as recipe_file
from .recipes.overrides import parse_overrides, parse_type
from .recipes.recipe import options_of
from .run.writing import Receipt, write

if TYPE_CHECKING:
    from .files.imatrix import Imatrix
    from .plan_data.choices import Groups, Keep


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

    def keep_experts(
        self,
        keep: Keep | Mapping[int, Sequence[int]],
        *,
        mtp: str | None = None,
        repair: str | os.PathLike[str] | None = None,
    ) -> Plan:
        """Keep these experts, {layer: ids}, and drop the others; the ids of a second cut are those after the first.

        mtp: "keep" cuts the MTP layers like the rest (`keep` names them too), "drop" removes these layers; by
        default as the ranking was told that made `keep`, or else "keep".
        repair: the file that experts.repair made for these experts: their down projections are taken from it.
        """
        mtp = parse_mtp(getattr(keep, "mtp", "keep") if mtp is None else mtp)
        if not isinstance(keep, Mapping) or not keep:
            raise BadPlan(
                "not the experts to keep",
                object="keep",
                found=type(keep).__name__,
                expected="{layer: ids}",
                hint=".keep(n) of a ranking chooses them" if hasattr(keep, "keep") else None,
            )
        kept = {whole_number(layer, "layer"): plain_ids(layer, ids) for layer, ids in keep.items()}
        of = getattr(keep, "of", None)
        if of is not None and not any(isinstance(e, (KeepExperts, MergeExperts, PruneLayers)) for e in self.data.edits):
            of.check_same(subject_of(self.model), "the choice of experts is")  # of a second cut it is a later model's
        order = {layer: tuple(ids) for layer, ids in getattr(keep, "order", {}).items()}
        scores = {layer: tuple(map(float, values)) for layer, values in getattr(keep, "scores", {}).items()}
        metric = str(getattr(keep, "metric", "given"))
        if repair is None and metric == "best":
            raise BadPlan(
                "the choice by `best` counts on repaired down projections",
                object="repair",
                hint="make them with experts.repair (gguf-surgery repair), or choose by reap-sum",
            )
        use = None if repair is None else _use_repair(repair)
        return self._with(KeepExperts(dict(sorted(kept.items())), metric, mtp, order, scores, use))

    def merge_experts(self, groups: Groups | Mapping[int, Sequence[Group]], *, mtp: str | None = None) -> Plan:
        """Make one expert of each group, {layer: groups}, as experts.group returns them: the weighted mean of its
        members, in the place of its centroid, whose router row and bias stay. Groups of one are copied.

        mtp: as in keep_experts.
        """
        mtp = parse_mtp(getattr(groups, "mtp", "keep") if mtp is None else mtp)
        if not isinstance(groups, Mapping) or not groups:
            raise BadPlan(
                "not groups of experts",
                object="groups",
                found=type(groups).__name__,
                expected="{layer: groups}",
                hint="experts.group makes them",
            )
        plain = {whole_number(layer, "layer"): tuple(some) for layer, some in groups.items()}
        if not all(isinstance(group, Group) for some in plain.values() for group in some):
            raise BadPlan("not groups of experts", object="groups", hint="experts.group makes them")
        return self._with(MergeExperts(dict(sorted(plain.items())), str(getattr(groups, "metric", "given")), mtp))

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

    def prune_layers(self, layers: Iterable[int]) -> Plan:
        """Drop these layers and renumber the rest; what depends on a layer's number follows, or is a blocker."""
        numbers = sorted({whole_number(layer, "layer") for layer in layers})
        if not numbers or numbers[0] < 0:
            raise BadPlan("not the layers to drop", object="layers", found=repr(numbers), expected="[0, 1, ...]")
        return self._with(PruneLayers(tuple(numbers)))

    def quantize(
        self,
        type: str,
        *,
        imatrix: str | os.PathLike[str] | Imatrix | None = None,
        imatrix_missing: str = "default",
        include_weights: Iterable[str] = (),
        exclude_weights: Iterable[str] = (),
        overrides: Iterable[Sequence[str]] = (),
        output_type: str | None = None,
        token_embedding_type: str | None = None,
        pure: bool = False,
        leave_output: bool = False,
        allow_requantize: bool = False,
        quality: str = "default",
    ) -> Plan:
        """Give every tensor the type and bytes that llama-quantize would give it for the file type `type`.

        imatrix: an importance matrix, GGUF or the older .dat; only its names and counts are read now. It follows the
        plan's cuts. imatrix_missing says what an expert that it never saw, or a tensor that it lacks, comes to:
        "default" is llama-quantize's (ones; no importance, or a blocker where the type needs some), "fail" a blocker,
        "ones" or "layer-mean" a substitute. include_weights, exclude_weights: parts of names of entries, not both.
        overrides: (regular expression, ggml type or "copy") pairs, the first that matches (re.search) wins.
        output_type, token_embedding_type: ggml types for output.weight and token_embd.weight; they come before
        overrides. pure: `type` is a plain ggml type, for every tensor that llama-quantize would quantize.
        leave_output: output.weight stays as it is. allow_requantize: also encode tensors that are already quantized, at
        a loss. quality: "best" encodes MXFP4 with less error, weighted by the importance matrix if there is one; such
        bytes are valid, but not llama-quantize's.
        """
        if any(isinstance(edit, Quantize) for edit in self.data.edits):
            raise BadPlan("a plan quantizes at most once", object="quantize")
        use = quantize_edit.use_imatrix(imatrix, imatrix_missing, include_weights, exclude_weights)
        return self._with(
            Quantize(
                mixes.file_type(type, pure).name,
                bool(pure),
                parse_overrides(overrides),
                bool(allow_requantize),
                parse_type(output_type, "output_type"),
                parse_type(token_embedding_type, "token_embedding_type"),
                bool(leave_output),
                use,
                quality=parse_quality(quality),
            )
        )

    def recipe(
        self,
        name: str | os.PathLike[str],
        *,
        type: str | None = None,
        overrides: Iterable[Sequence[str]] = (),
        **options: Any,
    ) -> Plan:
        """quantize() as a recipe says: a name of the shipped ones or the path of a TOML file.

        type replaces the recipe's base type; overrides come before its own; options are those of quantize().
        """
        loaded = recipe_file.load(name)
        plan = self.quantize(**options_of(loaded, self.model.tensors, type, overrides, options))
        if loaded.max_bytes is None:
            return plan
        return plan._with_quantize(lambda edit: replace(edit, max_bytes=loaded.max_bytes))

    def fit(
        self,
        *,
        size: int | str | None = None,
        bpw: float | None = None,
        memory: int | str = MEMORY,
        threads: int = 0,
        io: str = "auto",
        progress: ProgressLike = None,
    ) -> Plan:
        """After quantize(): types of its family for each tensor, so that the file has at most `size` bytes ("22GB") or
        `bpw` bits per weight, with the least error. It reads a sample of the rows, weighted by the importance matrix if
        there is one; the choice stands in the plan as overrides that reproduce it. Call it last. progress: True, or a
        callable(tensors done, tensors).
        """
        from .studies.fitting import fit

        limits = Limits.parse(memory, threads, io)
        fitted = fit(self.model, self.data, limits, size=size, bpw=bpw, progress=progress)
        return self._with_quantize(lambda edit: replace(edit, overrides=(*edit.overrides, *fitted.overrides)))

    def split(
        self,
        *,
        max_size: int | str | None = None,
        max_tensors: int | None = None,
        keep: bool = False,
        first_empty: bool = False,
    ) -> Plan:
        """Write shards NAME-00001-of-00003.gguf, as llama-gguf-split would.

        max_size: of the tensors of a shard ("2GB"); max_tensors: their number; keep: as the input is split. One of
        these. first_empty: the first shard has all metadata and no tensors.
        """
        given = [
            name
            for name, x in (("max_size", max_size), ("max_tensors", max_tensors), ("keep", keep or None))
            if x is not None
        ]
        if len(given) != 1:
            raise BadPlan("a split is by one of max_size, max_tensors, keep", object="split", found=given or "none")
        nbytes = None if max_size is None else parse_size(max_size)
        number = None if max_tensors is None else whole_number(max_tensors, "max_tensors")
        for what, n in (("max_size", nbytes), ("max_tensors", number)):
            if n is not None and n < 1:
                raise BadPlan("less than one", object=what, found=n)
        return self._with(Split(nbytes, number, bool(keep), bool(first_empty)))

    def _with_quantize(self, change: Callable[[Quantize], Quantize]) -> Plan:
        edits = tuple(change(edit) if isinstance(edit, Quantize) else edit for edit in self.data.edits)
        return Plan(self.model, replace(self.data, edits=edits))

    def _with(self, edit: Edit) -> Plan:
        return Plan(self.model, replace(self.data, edits=(*self.data.edits, edit)))

    def _metadata(self) -> dict[str, Value]:
        """The metadata after the edits so far of set_metadata and remove_metadata."""
        now, context = self.model.metadata.exact(), Context(self.model, Companions())
        for edit in self.data.edits:
            if isinstance(edit, (SetMetadata, RemoveMetadata)):
                now = metadata_rules.apply(Draft([], now), edit, context).metadata
        return now

    # --- describe, run, keep ---------------------------------------------------------------------------------------

    def check(self, *, memory: int | str = MEMORY, threads: int = 0, io: str = "auto") -> CheckedPlan:
        """Everything about the output, before a byte of it exists: types, sizes, peak memory, warnings, blockers."""
        with Companions() as companions:
            return check(self.model, self.data, Limits.parse(memory, threads, io), companions)

    def write(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        memory: int | str = MEMORY,
        threads: int = 0,
        io: str = "auto",
        progress: ProgressLike = False,
        measure: bool = False,
    ) -> Receipt:
        """Check, then write the file at `path` (of a split plan its shards): whole, or not at all. Raises the first
        blocker.

        memory bounds all buffers of the run (at least 64MiB). threads: 0 is PGS_THREADS or all CPUs. io: how the input
        is read, "auto" | "mmap" | "pread" | "direct". progress: True, or a callable(done_bytes, total_bytes). measure:
        then compare the result with the source, by the plan's importance matrix, as report.compare does: both are read
        once more; Receipt.quality has the numbers. The file is complete before, and stays whatever the comparison ends
        with.
        """
        with Companions() as companions:
            checked = check(self.model, self.data, Limits.parse(memory, threads, io), companions)
            receipt = write(self.model, checked, path, overwrite=overwrite, progress=progress, companions=companions)
            if measure:
                from .reports.comparison import compare_written

                found = compare_written(self.model, checked, receipt.path, companions, progress)
                receipt = replace(receipt, quality=found.to_json())
            return receipt

    def to_json(self) -> str:
        """Lossless and versioned; for Plan.from_json."""
        return json.dumps(plan_to_json(self.data), allow_nan=False)

    @classmethod
    def from_json(cls, text: str, model: Model | None = None) -> Plan:
        """The plan of to_json(). Opens its source unless `model` is given. SourceChanged if the header is another."""
        data = plan_from_json(loads(text))
        if model is None:
            model = open_model(data.source)
        if model.header_sha256 != data.header_sha256:
            raise SourceChanged(
                "not the file that the plan was made for",
                path=model.path,
                object="header",
                found=model.header_sha256[:16],
                expected=data.header_sha256[:16],
            )
        return cls(model, data)


def _use_repair(path: str | os.PathLike[str]) -> UseRepair:
    from .files import repair as repair_file

    opened = repair_file.open_repair(path)
    opened.close()
    return UseRepair(opened.path, opened.digest)
