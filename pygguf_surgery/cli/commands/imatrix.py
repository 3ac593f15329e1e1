"""`gguf-surgery imatrix show | merge | slice | convert`: arguments in, exit code out."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...base.units import human
from ...base.words import listed, magnitude, table
from .. import words
from ..command import Command, Family, Options, Positional
from ..common import refuse_existing, warn
from ..options import FULL, JSON

if TYPE_CHECKING:
    from ...plan_data.subject import Wanted

_SHOWN = 16  # ids of experts in a line


def show(args: Namespace) -> int:
    from ...base.printed import abbreviate
    from ...files.imatrix import open_imatrix
    from ...files.imatrix_tools import coverage

    with open_imatrix(args.input) as imatrix:
        data = coverage(imatrix)
        size = imatrix.source.size
    if args.json:
        words.print_json(data if args.full else abbreviate(data))
        return 0
    words.show(_describe(data, size))
    warn(data["warnings"])
    return 0


def merge(args: Namespace) -> int:
    from ...files.imatrix_tools import merge

    _check_output(args)
    merge(args.inputs, args.output, chunk_size=args.chunk_size, overwrite=args.force)
    return _written(args.output)


def slice(args: Namespace) -> int:
    from ...files.imatrix_tools import slice_experts

    _check_output(args)
    unknown = slice_experts(args.input, args.output, read_kept(args.by), experts=args.experts, overwrite=args.force)
    if unknown:
        warn([f"layers of {args.by} without an entry: {', '.join(map(str, unknown))}"])
    return _written(args.output)


def convert(args: Namespace) -> int:
    from ...files.imatrix_tools import convert

    _check_output(args)
    convert(args.input, args.output, chunk_size=args.chunk_size, overwrite=args.force)
    return _written(args.output)


def read_kept(path: str) -> Mapping[int, Sequence[int]] | Wanted:
    """layer -> ids, of {"kept": {"0": [ids]}} in a JSON file. The cut of a model, where the file is a pruned GGUF, or a
    report, which says of which model the ids are."""
    from ...base.errors import BadPlan, SurgeryError
    from ...files.open import open_model
    from ...files.subjects import wanted_by
    from ...plan_data.subject import Subject, Wanted

    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        with open_model(path, metadata_only=True) as model:
            try:
                return wanted_by(model)
            except SurgeryError as error:
                error.path = path
                raise
    form = '{"kept": {"0": [ids]}}'
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        named = data["kept"]
        layers = {int(layer): list(ids) for layer, ids in named.items()}
        if len(layers) < len(named) or any(type(i) is not int for ids in layers.values() for i in ids):
            raise ValueError("not ids of experts")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadPlan(f"not a list of experts: {error}", path=path, expected=form) from None
    if "model" not in data:
        return layers
    try:
        return Wanted.of_choice(layers, Subject.from_json(data["model"]))
    except SurgeryError as error:
        error.path = path
        raise


def _check_output(args: Namespace) -> None:
    if not args.force:
        refuse_existing([args.output])


def _written(path: str) -> int:
    from ...files.imatrix import open_imatrix
    from ...files.imatrix_tools import coverage

    with open_imatrix(path) as imatrix:
        words.show(_describe(coverage(imatrix), imatrix.source.size))
    return 0


def _describe(data: dict[str, Any], nbytes: int) -> str:
    chunks = f"{data['chunk_count']} chunks"
    if data["chunk_size"]:
        chunks += f" of {data['chunk_size']} tokens"
    values = sum(entry["size"] for entry in data["entries"])
    rows = [
        ("file", f"{os.path.basename(data['path'])}, {data['format']}, {human(nbytes)}"),
        ("made from", ", ".join(data["datasets"]) or "(not said)"),
        ("text", chunks),
        ("entries", f"{len(data['entries'])} tensors, {magnitude(values)} values"),
    ]
    if (of := data["model"]) is not None:
        rows.append(("cut for", f"{of['name'] or 'a model'} of {of['experts']} experts"))
    never = [entry["name"] for entry in data["entries"] if entry["most"] == 0]
    if never:
        rows.append(("never seen", f"{len(never)} tensors: {listed(never, _SHOWN)}"))
    text = table(rows, left=2)
    if data["layers"]:
        lines = [("layer", "experts seen", "least", "median", "most", "never seen")]
        lines += [
            (
                str(layer["layer"]),
                f"{layer['seen']} of {layer['experts']}",
                magnitude(layer["least"]),
                magnitude(sorted(layer["tokens"])[layer["experts"] // 2]),
                magnitude(layer["most"]),
                listed(layer["never"], _SHOWN),
            )
            for layer in data["layers"]
        ]
        text += f"\n\ntokens of each expert:\n{table(lines, left=0)}"
    elif data["format"] == "legacy":
        text += "\n\nthis format has lost how often each expert was used"
    return text


# fmt: off
FORCE: Options = {"--force": dict(action="store_true", help="replace an existing output")}
CHUNK_SIZE: Options = {
    "--chunk-size": dict(type=int, metavar="N", help="tokens of a chunk, where the file does not say (default 512)"),
}
BY: Options = {
    "--by": dict(metavar="FILE", required=True, help='the experts to keep: a JSON file {"kept": {"0": [ids]}}, or the '
                 "GGUF file of a model that was pruned to them"),
    "--experts": dict(type=int, metavar="N", help="how many experts the model had, where the file does not say"),
}
IN = Positional("IMATRIX", "input", "an importance matrix of llama-imatrix, GGUF or .dat")
SEVERAL = Positional("IMATRIX", "inputs", "importance matrices of llama-imatrix, GGUF or .dat", "+")
OUT = Positional("OUT", "output", "the importance matrix to write")
FAMILY = Family("imatrix", "show, merge, slice and convert importance matrices", (
    Command("show", "what an importance matrix has seen", show, (IN,), {"": JSON | FULL}),
    Command("merge", "add importance matrices of one model", merge, (OUT, SEVERAL), {"": CHUNK_SIZE | FORCE}),
    Command("slice", "cut an importance matrix as a model's experts were cut", slice, (IN, OUT), {"": BY | FORCE}),
    Command("convert", "change the older .dat format to GGUF, or back if OUT ends in .dat", convert, (IN, OUT),
            {"": CHUNK_SIZE | FORCE}),
))
# fmt: on
