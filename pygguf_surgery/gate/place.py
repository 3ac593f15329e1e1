"""Which tensor is in which file, and where."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .._core import TensorInfo, encode_header
from ..base.errors import SurgeryError
from ..edits import split as split_edit
from ..files.model import Model
from ..plan_data.edits import Split
from ..plan_data.expressions import OutputTensor
from ..quant.types import tensor_type
from .checked import OutputFile

if TYPE_CHECKING:
    from .checked import CheckedPlan


def target_bytes(tensor: OutputTensor) -> int:
    facts = tensor_type(tensor.type)
    elements = math.prod(tensor.shape)
    return -(-elements // facts.block) * facts.block_bytes


def lay_out(model: Model, checked: CheckedPlan, split: Split | None) -> None:
    """Which tensor is in which file, and where."""
    parts = [list(range(len(checked.tensors)))]
    if split is not None:
        partition = split_edit.partition(
            split,
            checked.nbytes,
            [_shard_of(model, t) for t in checked.tensors],
            checked.alignment,
            source_count=len(model.sources),
            names=[t.name for t in checked.tensors],
        )
        parts, checked.split = partition.shards, not partition.single
        checked.add(partition)
    offsets = [0] * len(checked.tensors)
    try:
        for number, part in enumerate(parts):
            metadata = (
                checked.metadata
                if not checked.split
                else split_edit.shard_metadata(
                    checked.metadata, number, len(parts), len(checked.tensors), checked.alignment
                )
            )
            infos = [
                TensorInfo(t.name, t.shape[::-1], tensor_type(t.type).id) for t in (checked.tensors[i] for i in part)
            ]
            header, at, file_bytes = encode_header(list(metadata.items()), infos, checked.alignment)
            for i, offset in zip(part, at, strict=True):
                offsets[i] = offset
            checked.files.append(OutputFile(part, metadata, header, file_bytes))
        checked.offsets = offsets
        checked.file_bytes = sum(file.file_bytes for file in checked.files)
    except SurgeryError as error:
        if not checked.blockers:  # else it is one of them again
            checked.block(error)
        padded = [-(-n // checked.alignment) * checked.alignment for n in checked.nbytes]
        checked.files = [OutputFile(part, checked.metadata, b"", sum(padded[i] for i in part)) for part in parts]
        checked.file_bytes = sum(padded)


def _shard_of(model: Model, tensor: OutputTensor) -> int:
    return model.tensors[tensor.expression.refs[0]].source
