"""The rules for setting and removing metadata keys, for Python values and for the shell's KEY:TYPE=VALUE."""

from __future__ import annotations

import re
import struct
from collections.abc import Collection, Mapping
from typing import Any

from .._core import Value
from ..architecture.loader import EXTRA_NAME, check_tensor_extra, is_tensor_extra
from ..base.errors import BadPlan, SurgeryError
from ..base.words import nearest_names, short_repr
from ..plan_data.edits import RemoveMetadata, SetMetadata
from ..plan_data.outcome import Draft
from .context import Context

SCALAR_TYPES = ("u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "str", "u64", "i64", "f64")
_INTEGERS = {
    "u8": (0, 2**8 - 1),
    "i8": (-(2**7), 2**7 - 1),
    "u16": (0, 2**16 - 1),
    "i16": (-(2**15), 2**15 - 1),
    "u32": (0, 2**32 - 1),
    "i32": (-(2**31), 2**31 - 1),
    "u64": (0, 2**64 - 1),
    "i64": (-(2**63), 2**63 - 1),
}
_NEW_INTEGER = ("u32", "i32", "u64", "i64")  # the first that holds the value
_LONE_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # the rest of them stand for bytes that are no UTF-8
_KEY = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")

# Keys that follow from the rest of the plan ({arch}: the architecture's own), and what to do instead.
DERIVED = {
    "{arch}.expert_count": "keep_experts changes it",
    "{arch}.block_count": "it follows from the layers that are there",
    "general.alignment": "it follows from the input",
    "general.architecture": "it says how every other key and tensor is read: another one would be another model",
    "general.file_type": "quantize changes it",
    "general.quantization_version": "quantize writes it",
}


def derived_reason(architecture: str, key: str) -> str | None:
    """Why a key cannot be set or removed, or None."""
    if key.startswith("split."):
        return "it follows from the shards of the output"
    for pattern, reason in DERIVED.items():
        if key == pattern.replace("{arch}", architecture):
            return reason
    return None


def check_key(architecture: str, key: Any, existing: Mapping[str, Any], *, new: bool) -> None:
    """BadPlan for a key that may not be set (new=True) or removed (new=False)."""
    if not isinstance(key, str):
        raise BadPlan("a metadata key is a string", object=repr(key))
    reason = derived_reason(architecture, key)
    if reason is not None:
        raise BadPlan("this key is derived", object=key, hint=reason)
    if key in existing:
        return
    if not new:
        raise BadPlan("no such key", object=key, hint=nearest_names(key, existing))
    if not _KEY.fullmatch(key) or len(key) > 65535:
        raise BadPlan("not a metadata key", object=key, expected="lower_snake.dot, such as general.name")


def to_value(obj: Any, existing: Value | None = None, *, key: str | None = None) -> Value:
    """The exact value for `obj`. An existing key keeps its type; a new one gets bool -> bool, int -> u32, else i32,
    u64, i64, float -> f32, str -> str, list -> an array of those; a Value is taken as it is. BadPlan for what does not
    fit."""
    if isinstance(obj, Value):
        if existing is not None and obj.type != existing.type:
            raise BadPlan(
                "an existing key keeps its type",
                object=key,
                found=obj.type,
                expected=existing.type,
                hint="remove it first (remove_metadata, --remove) to change its type",
            )
        return obj
    obj = _plain(obj)
    type = existing.type if existing is not None else _new_type(obj, key)
    if not fits(obj, type):
        hint = None
        if existing is None and isinstance(obj, float):
            hint = 'pygguf_surgery.Value(x, "f64")'
        raise BadPlan(
            "the value does not fit the key's type" if existing is not None else "the value does not fit",
            object=key,
            found=short_repr(obj),
            expected=type,
            hint=hint,
        )
    return Value(obj, type)


def fits(obj: Any, type: str) -> bool:
    """Can a value of this GGUF type hold `obj`? Only a float is rounded (to f32), a whole number never."""
    if type.endswith("[]"):
        return isinstance(obj, list) and all(fits(element, type[:-2]) for element in obj)
    if type == "bool":
        return isinstance(obj, bool)
    if type == "str":
        return isinstance(obj, str) and not _LONE_SURROGATE.search(obj)
    if isinstance(obj, bool) or not isinstance(obj, (int, float)):
        return False
    if type in _INTEGERS:
        low, high = _INTEGERS[type]
        return isinstance(obj, int) and low <= obj <= high
    try:
        number = float(obj)
        stored = number if type == "f64" else struct.unpack("<f", struct.pack("<f", number))[0]
    except OverflowError:
        return False
    return isinstance(obj, float) or stored == obj


def _plain(obj: Any) -> Any:
    """numpy scalars and arrays, tuples and ranges as Python values."""
    if hasattr(obj, "tolist") and hasattr(obj, "dtype"):
        return obj.tolist()
    if isinstance(obj, (list, tuple, range)):
        return [_plain(element) for element in obj]
    return obj


def _new_type(obj: Any, key: str | None) -> str:
    if isinstance(obj, list):
        if not obj:
            raise BadPlan("an empty list says no element type", object=key, hint='pygguf_surgery.Value([], "str[]")')
        kinds = {_kind(element, key) for element in obj}
        if kinds == {"int"}:
            return _integer_type(min(obj), max(obj), key) + "[]"
        if kinds <= {"int", "float"}:
            return "f32[]"
        if len(kinds) > 1:
            raise BadPlan("a list of different kinds", object=key, found=", ".join(sorted(kinds)))
        return kinds.pop() + "[]"
    kind = _kind(obj, key)
    if kind == "int":
        return _integer_type(obj, obj, key)
    return "f32" if kind == "float" else kind


def _kind(obj: Any, key: str | None) -> str:
    for python, name in ((bool, "bool"), (int, "int"), (float, "float"), (str, "str")):
        if isinstance(obj, python):
            return name
    if isinstance(obj, list):
        raise BadPlan("an array of arrays", object=key, hint="llama.cpp reads none")
    raise BadPlan(
        "not a metadata value",
        object=key,
        found=type(obj).__name__,
        expected="bool, int, float, str or a list of one of these",
    )


def _integer_type(low: int, high: int, key: str | None) -> str:
    for type in _NEW_INTEGER:
        least, most = _INTEGERS[type]
        if least <= low and high <= most:
            return type
    raise BadPlan(
        "a whole number of more than 64 bits", object=key, found=short_repr([low, high] if low != high else low)
    )


# --- the shell ------------------------------------------------------------------------------------------------------


def parse_assignment(text: str) -> tuple[str, Value | str]:
    """ "KEY:TYPE=VALUE" -> (KEY, Value); "KEY=VALUE" -> (KEY, "VALUE"), which text_to_value turns into a Value."""
    left, equals, value = text.partition("=")
    key, colon, type = left.partition(":")
    if not equals or not key:
        raise BadPlan("not an assignment", object=text, expected="KEY=VALUE or KEY:TYPE=VALUE")
    return (key, parse_text(value, type, key=key)) if colon else (key, value)


def text_to_value(text: str, existing: Value | None, *, key: str | None = None) -> Value:
    """The value of KEY=VALUE: an existing key keeps its type, a new one is a str."""
    return parse_text(text, existing.type if existing is not None else "str", key=key)


def parse_text(text: str, type: str, *, key: str | None = None) -> Value:
    """A value written on the shell. Arrays ("u32[]"): elements between commas, nothing is an empty array. Whole numbers
    also as 0x1f; bool is true or false."""
    element = type.removesuffix("[]")
    if element not in SCALAR_TYPES:
        raise BadPlan(
            "unknown type of a metadata value",
            object=key,
            found=repr(type),
            expected=f"{' '.join(SCALAR_TYPES)}, or one of these with [] for an array",
        )
    if type == element:
        obj: Any = _parse_scalar(text, element, key)
    else:
        obj = (
            [_parse_scalar(part if element == "str" else part.strip(), element, key) for part in text.split(",")]
            if text
            else []
        )
    if not fits(obj, type):
        raise BadPlan("the value does not fit the key's type", object=key, found=short_repr(obj), expected=type)
    return Value(obj, type)


def _parse_scalar(text: str, type: str, key: str | None) -> Any:
    if type == "str":
        return text
    try:
        if type == "bool":
            return {"true": True, "false": False, "1": True, "0": False}[text.strip().lower()]
        return (
            int(text, 0 if text.strip().lower().lstrip("+-").startswith("0x") else 10)
            if type in _INTEGERS
            else float(text)
        )
    except (KeyError, ValueError):
        raise BadPlan("the value does not fit the key's type", object=key, found=repr(text), expected=type) from None


# --- the edits ------------------------------------------------------------------------------------------------------


def apply(draft: Draft, edit: SetMetadata | RemoveMetadata, context: Context) -> Draft:
    """Sets or removes keys: a changed one keeps its place, a new one comes last. What may not be is a blocker."""
    out, architecture = draft.copy(), context.model.architecture
    items = edit.items if isinstance(edit, SetMetadata) else tuple((key, None) for key in edit.keys)
    for key, value in items:
        try:
            check_key(architecture, key, out.metadata, new=value is not None)
            if value is None:
                del out.metadata[key]
            else:
                out.metadata[key] = to_value(value, out.metadata.get(key), key=key)
        except SurgeryError as error:
            out.block(error)
    return out


def drop_tensor_extra(metadata: dict[str, Value], gone: Collection[str]) -> dict[str, Value]:
    """The metadata without the entries of tensors that are gone; untouched where none is, or the arrays do not fit."""
    names = metadata.get(EXTRA_NAME)
    if names is None or names.type != "str[]" or check_tensor_extra(metadata):
        return metadata
    stay = [i for i, name in enumerate(names.value) if name not in gone]
    if len(stay) == len(names):
        return metadata
    result = dict(metadata)
    for key, value in metadata.items():
        if is_tensor_extra(key):
            old = value.value
            result[key] = Value([old[i] for i in stay], value.type)
    return result
