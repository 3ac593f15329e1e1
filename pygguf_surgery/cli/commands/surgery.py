"""The commands that describe or write a plan: arguments in, exit code out."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from .. import options, words
from ..command import Command, Options, Positional
from ..common import CANNOT, Usage, choose, is_quiet, limits, needs_number, refuse_existing, stopped, warn, write_beside
from ..options import IN, OUT
from ..values import override

if TYPE_CHECKING:
    from ...files.companions import Companions
    from ...files.model import Model
    from ...gate.checked import CheckedPlan
    from ...plan import Plan
    from ...run.writing import Receipt


_EXCLUSIVE = (
    ("keep", "ratio"),
    ("target_size", "target_bpw"),
    ("include_weights", "exclude_weights"),
    ("split_max_size", "split_max_tensors"),
    ("keep_split", "split_max_size"),
    ("keep_split", "split_max_tensors"),
)


# --- commands that make a plan --------------------------------------------------------------------------------------


def plan(args: Namespace) -> int:
    """Describes also what cannot be written: exit code 0."""
    from ...files.companions import Companions
    from ...files.open import open_model

    args.dry_run = True
    _check_options(args)
    with open_model(args.input) as model, Companions() as companions:
        _describe(_checked(model, args, companions), args)
    return 0


def prune(args: Namespace) -> int:
    if args.repair is None and needs_number(args):
        raise Usage("prune needs --keep N or --ratio R (or --by FILE.json with the experts to keep)")
    return _describe_or_write(args)


def merge(args: Namespace) -> int:
    if args.keep is None and args.ratio is None:
        raise Usage("merge needs --keep N or --ratio R")
    if args.stats is None and not args.weights_only:
        raise Usage("merge needs --stats STATS (of calibrate --merge-stats) or --weights-only")
    return _describe_or_write(args)


def quantize(args: Namespace) -> int:
    _place_quantize(args)
    return _describe_or_write(args)


def edit(args: Namespace) -> int:
    return _describe_or_write(args)


def split(args: Namespace) -> int:
    from ...edits.split import MAX_TENSORS

    if args.split_max_size is None and args.split_max_tensors is None:
        args.split_max_tensors = MAX_TENSORS
    return _describe_or_write(args)


def join(args: Namespace) -> int:
    return _describe_or_write(args)


def _place_quantize(args: Namespace) -> None:
    """IN [OUT] TYPE [THREADS] into args.input, output, type and threads. As in llama-quantize the second is the output
    unless it is a type; with a recipe the type may be missing."""
    from ...base.errors import SurgeryError
    from ...base.units import MEMORY_LEAST
    from ...recipes import mixes

    args.input, *rest = args.arguments
    args.output = args.type = None

    def is_type(text: str) -> bool:
        try:
            mixes.file_type(text, args.pure)
            return True
        except SurgeryError:
            return False

    if rest and not is_type(rest[0]):
        args.output = rest.pop(0)
    if rest:
        args.type = rest.pop(0)
        mixes.file_type(args.type, args.pure)  # says what is wrong, with the nearest names
    elif args.recipe is None:
        if args.output is not None and not os.path.lexists(args.output) and not args.output.endswith(".gguf"):
            mixes.file_type(args.output, args.pure)  # most likely a misspelt type
        raise Usage("quantize needs a TYPE, such as Q4_K_M, or --recipe")
    if rest:
        if len(rest) > 1 or not rest[0].isdecimal() or len(rest[0]) > 9 or args.threads:
            raise Usage("quantize takes IN [OUT] TYPE [THREADS]")
        args.threads = int(rest[0])
    if args.output is None and args.type is None and not args.dry_run:
        raise Usage("quantize needs an OUT")
    if args.output is None and args.type is not None:
        name = f"ggml-model-{mixes.file_type(args.type, args.pure).name}.gguf"
        args.output = os.path.join(os.path.dirname(args.input), name)
    if args.max_buffer_size is not None:
        if not 0 < args.max_buffer_size < 1 << 40:
            raise Usage("--max-buffer-size takes a number of MiB")
        args.memory = max(args.max_buffer_size << 20, MEMORY_LEAST)


def _check_options(args: Namespace) -> None:
    given = vars(args)
    if given.get("no_tensor_first_split") and not _split_by(given):
        raise Usage("--no-tensor-first-split goes with --split-max-size or --split-max-tensors")
    for one, other in _EXCLUSIVE:
        if given.get(one) not in (None, False, []) and given.get(other) not in (None, False, []):
            raise Usage(f"--{one.replace('_', '-')} and --{other.replace('_', '-')} exclude each other")
    written = {word: os.path.realpath(given[word]) for word in ("output", "report", "plot") if given.get(word)}
    if len(set(written.values())) != len(written):
        raise Usage(f"{', '.join(written)}: the same file twice")
    if given.get("target_size") is not None or given.get("target_bpw") is not None:
        from ...studies.fitting import check_target

        if args.type is None and args.recipe is None:
            raise Usage("--target-size and --target-bpw go with a type, which names the family")
        check_target(args.target_size, args.target_bpw)


def _checked(model: Model, args: Namespace, companions: Companions) -> CheckedPlan:
    from ...base.limits import Limits
    from ...gate.check import check

    return check(model, make_plan(model, args).data, Limits.parse(**limits(args)), companions)


def _describe(checked: CheckedPlan, args: Namespace) -> None:
    if args.json:
        words.print_json(checked.to_json(full=args.full))
    else:
        words.show(checked.summary())


def _describe_or_write(args: Namespace) -> int:
    """A dry run ends as the run would, where that would be refused."""
    from ...base.progress import as_progress
    from ...files.companions import Companions
    from ...files.open import open_model
    from ...run.writing import output_paths, write

    _check_options(args)
    quiet = is_quiet(args)
    with open_model(args.input) as model, Companions() as companions:
        if not args.dry_run and not _split_by(vars(args)):  # before the weights are read to choose
            _check_output(model, [args.output], args)
        checked = _checked(model, args, companions)
        if args.dry_run:
            _describe(checked, args)
        for blocker in checked.blockers:
            words.say(f"error: {blocker}")
        if args.output is not None and (args.dry_run or not checked.blockers):
            _check_output(model, output_paths(checked, args.output), args)
        if checked.blockers:
            return CANNOT
        if args.dry_run:
            return 0
        with as_progress(not quiet, "writing") as bar:
            receipt = write(model, checked, args.output, overwrite=args.force, progress=bar, companions=companions)
        if not args.json and not quiet:
            for text in receipt.notes:
                words.say(text)
            warn(receipt.warnings)
            words.show(_receipt(receipt))
        if getattr(args, "measure", False):
            from dataclasses import replace

            from ...reports.comparison import compare_written

            try:
                found = compare_written(model, checked, receipt.path, companions, not quiet)
            except KeyboardInterrupt as stop:
                return stopped(stop, f"{receipt.path} is complete, and not measured")
            receipt = replace(receipt, quality=found.to_json())
            if not args.json and not quiet:
                words.show("\n" + found.summary())
    if args.json:
        words.print_json(receipt.to_json())
    return 0


def _check_output(model: Model, paths: list[str], args: Namespace) -> None:
    """Raises what is wrong with the files to be written, first what --force would not help."""
    from ...files.outputs import check_output

    given = vars(args)
    inputs = [*model.paths, *(given.get(word) for word in ("imatrix", "stats", "repair", "by"))]
    for path in paths:
        check_output(inputs, path, overwrite=True)
    if not args.force:
        refuse_existing(paths)


def make_plan(model: Model, args: Namespace) -> Plan:
    """The plan that the options describe; a command lacks some of them. What reads weights comes last."""
    from ...plan import Plan

    given = vars(args)
    result = Plan(model)
    if given.get("remove"):
        result = result.remove_metadata(*args.remove)
    if given.get("set"):
        result = result.set_metadata_text(args.set)
    if given.get("override_kv"):
        result = result.set_metadata(dict(args.override_kv))
    result = _add_types(result, given)
    result = _add_shards(result, args)
    if "weights_only" in given:
        result = _merge_experts(model, result, args)
    elif any(given.get(option) is not None for option in ("keep", "ratio", "by", "repair")):
        result = _keep_experts(model, result, args)
    elif given.get("mtp") == "drop":
        raise Usage("--mtp drop goes with --keep or --ratio")
    elif word := next((word for word in ("stats", "super_experts", "report", "plot") if given.get(word)), None):
        raise Usage(f"--{word.replace('_', '-')} goes with --keep, --ratio or --by")
    if given.get("prune_layers"):
        result = result.prune_layers(args.prune_layers)
    if given.get("target_size") is not None or given.get("target_bpw") is not None:
        result = _fit(result, args)
    return result


def _keep_experts(model: Model, plan: Plan, args: Namespace) -> Plan:
    from ...files.outputs import check_output
    from ...studies.metrics import METRICS

    for path in (args.report, args.plot):  # before the weights are read to choose
        if path is not None:
            check_output([args.input, args.stats, args.imatrix, args.repair, args.by], path, overwrite=True)
            if not args.force:
                refuse_existing([path])
    if args.plot is not None:
        from ...reports.plots import check_picture

        check_picture(args.plot)
    quiet = is_quiet(args) or args.json
    named = args.repair is not None and (args.keep, args.ratio, args.by) == (None, None, None)
    if named and (word := next((word for word in ("stats", "super_experts") if getattr(args, word)), None)):
        raise Usage(f"--{word.replace('_', '-')} goes with --keep, --ratio or --by: the repair names the experts")
    if args.repair is not None:
        from ...edits.keep_experts import check_repair
        from ...files.repair import open_repair

        opened = open_repair(args.repair)
        opened.close()
        check_repair(opened, model)  # before weights are read to choose; what it warns of, the plan will
    if named:
        keep = opened.keep()
        if not quiet:
            words.explain(opened.summary())
    else:
        if args.by in METRICS and METRICS[args.by].takes_long and not args.dry_run:
            _refuse_early(model, plan, args)
        keep = choose(model, args)
    if args.report is not None:
        write_beside(args.report, (keep.to_json() + "\n").encode(), args.force)
    if args.plot is not None:
        from ...reports.plots import importance

        write_beside(args.plot, importance(keep), args.force)
    if not quiet and (keep.scores or keep.seen.notes):
        words.explain(keep.summary())
    return plan.keep_experts(keep, mtp=args.mtp, repair=args.repair)


def _merge_experts(model: Model, plan: Plan, args: Namespace) -> Plan:
    from ...studies.ream import group

    quiet = args.quiet or args.json
    if not args.dry_run:
        _refuse_early(model, plan, args)
    groups = group(
        model,
        args.keep,
        ratio=args.ratio,
        stats=args.stats,
        by=args.saliency,
        group_size=args.group_size,
        weights_only=args.weights_only,
        mtp=args.mtp,
        progress=not args.quiet,
        **limits(args),
    )
    if not quiet:
        words.explain(groups.summary())
    return plan.merge_experts(groups, mtp=args.mtp)


# argparse's name -> the argument of Plan.quantize
_TYPE_OPTIONS = {
    "pure": "pure",
    "output_tensor_type": "output_type",
    "token_embedding_type": "token_embedding_type",
    "leave_output_tensor": "leave_output",
    "allow_requantize": "allow_requantize",
    "imatrix": "imatrix",
    "include_weights": "include_weights",
    "exclude_weights": "exclude_weights",
    "quality": "quality",
}


def _add_types(plan: Plan, given: dict[str, Any]) -> Plan:
    if "override" not in given:
        return plan
    overrides = list(given["override"])
    if given["tensor_type_file"] is not None:
        overrides += _overrides_in(given["tensor_type_file"])
    options = {name: given[word] for word, name in _TYPE_OPTIONS.items() if given[word]}
    if given["imatrix_missing"] != "default":
        options["imatrix_missing"] = given["imatrix_missing"]
    if given["recipe"] is not None:
        return plan.recipe(given["recipe"], type=given["type"], overrides=overrides, **options)
    if given["type"] is not None or overrides:
        return plan.quantize("COPY" if given["type"] is None else given["type"], overrides=overrides, **options)
    if options.keys() == {"imatrix"} and given.get("by") in ("frequency", "imatrix-msan"):
        return plan  # it is for the choice of experts
    if options:
        word = next((word for word in _TYPE_OPTIONS if given[word]), "imatrix_missing")
        raise Usage(f"--{word.replace('_', '-')} goes with a type")
    return plan


def _overrides_in(path: str) -> list[tuple[str, str]]:
    from argparse import ArgumentTypeError

    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        try:
            return [override(word) for word in file.read().split()]
        except ArgumentTypeError as error:
            raise Usage(f"{path}: {error}") from None


def _split_by(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of Plan.split that the options give; 0 is one of them, for Plan.split to refuse."""
    by = {
        "max_size": given.get("split_max_size"),
        "max_tensors": given.get("split_max_tensors"),
        "keep": given.get("keep_split") or None,
    }
    return {name: value for name, value in by.items() if value is not None}


def _add_shards(plan: Plan, args: Namespace) -> Plan:
    by = _split_by(vars(args))
    return plan.split(**by, first_empty=args.no_tensor_first_split) if by else plan


def _fit(plan: Plan, args: Namespace) -> Plan:
    """Prints the choice as overrides that reproduce it."""
    from ...plan_data.edits import Quantize

    before = next(edit for edit in plan.data.edits if isinstance(edit, Quantize)).overrides
    plan = plan.fit(size=args.target_size, bpw=args.target_bpw, progress=not is_quiet(args), **limits(args))
    after = next(edit for edit in plan.data.edits if isinstance(edit, Quantize)).overrides
    if not is_quiet(args):
        words.say("types chosen; these options give them again:")
        words.explain("\n".join(f"  --tensor-type '{pattern}={type}'" for pattern, type in after[len(before) :]))
    return plan


def _refuse_early(model: Model, plan: Plan, args: Namespace) -> None:
    """Raises what no choice of experts could change, before all their weights are read to choose."""
    from ...run.writing import first_blocker
    from ...studies.scoring import rank
    from .info import experts

    moe = experts(model)
    if moe is None or not isinstance(moe["count"], int):  # rank says what is wrong
        return
    alike = rank(model, by={"scores": {layer: [0] * moe["count"] for layer in moe["layers"]}})
    checked = plan.keep_experts(alike.keep(args.keep, ratio=args.ratio), mtp=args.mtp).check()
    if checked.blockers:
        raise first_blocker(checked)


def _receipt(receipt: Receipt) -> str:
    from ...base.units import human

    rate = receipt.bytes_read / receipt.seconds if receipt.seconds else 0
    done = ", ".join(f"{n} {action}" for action, n in sorted(receipt.actions.items()))
    shards = f" in {len(receipt.paths)} shards" if len(receipt.paths) > 1 else ""
    return (
        f"{receipt.path}: {human(receipt.file_bytes)}{shards} in {receipt.seconds:.1f} s, "
        f"reading {human(int(rate))}/s; tensors: {done}"
    )


# --- their arguments ------------------------------------------------------------------------------------------------


# fmt: off
QUANTIZE = Positional("QUANTIZE", "arguments",
                      "as llama-quantize takes them: IN [OUT] TYPE [THREADS]. TYPE is a file type by name or "
                      "number, such as Q4_K_M, MXFP4_MOE or COPY; without OUT the output is ggml-model-TYPE.gguf "
                      "beside IN. Unlike llama-quantize an existing output needs --force, the output keeps the order "
                      "of tensors and alignment, and an architecture that llama.cpp does not know is not an error",
                      "+", "IN [OUT] TYPE [THREADS]")
EXPERTS: Options = options.CHOICE | {
    "--budget": dict(choices=("layer", "global"), default="layer", help="keep N in each layer (the default), or N "
                     "times the layers where they matter most, which only routers with a selection bias can load"),
    "--report": dict(metavar="FILE", help="write the decision, kept ids and scores, as JSON that --by takes back"),
    "--plot": dict(metavar="FILE.png", help="draw the choice: layers by experts, and what stays of each layer"),
    "--repair": dict(metavar="REPAIR", help="down projections that repair has made for the experts that stay; names "
                     "those too, in place of --keep and --by"),
} | options.MTP
GROUPS: Options = options.KEEP | {
    "--saliency": dict(metavar="METRIC", default="reap", help="which experts the others are merged into, a metric of "
                       "--stats (default reap)"),
} | options.STATS | {
    "--weights-only": dict(action="store_true", help="group experts without statistics"),
    "--group-size": dict(type=int, default=16, metavar="N", help="experts of a group at most (default 16)"),
} | options.MTP
BUFFER: Options = {
    "--max-buffer-size": dict(metavar="MIB", type=int, help="--memory in MiB; less than 64 is taken as 64"),
}
OUTPUT: Options = options.FORCE | {
    "--dry-run": dict(action="store_true", help="describe what would be written, and write nothing; the exit code is "
                      "that of the run, where it would be refused"),
} | options.QUIET | options.JSON | options.FULL
MEASURED: Options = {
    "--measure": dict(action="store_true", help="then compare the result with the input, as `compare` does: reads both "
                      "once more"),
} | OUTPUT

_IMPORTANCE = {"importance matrix": options.IMPORTANCE, "quality and size": options.QUALITY}
_TYPES = {"types": options.TYPE | options.TYPES, **_IMPORTANCE}
_OTHERS = {"metadata": options.METADATA, "shards": options.SHARDS}
COMMANDS = (
    Command(
        "plan", "describe what prune, quantize or edit would write", plan, (IN,),
        {"choice of experts": EXPERTS, "layers": options.LAYERS, **_TYPES, **_OTHERS, "run": options.RUN,
         "output": options.FORCE | options.JSON | options.FULL},
    ),
    Command(
        "prune", "drop experts; quantize and edit metadata in the same pass", prune, (IN, OUT),
        {"choice of experts": EXPERTS, "layers": options.LAYERS, **_TYPES, **_OTHERS, "run": options.RUN,
         "output": MEASURED},
    ),
    Command(
        "merge", "merge experts; quantize and edit metadata in the same pass", merge, (IN, OUT),
        {"choice of experts": GROUPS, "layers": options.LAYERS, **_TYPES, **_OTHERS, "run": options.RUN,
         "output": MEASURED},
    ),
    Command(
        "quantize", "change the types of tensors, with llama-quantize's arguments", quantize, (QUANTIZE,),
        {"layers": options.LAYERS, "types": options.TYPES, **_IMPORTANCE, **_OTHERS,
         "run": BUFFER | options.RUN, "output": MEASURED},
    ),
    Command(
        "edit", "set and remove metadata, drop layers, copy the rest", edit, (IN, OUT),
        {"layers": options.LAYERS, **_OTHERS, "run": options.RUN, "output": MEASURED},
    ),
    Command("split", "write shards, as llama-gguf-split does", split, (IN, OUT),
            {"shards": options.SPLIT_BY, "run": options.RUN, "output": OUTPUT}),
    Command("join", "make one file of shards", join, (IN, OUT), {"run": options.RUN, "output": OUTPUT}),
)
# fmt: on
