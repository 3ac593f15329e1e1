"""What things are of: the JSON of it, whether two can be one model, and where the experts of one are in another."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pygguf_surgery import BadPlan
from pygguf_surgery.plan_data.subject import DROPPED, Descent, Subject, Wanted

E = 8  # experts of the first model
DIGESTS = st.sampled_from(["aa", "bb", "c" * 64])
IDS = st.sets(st.integers(0, E - 1), min_size=1).map(lambda s: tuple(sorted(s)))


@st.composite
def descents(draw):
    """Cuts of the first model, some with experts that were merged."""
    kept = {layer: draw(IDS) for layer in draw(st.sets(st.integers(0, 3), max_size=3))}
    merged = {}
    for layer, ids in kept.items():
        if draw(st.booleans()):
            groups = draw(st.lists(st.integers(0, len(ids) - 1) | st.just(DROPPED), min_size=E, max_size=E))
            for now, centroid in enumerate(ids):
                groups[centroid] = now
            merged[layer] = tuple(groups)
    layers = draw(st.none() | st.sets(st.integers(0, 9), min_size=4, max_size=4).map(lambda s: tuple(sorted(s))))
    return Descent(draw(DIGESTS), draw(st.sampled_from([None, E])), layers, kept, merged)


SUBJECTS = st.builds(Subject, st.integers(0, 1024), DIGESTS | st.just(""), st.text(), descents() | st.just(Descent()))


@given(SUBJECTS)
def test_json_there_and_back(subject):
    data = json.loads(json.dumps(subject.to_json(), allow_nan=False))
    found = Subject.from_json(data)
    assert found == subject if subject.origin.changed else found.origin == Descent() and found.name == subject.name
    subject.check()


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["experts", "header_sha256", "origin", "layers", "kept", "merged", "0", "1", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JUNK)
def test_what_is_not_a_model_is_refused_with_its_place(data):
    try:
        subject = Subject.from_json(data)
    except BadPlan as error:
        assert error.object.startswith("model")
    else:
        subject.check()


@pytest.mark.parametrize(
    "origin, where",
    [
        ({"kept": {"0": [2, 1]}}, ".kept"),
        ({"kept": {"0": [1, 1]}}, ".kept"),
        ({"kept": {"0": [-1]}}, ".kept"),
        ({"kept": {"-1": [0]}}, ".kept"),
        ({"kept": {"0": [1 << 40]}}, ".kept"),
        ({"kept": {"0": [8]}, "experts": 8}, ".kept"),
        ({"kept": {"0": [0]}, "merged": {"1": [0]}}, ".merged"),
        ({"kept": {"0": [0]}, "merged": {"0": [0, 0]}, "experts": 1}, ".merged"),
        ({"kept": {"0": [0]}, "merged": {"0": [-1]}}, ".merged"),
        ({"layers": [1, 0]}, ".layers"),
        ({"layers": [1 << 40]}, ".layers"),
        ({"experts": 0}, ".experts"),
        ({"experts": 1 << 40}, ".experts"),
        ({"header_sha256": "x"}, ".header_sha256"),
    ],
)
def test_numbers_that_no_model_has(origin, where):
    with pytest.raises(BadPlan) as error:
        Subject.from_json({"experts": 4, "origin": origin})
    assert error.value.object == f"model.origin{where}"


@given(SUBJECTS, SUBJECTS)
def test_two_are_one_model_if_their_experts_are(a, b):
    assert a.fault(a) is None and (a.fault(b) is None) == (b.fault(a) is None)
    twin = Subject(a.experts, "dd", "in other types", a.origin)
    assert a.fault(twin) is None
    if not a.is_known_as(b.header_sha256):
        assert (twin.fault(b) is None) == (a.fault(b) is None)
    if a.fault(b) is not None:
        with pytest.raises(BadPlan, match="the thing is of") as error:
            a.check_same(b, "the thing is", path="p")
        assert error.value.path == "p" and "\n" not in str(error.value)


def cut(*ids, merged=None, layers=None, experts=E, digest="aa"):
    return Descent(digest, experts, layers, {0: ids}, {} if merged is None else {0: merged})


@pytest.mark.parametrize(
    "a, b, problem",
    [
        (cut(0, 1), cut(0, 1, digest="bb"), None),
        (cut(0, 1), cut(0, 2), "another cut"),
        (cut(0, 1), Descent(), "another cut"),
        (cut(0, 1), cut(0, 1, merged=(0, 1, 1, DROPPED)), "another merge"),
        (cut(0, 1, merged=(0, 1, 1)), cut(0, 1, merged=(0, 1, 0)), "another merge"),
        (cut(0, 1, merged=(0, 1, DROPPED)), cut(0, 1), None),  # of groups of one
        (cut(0, 1, layers=(0, 1)), cut(0, 1), None),
        (cut(0, 1, layers=(0, 2)), cut(0, 1), "other layers"),
        (cut(0, 1, layers=(0, 2)), cut(0, 1, layers=(0, 3)), "other layers"),
        (cut(0, 1), cut(0, 1, experts=16), "another model"),
        (cut(0, 1), cut(0, 1, experts=None), None),
        (cut(0, 1), Descent("bb", E, None, {0: (0, 1), 4: (2, 3)}), None),  # of an MTP layer that is gone
        (cut(0, 1), cut(2, 3, digest="", experts=16), None),  # of nobody knows what
        (cut(0, 1), cut(2, 3, digest=""), "another cut"),
    ],
)
def test_what_tells_models_apart(a, b, problem):
    fault = Subject(2, origin=a).fault(Subject(2, origin=b))
    assert fault is None if problem is None else problem in fault.problem


def test_only_the_layers_that_count_are_compared():
    a, b = (Subject(2, origin=Descent("aa", E, None, {0: (0, 1), 1: ids})) for ids in ((2, 3), (4, 5)))
    assert a.fault(b) is not None and a.fault(b, layers=[0]) is None


def test_uncut_models_differ_by_their_numbers():
    assert Subject(8, "aa").fault(Subject(8, "bb")) is None
    assert "another model" in Subject(8, "aa").fault(Subject(16, "bb")).problem


@given(st.data())
def test_the_experts_of_a_cut_of_a_cut_are_found_in_the_first(data):
    first = {layer: data.draw(IDS) for layer in (0, 2)}
    second = {
        layer: tuple(sorted(data.draw(st.sets(st.sampled_from(range(len(ids))), min_size=1))))
        for layer, ids in first.items()
    }
    have = Descent("aa", E).after_cut(first)
    wanted = have.after_cut(second)
    assert have.places(wanted) == second and Descent().places(wanted) == wanted.kept
    dropped = data.draw(st.sampled_from([0, 2]))
    if missing := sorted(set(range(E)) - set(first[dropped])):
        with pytest.raises(BadPlan, match="not among its experts"):
            have.places(Descent("aa", E).after_cut({dropped: (missing[0],)}))


def test_the_experts_are_found_by_the_layers_of_the_origin():
    have = Descent("aa", E, (1, 2, 5), {0: (0, 3), 2: (4, 6)})
    wanted = Descent("aa", E, (2, 5), {1: (6,)})
    assert have.places(wanted) == {2: (1,)} and Descent().places(wanted) == {5: (6,)}
    assert have.places(Descent("aa", E, (7,), {0: (1,)})) == {}


def test_merged_experts_are_found_where_they_were_merged():
    merged = cut(0, 1, 4, merged=(0, 1, 1, DROPPED, 2, DROPPED, DROPPED, DROPPED))
    assert merged.places(merged.after_cut({0: (1, 2)})) == {0: (1, 2)}
    assert Descent().places(merged.after_cut({0: (2,)})) == {0: (4,)}  # that one is as it was
    with pytest.raises(BadPlan, match="merged"):
        Descent().places(merged)
    with pytest.raises(BadPlan, match="merged"):
        cut(0, 1, 4).places(merged)
    with pytest.raises(BadPlan, match="merged"):
        merged.places(cut(0, 1, 4))


@pytest.mark.parametrize("ids", [[8], [-1], [0, 8]])
def test_a_choice_names_experts_of_its_model(ids):
    with pytest.raises(BadPlan, match="has not"):
        Wanted.of_choice({0: ids}, Subject(8, "aa"))


def test_a_choice_of_a_cut_model_is_a_cut_of_the_first():
    of = Subject(4, "bb", origin=Descent("aa", E, None, {0: (1, 3, 5, 7)}))
    wanted = Wanted.of_choice({0: [3, 0]}, of)
    assert wanted.cut == Descent("bb", 4, None, {0: (0, 3)}) and wanted.model.origin.kept == {0: (1, 7)}
    assert wanted.model.experts == 2 and not wanted.model.header_sha256
