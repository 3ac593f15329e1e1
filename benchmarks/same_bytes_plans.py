"""Jobs of same_bytes.py about plans: every edit as data, plans of 0.1.0, and what is refused."""

# ruff: noqa: B023  (functions that are made in a loop are called at once)
from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from typing import Any

from same_bytes_shared import attempt, failure, half, job, written

import pygguf_surgery as pgs


def some_plans() -> dict[str, pgs.Plan]:
    """Each kind of edit, for inputs in the current folder; their models are open."""

    def on(path: str) -> pgs.Plan:
        return pgs.Plan(pgs.open(path))

    values = {
        "a.u8": pgs.Value(200, "u8"),
        "a.i8": pgs.Value(-5, "i8"),
        "a.u16": pgs.Value(1, "u16"),
        "a.f64": pgs.Value(0.1, "f64"),
        "a.i64": -(2**40),
        "a.u64": 2**63,
        "a.text": 'é "\\ \n',
        "a.bool": True,
        "a.list": [1, 2, 3],
        "a.floats": [0.5, 1e-30],
        "a.names": ["x", ""],
        "a.none": pgs.Value([], "u32[]"),
    }
    qwen = on("moe-qwen3moe.gguf")
    grouped = pgs.experts.group(qwen.model, 8, weights_only=True)
    return {
        "nothing": on("moe-qwen3moe.gguf"),
        "keep": on("moe-qwen3moe.gguf").keep_experts({1: [1, 2, 3, 4], 0: [15, 9, 2, 1]}),
        "ranked": on("moe-deepseek4.gguf").keep_experts(half(on("moe-deepseek4.gguf").model)),
        "mtp": on("moe-mtp.gguf").keep_experts(half(on("moe-mtp.gguf").model, mtp="drop"), mtp="drop"),
        "repair": on("moe-qwen3moe.gguf").keep_experts(
            {0: (1, 2, 5, 9), 1: (0, 3, 4, 15)}, repair="moe-qwen3moe.repair.gguf"
        ),
        "merge": qwen.merge_experts(grouped),
        "metadata": on("moe-qwen3moe.gguf").set_metadata(values).remove_metadata("general.size_label"),
        "text": on("moe-qwen3moe.gguf").set_metadata_text(["b.x:f32=1.5", "b.list:i16[]=1,-2", "general.name=other"]),
        "layers": on("moe-deepseek2.gguf").prune_layers([2]),
        "quantize": on("quant-qwen3moe.gguf").quantize(
            "Q4_K_M",
            imatrix="quant-qwen3moe.imatrix.gguf",
            imatrix_missing="ones",
            exclude_weights=["attn"],
            overrides=[("attn_q", "Q8_0"), ("attn_k", "copy")],
            output_type="Q6_K",
            token_embedding_type="Q5_K",
        ),
        "best": on("quant-llama.gguf").quantize("MXFP4", pure=True, quality="best", leave_output=True),
        "recipe": on("quant-qwen3next.gguf").recipe("spark-128g"),
        "fit": on("quant-qwen3next.gguf").quantize("Q4_K_M").fit(bpw=9.5),
        "split": on("quant-qwen3next.gguf").quantize("Q8_0").split(max_tensors=50, first_empty=True),
        "all": on("moe-mtp.gguf")
        .prune_layers([1, 2])
        .keep_experts(dict.fromkeys(range(3), range(0, 32, 3)))
        .quantize("Q8_0")
        .set_metadata({"general.name": "all"})
        .split(max_size="20KB"),
    }


@job
def plans() -> Any:
    """Made, printed, loaded, pickled, checked and written."""
    said = {}
    for name, plan in some_plans().items():
        text = plan.to_json()
        again = pgs.Plan.from_json(text)
        pickled = pickle.loads(pickle.dumps(plan))
        said[name] = [
            again == plan,
            pickled == plan,
            repr(plan),
            json.loads(again.to_json()),
            plan.check().to_json(),
            written(again, f"{name}.gguf"),
        ]
    return said


@job
def old_plans() -> Any:
    """Plans that 0.1.0 wrote, as JSON and pickled."""
    said = {}
    for file in sorted(os.listdir("plans")):
        path = f"plans/{file}"
        if file.endswith(".json"):
            with open(path, encoding="utf-8") as text:
                plan = pgs.Plan.from_json(text.read())
        else:
            with open(path, "rb") as data:
                plan = pickle.load(data)
        said[file] = [json.loads(plan.to_json()), written(plan, f"{file}.gguf")]
    return said


@job
def bad_plans() -> Any:
    """What is refused: edits, JSON, models."""
    said: dict[str, Any] = {}
    with pgs.open("moe-qwen3moe.gguf") as model:
        plan = pgs.Plan(model)
        layers = {0: range(4), 1: range(4)}
        calls: dict[str, Callable[[], Any]] = {
            "no layer": lambda: plan.keep_experts({}),
            "not a mapping": lambda: plan.keep_experts([1]),  # type: ignore
            "twice": lambda: plan.keep_experts({0: [1, 1]}),
            "float": lambda: plan.keep_experts({0: [1.5]}),  # type: ignore
            "mtp": lambda: plan.keep_experts(layers, mtp="maybe"),
            "type": lambda: plan.quantize("Q4_K_X"),
            "quantize twice": lambda: plan.quantize("Q8_0").quantize("Q8_0"),
            "ggml type": lambda: plan.quantize("MXFP4"),
            "quality": lambda: plan.quantize("Q8_0", quality="good"),
            "policy": lambda: plan.quantize("Q8_0", imatrix="moe-qwen3moe.imatrix.gguf", imatrix_missing="no"),
            "both": lambda: plan.quantize(
                "Q8_0", imatrix="moe-qwen3moe.imatrix.gguf", include_weights=["a"], exclude_weights=["b"]
            ),
            "regex": lambda: plan.quantize("Q8_0", overrides=[("(", "Q8_0")]),
            "override": lambda: plan.quantize("Q8_0", overrides=[("a", "Q9")]),
            "imatrix": lambda: plan.quantize("Q8_0", imatrix="moe-qwen3moe.gguf"),
            "no imatrix": lambda: plan.quantize("Q8_0", imatrix="nowhere.gguf"),
            "recipe": lambda: plan.recipe("attention-bf17"),
            "split": lambda: plan.split(),
            "split of 0": lambda: plan.split(max_tensors=0),
            "layers": lambda: plan.prune_layers([]),
            "remove": lambda: plan.remove_metadata("nowhere"),
            "set": lambda: plan.set_metadata({"a": object()}),
            "mixed": lambda: plan.set_metadata({"a.b": [1, "x"]}),
            "range": lambda: plan.set_metadata({"general.alignment": 3}),
            "assignment": lambda: plan.set_metadata_text(["a.b:u99=1"]),
            "number": lambda: plan.set_metadata_text(["a:u8=300"]),
            "fit": lambda: plan.fit(bpw=4.0),
            "size": lambda: plan.quantize("Q8_0").fit(size="3 apples"),
            "too small": lambda: plan.quantize("Q8_0").fit(size=1000),
            "memory": lambda: plan.write("x.gguf", memory="1KB"),
            "threads": lambda: plan.write("x.gguf", threads=-1),
            "io": lambda: plan.write("x.gguf", io="fast"),
            "blocks": lambda: plan.set_metadata({"qwen3moe.block_count": 3}),
            "folder": lambda: plan.write("no/such/folder.gguf"),
            "model": lambda: pgs.Plan("model.gguf"),  # type: ignore[arg-type]
            "rank": lambda: pgs.experts.rank(model, by="router-nrom"),
            "group": lambda: pgs.experts.group(model, 8),
            "group size": lambda: pgs.experts.group(model, 8, weights_only=True, group_size=0),
        }
        for name, call in calls.items():
            said[name] = attempt(lambda: repr(call()))
        blocked = {
            "layer missing": plan.keep_experts({0: range(4)}),
            "range": plan.keep_experts({0: [99], 1: [0]}),
            "fewer than used": plan.keep_experts({0: range(3), 1: range(3)}),
            "layers": plan.prune_layers([0, 1]),
            "no such layer": plan.prune_layers([7]),
            "no match": plan.quantize("Q8_0", overrides=[("nothing", "F16")]),
            "router": plan.quantize("Q8_0", overrides=[(r"^blk\.0\.ffn_gate_inp\.weight$", "Q8_0")]),
            "needs importance": pgs.Plan(pgs.open("quant-qwen3moe.gguf")).quantize("IQ1_S"),
            "count": plan.set_metadata({"qwen3moe.expert_used_count": 99}),
            "too large": plan.recipe("small.toml"),
            "several": plan.quantize("IQ1_S", overrides=[("nothing", "F16")]).prune_layers([9]),
        }
        for name, one in blocked.items():
            checked = one.check()
            said[f"blocked {name}"] = [
                checked.summary(),
                checked.to_json(),
                [failure(e) for e in checked.blockers],
                attempt(lambda: one.write("x.gguf").path),
            ]
        good = json.loads(plan.keep_experts(layers).quantize("Q8_0").to_json())
        for name, text in {
            "not JSON": "{",
            "list": "[]",
            "format": json.dumps({**good, "format": 9}),
            "field": json.dumps({**good, "colour": 1}),
            "source": json.dumps({**good, "source": 3}),
            "other": json.dumps({**good, "header_sha256": "0" * 64}),
        }.items():
            said[f"json {name}"] = attempt(lambda: repr(pgs.Plan.from_json(text)))
    for path in (
        "empty",
        "text",
        "short-header",
        "truncated",
        "version-9",
        "big-endian",
        "zip",
        "safetensors",
        "nowhere",
        "imatrix",
        "synthetic.stats",
    ):
        said[f"open {path}"] = attempt(lambda: _opened(f"{path}.gguf"))
    with pgs.open("nan.gguf") as model:
        said["nan"] = attempt(lambda: pgs.Plan(model).quantize("Q8_0").write("x.gguf").path)
    return said


def _opened(path: str) -> Any:
    with pgs.open(path) as model:
        return [repr(model), model.warnings, pgs.Plan(model).check().summary()]
