"""What can go wrong, as classes with fields. The text of every message is composed here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


class SurgeryError(Exception):
    """Base of all errors of this package.

    Fields first, text second: `problem` says what is wrong in a few words; `path` (file), `object` (tensor, key or
    option), `offset` (byte in the file), `found`, `expected` and `hint` say where and what to do, or are None.
    A failed system call that is nobody's fault (no such file, no permission) is the plain OSError subclass instead.
    """

    def __init__(
        self,
        problem: str,
        *,
        path: str | None = None,
        object: str | None = None,
        offset: int | None = None,
        found: object = None,
        expected: object = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(problem)
        self.problem = problem
        self.path = path
        self.object = object
        self.offset = offset
        self.found = found
        self.expected = expected
        self.hint = hint

    def __str__(self) -> str:
        text = ": ".join(str(part) for part in (self.path, self.object, self.problem) if part is not None)
        details = [
            f"{word} {value}"
            for word, value in (("found", self.found), ("expected", self.expected), ("at byte", self.offset))
            if value is not None
        ]
        if details:
            text += f" ({', '.join(details)})"
        if self.hint is not None:
            text += f"; {self.hint}"
        return text

    def __reduce__(self) -> tuple[Callable[..., SurgeryError], tuple[object, ...]]:
        return _rebuild, (type(self), self.__dict__)


def _rebuild(kind: type[SurgeryError], fields: Mapping[str, Any]) -> SurgeryError:
    error = kind(fields["problem"])
    for name, value in fields.items():
        setattr(error, name, value)
    return error


class BadFile(SurgeryError):
    """An input file is not what it should be."""


class BadPlan(SurgeryError):
    """What was asked for contradicts itself or its input."""


class Unsupported(SurgeryError):
    """A request that makes sense and that this version cannot serve."""


class SourceChanged(SurgeryError):
    """An input file changed while it was used."""


class OutOfSpace(SurgeryError, OSError):
    """The output does not fit on its disk, or into a limit of this process."""

    def __init__(self, problem: str, *, errno: int | None = None, **fields: Any) -> None:
        SurgeryError.__init__(self, problem, **fields)
        self.errno = errno

    def __reduce__(self) -> tuple[Callable[..., SurgeryError], tuple[object, ...]]:
        return _rebuild, (type(self), {**self.__dict__, "errno": self.errno})


class SurgeryWarning(UserWarning):
    """Something that the user should know of and that stops nothing: raised with warnings.warn where there is no result
    that lists its warnings. The command line prints it as it prints those."""
