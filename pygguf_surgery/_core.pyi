"""The C++ core, as Python sees it. Shapes are outermost first; `ne` is ggml's order, fastest first."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__version__: str

class Value:
    """One metadata value, exact: Value(7, "u16"), Value([1, 2], "u8") (an array), Value("x", "str").

    type: u8 i8 u16 i16 u32 i32 f32 bool str u64 i64 f64, or one of these with "[]" for arrays ("str[]"). The
    constructor takes a list with either form. A value that does not fit its type is BadPlan. Immutable, hashable,
    picklable.
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
    def __bool__(self) -> bool: ...  # True, also of an empty array
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
    """What read_header found."""

    @property
    def version(self) -> int: ...
    @property
    def alignment(self) -> int: ...
    @property
    def data_offset(self) -> int: ...  # bytes of the header with its padding
    @property
    def metadata(self) -> list[tuple[str, Value]]: ...
    @property
    def tensors(self) -> list[TensorInfo]: ...
    @property
    def warnings(self) -> list[str]: ...

class Source:
    """A regular file, opened read-only. Safe to share by threads."""

    def __init__(self, path: str, io: str = "pread") -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def identity(self) -> tuple[int, int, int, int]: ...  # device, inode, size, mtime_ns
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

class TypeFacts:
    """What there is to know of a ggml type."""

    @property
    def id(self) -> int: ...
    @property
    def name(self) -> str: ...  # as ggml writes it: "Q4_K"
    @property
    def block(self) -> int: ...  # elements of a block
    @property
    def block_bytes(self) -> int: ...
    @property
    def quantized(self) -> bool: ...  # blocks share scales
    @property
    def encodes(self) -> bool: ...
    @property
    def decodes(self) -> bool: ...
    @property
    def needs_importance(self) -> bool: ...  # the encoder cannot do without
    @property
    def uses_importance(self) -> bool: ...  # an importance changes the bytes
    @property
    def has_best(self) -> bool: ...  # there is an encoder with less error than ggml's, which uses importance

def types() -> list[TypeFacts]: ...
def quantize(
    rows: NDArray[np.float32], type: int, importance: NDArray[np.float32] | None, threads: int, best: bool = False
) -> NDArray[np.uint8]:
    """rows [n, k] -> [n, bytes of a row]. importance [g, k], g divides n: consecutive n / g rows share one. best: see
    Job."""

def dequantize(rows: NDArray[np.uint8], type: int, threads: int) -> NDArray[np.float32]:
    """rows [n, bytes of a row] -> [n, k]."""

def first_invalid_block(data: NDArray[np.uint8], type: int) -> int | None:
    """Index of the first block (element, for types without blocks) with NaN, infinity or an invalid scale: ggml's
    rules."""

def kernels() -> str: ...  # the set that runs: avx512, avx2, sse, neon, ggml or scalar; PGS_KERNELS forces one
def ggml_version() -> str: ...

class Run:
    """Bytes of a source file, or one value, a little-endian float32, over and over."""

    def __init__(self, source: int, offset: int, nbytes: int) -> None: ...
    @staticmethod
    def fill(value: float, nbytes: int) -> Run: ...
    @property
    def source(self) -> int | None: ...  # index among the sources of the run; None: `value`
    @property
    def offset(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def value(self) -> float: ...

class Remap:
    """New ids of experts, in columns of `column` ids: id -> table[id]; where that is -1, the first of `substitutes`
    (new ids, best first) that its column does not hold yet."""

    def __init__(self, table: Sequence[int], substitutes: Sequence[int], column: int) -> None: ...

class Member:
    """An expert of a group that is merged: its slice of the source, its weight (those of a group add to one), and where
    the order of its neurons is among the orders of the merge; None: as they are."""

    def __init__(self, slice: int, weight: float = 1.0, order: int | None = None) -> None: ...

class Merge:
    """Output slice g, of `slice_rows` rows, is the weighted mean of the source's slices in groups[g], the first its
    centroid, their neurons reordered: rows, or columns."""

    def __init__(
        self,
        slice_rows: int,
        groups: Sequence[Sequence[Member]],
        *,
        orders: Sequence[NDArray[np.uint32]] = (),
        columns: bool = False,
    ) -> None: ...

class ImportanceRow:
    """One row of importance: row_elements float32 at byte `offset` of a source, each divided by `divisor` in
    float32."""

    def __init__(self, source: int, offset: int, *, divisor: float = 1.0) -> None: ...
    @staticmethod
    def held(values: NDArray[np.float32], *, divisor: float = 1.0) -> ImportanceRow:
        """Values in memory, [row_elements]. Rows of one object share them."""

    @staticmethod
    def sum(source: int, parts: Sequence[tuple[int, int | None]], *, divisor: float = 1.0) -> ImportanceRow:
        """The sum of those at several (offset, order), in this order, divided afterwards; order: see Member."""

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
        runs: Sequence[Run] = (),
        literal: bytes = b"",
        importance_rows: Sequence[ImportanceRow] = (),  # their number divides rows: consecutive rows share one
        remap: Remap | None = None,
        merge: Merge | None = None,
        file: int = 0,  # index of the output file
        best: bool = False,  # with less error than ggml's encoder, where the type has_best; else ggml's bytes
    ) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def target_offset(self) -> int: ...
    @property
    def target_bytes(self) -> int: ...  # without padding

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

class StopFlag:
    """Tells llama.cpp to stop, through callbacks that need no Python: addresses of functions that take `address` as
    their user data."""

    def __init__(self) -> None: ...
    def set(self) -> None: ...
    def is_set(self) -> bool: ...
    @property
    def address(self) -> int: ...
    @property
    def abort_callback(self) -> int: ...  # a ggml_abort_callback: true once the flag is set
    @property
    def progress_callback(self) -> int: ...  # a llama_progress_callback: true until then
