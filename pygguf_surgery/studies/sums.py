"""Sums over the weights of experts, streamed by the core."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .._core import Job, Run, reduce_rows
from ..architecture.experts import Layout
from ..base.errors import BadFile
from ..base.progress import Progress
from ..base.units import parse_memory, parse_threads
from ..files.model import Model, Tensor
from ..quant.types import tensor_type

# --- from the weights ----------------------------------------------------------------------------------------------


class Reduce:
    """Streams tensors of one model through _core.reduce_rows, with one progress over all of them."""

    def __init__(
        self, model: Model, found: Layout, *, memory: int | str, threads: int, io: str, progress: Progress | None
    ):
        self.model, self.layout = model, found
        self.memory, self.threads, self.io = parse_memory(memory), parse_threads(threads), io
        self.progress = progress
        self.done = self.total = 0

    def tensors(self, parts: tuple[str, ...], layers: Sequence[int]) -> dict[int, list[Tensor]]:
        """Those of each of these layers that exist, in the order of `parts`; their bytes add to the total of
        progress."""
        have = self.model.tensors
        chosen = {layer: [have[name] for part in parts if (name := f"blk.{layer}.{part}") in have] for layer in layers}
        self.total += sum(tensor.nbytes for tensors in chosen.values() for tensor in tensors)
        return chosen

    def sums(self, tensors: Sequence[Tensor], columns: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """[len(tensors), E, 2]: sum |w| and sum w^2 of each expert's slice, of tensors of one type and shape. columns
        [E, row length], of one tensor: weights of the columns in the second sum."""
        first, experts = tensors[0], self.layout.experts
        rows = first.elements // first.ne[0]
        job = Job(
            first.name,
            source_type=first.type_id,
            target_type=tensor_type("F32").id,
            row_elements=first.ne[0],
            rows=rows * len(tensors),
            target_offset=0,
            runs=[Run(t.source, t.offset, t.nbytes) for t in tensors],
        )
        report, base = self.progress, self.done
        sums = reduce_rows(
            self.model.sources,
            job,
            rows // experts,
            weights=columns,
            memory=self.memory,
            threads=self.threads,
            io=self.io,
            progress=None if report is None else lambda done, _: report(base + done, self.total),
        )
        self.done += first.nbytes * len(tensors)
        if not np.isfinite(sums).all():
            which, expert = divmod(int(np.flatnonzero(~np.isfinite(sums).all(axis=1))[0]), experts)
            tensor = tensors[which]
            raise BadFile(
                "weights that are not finite",
                path=self.model.paths[tensor.source],
                object=tensor.name,
                found=f"in expert {expert}",
            )
        return sums.reshape(len(tensors), experts, 2)
