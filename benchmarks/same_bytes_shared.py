"""What the jobs of same_bytes.py share that use the package from Python: a table of them, errors as data, digests.

They use public names only, so that they run with both versions, in a folder that holds the inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import pygguf_surgery as pgs

JOBS: dict[str, Callable[..., Any]] = {}


def job(function: Callable[..., Any]) -> Callable[..., Any]:
    JOBS[function.__name__] = function
    return function


def attempt(call: Callable[[], Any]) -> Any:
    """What it gives, or the error as data."""
    try:
        return call()
    except (pgs.SurgeryError, OSError, TypeError, ValueError, KeyError, AttributeError) as error:
        return failure(error)


def failure(error: Exception) -> dict[str, Any]:
    fields = {name: repr(value) for name, value in vars(error).items()} if isinstance(error, pgs.SurgeryError) else {}
    return {"error": type(error).__name__, "text": str(error), **fields}


def digest(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def gone(path: str) -> str:
    """The digest of a file that need not stay."""
    with open(path, "rb") as file:
        found = digest(file.read())
    os.unlink(path)
    return found


def written(plan: pgs.Plan, path: str, **options: Any) -> Any:
    """The plan, what it comes to, and the receipt; the file stays. Without blockers only."""
    checked = plan.check()
    data = {"plan": json.loads(plan.to_json()), "summary": checked.summary(), "check": checked.to_json(full=True)}
    return {**data, "receipt": attempt(lambda: plan.write(path, **options).to_json())}


def half(model: pgs.Model, by: Any = "router-norm", **options: Any) -> Any:
    return pgs.experts.rank(model, by=by, **options).keep(ratio=0.5)


def layers_of(model: pgs.Model) -> list[int]:
    """The layers with experts."""
    return sorted({int(name.split(".")[1]) for name in model.tensors if "ffn_down_exps.weight" in name})


def scores(ranking: Any) -> Any:
    return json.loads(ranking.to_json())


def choice(keep: Any) -> dict[str, Any]:
    return {
        "json": json.loads(keep.to_json()),
        "order": {str(k): v for k, v in keep.order.items()},
        "summary": keep.summary(),
        "mass": [keep.mass(layer) for layer in keep],
        "ties": [keep.ties(layer) for layer in keep],
    }


def plain(data: Any) -> Any:
    """JSON-ready: keys as text, numpy numbers as Python's, numbers that are not finite by name."""
    if isinstance(data, Mapping):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple, set, frozenset)):
        return [plain(value) for value in data]
    if isinstance(data, np.generic):
        return plain(data.item())
    if isinstance(data, float) and not np.isfinite(data):
        return repr(data)
    return data if data is None or isinstance(data, (bool, int, float, str)) else repr(data)
