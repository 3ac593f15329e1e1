"""Runs one job of same_bytes.py that uses the package from Python, and prints JSON: same_bytes_api.py JOB [ARGUMENTS]

Here are those about models, types and importance matrices; same_bytes_experts.py and same_bytes_plans.py have others.
"""

# ruff: noqa: B023  (functions that are made in a loop are called at once)
from __future__ import annotations

import json
import os
import sys
from typing import Any

import numpy as np
import same_bytes_experts  # noqa: F401  (adds its jobs)
import same_bytes_plans  # noqa: F401
from same_bytes_shared import JOBS, attempt, choice, digest, gone, half, job, plain, written

import pygguf_surgery as pgs

FILE_TYPES = (
    "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q1_0 Q2_0 MXFP4_MOE NVFP4_MOE Q2_K Q2_K_S Q3_K Q3_K_S Q3_K_M Q3_K_L Q4_K "
    "Q4_K_S Q4_K_M Q5_K Q5_K_S Q5_K_M Q6_K IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M IQ3_XXS IQ3_XS IQ3_S IQ3_M IQ4_NL "
    "IQ4_XS TQ1_0 TQ2_0 COPY"
)
TYPES = (
    "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q8_1 Q1_0 Q2_0 MXFP4 NVFP4 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ1_S IQ1_M "
    "IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS TQ1_0 TQ2_0 I8 I16 I32 I64 F64"
)


@job
def readme() -> Any:
    said: dict[str, Any] = {}
    with pgs.open("sharded-00001-of-00003.gguf") as model:
        t = model.tensors["blk.0.ffn_up_exps.weight"]
        said["model"] = [
            model.architecture,
            model.name,
            len(model.tensors),
            repr(model),
            model.metadata.get("x"),
            model.metadata[f"{model.architecture}.expert_count"],
            t.shape,
            t.ne,
            t.type,
            t.nbytes,
            t.offset,
            repr(t),
            digest(t.bytes()),
            digest(t.dequantize(experts=[3, 7])),
            digest(t.dequantize(rows=[5, 6, 1])),
            model.header_sha256,
            model.file_bytes,
        ]
        keep = pgs.experts.rank(model, by="router-norm").keep(8)
        plan = (
            pgs.Plan(model)
            .keep_experts(keep)
            .quantize("MXFP4_MOE", overrides=[(r"attn|ssm|shexp", "copy")])
            .set_metadata({"general.name": "Half of it"})
        )
        said["half"] = written(plan, "out.gguf", memory="128MiB")
        with pgs.imatrix.open("imatrix.gguf") as imatrix:
            said["importance"] = digest(imatrix.importance("blk.0.ffn_up_exps.weight"))
        small = pgs.Plan(model).quantize("Q4_K_M", imatrix="imatrix.gguf").fit(size="11MB").split(max_size="4MB")
        said["small"] = written(small, "small")
        said["layers"] = written(
            pgs.Plan(model).recipe("attention-bf16", type="Q4_K_M").prune_layers([2]), "layers.gguf"
        )
    return said


@job
def reading() -> Any:
    """Every tensor and key of every model of these inputs."""
    said: dict[str, Any] = {}
    for path in sorted(p for p in os.listdir() if p.endswith(".gguf") and p.startswith(("moe-", "quant-"))):
        if any(word in path for word in ("imatrix", "stats", "repair")):
            continue
        with pgs.open(path, strict=False) as model:
            said[path] = [
                model.architecture,
                model.header_sha256,
                model.alignment,
                model.warnings,
                {key: repr(model.metadata.value(key)) for key in model.metadata},
                {
                    name: [t.type, t.shape, t.offset, digest(t.bytes()), attempt(lambda: digest(t.dequantize()))]
                    for name, t in model.tensors.items()
                },
            ]
    return said


@job
def types(name: str) -> Any:
    """Each file type of llama-quantize, with and without an importance matrix, and pure."""
    said: dict[str, Any] = {}
    with pgs.open(f"quant-{name}.gguf") as model:
        for kind in FILE_TYPES.split():
            for word, options in (
                ("plain", {}),
                ("imatrix", {"imatrix": f"quant-{name}.imatrix.gguf"}),
                ("pure", {"pure": True, "imatrix": f"quant-{name}.imatrix.gguf"}),
            ):
                said[f"{kind} {word}"] = attempt(lambda: _typed(pgs.Plan(model).quantize(kind, **options)))
    return said


def _typed(plan: pgs.Plan) -> Any:
    checked = plan.check()
    chosen = {t.name: t.type for t in checked.tensors}
    if checked.blockers:
        return {"blockers": [str(error) for error in checked.blockers], "types": chosen}
    receipt = plan.write("out.gguf").to_json()
    return {"types": chosen, "sha256": gone("out.gguf"), "notes": receipt["notes"], "warnings": receipt["warnings"]}


@job
def arrays() -> Any:
    """pgs.quantize and dequantize with each type."""
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((3, 5, 512), np.float32)
    one, several = rng.random(512, np.float32) + 0.01, rng.random((3, 512), np.float32) + 0.01
    said: dict[str, Any] = {}
    for kind in TYPES.split():
        for word, options in (
            ("", {}),
            (" imatrix", {"imatrix": one}),
            (" experts", {"imatrix": several}),
            (" best", {"quality": "best"}),
            (" best imatrix", {"quality": "best", "imatrix": one}),
            (" one thread", {"threads": 1}),
        ):

            def run() -> Any:
                encoded = pgs.quantize(rows, kind, **options)
                return [encoded.shape, digest(encoded), digest(pgs.dequantize(encoded, kind))]

            said[kind + word] = attempt(run)
    unfit: tuple[Any, ...] = (rows[..., :100], rows.astype(np.int32), np.full((2, 256), np.nan, np.float32))
    for bad in unfit:
        said[f"bad {bad.dtype} {bad.shape}"] = attempt(lambda: pgs.quantize(bad, "Q4_K").shape)
    said["bad type"] = attempt(lambda: pgs.quantize(rows, "Q4_X").shape)
    said["bad importance"] = attempt(lambda: pgs.quantize(rows, "Q4_K", one[:-1]).shape)
    said["bad bytes"] = attempt(lambda: pgs.dequantize(np.zeros(100, np.uint8), "Q4_K").shape)
    return said


@job
def options() -> Any:
    """The options of quantize, each by itself."""
    im = {"imatrix": "quant-qwen3moe.imatrix.gguf"}
    some: dict[str, tuple[str, dict[str, Any]]] = {
        "overrides": ("Q4_K_M", {"overrides": [("attn_[qk]", "Q8_0"), ("attn", "copy"), (r"ffn_down_exps", "Q5_0")]}),
        "router": ("Q4_K_M", {"overrides": [(r"^blk\.0\.ffn_gate_inp\.weight$", "F16")]}),
        "no match": ("Q4_K_M", {"overrides": [("attn_x", "Q8_0")]}),
        "output": ("Q4_K_M", {"output_type": "Q8_0", "token_embedding_type": "BF16"}),
        "leave": ("Q4_K_M", {"leave_output": True}),
        "best": ("MXFP4_MOE", {"quality": "best", **im}),
        "best alone": ("MXFP4_MOE", {"quality": "best"}),
        "include": ("IQ4_XS", {"include_weights": ["attn"], **im}),
        "exclude": ("IQ4_XS", {"exclude_weights": ["attn", "down"], **im}),
        **{
            f"missing {policy}": ("IQ3_S", {"imatrix_missing": policy, **im})
            for policy in ("default", "fail", "ones", "layer-mean")
        },
        "other imatrix": ("Q4_K_M", {"imatrix": "quant-llama.imatrix.gguf"}),
        "by number": ("15", {}),
        "lower case": ("q4_k_m", {}),
        "pure": ("Q4_K", {"pure": True}),
        "copy": ("COPY", {"overrides": [("exps", "Q4_0")]}),
    }
    said = {}
    with pgs.open("quant-qwen3moe.gguf") as model:
        for name, (kind, given) in some.items():
            plan = pgs.Plan(model).quantize(kind, **given)
            said[name] = [json.loads(plan.to_json()), attempt(lambda: _typed(plan))]
    with pgs.open("moe-MXFP4.gguf") as model:
        for allow in (False, True):
            said[f"requantize {allow}"] = attempt(
                lambda: _typed(pgs.Plan(model).quantize("Q8_0", allow_requantize=allow))
            )
    return said


@job
def fit(name: str) -> Any:
    said = {}
    with pgs.open(f"quant-{name}.gguf") as model:
        for kind in ("Q4_K_M", "IQ4_XS", "Q8_0"):
            for bpw in (3.0, 8.2, 9.8):
                for im in (None, f"quant-{name}.imatrix.gguf"):
                    plan = pgs.Plan(model).quantize(kind, imatrix=im)
                    said[f"{kind} {bpw} {im is None}"] = attempt(lambda: json.loads(plan.fit(bpw=bpw).to_json()))
    return said


@job
def limits() -> Any:
    """Memory, threads, ways to read: the same file each time; progress; cancelling; replacing."""
    said: dict[str, Any] = {}
    with pgs.open("model.gguf") as model:
        plan = pgs.Plan(model).keep_experts(half(model)).quantize("Q4_K_M", imatrix="imatrix.gguf")
        ways: dict[str, dict[str, Any]] = {
            "mmap": {"io": "mmap"},
            "pread": {"io": "pread"},
            "direct": {"io": "direct"},
            "64MiB": {"memory": "64MiB"},
            "one": {"threads": 1},
            "three": {"threads": 3},
        }
        for name, given in ways.items():
            said[name] = [
                plan.check(**given).to_json()["peak_memory_bytes"],
                plan.write("out.gguf", overwrite=True, **given).to_json()["file_bytes"],
                gone("out.gguf"),
            ]
        seen: list[tuple[int, int]] = []
        plan.write("out.gguf", progress=lambda done, total: seen.append((done, total)))
        said["progress"] = [seen[-1], sorted(seen) == seen]
        said["exists"] = attempt(lambda: plan.write("out.gguf").path)
        said["own input"] = attempt(lambda: plan.write("model.gguf", overwrite=True).path)

        def stop(done: int, total: int) -> None:
            raise ValueError("stopped")

        said["cancelled"] = attempt(lambda: plan.write("cancelled.gguf", progress=stop).path)
    return said


@job
def importance() -> Any:
    """Importance matrices: read, merged, converted, sliced."""
    said: dict[str, Any] = {}
    for path in ("imatrix.gguf", "imatrix.dat", "synthetic.imatrix.gguf"):
        with pgs.imatrix.open(path) as imatrix:
            said[path] = [
                pgs.imatrix.coverage(imatrix),
                imatrix.digest,
                imatrix.format,
                {name: [digest(imatrix.importance(name)), digest(imatrix.sums(name))] for name in imatrix.entries},
            ]
    pgs.imatrix.merge(["synthetic.imatrix.gguf", "synthetic-2.imatrix.gguf"], "both.gguf")
    pgs.imatrix.merge(["imatrix.dat", "synthetic.imatrix.gguf"], "mixed.gguf")
    pgs.imatrix.convert("imatrix.gguf", "converted.dat")
    pgs.imatrix.convert("imatrix.dat", "converted.gguf", chunk_size=256)
    with open("kept.json", encoding="utf-8") as file:
        kept = {int(layer): ids for layer, ids in json.load(file)["kept"].items()}
    said["unknown"] = pgs.imatrix.slice("synthetic.imatrix.gguf", "sliced.gguf", kept)
    with pgs.open("model.gguf") as model:
        for path in ("imatrix.gguf", "imatrix.dat"):
            plan = pgs.Plan(model).keep_experts(kept).prune_layers([2]).quantize("IQ3_XXS", imatrix=path)
            said[f"cut {path}"] = attempt(lambda: written(plan, f"cut-{path[8:]}.gguf"))
    said["bad"] = [
        attempt(lambda: pgs.imatrix.merge([], "x.gguf")),
        attempt(lambda: pgs.imatrix.slice("imatrix.dat", "x.gguf", kept)),
        attempt(lambda: pgs.imatrix.slice("imatrix.gguf", "x.gguf", {0: [0]})),
        attempt(lambda: pgs.imatrix.convert("imatrix.gguf", "x.gguf", chunk_size=3)),
        attempt(lambda: pgs.imatrix.open("model.gguf").digest),
    ]
    return said


@job
def calibrated() -> Any:
    """The README's second Python block, with llama.cpp."""
    said: dict[str, Any] = {}
    text: dict[str, Any] = {"n_ctx": 64, "chunks": 12, "threads": 1}
    stats = pgs.experts.calibrate("model-Q8_0.gguf", ["code.txt"], "model.stats.gguf", merge_stats=True, **text)
    said["stats"] = [stats.summary(), stats.to_json()]
    with pgs.open("model.gguf") as model:
        keep = pgs.experts.rank(model, by="best", stats=stats).keep(8, super_experts=True)
        said["keep"] = choice(keep)
        said["errors"] = pgs.experts.repair(model, keep, ["code.txt"], "repair.gguf", run="model-Q8_0.gguf", **text)
        said["half"] = written(pgs.Plan(model).keep_experts(keep, repair="repair.gguf"), "half.gguf")
        said["merged"] = written(
            pgs.Plan(model).merge_experts(pgs.experts.group(model, 14, stats=stats)), "merged.gguf"
        )
    return said


@job
def faces() -> Any:
    """The public names, and that what one module is called is not another's."""
    return {
        "all": sorted(pgs.__all__),
        "version": pgs.__version__,
        "metrics": list(pgs.experts.METRICS),
        "experts": sorted(pgs.experts.__all__),
        "imatrix": sorted(pgs.imatrix.__all__),
        "policies": list(pgs.imatrix.POLICIES),
        "roles": {
            name: pgs.experts.role_of(name)
            for name in ("token_embd.weight", "blk.0.ffn_up_exps.weight", "blk.3.attn_q.weight", "blk.1.ssm_a", "x")
        },
        "value": [repr(pgs.Value(1, "u8")), pgs.Value([1, 2], "u16[]").value, pgs.Value("x", "str").type],
    }


if __name__ == "__main__":
    print(json.dumps(plain(JOBS[sys.argv[1]](*sys.argv[2:]))))
