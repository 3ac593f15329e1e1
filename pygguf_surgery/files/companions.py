"""The files that a plan reads beside its model: an importance matrix, a repair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from .._core import Source
from ..base.errors import BadFile, SourceChanged
from ..plan_data.edits import UseImatrix, UseRepair
from .imatrix import Imatrix, open_imatrix
from .repair import Repair, open_repair

Opened = TypeVar("Opened", Imatrix, Repair)


@dataclass(frozen=True)
class Companion:
    """A file that a checked plan reads. identity: device, inode, size and time of change when it was checked."""

    path: str
    identity: tuple[int, int, int, int]


class Companions:
    """Opens each file that plans name once, however often they are checked, and closes all together.

    A context manager.
    """

    def __init__(self) -> None:
        self._opened: dict[tuple[str, str], Imatrix | Repair] = {}
        self._sources: list[Source] = []  # opened again for a run

    def __enter__(self) -> Companions:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for opened in (*self._opened.values(), *self._sources):
            opened.close()
        self._opened.clear()
        self._sources.clear()

    def imatrix(self, use: UseImatrix) -> Imatrix:
        """The importance matrix that an edit names. SurgeryError if it cannot be read or is another one."""
        return self._open(use, open_imatrix, "importance matrix")

    def repair(self, use: UseRepair) -> Repair:
        """The repair that an edit names. SurgeryError if it cannot be read or is another one."""
        return self._open(use, open_repair, "repair")

    def source(self, companion: Companion) -> Source:
        """The file, for a run. SourceChanged if it is no longer the one that was checked."""
        for opened in self._opened.values():
            if (opened.source.path, opened.source.identity) == (companion.path, companion.identity):
                return opened.source
        source = Source(companion.path)
        self._sources.append(source)
        if source.identity != companion.identity:
            raise SourceChanged("changed since the plan was checked", path=companion.path)
        return source

    def _open(self, use: UseImatrix | UseRepair, open_file: Callable[[str], Opened], what: str) -> Opened:
        key = use.path, use.digest
        if key in self._opened:
            return cast(Opened, self._opened[key])
        try:
            opened = open_file(use.path)
        except (OSError, ValueError) as error:  # ValueError: a path from JSON that no file can have
            raise BadFile(
                f"the {what} cannot be read", path=use.path, found=getattr(error, "strerror", None) or error
            ) from None
        if opened.digest != use.digest:
            opened.close()
            raise SourceChanged(f"the {what} is not the one that the plan was made with", path=use.path)
        self._opened[key] = opened
        return opened
