"""Types: of arrays (here), of a file's tensors (mixes), as the user overrides them (recipe)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._core import dequantize as decode
from .._core import quantize as encode
from ..base.errors import BadPlan, Unsupported
from ..base.units import parse_threads
from .types import TensorType, type_of_id, type_of_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


QUALITIES = ("default", "best")  # llama-quantize's bytes; less error, for the types that have such an encoder


def quantize(
    array: NDArray[np.float32],
    type: Any,
    imatrix: NDArray[np.float32] | None = None,
    *,
    threads: int = 0,
    quality: str = "default",
) -> NDArray[np.uint8]:
    """Rows of numbers, shape [..., k], as ggml encodes them, shape [..., bytes of a row].

    type: a ggml type name ("Q4_K", any case), id, or gguf.GGMLQuantizationType. imatrix: the importance of each column,
    shape [k], or [experts, k] for an array of shape [experts, n, k]; a type that ignores it ignores it. quality: "best"
    encodes MXFP4 with less error than ggml does, and by importance. BadPlan: k is not a multiple of the block, a value
    that is not finite, an importance that is unfit; Unsupported: a type that ggml cannot encode. The GIL is released.
    """
    import numpy as np

    facts = _facts(type)
    if not facts.encodes:
        raise Unsupported("ggml cannot encode this type", object=facts.name)
    array = np.asarray(array)
    if array.ndim == 0 or not np.issubdtype(array.dtype, np.floating):
        raise BadPlan("not rows of float32", object="array", found=f"{array.dtype} {list(array.shape)}")
    k = array.shape[-1]
    if k % facts.block:
        raise BadPlan(
            "a row is not a multiple of the block",
            object=facts.name,
            found=f"{k} elements",
            expected=f"a multiple of {facts.block}",
        )
    importance = None if imatrix is None else _importance(np.asarray(imatrix), array.shape)
    best = parse_quality(quality) == "best" and facts.has_best
    if not (best or facts.uses_importance):
        importance = None
    elif importance is None and facts.needs_importance:
        raise BadPlan("this type needs an importance matrix", object=facts.name, hint="imatrix=")
    nbytes = k // facts.block * facts.block_bytes
    if array.size == 0:
        return np.zeros((*array.shape[:-1], nbytes), np.uint8)
    with np.errstate(over="ignore"):  # infinity is the core's to refuse
        rows = np.ascontiguousarray(array, dtype=np.float32).reshape(-1, k)
    return encode(rows, facts.id, importance, parse_threads(threads), best).reshape(*array.shape[:-1], nbytes)


def parse_quality(quality: str) -> str:
    if quality not in QUALITIES:
        raise BadPlan("unknown choice", object="quality", found=repr(quality), expected=", ".join(QUALITIES))
    return quality


def dequantize(array: NDArray[np.uint8], type: Any, *, threads: int = 0) -> NDArray[np.float32]:
    """Encoded rows, uint8 of shape [..., bytes of a row], as float32 of shape [..., k]. Errors as in quantize."""
    import numpy as np

    facts = _facts(type)
    if not facts.decodes:
        raise Unsupported("ggml cannot decode this type", object=facts.name)
    array = np.asarray(array)
    if array.ndim == 0 or array.dtype != np.uint8:
        raise BadPlan("not encoded rows", object="array", found=f"{array.dtype} {list(array.shape)}", expected="uint8")
    nbytes = array.shape[-1]
    if nbytes % facts.block_bytes:
        raise BadPlan(
            "a row is not a multiple of the block",
            object=facts.name,
            found=f"{nbytes} bytes",
            expected=f"a multiple of {facts.block_bytes}",
        )
    k = nbytes // facts.block_bytes * facts.block
    if array.size == 0:
        return np.zeros((*array.shape[:-1], k), np.float32)
    rows = np.ascontiguousarray(array).reshape(-1, nbytes)
    return decode(rows, facts.id, parse_threads(threads)).reshape(*array.shape[:-1], k)


def _facts(type: Any) -> TensorType:
    if isinstance(type, int) and not isinstance(type, bool):  # gguf.GGMLQuantizationType is an IntEnum
        return type_of_id(int(type))
    if not isinstance(type, str):
        raise BadPlan("a type is a name", object=repr(type))
    return type_of_name(type)


def _importance(imatrix: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float32]:
    import numpy as np

    k = shape[-1]
    if imatrix.shape == (k,) or imatrix.shape == (1, k) or (len(shape) == 3 and imatrix.shape == (shape[0], k)):
        return np.ascontiguousarray(imatrix, dtype=np.float32).reshape(-1, k)
    expected = f"[{k}] or [{shape[0]}, {k}]" if len(shape) == 3 else f"[{k}]"
    raise BadPlan("an importance of another shape", object="imatrix", found=list(imatrix.shape), expected=expected)
