"""Texts to run a model on, as they are given: paths, bytes or token ids. What is wrong with them by themselves is found
here, before a model is loaded."""

from __future__ import annotations

import array
import codecs
import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from ..base.checks import as_whole_number
from ..base.errors import BadFile, BadPlan, SurgeryWarning
from ..base.words import short_repr

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# A path (str, PathLike), UTF-8 (bytes, bytearray, memoryview), or token ids: a sequence of whole numbers.
TextLike = Any

_PIECE = 1 << 20
_ID_END = 1 << 31  # token ids are int32 in llama.cpp
# The mark of UTF-32-LE begins with that of UTF-16-LE.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32-LE"),
    (codecs.BOM_UTF32_BE, "UTF-32-BE"),
    (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    (codecs.BOM_UTF16_BE, "UTF-16-BE"),
    (codecs.BOM_UTF8, "UTF-8"),
)
# Of all characters of a text at most so many are NUL, or control characters that no text has.
_NULS, _CONTROLS = 1 / 1000, 1 / 100
_CONTROL = bytes(c for c in range(1, 0x20) if c not in b"\t\n\r\f\x1b")


@dataclass(frozen=True, eq=False)
class GivenText:
    """A text that can be run. path: its file, or None; object: its place among the texts, where it has no file.
    content: UTF-8 without a byte order mark, or token ids. sha256: of the content, ids as little-endian int32."""

    path: str | None
    object: str | None
    content: bytes | NDArray[np.int32]
    sha256: str

    @property
    def name(self) -> str:
        return self.path or self.object or "text"


def check_list(texts: object) -> None:
    """BadPlan for what is no list of texts: one text by itself above all."""
    if isinstance(texts, (str, bytes, bytearray, memoryview)) or not isinstance(texts, Sequence):
        raise BadPlan(
            "not a list of texts", object="texts", found=_shown(texts), hint="put it in a list, also if it is only one"
        )


def read_texts(texts: Sequence[TextLike]) -> list[GivenText]:
    """The texts, read and checked; those that are GivenText already are passed on. OSError; BadFile for what is no text
    in UTF-8, BadPlan for what is no text at all or there twice. SurgeryWarning where UTF-16 or UTF-32, told by its byte
    order mark, was converted."""
    read = [_read(text, f"texts[{i}]") for i, text in enumerate(texts)]
    if len({text.sha256 for text in read}) != len(read):
        raise BadPlan("the same text twice", object="texts", hint="its tokens would count twice")
    return read


def path_of(text: TextLike) -> Any:
    """Its path, of one that was read too; anything else as it is."""
    return text.path if isinstance(text, GivenText) else text


def _read(text: TextLike, place: str) -> GivenText:
    if isinstance(text, GivenText):
        return text
    if isinstance(text, (str, os.PathLike)):
        path = os.fsdecode(text)
        content = _utf8(_in_file(path), path, None)
        return GivenText(path, None, content, hashlib.sha256(content).hexdigest())
    if isinstance(text, (bytes, bytearray, memoryview)):
        raw = _bytes(text, place)
        content = _utf8((raw[i : i + _PIECE] for i in range(0, len(raw), _PIECE)), None, place)
        return GivenText(None, place, content, hashlib.sha256(content).hexdigest())
    ids = _token_ids(text, place)
    return GivenText(None, place, ids, hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest())


# --- text -----------------------------------------------------------------------------------------------------------


def _in_file(path: str) -> Iterator[bytes]:
    try:
        file = open(path, "rb")  # noqa: SIM115  # closed below; only its opening may raise ValueError
    except ValueError:  # a NUL, or what no name of a file can be
        raise BadPlan("not a valid path", object="texts", found=repr(path)[:80]) from None
    with file:
        while piece := file.read(_PIECE):
            yield piece


def _bytes(text: bytes | bytearray | memoryview, place: str) -> bytes:
    try:
        if isinstance(text, memoryview) and text.itemsize != 1:
            raise BadPlan("not bytes of UTF-8", object=place, found=f"a memoryview of {text.format!r}")
        return bytes(text)
    except ValueError:  # a memoryview that was released
        raise BadPlan("not bytes of UTF-8", object=place, found=repr(text)[:80]) from None


def _utf8(pieces: Iterable[bytes], path: str | None, place: str | None) -> bytes:
    """The text in UTF-8, decoded piece by piece to see that it is text."""

    def refuse(problem: str, **fields: Any) -> NoReturn:
        raise BadFile(problem, path=path, object=place, **fields)

    pieces = iter(pieces)
    first = next(pieces, b"")
    if first[:4] == b"GGUF" and b"\0" in first[4:8]:  # a text may begin with the word
        refuse("a GGUF file, where a text is expected", hint="the model comes first, then the texts")
    mark, encoding = next((m for m in _MARKS if first.startswith(m[0])), (b"", "UTF-8"))
    utf16 = "UTF-16 without a byte order mark?" if not mark and _has_nul_bytes_in_turn(first) else None
    decoder = codecs.getincrementaldecoder(encoding)()
    parts: list[bytes] = []
    at = len(mark)  # of the next piece in the file
    characters = nuls = controls = 0
    piece, more = first[at:], True
    while more:
        following = next(pieces, b"")
        more = bool(following)
        try:
            waiting = len(decoder.getstate()[0])
            decoded = decoder.decode(piece, final=not more)
        except UnicodeDecodeError as error:
            offset = at - waiting + error.start
            found = "0x" + error.object[error.start : error.start + 1].hex()
            refuse(f"not a text in {encoding}", offset=offset, found=found, hint=utf16 or "save it as UTF-8")
        part = piece if encoding == "UTF-8" else decoded.encode()
        characters += len(decoded)
        nuls += part.count(0)
        controls += len(part) - len(part.translate(None, _CONTROL))
        for count, most, what in ((nuls, _NULS, "NUL"), (controls, _CONTROLS, "control characters")):
            if count > most * characters:
                refuse("not a text", found=f"{count} {what} among {characters} characters", hint=utf16)
        parts.append(part)
        at, piece = at + len(piece), following
    if not characters:
        refuse("an empty text")
    if encoding != "UTF-8":
        warnings.warn(f"{path or place}: {encoding}, converted to UTF-8", SurgeryWarning, stacklevel=5)
    return b"".join(parts)


def _has_nul_bytes_in_turn(piece: bytes) -> bool:
    """As the letters of English in UTF-16 have."""
    half = len(piece) // 2
    few, many = sorted(piece[i : 2 * half : 2].count(0) for i in (0, 1))
    return half > 0 and few < 0.1 * half and many > 0.8 * half


# --- token ids ------------------------------------------------------------------------------------------------------


def _token_ids(text: Any, place: str) -> NDArray[np.int32]:
    import numpy as np

    if hasattr(text, "__array__"):  # numpy's, and what becomes one
        try:
            text = np.asarray(text)
        except Exception as error:
            raise BadPlan("not token ids", object=place, found=f"{error!r:.80}") from None
        if text.ndim != 1 or text.dtype.kind not in "iuO":
            raise BadPlan(
                "not token ids",
                object=place,
                found=f"{text.dtype} {list(text.shape)}",
                expected="whole numbers in one dimension",
            )
    elif not isinstance(text, (Sequence, array.array)):
        raise BadPlan(
            "not a text",
            object=place,
            found=_shown(text),
            expected="a path, bytes of UTF-8, or a list of token ids",
            hint="token ids are one text: a list in the list" if as_whole_number(text) is not None else None,
        )
    numbers: Any = text
    if isinstance(text, np.ndarray) and text.dtype.kind in "iu":
        wrong = np.flatnonzero((text < 0) | (text >= _ID_END))
    else:
        numbers = [i if type(i) is int else as_whole_number(i) for i in text]
        wrong = np.array([n for n, i in enumerate(numbers) if i is None or not 0 <= i < _ID_END])
    if len(wrong):
        raise BadPlan(
            "not token ids",
            object=place,
            found=f"{_shown(text[wrong[0]])} at {wrong[0]}",
            expected="whole numbers from 0",
        )
    ids: NDArray[np.int32] = np.array(numbers, np.int32)
    return ids


def _shown(x: object) -> str:
    return f"{type(x).__name__} {short_repr(x)}"
