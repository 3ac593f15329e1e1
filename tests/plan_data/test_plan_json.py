"""Plans as JSON: those of version 0.1.0, every plan there and back, all else refused with its path, the schema."""

from __future__ import annotations

import copy
import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from pygguf_surgery import BadPlan, Value
from pygguf_surgery.base.codec import loads
from pygguf_surgery.plan_data.codec import EDITS, expression_to_json, plan_from_json, plan_to_json
from pygguf_surgery.plan_data.edits import (
    KeepExperts,
    MergeExperts,
    PlanData,
    PruneLayers,
    Quantize,
    RemoveMetadata,
    SetMetadata,
    Split,
    UseImatrix,
    UseRepair,
)
from pygguf_surgery.plan_data.expressions import Copy, Group, Merge, Remap, Repaired, Stack, Take
from support.json_schema import FOLDER, derived, text_of
from support.strategies import EDIT, PLAN, json_values

WRITTEN = Path(__file__).parents[1] / "data" / "plans-0.1.0"  # old-*: by versions before, with fewer keys
SCHEMA = Draft202012Validator(derived()["plan"])


def dumps(plan):
    return json.dumps(plan_to_json(plan), allow_nan=False)


# --- plans of version 0.1.0 -------------------------------------------------------------------------------------------

ORDER = struct.pack("<4H", 3, 0, 65535, 2)
USE = UseImatrix("/models/demo-imatrix.gguf", "ab" * 32, "layer-mean", ("ffn_", "attn_q"), ("ffn_gate",))
PLAIN = replace(USE, missing="default", include=(), exclude=())
ODD = os.fsdecode(b"/models/\xff\xfe caf\xc3\xa9.gguf")
INF = float("inf")
VALUES = {
    "new.u8": Value(255, "u8"),
    "new.i8": Value(-128, "i8"),
    "new.u16": Value(65535, "u16"),
    "new.i16": Value(-32768, "i16"),
    "new.u32": Value(2**32 - 1, "u32"),
    "new.i32": Value(-(2**31), "i32"),
    "new.u64": Value(2**64 - 1, "u64"),
    "new.i64": Value(-(2**63), "i64"),
    "new.f32": Value(1e-6, "f32"),
    "new.f64": Value(0.1, "f64"),
    "new.bool": Value(True, "bool"),
    "new.str": Value("naïve \U0001f5a5 \x00\n", "str"),
    "new.nan": Value(float("nan"), "f32"),
    "new.inf": Value(INF, "f64"),
    "new.minus_inf": Value(-INF, "f32"),
    "new.payload": Value.from_raw("f64", (0x7FF0000000000001).to_bytes(8, "little")),
    "new.minus_zero": Value(-0.0, "f64"),
    "new.smallest": Value(5e-324, "f64"),
    "new.bytes": Value.from_raw("str", b"\xff\x00a"),
    "new.u8s": Value([0, 1, 255], "u8[]"),
    "new.i64s": Value([-(2**63), 2**63 - 1], "i64[]"),
    "new.f32s": Value([0.5, -1.5, 3.4028234663852886e38], "f32[]"),
    "new.infs": Value([1.0, INF], "f64[]"),
    "new.bools": Value([True, False], "bool[]"),
    "new.strs": Value(["a", "", "é"], "str[]"),
    "new.odd_strs": Value(["a", "\udcff"], "str[]"),
    "new.none": Value([], "u32[]"),
    "new.no_strs": Value([], "str[]"),
}
EIGHT = (1.0, 0.0, 0.1, -0.5, 1e300, 2.0, 5e-324, 1 / 3)
KEPT = {0: (0, 2, 5), 1: (1, 2, 7), 10: (3, 4, 6)}
BEST_FIRST = {0: (5, 0, 2), 1: (7, 1, 2), 10: (3, 6, 4)}
SCORES = {0: EIGHT, 1: (0.25,) * 8, 10: (2.0**60,) * 8}
REPAIR = UseRepair("/models/demo-repair.gguf", "cd" * 32)
GROUPS = {
    0: (Group((0, 3), (0.75, 0.25), (b"", ORDER)), Group((1,), (1.0,), (b"",))),
    2: (Group((2, 1), (1 / 3, 2 / 3), (ORDER, b"")), Group((3,), (1.0,), (b"",))),
}
OVERRIDES = (("attn_.*\\.weight", "Q8_0"), ("ffn_down_exps", "copy"))
PLANS = {
    "no-edits": (),
    "keep-experts": (KeepExperts(KEPT, "reap-sum", "drop", BEST_FIRST, SCORES, REPAIR),),
    "keep-experts-given": (KeepExperts({3: (0, 1)}, "given"),),
    "merge-experts": (MergeExperts(GROUPS, "reap", "drop"),),
    "merge-experts-given": (MergeExperts({0: (Group((0,), (1.0,), ()),)}, "given"),),
    "prune-layers": (PruneLayers((1, 2, 40)),),
    "set-metadata": (SetMetadata(tuple(VALUES.items())),),
    "remove-metadata": (RemoveMetadata(("tokenizer.chat_template", "general.url")),),
    "quantize": (Quantize("Q4_K_M", False, OVERRIDES, True, "Q6_K", "Q8_0", False, USE, 2**40, "best"),),
    "quantize-pure": (Quantize("NVFP4", True, leave_output=True, imatrix=PLAIN),),
    "quantize-plain": (Quantize("MXFP4_MOE"),),
    "split-size": (Split(max_bytes=2 * 10**9, first_empty=True),),
    "split-tensors": (Split(max_tensors=128),),
    "split-keep": (Split(keep=True),),
    "all": (
        PruneLayers((3,)),
        KeepExperts({0: (0, 1), 1: (2, 3)}, "frequency"),
        SetMetadata((("general.name", Value("less", "str")),)),
        RemoveMetadata(("general.url",)),
        Quantize("Q8_0"),
        KeepExperts({0: (0,), 1: (1,)}, "given"),
        Split(max_tensors=2),
    ),
    "odd-path": (Quantize("Q8_0", imatrix=replace(USE, path=ODD)),),
    "old-quantize": (Quantize("Q8_0", False, (("a", "copy"),), True),),
    "old-keep-experts": (KeepExperts({0: (0, 1)}, "given", "drop"),),
    "old-weights": (MergeExperts({0: (Group((1,), (1.0,), (b"",)),)}, "given"),),
    "old-scores": (KeepExperts({0: (0,)}, "m", order={0: (0,)}, scores={0: (1.0, 0.5)}),),
    "old-null-repair": (KeepExperts({0: (0,)}, "m"),),
}


def test_every_file_has_its_plan():
    assert sorted(PLANS) == sorted(path.stem for path in WRITTEN.glob("*.json"))
    assert len({type(edit) for edits in PLANS.values() for edit in edits}) == 7  # all that 0.1.0 had


@pytest.mark.parametrize("name", sorted(PLANS))
def test_plans_of_0_1_0_load_unchanged(name):
    text = (WRITTEN / f"{name}.json").read_text()
    data = loads(text)
    plan = plan_from_json(data)
    assert plan == PlanData(ODD if name == "odd-path" else "/models/demo.gguf", "5e" * 32, PLANS[name])
    assert not list(SCHEMA.iter_errors(data))
    if name.startswith("old-"):  # without keys of defaults, with whole numbers for floats
        assert plan_from_json(plan_to_json(plan)) == plan
    else:
        assert plan_to_json(plan) == data and dumps(plan) + "\n" == text


# --- there and back ---------------------------------------------------------------------------------------------------


def test_every_edit_is_drawn():
    assert EDIT.keys() == set(EDITS.values())


@given(PLAN)
def test_every_plan_comes_back(plan):
    text = dumps(plan)
    back = plan_from_json(loads(text))
    assert back == plan and dumps(back) == text
    assert not list(SCHEMA.iter_errors(json.loads(text)))


def test_names_of_the_edits_in_json():
    """They are written in files: a class may get another name, its edit may not."""
    words = {
        "keep_experts": KeepExperts,
        "merge_experts": MergeExperts,
        "prune_layers": PruneLayers,
        "set_metadata": SetMetadata,
        "remove_metadata": RemoveMetadata,
        "quantize": Quantize,
        "split": Split,
    }
    assert words == EDITS


@pytest.mark.parametrize(
    "expression, data",
    [
        (Copy("a"), {"expression": "copy", "ref": "a"}),
        (Take("a", (2, 0)), {"expression": "take", "ref": "a", "indices": [2, 0]}),
        (Take("a", (2, None), -1.5), {"expression": "take", "ref": "a", "indices": [2, -1], "fill": -1.5}),
        (Stack(("a", "b")), {"expression": "stack", "refs": ["a", "b"]}),
        (Remap("a", (0, None), (1,)), {"expression": "remap", "ref": "a", "table": [0, -1], "substitutes": [1]}),
        (Repaired("a", (1,), (2,)), {"expression": "repair", "ref": "a", "rows": [1], "indices": [2]}),
        (
            Merge("a", (Group((0, 1), (0.5, 0.5), (b"", ORDER)), Group((2,), (1.0,), (b"",))), "rows"),
            {
                "expression": "merge",
                "ref": "a",
                "axis": "rows",
                "groups": [[0, 1], [2]],
                "weights": [[0.5, 0.5], [1.0]],
            },
        ),
    ],
)
def test_expressions_as_they_are_shown(expression, data):
    assert json.dumps(expression_to_json(expression)) == json.dumps(data)


# --- all else ---------------------------------------------------------------------------------------------------------

GIVEN = {"edit": "keep_experts", "kept": {"3": [0, 1]}, "metric": "given"}
MERGED = {"edit": "merge_experts", "metric": "given"}
GROUP_JSON = {"members": [0], "weights": [1.0], "orders": [""]}
QUANTIZED = {"edit": "quantize", "type": "Q8_0"}


def value(data):
    return {"edit": "set_metadata", "items": [["key", {"type": "u8", "value": 1}], ["key", data]]}


@pytest.mark.parametrize(
    "edit, path, problem",
    [
        (5, "edits[0]", "not a table"),
        ({}, "edits[0].edit", "unknown edit"),
        ({"edit": 5}, "edits[0].edit", "unknown edit"),
        ({"edit": ["split"]}, "edits[0].edit", "unknown edit"),
        ({"edit": "Split"}, "edits[0].edit", "unknown edit"),
        ({"edit": "split", "Keep": True}, "edits[0].Keep", "unknown key"),
        ({"edit": "split", "keep": 1}, "edits[0].keep", "not true or false"),
        ({"edit": "split", "max_bytes": 1e9}, "edits[0].max_bytes", "not a whole number"),
        ({**GIVEN, "kept": {"3": [True]}}, 'edits[0].kept["3"][0]', "not a whole number"),
        ({**GIVEN, "kept": {"3": [0, "1"]}}, 'edits[0].kept["3"][1]', "not a whole number"),
        ({**GIVEN, "kept": {"3": "01"}}, 'edits[0].kept["3"]', "not a list"),
        ({**GIVEN, "kept": {"03": [0]}}, 'edits[0].kept["03"]', "not a whole number"),
        ({**GIVEN, "kept": {"x": [0]}}, "edits[0].kept.x", "not a whole number"),
        ({**GIVEN, "kept": [[0]]}, "edits[0].kept", "not a table"),
        ({**GIVEN, "keep": {}}, "edits[0].keep", "unknown key"),
        ({**GIVEN, "order": None}, "edits[0].order", "not a table"),
        ({**GIVEN, "scores": {"3": ["1"]}}, 'edits[0].scores["3"][0]', "not a number"),
        ({**GIVEN, "scores": {"3": [0, 1e999]}}, 'edits[0].scores["3"][1]', "not a number"),
        ({**GIVEN, "scores": {"3": [10**400]}}, 'edits[0].scores["3"][0]', "not a number"),
        ({**GIVEN, "repair": {"path": "x"}}, "edits[0].repair.digest", "missing key"),
        ({**GIVEN, "repair": {"path": "x", "digest": "", "more": 1}}, "edits[0].repair.more", "unknown key"),
        ({"edit": "keep_experts", "metric": ""}, "edits[0].kept", "missing key"),
        ({**MERGED, "groups": {"1": GROUP_JSON}}, 'edits[0].groups["1"]', "not a list"),
        ({**MERGED, "groups": {"1": [{**GROUP_JSON, "x": 0}]}}, 'edits[0].groups["1"][0].x', "unknown key"),
        (
            {**MERGED, "groups": {"1": [{**GROUP_JSON, "orders": ["A"]}]}},
            'edits[0].groups["1"][0].orders[0]',
            "not base64",
        ),
        (
            {**MERGED, "groups": {"1": [{**GROUP_JSON, "orders": ["é"]}]}},
            'edits[0].groups["1"][0].orders[0]',
            "not base64",
        ),
        ({**MERGED, "groups": {"1": [{**GROUP_JSON, "orders": [0]}]}}, 'edits[0].groups["1"][0].orders[0]', "not text"),
        ({**QUANTIZED, "overrides": [["a", "b", "c"]]}, "edits[0].overrides[0]", "not a list of 2"),
        ({**QUANTIZED, "overrides": [["a", None]]}, "edits[0].overrides[0][1]", "not text"),
        (
            {**QUANTIZED, "imatrix": {"path": "", "digest": "", "include": "a"}},
            "edits[0].imatrix.include",
            "not a list",
        ),
        (value({"type": "u8"}), "edits[0].items[1][1]", "not a value"),
        (value({"type": "u8", "value": 1, "hex": "01"}), "edits[0].items[1][1]", "not a value"),
        (value({"type": "u8", "value": 256}), "edits[0].items[1][1]", "value does not fit its type"),
        (value({"type": "u8", "value": [1]}), "edits[0].items[1][1]", "not a value of its type"),
        (value({"type": "u8", "value": 10**400}), "edits[0].items[1][1]", "value does not fit its type"),
        (value({"type": "f64", "value": 1e999}), "edits[0].items[1][1]", "not a value of its type"),
        (value({"type": "f32[]", "value": [1e999]}), "edits[0].items[1][1]", "not a value of its type"),
        (value({"type": "f32", "hex": "00"}), "edits[0].items[1][1]", "wrong number of bytes for its type"),
        (value({"type": "f32", "hex": "xy"}), "edits[0].items[1][1]", "not a value of its type"),
        (value({"type": "f99", "value": 1}), "edits[0].items[1][1]", "unknown value type"),
        (value({"type": "\ud800", "value": 1}), "edits[0].items[1][1]", "not a value of its type"),
        (value({"type": 5, "value": 1}), "edits[0].items[1][1]", "not text"),
        (value(5), "edits[0].items[1][1]", "not a table"),
    ],
)
def test_refused_with_the_path(edit, path, problem):
    text = json.dumps({"format": 1, "source": "x", "header_sha256": "", "edits": [edit]}).replace("Infinity", "1e999")
    with pytest.raises(BadPlan) as error:
        plan_from_json(loads(text))
    assert (error.value.object, error.value.problem) == (path, f"not a plan: {problem}")


@pytest.mark.parametrize(
    "data, path",
    [
        (None, "format"),
        ([], "format"),
        ({}, "format"),
        ({"format": 2}, "format"),
        ({"format": True}, "format"),
        ({"format": 1.0}, "format"),
        ({"format": "1"}, "format"),
        ({"format": 1}, "source"),
        ({"format": 1, "source": "x", "header_sha256": "", "edits": None}, "edits"),
        ({"format": 1, "source": "x", "header_sha256": "", "edit": []}, "edit"),
    ],
)
def test_the_frame_of_a_plan(data, path):
    with pytest.raises(BadPlan) as error:
        plan_from_json(data)
    assert error.value.object == path and list(SCHEMA.iter_errors(data))


def places(data, here=()):
    """The paths of all that is in JSON."""
    yield here
    for key, inner in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from places(inner, (*here, key))


@given(st.sampled_from(sorted(PLANS)), st.data())
def test_a_plan_with_something_else_in_one_place(name, data):
    """It is refused, or it is a plan: then the schema knows it too."""
    changed = json.loads((WRITTEN / f"{name}.json").read_text())
    *path, last = data.draw(st.sampled_from(list(places(changed))[1:]))
    inside = changed
    for key in path:
        inside = inside[key]
    if isinstance(inside, dict) and data.draw(st.booleans()):
        inside[data.draw(st.text(max_size=4))] = inside.pop(last)
    else:
        inside[last] = data.draw(json_values())
    try:
        plan = plan_from_json(copy.deepcopy(changed))
    except BadPlan:
        return
    assert plan_from_json(loads(dumps(plan))) == plan
    assert not list(SCHEMA.iter_errors(changed))


@given(json_values())
def test_any_json_is_refused(data):
    with pytest.raises(BadPlan):
        plan_from_json(data)
    with pytest.raises(BadPlan):
        plan_from_json({"format": 1, "source": "", "header_sha256": "", "edits": [data]})


@pytest.mark.parametrize("name", sorted(derived()))
def test_schemas_are_those_of_the_classes(name):
    """Otherwise: PYTHONPATH=.:tests python tests/support/json_schema.py"""
    assert (FOLDER / f"{name}.schema.json").read_text() == text_of(derived()[name]) + "\n"
