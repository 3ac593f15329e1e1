"""The file of a repair: new down projections for the experts that a cut keeps, as experts.repair writes them."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TypeGuard

from .._core import Source, read_header
from ..base.errors import BadFile, SurgeryError
from ..plan_data.choices import Keep
from ..quant.types import type_of_id
from .subjects import read_subject

FORMAT = 1
PREFIX = "pgs.repair."
MODEL = "pgs.repair.model."


@dataclass(frozen=True)
class RepairedTensor:
    """One tensor of a repair: its rows stand in place of those of the experts that are kept."""

    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Repair:
    """An open repair, as a plan takes it. kept: layer -> ids of the experts that it is for, MTP layers included.
    tensors: by name. errors: {layer: (before, after)}. digest: sha256 of the header and of a part of each tensor. of:
    the model that it was made from, None in files of older versions; header_sha256 is that model's in all."""

    def __init__(self, source: Source):
        self.source, self.path = source, source.path
        header = read_header(source)
        metadata = {key: value.value for key, value in header.metadata}
        if metadata.get("general.type") != "expert_repair" or metadata.get(PREFIX + "format") != FORMAT:
            raise BadFile(
                "not a repair of experts",
                path=self.path,
                object="general.type",
                found=metadata.get("general.type"),
                expected="expert_repair",
                hint="gguf-surgery repair makes them",
            )
        layers = metadata.get(PREFIX + "layers")
        if not _whole_numbers(layers):
            raise BadFile("missing metadata", path=self.path, object=PREFIX + "layers")
        self.kept: dict[int, tuple[int, ...]] = {}
        for layer in layers:
            ids = metadata.get(f"{PREFIX}{layer}.kept")
            if not _whole_numbers(ids) or not ids:
                raise BadFile("missing metadata", path=self.path, object=f"{PREFIX}{layer}.kept")
            self.kept[layer] = tuple(ids)
        self.metric = str(metadata.get(PREFIX + "metric", "given"))
        self.header_sha256 = str(metadata.get(MODEL + "header_sha256", ""))
        try:
            self.of = read_subject(dict(header.metadata), MODEL)
        except BadFile as error:
            error.path = self.path
            raise
        self.tensors = {
            info.name: RepairedTensor(
                type_of_id(info.type).name, tuple(reversed(info.ne)), header.data_offset + info.offset, info.nbytes
            )
            for info in header.tensors
        }
        self.errors: dict[int, tuple[float, float]] = {}
        errors = self.tensors.pop("errors", None)
        repaired = [layer for layer in self.kept if f"blk.{layer}.ffn_down_exps.weight" in self.tensors]
        if errors is not None and errors.type == "F64" and errors.shape == (len(repaired), 2):
            pairs = source.read(errors.offset, errors.nbytes).view("<f8").reshape(-1, 2)
            self.errors = {layer: (float(a), float(b)) for layer, (a, b) in zip(repaired, pairs, strict=True)}
        digest = hashlib.sha256(source.read(0, header.data_offset).data)
        for tensor in self.tensors.values():
            digest.update(source.read(tensor.offset, min(tensor.nbytes, 4096)).data)
        self.digest = digest.hexdigest()

    def close(self) -> None:
        self.source.close()

    def keep(self) -> Keep:
        """The experts that it is for."""
        return Keep(self.kept, self.metric, of=self.of)

    def summary(self) -> str:
        lines = [
            "repaired down projections: squared error of a layer's output, as a share of its squares, on tokens held "
            "back",
            f"{'layer':>5} {'cut':>8} {'repaired':>8}",
        ]
        lines += [f"{layer:>5} {before:>8.4f} {after:>8.4f}" for layer, (before, after) in self.errors.items()]
        return "\n".join(lines)


def _whole_numbers(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(x) is int for x in values)


def open_repair(path: str | os.PathLike[str]) -> Repair:
    """Opens a repair, read-only. BadFile for a file of another kind, OSError."""
    source = Source(os.path.abspath(os.fsdecode(path)))
    try:
        return Repair(source)
    except (SurgeryError, OSError):
        source.close()
        raise
