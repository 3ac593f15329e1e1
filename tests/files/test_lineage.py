"""The keys `pgs.*` of models: what is written is read again, what somebody changed is no trap."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pygguf_surgery import BadFile, BadPlan, Value
from pygguf_surgery.files.lineage import (
    Lineage,
    record_cut,
    record_layers,
    record_merge,
    source_experts,
    without_layers,
)
from pygguf_surgery.plan_data.subject import DROPPED, Descent

NUMBERS = st.integers(0, 40)
LAYERS = st.integers(0, 6)


def by_layer(values):
    return st.dictionaries(LAYERS, values, max_size=4)


ORIGINS = st.builds(
    Descent,
    header_sha256=st.text(max_size=5),
    experts=st.none() | st.integers(1, 1024),
    layers=st.none() | st.lists(NUMBERS, max_size=4).map(tuple),
    kept=by_layer(st.lists(NUMBERS, max_size=4).map(tuple)),
    merged=by_layer(st.lists(NUMBERS | st.just(DROPPED), max_size=4).map(tuple)),
)
LINEAGES = st.builds(
    Lineage,
    version=st.none() | st.text(max_size=5),
    source_sha256=st.none() | st.text(max_size=5),
    source_name=st.none() | st.text(max_size=5),
    source_experts=st.none() | st.integers(1, 1024),
    layers=st.none() | st.lists(NUMBERS, max_size=4).map(tuple),
    metric=st.none() | st.text(max_size=5),
    kept=by_layer(st.lists(NUMBERS, max_size=4).map(tuple)),
    padded=by_layer(st.integers(1, 1024)),
    merged=by_layer(st.lists(NUMBERS | st.just(DROPPED), max_size=4).map(tuple)),
    scores=by_layer(st.lists(st.floats(allow_nan=False), max_size=4).map(tuple)),
    repaired=st.frozensets(LAYERS),
    origin=st.none() | ORIGINS,
)


@given(LINEAGES)
def test_what_is_written_is_read_again(lineage):
    metadata = {"general.name": Value("x", "str")}
    lineage.write(metadata)
    assert Lineage.of(metadata) == Lineage.of(metadata, strict=True) == lineage
    before = list(metadata.items())
    lineage.write(metadata)
    assert list(metadata.items()) == before  # every key in its place


@given(
    LINEAGES,
    st.dictionaries(
        st.sampled_from(
            [
                "pgs.version",
                "pgs.source.header_sha256",
                "pgs.layers.kept",
                "pgs.experts.metric",
                "pgs.experts.1.kept",
                "pgs.experts.1.padded",
                "pgs.experts.1.merged",
                "pgs.experts.1.scores",
                "pgs.experts.1.repaired",
                "pgs.experts.1.other",
                "pgs.experts.1.origin",
                "pgs.experts.1.origin_merged",
                "pgs.source.experts",
                "pgs.origin.header_sha256",
                "pgs.origin.experts",
                "pgs.origin.layers",
                "pgs.experts.x.kept",
                "pgs.experts." + "9" * 5000 + ".kept",
            ]
        ),
        st.sampled_from(
            [
                Value("abc", "str"),
                Value(0, "u32"),
                Value(1 << 40, "u64"),
                Value([0.5], "f32[]"),
                Value([True], "bool[]"),
                Value(["a"], "str[]"),
                Value(-1, "i32"),
                Value(True, "bool"),
            ]
        ),
    ),
)
def test_keys_that_somebody_changed_are_as_good_as_missing(lineage, changed):
    metadata = {}
    lineage.write(metadata)
    metadata |= changed
    found = Lineage.of(metadata)
    for word, values in (
        ("kept", found.kept),
        ("merged", found.merged),
        ("padded", found.padded),
        ("scores", found.scores),
    ):
        assert (1 in values) == (f"pgs.experts.1.{word}" in metadata and f"pgs.experts.1.{word}" not in changed)
    assert all(isinstance(i, int) for ids in (*found.kept.values(), found.layers or ()) for i in ids)
    assert (found.source_experts is not None) == (
        "pgs.source.experts" in metadata and "pgs.source.experts" not in changed
    )
    if lineage.origin is not None:  # a second cut stays one: its ids are not taken for those of the origin
        assert (1 in found.origin.kept) == (
            "pgs.experts.1.origin" in metadata and "pgs.experts.1.origin" not in changed
        )
        assert found.origin.layers is None or all(isinstance(i, int) for i in found.origin.layers)
    good = found.of_origin
    assert all(ids == tuple(sorted(set(ids))) and min(ids, default=0) >= 0 for ids in good.kept.values())
    Lineage().since(found), found.since(lineage).slices()


@given(st.data())
def test_a_cut_of_a_cut_names_the_experts_of_the_source(data):
    experts = data.draw(st.integers(1, 12))
    ids = st.sets(st.integers(0, experts - 1), min_size=1).map(lambda s: tuple(sorted(s)))
    first = {layer: data.draw(ids) + (None,) * data.draw(st.integers(0, 2)) for layer in (0, 3)}
    second = {
        layer: tuple(sorted(data.draw(st.sets(st.sampled_from(range(len(kept))), min_size=1))))
        for layer, kept in first.items()
    }
    once = Lineage().after_cut(first, metric="a", scores={0: [0.5] * experts}, repaired=[3])
    twice = once.after_cut(second, metric="b", scores={0: [0.25]}, repaired=[])
    assert once.slices() == first and once.scores == {0: (0.5,) * experts} and once.metric == "a"
    for layer, kept in second.items():
        real = [first[layer][i] for i in kept if first[layer][i] is not None]
        assert twice.slices()[layer] == (*real, *(None,) * (len(kept) - len(real)))
    assert twice.metric == "a, b" and twice.scores == {} and twice.repaired == {3}


def test_a_cut_of_merged_experts_follows_them():
    lineage = Lineage().after_cut({2: (0, 3)}, metric="ream", scores={}, repaired=[])
    lineage = lineage.after_merge({2: [(0, 1), (3,)]}, {2: 4})
    assert lineage.merged == {2: (0, 0, DROPPED, 1)}
    assert lineage.merged_slices("blk.2.ffn_up_exps.weight") == {0}
    assert not lineage.merged_slices("blk.2.ffn_gate_inp.weight") and not lineage.merged_slices("output.weight")
    cut = lineage.after_cut({2: (1,)}, metric="ream", scores={}, repaired=[])
    assert cut.merged == {2: (DROPPED, DROPPED, DROPPED, 0)} and cut.kept == {2: (3,)} and cut.metric == "ream"


def test_of_two_files_of_one_source_nothing_is_new():
    source = Lineage(source_sha256="s", layers=(0, 2), kept={0: (1, 2)}, repaired=frozenset([0]), merged={0: (0, 0)})
    since = source.since(source)
    assert since.layers is None and not since.slices() and not since.repaired and not since.merged
    assert source.since(Lineage()) == source


def test_the_experts_of_the_source_by_its_numbers():
    def of(**keys):
        return source_experts({key.replace("__", "."): Value(value, kind) for key, (value, kind) in keys.items()})

    kept = {"pgs__experts__0__kept": ([0, 2], "u32[]"), "pgs__experts__1__kept": ([1], "u32[]")}
    assert of(**kept) == {0: (0, 2), 1: (1,)}
    assert of(**kept, pgs__layers__kept=([5, 7], "u32[]")) == {5: (0, 2), 7: (1,)}
    assert of(**kept, pgs__layers__kept=([5], "u32[]")) == {5: (0, 2)}
    with pytest.raises(BadFile, match="not an array of whole numbers"):
        of(**kept, pgs__layers__kept=(3, "u32"))
    with pytest.raises(BadPlan, match="merged"):
        of(**kept, pgs__experts__0__merged=([0, 0, 1], "u32[]"))
    with pytest.raises(BadPlan, match="does not say"):
        of(general__name=("x", "str"))


def test_keys_of_layers_keep_their_places_when_others_go():
    metadata = {
        "pgs.experts.2.kept": Value([1], "u32[]"),
        "a": Value(1, "u8"),
        "pgs.experts.1.kept": Value([2], "u32[]"),
        "pgs.experts.3.new": Value("x", "str"),
        "pgs.layers.kept": Value([4, 5, 6, 7], "u32[]"),
    }
    after = without_layers(metadata, lambda layer: None if layer == 1 else layer - (layer > 1))
    assert [(key, value.value) for key, value in after.items()] == [
        ("pgs.experts.1.kept", [1]),
        ("a", 1),
        ("pgs.experts.2.new", "x"),
        ("pgs.layers.kept", [4, 6, 7]),
    ]


# --- chains of files --------------------------------------------------------------------------------------------------


class File:
    """A model as far as lineages know it."""

    architecture, name = "x", "chain"

    def __init__(self, number, experts):
        self.header_sha256 = f"{number:064x}"
        self.metadata = {"x.expert_count": experts, "general.name": "chain"}


@st.composite
def chains(draw):
    """Edits of a chain of plans: what each does, and whether the next one is made of a new file."""
    layers, experts = draw(st.integers(1, 4)), draw(st.integers(2, 10))
    steps, counts = [], [(experts, 0)] * layers  # of each layer: experts, and how many of them are of zeros
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["cut", "merge", "layers"]))
        count = counts[0][0]
        if kind == "layers":
            kept = sorted(draw(st.sets(st.sampled_from(range(len(counts))), min_size=1)))
            step, counts = kept, [counts[i] for i in kept]
        elif kind == "cut":
            step = {
                layer: tuple(sorted(draw(st.sets(st.sampled_from(range(count)), min_size=1))))
                for layer in range(len(counts))
            }
            most = max(map(len, step.values()))
            step = {layer: ids + (None,) * (most - len(ids)) for layer, ids in step.items()}
            counts = [
                (most, sum(i is None or i >= counts[layer][0] - counts[layer][1] for i in ids))
                for layer, ids in step.items()
            ]
        else:
            n = draw(st.integers(1, count))
            if any(pads for _, pads in counts):
                continue
            step = {}
            for layer in range(len(counts)):
                order = draw(st.permutations(range(count)))
                groups = {c: [c] for c in sorted(order[:n])}
                for member in order[n:]:
                    if (group := draw(st.none() | st.sampled_from(sorted(groups)))) is not None:
                        groups[group].append(member)
                step[layer] = list(groups.values())
            counts = [(n, 0)] * len(counts)
        steps.append((kind, step, draw(st.booleans())))
    return layers, experts, steps


def apply_step(file, metadata, kind, step, counts):
    """What the edits of a plan write down."""
    if kind == "layers":
        if len(step) == len(counts):  # nothing is dropped
            return metadata
        metadata = without_layers(metadata, lambda i: step.index(i) if i in step else None)
        record_layers(file, metadata, step)
        return metadata
    before = dict(metadata)
    kept = step if kind == "cut" else {layer: tuple(g[0] for g in groups) for layer, groups in step.items()}
    record_cut(file, metadata, kept, metric="m", scores={}, repaired=[])
    if kind == "merge":
        record_merge(file, before, metadata, step, dict(enumerate(map(len, counts))))
    return metadata


@given(chains())
def test_a_chain_of_cuts_knows_what_its_experts_are_in_the_first_model(chain):
    """Against plain lists: by layer, its number in the first model, and of each expert its centroid and members there,
    None for one of zeros."""
    layers, experts, steps = chain
    now = [(layer, [(e, (e,)) for e in range(experts)]) for layer in range(layers)]
    file, metadata, number = File(0, experts), {}, 0
    for kind, step, new_file in steps:
        metadata = apply_step(file, metadata, kind, step, [some for _, some in now])
        if kind == "layers":
            now = [now[i] for i in step]
        elif kind == "cut":
            now = [(old, [None if i is None else some[i] for i in step[k]]) for k, (old, some) in enumerate(now)]
        else:
            now = [
                (old, [(some[g[0]][0], tuple(sorted(x for m in g for x in some[m][1]))) for g in step[k]])
                for k, (old, some) in enumerate(now)
            ]
        if new_file:
            number += 1
            file = File(number, len(now[0][1]))
    found = Lineage.of(metadata, strict=True).of_origin
    assert found.experts in (None, experts)
    kept_layers = [old for old, _ in now]
    assert found.layers in (
        [tuple(kept_layers)] if kept_layers != list(range(len(now))) else [None, tuple(kept_layers)]
    )
    for layer, (_, some) in enumerate(now):
        real = [expert for expert in some if expert is not None]
        contents = found.contents(layer)
        if contents is None:
            assert some == [(e, (e,)) for e in range(experts)]
        else:
            assert contents == [members for _, members in real]
            assert found.kept[layer] == tuple(centroid for centroid, _ in real)


@given(chains())
def test_a_chain_of_files_and_one_plan_come_to_the_same(chain):
    layers, experts, steps = chain
    results = []
    for new_files in (False, True):
        file, metadata, counts = File(0, experts), {}, [[0] * experts for _ in range(layers)]
        for number, (kind, step, _) in enumerate(steps, 1):
            metadata = apply_step(file, metadata, kind, step, counts)
            counts = [counts[i] for i in step] if kind == "layers" else [[0] * len(step[k]) for k in range(len(counts))]
            if new_files:
                file = File(number, len(counts[0]))
        found = Lineage.of(metadata, strict=True).of_origin
        results.append(replace(found, header_sha256=""))  # a copy in which nothing changed begins the chain as well
    assert results[0] == results[1]


def test_only_a_second_cut_says_what_its_experts_are_in_the_first_model():
    metadata = {}
    record_cut(File(0, 8), metadata, {0: (1, 3, 5)}, metric="a", scores={}, repaired=[])
    assert "pgs.source.experts" in metadata and not [key for key in metadata if "origin" in key]
    record_cut(File(1, 3), metadata, {0: (0, 2)}, metric="b", scores={}, repaired=[])
    assert {key: value.value for key, value in metadata.items() if key.startswith(("pgs.source", "pgs.origin"))} == {
        "pgs.source.header_sha256": f"{1:064x}",
        "pgs.source.name": "chain",
        "pgs.source.experts": 3,
        "pgs.origin.header_sha256": f"{0:064x}",
        "pgs.origin.experts": 8,
    }
    assert metadata["pgs.experts.0.kept"].value == [0, 2] and metadata["pgs.experts.0.origin"].value == [1, 5]


def test_scores_say_how_many_experts_the_source_of_an_older_file_had():
    lineage = Lineage(source_sha256="aa", kept={0: (1, 2)}, scores={0: (0.5,) * 8})
    assert lineage.of_origin.experts == 8 and Lineage(kept={0: (1, 2)}).of_origin.experts is None


@pytest.mark.parametrize(
    "key", ["pgs.experts.0.origin", "pgs.origin.layers", "pgs.origin.experts", "pgs.source.experts"]
)
def test_strictly_read_keys_are_what_they_should_be(key):
    metadata = {"pgs.origin.header_sha256": Value("aa", "str"), key: Value([0.5], "f32[]")}
    with pytest.raises(BadFile) as error:
        Lineage.of(metadata, strict=True)
    assert error.value.object == key
    Lineage.of(metadata)
