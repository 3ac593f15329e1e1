"""The commands as one argparse parser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from .command import Command, Family, Options
from .commands import calibration, compare, demo, imatrix, info, memory, perplexity, stats, surgery, verify
from .values import not_empty

# In the order of the help. A command is added here and in a module of commands/.
COMMANDS: tuple[Command | Family, ...] = (
    info.COMMAND,
    memory.COMMAND,
    *surgery.COMMANDS,
    verify.COMMAND,
    compare.COMMAND,
    *calibration.COMMANDS,
    perplexity.COMMAND,
    demo.COMMAND,
    imatrix.FAMILY,
    stats.FAMILY,
)


def make_parser(program: str, argv: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """A parser whose namespaces have `handler`, the function to call with them. argv: what it will parse; then only the
    command that it names gets its arguments, as a program that runs one command should not pay for all."""
    parser = argparse.ArgumentParser(
        program, description="Surgery on GGUF model files, in one streaming pass.", allow_abbrev=False
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    names = [command.name for command in COMMANDS]
    only = None if argv is None else next((word for word in argv if word in names), "")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        its_parser = _add(commands, command)
        if only not in (None, command.name):
            continue
        if isinstance(command, Command):
            _add_arguments(its_parser, command)
            continue
        members = its_parser.add_subparsers(required=True, metavar="COMMAND")
        for member in command.commands:
            _add_arguments(_add(members, member), member)
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], command: Command | Family
) -> argparse.ArgumentParser:
    help = command.help
    return commands.add_parser(
        command.name,
        help=help,
        description=help[0].upper() + help[1:] + ".",
        allow_abbrev=False,
        formatter_class=_Formatter,
    )


def _add_arguments(parser: argparse.ArgumentParser, command: Command) -> None:
    for positional in command.positionals:
        parser.add_argument(
            positional.dest,
            metavar=positional.usage or positional.metavar,
            help=positional.help,
            type=not_empty,
            nargs=positional.nargs,
        )
    for title, options in command.groups.items():
        _add_options(parser.add_argument_group(title) if title else parser, options)
    parser.set_defaults(handler=command.handler, **command.defaults)


def _add_options(group: argparse._ActionsContainer, options: Options) -> None:
    for name, option in options.items():
        help = option["help"]
        group.add_argument(name, **{**option, "help": help() if callable(help) else help})


def options_first(argv: Sequence[str]) -> list[str]:
    """The arguments with a command's positional ones moved behind its options: argparse takes those of a changing
    number only if they stand together."""
    command = next((c for c in COMMANDS if argv and c.name == argv[0]), None)
    if not isinstance(command, Command) or not any(p.usage for p in command.positionals):
        return list(argv)
    known = command.options
    options, positionals, rest = [], [], list(argv[1:])
    while rest:
        word = rest.pop(0)
        if word == "--":
            positionals += rest
            break
        if not word.startswith("-") or word == "-":
            positionals.append(word)
            continue
        options.append(word)
        if "=" not in word and rest and word in known and known[word].get("action") != "store_true":
            options.append(rest.pop(0))
    return [argv[0], *options, *(["--"] if positionals else []), *positionals]


class _Formatter(argparse.HelpFormatter):
    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        """Without argparse's "X [X ...]" where the metavar says already how many."""
        if isinstance(action.metavar, str) and " " in action.metavar:
            return action.metavar
        return super()._format_args(action, default_metavar)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from .._core import __version__, ggml_version

        print(f"{parser.prog} {__version__} (ggml {ggml_version()})")
        parser.exit()
