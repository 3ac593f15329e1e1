"""Texts become windows: refusals before a model is loaded, and pieces that have exactly the tokens of the whole."""

import os
import re
import warnings
import zlib

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pygguf_surgery as pgs
from pygguf_surgery import _core
from pygguf_surgery.base.errors import SurgeryWarning
from pygguf_surgery.cli import main
from pygguf_surgery.cli.commands.demo_model import DemoShape, write_demo_model
from pygguf_surgery.llama import texts as module
from pygguf_surgery.llama.texts import tokenize_in_pieces, warn_of_context
from support import moe_models, vocabularies
from support.places import SHARED

SMALL = DemoShape(4, 64, 8, 2, 32, 2, 1, 32, 32, 1, 2, 300)
GGUF = gguf.GGUFValueType
TRAINED = SHARED / "models" / "tiny-qwen3next-bf16.gguf"

# --- pieces, with tokenizers of our own ------------------------------------------------------------------------------

LINES = st.lists(
    st.sampled_from(
        [
            "a",
            "B9 x",
            "word, word",
            " one space",
            "  two",
            "",
            "\t",
            ".",
            "end.",
            "x\r",
            "ä\u00a0",
            "漢字",
            "\u0085",
            "<s>",
        ]
    ),
    min_size=2,
    max_size=60,
).map("\n".join)


def words(text, first, *, pattern=r" ?\w+|\s+(?!\S)|\s+|[^\w\s]+\n*", prefix="", around=("<s>", "</s>")):
    """Tokens of a regular expression, as the first step of BPE; numbered by their CRC."""
    found = re.findall(pattern, prefix + text.decode())
    found = [around[0], *found, around[1]] if first else found
    return np.array([zlib.crc32(token.encode()) >> 1 for token in found if token], np.int32)


KINDS = {
    "words": {},
    "a space before": {"prefix": "\u2581"},
    "no tokens for spaces": {"pattern": r"\w+|[^\w\s]"},
    "letters": {"pattern": r"(?s)."},
    "words that go on after a line": {"pattern": r"\w\n[Bx]|\w+|\s|."},
    "words that begin with a line": {"pattern": r"\n\w+|\w+|\s|."},
    "nothing around": {"around": ("", "")},
    "only an end": {"around": ("", "</s>")},
}


@pytest.mark.parametrize("kind", KINDS)
@given(text=LINES, piece=st.integers(2, 60), around=st.integers(20, 60))  # longer than a token
def test_pieces_have_the_tokens_of_the_whole(kind, text, piece, around):
    def tokenize(text, first):
        return words(text, first, **KINDS[kind])

    seen = []
    found = tokenize_in_pieces(tokenize, text.encode(), piece, around, lambda *now: seen.append(now))
    assert found.dtype == np.int32 and found.tolist() == tokenize(text.encode(), True).tolist()
    total = len(text.encode())
    assert seen == sorted(seen) and all(all_ == total for _, all_ in seen) and (not seen or seen[-1][0] == total)


@pytest.mark.parametrize(
    "text",
    [
        "One line and another\n" * 4000,
        "One line, and another.\r\n" * 4000,
        "A paragraph.\n\n" * 8000,
        " \n = A title = \n \n And its text . \n" * 4000,
        '{"text": "漢字"}\n' * 6000,
        "words without an end of the line " * 4000,
    ],
)
@pytest.mark.parametrize("kind", ["words", "a space before"])
def test_no_piece_is_much_longer_than_it_should_be(text, kind):
    lengths = []

    def tokenize(text, first):
        lengths.append(len(text))
        return words(text, first, **KINDS[kind])

    whole = words(text.encode(), True, **KINDS[kind])
    assert len(tokenize_in_pieces(tokenize, text.encode())) == len(whole)
    assert len(text.encode()) > 2 * module.PIECE and max(lengths) <= module.PIECE + 1


def test_a_text_that_begins_as_the_model_begins_one():
    text = b"<s>" * 30 + b"\nwords" * 30

    def tokenize(text, first):
        return words(text, first, pattern=r"</?s>|\w+|\s|.")

    assert tokenize_in_pieces(tokenize, text, 60, 40).tolist() == tokenize(text, True).tolist()


def test_a_text_without_an_end_of_a_word_is_one_piece():
    text = b"word" * 20_000
    assert len(tokenize_in_pieces(words, text)) == len(words(text, True))


# --- pieces, with llama.cpp's tokenizers -----------------------------------------------------------------------------

CORPUS = st.lists(
    st.sampled_from(
        [
            *vocabularies.corpus()[:4000].split(" "),
            *vocabularies.SPECIAL,
            "\n",
            "\n\n",
            "\r\n",
            ".\n",
            "\n9",
            " ",
            "   ",
        ]
    ),
    min_size=10,
    max_size=300,
).map(" ".join) | st.lists(
    st.sampled_from([*vocabularies.corpus()[:1500], *vocabularies.SPECIAL, "\n", "\n", "\nT", "ä\n", "漢\n字"]),
    max_size=300,
).map("".join)


@pytest.fixture(scope="module", params=vocabularies.ALL)
def tokenize(request, tmp_path_factory):
    pytest.importorskip("llama_cpp")
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.gguf"
    return vocabularies.tokenizer(path, vocabularies.ALL[request.param]())


@pytest.mark.parity
@given(text=CORPUS, special=st.booleans(), piece=st.integers(30, 600))
def test_pieces_have_llama_cpp_s_tokens_of_the_whole(tokenize, text, special, piece):
    found = tokenize_in_pieces(lambda part, first: tokenize(part, first, special), text.encode(), piece, 200)
    assert found.tolist() == tokenize(text.encode(), True, special).tolist()


@pytest.mark.parity
@pytest.mark.parametrize("name", ["calib.txt", "eval.txt"])
def test_pieces_of_a_long_text(name):
    pytest.importorskip("llama_cpp")
    if not TRAINED.exists():
        pytest.skip(f"{TRAINED.name} is not here")
    whole = vocabularies.tokenizer(TRAINED)
    text, calls = (TRAINED.parent / name).read_bytes(), []

    def tokenize(part, first):
        calls.append(len(part))
        return whole(part, first)

    assert tokenize_in_pieces(tokenize, text).tolist() == whole(text, True).tolist()
    assert max(calls) <= module.PIECE + 1


@pytest.mark.parity
def test_a_session_leaves_out_what_comes_before_a_later_part(tmp_path):
    pytest.importorskip("llama_cpp")
    from pygguf_surgery.llama.session import Session

    write_demo_model(tmp_path / "demo.gguf", shape=SMALL)
    with pgs.open(tmp_path / "demo.gguf") as model:
        pgs.Plan(model).set_metadata(
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": pgs.Value(256, "u32")}
        ).write(tmp_path / "bos.gguf")
    with Session(str(tmp_path / "bos.gguf"), n_ctx=8, threads=1) as session:
        later = session.tokenize(b"text", first=False)
        assert session.tokenize(b"text").tolist() == [256, *later.tolist()] and 256 not in later


# --- refusals before a model is loaded -------------------------------------------------------------------------------


@pytest.fixture
def unloaded(monkeypatch):
    """llama.cpp is there, and not used."""
    from pygguf_surgery.studies import calibration, repairs

    def session(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(module, "load", lambda: None)
    for study in (calibration, repairs):
        monkeypatch.setattr(study, "Session", session)


def with_vocabulary(path, model, tokens):
    """A small model with 256 token embeddings. model, tokens: None where the key is missing."""
    keys = {"tokenizer.ggml.model": (model, GGUF.STRING)} if model is not None else {}
    if tokens is not None:
        keys["tokenizer.ggml.tokens"] = (tokens, GGUF.ARRAY, GGUF.STRING)
    return moe_models.qwen3next(path, **keys)


def calibrate(path, text, out, **options):
    return pgs.experts.calibrate(path, [text], **options)


def repair(path, text, out, **options):
    with pgs.open(path) as model:
        everyone = {layer: range(32) for layer in range(4)}
        return pgs.experts.repair(model, everyone, [text], out, **options)


def repair_by_another(path, text, out, **options):
    with pgs.open(moe_models.qwen3next(out.parent / "whole.gguf")) as model:
        everyone = {layer: range(32) for layer in range(4)}
        return pgs.experts.repair(model, everyone, [text], out, run=path, **options)


NAMES = [f"t{i}" for i in range(200)]
TEXT, IDS = b"text " * 200, list(range(200))


@pytest.mark.parametrize("study", [calibrate, repair, repair_by_another])
@pytest.mark.parametrize(
    "vocabulary, text, error, words",
    [
        (("no_vocab", None), TEXT, pgs.BadFile, "tokenizer.ggml.model: .*found no_vocab.*token ids"),
        (("none", NAMES), TEXT, pgs.BadFile, "tokenizer.ggml.model: .*found none"),
        (("gpt2", None), TEXT, pgs.BadFile, "tokenizer.ggml.tokens: a model without a vocabulary"),
        (("gpt2", NAMES), [*IDS, 200], pgs.BadPlan, r"not token ids of the model \(found 200, expected 0\.\.199\)"),
        (("gpt2", NAMES), b"short", pgs.BadPlan, r"too short \(found 5 bytes, expected at least 64 tokens\)"),
        (("gpt2", NAMES), IDS[:63], pgs.BadPlan, r"too short \(found 63 tokens, expected at least 64 tokens\)"),
        (("no_vocab", None), [1] * 63, pgs.BadPlan, r"too short \(found 63 tokens"),
        (("no_vocab", None), IDS[:64], pgs.BadPlan, r"not token ids of the model \(found 63, expected 0\.\.47\)"),
    ],
)
def test_a_text_that_the_model_cannot_take(tmp_path, unloaded, study, vocabulary, text, error, words):
    path = with_vocabulary(tmp_path / "model.gguf", *vocabulary)
    with pytest.raises(error, match=words):
        study(path, text, tmp_path / "out.gguf", n_ctx=64)


@pytest.mark.parametrize("study", [calibrate, repair, repair_by_another])
@pytest.mark.parametrize(
    "vocabulary, text", [(("gpt2", NAMES), TEXT), (("gpt2", NAMES), IDS), (("no_vocab", None), [1] * 64)]
)
def test_a_text_that_it_takes(tmp_path, unloaded, study, vocabulary, text):
    path = with_vocabulary(tmp_path / "model.gguf", *vocabulary)
    with pytest.raises(AssertionError, match="was loaded"):
        study(path, text, tmp_path / "out.gguf", n_ctx=64)


@pytest.mark.parametrize("n_ctx, said", [(256, False), (257, True)])
def test_windows_beyond_what_the_model_was_made_for(tmp_path, n_ctx, said):
    path = with_vocabulary(tmp_path / "model.gguf", "gpt2", NAMES)
    with pgs.open(path) as model, warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_of_context(model, n_ctx)
    words = "windows of 257 tokens are longer than the model's context_length, 256"
    assert [(str(w.message), w.category) for w in found] == ([(words, SurgeryWarning)] if said else [])


def test_each_refusal_is_one_line_before_weights_are_read(tmp_path, unloaded, monkeypatch, capsys):
    monkeypatch.setattr(_core, "reduce_rows", lambda *_, **__: pytest.fail("weights were read"))
    model = str(with_vocabulary(tmp_path / "model.gguf", "gpt2", NAMES))
    bare = str(with_vocabulary(tmp_path / "bare.gguf", "no_vocab", None))
    files = {
        "good": TEXT,
        "binary": os.urandom(9) + bytes(range(256)) * 9,
        "empty": b"",
        "utf-16": "words\n".encode("utf-16-le") * 99,
        "latin": "n\u00e4mlich ".encode("latin-1") * 99,
        "short": b"short",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    os.mkdir(tmp_path / "folder")
    for command, options in (("calibrate", []), ("repair", ["--keep", "8", "--by", "aimer"])):
        for path, text, code in (
            *((model, name, 3) for name in ("binary", "empty", "utf-16", "latin", "folder", "none", "model.gguf")),
            (bare, "good", 3),
            (model, "short", 4),
            (model, "good\0", 4),
        ):
            out = tmp_path / "out.gguf"
            given = [command, path, str(tmp_path / text), "-o", str(out), "--ctx", "64", *options]
            said = (main(given), *capsys.readouterr())
            assert said[:2] == (code, "") and said[2].count("\n") == 1, (given, said)
            assert said[2].startswith("gguf-surgery: error: ") and not out.exists()


# --- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parity
def test_more_windows_than_there_are(tmp_path):
    pytest.importorskip("llama_cpp")
    path, seen = moe_models.dots1(tmp_path / "model.gguf"), []
    with pytest.warns(SurgeryWarning, match=r"^texts.0.: the text has 3 windows of 16, all of them are run$"):
        pgs.experts.calibrate(
            path, [[*range(48), 1]], n_ctx=16, chunks=4, threads=1, progress=lambda *now: seen.append(now)
        )
    assert seen == [(1, 3), (2, 3), (3, 3)]  # windows, and nothing of the texts


@pytest.mark.parity
def test_ids_in_another_form_are_the_same_text_and_go_on(tmp_path):
    pytest.importorskip("llama_cpp")
    path, ids = moe_models.dots1(tmp_path / "model.gguf"), np.arange(64) % 48
    as_list, as_array = (
        pgs.experts.calibrate(path, [x], n_ctx=16, threads=1) for x in (ids.tolist(), ids.astype(np.uint8))
    )
    assert as_list.texts == as_array.texts and as_list.nll == as_array.nll
    with pytest.raises(pgs.BadPlan, match="not token ids of the model"):
        pgs.experts.calibrate(path, [[*ids, 10**6]], n_ctx=16)


@pytest.mark.parity
def test_a_text_in_utf_16_is_that_in_utf_8(tmp_path):
    pytest.importorskip("llama_cpp")
    write_demo_model(tmp_path / "model.gguf", shape=SMALL)
    text = "Some words, and more of them.\n" * 9
    (tmp_path / "text").write_bytes(text.encode("utf-16"))
    one = pgs.experts.calibrate(tmp_path / "model.gguf", [text.encode()], n_ctx=32, threads=1)
    with pytest.warns(SurgeryWarning, match="converted to UTF-8"):
        other = pgs.experts.calibrate(tmp_path / "model.gguf", [tmp_path / "text"], n_ctx=32, threads=1)
    assert one.texts == other.texts and one.nll == other.nll
