"""Every set of kernels gives the bytes that ggml compiled by gcc gives on x86-64, on whatever machine this runs."""

import pytest

from support.golden import golden, of_decoder, of_encoder
from support.kernels import CASES, DECODED, SETS, with_kernels


@pytest.mark.parametrize("kernels", ["ggml", *SETS])
@pytest.mark.parametrize(("name", "weighted"), CASES)
def test_encoded_bytes(kernels, name, weighted):
    found = with_kernels(kernels, lambda: of_encoder(name, weighted, kernels))
    assert found == {case: golden()[case] for case in found}


@pytest.mark.parametrize("kernels", ["ggml", *SETS])
@pytest.mark.parametrize("name", DECODED)
def test_decoded_numbers(kernels, name):
    found = with_kernels(kernels, lambda: of_decoder(name))
    assert found == {case: golden()[case] for case in found}
