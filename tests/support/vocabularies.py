"""Small vocabularies of every kind that llama.cpp tokenizes differently, learned from this checkout's README."""

from __future__ import annotations

import functools
import itertools
from collections import Counter

import gguf
import numpy as np

from pygguf_surgery.cli.commands.demo_model import _vocabulary
from support.gguf_files import make_gguf
from support.llama_oracle import load
from support.places import ROOT

U32, STRING, ARRAY, BOOL = (getattr(gguf.GGUFValueType, name) for name in ("UINT32", "STRING", "ARRAY", "BOOL"))
F32, I32 = gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.INT32
UNKNOWN, CONTROL, USER, BYTE = 2, 3, 4, 6
SPECIAL = {"<|end|>": CONTROL, "[A]": USER, "<|\nx|>": CONTROL}  # one that no cut may go through


def corpus():
    return (ROOT / "README.md").read_text()[:8000]


@functools.cache
def pieces(count=400):
    """The most frequent strings of 2 to 5 characters, spaces as SentencePiece writes them; some go on after a line."""
    text = corpus().replace(" ", "\u2581")
    found = Counter(text[i : i + n] for n in range(2, 6) for i in range(len(text)))
    crossing = [piece for piece, _ in found.most_common() if piece[0] == "\n" and piece[1:].isalnum()][:3]
    return [piece for piece, n in found.most_common(count) if "\n" not in piece] + ["\n\n", ".\n", *crossing]


def spm(*, space_prefix=True):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces()]
    tokens += sorted({c for piece in pieces() for c in piece if c != "\n"}) + list(SPECIAL)
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [1] * (len(tokens) - 259 - len(SPECIAL)) + [*SPECIAL.values()]
    return _keys("llama", tokens, types, scores=[-float(i) for i in range(len(tokens))]) | {
        "tokenizer.ggml.add_space_prefix": (space_prefix, BOOL),
        "tokenizer.ggml.bos_token_id": (1, U32),
        "tokenizer.ggml.eos_token_id": (2, U32),
        "tokenizer.ggml.add_bos_token": (True, BOOL),
        "tokenizer.ggml.add_eos_token": (True, BOOL),
    }


def ugm():
    tokens = ["<pad>", "</s>", "<unk>", "\u2581", *pieces()]
    tokens += sorted({c for piece in pieces() for c in piece} - {"\u2581"}) + list(SPECIAL)
    types = [CONTROL, CONTROL, UNKNOWN] + [1] * (len(tokens) - 3 - len(SPECIAL)) + [*SPECIAL.values()]
    return _keys("t5", tokens, types, scores=[-4.0 - 0.01 * i for i in range(len(tokens))]) | {
        "tokenizer.ggml.add_eos_token": (True, BOOL)
    }


@functools.cache
def merges(count=250):
    """Of byte pairs, over the whole text, so that some would join what pre-tokenizers keep apart."""
    spelled = _vocabulary(256)
    text, learned = [spelled[b] for b in corpus()[:6000].encode()], []
    for _ in range(count):
        (a, b), _ = Counter(itertools.pairwise(text)).most_common(1)[0]
        learned.append((a, b))
        joined, i = [], 0
        while i < len(text):
            pair = text[i : i + 2] == [a, b]
            joined.append(a + b if pair else text[i])
            i += 2 if pair else 1
        text = joined
    return learned


def bpe(pre):
    tokens = list(dict.fromkeys([*_vocabulary(256)[:256], *(a + b for a, b in merges())]))
    types = [1] * len(tokens) + [*SPECIAL.values()]
    keys = _keys("gpt2", [*tokens, *SPECIAL], types) | {"tokenizer.ggml.pre": (pre, STRING)}
    keys["tokenizer.ggml.merges"] = ([f"{a} {b}" for a, b in merges()], ARRAY, STRING)
    keys["tokenizer.ggml.bos_token_id"] = keys["tokenizer.ggml.eos_token_id"] = (len(tokens), U32)
    return keys


def _keys(model, tokens, types, scores=None):
    keys = {
        "tokenizer.ggml.model": (model, STRING),
        "tokenizer.ggml.tokens": (tokens, ARRAY, STRING),
        "tokenizer.ggml.token_type": (types, ARRAY, I32),
    }
    return keys if scores is None else keys | {"tokenizer.ggml.scores": (scores, ARRAY, F32)}


ALL = {
    "spm": spm,
    "spm without a space": functools.partial(spm, space_prefix=False),
    "ugm": ugm,
    **{pre: functools.partial(bpe, pre) for pre in ("gpt-2", "llama-bpe", "qwen2", "deepseek-llm", "tekken", "gpt-4o")},
}


def tokenizer(path, keys=None):
    """tokenize(text, first, parse_special) of llama.cpp, with the vocabulary of a file, which is made of `keys`."""
    if keys is not None:
        shape = {"context_length": 64, "embedding_length": 32, "block_count": 1, "attention.head_count": 1}
        keys = {f"llama.{key}": (value, U32) for key, value in shape.items()} | keys
        keys["llama.attention.layer_norm_rms_epsilon"] = (1e-6, F32)
        make_gguf(path, "llama", keys, {})
    llama = load()
    params = llama.llama_model_default_params()
    params.vocab_only = True
    model = llama.llama_model_load_from_file(str(path).encode(), params)
    assert model, "".join(llama.said)[-500:]
    vocabulary = llama.llama_model_get_vocab(model)

    def tokenize(text, first, parse_special=False):
        ids = (llama.llama_token * (4 * len(text) + 16))()
        n = llama.llama_tokenize(vocabulary, text, len(text), ids, len(ids), first, parse_special)
        assert n >= 0
        return np.frombuffer(ids, np.int32)[:n].copy()

    return tokenize
