"""JSON of dataclasses: what is read, what is refused, and where."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pygguf_surgery import BadPlan
from pygguf_surgery.base.codec import decoder, encode, loads
from support.strategies import ANY_BYTES, FINITE, json_values


@dataclass(frozen=True)
class Leaf:
    name: str
    pairs: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Tree:
    number: int
    share: float
    sure: bool
    leaf: Leaf
    layers: dict[int, tuple[float, ...]]
    words: dict[str, str] = field(default_factory=dict)
    more: Leaf | None = None
    limit: int | None = None
    raw: bytes = b""


HOOKS = {bytes: bytes.fromhex}
decode = decoder(Tree, HOOKS)
LEAST = {"number": 1, "share": 0.5, "sure": True, "leaf": {"name": "a"}, "layers": {}}
LATER = {"words": {"3": "x"}, "more": {"name": "b", "pairs": [["c", 2]]}, "limit": 3, "raw": "ff"}
FULL = {**LEAST, "leaf": {"name": "a", "pairs": []}, **LATER}


def to_json(tree):
    return encode(tree, {bytes: bytes.hex})


# --- what is read -----------------------------------------------------------------------------------------------------


def test_defaults():
    assert decode(LEAST) == Tree(1, 0.5, True, Leaf("a"), {})


def test_every_kind():
    tree = Tree(1, 0.5, True, Leaf("a"), {}, {"3": "x"}, Leaf("b", (("c", 2),)), 3, b"\xff")
    assert decode(FULL) == tree and to_json(tree) == FULL and list(to_json(tree)) == list(FULL)


def test_whole_numbers_are_floats_too():
    tree = decode({**LEAST, "share": 2, "layers": {"-1": [1, 2**80]}})
    assert tree.layers == {-1: (1.0, 2.0**80)} and {type(x) for x in (tree.share, *tree.layers[-1])} == {float}


LEAVES = st.builds(Leaf, ANY_BYTES, st.lists(st.tuples(ANY_BYTES, st.integers()), max_size=3).map(tuple))
TREES = st.builds(
    Tree,
    st.integers(),
    FINITE,
    st.booleans(),
    LEAVES,
    st.dictionaries(st.integers(-(10**40), 10**40), st.lists(FINITE, max_size=3).map(tuple), max_size=3),
    st.dictionaries(ANY_BYTES, ANY_BYTES, max_size=3),
    st.none() | LEAVES,
    st.none() | st.integers(),
    st.binary(),
)


@given(TREES)
def test_all_comes_back(tree):
    text = json.dumps(to_json(tree), allow_nan=False)
    back = decode(loads(text))
    assert back == tree and json.dumps(to_json(back)) == text


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED = [
    (None, None, "not a table (found null)"),
    ([], None, "not a table (found a list)"),
    ({}, ".number", "missing key"),
    (
        {**LEAST, "numbr": 1},
        ".numbr",
        "unknown key (expected number, share, sure, leaf, layers, words, more, limit, raw)",
    ),
    ({**LEAST, "number": True}, ".number", "not a whole number (found true or false)"),
    ({**LEAST, "number": 1.0}, ".number", "not a whole number (found a number)"),
    ({**LEAST, "number": "1"}, ".number", "not a whole number (found text)"),
    ({**LEAST, "number": None}, ".number", "not a whole number (found null)"),
    ({**LEAST, "share": True}, ".share", "not a number (found true or false)"),
    ({**LEAST, "share": math.nan}, ".share", "not a number (found a number)"),
    ({**LEAST, "share": math.inf}, ".share", "not a number (found a number)"),
    ({**LEAST, "share": 10**400}, ".share", "not a number (found a whole number)"),
    ({**LEAST, "sure": 1}, ".sure", "not true or false (found a whole number)"),
    ({**LEAST, "leaf": {}}, ".leaf.name", "missing key"),
    ({**LEAST, "leaf": {"name": 5}}, ".leaf.name", "not text (found a whole number)"),
    ({**LEAST, "leaf": {"name": "", "pairs": "ab"}}, ".leaf.pairs", "not a list (found text)"),
    ({**LEAST, "leaf": {"name": "", "pairs": {}}}, ".leaf.pairs", "not a list (found a table)"),
    (
        {**LEAST, "leaf": {"name": "", "pairs": [["a", 1], ["a"]]}},
        ".leaf.pairs[1]",
        "not a list of 2 (found a list of 1)",
    ),
    ({**LEAST, "leaf": {"name": "", "pairs": [["a", 1, 2]]}}, ".leaf.pairs[0]", "not a list of 2 (found a list of 3)"),
    ({**LEAST, "leaf": {"name": "", "pairs": [["a", "b"]]}}, ".leaf.pairs[0][1]", "not a whole number (found text)"),
    ({**LEAST, "layers": {"3": [0, "1"]}}, '.layers["3"][1]', "not a number (found text)"),
    ({**LEAST, "layers": {"x y": []}}, '.layers["x y"]', "not a whole number (found text)"),
    ({**LEAST, "layers": []}, ".layers", "not a table (found a list)"),
    ({**LEAST, "words": {"a": 1}}, ".words.a", "not text (found a whole number)"),
    ({**LEAST, "words": {"\udcff": 1}}, '.words["\\udcff"]', "not text (found a whole number)"),
    ({**LEAST, "more": False}, ".more", "not a table (found true or false)"),
    ({**LEAST, "limit": False}, ".limit", "not a whole number (found true or false)"),
]


@pytest.mark.parametrize("data, path, problem", REFUSED)
def test_refused(data, path, problem):
    with pytest.raises(BadPlan) as error:
        decode(data)
    assert error.value.object == path
    error.value.object = None
    assert str(error.value) == problem


@pytest.mark.parametrize("key", ["03", " 3", "3 ", "+3", "1_0", "3.0", "-0", "", "٣", "9" * 5000, "1\n"])
def test_a_number_as_a_key_has_one_form(key):
    with pytest.raises(BadPlan):
        decode({**LEAST, "layers": {key: []}})


def test_a_long_key_is_cut_in_the_path():
    with pytest.raises(BadPlan) as error:
        decode({**LEAST, "words": {"a" * 10**6: 1, "b": 2}})
    assert len(error.value.object) < 100


@pytest.mark.parametrize(
    "text, problem",
    [
        ('{"a": NaN}', "not JSON: NaN is not a number"),
        ("[-Infinity]", "not JSON: -Infinity is not a number"),
        ('{"a": {"b": 1, "c": 2, "b": 1}}', "b: a key twice"),
        ("{", "not JSON: Expecting property name"),
        ("", "not JSON: Expecting value"),
        ("[" * 100_000, "not JSON: "),
        ("9" * 5000, "not JSON: "),
    ],
)
def test_text_that_is_not_json(text, problem):
    with pytest.raises(BadPlan) as error:
        loads(text)
    assert str(error.value).startswith(problem)


@given(json_values(keys=st.text(max_size=4) | st.sampled_from(list(FULL)), max_leaves=12))
def test_any_json_is_read_or_refused(data):
    try:
        tree = decode(data)
    except BadPlan:
        return
    assert decode(to_json(tree)) == tree


@given(st.text() | json_values().map(json.dumps))
def test_any_text_is_read_or_refused(text):
    try:
        loads(text)
    except BadPlan:
        return
    json.loads(text)
