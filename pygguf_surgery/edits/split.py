"""Shards: which tensor is in which, their keys and their names, as llama-gguf-split makes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from .._core import Value
from ..base.errors import BadPlan, SurgeryError
from ..base.units import human
from ..files.shards import parse_shard, shard_names
from ..plan_data.edits import Split
from ..plan_data.outcome import Faults

MAX_SHARDS = 65535  # split.count is a u16
MAX_TENSORS = 128  # llama-gguf-split's number, where nothing else is said


@dataclass
class Partition(Faults):
    """shards: the tensors of each, by number, ascending; together every tensor once. single: one plain file, without
    the keys and the name of a shard. With blockers it is one file."""

    shards: list[list[int]]
    single: bool = False


def partition(
    split: Split,
    nbytes: Sequence[int],
    source_shards: Sequence[int],
    alignment: int,
    *,
    source_count: int = 1,
    names: Sequence[str] = (),
) -> Partition:
    """nbytes: of each output tensor, without padding; source_shards: the shard of the input that it comes from, of
    source_count; names: for warnings.

    max_bytes bounds the padded bytes of a shard's tensors, without its header: a shard is closed when the next tensor
    would exceed it. A larger tensor is alone in its shard and named in a warning. keep: shards left without a tensor
    go, but the first, which has the metadata.
    """
    everything = list(range(len(nbytes)))
    if blockers := _check(split):
        return Partition([everything], single=True, blockers=blockers)
    warnings: list[str] = []
    if split.keep:
        if source_count <= 1:
            return Partition([everything], single=True)
        kept: dict[int, list[int]] = {shard: [] for shard in range(source_count)}
        for i in everything:
            kept[source_shards[i]].append(i)
        shards = [tensors for shard, tensors in kept.items() if tensors or shard == 0]
    elif split.max_bytes is not None:
        padded = [-(-n // alignment) * alignment for n in nbytes]
        shards = _by_bytes(padded, split.max_bytes)
        large = [i for i, n in enumerate(padded) if n > split.max_bytes]
        if large:
            i = max(large, key=lambda i: padded[i])
            more = f"; {len(large) - 1} more tensors are too large" if len(large) > 1 else ""
            warnings.append(
                f"{names[i] if i < len(names) else f'tensor {i}'} alone has {human(padded[i])}, more than "
                f"the {human(split.max_bytes)} of a shard{more}"
            )
    else:
        n = MAX_TENSORS if split.max_tensors is None else split.max_tensors
        shards = [everything[first : first + n] for first in range(0, len(everything), n)] or [[]]
    if split.first_empty:
        shards.insert(0, [])
    if len(shards) > MAX_SHARDS:
        return Partition(
            [everything],
            single=True,
            blockers=[
                BadPlan(
                    "more shards than llama.cpp can count",
                    object="split",
                    found=len(shards),
                    expected=f"at most {MAX_SHARDS}",
                )
            ],
        )
    return Partition(shards, warnings=warnings)


def _check(split: Split) -> list[SurgeryError]:
    given = [
        name
        for name, value in (
            ("max_bytes", split.max_bytes),
            ("max_tensors", split.max_tensors),
            ("keep", split.keep or None),
        )
        if value is not None
    ]
    if len(given) > 1:
        return [BadPlan("only one of these can say how to split", object="split", found=" and ".join(given))]
    if split.keep and split.first_empty:
        return [BadPlan("the first shard is as in the input, or empty", object="split", found="keep and first_empty")]
    for name, value in (("max_bytes", split.max_bytes), ("max_tensors", split.max_tensors)):
        if value is not None and value < 1:
            return [BadPlan("less than one", object=name, found=value)]
    return []


def _by_bytes(padded: Sequence[int], most: int) -> list[list[int]]:
    shards: list[list[int]] = [[]]
    size = 0
    for i, n in enumerate(padded):
        if size + n > most and shards[-1]:  # llama-gguf-split has no empty shards: it fails on a first tensor too large
            shards.append([])
            size = 0
        shards[-1].append(i)
        size += n
    return shards


def shard_metadata(
    metadata: dict[str, Value], number: int, count: int, tensors: int, alignment: int
) -> dict[str, Value]:
    """The keys of shard `number`, from 0, of `count`; tensors: of all shards. The first has all metadata, the others
    only what tells them from each other, and how they are aligned where that is not 32."""
    if number == 0:
        result = {key: value for key, value in metadata.items() if not key.startswith("split.")}
    else:
        result = {} if alignment == 32 else {"general.alignment": Value(alignment, "u32")}
    # llama-gguf-split's order: it sets the count again when it knows it.
    result["split.no"] = Value(number, "u16")
    result["split.tensors.count"] = Value(tensors, "i32")
    result["split.count"] = Value(count, "u16")
    return result


def shard_paths(path: str | os.PathLike[str], count: int) -> list[str]:
    """PATH-00001-of-00003.gguf, ..., for PATH with or without ".gguf". BadPlan where PATH names a shard."""
    path = os.fsdecode(path)
    prefix = path.removesuffix(".gguf")
    if (shard := parse_shard(path)) is not None:
        raise BadPlan(
            "the name of a shard, and the output has shards of its own",
            path=path,
            hint=f"name it {os.path.basename(shard.prefix) or 'NAME'}.gguf: the numbers are added",
        )
    if not os.path.basename(prefix):
        raise BadPlan("not a file name", path=path)
    return shard_names(prefix, count)
