"""One command from its arguments to its exit code. Results go to stdout, words for people to stderr."""

from __future__ import annotations

import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from typing import TextIO

from ..base.errors import BadFile, BadPlan, OutOfSpace, SourceChanged, SurgeryError, SurgeryWarning, Unsupported
from .common import BAD_INPUT, CANNOT, FAILED, USAGE, Usage, is_quiet, stopped
from .parser import make_parser, options_first
from .words import PROGRAM, say


def main(argv: Sequence[str] | None = None) -> int:
    """As `cli.main`, which has seen to the signals."""
    argv = sys.argv[1:] if argv is None else argv
    for name in ("stdout", "stderr"):  # closed by the caller: print and argparse would fail, or use the other one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # as long as the process lives
    try:
        return _main(argv)
    except KeyboardInterrupt as stop:
        return stopped(stop, "nothing was written")


def _main(argv: Sequence[str]) -> int:
    try:
        args = make_parser(PROGRAM, argv).parse_args(options_first(argv))
    except SystemExit as stop:  # argparse has printed help or what is wrong
        return int(stop.code or 0)
    if hasattr(sys.stdout, "reconfigure"):  # a character that the terminal's encoding lacks must not stop us
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader (head, less) has seen enough; nothing must be flushed at exit
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _run(args: Namespace) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if is_quiet(args) else "always", SurgeryWarning)
            warnings.showwarning = _show_warning
            code: int = args.handler(args)
        return code
    except BrokenPipeError:
        raise
    except Usage as error:
        say(f"error: {error}")
        return USAGE
    except SurgeryError as error:
        say(f"error: {error}")
        return exit_code(error)
    except OSError as error:
        where = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        say(f"error: {where}{error.strerror or error}")
        return exit_code(error, getattr(args, "output", None))


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Python's form for those of others, such as numpy's."""
    if issubclass(category, SurgeryWarning):
        say(f"warning: {message}")
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def exit_code(error: Exception, output: str | None = None) -> int:
    """The exit code for an error; `output` tells a folder that is missing for the output from a missing input."""
    if isinstance(error, (BadFile, SourceChanged)):
        return BAD_INPUT
    if isinstance(error, (BadPlan, Unsupported, OutOfSpace, FileExistsError)):
        return CANNOT
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
        if output is not None and error.filename is not None:
            output, name = os.path.abspath(output), os.path.abspath(os.fsdecode(error.filename))
            if name in (output, os.path.dirname(output)):
                return CANNOT
        return BAD_INPUT
    return FAILED
