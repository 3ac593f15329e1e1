"""Setting and removing metadata keys, from Python and as the shell writes it."""

import math

import gguf
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import pygguf_surgery as pgs
from pygguf_surgery import BadPlan, Value
from pygguf_surgery.edits import metadata
from support.gguf_files import make_gguf, read_gguf

T = gguf.GGUFValueType


@pytest.fixture
def model(tmp_path):
    path = make_gguf(
        tmp_path / "m.gguf",
        "falcon-h1",
        {
            "general.name": ("A model", T.STRING),
            "falcon-h1.expert_count": (4, T.UINT32),
            "falcon-h1.block_count": (2, T.UINT32),
            "falcon-h1.context_length": (4096, T.UINT32),
            "falcon-h1.small": (-3, T.INT8),
            "falcon-h1.scale": (0.5, T.FLOAT32),
            "tokenizer.ggml.add_bos_token": (True, T.BOOL),
            "tokenizer.ggml.scores": ([1, 2], T.ARRAY, T.INT16),
            "general.tags": (["a"], T.ARRAY, T.STRING),
            "split.count": (1, T.UINT16),
        },
        {"output_norm.weight": np.zeros(32, np.float32)},
    )
    return pgs.open(path)


@pytest.fixture
def plan(model):
    return pgs.Plan(model)


def result(plan, tmp_path):
    plan.write(tmp_path / "out.gguf")
    with pgs.open(tmp_path / "out.gguf") as out:
        return out.metadata.exact()


@pytest.mark.parametrize(
    "obj, type",
    [
        (True, "bool"),
        (0, "u32"),
        (2**32 - 1, "u32"),
        (-1, "i32"),
        (2**32, "u64"),
        (2**64 - 1, "u64"),
        (-(2**31) - 1, "i64"),
        (1.5, "f32"),
        (math.inf, "f32"),
        ("text", "str"),
        ([1, 2], "u32[]"),
        ([1, -2], "i32[]"),
        ([1, 2**40], "u64[]"),
        ([2**31, -1], "i64[]"),
        ([1, 0.5], "f32[]"),
        ([True], "bool[]"),
        (["a", "b"], "str[]"),
        ((1,), "u32[]"),
        (np.float64(0.5), "f32"),
        (np.int8(-1), "i32"),
        (np.arange(3), "u32[]"),
        (np.array(["a"]), "str[]"),
        (Value(3, "u16"), "u16"),
        (Value([], "i8[]"), "i8[]"),
    ],
)
def test_the_type_of_a_new_key(plan, tmp_path, obj, type):
    value = result(plan.set_metadata({"general.new_key": obj}), tmp_path)["general.new_key"]
    assert value.type == type
    expected = obj.value if isinstance(obj, Value) else obj
    assert value.value == (
        expected.tolist()
        if hasattr(expected, "tolist")
        else list(expected)
        if isinstance(expected, tuple)
        else expected
    )


@pytest.mark.parametrize(
    "obj", [None, {}, b"bytes", [], [[1]], [1, "a"], [True, 1], 2**64, -(2**63) - 1, [-1, 2**63], 1e300, 3 + 4j]
)
def test_what_no_new_key_can_hold(plan, obj):
    with pytest.raises(BadPlan) as e:
        plan.set_metadata({"general.new_key": obj})
    assert e.value.object == "general.new_key"


@pytest.mark.parametrize(
    "key, obj",
    [
        ("falcon-h1.context_length", 2**32 - 1),
        ("falcon-h1.small", -128),
        ("falcon-h1.scale", 2),
        ("falcon-h1.scale", 3.4e38),
        ("general.name", "Ünïcode"),
        ("tokenizer.ggml.add_bos_token", False),
        ("tokenizer.ggml.scores", [-32768, 32767]),
        ("tokenizer.ggml.scores", []),
        ("general.tags", ["x", "y"]),
        ("falcon-h1.small", np.int64(5)),
        ("falcon-h1.context_length", Value(7, "u32")),
    ],
)
def test_an_existing_key_keeps_its_type_and_place(plan, model, tmp_path, key, obj):
    out = result(plan.set_metadata({key: obj}), tmp_path)
    assert out[key].type == model.metadata.value(key).type
    plain = obj.value if isinstance(obj, Value) else obj
    assert out[key].value == pytest.approx(plain) if isinstance(plain, float) else out[key].value == plain
    # split.* go: they follow from the shards of the output
    assert list(out) == [k for k in model.metadata if not k.startswith("split.")]
    assert {k: v for k, v in out.items() if k != key} == {
        k: v for k, v in model.metadata.exact().items() if k != key and not k.startswith("split.")
    }


@pytest.mark.parametrize(
    "key, obj",
    [
        ("falcon-h1.context_length", -1),
        ("falcon-h1.context_length", 2**32),
        ("falcon-h1.context_length", 1.0),
        ("falcon-h1.context_length", "4096"),
        ("falcon-h1.context_length", True),
        ("falcon-h1.context_length", [1]),
        ("falcon-h1.small", 128),
        ("falcon-h1.scale", 1e39),
        ("falcon-h1.scale", "1"),
        ("general.name", 5),
        ("tokenizer.ggml.add_bos_token", 1),
        ("tokenizer.ggml.scores", [32768]),
        ("tokenizer.ggml.scores", 1),
        ("general.tags", "a"),
        ("falcon-h1.context_length", Value(7, "u64")),
    ],
)
def test_a_value_that_does_not_fit_an_existing_key(plan, key, obj):
    with pytest.raises(BadPlan) as e:
        plan.set_metadata({key: obj})
    assert e.value.object == key


def test_what_no_utf_8_can_hold_names_its_key(plan):
    with pytest.raises(BadPlan) as e:
        plan.set_metadata({"general.new_key": "\ud800"})
    assert e.value.object == "general.new_key"


@pytest.mark.parametrize("items", [None, [("general.name", "x")], "general.name=x"])
def test_what_is_no_mapping_is_no_metadata(plan, items):
    with pytest.raises(BadPlan, match="not metadata"):
        plan.set_metadata(items)


REQUIRED = {
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "b"],
}


@pytest.fixture
def whole(tmp_path):
    path = make_gguf(
        tmp_path / "whole.gguf",
        "llama",
        {
            "llama.context_length": (64, T.UINT32),
            "llama.embedding_length": (32, T.UINT32),
            "tokenizer.ggml.model": ("gpt2", T.STRING),
            "tokenizer.ggml.tokens": (["a", "b"], T.ARRAY, T.STRING),
            "tokenizer.ggml.token_type": ([1, 1], T.ARRAY, T.INT32),
        },
    )
    with pgs.open(path) as model:
        yield pgs.Plan(model)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_key_without_which_llama_cpp_stops_is_not_removed(whole, key, tmp_path):
    removed = whole.remove_metadata(key)
    with pytest.raises(BadPlan, match=r"llama\.cpp does not load") as e:
        removed.write(tmp_path / "out.gguf")
    assert e.value.object == key and not (tmp_path / "out.gguf").exists()
    assert not removed.set_metadata({key: REQUIRED[key]}).check().blockers
    assert [b.object for b in removed.set_metadata({key: True}).check().blockers] == [key]


def test_no_array_is_shorter_than_the_tokens(whole):
    key = "tokenizer.ggml.token_type"
    assert [b.object for b in whole.set_metadata({key: [1]}).check().blockers] == [key]
    assert [b.object for b in whole.set_metadata({"tokenizer.ggml.tokens": ["a", "b", "c"]}).check().blockers] == [key]
    assert not whole.set_metadata({key: [1, 2]}).check().blockers


def test_remove_and_set_changes_a_type(plan, tmp_path):
    out = result(plan.remove_metadata("falcon-h1.small").set_metadata({"falcon-h1.small": "text"}), tmp_path)
    assert out["falcon-h1.small"] == Value("text", "str")
    assert list(out)[-1] == "falcon-h1.small"


def test_later_edits_win(plan, tmp_path):
    out = result(
        plan.set_metadata({"general.a": 1}).set_metadata({"general.a": 2, "general.b": 3}).remove_metadata("general.b"),
        tmp_path,
    )
    assert out["general.a"] == Value(2, "u32") and "general.b" not in out


@pytest.mark.parametrize(
    "key",
    [
        "falcon-h1.expert_count",
        "falcon-h1.block_count",
        "general.alignment",
        "general.file_type",
        "general.quantization_version",
        "general.architecture",
        "split.count",
        "split.no",
        "split.tensors.count",
        "split.anything",
    ],
)
def test_derived_keys_cannot_be_set_or_removed(plan, key):
    for edit in (
        lambda: plan.set_metadata({key: 1}),
        lambda: plan.remove_metadata(key),
        lambda: plan.set_metadata_text([f"{key}=1"]),
    ):
        with pytest.raises(BadPlan) as e:
            edit()
        assert e.value.object == key and e.value.hint


def test_the_keys_of_another_architecture_are_not_derived(plan, tmp_path):
    assert result(plan.set_metadata({"llama.expert_count": 1}), tmp_path)["llama.expert_count"] == Value(1, "u32")


@pytest.mark.parametrize(
    "key", ["", "Name", "general name", "general..name", ".name", "name.", "général", "a\0b", 5, "a" * 65536]
)
def test_names_that_are_no_keys(plan, key):
    with pytest.raises(BadPlan):
        plan.set_metadata({key: 1})


def test_removing_a_key_that_is_not_there_names_the_nearest(plan):
    with pytest.raises(BadPlan) as e:
        plan.remove_metadata("general.nme")
    assert e.value.object == "general.nme" and "general.name" in e.value.hint
    with pytest.raises(BadPlan):
        plan.remove_metadata("general.name", "general.name")


def test_a_derived_key_in_a_plan_from_json_is_a_blocker(plan, model):
    text = plan.set_metadata({"general.aaaaaaaaa": 32}).to_json().replace("general.aaaaaaaaa", "general.alignment")
    blockers = pgs.Plan.from_json(text, model).check().blockers
    assert [(type(b), b.object) for b in blockers] == [(BadPlan, "general.alignment")]


# --- the shell --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("general.new=a=b", "general.new", Value("a=b", "str")),
        ("general.new=", "general.new", Value("", "str")),
        ("general.new=5", "general.new", Value("5", "str")),
        ("general.new:u16=5", "general.new", Value(5, "u16")),
        ("general.new:i64=-0x10", "general.new", Value(-16, "i64")),
        ("general.new:f64=1e300", "general.new", Value(1e300, "f64")),
        ("general.new:bool=True", "general.new", Value(True, "bool")),
        ("general.new:u32[]=1, 2,3", "general.new", Value([1, 2, 3], "u32[]")),
        ("general.new:str[]=a, b", "general.new", Value(["a", " b"], "str[]")),
        ("general.new:f32[]=", "general.new", Value([], "f32[]")),
        ("general.new:str=a:b", "general.new", Value("a:b", "str")),
        ("general.url=http://x", "general.url", Value("http://x", "str")),
        ("falcon-h1.context_length=8192", "falcon-h1.context_length", Value(8192, "u32")),
        ("falcon-h1.small=-1", "falcon-h1.small", Value(-1, "i8")),
        ("tokenizer.ggml.add_bos_token=false", "tokenizer.ggml.add_bos_token", Value(False, "bool")),
        ("tokenizer.ggml.scores=4,5", "tokenizer.ggml.scores", Value([4, 5], "i16[]")),
        ("falcon-h1.context_length:u32=1", "falcon-h1.context_length", Value(1, "u32")),
    ],
)
def test_assignments(plan, tmp_path, text, key, value):
    assert result(plan.set_metadata_text([text]), tmp_path)[key] == value


@pytest.mark.parametrize(
    "text",
    [
        "general.new",
        "=1",
        ":u8=1",
        "general.new:u7=1",
        "general.new:=1",
        "general.new:u8=256",
        "general.new:u8=x",
        "general.new:u8=1.5",
        "general.new:u8=",
        "general.new:bool=yes",
        "general.new:u8[]=1,,2",
        "general.new:u8[][]=1",
        "general.new:array=1",
        "falcon-h1.context_length=-1",
        "falcon-h1.context_length=many",
        "falcon-h1.context_length:u64=1",
        "tokenizer.ggml.scores=1,99999",
    ],
)
def test_assignments_that_are_refused(plan, text):
    with pytest.raises(BadPlan):
        plan.set_metadata_text([text])


@given(st.sampled_from([t for t in metadata.SCALAR_TYPES if t not in ("str", "bool", "f32")]), st.data())
def test_numbers_survive_the_shell(type, data):
    low, high = metadata._INTEGERS.get(type, (None, None))
    number = data.draw(st.integers(low, high) if low is not None else st.floats(allow_nan=False))
    assert metadata.parse_assignment(f"a.b:{type}={number!r}") == ("a.b", Value(number, type))


@example(16777217, "f32")
@example(2**53 + 1, "f64")
@example(3.4028235677973366e38, "f32")  # the first that rounds to infinity
@example(3.4028235677973362e38, "f32")
@given(
    st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.text()),
    st.sampled_from([*metadata.SCALAR_TYPES, "u8[]", "str[]"]),
)
def test_fits_agrees_with_the_core(obj, type):
    """What fits is encoded; what does not is refused before it gets there."""
    if metadata.fits(obj, type):
        assert Value(obj, type).type == type
    else:
        with pytest.raises(BadPlan):
            metadata.to_value(obj, Value([] if type.endswith("[]") else {"str": "", "bool": False}.get(type, 0), type))


def test_gguf_py_reads_what_was_set(plan, tmp_path):
    plan.set_metadata({"general.a": [1, 2], "general.b": "é", "general.c": False}).write(tmp_path / "o.gguf")
    values, _ = read_gguf(tmp_path / "o.gguf")
    assert (values["general.a"], values["general.b"], values["general.c"]) == ([1, 2], "é", False)
