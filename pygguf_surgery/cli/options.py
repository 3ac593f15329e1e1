"""Options that several commands share, as data, in the groups that the help shows them in."""

from __future__ import annotations

from ..base.words import either
from .command import Options, Positional
from .values import assignment, file_size, not_empty, numbers, override, override_kv, size, split_size

DEFAULT_METRIC = "router-norm"
IN = Positional("IN", "input", "a GGUF file; of a split model any shard")
OUT = Positional("OUT", "output", "the GGUF file to write; of shards the part of their names before -00001-of-...")


def _metrics() -> str:
    from ..studies.metrics import METRICS, Need

    def names(need: Need, repaired: bool = False) -> str:
        found = [name for name, metric in METRICS.items() if need in metric.needs and metric.repaired == repaired]
        if DEFAULT_METRIC in found:
            found[found.index(DEFAULT_METRIC)] += " (default)"
        return either(found)

    return (
        f"how to choose them: {names('weights')} from the weights; {names('imatrix')} with --imatrix; "
        f"{names('stats')} with --stats; {names('stats', True)} with --stats and --repair; or a JSON file with "
        '{"kept": {"0": [ids]}} or {"scores": {"0": [numbers]}}'
    )


# fmt: off
KEEP: Options = {
    "--keep": dict(type=int, metavar="N", help="experts to keep in every layer"),
    "--ratio": dict(type=float, metavar="R", help="share of the experts to keep, such as 0.5, in place of --keep"),
}
BY: Options = {"--by": dict(metavar="METRIC", help=_metrics)}
STATS: Options = {"--stats": dict(metavar="STATS", help="what calibrate has recorded, for --by")}
CHOICE: Options = KEEP | BY | STATS | {
    "--super-experts": dict(action="store_true", help="keep experts with massive activations (from --stats) whatever "
                            "their score"),
}
MTP: Options = {
    "--mtp": dict(choices=("keep", "drop"), default="keep", help="multi-token prediction layers: cut them with the "
                  "rest (keep, the default) or remove them (drop)"),
}
LAYERS: Options = {
    "--prune-layers": dict(type=numbers, metavar="L0,L1,...",
                           help="drop these layers; unlike in llama-quantize everything that counts layers follows, "
                           "and what cannot is refused"),
}
TYPE: Options = {
    "--type": dict(metavar="TYPE", help="quantize to this file type of "
                   "llama-quantize, such as Q4_K_M or MXFP4_MOE; with --pure any ggml type"),
}
TYPES: Options = {
    "--recipe": dict(type=not_empty, metavar="NAME", help="quantize as a recipe says, a "
                     "TOML file or a shipped one (attention-bf16, mxfp4-moe, spark-128g); TYPE replaces its base type"),
    "--pure": dict(action="store_true", help="one ggml type for every tensor that may be quantized (TYPE is that type: "
                   "IQ2_S is IQ2_S, where llama-quantize takes IQ2_XS)"),
    "--override": dict(action="append", default=[], metavar="REGEX=TYPE", type=override,
                       help="type (or copy) of the tensors whose name matches; may be repeated, the first match wins. "
                       "Case matters, F16, BF16 and F32 as TYPE do not switch it off, and one that matches nothing is "
                       "an error (all unlike llama-quantize)"),
    "--tensor-type": dict(action="append", dest="override", metavar="REGEX=TYPE", type=override,
                          help="the same as --override"),
    "--tensor-type-file": dict(type=not_empty, metavar="FILE",
                               help="overrides from a file, REGEX=TYPE between blanks or lines"),
    "--output-tensor-type": dict(type=not_empty, metavar="TYPE",
                                 help="ggml type of output.weight, before any override"),
    "--token-embedding-type": dict(type=not_empty, metavar="TYPE",
                                   help="ggml type of token_embd.weight, before any override"),
    "--leave-output-tensor": dict(action="store_true", help="leave output.weight as it is"),
    "--allow-requantize": dict(action="store_true", help="let tensors that are quantized already be encoded again"),
}
IMATRIX: Options = {
    "--imatrix": dict(metavar="FILE", type=not_empty,
                      help="importance matrix, GGUF or .dat; it follows every cut of experts and layers. An entry of "
                      "another size is an error, for token_embd too"),
}
IMPORTANCE: Options = IMATRIX | {
    "--imatrix-missing": dict(choices=("default", "fail", "ones", "layer-mean"), default="default",
                              help="for an expert that the matrix never saw, or a tensor that it lacks: as "
                              "llama-quantize (default: ones; no importance), an error, ones, or the mean of the "
                              "layer's experts"),
    "--include-weights": dict(action="append", default=[], type=not_empty, metavar="NAME",
                              help="use the importance matrix only for tensors whose name contains this; may be "
                              "repeated"),
    "--exclude-weights": dict(action="append", default=[], type=not_empty, metavar="NAME",
                              help="do not use it for tensors whose name contains this; may be repeated"),
}
QUALITY: Options = {
    "--quality": dict(choices=("default", "best"), help="best: encode MXFP4 with less error than llama-quantize, "
                      "weighted by the importance matrix if there is one; default: llama-quantize's bytes"),
    "--target-size": dict(metavar="SIZE", type=file_size, help="choose each tensor's type, within the "
                          "family of TYPE, so that the output has at most this size, such as 22GB"),
    "--target-bpw": dict(metavar="BITS", type=float, help="the same by bits per weight, such as 4.2"),
}
METADATA: Options = {
    "--set": dict(action="append", default=[], metavar="KEY=VALUE", type=assignment,
                  help="metadata, KEY=VALUE or KEY:TYPE=VALUE; an existing key keeps its type, a new one is a string; "
                  "may be repeated"),
    "--remove": dict(action="append", default=[], metavar="KEY",
                     help="remove a metadata key, before any is set; may be repeated"),
    "--override-kv": dict(action="append", default=[], metavar="KEY=TYPE:VALUE", type=override_kv,
                          help="metadata as llama-quantize takes it, TYPE int, float, bool or str; but an existing key "
                          "keeps its type, and neither is a negative number made positive nor a string cut"),
}
SPLIT_BY: Options = {
    "--split-max-size": dict(metavar="SIZE", type=split_size,
                             help="write shards with at most this size of tensors, such as 45G (10^9 bytes each)"),
    "--split-max-tensors": dict(metavar="N", type=int, help="write shards of at most N tensors"),
    "--no-tensor-first-split": dict(action="store_true", help="the first shard holds the metadata only"),
}
SHARDS: Options = SPLIT_BY | {"--keep-split": dict(action="store_true", help="write shards as the input has them")}
MEMORY: Options = {
    "--memory": dict(default="512MiB", metavar="SIZE", type=size,
                     help="limit of all buffers (default 512MiB; of calibrate and repair, which hold sums and "
                     "tokens, 4GiB)"),
}
THREADS: Options = {
    "--threads": dict(type=int, default=0, metavar="N", help="worker threads (default: all cores, or PGS_THREADS)"),
}
IO: Options = {
    "--io": dict(choices=("auto", "mmap", "pread", "direct"), default="auto", help="how to read (default auto)"),
}
RUN: Options = MEMORY | THREADS | IO
FORCE: Options = {"--force": dict(action="store_true", help="replace existing files that are written")}
QUIET: Options = {"--quiet": dict(action="store_true", help="no progress, no summary, no warnings")}
JSON: Options = {"--json": dict(action="store_true", help="print the machine form")}
FULL: Options = {"--full": dict(action="store_true", help="with --json: arrays of over 32 elements in full")}
# fmt: on
