"""What a command of the shell is: a name, a table of arguments, and the function that runs it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# option -> what argparse's add_argument takes. The help may be a function that returns it, where the text comes from a
# room that takes long to import.
Options = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Positional:
    """nargs: as in argparse. usage: how the help shows arguments whose number is not fixed."""

    metavar: str
    dest: str
    help: str
    nargs: str | None = None
    usage: str | None = None


@dataclass(frozen=True)
class Command:
    """handler: takes the parsed arguments and returns the exit code. groups: the options under the titles that the help
    shows them under; those under "" have none. defaults: in place of those of the options, by argparse's name."""

    name: str
    help: str
    handler: Callable[[Namespace], int]
    positionals: tuple[Positional, ...] = ()
    groups: Mapping[str, Options] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> Options:
        """Of all groups."""
        return {name: option for group in self.groups.values() for name, option in group.items()}


@dataclass(frozen=True)
class Family:
    """A command of commands, such as `imatrix show`."""

    name: str
    help: str
    commands: tuple[Command, ...]
