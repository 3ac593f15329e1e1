"""Numbers, names and tables as people read them."""

import pytest

from pygguf_surgery.base import words


@pytest.mark.parametrize(
    "numbers, text",
    [([], ""), ([3], "3"), ([0, 1, 2, 5], "0..2, 5"), ([5, 2, 1, 0], "0..2, 5"), ([0, 2, 4, 5], "0, 2, 4..5")],
)
def test_ranges(numbers, text):
    assert words.ranges(numbers) == text


def test_plurals():
    assert [words.counted(n, "tensor") for n in (0, 1, 2)] == ["0 tensors", "1 tensor", "2 tensors"]
    assert [words.with_others("abc"[:n]) for n in (0, 1, 2, 3)] == [
        "",
        "",
        " (and 1 more tensor)",
        " (and 2 more tensors)",
    ]


def test_lists_are_cut():
    assert words.listed([1, 2, 3], 3) == "1, 2, 3" and words.listed([], 3) == ""
    assert words.listed("abcd", 3) == "a, b, c, ..." and words.listed("abcd", 3, number=True) == "a, b, c, ... (4)"
    assert [words.either(list("abc"[:n])) for n in (0, 1, 2, 3)] == ["", "a", "a or b", "a, b or c"]


def test_the_nearest_come_first():
    names = ["Q4_0", "Q4_1", "Q8_0", "general.name"]
    assert words.nearest("Q4_2", names)[:2] == ["Q4_1", "Q4_0"] and words.nearest("zzz", names) == []
    assert words.nearest_names("general.nam", names) == "nearest: general.name"
    assert words.nearest_names("zzz", names) is None
    assert [words.nearest_multiples(n, 32, 128) for n in (100, 96, 130, 5)] == ["96 or 128", "96", "128", "32"]


def test_tables():
    assert words.table([("a", "1"), ("long", "22")]) == "a      1\nlong  22" and words.table([]) == ""
    assert words.table([("a", "b\n\x1b")], left=2) == r"a  b\n\x1b"
    assert words.columns((5, -4, 3), (1, "ab", "")) == "    1 ab" and words.columns((2, 2), (123, 4)) == "123  4"
