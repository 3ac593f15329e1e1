"""Texts as calibration runs them: windows of tokens."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..base.errors import BadPlan
from ..files.stats import Text
from .session import Session

TextLike = Any  # a path, bytes of UTF-8, or an array of token ids


@dataclass(frozen=True)
class Windows:
    """A text as calibration runs it: tokens [windows, n_ctx]."""

    text: Text
    tokens: NDArray[np.int32]


def read_texts(texts: Sequence[TextLike]) -> list[tuple[str, Any]]:
    """(name for errors, bytes or token ids) of each text: what cannot be read is found before a model is loaded."""
    return [
        (os.fsdecode(text), _read(text)) if isinstance(text, (str, os.PathLike)) else ("text", text) for text in texts
    ]


def windows_of(
    session: Session, texts: Sequence[tuple[str, Any]], chunks: int | None, parse_special: bool
) -> list[Windows]:
    """Each text cut into windows of the session's length, at most `chunks` of them. BadPlan for one that is too
    short."""
    out = []
    for name, text in texts:
        data = bytes(text)
        tokens = session.tokenize(data, parse_special) if isinstance(text, bytes) else _token_ids(text, session.n_vocab)
        n = len(tokens) // session.n_ctx
        if n == 0:
            raise BadPlan(
                "the text is too short",
                path=name,
                found=f"{len(tokens)} tokens",
                expected=f"at least {session.n_ctx}",
                hint="a longer text, or a smaller --ctx",
            )
        windows = n if chunks is None else min(n, chunks)
        out.append(
            Windows(
                Text(hashlib.sha256(data).hexdigest(), len(tokens), windows),
                tokens[: windows * session.n_ctx].reshape(windows, session.n_ctx),
            )
        )
    if len({w.text.sha256 for w in out}) != len(out):
        raise BadPlan("the same text twice", object="texts", hint="its tokens would count twice")
    return out


def _token_ids(array: Any, n_vocab: int) -> NDArray[np.int32]:
    ids = np.asarray(array)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or (len(ids) and not (ids.min() >= 0 and ids.max() < n_vocab)):
        raise BadPlan(
            "not token ids",
            object="texts",
            found=f"{ids.dtype} {list(ids.shape)}",
            expected=f"one dimension of 0..{n_vocab - 1}",
        )
    return ids.astype(np.int32)


def _read(path: str | os.PathLike[str]) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def check_windows(n_ctx: int, chunks: int | None, texts: Sequence[Any]) -> None:
    for name, number, least in (("n_ctx", n_ctx, 8), ("chunks", chunks, 1)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < least):
            raise BadPlan(
                "not a number of tokens" if name == "n_ctx" else "not a number of windows",
                object=name,
                found=repr(number),
                expected=f"at least {least}",
            )
    if not texts:
        raise BadPlan("no text to calibrate on", object="texts")
