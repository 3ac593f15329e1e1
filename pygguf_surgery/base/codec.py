"""JSON of dataclasses of str, int, float, bool, X | None, tuples and dicts, both ways; strict; errors say where."""

from __future__ import annotations

import json
import re
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from .errors import BadPlan

Convert = Callable[[Any], Any]  # of decoders: raises BadPlan, its object the path from there on, ".name" or "[3]"
_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "a table"}


def loads(text: str) -> Any:
    """json.loads without its liberties: BadPlan for a key twice, NaN and Infinity, as for all else that is not JSON."""
    try:
        return json.loads(text, object_pairs_hook=_strictly, parse_constant=_strictly)
    except (ValueError, RecursionError) as error:
        raise BadPlan(f"not JSON: {error}") from None


def _strictly(pairs: list[tuple[str, Any]] | str) -> dict[str, Any]:
    if isinstance(pairs, str):
        raise ValueError(f"{pairs} is not a number")
    if len(data := dict(pairs)) < len(pairs):
        raise BadPlan("a key twice", object=Counter(key for key, _ in pairs).most_common(1)[0][0])
    return data


def encode(x: Any, hooks: Mapping[Any, Convert]) -> Any:
    """x as json.dumps takes it. hooks: class -> what encodes it instead."""
    if type(x) in hooks:
        return hooks[type(x)](x)
    if isinstance(x, (tuple, list)):
        return list(x) if {int, float, str}.issuperset(map(type, x)) else [encode(element, hooks) for element in x]
    if isinstance(x, dict):
        return {str(key): encode(value, hooks) for key, value in x.items()}
    return {f.name: encode(getattr(x, f.name), hooks) for f in fields(x)} if is_dataclass(x) else x


def decoder(kind: Any, hooks: Mapping[Any, Convert]) -> Convert:
    """What makes a value of this type of what loads() gave; hooks: for other types. BadPlan: it cannot be one."""
    args = typing.get_args(kind)
    parts = [decoder(arg, hooks) for arg in args if arg not in (..., type(None))]
    if is_dataclass(kind):
        hints, needed = typing.get_type_hints(kind), [f.name for f in fields(kind) if f.default is f.default_factory]
        return partial(_object, kind, {f.name: decoder(hints[f.name], hooks) for f in fields(kind)}, needed)
    if type(None) in args:
        return lambda data: None if data is None else parts[0](data)
    made: dict[Any, Convert] = {tuple: partial(_tuple, parts, ... in args)}
    made[dict] = partial(_dict, args[:1] == (int,), *parts)
    return hooks.get(kind) or made.get(typing.get_origin(kind)) or partial(exactly, kind)


def exactly(kind: type, x: Any) -> Any:
    """x, if it is of this kind; a bool is not an int, but an int may stand for a float."""
    if type(x) is kind and kind is not float:
        return x
    if kind is float and type(x) in (int, float) and abs(x) <= 1.7976931348623157e308:
        return float(x)
    raise BadPlan(f"not {_KINDS[kind]}", found="null" if x is None else _KINDS.get(type(x), type(x).__name__))


def _tuple(parts: list[Convert], variadic: bool, data: Any) -> tuple[Any, ...]:
    if len(exactly(list, data)) != len(parts) and not variadic:
        raise BadPlan(f"not a list of {len(parts)}", found=f"a list of {len(data)}")
    return tuple(_each(parts * len(data), range(len(data)), data).values())


def _dict(whole: bool, key: Convert, part: Convert, data: Any) -> dict[Any, Any]:
    names = [int(n) if whole and re.fullmatch("0|-?[1-9][0-9]{,99}", n) else n for n in exactly(dict, data)]
    keys = _each([key] * len(data), data, names)
    return {keys[name]: x for name, x in _each([part] * len(data), data, data.values()).items()}


def _object(kind: Any, parts: dict[str, Convert], needed: list[str], data: Any) -> Any:
    for name in [*exactly(dict, data), *needed]:
        if name not in parts:
            raise BadPlan("unknown key", object=f".{name:.80}", expected=", ".join(parts))
        if name not in data:
            raise BadPlan("missing key", object=f".{name}")
    return kind(**_each([parts[name] for name in data], data, data.values()))


def _each(decoders: list[Convert], keys: Iterable[Any], values: Iterable[Any]) -> dict[Any, Any]:
    done = {}
    try:
        for decode, key, x in zip(decoders, keys, values, strict=False):
            done[key] = decode(x)
    except BadPlan as error:
        step = f".{key:.80}" if str(key).isidentifier() else f"[{json.dumps(key):.80}]"
        error.object = step + (error.object or "")
        raise
    return done
