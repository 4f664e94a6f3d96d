"""Products of masks against plain matrix products."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoloss.engine.bit_masks import BLOCK, Bits, find_column_bits
from evoloss.engine.mask_products import (
    BITS,
    ENTRIES,
    GROUPS,
    ROWS,
    TERMS,
    find_layout,
    make_mask_product,
    multiply_mask,
)
from evoloss.engine.tiles import Tiles, as_matrix, make_tiles

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-13}


def draw(seed: int, rows: int, terms: int, columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return a ReLU's values (terms, rows), a matrix (terms, columns), and both factors."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((terms, rows), (terms, columns), (terms,), (rows,))
    values, *others = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return [values.relu(), *others]


def multiply(bits: Bits, matrix: torch.Tensor | Tiles, *factors: torch.Tensor) -> torch.Tensor:
    return as_matrix(multiply_mask(bits, matrix, *factors))


def multiply_plainly(
    values: torch.Tensor, matrix: torch.Tensor, right: torch.Tensor, left: torch.Tensor
) -> torch.Tensor:
    mask = (values > 0).to(matrix.dtype)
    return left[:, None] * (mask.t() @ (right[:, None] * matrix))


@settings(deadline=None)  # the first call compiles
@given(
    st.integers(1, 3 * ROWS),
    st.integers(1, 50 * BITS),
    st.integers(1, 70),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**32),
)
def test_it_is_a_matrix_product(
    rows: int, terms: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    values, matrix, right, left = draw(seed, rows, terms, columns, dtype)
    bits = find_column_bits(values)
    found = multiply(bits, matrix, right, left)
    expected = multiply_plainly(values, matrix, right, left)
    tolerance = TOLERANCES[dtype] * terms
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for form in (matrix, make_tiles(matrix)):
        tiles = multiply_mask(bits, form, right, left, tiled=True)
        assert torch.equal(tiles.values, make_tiles(found).values)
        assert torch.equal(multiply(bits, form, right, left), found)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_more_groups_than_tables_in_use(dtype: torch.dtype) -> None:
    """The sums of one pass stand in memory until the next one."""
    values, matrix, right, left = draw(0, 13, 1100, 37, dtype)
    found = multiply(find_column_bits(values), matrix, right, left)
    expected = multiply_plainly(values, matrix, right, left)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e3 * TOLERANCES[dtype])


@pytest.mark.parametrize("num_bytes", [16, 32, 64])
def test_vectors_of_any_length(num_bytes: int) -> None:
    """Wherever the tests run; what the processor lacks LLVM makes of what it has."""
    rows, terms, columns, passes = 11, 5 * BLOCK - 7, 29, 3
    values, matrix, right, left = draw(1, rows, terms, columns, torch.float64)
    bits, lanes = find_column_bits(values), num_bytes // 8
    table = np.full(passes * GROUPS * ENTRIES * lanes, np.nan)
    sums = np.full(rows * lanes, np.nan)
    found = np.full((rows, columns), np.nan)
    add_up = make_mask_product(num_bytes)
    for first, end in ((0, 16), (16, columns)):
        add_up(
            bits, matrix.numpy().reshape(-1), columns, columns, right.numpy(), left.numpy(),
            found.reshape(-1), columns, table, sums, passes, first, end,
        )  # fmt: skip
    # tiles may be wider than vectors
    tiles = make_tiles(matrix)
    tiled = np.full(make_tiles(torch.from_numpy(found)).values.shape, np.nan)
    add_up(
        bits, tiles.values.numpy().reshape(-1), tiles.width, columns, right.numpy(), left.numpy(),
        tiled.reshape(-1), tiles.width, table, sums, passes, 0, len(tiled) * tiles.width,
    )  # fmt: skip
    np.testing.assert_array_equal(tiled, make_tiles(torch.from_numpy(found)).values.numpy())
    expected = multiply_plainly(values, matrix, right, left)
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-12)


def test_threads_give_the_same() -> None:
    values, matrix, right, left = draw(2, 40, 90, 101, torch.float32)
    bits = find_column_bits(values)
    expected = multiply(bits, matrix, right, left)
    try:
        for count in (2, 3, 8):
            torch.set_num_threads(count)
            assert torch.equal(multiply(bits, matrix, right, left), expected)
    finally:
        torch.set_num_threads(1)


def test_what_is_not_finite_goes_through_active_units_alone() -> None:
    """NaN counts as active, as in torch's derivative of ReLU, and so makes a diverged network's gradient NaN."""
    values, matrix, right, left = draw(3, 9, 10, 20, torch.float64)
    values[4] = 0.0
    values[4, 2], values[7, 5] = 1.0, torch.nan
    matrix[4] = torch.inf
    found = multiply(find_column_bits(values), matrix, right, left)
    assert not torch.isfinite(found[2]).any()
    assert torch.isfinite(found[[0, 1, 3, 4, 5, 6, 7, 8]]).all()
    matrix[7] = torch.nan
    assert multiply(find_column_bits(values), matrix, right, left)[5].isnan().all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("num_bytes", [16, 32, 64])
def test_a_batch_of_128_samples_takes_one_pass(
    num_bytes: int, dtype: type[np.floating[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evoloss.engine.mask_products.find_registers", lambda: (num_bytes, 12))
    _, passes = find_layout(np.dtype(dtype))
    assert passes * TERMS >= 128
