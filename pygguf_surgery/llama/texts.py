"""Texts as calibration runs them: windows of tokens."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..base.errors import BadFile, BadPlan, SurgeryWarning
from ..base.progress import Progress, ProgressLike, as_progress
from ..base.words import counted
from ..files.model import Model
from ..files.stats import Text
from ..files.texts import GivenText, check_list
from .session import Session, load

Tokens = NDArray[np.int32]
Tokenize = Callable[[bytes, bool], Tokens]  # a text, and whether it is the first part of one

PIECE = 32 << 10  # bytes of text that llama.cpp tokenizes at once: tens of milliseconds, in which Ctrl-C waits
_AROUND = 512  # bytes on each side of a cut that tell whether it changes the tokens
_TRIES = 8  # of each kind
# A cut is where one of these ends, the first of them that will do: the end of a line between other characters and a
# letter or digit, which hardly any tokenizer joins with what follows; any end of a line before at most one space; the
# end of a word.
_CUTS = tuple(map(re.compile, (r"(?<=\S)\n(?=[^\W_])", r"\n(?= ?\S)", r"[^\W_](?= [^\W_])")))
_NO_VOCABULARY = (None, "none", "no_vocab")


@dataclass(frozen=True)
class Windows:
    """A text as calibration runs it: tokens [windows, n_ctx]."""

    text: Text
    tokens: Tokens


def check_windows(n_ctx: int, chunks: int | None, texts: Sequence[object]) -> None:
    for name, number, least in (("n_ctx", n_ctx, 8), ("chunks", chunks, 1)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < least):
            raise BadPlan(
                "not a number of tokens" if name == "n_ctx" else "not a number of windows",
                object=name,
                found=repr(number),
                expected=f"at least {least}",
            )
    check_list(texts)
    if not texts:
        raise BadPlan("no text to calibrate on", object="texts")


def check_texts(model: Model, texts: Sequence[GivenText], n_ctx: int) -> None:
    """Before llama.cpp loads the model, which takes long: BadFile for one without the vocabulary that a text needs,
    BadPlan for a text that cannot fill a window or token ids that the model has not; Unsupported without llama.cpp."""
    load()
    kind = model.metadata.get("tokenizer.ggml.model")
    bare = kind in _NO_VOCABULARY
    n_vocab = _tokens_of(model, bare)
    for text in texts:
        if not isinstance(text.content, bytes):
            if n_vocab:
                _check_ids(text, text.content, n_vocab)
            most = len(text.content)
        elif bare or not n_vocab:
            raise BadFile(
                "a model without a vocabulary has no tokens for a text",
                path=model.path,
                object="tokenizer.ggml.model" if bare else "tokenizer.ggml.tokens",
                found=kind if bare else "none",
                hint="take a file of the model that has it, or token ids as texts",
            )
        else:  # SentencePiece makes three bytes of a space, others fewer; only T5's rules know longer ones
            most = 3 * len(text.content) + 16 if kind != "t5" else n_ctx
        if most < n_ctx:
            raise _too_short(text, f"{len(text.content)} {'bytes' if most > len(text.content) else 'tokens'}", n_ctx)


def warn_of_context(model: Model, n_ctx: int) -> None:
    """SurgeryWarning for windows that are longer than what the model was made for."""
    limit = model.metadata.get(f"{model.architecture}.context_length")
    if isinstance(limit, int) and 0 < limit < n_ctx:
        warnings.warn(
            f"windows of {n_ctx} tokens are longer than the model's context_length, {limit}",
            SurgeryWarning,
            stacklevel=3,
        )


def _tokens_of(model: Model, bare: bool) -> int:
    """How many tokens llama.cpp will know, 0 where that is not said; bare: without a vocabulary."""
    key = "tokenizer.ggml.tokens"
    if bare:
        number = model.metadata.get(f"{model.architecture}.vocab_size")
        return number if isinstance(number, int) else 0
    if key not in model.metadata or not (listed := model.metadata.value(key)).type.endswith("[]"):
        return 0
    return len(listed)


def windows_of(
    session: Session, texts: Sequence[GivenText], chunks: int | None, parse_special: bool, progress: ProgressLike = None
) -> list[Windows]:
    """Each text cut into windows of the session's length, at most `chunks` of them. BadPlan for one that is too short,
    SurgeryWarning for one that has fewer than `chunks`. progress: True draws a bar; to a function, which counts
    windows, nothing is said here."""

    def tokenize(part: bytes, first: bool) -> Tokens:
        return session.tokenize(part, parse_special, first)

    out = []
    some = any(isinstance(text.content, bytes) for text in texts)
    with as_progress(progress is True and some, "tokenizing") as report:
        for text in texts:
            content = text.content
            if isinstance(content, bytes):
                tokens = tokenize_in_pieces(tokenize, content, report=report)
            else:
                tokens = _check_ids(text, content, session.n_vocab)
            n = len(tokens) // session.n_ctx
            if n == 0:
                raise _too_short(text, f"{len(tokens)} tokens", session.n_ctx)
            if chunks is not None and chunks > n:
                warnings.warn(
                    f"{text.name}: the text has {counted(n, 'window')} of {session.n_ctx}, all of them are run",
                    SurgeryWarning,
                    stacklevel=3,
                )
            windows = n if chunks is None else min(n, chunks)
            out.append(
                Windows(
                    Text(text.sha256, len(tokens), windows),
                    tokens[: windows * session.n_ctx].reshape(windows, session.n_ctx),
                )
            )
    return out


def _check_ids(text: GivenText, ids: Tokens, n_vocab: int) -> Tokens:
    if len(ids) and ids.max() >= n_vocab:
        raise BadPlan(
            "not token ids of the model", object=text.name, found=int(ids.max()), expected=f"0..{n_vocab - 1}"
        )
    return ids


def _too_short(text: GivenText, found: str, n_ctx: int) -> BadPlan:
    return BadPlan(
        "the text is too short",
        path=text.path,
        object=text.object,
        found=found,
        expected=f"at least {n_ctx} tokens",
        hint="a longer text, or a smaller n_ctx (--ctx)",
    )


# --- pieces ---------------------------------------------------------------------------------------------------------


def tokenize_in_pieces(
    tokenize: Tokenize, text: bytes, piece: int = PIECE, around: int = _AROUND, report: Progress | None = None
) -> Tokens:
    """The tokens of a text, exactly, of about `piece` bytes at a time, so that a long text does not hold Python's main
    thread. Where nothing will do for a cut, which `around` bytes on both sides of it tell, a piece is longer.

    A later piece is tokenized with an end of a line before it, whose tokens are dropped: some tokenizers add a space at
    the beginning of a text.
    """
    ends = _Around.of(tokenize, text[: _at_character(text, around)]) if len(text) > piece else None
    if ends is None:
        return tokenize(text, True)
    newline = tokenize(b"\n", False)

    def later(part: bytes) -> Tokens | None:
        tokens = tokenize(b"\n" + part, False)
        return tokens[len(newline) :] if np.array_equal(tokens[: len(newline)], newline) else None

    def good(start: int, cut: int) -> bool:
        low, high = _at_character(text, max(start, cut - around)), _at_character(text, cut + around)
        right = later(text[cut:high])
        return right is not None and np.array_equal(
            tokenize(text[low:high], False), np.concatenate((tokenize(text[low:cut], False), right))
        )

    parts, start = [ends.before], 0
    while start < len(text):
        cut = _next_cut(text, start, piece, good)
        part = later(text[start:cut]) if start else tokenize(text[:cut], False)
        if part is None:  # never seen: the cut was good
            return tokenize(text, True)
        parts.append(part)
        start = cut
        if report is not None:
            report(start, len(text))
    return np.concatenate((*parts, ends.after))


@dataclass(frozen=True)
class _Around:
    """The tokens that the model wants before a text and after it."""

    before: Tokens
    after: Tokens

    @staticmethod
    def of(tokenize: Tokenize, sample: bytes) -> _Around | None:
        """By a sample; None where it does not tell."""
        bare, full = tokenize(sample, False), tokenize(sample, True)
        more = range(len(full) - len(bare) + 1)
        at = [n for n in more if np.array_equal(full[n : n + len(bare)], bare)]
        return _Around(full[: at[0]], full[at[0] + len(bare) :]) if len(at) == 1 else None


def _next_cut(text: bytes, start: int, piece: int, good: Callable[[int, int], bool]) -> int:
    """Where the piece from `start` ends: at the last good cut of its second half, or of the next stretch that has
    one, or with the text."""
    low, high = start + piece // 2, start + piece
    while high < len(text):
        low, high = _at_character(text, low), _at_character(text, high)
        stretch = text[low:high].decode()
        for cuts in _CUTS:
            found = [match.end() for match in cuts.finditer(stretch)][-_TRIES:]
            for end in reversed(found):
                cut = low + len(stretch[:end].encode())
                if good(start, cut):
                    return cut
        low, high = high, high + piece // 2
    return len(text)


def _at_character(text: bytes, at: int) -> int:
    """`at`, or the next byte that begins a character; the end if it is beyond."""
    while at < len(text) and text[at] & 0xC0 == 0x80:
        at += 1
    return min(at, len(text))
