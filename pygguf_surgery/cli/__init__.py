"""The command line: `gguf-surgery`. Imports next to nothing, so that a signal while the rest is imported ends it as
later."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from .signals import code_of, raising_terminated


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 ok, 2 usage, 3 bad input, 4 cannot be done as asked, 130 Ctrl-C,
    143 SIGTERM, 1 anything else."""
    try:
        with raising_terminated():
            from .shell import main

            return main(argv)
    except KeyboardInterrupt as stop:  # before the command began
        return code_of(stop)


def program() -> NoReturn:
    """The program of the shell: from the end of its command on nothing can interrupt it any more, and it is gone at
    once. Python and llama.cpp would take longer to tidy up than a run takes to stop."""
    code = main()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or nobody reads it
            stream.flush()
    os._exit(code)
