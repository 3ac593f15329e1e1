"""The command line: `gguf-surgery`. Imports nothing, so that Ctrl-C while the rest is imported is one in `program`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 ok, 2 usage, 3 bad input, 4 cannot be done as asked, 130 Ctrl-C,
    143 SIGTERM, 1 anything else."""
    from .shell import main

    return main(argv)


def program() -> NoReturn:
    """The program of the shell: from the end of its command on nothing can interrupt it any more, and it is gone at
    once. Python and llama.cpp would take longer to tidy up than a run takes to stop."""
    try:
        code = main()
    except KeyboardInterrupt:  # before its command began
        code = 130
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or nobody reads it
            stream.flush()
    os._exit(code)
