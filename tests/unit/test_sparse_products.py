"""Products that leave zeros out against plain matrix products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoloss.engine.bit_masks import BLOCK, find_bits
from evoloss.engine.sparse_products import (
    ROWS,
    VECTORS,
    SparseRows,
    find_sparse,
    make_sparse_product,
    skipping_pays,
)
from evoloss.engine.tiles import make_tiles

TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-14}


def draw(seed: int, rows: int, terms: int, outputs: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return a ReLU's values (rows, terms), a weight (outputs, terms) and a bias (outputs,)."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, terms), (outputs, terms), (outputs,))
    values, *others = (torch.randn(s, generator=generator, dtype=dtype) for s in shapes)
    return [values.relu(), *others]


@settings(deadline=None)  # the first call compiles
@given(
    st.integers(1, 40),
    st.integers(1, 3 * BLOCK),
    st.integers(1, 300),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_it_is_a_matrix_product(
    rows: int, terms: int, outputs: int, dtype: torch.dtype, has_bias: bool, seed: int
) -> None:
    values, weight, bias = draw(seed, rows, terms, outputs, dtype)
    expected = values @ weight.t() + (bias if has_bias else 0.0)
    for form in (weight, make_tiles(weight), weight.t().contiguous().t()):
        found = SparseRows.read(values).multiply(form, bias if has_bias else None)
        tolerance = TOLERANCES[dtype] * terms
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_nothing_or_everything_is_0(share: float, dtype: torch.dtype) -> None:
    values, weight, bias = draw(0, 9, 130, 140, dtype)
    values = torch.full_like(values, share)
    found = SparseRows.read(values).multiply(weight, bias)
    torch.testing.assert_close(found, values @ weight.t() + bias, rtol=1e-4, atol=1e-4)


def test_more_rows_than_are_summed_up_at_a_time() -> None:
    values, weight, bias = draw(1, ROWS + 3, 70, 20, torch.float64)
    for form in (weight, make_tiles(weight)):
        found = SparseRows.read(values).multiply(form, bias)
        torch.testing.assert_close(found, values @ weight.t() + bias)


@pytest.mark.parametrize("num_bytes", [16, 32, 64])
def test_vectors_of_any_length(num_bytes: int) -> None:
    """Wherever the tests run; what the processor lacks LLVM makes of what it has."""
    rows, terms, outputs = 11, 2 * BLOCK + 5, 3 * VECTORS * num_bytes // 8 - 7
    values, weight, bias = (t.numpy() for t in draw(2, rows, terms, outputs, torch.float64))
    bits = find_bits(torch.from_numpy(values))
    tiles = make_tiles(torch.from_numpy(weight)).values.numpy()
    multiply, width = make_sparse_product(num_bytes), VECTORS * num_bytes // 8
    panel, sums = np.full(BLOCK * width, np.nan), np.full((rows, width), np.nan)
    for form, columns in ((weight, terms), (tiles, tiles.shape[2])):
        found = np.full((rows, outputs), np.nan)
        for first, end in ((0, 1), (1, 3)):
            multiply(values, bits, form.reshape(-1), columns, panel, sums, bias, found, first, end)
        np.testing.assert_allclose(found, values @ weight.T + bias, atol=1e-12)


def test_threads_give_the_same() -> None:
    values, weight, bias = draw(3, 40, 90, 700, torch.float32)
    sparse, tiles = SparseRows.read(values), make_tiles(weight)
    expected = sparse.multiply(weight, bias)
    assert torch.equal(sparse.multiply(tiles, bias), expected)
    try:
        for count in (2, 3, 8):
            torch.set_num_threads(count)
            assert torch.equal(sparse.multiply(weight, bias), expected)
            assert torch.equal(sparse.multiply(tiles, bias), expected)
    finally:
        torch.set_num_threads(1)


def test_what_is_not_finite_goes_through_what_is_not_0_alone() -> None:
    values, weight, bias = draw(4, 6, 80, 30, torch.float64)
    values[:, 3], values[2, 3], values[4, 7] = 0.0, 1.0, torch.nan
    weight[5, 3] = torch.inf
    found = SparseRows.read(values).multiply(weight, bias)
    assert found[2, 5] == torch.inf
    assert found[4].isnan().all()
    found[2, 5] = 0.0
    assert found[[0, 1, 2, 3, 5]].isfinite().all()


def test_a_matrix_of_few_zeros_and_a_small_product_are_left_alone() -> None:
    """The paper's network is not: 128 rows, 1000 x 1000 weights."""
    values, *_ = draw(5, 128, 1000, 1, torch.float32)
    assert find_sparse("relu", values, 1000) is not None
    assert find_sparse("relu", values.t(), 1000) is not None
    assert find_sparse("tanh", values, 1000) is None
    assert find_sparse("relu", values, 1) is None
    assert find_sparse("relu", values[:16], 1000) is None
    values[:76] = 1.0  # 0.8 of all
    assert find_sparse("relu", values, 1000) is None
    assert skipping_pays(32, 1000, 1000)
    assert not skipping_pays(10_000, 1000, 1)  # a whole panel for one output
