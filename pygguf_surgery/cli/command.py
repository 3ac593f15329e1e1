"""What a command of the shell is: a name, a table of arguments, and the function that runs it. Named tuples, as
dataclasses cost each start of the program 8 ms."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

# option -> what argparse's add_argument takes. The help may be a function that returns it, where the text comes from a
# room that takes long to import.
Options = dict[str, dict[str, Any]]


class Positional(NamedTuple):
    """nargs: as in argparse. usage: how the help shows arguments whose number is not fixed."""

    metavar: str
    dest: str
    help: str
    nargs: str | None = None
    usage: str | None = None


class Command(NamedTuple):
    """handler: takes the parsed arguments and returns the exit code. groups: the options under the titles that the help
    shows them under; those under "" have none. defaults: in place of those of the options, by argparse's name."""

    name: str
    help: str
    handler: Callable[[Namespace], int]
    positionals: tuple[Positional, ...] = ()
    groups: Mapping[str, Options] = {}  # a named tuple's default, which nobody changes
    defaults: Mapping[str, Any] = {}

    @property
    def options(self) -> Options:
        """Of all groups."""
        return {name: option for group in self.groups.values() for name, option in group.items()}


class Family(NamedTuple):
    """A command of commands, such as `imatrix show`."""

    name: str
    help: str
    commands: tuple[Command, ...]
