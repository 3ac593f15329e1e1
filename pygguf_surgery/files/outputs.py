"""Paths of outputs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from ..base.errors import BadPlan


def check_output(inputs: Iterable[object], output: str | os.PathLike[str], overwrite: bool) -> None:
    """Before anything is read: an output that is one of the inputs, whatever `overwrite` says, or that exists; a folder
    where no file can be made. inputs: paths; anything else among them is passed over."""
    for path in inputs:
        if (
            isinstance(path, (str, os.PathLike))
            and os.path.exists(output)
            and os.path.exists(path)
            and os.path.samefile(path, output)
        ):
            raise BadPlan("the output is one of the inputs", path=os.fsdecode(output), hint="write to another file")
    if os.path.lexists(output) and not overwrite:
        raise FileExistsError(errno.EEXIST, "exists already", os.fsdecode(output))
    folder = os.path.dirname(os.path.abspath(os.fsdecode(output)))
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
