"""A matrix in tiles and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evoloss.engine.tiles import TILE_BYTES, as_matrix, as_tiles, make_tiles

DTYPES = [torch.float32, torch.float64]


@given(st.integers(1, 9), st.integers(1, 70), st.sampled_from(DTYPES))
def test_there_and_back(rows: int, columns: int, dtype: torch.dtype) -> None:
    matrix = torch.arange(1, rows * columns + 1, dtype=dtype).view(rows, columns)
    for form in (matrix, matrix.t().contiguous().t()):
        tiles = make_tiles(form)
        assert torch.equal(as_matrix(tiles), matrix)
        assert as_matrix(tiles).is_contiguous()
        assert tiles.values.sum() == matrix.sum()  # what is left of the last tile is 0
        assert (tiles.num_rows, tiles.num_columns) == (rows, columns)
        assert torch.equal(as_matrix(as_tiles(form)), matrix)
    assert as_tiles(tiles) is tiles
    assert as_matrix(matrix) is matrix
    assert as_tiles(matrix).width == columns


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_tile_is_a_cache_line(dtype: torch.dtype) -> None:
    tiles = make_tiles(torch.zeros(3, 40, dtype=dtype))
    assert tiles.width * dtype.itemsize == TILE_BYTES
    assert tiles.values.is_contiguous()
