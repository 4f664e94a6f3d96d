"""Large weights in tiles: what a compiled product reads at a time lies together, not on one page of memory per row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from evoloss.engine.row_vectors import row_function

TILE_BYTES = 64
"""A row of a tile: a cache line, and a whole number of any processor's vectors."""


@dataclass(frozen=True)
class Tiles:
    """A matrix (rows, columns) by ``width`` columns at a time: ``values`` (tiles, rows, width).

    What the last tile has too many is 0. A plain matrix is a single tile as wide as the matrix.
    """

    values: Tensor
    num_columns: int

    @property
    def num_rows(self) -> int:
        """Return the matrix's rows."""
        return self.values.shape[1]

    @property
    def width(self) -> int:
        """Return the columns of a tile."""
        return self.values.shape[2]


def make_tiles(matrix: Tensor) -> Tiles:
    """Return a matrix in tiles whose rows are cache lines."""
    rows, columns = matrix.shape
    width = TILE_BYTES // matrix.element_size()
    whole, rest = divmod(columns, width)
    values = matrix.new_empty(whole + (rest > 0), rows, width)
    values[:whole] = matrix[:, : whole * width].reshape(rows, whole, width).transpose(0, 1)
    if rest:
        values[whole, :, rest:] = 0.0
        values[whole, :, :rest] = matrix[:, whole * width :]
    return Tiles(values, columns)


@row_function
def find_place(row, column, rows, width):  # type: ignore[no-untyped-def]
    """Return where an element of a matrix of so many rows is in the flat values of its `Tiles`."""
    return (column // width * rows + row) * width + column % width


def is_tiled(weight: Tensor) -> bool:
    """Tell whether the weight of k networks is in tiles, (k, tiles, out, width), not (k, out, in)."""
    return weight.dim() == 4


def read_weight(weight: Tensor, num_inputs: int) -> Tensor | Tiles:
    """Return a single network's weight, with or without tiles, without its first dimension."""
    return Tiles(weight[0], num_inputs) if is_tiled(weight) else weight[0]


def as_tiles(matrix: Tensor | Tiles) -> Tiles:
    """Return a plain matrix as a single tile, and tiles as they are."""
    if isinstance(matrix, Tiles):
        return matrix
    return Tiles(matrix.contiguous().unsqueeze(0), matrix.shape[1])


def as_matrix(matrix: Tensor | Tiles) -> Tensor:
    """Return tiles as a plain matrix (rows, columns), contiguous, and one as it is."""
    if not isinstance(matrix, Tiles):
        return matrix
    return matrix.values.transpose(0, 1).flatten(1)[:, : matrix.num_columns].contiguous()
