"""The C++ core, as Python sees it. Shapes are outermost first; `ne` is ggml's order, fastest first."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__version__: str

class Value:
    """One metadata value, exact: Value(7, "u16"), Value([1, 2], "u8") (an array), Value("x", "str").

    type: u8 i8 u16 i16 u32 i32 f32 bool str u64 i64 f64, or one of these with "[]" for arrays ("str[]"). The constructor
    takes a list with either form. A value that does not fit its type is BadPlan. Immutable, hashable, picklable.
    """

    def __init__(self, value: Any, type: str) -> None: ...
    @staticmethod
    def from_raw(type: str, raw: bytes) -> Value: ...
    @property
    def type(self) -> str: ...
    @property
    def value(self) -> Any: ...  # str with surrogateescape for bytes that are no UTF-8
    @property
    def raw(self) -> bytes: ...  # as encoded in a file, without the type words, length or count
    def head(self, n: int) -> list[Any]: ...  # first elements of an array
    def __len__(self) -> int: ...  # elements of an array, else TypeError
    def __eq__(self, other: object) -> bool: ...
    def __hash__(self) -> int: ...

class TensorInfo:
    def __init__(self, name: str, ne: Sequence[int], type: int) -> None: ...
    name: str
    ne: tuple[int, ...]
    type: int
    offset: int  # relative to the data section
    nbytes: int

class Header:
    version: int
    alignment: int
    data_offset: int  # bytes of the header with its padding
    metadata: list[tuple[str, Value]]
    tensors: list[TensorInfo]
    warnings: list[str]

class Source:
    """A regular file, opened read-only. Safe to share by threads."""

    def __init__(self, path: str, io: str = "pread") -> None: ...
    path: str
    size: int
    identity: tuple[int, int, int, int]  # device, inode, size, mtime_ns
    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]: ...
    def view(
        self, offset: int, nbytes: int
    ) -> NDArray[np.uint8]: ...  # read-only, memory-mapped, keeps the mapping alive
    def check_unchanged(self) -> None: ...
    def close(self) -> None: ...  # later reads: ValueError; views stay valid

def read_header(source: Source, *, strict: bool = False, metadata_only: bool = False) -> Header: ...
def encode_header(
    metadata: Sequence[tuple[str, Value]], tensors: Sequence[TensorInfo], alignment: int
) -> tuple[bytes, list[int], int]:
    """(header bytes with padding, absolute offset of each tensor, bytes of the whole file); fills nbytes and offset."""

class Sink:
    """The atomic output file, for small writers and tests; the engine uses it from C++. A context manager: commits at a
    normal end, removes the temp file after an exception."""

    def __init__(
        self, path: str, size: int, *, overwrite: bool = False, io: str = "auto", inputs: Sequence[Source] = ()
    ) -> None: ...
    def write_at(self, offset: int, data: Any) -> None: ...
    def commit(self) -> None: ...
    def abort(self) -> None: ...
    def __enter__(self) -> Sink: ...
    def __exit__(self, *args: Any) -> None: ...

def types() -> list[dict[str, Any]]:
    """[{"id", "name", "block", "block_bytes", "quantized", "encodes", "decodes", "needs_importance", "uses_importance",
    "has_best"}]; has_best: an encoder with less error than ggml's, which uses importance"""

def type_id(name: str) -> int: ...  # any case; Unsupported with the nearest names
def quantize(
    rows: NDArray[np.float32], type: int, importance: NDArray[np.float32] | None, threads: int, best: bool = False
) -> NDArray[np.uint8]:
    """rows [n, k] -> [n, bytes of a row]. importance [g, k], g divides n: consecutive n / g rows share one. best: see Job."""

def dequantize(rows: NDArray[np.uint8], type: int, threads: int) -> NDArray[np.float32]:
    """rows [n, bytes of a row] -> [n, k]."""

def first_invalid_block(data: NDArray[np.uint8], type: int) -> int | None:
    """Index of the first block (element, for types without blocks) with NaN, infinity or an invalid scale: ggml's rules."""

def kernels() -> str: ...  # the set that runs: avx512, avx2, scalar, or ggml; PGS_KERNELS forces one
def ggml_version() -> str: ...

class Job:
    """One output tensor: its source bytes are the runs, concatenated, or `literal`."""

    def __init__(
        self,
        name: str,
        *,
        source_type: int,
        target_type: int,
        row_elements: int,
        rows: int,
        target_offset: int,
        runs: NDArray[np.uint64] | None = None,  # [n, 3]: source index, byte offset, bytes
        literal: bytes | None = None,
        importance: NDArray[np.float32] | None = None,  # [m, row_elements]
        # [g, 2]: (source index, byte offset) of row_elements float32, or (IN_MEMORY, row of `importance`). Without it
        # the g rows are those of `importance`. g divides rows: consecutive rows / g share an importance row.
        importance_rows: NDArray[np.uint64] | None = None,
        importance_divisors: NDArray[np.float32] | None = None,  # [g]: each value read is divided by it, in float32
        remap: tuple[Sequence[int], Sequence[int], int] | None = None,  # table, substitutes, column
        # [g] lists of (byte offset, order): the first is the importance row itself, the sums at the others are added to
        # it before it is divided. order: index into the orders of `merge`, or AS_IS.
        importance_parts: Sequence[Sequence[tuple[int, int]]] | None = None,
        # (rows of a slice, columns, orders, groups of (slice, order or AS_IS, weight)): output slice g is the weighted mean
        # of the source's slices in groups[g], the first its centroid, neurons reordered: rows, or columns.
        merge: tuple[int, bool, Sequence[NDArray[np.uint32]], Sequence[Sequence[tuple[int, int, float]]]] | None = None,
        file: int = 0,  # index of the output file
        best: bool = False,  # with less error than ggml's encoder, where the type has_best; else ggml's bytes
    ) -> None: ...

FILL: int  # the "source index" of runs whose offset is four bytes, little-endian, to be repeated
AS_IS: int  # the "order" of a member of a merge whose neurons stay where they are
IN_MEMORY: int  # the "source index" of importance rows that the job itself holds

def thread_count(asked: int) -> int: ...  # asked, or for 0 what PGS_THREADS says, or all CPUs
def plan_budget(jobs: Sequence[Job], *, memory: int, threads: int, io: str) -> dict[str, int]:
    """{"threads", "tile_bytes", "buffer_bytes"}"""

def run(
    sources: Sequence[Source],
    outputs: Sequence[tuple[str, bytes, int]],  # path, header, bytes of the whole file
    jobs: Sequence[Job],
    *,
    memory: int,
    threads: int,
    io: str,
    overwrite: bool,
    progress: Callable[[int, int], object] | None,
) -> dict[str, int]:
    """Writes the files. {"bytes_read", "bytes_written", "elements_encoded", "buffer_bytes", "threads"}.
    An exception from progress, KeyboardInterrupt included, cancels and leaves nothing behind."""

def reduce_rows(
    sources: Sequence[Source],
    job: Job,
    rows_per_group: int,
    *,
    weights: NDArray[np.float64] | None = None,
    memory: int,
    threads: int,
    io: str,
    progress: Callable[[int, int], object] | None = None,
) -> NDArray[np.float64]:
    """[groups, 2]: sum |w| and sum w^2 of each group of consecutive rows; with weights, [groups, row_elements], the
    second is the sum of weight * w^2."""
