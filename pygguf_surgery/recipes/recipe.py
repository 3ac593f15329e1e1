"""Recipes: what to quantize to, as TOML files. Some are shipped, in the folder shipped.

    description = "experts in four bits, the rest in eight"
    type = "MXFP4_MOE"                  # a file type, as for Plan.quantize; without one the caller names it
    pure = false
    output_type = "Q8_0"                # ggml types
    token_embedding_type = "Q8_0"
    leave_output = false
    allow_requantize = false
    quality = "default"                 # or "best"
    max_size = "110GB"                  # a larger output is refused

    [[override]]                        # in order, the first that matches wins
    pattern = 'blk\\.[0-9]+\\.attn_'      # Python's re.search
    type = "copy"                       # a ggml type, or copy
    reason = "every token passes through"
    optional = true                     # may match nothing; otherwise that is an error

All keys are optional, but for an override's pattern and type. Nothing else is accepted.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..base.errors import BadPlan, SurgeryError
from ..base.units import parse_size
from ..quant.arrays import parse_quality
from ..quant.types import TYPES
from . import mixes
from .overrides import compile_pattern


@dataclass(frozen=True)
class Override:
    pattern: str
    type: str  # a ggml type, or "copy"
    reason: str = ""
    optional: bool = False


@dataclass(frozen=True)
class Recipe:
    """name: of a shipped recipe, or the path of the file. type: a file type, None where the caller is to name it.
    max_bytes: the largest file allowed."""

    name: str
    description: str = ""
    type: str | None = None
    pure: bool = False
    overrides: tuple[Override, ...] = ()
    output_type: str | None = None
    token_embedding_type: str | None = None
    leave_output: bool = False
    allow_requantize: bool = False
    quality: str = "default"
    max_bytes: int | None = None


_KEYS: dict[str, type] = {
    "description": str,
    "type": str,
    "pure": bool,
    "output_type": str,
    "token_embedding_type": str,
    "leave_output": bool,
    "allow_requantize": bool,
    "quality": str,
    "max_size": str,
    "override": list,
}
_OVERRIDE_KEYS: dict[str, type] = {"pattern": str, "type": str, "reason": str, "optional": bool}
_WORDS = {
    str: "text",
    bool: "true or false",
    list: "[[override]] tables",
    dict: "a table",
    int: "a number",
    float: "a number",
}


def shipped() -> list[str]:
    """The names of the recipes that come with this package."""
    from importlib.resources import files

    return sorted(
        file.name.removesuffix(".toml")
        for file in files(__package__).joinpath("shipped").iterdir()
        if file.name.endswith(".toml")
    )


def load(name_or_path: str | os.PathLike[str]) -> Recipe:
    """A shipped recipe by its name, or a file by its path: text with a / in it, or that ends in .toml.

    BadPlan, with path and key, for an unknown name, what is no TOML, an unknown key, a value of the wrong kind, an
    invalid pattern, an unknown type. OSError: no such file, no permission.
    """
    name = os.fspath(name_or_path)
    if not isinstance(name, str):
        raise BadPlan("a recipe is a name or a path", object=repr(name))
    if os.sep in name or name.endswith(".toml") or not isinstance(name_or_path, str):
        with open(name, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadPlan("not a regular file", path=name)
            return parse(file.read(), name, name)
    from importlib.resources import files

    if name not in shipped():
        raise BadPlan(
            "no such recipe",
            object=name,
            expected=", ".join(shipped()),
            hint="a file is named by a path with a / in it or that ends in .toml",
        )
    file = files(__package__).joinpath("shipped", f"{name}.toml")
    return parse(file.read_bytes(), name, str(file))


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a FIFO without a writer


def parse(data: bytes, name: str, path: str) -> Recipe:
    """The recipe in the bytes of a file; `path` is for messages."""
    table = _toml(data, path)
    _check_keys(table, _KEYS, path, "")
    pure = table.get("pure", False)
    type = table.get("type")
    if type is not None:
        type = _named("type", path, lambda: mixes.file_type(type, pure).name)
    overrides = [_override(item, path, f"override {i}") for i, item in enumerate(table.get("override", []), 1)]
    size = table.get("max_size")
    max_bytes = None if size is None else _named("max_size", path, lambda: parse_size(size))
    if max_bytes == 0:
        raise BadPlan("no file is that small", path=path, object="max_size", found=size)
    return Recipe(
        name=name,
        description=table.get("description", ""),
        type=type,
        pure=pure,
        overrides=tuple(overrides),
        output_type=_ggml_type(table.get("output_type"), path, "output_type"),
        token_embedding_type=_ggml_type(table.get("token_embedding_type"), path, "token_embedding_type"),
        leave_output=table.get("leave_output", False),
        allow_requantize=table.get("allow_requantize", False),
        quality=_named("quality", path, lambda: parse_quality(table.get("quality", "default"))),
        max_bytes=max_bytes,
    )


def _toml(data: bytes, path: str) -> dict[str, Any]:
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadPlan("not UTF-8", path=path, offset=error.start) from None
    except tomllib.TOMLDecodeError as error:  # its text ends with "(at line 3, column 7)"
        line = re.search(r"line (\d+)", str(error))
        raise BadPlan(f"not TOML: {error}", path=path, object=f"line {line[1]}" if line else None) from None
    except RecursionError:
        raise BadPlan("not TOML: nested too deep", path=path) from None
    except ValueError as error:  # a number of thousands of digits
        raise BadPlan(f"not TOML: {error}", path=path) from None


def _check_keys(table: dict[str, Any], keys: dict[str, type], path: str, where: str) -> None:
    for key, value in table.items():
        if key not in keys:
            raise BadPlan("unknown key", path=path, object=f"{where}{key}", hint=mixes.nearest(key, list(keys)))
        if type(value) is not keys[key]:
            raise BadPlan(
                f"not {_WORDS[keys[key]]}",
                path=path,
                object=f"{where}{key}",
                found=_WORDS.get(type(value), type(value).__name__),
            )


def _override(table: Any, path: str, where: str) -> Override:
    if not isinstance(table, dict):
        raise BadPlan("not a table", path=path, object=where, hint="[[override]]")
    _check_keys(table, _OVERRIDE_KEYS, path, f"{where}: ")
    for key in ("pattern", "type"):
        if key not in table:
            raise BadPlan("missing key", path=path, object=f"{where}: {key}")
    try:
        compile_pattern(table["pattern"])
    except re.error as error:
        raise BadPlan(
            f"not a regular expression: {error}", path=path, object=f"{where}: pattern", found=table["pattern"]
        ) from None
    copy = table["type"].lower() == "copy"
    type = "copy" if copy else _ggml_type(table["type"], path, f"{where}: type")
    return Override(table["pattern"], type, table.get("reason", ""), table.get("optional", False))


def _ggml_type(name: str | None, path: str, key: str) -> str | None:
    if name is None:
        return None
    if name.upper() not in TYPES or not TYPES[name.upper()].encodes:
        problem = "ggml does not quantize to this type" if name.upper() in TYPES else "unknown type"
        raise BadPlan(
            problem,
            path=path,
            object=key,
            found=name,
            hint=mixes.nearest(name.upper(), [other for other, facts in TYPES.items() if facts.encodes]),
        )
    return name.upper()


def _named(key: str, path: str, read: Any) -> Any:
    """What read() gives; its errors with path and key."""
    try:
        return read()
    except SurgeryError as error:
        raise BadPlan(
            error.problem,
            path=path,
            object=key,
            found=error.found or error.object,
            expected=error.expected,
            hint=error.hint,
        ) from None


def options_of(
    loaded: Recipe,
    names: Collection[str],
    type: str | None,
    overrides: Iterable[Sequence[str]],
    options: dict[str, Any],
) -> dict[str, Any]:
    """The arguments of Plan.quantize for a recipe; what the caller gives comes first. names: of the model's tensors,
    for the recipe's overrides that may match none."""
    own = [
        (o.pattern, o.type)
        for o in loaded.overrides
        if not o.optional or any(re.search(o.pattern, name) for name in names)
    ]
    defaults = {
        name: value
        for name in ("pure", "output_type", "token_embedding_type", "leave_output", "allow_requantize", "quality")
        if (value := getattr(loaded, name))
    }
    base = type if type is not None else loaded.type
    if base is None:
        raise BadPlan("the recipe names no base type", object=loaded.name, hint="give one")
    return {**defaults, **options, "type": base, "overrides": [*overrides, *own]}
