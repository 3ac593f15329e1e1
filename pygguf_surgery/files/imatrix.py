"""Importance matrices, as llama-imatrix writes them: read both of its formats, write GGUF.

An entry belongs to one tensor of a model. It has a float for each of the tensor's columns, for each expert or head if
the tensor is 3-D: the sum of the squared inputs that the column was multiplied with. The counts say how many inputs
there were. Opening a file reads its names and counts; the sums, maybe hundreds of megabytes, stay in the file.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .._core import Source, TensorInfo, Value, read_header
from ..base.errors import BadFile, BadPlan, SurgeryError
from ..plan_data.subject import Subject
from ..quant.types import tensor_type
from .gguf import write_gguf
from .subjects import read_subject, write_subject

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    from .gguf import Data

    # Streamed sums: how many, and a function that gives them in pieces.
    Sums = tuple[int, Callable[[], Iterable[NDArray[np.float32]]]]


POLICIES = ("default", "fail", "ones", "layer-mean")
CHUNK_SIZE = 512  # tokens of a chunk where a file does not say: the default of llama-imatrix

_SUMS, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNK_COUNT, CHUNK_SIZE_KEY = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_MODEL = "pgs.imatrix.model."
_PIECE = 16 << 20  # bytes of sums in memory at once
_DIGESTED = 16  # sums of an entry in the digest
_COUNTS_MOST = 1 << 20  # rows of an entry: experts or heads
_NAME_MOST = 4096  # bytes of a tensor's name in a legacy file
_TEXT_MOST = 1 << 20  # bytes of its data set


class Entry:
    """One tensor's entry. name: of the tensor. size: floats of the sums. counts: float32, rounded to whole numbers as
    llama-quantize does, one for all rows or one for each; of a legacy file the number of chunks. offset: byte of the
    first sum in the file."""

    __slots__ = ("counts", "legacy", "name", "offset", "size")

    def __init__(self, name: str, size: int, counts: NDArray[np.float32], offset: int, legacy: bool = False):
        self.name, self.size, self.counts, self.offset, self.legacy = name, size, counts, offset, legacy

    def __repr__(self) -> str:
        return f"<Entry {self.name} {self.size} sums, {len(self.counts)} counts>"

    def rows(self, row_elements: int) -> int:
        """How many rows of this length it has; BadPlan if it is not made of whole rows."""
        if row_elements < 1 or self.size % row_elements or self.size // len(self.counts) % row_elements:
            raise BadPlan(
                "importance of another size",
                object=self.name,
                found=f"{self.size} values, {len(self.counts)} counts",
                expected=f"rows of {row_elements}",
            )
        return self.size // row_elements

    def divisor(self, row: int, row_elements: int) -> float:
        """What the sums of a row are divided by, in float32. 0.0: nothing was counted, llama-quantize takes ones."""
        count = float(self.counts[row * len(self.counts) // self.rows(row_elements)])
        return 1.0 if self.legacy and count <= 0 else count


class Imatrix:
    """An open importance matrix. A context manager; may be shared by threads. Made by `open`.

    path: absolute. format: "gguf" or "legacy". datasets: the texts it was made from. chunk_count, chunk_size: how many
    pieces of text, tokens of each (0 where the file does not say). entries: by name, sorted as llama.cpp sorts. digest:
    sha256 of all this with names, sizes, counts, the first sums of each entry and the size of the file. source: the
    open file. warnings: what is odd and harmless. of: the model that it is for, which `slice` writes; None where the
    file does not say, as llama-imatrix's do not.
    """

    def __init__(
        self,
        source: Source,
        format: str,
        datasets: list[str],
        chunk_count: int,
        chunk_size: int,
        entries: Iterable[Entry],
        warnings: Sequence[str] = (),
        of: Subject | None = None,
    ):
        self.source, self.path, self.format = source, source.path, format
        self.datasets, self.chunk_count, self.chunk_size = datasets, chunk_count, chunk_size
        self.entries = {e.name: e for e in sorted(entries, key=lambda e: name_bytes(e.name))}
        self.warnings, self.of = list(warnings), of
        self.digest = self._digest()
        known = _KNOWN.pop((source.identity, self.digest), None) or _Known()
        _KNOWN[source.identity, self.digest] = known  # the one used last is the last
        while len(_KNOWN) > _KNOWN_MOST:
            _KNOWN.pop(next(iter(_KNOWN)), None)
        self._scans, self._means = known.scans, known.means

    def __repr__(self) -> str:
        return f"<Imatrix {self.path} ({self.format}, {len(self.entries)} entries)>"

    def __enter__(self) -> Imatrix:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.source.close()

    def _digest(self) -> str:
        head = [
            self.format,
            self.source.size,
            self.datasets,
            self.chunk_count,
            self.chunk_size,
            [[e.name, e.size, len(e.counts)] for e in self.entries.values()],
            *([] if self.of is None else [self.of.to_json()]),
        ]
        digest = hashlib.sha256(json.dumps(head).encode())
        for entry in self.entries.values():
            digest.update(entry.counts.astype("<f4").tobytes())
            # A dense model's counts are the same for every text of that length, but not the sums.
            digest.update(self.source.read(entry.offset, 4 * min(entry.size, _DIGESTED)).data)
        return digest.hexdigest()

    # --- values -----------------------------------------------------------------------------------------------------

    def sums(self, name: str) -> NDArray[np.float32]:
        """All sums of an entry, shape [size]."""
        return self._read(self.entries[name], 0, self.entries[name].size)

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        """The sums in order, at most 16 MiB at a time."""
        for _, piece in self._pieces(self.entries[name], 1):
            yield piece

    def importance(self, name: str) -> NDArray[np.float32]:
        """The values that llama-quantize hands to ggml, bit for bit: sums / count, ones where the count is 0."""
        import numpy as np

        entry = self.entries[name]
        values = self.sums(name).reshape(len(entry.counts), -1)
        if entry.legacy:
            return (values / entry.counts[0] if entry.counts[0] > 0 else values).ravel()
        counts = entry.counts[:, None]
        return np.divide(values, counts, out=np.ones_like(values), where=counts > 0).ravel()

    def mean_row(self, name: str, row_elements: int) -> NDArray[np.float32]:
        """The sums of all rows that were seen over their counts, in float64, then float32; shape [row_elements].
        Ones if no row was seen."""
        import numpy as np

        key = name, row_elements
        if key not in self._means:
            entry = self.entries[name]
            rows, unseen = entry.rows(row_elements), set(self.unseen(name, row_elements))
            total, tokens = np.zeros(row_elements), 0.0
            for first, piece in self._pieces(entry, row_elements):
                each = piece.reshape(-1, row_elements)
                seen = [i for i in range(len(each)) if first + i not in unseen]
                total += each[seen].sum(axis=0, dtype=np.float64)
                tokens += sum(entry.divisor(first + i, row_elements) for i in seen)
            mean = total / tokens if len(unseen) < rows else np.ones(row_elements)
            self._means[key] = mean.astype(np.float32)
        return self._means[key]

    # --- what is wrong with them ------------------------------------------------------------------------------------

    def problem(self, name: str) -> SurgeryError | None:
        """The first value that is NaN, infinite or negative, as a BadFile to raise. Reads all its sums once."""
        entry = self.entries[name]
        done = next((scan for (other, _), scan in list(self._scans.items()) if other == name), None)
        found = (done or self._scan(name, entry.size // len(entry.counts))).problem
        if found is None:
            return None
        # What was scanned outlives this object and is shared: an error that was raised would hold on to its frames.
        error = copy.copy(found)
        error.path = self.path
        return error

    def zero_rows(self, name: str, row_elements: int) -> list[int]:
        """Rows that were counted and are all zero: no quantizer can weigh with them. Reads all sums, once."""
        return self._scan(name, row_elements).zero

    def unseen(self, name: str, row_elements: int) -> list[int]:
        """Rows that nothing was counted for. A legacy file has lost the counts: of an entry with several rows they are
        the rows whose sums all equal the number of chunks, as llama-imatrix writes them (this reads all sums, once)."""
        entry = self.entries[name]
        if entry.legacy:
            return self._scan(name, row_elements).constant if entry.rows(row_elements) > 1 else []
        each = entry.rows(row_elements) // len(entry.counts)
        return [i * each + j for i, count in enumerate(entry.counts.tolist()) if count == 0 for j in range(each)]

    def _scan(self, name: str, row_elements: int) -> _Scan:
        key = name, row_elements
        if key not in self._scans:
            self._scans[key] = _Scan(self, self.entries[name], row_elements)
        return self._scans[key]

    def _read(self, entry: Entry, first: int, count: int) -> NDArray[np.float32]:
        import numpy as np

        return self.source.read(entry.offset + 4 * first, 4 * count).view("<f4").astype(np.float32, copy=False)

    def _pieces(self, entry: Entry, row_elements: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(number of the first row, whole rows), within _PIECE unless a single row is larger."""
        rows = entry.rows(row_elements)
        step = max(1, _PIECE // (4 * row_elements))
        for first in range(0, rows, step):
            yield first, self._read(entry, first * row_elements, min(step, rows - first) * row_elements)


@dataclass
class _Known:
    """What was read of the sums of a file, whoever opened it: a plan that is fitted, checked and written opens its
    importance matrix several times, and hundreds of megabytes are scanned once."""

    scans: dict[tuple[str, int], _Scan] = field(default_factory=dict)  # by name and elements of a row
    means: dict[tuple[str, int], NDArray[np.float32]] = field(default_factory=dict)


_KNOWN: dict[tuple[tuple[int, int, int, int], str], _Known] = {}  # by identity and digest of the file
_KNOWN_MOST = 4  # files


class _Scan:
    """One pass over an entry's sums: the first bad value, the rows that are all zero, those that are all the number of
    chunks."""

    def __init__(self, imatrix: Imatrix, entry: Entry, row_elements: int):
        import numpy as np

        self.problem: SurgeryError | None = None
        self.zero: list[int] = []
        self.constant: list[int] = []
        for first, piece in imatrix._pieces(entry, row_elements):
            each = piece.reshape(-1, row_elements)
            most, least = each.max(axis=1), each.min(axis=1)  # NaN if one is
            if self.problem is None and not ((least >= 0).all() and np.isfinite(most).all()):
                at = int(np.argmin(np.isfinite(piece) & (piece >= 0)))
                element = first * row_elements + at
                what = "is negative" if piece[at] < 0 and np.isfinite(piece[at]) else "is not finite"
                self.problem = BadFile(
                    f"importance that {what}",
                    path=imatrix.path,
                    object=entry.name,
                    offset=entry.offset + 4 * element,
                    found=f"{piece[at]} in element {element}",
                )
            for i, (low, high) in enumerate(zip(least, most, strict=True), first):
                divisor = entry.divisor(i, row_elements)
                if divisor > 0 and high / np.float32(divisor) == 0:  # the quotient is what counts: it may underflow
                    self.zero.append(i)
                elif entry.legacy and low == high == entry.counts[0]:
                    self.constant.append(i)


def name_bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


# --- reading --------------------------------------------------------------------------------------------------------


def open_imatrix(path: str | os.PathLike[str]) -> Imatrix:
    """Opens an importance matrix of llama-imatrix, GGUF or legacy (.dat), read-only. No sums are read.

    Errors: OSError; BadFile for what llama-quantize refuses, for counts that are negative or not finite, and for a file
    of another kind.
    """
    path = os.fsdecode(path)
    if path and not os.path.isabs(path):
        path = os.path.join(os.getcwd(), path)
    source = Source(path)
    try:
        if source.size >= 4 and source.read(0, 4).tobytes() == b"GGUF":
            return _open_gguf(source)
        return _open_legacy(source)
    except BaseException:
        source.close()
        raise


def _open_gguf(source: Source) -> Imatrix:
    header = read_header(source)
    metadata = dict(header.metadata)
    for key in (_DATASETS, _CHUNK_COUNT, CHUNK_SIZE_KEY):
        if key not in metadata:
            hint = "this is a model, not an importance matrix" if "general.architecture" in metadata else None
            raise BadFile("missing metadata of an importance matrix", path=source.path, object=key, hint=hint)
        wanted = "str[]" if key == _DATASETS else "u32"
        if metadata[key].type != wanted:
            raise BadFile(
                "metadata of another type", path=source.path, object=key, found=metadata[key].type, expected=wanted
            )
    sums: dict[str, TensorInfo] = {}
    counts: dict[str, TensorInfo] = {}
    others = 0
    for tensor in header.tensors:
        for suffix, found in ((_SUMS, sums), (_COUNTS, counts)):
            if tensor.name.endswith(suffix):
                found[tensor.name.removesuffix(suffix)] = tensor
                break
        else:
            others += 1
    for name in {**sums, **counts}:
        for suffix, found in ((_SUMS, sums), (_COUNTS, counts)):
            if name not in found:
                raise BadFile("an entry without one of its two tensors", path=source.path, object=name + suffix)
            if found[name].type != tensor_type("F32").id:
                raise BadFile("sums or counts that are not F32", path=source.path, object=name + suffix)
    if not sums:
        raise BadFile("an importance matrix without entries", path=source.path)
    try:
        of = read_subject(metadata, _MODEL)
    except BadFile as error:
        error.path = source.path
        raise
    entries = [_gguf_entry(source, header.data_offset, name, sums[name], counts[name]) for name in sums]
    warnings = list(header.warnings)
    if others:
        warnings.append(f"{others} tensors that are neither sums nor counts")
    return Imatrix(
        source,
        "gguf",
        metadata[_DATASETS].value,
        metadata[_CHUNK_COUNT].value,
        metadata[CHUNK_SIZE_KEY].value,
        entries,
        warnings,
        of,
    )


def _gguf_entry(source: Source, data_offset: int, name: str, sums: TensorInfo, counts: TensorInfo) -> Entry:
    import numpy as np

    size, rows = sums.nbytes // 4, counts.nbytes // 4
    if rows < 1 or size < 1 or size % rows or rows > _COUNTS_MOST:
        raise BadFile(
            "sums and counts that do not fit", path=source.path, object=name, found=f"{size} sums, {rows} counts"
        )
    values = source.read(data_offset + counts.offset, counts.nbytes).view("<f4").astype(np.float64)
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0) & (values < 2.0**63)))
    if bad.size:
        raise BadFile(
            "not a count",
            path=source.path,
            object=name + _COUNTS,
            found=values[bad[0]],
            offset=data_offset + counts.offset + 4 * int(bad[0]),
        )
    # lround: halves away from zero
    return Entry(name, size, np.floor(values + 0.5).astype(np.float32), data_offset + sums.offset)


def _open_legacy(source: Source) -> Imatrix:
    """i32 n; n times i32 length, name, i32 ncall, i32 nval, f32[nval]; then, maybe, i32 chunks, i32 length, dataset."""
    import numpy as np

    reader = _LegacyReader(source)
    count = reader.number("entries") if source.size >= 4 else 0
    if not 1 <= count <= source.size // 17 or not 1 <= source.read(4, 4).view("<i4")[0] <= _NAME_MOST:
        raise BadFile(
            "not an importance matrix",
            path=source.path,
            found=_kind(source),
            expected="a GGUF or .dat file of llama-imatrix",
        )
    entries: dict[str, Entry] = {}
    for _ in range(count):
        at = reader.offset
        name = reader.text("name", 1, _NAME_MOST)
        if "\0" in name:
            raise BadFile("a name with a zero byte", path=source.path, offset=at)
        if name in entries:
            raise BadFile("duplicate entry", path=source.path, object=name, offset=at)
        calls = reader.number("calls")
        at = reader.offset
        values = reader.number("values")
        if values < 1:
            raise BadFile("an entry without values", path=source.path, object=name, found=values, offset=at)
        entries[name] = Entry(name, values, np.array([calls], np.float32), reader.skip(4 * values, name), legacy=True)
    chunks, datasets = 0, []
    if reader.offset < source.size:
        chunks = reader.number("chunks")
        if reader.offset < source.size and (dataset := reader.text("dataset", 0, _TEXT_MOST)):
            datasets = [dataset]
    if reader.offset < source.size:
        raise BadFile("bytes after the end", path=source.path, offset=reader.offset)
    return Imatrix(source, "legacy", datasets, max(0, chunks), 0, entries.values())


class _LegacyReader:
    """Fields one after the other, each checked against the size of the file."""

    def __init__(self, source: Source):
        self.source, self.offset = source, 0

    def skip(self, nbytes: int, what: str) -> int:
        """Where the bytes are."""
        at = self.offset
        if nbytes > self.source.size - at:
            raise BadFile(
                "the file ends inside an entry",
                path=self.source.path,
                object=what,
                offset=at,
                found=f"{self.source.size - at} bytes",
                expected=f"{nbytes} bytes",
            )
        self.offset += nbytes
        return at

    def number(self, what: str) -> int:
        return int(self.source.read(self.skip(4, what), 4).view("<i4")[0])

    def text(self, what: str, least: int, most: int) -> str:
        at = self.offset
        length = self.number(what)
        if not least <= length <= most:
            raise BadFile(
                "not a length", path=self.source.path, object=what, found=length, offset=at, expected=f"{least}..{most}"
            )
        return self.source.read(self.skip(length, what), length).tobytes().decode("utf-8", "surrogateescape")


def _kind(source: Source) -> str | None:
    """What a file is that is not an importance matrix, from its first bytes."""
    if source.size == 0:
        return "an empty file"
    head = source.read(0, min(16, source.size)).tobytes()
    if head[:4] in (b"ggjt", b"fmgg", b"lmgg", b"tjgg"):
        return "a model of 2023"
    if head[:2] == b"PK":
        return "a PyTorch or zip file"
    if head[8:9] == b"{":
        return "a safetensors file"
    return "text" if head.isascii() and all(c >= 32 or c in b"\t\r\n" for c in head) else None


# --- writing --------------------------------------------------------------------------------------------------------


def write(
    path: str | os.PathLike[str],
    entries: Mapping[str, tuple[ArrayLike | Sums, ArrayLike]],
    *,
    datasets: Sequence[str] = (),
    chunk_count: int = 0,
    chunk_size: int = CHUNK_SIZE,
    of: Subject | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a GGUF importance matrix, byte for byte as llama-imatrix writes the same numbers.

    entries: name of a tensor -> (sums, counts). sums: float32 of any shape, or (how many, function that returns an
    iterable of float32 arrays). counts: one number, or one for each of the equal parts of sums. of: the
    model that it is for, if the file is to say so. At every instant the
    path has the old file or the new one; BadPlan for parts that do not fit, FileExistsError, OutOfSpace, OSError.
    """
    import numpy as np

    tensors: dict[str, tuple[Data, str, tuple[int, ...]]] = {}
    for name in sorted(entries, key=name_bytes):
        sums, each = entries[name]
        counts = np.atleast_1d(np.asarray(each, np.float32)).ravel()
        data: Data
        if isinstance(sums, tuple):
            size, data = sums
        else:
            array = np.ascontiguousarray(sums, "<f4").ravel()
            size, data = array.size, array
        rows = len(counts)
        if rows < 1 or size < 1 or size % rows:
            raise BadPlan("sums and counts that do not fit", object=name, found=f"{size} sums, {rows} counts")
        if not (np.isfinite(counts) & (counts >= 0)).all():
            raise BadPlan("not a count", object=name, found=counts[~(np.isfinite(counts) & (counts >= 0))][0])
        tensors[name + _SUMS] = data, "F32", _shape(rows, size // rows)
        tensors[name + _COUNTS] = counts.astype("<f4"), "F32", _shape(rows, 1)
    if not tensors:
        raise BadPlan("an importance matrix without entries", path=os.fsdecode(path))
    metadata = {
        "general.type": Value("imatrix", "str"),
        _DATASETS: Value(list(datasets), "str[]"),
        _CHUNK_COUNT: Value(chunk_count, "u32"),
        CHUNK_SIZE_KEY: Value(chunk_size, "u32"),
        **write_subject(of, _MODEL),
    }
    write_gguf(path, metadata, tensors, overwrite=overwrite)


def _shape(rows: int, columns: int) -> tuple[int, ...]:
    return (columns,) if rows == 1 else (rows, columns)  # ggml drops a last axis of 1
