"""Plan, check and their JSON; and law 2: what the engine writes is what a slow, obvious oracle makes."""

import copy
import json
import pickle

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pygguf_surgery as pgs
from pygguf_surgery import BadPlan, Plan, SourceChanged, Unsupported, Value
from pygguf_surgery.base import units
from pygguf_surgery.base.units import parse_memory
from pygguf_surgery.files.companions import Companions
from pygguf_surgery.gate.jobs import Inputs, build_jobs, lower
from pygguf_surgery.plan_data.edits import KeepExperts
from pygguf_surgery.plan_data.expressions import Copy, OutputTensor, Take
from support import moe_models
from support.gguf_bytes import gguf as hand_made
from support.gguf_bytes import info, kv
from support.gguf_files import make_gguf, read_gguf
from support.strategies import small_models, values

T = gguf.GGUFValueType
Q = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(folder):
    return pgs.open(moe_models.qwen3moe(folder / "qwen3moe.gguf"))


KEEP = {0: (0, 1, 2, 5), 1: (3, 7, 8, 15)}


def full_plan(model):
    return (
        Plan(model)
        .keep_experts(KEEP)
        .quantize("MXFP4_MOE", overrides=[("attn", "copy")])
        .set_metadata({"general.name": "Cut", "general.new": [1.5]})
        .remove_metadata("general.size_label")
    )


# --- the object -------------------------------------------------------------------------------------------------------


def test_a_plan_is_immutable(model):
    plan = Plan(model)
    edited = full_plan(model)
    assert len(plan.data.edits) == 0 and len(edited.data.edits) == 4
    for name in ("data", "model", "anything"):
        with pytest.raises(AttributeError):
            setattr(plan, name, None)
    with pytest.raises(AttributeError):
        del plan.data
    keep = {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}
    plan = plan.keep_experts(keep)
    keep[0].append(4)
    assert plan.data.edits[0].kept == {0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}


def test_what_is_no_model_or_no_choice_of_experts(model):
    with pytest.raises(TypeError, match="open"):
        Plan(model.path)
    with pytest.raises(BadPlan, match="keep\\(n\\)"):
        Plan(model).keep_experts(pgs.experts.rank(model))


def test_what_a_prompt_shows_is_short(model):
    plan = full_plan(model)
    for thing in (model, model.metadata, plan, plan.check(), next(iter(model.tensors.values()))):
        assert len(repr(thing)) < 200 + len(model.path)
    assert "0 blockers" in repr(plan.check())


@pytest.mark.parametrize(
    "options",
    [
        {"threads": None},
        {"threads": "2"},
        {"threads": 2.0},
        {"threads": True},
        {"threads": 2**70},
        {"memory": 2**80},
        {"memory": "9" * 400 + "TiB"},
        {"memory": None},
        {"memory": 1e9},
    ],
)
def test_limits_that_are_none(model, options):
    with pytest.raises(BadPlan):
        Plan(model).check(**options)
    with pytest.raises(BadPlan):
        pgs.experts.rank(model, **options)


def test_equal_plans(model):
    assert full_plan(model) == full_plan(model) and hash(full_plan(model)) == hash(full_plan(model))
    assert full_plan(model) != Plan(model) and Plan(model) != 5


def test_what_keep_experts_refuses_at_once(model):
    for keep, mtp in [
        ({}, "keep"),
        ([1, 2], "keep"),
        ({0: 5}, "keep"),
        ({0: ["a"]}, "keep"),
        ({0: [1, 1]}, "keep"),
        ({"0": [1]}, "keep"),
        ({0.5: [1]}, "keep"),
        ({0: [True]}, "keep"),
        (KEEP, "cut"),
    ]:
        with pytest.raises(BadPlan):
            Plan(model).keep_experts(keep, mtp=mtp)


def test_numpy_numbers_are_whole_numbers(model):
    plan = Plan(model).keep_experts({np.int64(1): np.array([3, 1]), 0: range(2)})
    assert plan.data.edits == (KeepExperts({0: (0, 1), 1: (1, 3)}, "given"),)
    assert plan == Plan.from_json(plan.to_json(), model)


def test_what_quantize_refuses_at_once(model):
    for error, type, options in [
        (Unsupported, "NOTHING", {}),
        (FileNotFoundError, "Q8_0", {"imatrix": "file"}),
        (BadPlan, "Q8_0", {"overrides": [("(", "F16")]}),
        (Unsupported, "Q8_0", {"overrides": [("a", "Q9")]}),
    ]:
        with pytest.raises(error):
            Plan(model).quantize(type, **options)
    with pytest.raises(BadPlan):
        Plan(model).quantize("Q8_0").quantize("F16")


def test_a_plan_from_json_quantizes_at_most_once(model):
    data = json.loads(Plan(model).quantize("Q8_0").to_json())
    data["edits"] *= 2
    assert [b.object for b in Plan.from_json(json.dumps(data), model).check().blockers] == ["quantize"]


def test_a_second_cut_counts_in_what_the_first_left(model, tmp_path):
    twice = Plan(model).keep_experts({0: range(8), 1: range(8, 16)}).keep_experts({0: [0, 2, 4, 6], 1: [0, 2, 4, 6]})
    once = Plan(model).keep_experts({0: [0, 2, 4, 6], 1: [8, 10, 12, 14]})
    one, two = once.check(), twice.check()
    assert one.blockers == two.blockers == []
    assert [(t.name, t.shape, t.expression) for t in one.tensors] == [
        (t.name, t.shape, t.expression) for t in two.tensors
    ]


# --- JSON and pickle --------------------------------------------------------------------------------------------------


def test_json_and_pickle_are_lossless(model, tmp_path):
    plan = full_plan(model)
    data = json.loads(plan.to_json())
    assert data["format"] == 1 and data["header_sha256"] == model.header_sha256
    for twin in (
        Plan.from_json(plan.to_json()),
        Plan.from_json(plan.to_json(), model),
        pickle.loads(pickle.dumps(plan)),
        copy.deepcopy(plan),
    ):
        assert twin == plan and twin.to_json() == plan.to_json()
        assert twin.check().to_json(full=True) == plan.check().to_json(full=True)
    plan.write(tmp_path / "a.gguf")
    pickle.loads(pickle.dumps(plan)).write(tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


RAW = st.binary(max_size=8).map(lambda raw: Value.from_raw("str", raw))  # not always UTF-8
KEYS = st.from_regex(r"new\.[a-z0-9_]{1,8}(\.[a-z0-9_]{1,8})?", fullmatch=True)
IDS = st.lists(st.integers(0, 15), min_size=1, unique=True)


@given(
    st.dictionaries(KEYS, st.one_of(values(nan=True, max_size=5), RAW)),
    st.dictionaries(st.integers(0, 5), IDS, min_size=1),
    st.sampled_from(["Q8_0", "MXFP4_MOE", "COPY"]),
    st.lists(st.tuples(st.text("abc.", max_size=5), st.sampled_from(["copy", "Q4_K", "F16"]))),
    st.booleans(),
)
def test_any_plan_survives_json(model, items, keep, type, overrides, pure):
    plan = (
        Plan(model)
        .set_metadata(items)
        .keep_experts(keep, mtp="drop")
        .quantize(type, overrides=overrides, pure=pure, allow_requantize=pure)
    )
    text = plan.to_json()
    twin = Plan.from_json(text, model)
    assert twin == plan and twin.to_json() == text
    json.dumps(plan.check().to_json(), allow_nan=False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 1}',
        '{"format": 1, "source": "x", "header_sha256": "", "edits": [{"edit": "fly"}]}',
        '{"format": 1, "source": "x", "header_sha256": "", "edits": [5]}',
        '{"format": 1, "source": 5, "header_sha256": "", "edits": []}',
        '{"format": 1, "source": "x", "header_sha256": 5, "edits": []}',
        '{"format": 1, "source": "x", "header_sha256": "", "edits": [{"edit": "remove_metadata", "keys": [5]}]}',
        '{"format": 1, "source": "x", "header_sha256": "", "edits": '
        '[{"edit": "set_metadata", "items": [[5, {"type": "u8", "value": 5}]]}]}',
        "[" * 100_000,
    ],
)
def test_text_that_is_no_plan(model, text):
    with pytest.raises(BadPlan):
        Plan.from_json(text, model)


QUANTIZE = {"edit": "quantize", "type": "Q8_0", "pure": False, "overrides": [], "allow_requantize": False}  # of old
USE = {"path": "x", "digest": "", "missing": "default", "include": [], "exclude": []}
SPLIT = {"edit": "split", "max_bytes": None, "max_tensors": 2, "keep": False, "first_empty": False}


def by_hand(model, edit):
    return Plan.from_json(
        json.dumps({"format": 1, "source": model.path, "header_sha256": model.header_sha256, "edits": [edit]}), model
    )


def test_plans_of_the_time_before_imatrix_and_shards_still_load(model):
    assert by_hand(model, QUANTIZE) == Plan(model).quantize("Q8_0")
    assert by_hand(
        model, {"edit": "keep_experts", "kept": {"0": [0, 1], "1": [2, 3]}, "metric": "given", "mtp": "keep"}
    ) == Plan(model).keep_experts({0: [0, 1], 1: [2, 3]})


@pytest.mark.parametrize(
    "edit",
    [
        {**QUANTIZE, "pure": "false"},
        {**QUANTIZE, "allow_requantize": 1},
        {**QUANTIZE, "leave_output": "no"},
        {**QUANTIZE, "output_type": 3},
        {**QUANTIZE, "max_bytes": "1GB"},
        {**QUANTIZE, "max_bytes": 1.5},
        {**QUANTIZE, "overrides": "ab"},
        {**QUANTIZE, "overrides": [["a", None]]},
        {**QUANTIZE, "imatrix": "x"},
        {**QUANTIZE, "imatrix": {**USE, "include": "ffn"}},
        {**SPLIT, "max_tensors": "2"},
        {**SPLIT, "max_bytes": []},
        {**SPLIT, "keep": "no"},
        {"edit": "prune_layers", "layers": [1.5]},
        {"edit": "prune_layers", "layers": "1"},
        {"edit": "keep_experts", "kept": {"0": [True]}, "metric": "", "mtp": "keep"},
        {"edit": "remove_metadata", "keys": "a"},
    ],
)
def test_json_edited_by_hand_into_another_type(model, edit):
    with pytest.raises(BadPlan, match="not a plan"):
        by_hand(model, edit)


@pytest.mark.parametrize(
    "edit",
    [
        {**QUANTIZE, "output_type": "NOTHING"},
        {**QUANTIZE, "token_embedding_type": "copy"},
        {**QUANTIZE, "type": "9" * 5000},
        {**QUANTIZE, "overrides": [["(" * 3000, "Q8_0"]]},
        {**QUANTIZE, "overrides": [["a{99999999999}", "Q8_0"]]},
        {**QUANTIZE, "imatrix": {**USE, "path": "\0"}},
        {**QUANTIZE, "imatrix": {**USE, "path": "\ud800"}},
        {**SPLIT, "max_tensors": 0},
    ],
)
def test_nonsense_of_the_right_type_is_a_blocker(model, edit):
    assert by_hand(model, edit).check().blockers


def test_an_importance_matrix_of_another_model(model, folder):
    path = folder / "other-imatrix.gguf"
    name = "blk.0.attn_q.weight"
    row = model.tensors[name].shape[-1]
    pgs.imatrix.write(path, {"blk.0.ffn_up.7.weight": (np.ones(row), 1)})
    blockers = Plan(model).quantize("Q4_K_M", imatrix=path).check().blockers
    assert [b.problem for b in blockers] == ["the importance matrix of another model"]
    pgs.imatrix.write(path, {"blk.0.ffn_up.7.weight": (np.ones(row), 1), name: (np.ones(row), 1)}, overwrite=True)
    checked = Plan(model).quantize("Q4_K_M", imatrix=path).check()
    assert not checked.blockers
    assert "importance: 1 of 2 entries belong to no tensor of the model (blk.0.ffn_up.7.weight)" in checked.warnings


def test_the_importance_matrix_of_the_parent_after_layers_were_dropped(model, folder):
    cut, path = folder / "one-layer.gguf", folder / "parent-imatrix.gguf"
    Plan(model).prune_layers([0]).write(cut)
    names = [f"blk.{layer}.attn_q.weight" for layer in range(2)]
    row = model.tensors[names[0]].shape[-1]
    pgs.imatrix.write(path, {name: (np.ones(row), 1) for name in names})
    assert not Plan(model).prune_layers([0]).quantize("Q4_K_M", imatrix=path).check().blockers
    with pgs.open(cut) as child:
        (blocker,) = Plan(child).quantize("Q4_K_M", imatrix=path).check().blockers
        assert blocker.object == names[1] and "before its layers were dropped" in blocker.problem
        pgs.imatrix.write(path, {names[0]: (np.ones(row), 1)}, overwrite=True)  # its own
        assert not Plan(child).quantize("Q4_K_M", imatrix=path).check().blockers


def test_a_plan_for_another_file(model, folder):
    other = pgs.open(moe_models.qwen3moe(folder / "other.gguf", experts=8))
    with pytest.raises(SourceChanged):
        Plan.from_json(Plan(model).to_json(), other)


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_fixes_everything_before_a_byte_is_written(model, tmp_path):
    checked = full_plan(model).check()
    assert checked.blockers == []
    full_plan(model).write(tmp_path / "out.gguf")
    with pgs.open(tmp_path / "out.gguf") as out:
        assert out.metadata.exact() == checked.metadata and list(out.metadata) == list(checked.metadata)
        assert (out.file_bytes, out.header_bytes) == (checked.file_bytes, len(checked.files[0].header))
        assert [(t.name, t.shape, t.type, t.offset, t.nbytes) for t in out.tensors.values()] == [
            (t.name, t.shape, t.type, offset, nbytes)
            for t, offset, nbytes in zip(checked.tensors, checked.offsets, checked.nbytes, strict=True)
        ]


def test_the_json_of_a_check(model):
    data = full_plan(model).check().to_json()
    assert set(data) == {
        "tensors",
        "metadata",
        "file_bytes",
        "peak_memory_bytes",
        "blockers",
        "warnings",
        "notes",
        "plan",
    }
    by_name = {t["name"]: t for t in data["tensors"]}
    exps = by_name["blk.0.ffn_up_exps.weight"]
    assert (exps["role"], exps["type"], exps["shape"], exps["action"]) == ("expert", "MXFP4", [4, 32, 32], "encode")
    assert exps["nbytes"] == 4 * 32 * 17
    router = by_name["blk.0.ffn_gate_inp.weight"]
    assert router["action"] == "take"
    assert router["expression"] == {"expression": "take", "ref": router["name"], "indices": list(KEEP[0])}
    assert by_name["blk.0.attn_q.weight"]["action"] == "copy"
    assert data["metadata"]["qwen3moe.expert_count"] == 4
    assert Plan.from_json(json.dumps(data["plan"]), model) == full_plan(model)


def test_long_arrays_are_abbreviated_unless_full(folder):
    tokens = [f"t{i}" for i in range(33)]
    path = make_gguf(
        folder / "long.gguf",
        "test",
        {"tokenizer.ggml.tokens": (tokens, T.ARRAY, T.STRING), "test.nan": (float("nan"), T.FLOAT32)},
        {},
    )
    checked = Plan(pgs.open(path)).set_metadata({"test.x": list(range(40))}).check()
    short, full = checked.to_json(), checked.to_json(full=True)
    assert short["metadata"]["tokenizer.ggml.tokens"] == {"type": "str[]", "length": 33, "head": tokens[:32]}
    assert full["metadata"]["tokenizer.ggml.tokens"] == tokens
    assert short["plan"]["edits"][0]["items"][0][1]["value"]["length"] == 40
    assert full["plan"]["edits"][0]["items"][0][1]["value"] == list(range(40))
    assert short["metadata"]["test.nan"] == "nan"


def test_the_summary_says_what_matters(model):
    checked = full_plan(model).check()
    text = checked.summary()
    bits = 8 * sum(checked.nbytes) / checked.elements
    for part in (
        "qwen3moe",
        "experts: 16 -> 4",
        f"{bits:.3f} bits per weight",
        "peak memory",
        "expert",
        "router",
        "MXFP4 x6",
        "override attn=copy: 14 tensors",
    ):
        assert part in text, part
    assert "cannot be written" not in text
    refused = Plan(model).quantize("Q8_0", overrides=[("nothing", "F16")]).check()
    assert "cannot be written" in refused.summary() and "nothing" in refused.summary()


def test_every_blocker_is_listed_and_the_first_is_raised(model, tmp_path):
    plan = Plan(model).quantize("NVFP4", pure=True, overrides=[("nothing", "F16"), ("never", "F16")])
    blockers = plan.check().blockers
    assert len(blockers) > 3 and all(isinstance(b, pgs.SurgeryError) for b in blockers)
    data = plan.check().to_json()
    assert [b["message"] for b in data["blockers"]] == [str(b) for b in blockers]
    with pytest.raises(type(blockers[0])) as e:
        plan.write(tmp_path / "out.gguf")
    assert (e.value.problem, e.value.object) == (blockers[0].problem, blockers[0].object)
    assert f"{len(blockers) - 1} more" in e.value.hint
    assert not list(tmp_path.iterdir())
    assert str(blockers[0]) == data["blockers"][0]["message"]  # raising it changed nothing


def blockers(path, edit=lambda plan: plan):
    return edit(Plan(pgs.open(path))).check().blockers


def test_a_name_that_llama_cpp_cannot_load(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(
        hand_made([kv("general.architecture", "str", "test")], [info("n" * 64), info("m" * 64, offset=128)], bytes(256))
    )
    assert [b.found for b in blockers(path)] == ["64 bytes"] * 2


def test_a_type_that_ggml_cannot_decode(tmp_path):
    path = make_gguf(tmp_path / "m.gguf", "test", {}, {"ids.weight": np.zeros((4, 32), np.int32)})
    found = blockers(path, lambda plan: plan.quantize("Q8_0"))
    assert [(type(b), b.object, b.found) for b in found] == [(Unsupported, "ids.weight", "I32")]
    assert blockers(path, lambda plan: plan.quantize("Q8_0", overrides=[("ids", "copy")])) == []
    assert blockers(path) == []


def test_more_experts_used_than_there_are(model, tmp_path):
    used = "qwen3moe.expert_used_count"
    found = Plan(model).set_metadata({used: 17}).check().blockers
    assert [(b.object, b.found) for b in found] == [(used, 17)]
    assert Plan(model).set_metadata({used: 16}).check().blockers == []
    # The architecture's own keys count before the cut, in whatever order the edits came.
    two = {0: [0, 1], 1: [0, 1]}
    assert Plan(model).keep_experts(two).check().blockers != []
    assert Plan(model).keep_experts(two).set_metadata({used: 2}).check().blockers == []


@pytest.mark.parametrize(
    "items, object",
    [
        ({"expert_group_count": 5}, "expert_group_count"),
        ({"expert_group_count": 16}, "expert_group_count"),
        ({"expert_group_used_count": 4}, "expert_group_used_count"),
        ({"expert_group_used_count": 0}, "expert_group_used_count"),
        ({"expert_used_count": 9}, "expert_group_used_count"),
        ({"expert_used_count": 0}, "expert_used_count"),
        ({"nextn_predict_layers": 4}, "nextn_predict_layers"),
        (None, "expert_used_count"),
    ],
)
def test_numbers_that_llama_cpp_could_not_load(tmp_path, items, object):
    with pgs.open(moe_models.deepseek2(tmp_path / "m.gguf", experts=16, groups=4, group_used=2)) as model:
        plan = Plan(model)
        if items is None:
            plan = plan.remove_metadata("deepseek2.expert_used_count")
        else:
            plan = plan.set_metadata({f"deepseek2.{key}": value for key, value in items.items()})
        assert plan.check().blockers[0].object == f"deepseek2.{object}"
        good = {"expert_group_count": 2, "expert_group_used_count": 1, "expert_used_count": 8}
        assert Plan(model).set_metadata({f"deepseek2.{k}": v for k, v in good.items()}).check().blockers == []


def test_the_caller_has_the_last_word_on_other_keys(model):
    checked = Plan(model).set_metadata({"general.size_label": "mine", "pgs.note": "x"}).keep_experts(KEEP).check()
    assert checked.metadata["general.size_label"] == Value("mine", "str")
    assert checked.metadata["qwen3moe.expert_count"] == Value(4, "u32")


def test_an_expression_of_the_wrong_size_is_never_written(model):
    checked = Plan(model).check()
    name = "blk.0.ffn_up_exps.weight"
    at = [t.name for t in checked.tensors].index(name)
    for shape, expression in [
        ((3, 32, 32), Take(name, (0, 1))),
        ((4, 32, 32), Copy(name)),
        ((1, 32, 32), Take(name, (16,))),
    ]:
        checked.tensors[at] = OutputTensor(name, shape, "F16", "F16", expression)
        with pytest.raises(BadPlan) as e:
            build_jobs(model, checked, Companions())
        assert e.value.object == name


def test_neighbouring_experts_are_one_run(model):
    tensor = OutputTensor("x", (6, 32, 32), "F16", "F16", Take("blk.0.ffn_up_exps.weight", (0, 1, 2, 5, 8, 9)))
    ref = model.tensors["blk.0.ffn_up_exps.weight"]
    assert [(run.source, run.offset, run.nbytes) for run in lower(tensor, Inputs(model)).runs] == [
        (0, ref.offset + i * 2048, n * 2048) for i, n in ((0, 3), (5, 1), (8, 2))
    ]


@pytest.mark.parametrize(
    "text, nbytes",
    [
        ("512MiB", 2**29),
        ("2GB", 2 * 10**9),
        (2**27, 2**27),
        ("134217728", 2**27),
        ("1.5GiB", 3 * 2**29),
        ("64 mib", 2**26),
        ("100000kB", 10**8),
        ("1TiB", 2**40),
        ("70000000B", 7 * 10**7),
    ],
)
def test_sizes(text, nbytes):
    assert parse_memory(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "MiB", "12M", "-5", "1e9", "0x10", "1 2", "12MiBs", None, 1.5, True, "63MiB", 0, -1]
)
def test_sizes_that_are_refused(model, text):
    with pytest.raises(BadPlan):
        Plan(model).check(memory=text)


@pytest.mark.parametrize("memory", ["64MiB", "512MiB"])
@pytest.mark.parametrize("threads", [1, 16])
def test_the_stated_peak_is_within_the_promise(model, memory, threads):
    checked = full_plan(model).check(memory=memory, threads=threads)
    assert 0 < checked.peak_memory_bytes <= units.parse_size(memory) + (64 << 20)


# --- law 2: the engine is what a slow oracle makes ------------------------------------------------------------------

TARGETS = [
    ("MXFP4_MOE", False),
    ("Q8_0", False),
    ("F16", False),
    ("BF16", False),
    ("F32", False),
    ("COPY", False),
    ("Q4_K", True),
    ("Q4_0", True),
    ("Q6_K", True),
    ("IQ4_NL", True),
    ("TQ2_0", True),
    ("Q2_0", True),
]


def decoded(data, type):
    return data if type == "F32" else pgs.dequantize(data.view(np.uint8), type)


@given(small_models(), st.sampled_from(TARGETS), st.data())
def test_law_2_the_engine_equals_a_slow_oracle(folder, small, target, data):
    tensors, experts, layers = small
    n = data.draw(st.integers(1, experts))
    keep = {i: sorted(data.draw(st.permutations(range(experts)))[:n]) for i in range(layers)}
    path, out = folder / "law2.gguf", folder / "law2-out.gguf"
    make_gguf(
        path,
        "gpt-oss",
        {
            "gpt-oss.expert_count": (experts, T.UINT32),
            "gpt-oss.expert_used_count": (1, T.UINT32),
            "gpt-oss.block_count": (layers, T.UINT32),
        },
        tensors,
    )
    with pgs.open(path) as model:
        plan = Plan(model).keep_experts(keep).quantize(target[0], pure=target[1], allow_requantize=True)
        types = {t.name: t.type for t in plan.check().tensors}
        plan.write(out, overwrite=True, threads=data.draw(st.integers(1, 3)))
    _, before = read_gguf(path)
    with pgs.open(out) as result:
        assert {t.name: t.type for t in result.tensors.values()} == types
        for name, (type, array) in before.items():
            if "exps" in name or "ffn_gate_inp" in name:
                array = array[keep[int(name.split(".")[1])]]
            expected = array if types[name] == type else pgs.quantize(decoded(array, type), types[name])
            assert result.tensors[name].bytes().tobytes() == np.ascontiguousarray(expected).tobytes(), name
            assert result.tensors[name].shape[0] == len(array)


@pytest.mark.parametrize("key, value", [("qwen3moe.embedding_length", 64), ("tokenizer.ggml.tokens", ["a", "b"])])
def test_keys_that_no_longer_fit_the_embedding_are_blockers(tmp_path, key, value):
    with pgs.open(moe_models.qwen3moe(tmp_path / "in.gguf")) as model:
        rows, length = model.tensors["token_embd.weight"].shape
        fitting = {"qwen3moe.embedding_length": length, "tokenizer.ggml.tokens": [str(i) for i in range(rows)]}
        assert not Plan(model).set_metadata(fitting).check().blockers
        [blocker] = Plan(model).set_metadata({key: value}).check().blockers
        assert blocker.object == key and "token_embd.weight" in str(blocker)
