"""Commands and their options, as data."""

from __future__ import annotations

import argparse

# name -> what argparse wants. Each option is defined once, whichever commands have it.
OPTIONS = {
    "--keep": dict(type=int, metavar="N", help="experts to keep in every layer"),
    "--ratio": dict(type=float, metavar="R", help="share of the experts to keep, such as 0.5, in place of --keep"),
    "--by": dict(metavar="METRIC", help="how to choose them: router-norm (default), aimer, or a JSON file with "
                 '{"kept": {"0": [ids]}} or {"scores": {"0": [numbers]}}'),
    "--mtp": dict(choices=("keep", "drop"), default="keep", help="multi-token prediction blocks: cut them with the "
                  "rest (keep, the default) or remove them (drop)"),
    "--type": dict(metavar="TYPE", help="quantize to this file type of llama-quantize: MXFP4_MOE, Q8_0, F16, BF16, "
                   "F32, COPY; with --pure any ggml type"),
    "--pure": dict(action="store_true", help="one ggml type for every tensor that may be quantized"),
    "--override": dict(action="append", default=[], metavar="REGEX=TYPE", type=lambda text: override(text),
                       help="type (or copy) of the tensors whose name matches; may be repeated, the first match wins"),
    "--allow-requantize": dict(action="store_true", help="let tensors that are quantized already be encoded again"),
    "--set": dict(action="append", default=[], metavar="KEY=VALUE", type=lambda text: assignment(text), help="metadata, KEY=VALUE or KEY:TYPE=VALUE; an "
                  "existing key keeps its type, a new one is a string; may be repeated"),
    "--remove": dict(action="append", default=[], metavar="KEY",
                     help="remove a metadata key, before any is set; may be repeated"),
    "--memory": dict(default="512MiB", metavar="SIZE", type=lambda text: size(text),
                     help="limit of all buffers (default 512MiB)"),
    "--threads": dict(type=int, default=0, metavar="N", help="worker threads (default: all cores, or PGS_THREADS)"),
    "--io": dict(choices=("auto", "mmap", "pread", "direct"), default="auto", help="how to read (default auto)"),
    "--force": dict(action="store_true", help="replace an existing output"),
    "--dry-run": dict(action="store_true", help="describe what would be written, and write nothing"),
    "--quiet": dict(action="store_true", help="no progress, no summary, no warnings"),
    "--json": dict(action="store_true", help="print the machine form"),
    "--full": dict(action="store_true", help="with --json: arrays of over 32 elements in full"),
    "--against": dict(metavar="IN", help="the file it was made from: prove each copied tensor and expert equal"),
    "--no-data": dict(action="store_true", help="check the header and layout only, not every number"),
    "--model": dict(metavar="FILE", help="cut this model in place of the made-up one"),
    "--folder": dict(metavar="DIR", help="keep the files here (default: a temporary folder, removed at the end)"),
}

EXPERTS = ("--keep", "--ratio", "--by", "--mtp")
TYPES = ("--pure", "--override", "--allow-requantize")
METADATA = ("--set", "--remove")
RUN = ("--memory", "--threads", "--io")
OUTPUT = ("--force", "--dry-run", "--quiet")
JSON = ("--json", "--full")

# command -> (help, positional arguments, options)
COMMANDS = {
    "info": ("what is in a model", ("IN",), JSON),
    "plan": ("describe what prune, quantize or edit would write", ("IN",),
             EXPERTS + ("--type",) + TYPES + METADATA + RUN + JSON),
    "prune": ("drop experts; quantize and edit metadata in the same pass", ("IN", "OUT"),
              EXPERTS + ("--type",) + TYPES + METADATA + RUN + OUTPUT + JSON),
    "quantize": ("change the types of tensors", ("IN", "OUT", "TYPE"), TYPES + METADATA + RUN + OUTPUT + JSON),
    "edit": ("set and remove metadata, copy the rest", ("IN", "OUT"), METADATA + RUN + OUTPUT + JSON),
    "verify": ("check a file as llama.cpp would, and against its source", ("FILE",),
               ("--against", "--no-data", "--quiet", "--json")),
    "demo": ("make a small model, cut it in half, show what was lost", (),
             ("--model", "--keep", "--by", "--type", "--folder") + RUN + ("--json",)),
}

POSITIONALS = {
    "IN": ("input", "a GGUF file; of a split model any shard"),
    "OUT": ("output", "the GGUF file to write"),
    "FILE": ("file", "the GGUF file to check"),
    "TYPE": ("type", "a file type, such as MXFP4_MOE; with --pure any ggml type"),
}


def make_parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(program, description="Surgery on GGUF model files, in one streaming pass.",
                                     allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (help, positionals, options) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False)
        for metavar in positionals:
            dest, text = POSITIONALS[metavar]
            command.add_argument(dest, metavar=metavar, help=text, type=not_empty)
        for option in options:
            command.add_argument(option, **OPTIONS[option])
    return parser


class _Version(argparse.Action):
    def __call__(self, parser, *_):
        from .. import _core

        print(f"{parser.prog} {_core.__version__} (ggml {_core.ggml_version()})")
        parser.exit()


def not_empty(text: str) -> str:
    if not text:  # most likely a variable of the shell that is not set
        raise argparse.ArgumentTypeError("it is empty")
    return text


def override(text: str) -> tuple[str, str]:
    pattern, equals, type = text.rpartition("=")
    if not equals or not pattern or not type:
        raise argparse.ArgumentTypeError(f"{text!r} is not REGEX=TYPE")
    return pattern, type


def assignment(text: str) -> str:
    if not text.partition("=")[1] or not text.partition("=")[0]:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return text


def size(text: str) -> int:
    from ..units import parse_size
    from ..errors import SurgeryError

    try:
        return parse_size(text)
    except SurgeryError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
