"""Bits of what is not 0 against a comparison by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoloss.engine.bit_masks import BLOCK, Bits, find_bits, find_column_bits, make_bit_search


def unpack(bits: Bits, rows: int, terms: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Return the mask (rows, terms) that ``bits`` stand for; bits after the last term must be 0."""
    assert bits.shape == (-(-terms // BLOCK), rows)
    numbers = np.arange(len(bits) * BLOCK)
    mask = bits[numbers // BLOCK].T >> (numbers % BLOCK) & 1 == 1
    assert not mask[:, terms:].any()
    return mask[:, :terms]


def draw(seed: int, rows: int, terms: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(
        rows, terms, generator=torch.Generator().manual_seed(seed), dtype=dtype
    ).relu()


@settings(deadline=None)  # the first call compiles
@given(
    st.integers(1, 150),
    st.integers(1, 150),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**32),
)
def test_a_bit_is_1_where_the_element_is_not_0(
    rows: int, terms: int, dtype: torch.dtype, seed: int
) -> None:
    values = draw(seed, rows, terms, dtype)
    expected = values.numpy() != 0
    np.testing.assert_array_equal(unpack(find_bits(values), rows, terms), expected)
    np.testing.assert_array_equal(unpack(find_column_bits(values), terms, rows), expected.T)
    # rows that do not follow each other in memory
    np.testing.assert_array_equal(unpack(find_bits(values.t()), terms, rows), expected.T)
    np.testing.assert_array_equal(unpack(find_column_bits(values.t()), rows, terms), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_and_infinity_are_not_0(dtype: torch.dtype) -> None:
    values = torch.tensor([[0.0, torch.nan, -0.0], [torch.inf, -torch.inf, 1e-40]], dtype=dtype)
    expected = np.array([[False, True, False], [True, True, True]])
    np.testing.assert_array_equal(unpack(find_bits(values), 2, 3), expected)
    np.testing.assert_array_equal(unpack(find_column_bits(values), 3, 2), expected.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_bytes", [16, 32, 64])
def test_vectors_of_any_length(num_bytes: int, dtype: torch.dtype) -> None:
    values = draw(0, 5, 203, dtype)
    bits = np.full((4, 5), -1)
    make_bit_search(num_bytes)(values.numpy(), bits)
    np.testing.assert_array_equal(unpack(bits, 5, 203), values.numpy() != 0)
