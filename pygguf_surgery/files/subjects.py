"""What models and other files say of the model that they are, or are of: as keys of GGUF files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

from .._core import Value
from ..architecture.loader import MAX_EXPERTS
from ..base.errors import BadFile, BadPlan
from ..plan_data.subject import Descent, Ids, Subject, Wanted
from .lineage import Lineage, source_experts

if TYPE_CHECKING:
    from .model import Model

Kind = TypeVar("Kind")


def subject_of(model: Model) -> Subject:
    """What is made from this model is of it."""
    return subject_of_keys(model.architecture, model.metadata.exact(), model.header_sha256, model.name)


def subject_of_keys(
    architecture: str, metadata: Mapping[str, Value], header_sha256: str = "", name: str = ""
) -> Subject:
    """The same from a header that is not in a file yet."""
    key = f"{architecture}.expert_count"
    experts = metadata[key].value if key in metadata else 0
    experts = experts if type(experts) is int and 0 < experts <= MAX_EXPERTS else 0
    return Subject(experts, header_sha256, name, Lineage.of(metadata).of_origin)


def wanted_by(model: Model) -> Wanted:
    """The cut that made a model. BadFile for lists that are not of whole numbers, BadPlan where nothing was cut, or
    where experts were merged."""
    metadata = model.metadata.exact()
    source_experts(metadata)
    return Wanted(Lineage.of(metadata, strict=True).of_source.plausible(), subject_of(model))


def write_subject(of: Subject | None, prefix: str) -> dict[str, Value]:
    """The keys under `prefix` that say what a file is of; none where that is not known."""
    if of is None:
        return {}
    origin = of.origin
    keys = {
        "header_sha256": Value(of.header_sha256, "str"),
        "name": Value(of.name, "str"),
        "experts": Value(of.experts, "u32"),
    }
    if origin.changed:
        keys["origin.header_sha256"] = Value(origin.header_sha256, "str")
        if origin.experts is not None:
            keys["origin.experts"] = Value(origin.experts, "u32")
        if origin.layers is not None:
            keys["origin.layers"] = Value(list(origin.layers), "u32[]")
        for word, lists in (("kept", origin.kept), ("merged", origin.merged)):
            keys |= {f"origin.{layer}.{word}": Value(list(ids), "u32[]") for layer, ids in lists.items()}
    return {prefix + key: value for key, value in keys.items()}


def read_subject(metadata: Mapping[str, Value], prefix: str) -> Subject | None:
    """What those keys say; None where an older version, or another program, made the file. BadFile for what
    `write_subject` cannot have written."""
    if prefix + "experts" not in metadata:
        return None

    def read(key: str, kind: type[Kind]) -> Kind | None:
        value = metadata[prefix + key].value if prefix + key in metadata else None
        if value is None or type(value) is kind:
            return value
        raise BadFile("not what can be said of a model", object=prefix + key, found=f"{value!r:.80}")

    def ids(key: str) -> tuple[int, ...] | None:
        values = read(key, list)
        if values is not None and not all(type(i) is int for i in values):
            raise BadFile("not an array of whole numbers", object=prefix + key)
        return None if values is None else tuple(values)

    lists: dict[str, Ids] = {"kept": {}, "merged": {}}
    for key in metadata:
        if (match := re.fullmatch(r"(origin\.([0-9]{1,9})\.(kept|merged))", key.removeprefix(prefix))) is not None:
            lists[match[3]][int(match[2])] = ids(match[1]) or ()
    of = Subject(
        read("experts", int) or 0,
        read("header_sha256", str) or "",
        read("name", str) or "",
        Descent(read("origin.header_sha256", str) or "", read("origin.experts", int), ids("origin.layers"), **lists),
    )
    try:
        of.check()
    except BadPlan as error:
        raise BadFile(error.problem, object=f"{prefix}{(error.object or '').removeprefix('.')}") from None
    return of
