"""Cutting experts: what is written equals numpy slices of what gguf-py reads, and everything else stays as it was."""

from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pygguf_surgery as pgs
from pygguf_surgery import Value
from pygguf_surgery.architecture import experts as roles
from pygguf_surgery.architecture.names import role_of
from pygguf_surgery.edits import keep_experts as prune
from pygguf_surgery.plan_data.edits import KeepExperts
from pygguf_surgery.plan_data.expressions import Copy, OutputTensor, Remap, Stack, Take
from support import moe_models
from support.cuts import apply, block, cut, remap, same_tensors, tensor, the_blocker
from support.drafts import apply_edit
from support.gguf_files import read_gguf


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: build(folder / f"{name}.gguf") for name, build in moe_models.ALL.items()}


def choose(model, seed, n=None):
    """Random experts per layer that the architecture allows: half of them."""
    rng = np.random.default_rng(seed)
    layout = roles.layout(model.architecture, model.tensors, model.metadata.get)
    e, groups, chunk = layout.experts, max(layout.groups, 1), layout.chunk
    n = n or e // 2
    kept = {}
    for layer in layout.layers:
        if chunk > 1:
            first = rng.permutation(e // chunk)[: n // chunk] * chunk
            ids = [c + i for c in first for i in range(chunk)]
        else:
            size = e // groups
            ids = [g * size + i for g in range(groups) for i in rng.permutation(size)[: n // groups]]
        kept[layer] = tuple(sorted(int(i) for i in ids))
    return kept


@pytest.mark.parametrize("name", moe_models.ALL)
def test_every_architecture(files, tmp_path, name):
    before, tensors = read_gguf(files[name])
    with pgs.open(files[name]) as model:
        kept = choose(model, seed=3)
        experts, architecture = model.get("expert_count"), model.architecture
        receipt = pgs.Plan(model).keep_experts(kept).write(tmp_path / "out.gguf")
        digest = model.header_sha256
    assert receipt.path
    after, found = read_gguf(tmp_path / "out.gguf")
    same_tensors(
        found,
        {
            n: (kind, cut(n, data, kept, chunk=before.get("grovemoe.experts_per_group", 1)))
            for n, (kind, data) in tensors.items()
        },
    )
    assert after == before | {
        f"{architecture}.expert_count": experts // 2,
        "general.size_label": f"{experts // 2}x1.5M",
        "general.base_model.count": 1,
        "general.base_model.0.name": f"Tiny {architecture}",
        "pgs.version": pgs.__version__,
        "pgs.source.header_sha256": digest,
        "pgs.source.name": f"Tiny {architecture}",
        "pgs.source.experts": experts,
        "pgs.experts.metric": "given",
        **{f"pgs.experts.{layer}.kept": list(ids) for layer, ids in kept.items()},
    }


@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_0", "MXFP4"])
def test_slices_of_any_type_are_copied(tmp_path, kind):
    path = moe_models.qwen3moe(tmp_path / "in.gguf", type=kind)
    _, tensors = read_gguf(path)
    with pgs.open(path) as model:
        kept = choose(model, seed=4)
        pgs.Plan(model).keep_experts(kept).write(tmp_path / "out.gguf")
    _, found = read_gguf(tmp_path / "out.gguf")
    same_tensors(found, {n: (k, cut(n, data, kept)) for n, (k, data) in tensors.items()})


def test_tables_of_expert_ids_use_the_best_of_the_kept(files, tmp_path):
    _, tensors = read_gguf(files["deepseek4"])
    scores = {"0": [(7 * e) % 16 for e in range(16)], "1": list(range(16))}
    with pgs.open(files["deepseek4"]) as model:
        keep = pgs.experts.rank(model, by={"scores": scores}).keep(6)
        plan = pgs.Plan(model).keep_experts(keep)
        plan.write(tmp_path / "out.gguf")
        pgs.Plan.from_json(plan.to_json()).write(tmp_path / "again.gguf")
    best_first = sorted(keep[0], key=lambda e: -scores["0"][e])
    _, found = read_gguf(tmp_path / "out.gguf")
    name = "blk.0.ffn_gate_tid2eid.weight"
    table = found[name][1]
    assert table.tobytes() == remap(tensors[name][1], keep[0], best_first).tobytes()
    assert table.min() >= 0 and table.max() < 6 and all(len(set(row)) == len(row) for row in table.tolist())
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()


def test_a_table_may_use_every_expert_that_is_kept(tmp_path):
    path = moe_models.deepseek4(tmp_path / "in.gguf", experts=8, used=4)
    with pgs.open(path) as model:
        kept = {0: (1, 3, 5, 7), 1: (0, 1, 2, 3)}
        pgs.Plan(model).keep_experts(kept).write(tmp_path / "out.gguf")
    table = read_gguf(tmp_path / "out.gguf")[1]["blk.0.ffn_gate_tid2eid.weight"][1]
    assert np.array_equal(np.sort(table, axis=1), np.tile(np.arange(4), (len(table), 1)))


def test_all_experts_kept_is_no_change(files, tmp_path):
    for name in moe_models.ALL:
        with pgs.open(files[name]) as model:
            layout = roles.layout(model.architecture, model.tensors, model.metadata.get)
            plan = pgs.Plan(model)
            plan.write(tmp_path / "untouched.gguf", overwrite=True)
            plan.keep_experts({layer: range(layout.experts) for layer in layout.layers}).write(
                tmp_path / "all.gguf", overwrite=True
            )
        assert (tmp_path / "all.gguf").read_bytes() == (tmp_path / "untouched.gguf").read_bytes()


# --- laws -----------------------------------------------------------------------------------------------------------


def evaluate(model, outcome):
    """The output tensors, by numpy from the source's bytes."""
    arrays = {}
    for t in outcome.tensors:
        match t.expression:
            case Copy(ref):
                data = model.tensors[ref].bytes()
            case Take(ref, indices):
                data = model.tensors[ref].bytes().reshape(model.tensors[ref].shape[0], -1)[list(indices)]
            case Remap(ref, table, substitutes):
                ids = model.tensors[ref].bytes().view(np.int32).reshape(model.tensors[ref].shape)
                data = ids.copy()
                for row in data:
                    row[:] = [-1 if table[i] is None else table[i] for i in row]
                    for k in np.flatnonzero(row < 0):
                        row[k] = next(s for s in substitutes if s not in row)
            case other:
                raise AssertionError(other)
        arrays[t.name] = (t.type, t.shape, data.tobytes())
    return arrays


def start(model):
    return (
        [OutputTensor(t.name, t.shape, t.type, t.type, Copy(t.name), role_of(t.name)) for t in model.tensors.values()],
        model.metadata.exact(),
    )


def keep(kept, metric="m", **options):
    return KeepExperts({k: tuple(v) for k, v in kept.items()}, metric, **options)


@pytest.fixture(scope="module", params=["qwen3next", "deepseek2", "gpt_oss", "grovemoe", "deepseek4"])
def model(request, files):
    with pgs.open(files[request.param]) as model:
        yield model


@given(st.integers(0, 2**32))
def test_two_cuts_are_one(model, seed):
    tensors, metadata = start(model)
    e = model.get("expert_count")
    first = choose(model, seed, e * 3 // 4 if e * 3 // 4 % 8 == 0 else e // 2 + e // 4)
    once = apply_edit(prune, model, tensors, metadata, keep(first))
    assert once.blockers == []
    inner = {layer: choose_from(model, ids, seed + 1, e // 2) for layer, ids in first.items()}
    twice = apply_edit(prune, model, once.tensors, once.metadata, keep(inner))
    direct = apply_edit(prune, model, tensors, metadata, keep({k: [first[k][i] for i in inner[k]] for k in first}))
    assert twice.blockers == direct.blockers == []
    # A table of ids may have lost the same expert in one step or in two: the substitute is the same.
    assert evaluate(model, twice) == evaluate(model, direct)
    assert twice.metadata == direct.metadata


def choose_from(model, ids, seed, n):
    layout = roles.layout(model.architecture, model.tensors, model.metadata.get)
    rng = np.random.default_rng(seed)
    groups, chunk = max(layout.groups, 1), layout.chunk
    size = len(ids) // groups
    if chunk > 1:
        return sorted(
            int(c) * chunk + i for c in rng.permutation(len(ids) // chunk)[: n // chunk] for i in range(chunk)
        )
    return sorted(g * size + int(i) for g in range(groups) for i in rng.permutation(size)[: n // groups])


@given(st.integers(0, 2**32))
def test_apply_changes_nothing_in_place_and_touches_only_experts(model, seed):
    tensors, metadata = start(model)
    copies = start(model)
    kept = choose(model, seed)
    out = apply_edit(prune, model, tensors, metadata, keep(kept))
    assert (tensors, metadata) == copies and out.blockers == []
    for old, new in zip(tensors, out.tensors, strict=True):
        assert (new.name, new.type, new.source_type, new.role) == (old.name, old.type, old.source_type, old.role)
        assert new == old or role_of(new.name) in ("router", "expert")
        assert new.shape == old.shape or new.shape[1:] == old.shape[1:]


def test_a_stack_of_experts_is_cut_by_its_parts():
    stacked = OutputTensor("blk.0.ffn_down_exps.weight", (4, 2, 32), "F32", "F32", Stack(("a", "b", "c", "d")))
    out = apply([stacked, tensor("blk.0.ffn_gate_inp.weight", 4, 8)], {0: [1, 3]})
    assert out.tensors[0].expression == Stack(("b", "d")) and out.tensors[0].shape == (2, 2, 32)


# --- what cannot be: one stub model per case, no files --------------------------------------------------------------


def test_out_of_range():
    error = the_blocker(apply(block(3, 512), {3: (0, 512)}, experts=512, blocks=4))
    assert str(error) == "blk.3.ffn_down_exps.weight: expert 512 out of range (the tensor has 512: 0..511)"
    assert isinstance(error, pgs.BadPlan)


@pytest.mark.parametrize(
    "ids, words",
    [
        ((0, -1), "expert -1 out of range"),
        ((1, 1), "expert 1 named twice"),
        ((2, 1), "ascending"),
        ((), "no expert"),
        ((0, 1.5), "whole number"),
        ("ab", "whole number"),
    ],
)
def test_ids_that_are_wrong(ids, words):
    out = apply(block(0, 4), {0: ids})
    error = the_blocker(out)
    assert words in str(error) and error.object == "blk.0.ffn_down_exps.weight"
    assert [t.shape for t in out.tensors] == [(4, 8), (4, 8, 32)], "a plan with blockers can still be described"


def test_layers_that_do_not_match():
    error = the_blocker(apply([*block(1, 4), tensor("blk.0.ffn_down.weight", 8, 8)], {0: (0, 1), 1: (0, 1)}, blocks=2))
    assert error.object == "blk.0" and "layers with experts: 1" in str(error)
    error = the_blocker(apply(block(0, 4) + block(1, 4), {0: (0, 1)}, blocks=2))
    assert error.object == "blk.1" and "no experts named" in str(error)


def test_a_dense_model():
    assert "no experts" in str(the_blocker(apply([tensor("blk.0.ffn_down.weight", 8, 8)], {0: (0,)})))


def test_different_numbers_per_layer_are_refused_with_the_reason():
    out = apply(block(0, 4) + block(1, 4) + block(2, 4), {0: (0, 1), 1: (0, 1, 2), 2: (1, 2)}, blocks=3)
    error = the_blocker(out)
    assert isinstance(error, pgs.Unsupported)
    assert error.found == "2 in 0, 2, 3 in 1" and "one expert_count" in error.hint


def test_never_fewer_than_are_used():
    error = the_blocker(apply(block(0, 4), {0: (0, 1)}, used=3))
    assert error.object == "x.expert_used_count" and "at least 3" in error.hint
    assert apply(block(0, 4), {0: (0, 1, 3)}, used=3).metadata["x.expert_used_count"] == Value(3, "u32")


def test_used_per_layer():
    names = [*block(1, 4), tensor("blk.0.ffn_down.weight", 8, 8)]
    assert apply(names, {1: (0, 1)}, used=[0, 2], blocks=2).blockers == []
    assert "3 used" in str(the_blocker(apply(names, {1: (0, 1)}, used=[0, 3], blocks=2)))


@pytest.mark.parametrize("used", [None, 0, Value("2", "str"), []])
def test_metadata_that_llama_cpp_could_not_load(used):
    error = the_blocker(apply(block(0, 4), {0: (0, 1)}, used=used))
    assert isinstance(error, pgs.BadFile) and error.object == "x.expert_used_count"


def test_more_experts_than_llama_cpp_loads():
    assert apply(block(0, 1500), {0: tuple(range(1024))}, experts=1500).blockers == []
    error = the_blocker(apply(block(0, 1500), {0: tuple(range(1025))}, experts=1500))
    assert error.found == 1025 and "1024" in error.expected


@pytest.mark.parametrize(
    "n, fast",
    [
        (512, True),
        (64, True),
        (288, True),
        (576, True),
        (1, True),
        (384, False),
        (192, False),
        (96, False),
        (600, False),
        (1000, False),
    ],
)
def test_the_fused_router_of_cuda_is_not_lost_silently(n, fast):
    out = apply(block(0, 1024), {0: tuple(range(n))}, experts=1024, used=1)
    assert out.blockers == [] and any("CUDA" in text for text in out.warnings) is not fast


# Groups of a deepseek2-like router: 16 experts in 4 groups, 2 groups are used, 4 experts.
def grouped(ids, *, groups=4, group_used=2, used=4):
    return apply(
        block(0, 16),
        {0: tuple(ids)},
        experts=16,
        used=used,
        expert_group_count=groups,
        expert_group_used_count=group_used,
    )


def test_groups_that_stay_right():
    assert grouped([0, 1, 4, 7, 8, 11, 14, 15]).blockers == []
    assert grouped(range(1, 16, 2), groups=1, group_used=1).blockers == []
    assert grouped(range(1, 16, 2), groups=0, group_used=0).blockers == []


@pytest.mark.parametrize(
    "ids, options, words",
    [
        (range(10), {}, "10 experts do not divide into 4 groups; keep 8 or 12"),
        ([0, 4, 8, 12], {"used": 2}, "1 expert per group"),
        (range(8), {}, "4 experts kept in group 0 (ids 0..3) (expected 2)"),
        ([0, 1, 4, 5, 8, 9, 12, 13], {"used": 5}, "2 groups of 2 experts are fewer than the 5 used"),
        ([3], {"groups": 1, "group_used": 1, "used": 1}, "as many groups as experts"),
    ],
)
def test_groups_that_would_be_wrong(ids, options, words):
    assert words in str(the_blocker(grouped(ids, **options)))


@pytest.mark.parametrize("group_used", [None, 0, 4])
def test_groups_that_llama_cpp_could_not_load(group_used):
    error = the_blocker(grouped(range(1, 16, 2), group_used=group_used))
    assert error.object == "x.expert_group_used_count"


def test_experts_of_one_chunk_stay_together():
    names = [*block(0, 8), tensor("blk.0.ffn_up_chexps.weight", 4, 8, 32)]
    out = apply(names, {0: (2, 3, 6, 7)}, experts=8, experts_per_group=2)
    assert out.blockers == [] and out.tensors[2].expression == Take("blk.0.ffn_up_chexps.weight", (1, 3))
    error = the_blocker(apply(names, {0: (2, 3, 5, 6)}, experts=8, experts_per_group=2))
    assert error.object == "blk.0.ffn_down_chexps.weight" and "experts 4..5" in str(error)


@pytest.mark.parametrize(
    "extra, kind",
    [
        (tensor("blk.0.ffn_new.weight", 4, 8), pgs.Unsupported),
        (tensor("blk.0.exp_new.bias", 4), pgs.Unsupported),
        (tensor("blk.0.ffn_up_exps.weight", 5, 8, 32), pgs.BadFile),
        (tensor("blk.0.ffn_down.3.weight", 8, 32), pgs.Unsupported),
        (tensor("blk.1.ffn_up_exps.weight", 4, 8, 32), pgs.BadFile),
    ],
)
def test_tensors_that_no_rule_covers(extra, kind):
    error = the_blocker(apply([*block(0, 4), extra], {0: (0, 1)}, blocks=2))
    assert type(error) is kind and error.object == extra.name


def test_a_table_of_ids_is_integers():
    names = [*block(0, 4), tensor("blk.0.ffn_gate_tid2eid.weight", 9, 2)]
    assert the_blocker(apply(names, {0: (0, 1)})).object == "blk.0.ffn_gate_tid2eid.weight"


def test_an_expert_is_whole_blocks():
    names = [*block(0, 32), tensor("blk.0.exp_probs_b.bias", 32, type="Q8_0")]
    assert the_blocker(apply(names, {0: (0, 1)}, experts=32)).object == "blk.0.exp_probs_b.bias"


# --- metadata -------------------------------------------------------------------------------------------------------


def general(**items):
    out = apply(block(0, 4), {0: (0, 2)}, general={k.replace("__", "."): v for k, v in items.items()})
    return {k.removeprefix("general."): v.value for k, v in out.metadata.items() if k.startswith("general.")}


@pytest.mark.parametrize(
    "before, after",
    [("4x2.5B", "2x2.5B"), ("14x2.5B", None), ("80B-A3B", None), ("4", None), ("4x", None), ("40x1B", None)],
)
def test_size_label(before, after):
    assert general(size_label=before).get("size_label") == after
    dropped = apply(block(0, 4), {0: (0, 2)}, general={"size_label": before}).warnings
    assert any("size_label" in text for text in dropped) is (after is None)


def test_ids_of_the_original_go_and_it_becomes_a_base_model():
    assert general(
        name="A",
        organization="Org",
        uuid="u",
        doi="d",
        url="http",
        author="",
        source__uuid="s",
        source__doi="t",
        source__url="kept",
        tags="kept",
        basename="kept",
    ) == {
        "name": "A",
        "organization": "Org",
        "url": "http",
        "author": "",
        "source.url": "kept",
        "tags": "kept",
        "basename": "kept",
        "base_model.count": 1,
        "base_model.0.name": "A",
        "base_model.0.organization": "Org",
        "base_model.0.url": "http",
        "base_model.0.doi": "d",
        "base_model.0.uuid": "u",
    }


def test_keys_that_a_cut_drops_may_be_removed_and_set(tmp_path):
    string = gguf.GGUFValueType.STRING
    path = moe_models.qwen3next(
        tmp_path / "m.gguf", **{"general.uuid": ("old", string), "general.size_label": ("80B-A3B", string)}
    )
    with pgs.open(path) as model:
        plan = pgs.Plan(model).keep_experts(pgs.experts.rank(model).keep(16))
        both = ("general.uuid", "general.size_label")
        checked = plan.remove_metadata(*both).check()
        assert checked.blockers == [] and not any(key in checked.metadata for key in both)
        checked = plan.remove_metadata(*both).set_metadata({"general.uuid": "new"}).check()
        assert checked.blockers == [] and checked.metadata["general.uuid"] == Value("new", "str")


def test_base_models_of_the_original_stay():
    items = general(name="A", base_model__count=Value(2, "u64"), base_model__0__name="P", base_model__1__name="Q")
    assert items == {
        "name": "A",
        "base_model.count": 3,
        "base_model.0.name": "P",
        "base_model.1.name": "Q",
        "base_model.2.name": "A",
    }
    assert general(name="A", base_model__0__name="P")["base_model.1.name"] == "A"


def test_a_count_of_base_models_that_is_none():
    out = apply(block(0, 4), {0: (0, 2)}, general={"name": "A", "base_model.count": "two"})
    assert the_blocker(out).object == "general.base_model.count"


def test_a_model_without_a_name_gets_no_base_model():
    assert general() == {}


def test_counts_keep_their_type():
    out = apply(block(0, 4), {0: (0, 2)}, experts=Value(4, "u16"))
    assert out.metadata["x.expert_count"] == Value(2, "u16")


def test_provenance_of_an_earlier_cut_is_replaced():
    source = {
        "pgs.version": "0",
        "pgs.source.header_sha256": "f" * 64,
        "pgs.source.name": "older",
        "pgs.experts.metric": "older",
    }
    values = {k: Value(v, "str") for k, v in source.items()} | {"pgs.experts.7.kept": Value([1], "u32[]")}
    metadata = {
        "x.expert_count": Value(4, "u32"),
        "x.expert_used_count": Value(2, "u32"),
        "x.block_count": Value(1, "u32"),
    } | values
    model = SimpleNamespace(architecture="x", metadata={}, name="", header_sha256="0" * 64)
    out = apply_edit(prune, model, block(0, 4), metadata, KeepExperts({0: (1, 3)}, "aimer"))
    assert {k: v.value for k, v in out.metadata.items() if k.startswith("pgs.")} == {
        "pgs.version": pgs.__version__,
        "pgs.source.header_sha256": "0" * 64,
        "pgs.source.name": "",
        "pgs.experts.metric": "aimer",
        "pgs.experts.0.kept": [1, 3],
        # What it says of the origin goes on; it does not say how many experts that had.
        "pgs.origin.header_sha256": "f" * 64,
        "pgs.experts.0.origin": [1, 3],
    }


def test_two_cuts_in_one_plan_say_what_they_kept_of_the_source(files):
    with pgs.open(files["qwen3moe"]) as model:
        tensors, metadata = start(model)
        once = apply_edit(prune, model, tensors, metadata, keep({0: range(2, 14), 1: range(12)}, "router-norm"))
        twice = apply_edit(prune, model, once.tensors, once.metadata, keep({0: range(0, 8), 1: range(4, 12)}, "aimer"))
    found = {k: v.value for k, v in twice.metadata.items()}
    assert found["pgs.experts.0.kept"] == list(range(2, 10)) and found["pgs.experts.1.kept"] == list(range(4, 12))
    assert found["pgs.experts.metric"] == "router-norm, aimer" and found["general.base_model.count"] == 1


def test_the_same_input_gives_the_same_bytes(files, tmp_path):
    for out in ("a.gguf", "b.gguf"):
        with pgs.open(files["qwen3next"]) as model:
            pgs.Plan(model).keep_experts(pgs.experts.rank(model, by="aimer").keep(16)).write(tmp_path / out, threads=1)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert gguf.GGUFReader(tmp_path / "a.gguf").get_field("pgs.experts.metric").contents() == "aimer"


@pytest.mark.parity
@pytest.mark.parametrize("name", [*moe_models.LOADABLE, "mtp", "mtp dropped"])
def test_llama_cpp_loads_the_result(tmp_path, name):
    llama = pytest.importorskip("llama_cpp").llama_cpp
    source, out = tmp_path / "in.gguf", tmp_path / "out.gguf"
    moe_models.qwen3next(source, mtp=True) if "mtp" in name else moe_models.ALL[name](source)
    with pgs.open(source) as model:
        kept = pgs.experts.rank(model).keep(ratio=0.5)
        pgs.Plan(model).keep_experts(kept, mtp="drop" if "dropped" in name else "keep").write(out)
    llama.llama_backend_init()
    for path in (source, out):
        loaded = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        assert loaded, path
        llama.llama_model_free(loaded)
