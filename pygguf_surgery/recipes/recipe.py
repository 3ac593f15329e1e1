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
from dataclasses import dataclass, replace
from typing import Any

from ..base.codec import decoder
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


@dataclass(frozen=True)
class _File:
    """The keys of a recipe's file."""

    description: str = ""
    type: str | None = None
    pure: bool = False
    output_type: str | None = None
    token_embedding_type: str | None = None
    leave_output: bool = False
    allow_requantize: bool = False
    quality: str = "default"
    max_size: str | None = None
    override: tuple[Override, ...] = ()


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

    BadPlan, with path and key, for an unknown name, what is not TOML, an unknown key, a value of the wrong kind, an
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
    resource = files(__package__).joinpath("shipped").joinpath(f"{name}.toml")
    return parse(resource.read_bytes(), name, str(resource))


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a FIFO without a writer


def parse(data: bytes, name: str, path: str) -> Recipe:
    """The recipe in the bytes of a file; `path` is for messages."""
    file = _decode(_toml(data, path), path)
    type, size = file.type, file.max_size
    if type is not None:
        type = _named("type", path, lambda: mixes.file_type(type, file.pure).name)
    max_bytes = None if size is None else _named("max_size", path, lambda: parse_size(size))
    if max_bytes == 0:
        raise BadPlan("no file is that small", path=path, object="max_size", found=size)
    return Recipe(
        name=name,
        description=file.description,
        type=type,
        pure=file.pure,
        overrides=tuple(_checked(override, path, f"override {i}") for i, override in enumerate(file.override, 1)),
        output_type=None if file.output_type is None else _ggml_type(file.output_type, path, "output_type"),
        token_embedding_type=None
        if file.token_embedding_type is None
        else _ggml_type(file.token_embedding_type, path, "token_embedding_type"),
        leave_output=file.leave_output,
        allow_requantize=file.allow_requantize,
        quality=_named("quality", path, lambda: parse_quality(file.quality)),
        max_bytes=max_bytes,
    )


def _toml(data: bytes, path: str) -> dict[str, Any]:
    import sys

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        table: dict[str, Any] = tomllib.loads(data.decode("utf-8"))
        return table
    except UnicodeDecodeError as error:
        raise BadPlan("not UTF-8", path=path, offset=error.start) from None
    except tomllib.TOMLDecodeError as error:  # its text ends with "(at line 3, column 7)"
        line = re.search(r"line (\d+)", str(error))
        raise BadPlan(f"not TOML: {error}", path=path, object=f"line {line[1]}" if line else None) from None
    except RecursionError:
        raise BadPlan("not TOML: nested too deep", path=path) from None
    except ValueError as error:  # a number of thousands of digits
        raise BadPlan(f"not TOML: {error}", path=path) from None


def _decode(table: dict[str, Any], path: str) -> _File:
    try:
        file: _File = decoder(_File, {})(table)
        return file
    except BadPlan as error:  # .override[0].type is what people call: override 1: type
        key = re.sub(r"override\[(\d+)\]\.?", lambda match: f"override {int(match[1]) + 1}: ", (error.object or "")[1:])
        key = key.removesuffix(": ")
        hint = "[[override]]" if re.fullmatch(r"override( \d+)?", key) else None
        raise BadPlan(
            error.problem, path=path, object=key, found=error.found, expected=error.expected, hint=hint
        ) from None


def _checked(override: Override, path: str, where: str) -> Override:
    try:
        compile_pattern(override.pattern)
    except re.error as error:
        raise BadPlan(
            f"not a regular expression: {error}", path=path, object=f"{where}: pattern", found=override.pattern
        ) from None
    if override.type.lower() == "copy":
        return replace(override, type="copy")
    return replace(override, type=_ggml_type(override.type, path, f"{where}: type"))


def _ggml_type(name: str, path: str, key: str) -> str:
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
