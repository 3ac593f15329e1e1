"""Opening a model: one file, or all shards of a split model."""

from __future__ import annotations

import os

from .._core import Source, Value, read_header
from ..base.errors import BadFile
from .model import FileHeader, Model, read_text
from .shards import EXAMPLE, parse_shard, shard_names


def open_model(path: str | os.PathLike[str], *, strict: bool = False, metadata_only: bool = False) -> Model:
    """Opens a GGUF file, read-only; for any shard of a split model, all its shards. No tensor data is read.

    strict: what is only a warning by default (Model.warnings) is an error. metadata_only: accept a file whose tensor
    data is missing. Errors: OSError (no such file, no permission), BadFile.
    """
    opened: list[Source] = []

    def read(shard: str) -> tuple[Source, FileHeader]:
        opened.append(Source(shard))
        return opened[-1], read_header(opened[-1], strict=strict, metadata_only=metadata_only)

    try:
        # Absolute: the file is found again after a chdir. Not normalized: "link/.." is not ".".
        path = os.fsdecode(path)
        if path and not os.path.isabs(path):
            path = os.path.join(os.getcwd(), path)
        first = read(path)
        count = _whole(dict(first[1].metadata), "split.count", path, default=0)
        if count <= 1:
            return Model([first[0]], [first[1]], metadata_only=metadata_only)
        paths = _shard_paths(path, count)
        shards = [first if shard == path else read(shard) for shard in paths]
        headers = [header for _, header in shards]
        _check_shards(paths, headers)
        return Model([source for source, _ in shards], headers, metadata_only=metadata_only)
    except BaseException:
        for source in opened:
            source.close()
        raise


def _whole(items: dict[str, Value], key: str, path: str, default: int | None = None) -> int:
    if key not in items:
        if default is None:
            raise BadFile("missing key of a shard", path=path, object=key)
        return default
    value: object = items[key].value
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadFile("not a whole number", path=path, object=key, found=items[key].type)
    return value


def _shard_paths(path: str, count: int) -> list[str]:
    shard = parse_shard(path)
    if shard is None or not path.endswith(".gguf"):
        raise BadFile(
            "a shard of a split model with an unusual name",
            path=path,
            object="split.count",
            found=count,
            expected=EXAMPLE,
            hint="rename the shards: the name says where the others are",
        )
    if shard.total != count:
        raise BadFile(
            "the number of shards in the name and in the file differ",
            path=path,
            object="split.count",
            found=count,
            expected=shard.total,
        )
    paths = shard_names(shard.prefix, count)
    missing = [other for other in paths if not os.path.exists(other)]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadFile(
            f"missing shard {os.path.basename(missing[0])}{more}",
            path=path,
            object="split.count",
            found=count - len(missing),
            expected=count,
        )
    return paths


def _check_shards(paths: list[str], headers: list[FileHeader]) -> None:
    total = sum(len(header.tensors) for header in headers)
    architecture = None
    for number, (path, header) in enumerate(zip(paths, headers, strict=True)):
        items = dict(header.metadata)
        for key, expected in (("split.no", number), ("split.count", len(paths)), ("split.tensors.count", total)):
            found = _whole(items, key, path)
            if found != expected:
                raise BadFile(
                    "shards that do not belong together", path=path, object=key, found=found, expected=expected
                )
        name = read_text(items, "general.architecture", path)
        if number == 0:
            architecture = name
        elif name and name != architecture:
            raise BadFile(
                "shards of different architectures",
                path=path,
                object="general.architecture",
                found=name,
                expected=architecture,
            )
