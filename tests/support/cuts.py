"""Cutting experts: the rules again, written for one array at a time, and stub models of one case each, no files."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from pygguf_surgery import Value
from pygguf_surgery.edits import keep_experts as prune
from pygguf_surgery.plan_data.edits import KeepExperts
from pygguf_surgery.plan_data.expressions import Copy, OutputTensor

from .drafts import apply_edit

# --- the oracle -----------------------------------------------------------------------------------------------------


CUT = [
    f"ffn_{part}_exps.{word}"
    for part in ("gate", "up", "down", "gate_up")
    for word in ("weight", "bias", "scale", "input_scale")
] + ["ffn_gate_inp.weight", "ffn_gate_inp.bias", "exp_probs_b", "exp_probs_b.bias", "exp_probs_b_vl.bias"]


def cut(name, data, kept, *, chunk=1, order=None):
    layer, word = (int(name.split(".")[1]), name.split(".", 2)[2]) if name.startswith("blk.") else (None, name)
    if layer not in kept:
        return data
    ids = kept[layer]
    if word in CUT:
        return data[list(ids)]
    if "_chexps." in word:
        return data[sorted({i // chunk for i in ids})]
    if "tid2eid" in word:
        return remap(data, ids, order or ids)
    return data


def remap(table, ids, best_first):
    new = {old: i for i, old in enumerate(ids)}
    out = []
    for row in table.tolist():
        got = [new.get(i) for i in row]
        for k, i in enumerate(got):
            if i is None:
                got[k] = next(new[s] for s in best_first if new[s] not in got)
        out.append(got)
    return np.array(out, np.int32)


def same_tensors(found, expected):
    assert list(found) == list(expected)
    for name, (kind, data) in expected.items():
        assert found[name][0] == kind, name
        assert found[name][1].shape == data.shape, name
        assert found[name][1].tobytes() == data.tobytes(), name


# --- stub models ----------------------------------------------------------------------------------------------------


def tensor(name, *shape, type="F32"):
    return OutputTensor(name, shape, type, type, Copy(name))


def block(i, e):
    return [tensor(f"blk.{i}.ffn_gate_inp.weight", e, 8), tensor(f"blk.{i}.ffn_down_exps.weight", e, 8, 32)]


def apply(tensors, kept, *, experts=4, used=2, blocks=1, general=None, mtp="keep", metric="m", **keys):
    values = {"expert_count": experts, "expert_used_count": used, "block_count": blocks} | keys
    metadata = {
        f"x.{k.replace('__', '.')}": v if isinstance(v, Value) else Value(v, "u32[]" if isinstance(v, list) else "u32")
        for k, v in values.items()
        if v is not None
    }
    metadata |= {f"general.{k}": Value(v, "str") if isinstance(v, str) else v for k, v in (general or {}).items()}
    plain = {k: v.value for k, v in metadata.items()}
    model = SimpleNamespace(
        architecture="x", metadata=plain, name=plain.get("general.name", ""), header_sha256="0" * 64
    )
    return apply_edit(prune, model, tensors, metadata, KeepExperts(kept, metric, mtp))


def the_blocker(out):
    assert len(out.blockers) == 1, [str(b) for b in out.blockers]
    return out.blockers[0]
