"""Surgery on multi-gigabyte GGUF model files, in one streaming pass with bounded memory."""

from __future__ import annotations

from importlib import import_module as _import
from typing import TYPE_CHECKING, Any

try:
    from ._core import Value, __version__
except ModuleNotFoundError as _error:
    raise ImportError(
        f"{__path__[0]} holds the sources of pygguf_surgery without its compiled core: start Python in "
        "another folder to use the installed package"
    ) from _error
from .base.errors import BadFile, BadPlan, OutOfSpace, SourceChanged, SurgeryError, SurgeryWarning, Unsupported
from .files.model import Metadata, Model, Tensor
from .files.open import open_model as open
from .quant.arrays import dequantize, quantize

if TYPE_CHECKING:
    from . import experts, imatrix, report
    from .plan import Plan
    from .run.writing import Receipt

__all__ = [
    "BadFile",
    "BadPlan",
    "Metadata",
    "Model",
    "OutOfSpace",
    "Plan",
    "Receipt",
    "SourceChanged",
    "SurgeryError",
    "SurgeryWarning",
    "Tensor",
    "Unsupported",
    "Value",
    "__version__",
    "dequantize",
    "experts",
    "imatrix",
    "open",
    "quantize",
    "report",
]
# Loaded when asked for, so that a program that only reads files starts at once.
_LAZY = {"Plan": ".plan", "Receipt": ".run.writing", "experts": ".experts", "imatrix": ".imatrix", "report": ".report"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _import(_LAZY[name], __name__)
    globals()[name] = value = getattr(module, name, module)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
