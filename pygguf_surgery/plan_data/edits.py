"""The plan as plain data: what was asked (edits) and what it comes to (output tensors). No behaviour but JSON."""

from __future__ import annotations

from dataclasses import dataclass, field

from .._core import Value
from .expressions import Group

# --- edits: what was asked, with all its numbers -------------------------------------------------------------------


@dataclass(frozen=True)
class KeepExperts:
    """Keep these experts. kept: layer -> ascending ids, the same count in every layer. mtp: "keep" (cut the MTP layers
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
    files.repair.Repair.digest."""

    path: str
    digest: str


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
    """Drop these layers, numbered as they are when the edit's turn comes, and renumber the rest."""

    layers: tuple[int, ...]


@dataclass(frozen=True)
class UseImatrix:
    """The importance matrix of a Quantize. path is absolute; digest is files.imatrix.Imatrix.digest, of its names,
    shapes, counts and some sums. missing: what a missing entry and an expert never seen come to, one of
    files.imatrix.POLICIES. include, exclude: parts of names; an entry is used if it has one of `include`, where there
    are any, and none of `exclude`."""

    path: str
    digest: str
    missing: str = "default"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Quantize:
    """type: a llama-quantize file type ("MXFP4_MOE"), or any ggml type with pure. overrides: (pattern, ggml type or
    "copy"), first match wins. output_type, token_embedding_type: a ggml type or None. max_bytes: a larger output is not
    written. quality: one of quant.arrays.QUALITIES."""

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


@dataclass(frozen=True)
class PlanData:
    """Everything that determines the output, bar the source's bytes."""

    source: str  # path of the (first) file
    header_sha256: str  # of the header bytes of all its shards
    edits: tuple[Edit, ...] = ()
