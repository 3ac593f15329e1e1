"""The plan as plain data: what was asked (edits) and what it comes to (output tensors). No behaviour but JSON."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from ._core import Value
from .errors import BadPlan

FORMAT = 1


# --- edits: what was asked, with all its numbers -------------------------------------------------------------------

@dataclass(frozen=True)
class KeepExperts:
    """Keep these experts. kept: layer -> ascending ids, the same count in every layer. mtp: "keep" (cut the MTP blocks
    with the rest; they must be in `kept`) or "drop" (remove them). order: the kept ids best first, for layers whose
    tables of expert ids need substitutes; where it is missing they are taken in ascending order."""

    kept: dict[int, tuple[int, ...]]
    metric: str
    mtp: str = "keep"
    order: dict[int, tuple[int, ...]] = field(default_factory=dict)
    scores: dict[int, tuple[float, ...]] = field(default_factory=dict)
    repair: UseRepair | None = None


@dataclass(frozen=True)
class UseRepair:
    """New down projections of the experts that stay, made by experts.repair. path is absolute; digest is
    experts.repair_file.Repair.digest."""

    path: str
    digest: str


@dataclass(frozen=True)
class Group:
    """Experts that become one. members: their ids, the first is the centroid, whose router row stays. weights: of the
    mean, adding to one. orders: for each member the neuron of its own that comes in each place, little-endian uint16;
    empty where they stay as they are."""

    members: tuple[int, ...]
    weights: tuple[float, ...]
    orders: tuple[bytes, ...]


@dataclass(frozen=True)
class MergeExperts:
    """Make one expert of each group. groups: layer -> groups by ascending centroid, the same number in every layer; an
    expert in no group is dropped. mtp: as in KeepExperts."""

    groups: dict[int, tuple[Group, ...]]
    metric: str
    mtp: str = "keep"


@dataclass(frozen=True)
class SetMetadata:
    items: tuple[tuple[str, Value], ...]


@dataclass(frozen=True)
class RemoveMetadata:
    keys: tuple[str, ...]


@dataclass(frozen=True)
class PruneLayers:
    """Drop these blocks, numbered as they are when the edit's turn comes, and renumber the rest."""

    layers: tuple[int, ...]


@dataclass(frozen=True)
class UseImatrix:
    """The importance matrix of a Quantize. path is absolute; digest is imatrix.Imatrix.digest, of its names, shapes,
    counts and some sums. missing: what a missing entry and an expert never seen come to, one of imatrix.POLICIES.
    include, exclude: parts of names; an entry is used if it has one of `include`, where there are any, and none of
    `exclude`."""

    path: str
    digest: str
    missing: str = "default"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quantize:
    """type: a llama-quantize file type ("MXFP4_MOE"), or any ggml type with pure. overrides: (pattern, ggml type or
    "copy"), first match wins. output_type, token_embedding_type: a ggml type or None. max_bytes: a larger output is not
    written. quality: of quantize.QUALITIES."""

    type: str
    pure: bool = False
    overrides: tuple[tuple[str, str], ...] = ()
    allow_requantize: bool = False
    output_type: str | None = None
    token_embedding_type: str | None = None
    leave_output: bool = False
    imatrix: UseImatrix | None = None
    max_bytes: int | None = None
    quality: str = "default"


@dataclass(frozen=True)
class Split:
    """Write shards. max_bytes bounds the tensor bytes of a shard, max_tensors their number (at most one of the two);
    keep: as the input is split. first_empty: the first shard has the metadata and no tensors."""

    max_bytes: int | None = None
    max_tensors: int | None = None
    keep: bool = False
    first_empty: bool = False


Edit = KeepExperts | MergeExperts | PruneLayers | SetMetadata | RemoveMetadata | Quantize | Split


# --- expressions: where an output tensor's rows come from ----------------------------------------------------------

PAD = -1  # in place of a slice's number: an expert that the router never picks


@dataclass(frozen=True)
class Copy:
    ref: str


@dataclass(frozen=True)
class Take:
    """Slices of `ref` along its slowest axis; PAD is one of zeros, in an F32 tensor of `fill`."""

    ref: str
    indices: tuple[int, ...]
    fill: float = 0.0


@dataclass(frozen=True)
class Stack:
    """Tensors of one shape and type, one after the other along a new slowest axis."""

    refs: tuple[str, ...]


@dataclass(frozen=True)
class Remap:
    """An I32 tensor whose values are expert ids: id -> table[id], -1 means dropped: then the first of `substitutes` (new
    ids, best first) that its column does not hold already."""

    ref: str
    table: tuple[int, ...]
    substitutes: tuple[int, ...]


@dataclass(frozen=True)
class FromRepair:
    """Slices `rows` of the tensor `ref` in the plan's repair, in the place of slices `indices` of the source's."""

    ref: str
    rows: tuple[int, ...]
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Merge:
    """Slice i is the weighted mean of the slices groups[i].members of `ref`; neurons are reordered along the rows of a
    slice ("rows", or "half rows": both halves of a fused gate and up alike), within them ("columns", "half columns"), or
    are not ("none")."""

    ref: str
    groups: tuple[Group, ...]
    axis: str


Expression = Copy | Take | Stack | Remap | FromRepair | Merge


ONES = -1   # a row of ones in place of a row of an importance matrix
MEAN = -2   # the mean of the entry's rows, weighted by their counts


@dataclass(frozen=True)
class Importance:
    """The importance rows of an encoded tensor: one for all its rows, or one per slice of its third-fastest axis. ref is
    the entry of the importance matrix, rows its row numbers, ONES, MEAN, or the rows of several experts that are merged."""

    ref: str
    rows: tuple[int | tuple[int, ...], ...]


@dataclass
class OutputTensor:
    """shape is outermost first, type a ggml type name. source_type is the type of the bytes that the expression gives;
    where it differs from type they are decoded and encoded, with `importance` if there is one."""

    name: str
    shape: tuple[int, ...]
    type: str
    source_type: str
    expression: Expression
    role: str = "other"
    notes: list[str] = field(default_factory=list)  # a fallback, a missing importance row, ...
    importance: Importance | None = None
    best: bool = False  # encoded with less error than ggml's encoder has

    @property
    def encoded(self) -> bool:
        """Whether numbers go through the encoder of its type; else bytes are only moved."""
        merged = isinstance(self.expression, Merge) and any(len(g.members) > 1 for g in self.expression.groups)
        return self.type != self.source_type or merged


@dataclass(frozen=True)
class PlanData:
    """Everything that determines the output, bar the source's bytes."""

    source: str             # path of the (first) file
    header_sha256: str      # of the header bytes of all its shards
    edits: tuple[Edit, ...] = ()


# --- JSON, both ways -----------------------------------------------------------------------------------------------

def value_to_json(value: Value) -> dict[str, Any]:
    """Lossless: numbers and clean text as JSON, all else (NaN, bytes that are no UTF-8) as hex of the encoding."""
    plain = value.value
    if Value(plain, value.type) == value and _is_plain(plain):
        return {"type": value.type, "value": plain}
    return {"type": value.type, "hex": value.raw.hex()}


def _is_plain(x: Any) -> bool:
    if isinstance(x, list):
        return all(_is_plain(e) for e in x)
    if isinstance(x, float):
        return x - x == 0  # finite
    if isinstance(x, str):
        return not any("\ud800" <= c <= "\udfff" for c in x)
    return True


def value_from_json(data: dict[str, Any]) -> Value:
    if "hex" in data:
        return Value.from_raw(data["type"], bytes.fromhex(data["hex"]))
    return Value(data["value"], data["type"])


def _per_layer(numbers: dict[int, tuple[Any, ...]]) -> dict[str, list[Any]]:
    return {str(layer): list(values) for layer, values in numbers.items()}


def _group_to_json(group: Group) -> dict[str, Any]:
    return {"members": list(group.members), "weights": list(group.weights),
            "orders": [base64.b64encode(order).decode() for order in group.orders]}


def _group_from_json(data: Any) -> Group:
    return Group(_numbers(data["members"]), tuple(float(x) for x in _typed(data["weights"], list, "a list")),
                 tuple(base64.b64decode(order, validate=True) for order in _texts(data["orders"])))


def edit_to_json(edit: Edit) -> dict[str, Any]:
    match edit:
        case KeepExperts():
            return {"edit": "keep_experts", "kept": _per_layer(edit.kept), "metric": edit.metric, "mtp": edit.mtp,
                    "order": _per_layer(edit.order), "scores": _per_layer(edit.scores),
                    "repair": None if edit.repair is None else asdict(edit.repair)}
        case MergeExperts():
            return {"edit": "merge_experts", "groups": {str(layer): [_group_to_json(g) for g in groups]
                                                        for layer, groups in edit.groups.items()},
                    "metric": edit.metric, "mtp": edit.mtp}
        case SetMetadata(items):
            return {"edit": "set_metadata", "items": [[k, value_to_json(v)] for k, v in items]}
        case RemoveMetadata(keys):
            return {"edit": "remove_metadata", "keys": list(keys)}
        case Quantize():
            return {"edit": "quantize", "type": edit.type, "pure": edit.pure,
                    "overrides": [list(o) for o in edit.overrides], "allow_requantize": edit.allow_requantize,
                    "output_type": edit.output_type, "token_embedding_type": edit.token_embedding_type,
                    "leave_output": edit.leave_output,
                    "imatrix": None if edit.imatrix is None else asdict(edit.imatrix), "max_bytes": edit.max_bytes,
                    "quality": edit.quality}
        case PruneLayers(layers):
            return {"edit": "prune_layers", "layers": list(layers)}
        case Split():
            return {"edit": "split", **asdict(edit)}
    raise TypeError(edit)


def _typed(x: Any, kind: type, what: str) -> Any:
    """x, if it is exactly of this kind: JSON edited by hand may say "false", 1.5 or "abc" for false, 1 or ["abc"]."""
    if type(x) is not kind:
        raise TypeError(f"{x!r:.80} is not {what}")
    return x


def _text(x: Any) -> str:
    return _typed(x, str, "a string")


def _flag(x: Any) -> bool:
    return _typed(x, bool, "true or false")


def _number(x: Any) -> int:
    return _typed(x, int, "a whole number")


def _texts(x: Any) -> tuple[str, ...]:
    return tuple(_text(e) for e in _typed(x, list, "a list"))


def _numbers(x: Any) -> tuple[int, ...]:
    return tuple(_number(e) for e in _typed(x, list, "a list"))


def _maybe(read: Callable[[Any], Any], x: Any) -> Any:
    return None if x is None else read(x)


def _imatrix_from_json(data: dict[str, Any]) -> UseImatrix:
    return UseImatrix(_text(data["path"]), _text(data["digest"]), _text(data["missing"]), _texts(data["include"]),
                      _texts(data["exclude"]))


def edit_from_json(data: dict[str, Any]) -> Edit:
    match data["edit"]:
        case "keep_experts":
            return KeepExperts({int(k): _numbers(v) for k, v in data["kept"].items()}, _text(data["metric"]),
                               _text(data["mtp"]), {int(k): _numbers(v) for k, v in data.get("order", {}).items()},
                               {int(k): tuple(float(x) for x in v) for k, v in data.get("scores", {}).items()},
                               _maybe(lambda r: UseRepair(_text(r["path"]), _text(r["digest"])), data.get("repair")))
        case "set_metadata":
            return SetMetadata(tuple((_text(k), value_from_json(v)) for k, v in _typed(data["items"], list, "a list")))
        case "remove_metadata":
            return RemoveMetadata(_texts(data["keys"]))
        case "quantize":  # .get: plans of the time when an edit had no more than the first four
            overrides = tuple((_text(p), _text(t)) for p, t in _typed(data["overrides"], list, "a list"))
            return Quantize(_text(data["type"]), _flag(data["pure"]), overrides, _flag(data["allow_requantize"]),
                            _maybe(_text, data.get("output_type")), _maybe(_text, data.get("token_embedding_type")),
                            _flag(data.get("leave_output", False)), _maybe(_imatrix_from_json, data.get("imatrix")),
                            _maybe(_number, data.get("max_bytes")), _text(data.get("quality", "default")))
        case "merge_experts":
            return MergeExperts({int(k): tuple(_group_from_json(g) for g in _typed(v, list, "a list"))
                                 for k, v in data["groups"].items()}, _text(data["metric"]), _text(data["mtp"]))
        case "prune_layers":
            return PruneLayers(_numbers(data["layers"]))
        case "split":
            return Split(_maybe(_number, data["max_bytes"]), _maybe(_number, data["max_tensors"]), _flag(data["keep"]),
                         _flag(data["first_empty"]))
    raise BadPlan("unknown edit", object=str(data["edit"]))


def expression_to_json(expression: Expression) -> dict[str, Any]:
    match expression:
        case Copy(ref):
            return {"expression": "copy", "ref": ref}
        case Take(ref, indices, fill):
            return {"expression": "take", "ref": ref, "indices": list(indices), **({"fill": fill} if fill else {})}
        case Stack(refs):
            return {"expression": "stack", "refs": list(refs)}
        case Merge(ref, groups, axis):  # the orders are in the plan's edit
            return {"expression": "merge", "ref": ref, "axis": axis, "groups": [list(g.members) for g in groups],
                    "weights": [list(g.weights) for g in groups]}
        case FromRepair(ref, rows, indices):
            return {"expression": "repair", "ref": ref, "rows": list(rows), "indices": list(indices)}
        case Remap(ref, table, substitutes):
            return {"expression": "remap", "ref": ref, "table": list(table), "substitutes": list(substitutes)}
    raise TypeError(expression)


def plan_to_json(plan: PlanData) -> dict[str, Any]:
    return {"format": FORMAT, "source": plan.source, "header_sha256": plan.header_sha256,
            "edits": [edit_to_json(e) for e in plan.edits]}


def plan_from_json(data: dict[str, Any]) -> PlanData:
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise BadPlan("not a plan of this version", object="format", found=found, expected=FORMAT)
    try:
        return PlanData(_text(data["source"]), _text(data["header_sha256"]),
                        tuple(edit_from_json(e) for e in _typed(data["edits"], list, "a list")))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadPlan(f"not a plan: {error!r}") from None
