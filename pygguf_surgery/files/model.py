"""Model: the headers of one GGUF file, or of all shards of a split one. Opening reads no tensor data."""

from __future__ import annotations

import hashlib
import operator
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex, cast

from .._core import Source, TensorInfo, Value
from .._core import dequantize as decode
from ..base.errors import BadFile, BadPlan, Unsupported
from ..base.runs import merge_adjacent
from ..base.units import parse_threads
from ..quant.types import row_bytes, tensor_type, type_of_id

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class FileHeader(Protocol):
    """What the parser of a format gives of one file, as the core's Header. data_offset: bytes of the header; the
    offsets of tensors count from there, and metadata and tensors are in the order of the file."""

    @property
    def alignment(self) -> int: ...
    @property
    def data_offset(self) -> int: ...
    @property
    def metadata(self) -> Sequence[tuple[str, Value]]: ...
    @property
    def tensors(self) -> Sequence[TensorInfo]: ...
    @property
    def warnings(self) -> Sequence[str]: ...


class Metadata(Mapping[str, Any]):
    """The keys and values of a header, in file order. A value is decoded when it is asked for: a vocabulary that nobody
    reads costs nothing."""

    def __init__(self, items: Mapping[str, Value]):
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key].value

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: object) -> bool:
        return key in self._items

    def __repr__(self) -> str:
        return f"<Metadata of {len(self)} keys>"

    def value(self, key: str) -> Value:
        """The exact value with its GGUF type."""
        return self._items[key]

    def exact(self) -> dict[str, Value]:
        """A fresh dict of all exact values, in file order."""
        return dict(self._items)


class Tensor:
    """One tensor of a model: where its bytes are and what they mean.

    shape is outermost first (numpy), ne fastest first (ggml); type is ggml's name ("BF16"); source is the index of the
    shard in model.sources and offset is absolute in that file. Reading is safe from several threads.
    """

    __slots__ = ("_model", "name", "nbytes", "ne", "offset", "source", "type", "type_id")

    def __init__(self, model: Model, info: TensorInfo, source: int, data_offset: int):
        self._model = model
        self.name: str = info.name
        self.ne: tuple[int, ...] = tuple(info.ne)
        self.type_id: int = info.type
        self.type: str = type_of_id(info.type).name
        self.nbytes: int = info.nbytes
        self.source = source
        self.offset: int = data_offset + info.offset

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ne[::-1]

    @property
    def elements(self) -> int:
        n = 1
        for length in self.ne:
            n *= length
        return n

    def __repr__(self) -> str:
        return f"<Tensor {self.name} {self.type} {list(self.shape)}>"

    def bytes(self) -> NDArray[np.uint8]:
        """The encoded bytes: a read-only uint8 view of the memory-mapped file, nothing is copied.

        The view stays valid after model.close(). If another program truncates the file, touching the view kills the
        process (SIGBUS), as with any mapping.
        """
        return self._model.sources[self.source].view(self.offset, self.nbytes)

    def dequantize(self, rows: Any = None, experts: Any = None, *, threads: int = 0) -> NDArray[np.float32]:
        """The values as float32; only what is asked for is read.

        experts: an index or indices along the slowest axis; the result has shape [len(experts), *shape[1:]].
        rows: an index or indices of rows, counted through the whole tensor; the result is [len(rows), shape[-1]].
        Without either, the shape of the tensor. Unsupported for a type that ggml cannot decode (integers).
        """
        import numpy as np

        facts = tensor_type(self.type)
        if not facts.decodes:
            raise Unsupported("ggml cannot decode this type", path=self._path, object=self.name, found=self.type)
        if rows is not None and experts is not None:
            raise BadPlan("give rows or experts, not both", object=self.name)
        if rows is None and experts is None:
            return self._decode([(0, self.nbytes)], threads).reshape(self.shape)
        if not self.ne:
            raise BadPlan("a scalar has no rows or experts", object=self.name)
        slice_shape: tuple[int, ...]
        if rows is not None:
            wanted, slice_shape = rows, (self.ne[0],)
            count = self.elements // max(1, self.ne[0])
        else:
            wanted, slice_shape = experts, self.shape[1:]
            count = self.shape[0]
        indices = [self._index(i, count) for i in (wanted if np.ndim(wanted) else [wanted])]
        if not slice_shape:  # experts of a vector are single elements, maybe inside a block
            return self._decode([(0, self.nbytes)], threads).reshape(self.shape)[indices]
        if not indices or not self.nbytes:
            return np.zeros((len(indices), *slice_shape), np.float32)
        step = self.nbytes // count
        parts = [(first * step, n * step) for first, n in merge_adjacent(indices)]
        return self._decode(parts, threads).reshape(len(indices), *slice_shape)

    @property
    def _path(self) -> str:
        return self._model.paths[self.source]

    def _index(self, index: object, count: int) -> int:
        # A mask is not a list of indices. Older versions of numpy only warn of its elements.
        mask = isinstance(index, bool) or getattr(getattr(index, "dtype", None), "kind", "") == "b"
        try:
            i = None if mask else operator.index(cast(SupportsIndex, index))
        except TypeError:
            i = None
        if i is None:
            raise BadPlan("an index is a whole number", object=self.name, found=repr(index)[:80])
        if not 0 <= i < count:
            raise BadPlan(f"index {i} out of range", object=self.name, expected=f"0..{count - 1}")
        return i

    def _decode(self, parts: Sequence[tuple[int, int]], threads: int) -> NDArray[np.float32]:
        import numpy as np

        source = self._model.sources[self.source]
        pieces = [source.read(self.offset + offset, nbytes) for offset, nbytes in parts]
        data = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        nbytes = row_bytes(self.type, self.ne[0] if self.ne else 1)
        if data.size == 0 or nbytes == 0:
            return np.zeros(0, np.float32)
        return decode(data.reshape(-1, nbytes), self.type_id, parse_threads(threads))


class Model:
    """The headers of a model. It owns the open files; a context manager; may be shared by threads. Made by `open`."""

    def __init__(self, sources: list[Source], headers: Sequence[FileHeader], *, metadata_only: bool = False):
        self.sources = sources
        self.paths: list[str] = [source.path for source in sources]
        self.path: str = self.paths[0]
        self.metadata_only = metadata_only
        self.alignment: int = headers[0].alignment
        self._data_offsets = [min(h.data_offset, s.size) for h, s in zip(headers, sources, strict=True)]
        self.header_bytes: int = sum(self._data_offsets)
        self.file_bytes: int = sum(source.size for source in sources)
        self.warnings: list[str] = [
            text if len(sources) == 1 else f"{os.path.basename(path)}: {text}"
            for path, header in zip(self.paths, headers, strict=True)
            for text in header.warnings
        ]
        items = dict(headers[0].metadata)
        if len(sources) > 1:
            items = {key: value for key, value in items.items() if not key.startswith("split.")}
        self.metadata = Metadata(items)
        self.architecture: str = read_text(items, "general.architecture", self.path)
        self.name: str = read_text(items, "general.name", self.path)
        self.tensors: dict[str, Tensor] = {}
        for i, header in enumerate(headers):
            for info in header.tensors:
                if info.name in self.tensors:
                    first = self.tensors[info.name].source
                    raise BadFile(
                        "duplicate tensor",
                        path=self.paths[i],
                        object=info.name,
                        hint=f"it is also in {os.path.basename(self.paths[first])}",
                    )
                self.tensors[info.name] = Tensor(self, info, i, header.data_offset)
        self._header_sha256: str | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Model {self.path} {self.architecture} of {len(self.tensors)} tensors>"

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files. Views from Tensor.bytes stay valid; later reads are a ValueError."""
        for source in self.sources:
            source.close()

    @property
    def header_sha256(self) -> str:
        """SHA-256, in hex, of the header bytes (padding included, no tensor data) of all shards in order."""
        with self._lock:
            if self._header_sha256 is None:
                digest = hashlib.sha256()
                for source, nbytes in zip(self.sources, self._data_offsets, strict=True):
                    digest.update(source.read(0, nbytes).data)
                self._header_sha256 = digest.hexdigest()
            return self._header_sha256

    def get(self, key_suffix: str, default: Any = None) -> Any:
        """The value of the architecture's own key: get("expert_count") is metadata["qwen3next.expert_count"]."""
        return self.metadata.get(f"{self.architecture}.{key_suffix}", default)


def read_text(items: Mapping[str, Value], key: str, path: str) -> str:
    """The text of a key, empty where it is missing. BadFile for a value of another type."""
    if key not in items:
        return ""
    if items[key].type != "str":
        raise BadFile("not a string", path=path, object=key, found=items[key].type, expected="str")
    text: str = items[key].value
    return text
