"""The names of the shards of a model: NAME-00001-of-00004.gguf, as llama-gguf-split makes them."""

from __future__ import annotations

import re
from typing import NamedTuple

EXAMPLE = "NAME-00001-of-00004.gguf"
_SHARD = re.compile(r"(.*)-[0-9]{5}-of-([0-9]{5})(?:\.gguf)?", re.DOTALL)


class ShardName(NamedTuple):
    """prefix: the path up to the number, the same for all shards. total: how many the name says there are."""

    prefix: str
    total: int


def parse_shard(path: str) -> ShardName | None:
    """The parts of a shard's path, with or without ".gguf"; None for any other."""
    match = _SHARD.fullmatch(path)
    return ShardName(match[1], int(match[2])) if match else None


def shard_names(prefix: str, count: int) -> list[str]:
    """The paths of all shards, in order."""
    return [f"{prefix}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
