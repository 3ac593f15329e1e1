"""Commands and their options, as data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from .commands import imatrix, stats

# fmt: off
# name -> what argparse wants. Each option is defined once, whichever commands have it.
OPTIONS = {
    "--keep": dict(type=int, metavar="N", help="experts to keep in every layer"),
    "--ratio": dict(type=float, metavar="R", help="share of the experts to keep, such as 0.5, in place of --keep"),
    "--by": dict(metavar="METRIC", help="how to choose them: router-norm (default) or aimer from the weights; frequency "
                 "or imatrix-msan with --imatrix; reap, reap-sum, ean-sum, ean-mean, msan, weighted-frequency or frequency "
                 'with --stats; best, that is reap-sum, with --stats and --repair; or a JSON file with '
                 '{"kept": {"0": [ids]}} or {"scores": {"0": [numbers]}}'),
    "--saliency": dict(metavar="METRIC", default="reap", help="which experts the others are merged into, a metric of "
                       "--stats (default reap)"),
    "--stats": dict(metavar="STATS", help="what calibrate has recorded, for --by"),
    "--super-experts": dict(action="store_true", help="keep experts with massive activations (from --stats) whatever "
                            "their score"),
    "--budget": dict(choices=("layer", "global"), default="layer", help="keep N in each layer (the default), or N times "
                     "the layers where they matter most, which only routers with a selection bias can load"),
    "--report": dict(metavar="FILE", help="write the decision, kept ids and scores, as JSON that --by takes back"),
    "--plot": dict(metavar="FILE.png", help="draw the choice: layers by experts, and what stays of each layer"),
    "--repair": dict(metavar="REPAIR", help="down projections that repair has made for the experts that stay; names "
                     "those too, in place of --keep and --by"),
    "--run": dict(metavar="FILE", help="let llama.cpp run this file of the same model, such as a quantized one"),
    "-o": dict(dest="output", metavar="OUT", required=True, help="the file to write"),
    "--ctx": dict(type=int, default=512, metavar="N", help="tokens of a window (default 512)"),
    "--chunks": dict(type=int, metavar="N", help="at most N windows of each text"),
    "--weights-only": dict(action="store_true", help="group experts without statistics"),
    "--group-size": dict(type=int, default=16, metavar="N", help="experts of a group at most (default 16)"),
    "--merge-stats": dict(action="store_true", help="also record what merging needs: larger statistics"),
    "--parse-special": dict(action="store_true", help="special tokens in the text are tokens, not text"),
    "--gpu-layers": dict(type=int, default=0, metavar="N", help="layers that llama.cpp puts on a GPU, -1 for all"),
    "--mtp": dict(choices=("keep", "drop"), default="keep", help="multi-token prediction blocks: cut them with the "
                  "rest (keep, the default) or remove them (drop)"),
    "--prune-layers": dict(type=lambda text: numbers(text), metavar="L0,L1,...",
                           help="drop these blocks; unlike in llama-quantize everything that counts blocks follows, and "
                           "what cannot is refused"),
    "--type": dict(metavar="TYPE", help="quantize to this file type of "
                   "llama-quantize, such as Q4_K_M or MXFP4_MOE; with --pure any ggml type"),
    "--recipe": dict(type=lambda text: not_empty(text), metavar="NAME", help="quantize as a recipe says, a "
                     "TOML file or a shipped one (attention-bf16, mxfp4-moe, spark-128g); TYPE replaces its base type"),
    "--pure": dict(action="store_true", help="one ggml type for every tensor that may be quantized (TYPE is that type: "
                   "IQ2_S is IQ2_S, where llama-quantize takes IQ2_XS)"),
    "--override": dict(action="append", default=[], metavar="REGEX=TYPE", type=lambda text: override(text),
                       help="type (or copy) of the tensors whose name matches; may be repeated, the first match wins. "
                       "Case matters, F16, BF16 and F32 as TYPE do not switch it off, and one that matches nothing is "
                       "an error (all unlike llama-quantize)"),
    "--tensor-type": dict(action="append", dest="override", metavar="REGEX=TYPE", type=lambda text: override(text),
                          help="the same as --override"),
    "--tensor-type-file": dict(type=lambda text: not_empty(text), metavar="FILE",
                               help="overrides from a file, REGEX=TYPE between blanks or lines"),
    "--output-tensor-type": dict(type=lambda text: not_empty(text), metavar="TYPE",
                                 help="ggml type of output.weight, before any override"),
    "--token-embedding-type": dict(type=lambda text: not_empty(text), metavar="TYPE",
                                   help="ggml type of token_embd.weight, before any override"),
    "--leave-output-tensor": dict(action="store_true", help="leave output.weight as it is"),
    "--allow-requantize": dict(action="store_true", help="let tensors that are quantized already be encoded again"),
    "--imatrix": dict(metavar="FILE", type=lambda text: not_empty(text),
                      help="importance matrix, GGUF or .dat; it follows every cut of experts and layers. An entry of "
                      "another size is an error, for token_embd too"),
    "--imatrix-missing": dict(choices=("default", "fail", "ones", "layer-mean"), default="default",
                              help="for an expert that the matrix never saw, or a tensor that it lacks: as llama-quantize "
                              "(default: ones; no importance), an error, ones, or the mean of the layer's experts"),
    "--include-weights": dict(action="append", default=[], type=lambda text: not_empty(text),
                              metavar="NAME",
                              help="use the importance matrix only for tensors whose name contains this; may be repeated"),
    "--exclude-weights": dict(action="append", default=[], type=lambda text: not_empty(text),
                              metavar="NAME",
                              help="do not use it for tensors whose name contains this; may be repeated"),
    "--quality": dict(choices=("default", "best"), help="best: encode MXFP4 with less error than llama-quantize, weighted "
                      "by the importance matrix if there is one; default: llama-quantize's bytes"),
    "--target-size": dict(metavar="SIZE", type=lambda text: size(text), help="choose each tensor's type, within the "
                          "family of TYPE, so that the output has at most this size, such as 22GB"),
    "--target-bpw": dict(metavar="BITS", type=float, help="the same by bits per weight, such as 4.2"),
    "--split-max-size": dict(metavar="SIZE", type=lambda text: split_size(text),
                             help="write shards with at most this size of tensors, such as 45G (10^9 bytes each)"),
    "--split-max-tensors": dict(metavar="N", type=int, help="write shards of at most N tensors"),
    "--no-tensor-first-split": dict(action="store_true", help="the first shard holds the metadata only"),
    "--keep-split": dict(action="store_true", help="write shards as the input has them"),
    "--override-kv": dict(action="append", default=[], metavar="KEY=TYPE:VALUE", type=lambda text: override_kv(text),
                          help="metadata as llama-quantize takes it, TYPE int, float, bool or str; but an existing key "
                          "keeps its type, and neither is a negative number made positive nor a string cut"),
    "--max-buffer-size": dict(metavar="MIB", type=int, help="--memory in MiB; less than 64 is taken as 64"),
    "--set": dict(action="append", default=[], metavar="KEY=VALUE", type=lambda text: assignment(text),
                  help="metadata, KEY=VALUE or KEY:TYPE=VALUE; an existing key keeps its type, a new one is a string; "
                  "may be repeated"),
    "--remove": dict(action="append", default=[], metavar="KEY",
                     help="remove a metadata key, before any is set; may be repeated"),
    "--memory": dict(default="512MiB", metavar="SIZE", type=lambda text: size(text),
                     help="limit of all buffers (default 512MiB; of repair, which holds the tokens of a layer, 4GiB)"),
    "--threads": dict(type=int, default=0, metavar="N", help="worker threads (default: all cores, or PGS_THREADS)"),
    "--io": dict(choices=("auto", "mmap", "pread", "direct"), default="auto", help="how to read (default auto)"),
    "--force": dict(action="store_true", help="replace existing files that are written"),
    "--dry-run": dict(action="store_true", help="describe what would be written, and write nothing"),
    "--quiet": dict(action="store_true", help="no progress, no summary, no warnings"),
    "--json": dict(action="store_true", help="print the machine form"),
    "--full": dict(action="store_true", help="with --json: arrays of over 32 elements in full"),
    "--against": dict(metavar="IN", help="the file it was made from: prove each copied tensor and expert equal"),
    "--no-data": dict(action="store_true", help="check the header and layout only, not every number"),
    "--model": dict(metavar="FILE", help="cut this model in place of the made-up one"),
    "--folder": dict(metavar="DIR", help="keep the files here (default: a temporary folder, removed at the end)"),
}
# fmt: on

CHOICE = ("--keep", "--ratio", "--by", "--stats", "--super-experts")
EXPERTS = CHOICE + ("--budget", "--report", "--plot", "--repair", "--mtp")
TEXTS = ("--ctx", "--chunks", "--parse-special", "--gpu-layers", "--threads")
LAYERS = ("--prune-layers",)
TYPES = (
    "--recipe",
    "--pure",
    "--override",
    "--tensor-type",
    "--tensor-type-file",
    "--output-tensor-type",
    "--token-embedding-type",
    "--leave-output-tensor",
    "--allow-requantize",
    "--imatrix",
    "--imatrix-missing",
    "--include-weights",
    "--exclude-weights",
    "--quality",
    "--target-size",
    "--target-bpw",
)
SPLIT_BY = ("--split-max-size", "--split-max-tensors", "--no-tensor-first-split")
SHARDS = SPLIT_BY + ("--keep-split",)
METADATA = ("--set", "--remove", "--override-kv")
RUN = ("--memory", "--threads", "--io")
OUTPUT = ("--force", "--dry-run", "--quiet")
JSON = ("--json", "--full")

# fmt: off
# command -> (help, positional arguments, options)
COMMANDS = {
    "info": ("what is in a model", ("IN",), JSON),
    "plan": ("describe what prune, quantize or edit would write", ("IN",),
             EXPERTS + LAYERS + ("--type",) + TYPES + METADATA + SHARDS + RUN + ("--force",) + JSON),
    "prune": ("drop experts; quantize and edit metadata in the same pass", ("IN", "OUT"),
              EXPERTS + LAYERS + ("--type",) + TYPES + METADATA + SHARDS + RUN + OUTPUT + JSON),
    "merge": ("merge experts; quantize and edit metadata in the same pass", ("IN", "OUT"),
              ("--keep", "--ratio", "--saliency", "--stats", "--weights-only", "--group-size", "--mtp") + LAYERS + ("--type",)
              + TYPES + METADATA + SHARDS + RUN + OUTPUT + JSON),
    "quantize": ("change the types of tensors, with llama-quantize's arguments", ("QUANTIZE",),
                 LAYERS + TYPES + METADATA + SHARDS + ("--max-buffer-size",) + RUN + OUTPUT + JSON),
    "edit": ("set and remove metadata, drop layers, copy the rest", ("IN", "OUT"),
             LAYERS + METADATA + SHARDS + RUN + OUTPUT + JSON),
    "split": ("write shards, as llama-gguf-split does", ("IN", "OUT"), SPLIT_BY + RUN + OUTPUT + JSON),
    "join": ("make one file of shards", ("IN", "OUT"), RUN + OUTPUT + JSON),
    "verify": ("check a file as llama.cpp would, and against its source", ("FILE",),
               ("--against", "--no-data", "--quiet", "--json")),
    "calibrate": ("run texts through a model and record what its experts do", ("CALIBRATE",),
                  ("-o",) + TEXTS + ("--merge-stats", "--force", "--quiet", "--json")),
    "repair": ("make down projections with which the experts that stay do what all did", ("CALIBRATE",),
               ("-o",) + CHOICE + ("--imatrix", "--mtp", "--run") + TEXTS + ("--memory", "--io", "--force", "--quiet",
                                                                          "--json")),
    "demo": ("make a small model, cut it in half, show what was lost", (),
             ("--model", "--keep", "--by", "--type", "--folder") + RUN + ("--json",)),
}
# fmt: on

# fmt: off
POSITIONALS = {
    "IN": ("input", "a GGUF file; of a split model any shard"),
    "OUT": ("output", "the GGUF file to write; of shards the part of their names before -00001-of-..."),
    "FILE": ("file", "the GGUF file to check"),
    "CALIBRATE": ("arguments", "a GGUF file, quantized or not, and texts in UTF-8"),
    "QUANTIZE": ("arguments", "as llama-quantize takes them: IN [OUT] TYPE [THREADS]. TYPE is a file type by name or "
                 "number, such as Q4_K_M, MXFP4_MOE or COPY; without OUT the output is ggml-model-TYPE.gguf beside IN. "
                 "Unlike llama-quantize an existing output needs --force, the output keeps the order of tensors "
                 "and alignment, and an architecture that llama.cpp does not know is no error"),
}
# fmt: on
# These take no fixed number of positional arguments.
_SEVERAL = {"QUANTIZE": "IN [OUT] TYPE [THREADS]", "CALIBRATE": "MODEL TEXT..."}


def make_parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        program, description="Surgery on GGUF model files, in one streaming pass.", allow_abbrev=False
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (help, positionals, options) in COMMANDS.items():
        command = _add_command(commands, name, help)
        for metavar in positionals:
            dest, text = POSITIONALS[metavar]
            several = dict(nargs="+") if metavar in _SEVERAL else {}
            command.add_argument(dest, metavar=_SEVERAL.get(metavar, metavar), help=text, type=not_empty, **several)
        for option in options:
            command.add_argument(option, **OPTIONS[option])
        if name == "repair":
            command.set_defaults(memory=4 << 30)
    for name, help, rules in (
        ("imatrix", "show, merge, slice and convert importance matrices", imatrix),
        ("stats", "show and merge what calibrate has recorded", stats),
    ):
        _add_group(commands, name, help, rules)
    return parser


def _add_group(commands, group: str, help: str, rules) -> None:
    """A command of commands. rules: a module with tables OPTIONS, COMMANDS, POSITIONALS."""
    parsers = _add_command(commands, group, help).add_subparsers(
        dest=f"{group}_command", required=True, metavar="COMMAND"
    )
    for name, (help, positionals, options) in rules.COMMANDS.items():
        command = _add_command(parsers, name, help)
        for metavar in positionals:
            dest, text, nargs = rules.POSITIONALS[metavar]
            command.add_argument(dest, metavar=metavar.removesuffix("..."), help=text, type=not_empty, nargs=nargs)
        for option in options:
            command.add_argument(option, **rules.OPTIONS[option])


def _add_command(commands, name: str, help: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False, formatter_class=_Formatter
    )


def options_first(argv: Sequence[str]) -> list[str]:
    """The arguments with a command's positional ones moved behind its options: argparse takes those of a changing
    number only if they stand together."""
    if not argv or not any(metavar in _SEVERAL for metavar in COMMANDS.get(argv[0], ("", (), ()))[1]):
        return list(argv)
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
        if "=" not in word and rest and word in OPTIONS and OPTIONS[word].get("action") != "store_true":
            options.append(rest.pop(0))
    return [argv[0], *options, *(["--"] if positionals else []), *positionals]


class _Formatter(argparse.HelpFormatter):
    def _format_args(self, action, default_metavar):
        """Without argparse's "X [X ...]" where X says already how many."""
        if action.metavar in _SEVERAL.values():
            return action.metavar
        return super()._format_args(action, default_metavar)


class _Version(argparse.Action):
    def __call__(self, parser, *_):
        from .._core import __version__, ggml_version

        print(f"{parser.prog} {__version__} (ggml {ggml_version()})")
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


def override_kv(text: str) -> tuple[str, Any]:
    """KEY=TYPE:VALUE as llama-quantize writes it -> (key, Python value)."""
    key, equals, value = text.partition("=")
    kind, colon, value = value.partition(":")
    try:
        if not key or not equals or not colon:
            raise ValueError
        return key, {"int": int, "float": float, "str": str, "bool": lambda word: {"true": True, "false": False}[word]}[
            kind
        ](value)
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=TYPE:VALUE with TYPE int, float, bool or str") from None


def numbers(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and len(part) < 20 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 3,4,5")
    return [int(part) for part in parts]


def split_size(text: str) -> int:
    """llama-gguf-split's 500M and 45G, powers of 1000, and what size() takes."""
    return size(f"{text}B" if text[:-1].isdecimal() and text[-1:] in "KMG" else text)


def assignment(text: str) -> str:
    if not text.partition("=")[1] or not text.partition("=")[0]:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return text


def size(text: str) -> int:
    from ..base.errors import SurgeryError
    from ..base.units import parse_size

    try:
        return parse_size(text)
    except SurgeryError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
