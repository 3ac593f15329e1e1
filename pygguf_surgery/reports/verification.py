"""Is a file whole, would llama.cpp load it, and is what was copied equal to the source? Streamed, bounded memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .._core import first_invalid_block
from .._core import quantize as encode
from ..architecture.experts import expert_rule
from ..architecture.loader import check_alignment, check_file, check_name
from ..architecture.names import layer_of
from ..base.errors import BadFile, BadPlan, SurgeryError
from ..base.words import counted
from ..files.lineage import KEPT_LAYERS, SOURCE_SHA256, Lineage
from ..files.model import Model, Tensor
from ..files.open import open_model
from ..quant.types import row_bytes, tensor_type

if TYPE_CHECKING:
    from .origin import Origin


CHUNK_BYTES = 16 << 20
SAMPLE_ROWS = 64  # of a re-encoded tensor, spread over it
LEAST_COSINE = 0.5  # below, a re-encoded tensor is not a coarse copy of its source but another tensor


@dataclass
class Report:
    """What `verify` found. problems: the file is not good, or not what it claims to be; warnings: worth knowing."""

    path: str
    problems: list[SurgeryError] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    compared: bool = False
    tensors: int = 0
    bytes_checked: int = 0
    equal_tensors: int = 0  # byte-equal to the source, whole or by slices
    equal_experts: int = 0  # slices among them
    repaired: list[str] = field(default_factory=list)  # tensors that differ from the source on purpose
    merged: list[str] = field(default_factory=list)  # those with experts made of several
    removed: list[str] = field(default_factory=list)  # tensors that only the source has
    encoded: list[dict[str, Any]] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.problems

    def problem(self, text: str, **fields: Any) -> None:
        self.problems.append(BadFile(text, path=self.path, **fields))

    def faults(self, faults: Iterable[SurgeryError | None]) -> None:
        """Those that rules of the loader have found, without their advice on what to plan."""
        for fault in faults:
            if fault is not None:
                fault.path = self.path
                if isinstance(fault, BadPlan):
                    fault.hint = None
                self.problems.append(fault)

    def summary(self) -> str:
        parts = [f"{self.tensors} tensors", f"{self.bytes_checked} bytes of numbers checked"]
        if self.compared:
            parts.append(f"{self.equal_tensors} byte-equal to the source ({self.equal_experts} expert slices)")
            parts.append(
                f"{len(self.encoded)} re-encoded, "
                f"{sum(e['reproduced'] for e in self.encoded)} of them reproduced in a sample"
            )
            if self.repaired:
                parts.append(f"{len(self.repaired)} repaired, not compared")
            if self.merged:
                parts.append(f"{len(self.merged)} with merged experts")
            if self.removed:
                parts.append(f"{len(self.removed)} tensors of the source removed")
        verdict = "good" if self.good else counted(len(self.problems), "problem")
        return f"{self.path}: {verdict}; {', '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "good": self.good,
            "problems": [str(p) for p in self.problems],
            "warnings": self.warnings,
            "tensors": self.tensors,
            "bytes_checked": self.bytes_checked,
            "equal_tensors": self.equal_tensors,
            "equal_experts": self.equal_experts,
            "repaired": self.repaired,
            "merged": self.merged,
            "removed": self.removed,
            "encoded": self.encoded,
        }


def verify(path: str | os.PathLike[str], against: str | os.PathLike[str] | None = None, *, data: bool = True) -> Report:
    """Reads a file again and reports every problem; raises only OSError.

    Always: the layout that `write` promises and that llama.cpp's reader demands (packed in order, aligned, padded with
    zeros), and llama.cpp's loader checks (required keys, expert counts and shapes, layers). data: every number too, as
    llama.cpp's --check-tensors does: no NaN, no infinity, no invalid block scale. against: the file that this one was
    made from; each tensor of the same type must be byte-equal to it, expert by expert, and each re-encoded one is
    sampled. Memory: about 64 MiB, whatever the sizes.
    """
    report = Report(os.fsdecode(path))
    try:
        model = open_model(path)
    except BadFile as error:
        report.problems.append(error)
        return report
    with model:
        report.tensors = len(model.tensors)
        report.warnings += model.warnings
        _check_layout(model, report)
        shapes = {tensor.name: tensor.shape for tensor in model.tensors.values()}
        report.faults(check_file(model.architecture, model.metadata.exact(), shapes))
        if model.architecture and "tokenizer.ggml.model" not in model.metadata:
            report.warnings.append(
                "tokenizer.ggml.model: missing; llama.cpp loads such a file only without its vocabulary"
            )
        if data:
            for tensor in model.tensors.values():
                _check_data(model, tensor, report)
        if against is not None:
            report.compared = True
            with open_model(against) as source:
                _check_against(model, source, report)
    return report


# --- the file as bytes ---------------------------------------------------------------------------------------------


def _check_layout(model: Model, report: Report) -> None:
    report.faults([check_alignment(model.alignment)])
    ends: dict[int, int] = {}
    for tensor in model.tensors.values():
        report.faults([check_name(tensor.name)])
        end = ends.get(tensor.source)
        if end is not None:
            expected = _aligned(end, model.alignment)
            if tensor.offset != expected:
                report.problem(
                    "not where the tensor before it ends", object=tensor.name, found=tensor.offset, expected=expected
                )
            else:
                _check_padding(model, tensor.source, end, expected, f"padding before {tensor.name}", report)
        ends[tensor.source] = tensor.offset + tensor.nbytes
    for number, end in ends.items():
        size, expected = model.sources[number].size, _aligned(end, model.alignment)
        if size != expected:
            report.problem(
                "the file does not end with its last tensor", object=model.paths[number], found=size, expected=expected
            )
        elif end != size:
            _check_padding(model, number, end, size, "padding at the end", report)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _check_padding(model: Model, source: int, begin: int, end: int, what: str, report: Report) -> None:
    if begin < end and model.sources[source].read(begin, end - begin).any():
        report.problem("padding is not zero", object=what, offset=begin)


# --- the numbers (ggml-quants.c ggml_validate_row_data) -------------------------------------------------------------


def _check_data(model: Model, tensor: Tensor, report: Report) -> None:
    block = tensor_type(tensor.type).block_bytes
    step = CHUNK_BYTES // block * block
    source = model.sources[tensor.source]
    for begin in range(0, tensor.nbytes, step):
        raw = source.read(tensor.offset + begin, min(step, tensor.nbytes - begin))
        report.bytes_checked += len(raw)
        bad = first_invalid_block(raw, tensor.type_id)
        if bad is not None:
            number = begin // block + bad
            word, what = (
                ("block", "invalid scale") if tensor_type(tensor.type).block > 1 else ("element", "NaN or infinity")
            )
            report.problem(f"{what} in {word} {number}", object=tensor.name, offset=tensor.offset + number * block)
            return


# --- the result against its source ---------------------------------------------------------------------------------


def _check_against(model: Model, source: Model, report: Report) -> None:
    from .origin import origin_of, source_name

    if source.architecture != model.architecture:
        report.problem(
            "another architecture than its source",
            object="general.architecture",
            found=model.architecture,
            expected=source.architecture,
        )
    mine, theirs = Lineage.of(model.metadata.exact()), Lineage.of(source.metadata.exact())
    if mine.source_sha256 not in (None, source.header_sha256, theirs.source_sha256):  # the last: of an earlier cut
        report.problem(
            "made from another file, by its own account",
            object=SOURCE_SHA256,
            found=mine.source_sha256,
            expected=source.header_sha256,
        )
    lineage = mine.since(theirs)
    kept, layers = lineage.slices(), lineage.layers
    for tensor in model.tensors.values():
        origin = origin_of(tensor, source, kept, layers)
        if lineage.is_repaired(tensor.name) and not isinstance(origin, str):
            report.repaired.append(tensor.name)
            continue
        if isinstance(origin, str):
            report.problem(origin, object=tensor.name)
            continue
        rule = expert_rule(tensor.name)
        if merged := lineage.merged_slices(tensor.name):
            report.merged.append(tensor.name)
            _check_singles(model, tensor, origin, merged, report)
        elif rule is not None and rule.axis == "values":
            layer = layer_of(tensor.name)
            ids = [i for i in kept[layer] if i is not None] if layer in kept else None
            _check_remap(model, tensor, origin, ids, report)
        elif tensor.type == origin.tensor.type:
            _check_equal(model, tensor, origin, report)
        else:
            _check_encoded(model, tensor, origin, report)
    count = model.get("block_count")
    left = range(count) if layers is None and isinstance(count, int) else layers
    if layers is not None and len(layers) != count:
        report.problem("not one number per layer", object=KEPT_LAYERS, found=len(layers), expected=count)
    here = {source_name(name, layers) for name in model.tensors}
    for name in source.tensors:
        if name in here:
            continue
        report.removed.append(name)
        layer = layer_of(name)
        if layer is None or left is None or layer in left:  # else a layer that was dropped
            report.problem("in the source and not here", object=name)


def _check_singles(model: Model, tensor: Tensor, origin: Origin, merged: set[int], report: Report) -> None:
    """Experts that no other was merged into are byte-equal, where the type is."""
    if tensor.type != origin.tensor.type or origin.slices is None:
        return
    size = tensor.nbytes // len(origin.slices)
    for expert, number in enumerate(origin.slices):
        if expert in merged:
            continue
        here = model.sources[tensor.source].read(tensor.offset + expert * size, size)
        if (here != origin.read(expert * size, size)).any():
            report.problem(
                f"expert {expert} differs from expert {number} of the source",
                object=tensor.name,
                offset=tensor.offset + expert * size,
            )
            return
        report.equal_experts += 1


def _check_equal(model: Model, tensor: Tensor, origin: Origin, report: Report) -> None:
    for begin in range(0, tensor.nbytes, CHUNK_BYTES):
        n = min(CHUNK_BYTES, tensor.nbytes - begin)
        here = model.sources[tensor.source].read(tensor.offset + begin, n)
        different = here != origin.read(begin, n)
        if different.any():
            at = begin + int(different.argmax())
            text = "differs from its source"
            if origin.slices is not None:
                number = at // (tensor.nbytes // len(origin.slices))
                text = f"expert {number} differs from expert {origin.slices[number]} of the source"
            report.problem(text, object=tensor.name, offset=tensor.offset + at)
            return
    report.equal_tensors += 1
    report.equal_experts += len(origin.slices or ())


def _check_remap(model: Model, tensor: Tensor, origin: Origin, kept: list[int] | None, report: Report) -> None:
    """Values are expert ids: a kept one has its new number, a dropped one any kept one that its token lacks."""
    import numpy as np

    width = tensor.ne[0]
    old = origin.read(0, origin.nbytes).view("<i4").reshape(-1, width)
    new = model.sources[tensor.source].read(tensor.offset, tensor.nbytes).view("<i4").reshape(-1, width)
    if kept is None:
        good = (old == new).all(axis=1)
    else:
        table = np.full(max(int(old.max(initial=0)), *kept) + 1, -1, np.int32)
        table[kept] = np.arange(len(kept), dtype=np.int32)
        expected, ordered = table[old], np.sort(new, axis=1)
        good = ((new == expected) | (expected < 0)).all(axis=1) & (ordered >= 0).all(axis=1)
        good &= (ordered < len(kept)).all(axis=1) & (np.diff(ordered, axis=1) != 0).all(axis=1)
    if good.all():
        report.equal_tensors += 1
    else:
        report.problem(f"token {int(good.argmin())} names wrong experts", object=tensor.name)


def _check_encoded(model: Model, tensor: Tensor, origin: Origin, report: Report) -> None:
    """A sample of rows, spread over the tensor: its error, and whether encoding the source again gives these bytes
    (without an importance matrix, or for types that ignore it, it must)."""
    import numpy as np

    from .comparison import Sums
    from .origin import decode_rows, whole

    entry: dict[str, Any] = {
        "name": tensor.name,
        "type": tensor.type,
        "source_type": origin.tensor.type,
        "reproduced": False,
    }
    report.encoded.append(entry)
    if not (tensor_type(tensor.type).decodes and tensor_type(origin.tensor.type).decodes):
        report.problem(f"{origin.tensor.type} does not become {tensor.type}", object=tensor.name)
        return
    width = tensor.ne[0] if tensor.ne else 1
    rows, size = tensor.elements // max(1, width), row_bytes(tensor.type, width)
    sample = max(SAMPLE_ROWS, len(origin.slices or ()))  # at least a row of each expert
    encodes = tensor_type(tensor.type).encodes and not tensor_type(tensor.type).needs_importance
    total, same, target = Sums(), encodes, whole(model, tensor)
    for row in sorted({int(i) for i in np.linspace(0, rows - 1, min(rows, sample))}):
        x = decode_rows(origin, tensor, row, 1)
        sums = Sums()
        sums.add(x, decode_rows(target, tensor, row, 1))
        total.pool(sums)
        if encodes:
            again = encode(x, tensor.type_id, None, 1)
            same &= bool((again.ravel() == target.read(row * size, size)).all())
        cosine = sums.to_json()["cosine"]
        if cosine is not None and cosine < LEAST_COSINE:
            report.problem(f"row {row} does not resemble its source", object=tensor.name, found=f"cosine {cosine:.3f}")
            break
    entry.update(total.to_json(), reproduced=same)
