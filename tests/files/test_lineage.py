"""The keys `pgs.*` of models: what is written is read again, what somebody changed is no trap."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pygguf_surgery import BadFile, BadPlan, Value
from pygguf_surgery.files.lineage import DROPPED, Lineage, source_experts, without_layers

NUMBERS = st.integers(0, 40)
LAYERS = st.integers(0, 6)


def by_layer(values):
    return st.dictionaries(LAYERS, values, max_size=4)


LINEAGES = st.builds(
    Lineage,
    version=st.none() | st.text(max_size=5),
    source_sha256=st.none() | st.text(max_size=5),
    source_name=st.none() | st.text(max_size=5),
    layers=st.none() | st.lists(NUMBERS, max_size=4).map(tuple),
    metric=st.none() | st.text(max_size=5),
    kept=by_layer(st.lists(NUMBERS, max_size=4).map(tuple)),
    padded=by_layer(st.integers(1, 1024)),
    merged=by_layer(st.lists(NUMBERS | st.just(DROPPED), max_size=4).map(tuple)),
    scores=by_layer(st.lists(st.floats(allow_nan=False), max_size=4).map(tuple)),
    repaired=st.frozensets(LAYERS),
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
