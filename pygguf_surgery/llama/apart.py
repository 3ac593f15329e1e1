"""Runs that need llama.cpp in a child process: a file that makes llama.cpp abort is then an error and not the end."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from typing import IO, Any

from ..base.errors import BadFile, SurgeryWarning
from ..base.progress import Progress

# The child finds modules where this process does.
_CHILD = "import sys; sys.path[:] = {path!r}; from pygguf_surgery.llama.apart import child; child({pipe})"


def run_apart(function: str, arguments: Mapping[str, Any], *, path: str, progress: Progress | None = None) -> Any:
    """What `function`, "module:name" in this package, returns or raises for these keyword arguments, run in a child
    process. Arguments and result are pickled; a `progress` is passed on as the argument of that name.

    What is raised here, by Ctrl-C or by `progress`, stops the child as Ctrl-C would and is raised once it has ended.
    The child does not outlive this process. BadFile, with what it said, if it does not come to an end by itself; path:
    for that error.
    """
    ours, theirs = os.pipe()
    with (
        os.fdopen(ours, "rb") as answers,
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            [sys.executable, "-c", _CHILD.format(path=[p for p in sys.path if isinstance(p, str)], pipe=theirs)],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            pass_fds=(theirs,),
            start_new_session=True,  # Ctrl-C in a terminal is for this process, which passes it on
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        ) as process,
    ):
        try:
            os.close(theirs)
            assert process.stdin is not None
            try:
                pickle.dump((function, dict(arguments), progress is not None), process.stdin)
                process.stdin.flush()
            except BrokenPipeError:  # it has ended already: what it said tells why
                with suppress(BrokenPipeError):
                    process.stdin.close()
            result = _listen(answers, progress)
        except BaseException:
            answers.close()  # or the child may wait until it is heard
            process.send_signal(signal.SIGINT)
            while process.poll() is None:  # what a second Ctrl-C does not hurry
                try:
                    process.wait()
                except KeyboardInterrupt:
                    continue
            raise
        process.wait()
        if result is None:
            raise BadFile("llama.cpp aborts on it", path=path, found=_last_words(said) or process.returncode)
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[1]


def _listen(answers: IO[bytes], progress: Progress | None) -> tuple[BaseException | None, Any] | None:
    """(error, result), or None if the child ended without."""
    while True:
        try:
            kind, value = pickle.load(answers)
        except (EOFError, pickle.UnpicklingError):
            return None
        if kind == "progress" and progress is not None:
            progress(*value)
        elif kind == "warning":
            warnings.warn(value, SurgeryWarning, stacklevel=4)
        elif kind == "end":
            return value  # type: ignore[no-any-return]


def _last_words(said: IO[bytes]) -> str | None:
    """The line that says why, of what a process that aborts leaves on stderr."""
    said.seek(0)
    lines = [line.strip() for line in said.read(1 << 20).decode(errors="replace").splitlines() if line.strip()]
    why = [line for line in lines if "GGML_ASSERT" in line or "what():" in line or "error" in line.lower()]
    return (why or lines or [""])[0][:300] or None


def child(pipe: int) -> None:
    """The child's side."""
    answers = os.fdopen(pipe, "wb")
    function, arguments, reports = pickle.load(sys.stdin.buffer)

    def lifeline() -> None:
        os.read(sys.stdin.fileno(), 1)  # until the parent is gone
        os._exit(1)

    def tell(kind: str, value: object) -> None:
        pickle.dump((kind, value), answers)
        answers.flush()

    def warned(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, SurgeryWarning):
            tell("warning", str(message))

    signal.signal(signal.SIGINT, signal.default_int_handler)  # where the parent ignores it, it does not send it
    threading.Thread(target=lifeline, daemon=True).start()
    warnings.simplefilter("always", SurgeryWarning)
    warnings.showwarning = warned
    if reports:
        arguments["progress"] = lambda done, total: tell("progress", (done, total))
    module, name = function.split(":")
    end: tuple[BaseException | None, Any]
    try:
        end = None, getattr(import_module(module, __package__), name)(**arguments)
    except BaseException as error:
        end = error, None
    tell("end", end)
    os._exit(0)
