"""The inputs of same_bytes.py: models, importance matrices, statistics, repairs, plans, broken files.

Run with the interpreter of version 0.1.0, whose inner modules it may use: same_bytes_inputs.py FOLDER TESTS [SHARED]
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pickle
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from pygguf_surgery.container import write_gguf
from pygguf_surgery.experts.stats import LayerStats, Text
from pygguf_surgery.report.demo_model import DemoShape, write_demo_model
from same_bytes_plans import some_plans
from same_bytes_shared import layers_of

import pygguf_surgery as pgs


def builders(tests: str, name: str) -> Any:
    """The module of test models `name`, in tests/ or in tests/support/."""
    sys.path += [tests, os.path.join(tests, "support")]
    for spelling in (name, f"support.{name}"):
        if importlib.util.find_spec(spelling.partition(".")[0]) and importlib.util.find_spec(spelling):
            return importlib.import_module(spelling)
    raise SystemExit(f"no module {name} in {tests} or {tests}/support: say where the test models are")


def random(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def write_imatrix(model: pgs.Model, path: str) -> None:
    """Sums and counts for every matrix, without those that llama-imatrix leaves out; expert 1 was never seen."""
    entries = {}
    for name, tensor in model.tensors.items():
        if len(tensor.shape) < 2 or not name.startswith("blk.") or "ffn_gate_inp" in name or tensor.type == "I32":
            continue
        rows = tensor.shape[0] if len(tensor.shape) == 3 else 1
        counts = np.arange(3, 3 + rows, dtype=np.float32)
        sums = (random(path + name).random((rows, tensor.shape[-1]), np.float32) + 0.01) * counts[:, None]
        if rows > 1:
            counts[1], sums[1] = 0, 0
        entries[name] = sums, counts
    pgs.imatrix.write(path, entries, datasets=[os.path.basename(path)], chunk_count=7, chunk_size=512)


def write_stats(model: pgs.Model, path: str, layers: list[int]) -> None:
    """Statistics of random numbers, with what merging needs; one expert of each layer was never seen, one is super."""
    experts, width = model.get("expert_count"), model.get("embedding_length")
    rng, found = random(path), {}
    for layer in layers:
        count = rng.integers(1, 100, experts).astype(np.float64)
        count[2] = 0
        seen = count > 0
        norm = rng.random(experts) + 0.5
        activation = rng.random(experts)
        activation[layer % experts] = 1e5
        logits = rng.standard_normal((64, experts))
        found[layer] = LayerStats(
            count,
            count * rng.random(experts),
            count * norm,
            count * norm**2,
            count * norm * rng.random(experts),
            activation * seen,
            np.diag(count),
            logits.T @ logits,
            rng.standard_normal((experts, width)) * seen[:, None],
            tokens=int(count.sum()) // model.get("expert_used_count"),
        )
    texts = [Text(zlib.crc32(path.encode()).to_bytes(4, "big").hex() * 8, 1000, 2, 2)]
    pgs.experts.Stats(
        model.header_sha256,
        model.architecture,
        model.metadata.get("general.name", ""),
        experts,
        128,
        found,
        texts,
        512.0,
        2048.0,
        128,
    ).write(path)


def write_repair(model: pgs.Model, path: str, kept: dict[int, tuple[int, ...]], kind: str) -> None:
    keys = {
        "general.type": pgs.Value("expert_repair", "str"),
        "pgs.repair.format": pgs.Value(1, "u32"),
        "pgs.repair.model.header_sha256": pgs.Value(model.header_sha256, "str"),
        "pgs.repair.metric": pgs.Value("best", "str"),
        "pgs.repair.layers": pgs.Value(list(kept), "u32[]"),
        **{f"pgs.repair.{layer}.kept": pgs.Value(list(ids), "u32[]") for layer, ids in kept.items()},
    }
    tensors: dict[str, Any] = {}
    for layer, ids in kept.items():
        name = f"blk.{layer}.ffn_down_exps.weight"
        values = random(path + name).standard_normal((len(ids), *model.tensors[name].shape[1:]), np.float32)
        tensors[name] = (pgs.quantize(values, kind), kind, values.shape)
    tensors["errors"] = np.array([[0.5, 0.25]] * len(kept))
    write_gguf(path, keys, tensors)


EXPERTS = 16  # of the main model, so that a run takes minutes


def main_model(shared: str | None) -> None:
    """model.gguf: every second expert of a trained model, or a made-up one; it has all keys that the jobs change."""
    source = f"{shared}/models/tiny-qwen3next-bf16.gguf" if shared else "whole.gguf"
    if not shared:
        write_demo_model(source, shape=DemoShape(experts=2 * EXPERTS, used=4, vocabulary=4096))
    with pgs.open(source) as model:
        kept = dict.fromkeys(layers_of(model), range(0, 2 * EXPERTS, 2))
        pgs.Plan(model).keep_experts(kept).write("half.gguf")
    with pgs.open("half.gguf") as model:
        pgs.Plan(model).remove_metadata(*(key for key in model.metadata if key.startswith("pgs."))).set_metadata(
            {
                "general.url": "https://example.org/model",
                "qwen3next.attention.recurrent_layers": [True, True, True, False],
            }
        ).write("model.gguf")
    if shared:
        pgs.imatrix.slice(f"{shared}/models/imatrix.gguf", "imatrix.gguf", kept)
    else:
        with pgs.open("model.gguf") as model:
            write_imatrix(model, "imatrix.gguf")
    pgs.imatrix.convert("imatrix.gguf", "imatrix.dat")
    for name in ("half.gguf", "whole.gguf"):
        Path(name).unlink(missing_ok=True)


def companions() -> None:
    """Of the main model: its names in the README, shards, importance matrices, statistics, a repair, choices."""
    os.symlink("model.gguf", "model-BF16.gguf")
    with pgs.open("model.gguf") as model:
        pgs.Plan(model).quantize("Q8_0").write("model-Q8_0.gguf")
        pgs.Plan(model).split(max_tensors=-(-len(model.tensors) // 3)).write("sharded")
        layers = layers_of(model)
        for name in ("synthetic", "synthetic-2"):
            write_stats(model, f"{name}.stats.gguf", layers)
            write_imatrix(model, f"{name}.imatrix.gguf")
        ids = tuple(range(0, model.get("expert_count"), 2))
        write_repair(model, "synthetic.repair.gguf", dict.fromkeys(layers, ids), "BF16")
        rng = random("scores")
        write_json("kept.json", {"kept": {str(layer): ids for layer in layers}})
        write_json(
            "scores.json",
            {
                "metric": "mine",
                "scores": {str(layer): rng.random(model.get("expert_count")).tolist() for layer in layers},
            },
        )
        write_json("half-kept.json", {"kept": {str(layers[0]): ids}})


def texts(shared: str | None) -> None:
    for name, original in (("code.txt", "calib.txt"), ("chat.txt", "eval.txt")):
        text = " ".join(f"{name} word{i % 97} is {i * 7919 % 1009}." for i in range(3000)).encode()
        if shared:
            with open(f"{shared}/models/{original}", "rb") as file:
                text = file.read(30000)
        with open(name, "wb") as file:
            file.write(text.decode(errors="ignore").encode())


def small_models(tests: str) -> None:
    moe, quant = builders(tests, "moe_models"), builders(tests, "quant_models")
    for name, build in moe.ALL.items():
        build(f"moe-{name}.gguf")
    moe.qwen3next("moe-mtp.gguf", mtp=True)
    moe.dots1("moe-grouped.gguf", groups=4)
    fused = moe.Builder("qwen3moe", blocks=2, experts=16, used=4)
    for layer in range(2):
        fused.moe(layer, parts=("gate_up", "down"), bias=True)
    fused.write("moe-fused.gguf")
    for kind in ("Q8_0", "MXFP4"):
        moe.qwen3moe(f"moe-{kind}.gguf", type=kind)
    for name in (*moe.ALL, "mtp", "grouped", "fused", "Q8_0"):
        with pgs.open(f"moe-{name}.gguf") as model:
            write_imatrix(model, f"moe-{name}.imatrix.gguf")
    with pgs.open("moe-dots1.gguf") as model:
        write_stats(model, "moe-dots1.stats.gguf", [1, 2])
    with pgs.open("moe-qwen3moe.gguf") as model:
        write_repair(model, "moe-qwen3moe.repair.gguf", {0: (1, 2, 5, 9), 1: (0, 3, 4, 15)}, "F16")
    for name, make in quant.ALL.items():
        made = make()
        made.write(f"quant-{name}.gguf")
        made.write_imatrix(f"quant-{name}.imatrix.gguf")


def broken_files() -> None:
    """What is no model, or one that lies."""
    with open("moe-qwen3moe.gguf", "rb") as file:
        good = file.read()
    write_json("bad.json", {"kept": {"0": [1, 1]}})
    for name, data in (
        ("empty.gguf", b""),
        ("text.gguf", b"not a model" * 10),
        ("short-header.gguf", good[:200]),
        ("truncated.gguf", good[:-5000]),
        ("version-9.gguf", good[:4] + b"\x09" + good[5:]),
        ("big-endian.gguf", good[:4] + b"\0\0\0\3" + good[8:]),
        ("zip.gguf", b"PK\3\4" + good[:500]),
        ("safetensors.gguf", b'\x40\0\0\0\0\0\0\0{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
        ("not-json.json", b"{"),
        ("twice.json", b'{"kept": {"0": [1], "0": [2]}}'),
    ):
        with open(name, "wb") as file:
            file.write(data)
    with pgs.open("moe-qwen3moe.gguf") as model:
        offset = model.tensors["blk.0.ffn_up_exps.weight"].offset
    with open("nan.gguf", "wb") as file:  # F16 with an infinity and a NaN
        file.write(good[:offset] + b"\x00\x7c\x01\x7e" + good[offset + 4 :])


def recipes() -> None:
    for name, text in (
        (
            "mine.toml",
            'description = "mine"\ntype = "Q4_K_M"\noutput_type = "Q6_K"\n\n[[override]]\n'
            'pattern = \'attn_\'\ntype = "Q8_0"\nreason = "why not"\n',
        ),
        ("small.toml", 'type = "Q8_0"\nmax_size = "100KB"\n'),
        ("wrong.toml", 'type = "Q8_0"\ncolour = "red"\n'),
        ("types.txt", "attn_=Q8_0 ffn_down_exps=Q6_K\nblk\\.0\\.=copy\n"),
        ("bad-types.txt", "attn_\n"),
    ):
        with open(name, "w", encoding="utf-8") as file:
            file.write(text)


def write_json(path: str, data: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(data, file)


def plans() -> None:
    """Plans as 0.1.0 writes them, for the other version to load."""
    os.mkdir("plans")
    for name, plan in some_plans().items():
        with open(f"plans/{name}.json", "w", encoding="utf-8") as file:
            file.write(plan.to_json())
        with open(f"plans/{name}.pickle", "wb") as file:
            pickle.dump(plan, file)
        plan.model.close()


def main() -> None:
    folder, tests, *rest = map(os.path.abspath, sys.argv[1:])
    os.chdir(folder)
    main_model(rest[0] if rest else None)
    companions()
    texts(rest[0] if rest else None)
    small_models(tests)
    broken_files()
    recipes()
    plans()


if __name__ == "__main__":
    main()
