"""Values of options: from text to what Python takes, or the error that argparse prints."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable

from ..base.errors import SurgeryError
from ..base.units import parse_file_size, parse_size


def not_empty(text: str) -> str:
    if not text:  # most likely a variable of the shell that is not set
        raise ArgumentTypeError("it is empty")
    return text


def override(text: str) -> tuple[str, str]:
    """REGEX=TYPE -> (pattern, type); an equals sign in the pattern belongs to it."""
    pattern, equals, type = text.rpartition("=")
    if not equals or not pattern or not type:
        raise ArgumentTypeError(f"{text!r} is not REGEX=TYPE")
    return pattern, type


Scalar = int | float | str | bool


def _flag(text: str) -> bool:
    return {"true": True, "false": False}[text]


_KINDS: dict[str, Callable[[str], Scalar]] = {"int": int, "float": float, "str": str, "bool": _flag}


def override_kv(text: str) -> tuple[str, Scalar]:
    """KEY=TYPE:VALUE as llama-quantize writes it -> (key, Python value)."""
    key, equals, value = text.partition("=")
    kind, colon, value = value.partition(":")
    try:
        if not key or not equals or not colon:
            raise ValueError
        return key, _KINDS[kind](value)
    except (KeyError, ValueError):
        raise ArgumentTypeError(f"{text!r} is not KEY=TYPE:VALUE with TYPE int, float, bool or str") from None


def numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 20 for part in parts):
        raise ArgumentTypeError(f"{text!r} is not a list of numbers such as 3,4,5")
    return [int(part) for part in parts]


def assignment(text: str) -> str:
    """KEY=VALUE, as it is."""
    key, equals, _ = text.partition("=")
    if not key or not equals:
        raise ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return text


def size(text: str) -> int:
    """Bytes of 512MiB or 2GB."""
    try:
        return parse_size(text)
    except SurgeryError as error:
        raise ArgumentTypeError(str(error)) from None


def file_size(text: str) -> int:
    """Bytes of 22GB; a small number needs a unit."""
    try:
        return parse_file_size(text)
    except SurgeryError as error:
        raise ArgumentTypeError(str(error)) from None


def split_size(text: str) -> int:
    """llama-gguf-split's 500M and 45G, powers of 1000, and what file_size() takes."""
    return file_size(f"{text}B" if text[:-1].isdecimal() and text[-1:] in "KMG" else text)
