"""llama.cpp in this process, through llama-cpp-python: runs windows of text, and hands out tensors of its graph by
name."""

from __future__ import annotations

import ctypes
import math
import os
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from .._core import thread_count
from ..base.errors import BadFile, Unsupported
from ..base.units import parse_threads
from .log import LOG
from .worker import Stopped, Worker

BATCH = 512  # tokens per llama_decode: the logits of all of them are in memory at once
_SCORE_ROWS = 32  # rows of logits as float64 at a time
_NUMPY_TYPES = {0: "<f4", 26: "<i4"}  # GGML_TYPE_F32, GGML_TYPE_I32


class _Tensor(ctypes.Structure):
    """struct ggml_tensor, up to its name (ggml.h; Session checks that the installed one still agrees)."""

    _fields_ = [
        ("type", ctypes.c_int32),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int32),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    ]


def load() -> Any:
    """The ctypes module of llama-cpp-python; Unsupported where it is not installed."""
    try:
        from llama_cpp import llama_cpp  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise Unsupported(
            "this needs llama-cpp-python", found=error, hint="pip install 'pygguf-surgery[llama]'"
        ) from None
    except (OSError, RuntimeError) as error:
        raise Unsupported("llama-cpp-python does not load", found=error) from None
    return llama_cpp


class Losses(NamedTuple):
    """Of the tokens of a window's second half, which is what llama-perplexity counts."""

    nll: float  # sum of -log p
    squares: float  # sum of their squares
    predictions: int


Look = Callable[[NDArray[np.float32], NDArray[np.int32]], NDArray[np.float64]]


def losses_of(logits: NDArray[np.float32], targets: NDArray[np.int32]) -> NDArray[np.float64]:
    """-log softmax(logits)[target] of each row, in float64."""
    z = logits.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    losses: NDArray[np.float64] = np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), targets]
    return losses


class Watch(Protocol):
    """What sees the tensors of llama.cpp's graph while a session runs, in the session's own thread."""

    def wants(self, name: str) -> bool:
        """Asked about every tensor of the graph."""

    def take(self, name: str, values: NDArray[Any]) -> NDArray[Any] | None:
        """The values of a tensor that is wanted, shape outermost first: float32, or int32 for ids. An array that is
        returned takes their place."""


class Session:
    """A model loaded by llama.cpp. A context manager; one thread at a time.

    n_ctx: tokens of a window. n_cells: of the cache, where something longer is generated. watch: sees the graph, in a
    thread of the session's own; what it raises ends the run and is raised from it. Ctrl-C, or what else a signal's
    handler raises, stops llama.cpp at the next tensor that it would compute and is raised as it is; the session is then
    good for nothing but `close`.
    BadFile for a file that llama.cpp does not load, with what it said.
    """

    def __init__(
        self,
        path: str,
        *,
        n_ctx: int,
        n_cells: int = 0,
        threads: int = 0,
        gpu_layers: int = 0,
        watch: Watch | None = None,
    ):
        self.llama, self.path, self.n_ctx, self.watch = load(), path, n_ctx, watch
        self._n_cells = max(n_ctx, n_cells)
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None
        self._vocabulary: Any = None
        self.n_vocab = self._batch_size = 0
        self._error: BaseException | None = None
        self._said: deque[str] | None = None
        self._callback = self.llama.ggml_backend_sched_eval_callback(self._evaluated)
        count = thread_count(parse_threads(threads))
        self._worker = Worker()
        try:
            self._worker.call(lambda: self._open(count, gpu_layers))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, threads: int, gpu_layers: int) -> None:
        llama, stop = self.llama, self._worker.stop
        self._said = LOG.open(llama)
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        params.progress_callback = llama.llama_progress_callback(stop.progress_callback)
        params.progress_callback_user_data = stop.address
        self._model = llama.llama_model_load_from_file(os.fsencode(self.path), params)
        if stop.is_set():
            raise Stopped
        if not self._model:
            raise BadFile("llama.cpp does not load it", path=self.path, found=self._last_words())
        params = llama.llama_context_default_params()
        params.n_ctx = self._n_cells
        params.n_batch = params.n_ubatch = self._batch_size = min(self.n_ctx, BATCH)
        params.n_threads = params.n_threads_batch = threads
        params.abort_callback = llama.ggml_abort_callback(stop.abort_callback)
        params.abort_callback_data = stop.address
        if self.watch is not None:
            self._check_layout()
            params.cb_eval = self._callback
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise BadFile("llama.cpp cannot run it", path=self.path, found=self._last_words())
        self._vocabulary = llama.llama_model_get_vocab(self._model)
        self.n_vocab = llama.llama_vocab_n_tokens(self._vocabulary)
        self._batch = llama.llama_batch_init(params.n_batch, 0, 1)
        for i in range(params.n_batch):
            self._batch.n_seq_id[i], self._batch.seq_id[i][0], self._batch.logits[i] = 1, 0, 1

    def _last_words(self) -> str | None:
        errors = [
            line for line in "".join(self._said or ()).splitlines() if "error" in line.lower() or "fail" in line.lower()
        ]
        return errors[0].strip() if errors else None

    def _check_layout(self) -> None:
        """That _Tensor is the struct of this ggml: what it sets through its own functions is where we look."""
        lib = self.llama._lib
        lib.ggml_tensor_overhead.restype = ctypes.c_size_t
        lib.ggml_init.restype = lib.ggml_new_tensor_3d.restype = lib.ggml_set_name.restype = ctypes.c_void_p
        for move in (lib.ggml_backend_tensor_get, lib.ggml_backend_tensor_set):
            move.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
            move.restype = None

        class Params(ctypes.Structure):
            _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

        lib.ggml_init.argtypes, lib.ggml_free.argtypes = [Params], [ctypes.c_void_p]
        context = lib.ggml_init(Params(4 * lib.ggml_tensor_overhead(), None, True))
        try:
            tensor = lib.ggml_new_tensor_3d(
                *(ctypes.c_void_p(context), ctypes.c_int(26), ctypes.c_int64(5), ctypes.c_int64(7), ctypes.c_int64(11))
            )
            lib.ggml_set_name(ctypes.c_void_p(tensor), b"probe")
            seen = _Tensor.from_address(tensor)
            if (seen.type, *seen.ne, *seen.nb, seen.name) != (26, 5, 7, 11, 1, 4, 20, 140, 1540, b"probe"):
                raise Unsupported("this version of llama-cpp-python has another struct ggml_tensor")
        finally:
            lib.ggml_free(context)

    def close(self) -> None:
        self._worker.call(self._free, always=True)
        self._worker.close()

    def _free(self) -> None:
        llama = self.llama
        if self._batch is not None:
            llama.llama_batch_free(self._batch)
        if self._context:
            llama.llama_free(self._context)
        if self._model:
            llama.llama_model_free(self._model)
        self._batch = self._context = self._model = None
        if self._said is not None:
            LOG.close(llama)
            self._said = None

    # --- text -------------------------------------------------------------------------------------------------------

    def tokenize(self, text: bytes, parse_special: bool = False, first: bool = True) -> NDArray[np.int32]:
        """The tokens of UTF-8 text, with what the model wants around it unless it is not the `first` part of one;
        special tokens are text unless parse_special."""
        return self._worker.call(lambda: self._tokens(text, parse_special, first))

    def _tokens(self, text: bytes, parse_special: bool, first: bool) -> NDArray[np.int32]:
        tokens = (self.llama.llama_token * (len(text) + 16))()
        n = self.llama.llama_tokenize(self._vocabulary, text, len(text), tokens, len(tokens), first, parse_special)
        if n < 0:
            raise BadFile("llama.cpp cannot tokenize the text", path=self.path)
        ids: NDArray[np.int32] = np.frombuffer(tokens, np.int32)[:n].copy()
        return ids

    # --- running ----------------------------------------------------------------------------------------------------

    def run(
        self, tokens: NDArray[np.int32], whole: Callable[[Losses], object] | None = None, *, look: Look = losses_of
    ) -> Losses:
        """Runs one window from an empty cache, every token with logits, so that the last layer sees all of them.

        As in llama-perplexity the first token becomes the beginning-of-text token where the model adds one. whole:
        called after the window, in the thread of `watch`; what it does is done to its end, or the window was not whole
        and it is not called at all. look: called in that thread too with some of the predictions that count, in order:
        logits [n, n_vocab], which are llama.cpp's own memory, and the tokens [n] that followed; returns their losses.
        """

        def work() -> Losses:
            losses = self._run(tokens, look)
            if whole is not None:
                whole(losses)
            return losses

        return self._worker.call(work)

    def _run(self, tokens: NDArray[np.int32], look: Look) -> Losses:
        llama = self.llama
        tokens = tokens.copy()
        if llama.llama_vocab_get_add_bos(self._vocabulary):
            tokens[0] = llama.llama_vocab_bos(self._vocabulary)
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        first = len(tokens) // 2
        nll, squares, count = 0.0, 0.0, 0
        for start in range(0, len(tokens), BATCH):
            part = tokens[start : start + BATCH]
            self._fill(part, start)
            self._decode(self._batch)
            # Logits at position p predict token p + 1.
            begin, end = max(start, first), min(start + len(part), len(tokens) - 1)
            if begin < end:
                logits = np.ctypeslib.as_array(llama.llama_get_logits(self._context), (len(part), self.n_vocab))
                losses = self._losses(logits[begin - start : end - start], tokens[begin + 1 : end + 1], look)
                nll, squares, count = nll + losses.sum(), squares + (losses * losses).sum(), count + len(losses)
        return Losses(float(nll), float(squares), count)

    def _decode(self, batch: Any) -> None:
        self._error = None
        if self._said is not None:
            self._said.clear()
        result = self.llama.llama_decode(self._context, batch)
        if self._worker.stop.is_set():
            raise Stopped
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if result:
            raise BadFile("llama.cpp could not run a batch", path=self.path, found=self._last_words() or result)

    def _losses(self, logits: NDArray[np.float32], targets: NDArray[np.int32], look: Look) -> NDArray[np.float64]:
        parts = []
        for first in range(0, len(logits), _SCORE_ROWS):
            if self._worker.stop.is_set():
                raise Stopped
            rows = slice(first, first + _SCORE_ROWS)
            parts.append(look(logits[rows], targets[rows]))
        return np.concatenate(parts)

    def generate(self, tokens: NDArray[np.int32], most: int) -> NDArray[np.int32]:
        """The most likely continuation of `tokens` (temperature 0; of equals the lowest id), from an empty cache: at
        most `most` tokens, fewer where the model ends the text. All must fit n_ctx."""
        return self._worker.call(lambda: self._generate(tokens, most))

    def _generate(self, tokens: NDArray[np.int32], most: int) -> NDArray[np.int32]:
        llama = self.llama
        made: list[int] = []
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        at = 0
        while len(made) < most:
            for start in range(0, len(tokens), self._batch_size):
                self._fill(tokens[start : start + self._batch_size], at)
                self._decode(self._batch)
                at += self._batch.n_tokens
            last = np.ctypeslib.as_array(llama.llama_get_logits_ith(self._context, -1), (self.n_vocab,))
            token = int(last.argmax())
            if llama.llama_vocab_is_eog(self._vocabulary, token):
                break
            made.append(token)
            tokens = np.array([token], np.int32)
        return np.array(made, np.int32)

    def _fill(self, tokens: NDArray[np.int32], start: int) -> None:
        """Puts tokens from this position on into the batch."""
        self._batch.n_tokens = n = len(tokens)
        np.ctypeslib.as_array(self._batch.token, (n,))[:] = tokens
        np.ctypeslib.as_array(self._batch.pos, (n,))[:] = np.arange(start, start + n)

    def _evaluated(self, address: int, ask: bool, _data: object) -> bool:
        """cb_eval: asked about each tensor, then called with those that were wanted; False stops the graph. An
        exception must not cross C: it is kept for _decode. Once the run is to end every tensor is wanted, so that a
        backend which knows no abort callback comes back soon, and is told to stop."""
        watch = self.watch
        if watch is None or self._error is not None or self._worker.stop.is_set():
            return ask
        try:
            tensor = _Tensor.from_address(address)
            name = tensor.name.decode(errors="replace")
            if ask:
                return watch.wants(name)
            replacement = watch.take(name, self._values(address, tensor))
            if replacement is not None:
                self._replace(address, tensor, replacement)
            return True
        except BaseException as error:
            self._error = error
            return ask

    def _values(self, address: int, tensor: _Tensor) -> NDArray[Any]:
        """The values of a tensor or of a strided view, copied from wherever they are."""
        kind = _NUMPY_TYPES.get(tensor.type)
        if kind is None:
            raise Unsupported(
                "a tensor of the graph of an unexpected type",
                object=tensor.name.decode(errors="replace"),
                found=f"ggml type {tensor.type}",
            )
        shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
        nbytes = 4 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))  # as ggml_nbytes
        raw = np.empty(nbytes, np.uint8)
        self.llama._lib.ggml_backend_tensor_get(address, raw.ctypes.data, 0, nbytes)
        view = (
            np.lib.stride_tricks.as_strided(raw[:4].view(kind), shape, strides, writeable=False)
            if math.prod(shape)
            else np.empty(shape, kind)
        )
        while view.ndim > 1 and view.shape[0] == 1:
            view = view[0]
        return view

    def _replace(self, address: int, tensor: _Tensor, values: NDArray[Any]) -> None:
        ne, nb = tuple(tensor.ne), tuple(tensor.nb)
        data = np.ascontiguousarray(values, _NUMPY_TYPES[tensor.type])
        if data.size != math.prod(ne) or nb[1:] != tuple(4 * math.prod(ne[:i]) for i in (1, 2, 3)):
            raise Unsupported("a tensor of the graph cannot be replaced", object=tensor.name.decode(errors="replace"))
        self.llama._lib.ggml_backend_tensor_set(address, data.ctypes.data, 0, data.nbytes)
