"""Paths of outputs."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

from ..base.errors import BadPlan


def check_output(inputs: Iterable[object], output: str | os.PathLike[str], overwrite: bool) -> None:
    """Before anything is read, as the sink refuses it: an output that is one of the inputs or no file, whatever
    `overwrite` says, or that exists; one that cannot be replaced; a folder where no file can be made. inputs: paths;
    anything else among them is passed over."""
    path = os.fsdecode(output)
    if not path:
        raise BadPlan("an empty name", object="output")
    if os.path.basename(path) in ("", ".", ".."):
        raise BadPlan("the output is a folder, not a file", path=path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadPlan("the output exists and is not a regular file", path=path)
    for given in inputs:
        if (
            isinstance(given, (str, os.PathLike))
            and os.path.exists(path)
            and os.path.exists(given)
            and os.path.samefile(given, path)
        ):
            raise BadPlan("the output is one of the inputs", path=path, hint="write to another file")
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(errno.EEXIST, "exists already", path)
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
    folder = os.path.dirname(os.path.realpath(path) if os.path.islink(path) else path) or "."
    if not os.path.lexists(folder):
        raise FileNotFoundError(errno.ENOENT, "the output folder does not exist", folder)
    if not os.path.isdir(folder):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
