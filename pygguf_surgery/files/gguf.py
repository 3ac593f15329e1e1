"""Write and read a small GGUF file in one call: importance matrices, demos, tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from .._core import Sink, Source, TensorInfo, Value, encode_header, read_header
from ..base.errors import BadPlan
from ..quant.types import type_of_id, type_of_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.generic]
    Piece = Array | bytes | bytearray | memoryview
    Data = Piece | Iterable[Piece] | Callable[[], Iterable[Piece]]


# ggml types that are a numpy type; every other one is read as uint8.
_NUMPY_TYPES = {
    "F32": "float32",
    "F16": "float16",
    "F64": "float64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
}
_GGML_TYPES = {numpy: ggml for ggml, numpy in _NUMPY_TYPES.items()}


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Value],
    tensors: Mapping[str, Array | tuple[Data, str, tuple[int, ...]]],
    *,
    overwrite: bool = False,
    alignment: int = 32,
) -> None:
    """Write a canonical GGUF file; at every instant `path` holds the old file or the complete new one.

    metadata: key -> Value, written in this order. general.alignment is added if `alignment` is not 32.
    tensors: name -> a numpy array of a type that ggml has (float16/32/64, int8/16/32/64), or (data, type name, shape)
    with the shape in elements, outermost first. `data` is then a uint8 array or bytes, or, for tensors larger than
    memory, an iterable of such pieces or a function that returns one; together they must be the tensor's bytes.
    An existing file needs overwrite=True. BadPlan if the parts contradict each other, OutOfSpace, OSError.
    """
    keys = dict(metadata)
    if alignment != 32:
        keys.setdefault("general.alignment", Value(alignment, "u32"))
    path = os.fsdecode(path)
    parts = {name: tensor if isinstance(tensor, tuple) else _native(name, tensor) for name, tensor in tensors.items()}
    infos = [TensorInfo(name, shape[::-1], type_of_name(kind).id) for name, (_, kind, shape) in parts.items()]
    header, offsets, file_bytes = encode_header(list(keys.items()), infos, alignment)
    with Sink(path, file_bytes, overwrite=overwrite) as sink:
        sink.write_at(0, header)
        for info, offset, (data, _, _) in zip(infos, offsets, parts.values(), strict=True):
            end = _write_tensor(sink, path, info, offset, data)
            if padding := -end % alignment:
                sink.write_at(end, bytes(padding))


def _write_tensor(sink: Sink, path: str, info: TensorInfo, offset: int, data: Data) -> int:
    """Writes one tensor and returns where it ends."""
    at, end = offset, offset + info.nbytes
    for piece in _chunks(data):
        if at + piece.nbytes > end:
            raise BadPlan(
                "data is longer than the tensor", path=path, object=info.name, expected=f"{info.nbytes} bytes"
            )
        sink.write_at(at, piece)
        at += piece.nbytes
    if at != end:
        raise BadPlan(
            "data is shorter than the tensor",
            path=path,
            object=info.name,
            found=f"{at - offset} bytes",
            expected=f"{info.nbytes} bytes",
        )
    return end


def read_gguf(path: str | os.PathLike[str]) -> tuple[dict[str, Value], dict[str, Array]]:
    """(metadata, tensors) of a small GGUF file, everything in memory.

    A tensor of a numpy type has that type and the tensor's shape, outermost first; one of any other type (BF16 and the
    quantized ones) is uint8 with the bytes of a row in its last dimension. BadFile, OSError.
    """
    source = Source(os.fsdecode(path))
    try:
        header = read_header(source)
        tensors: dict[str, Array] = {}
        for info in header.tensors:
            facts = type_of_id(info.type)
            shape = tuple(reversed(info.ne))
            data: Array = source.read(header.data_offset + info.offset, info.nbytes)
            if facts.name in _NUMPY_TYPES:
                data = data.view(_NUMPY_TYPES[facts.name])
            elif shape:
                shape = (*shape[:-1], shape[-1] // facts.block * facts.block_bytes)
            else:
                shape = (info.nbytes,)
            tensors[info.name] = data.reshape(shape)
        return dict(header.metadata), tensors
    finally:
        source.close()


def _native(name: str, array: Array) -> tuple[Array, str, tuple[int, ...]]:
    import numpy as np

    array = np.asarray(array, order="C")
    kind = _GGML_TYPES.get(array.dtype.name)
    if kind is None:
        raise BadPlan(
            "array type that ggml does not have", object=name, found=array.dtype.name, expected=", ".join(_GGML_TYPES)
        )
    return array.astype(array.dtype.newbyteorder("<"), copy=False), kind, array.shape


def _chunks(data: Data) -> Iterator[NDArray[np.uint8]]:
    """The pieces of `data` as flat uint8 arrays, empty ones left out."""
    import numpy as np

    if callable(data):
        data = data()
    pieces: Iterable[Piece] = [data] if isinstance(data, np.ndarray | bytes | bytearray | memoryview) else data
    for piece in pieces:
        if isinstance(piece, np.ndarray):
            flat = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        else:
            flat = np.frombuffer(piece, np.uint8)
        if flat.size:
            yield flat
