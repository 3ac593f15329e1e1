"""What an argument must be."""

import numpy as np
import pytest

from pygguf_surgery import BadPlan
from pygguf_surgery.base.checks import as_whole_number, choice, whole_number


@pytest.mark.parametrize(
    "x, number",
    [
        (0, 0),
        (-7, -7),
        (2**80, 2**80),
        (np.uint8(3), 3),
        (True, None),
        (np.bool_(True), None),
        (1.0, None),
        ("1", None),
        (None, None),
        ([1], None),
        (np.array([1, 2]), None),
    ],
)
def test_whole_numbers(x, number):
    assert as_whole_number(x) == number
    if number is None:
        with pytest.raises(BadPlan, match="layer: not a whole number"):
            whole_number(x, "layer")
    else:
        assert whole_number(x, "layer") == number and type(whole_number(x, "layer")) is int


@pytest.mark.parametrize("value", ["tape", "", None, ["auto"], 0])
def test_choices(value):
    assert choice("mmap", ("auto", "mmap", "pread"), "io") == "mmap"
    with pytest.raises(BadPlan) as error:
        choice(value, ("auto", "mmap", "pread"), "io")
    assert str(error.value) == f'io: unknown choice (found {value!r}, expected "auto", "mmap" or "pread")'
