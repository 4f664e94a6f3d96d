"""Backpropagation through a ReLU layer below a single output, by its mask.

There the gradient by the layer's Z is diag(u) M diag(w): u the gradient by the output of every sample, w the output's
weights, M the mask. So both products of the layer below are products of the mask, which `evoloss.engine.mask_products`
computes in less than half the time of a matrix product (128 rows, 1000 x 1000 weights, one thread of an AMD EPYC).
"""

from __future__ import annotations

from torch import Tensor

from evoloss.engine.bit_masks import find_bits, find_column_bits
from evoloss.engine.mask_products import is_worthwhile, multiply_mask
from evoloss.engine.tiles import Tiles, is_tiled


def is_masked(activation: str, num_outputs: int, rows: int, units: int, num_inputs: int) -> bool:
    """Tell whether the layer below the output, of so many units and inputs, is of this kind and large."""
    return activation == "relu" and num_outputs == 1 and is_worthwhile(rows, units, num_inputs)


class MaskedGradient:
    """The gradient by Z (1, B, out) of a ReLU layer, by its factors.

    Parameters
    ----------
    upstream
        u, (1, B, 1), the gradient by the output.
    weight
        w, (1, 1, out), the output's weights.
    values
        The layer's values (1, B, out).
    """

    def __init__(self, upstream: Tensor, weight: Tensor, values: Tensor) -> None:
        self._upstream = upstream.reshape(-1)
        self._weight = weight.reshape(-1)
        self._values = values[0]

    @classmethod
    def find(
        cls, activation: str, upstream: Tensor, weight: Tensor, values: Tensor, num_inputs: int
    ) -> MaskedGradient | None:
        """Return it if the layer below the output, of ``num_inputs`` inputs, `is_masked`, of one network; else None."""
        (networks, rows, outputs), units = upstream.shape, values.shape[-1]
        if networks == 1 and is_masked(activation, outputs, rows, units, num_inputs):
            return cls(upstream, weight, values)
        return None

    def by_weight(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient by the layer's ``weight``, as that is in tiles or not, for its ``inputs`` (1, B, in)."""
        bits = find_column_bits(self._values)
        factors = self._upstream, self._weight
        tiles = multiply_mask(bits, inputs[0], *factors, tiled=is_tiled(weight))
        return tiles.values.view_as(weight)

    def by_inputs(self, weight: Tensor | Tiles) -> Tensor:
        """Return the gradient by the layer's inputs (1, B, in) for its ``weight`` (out, in), in tiles or not."""
        bits = find_bits(self._values)
        return multiply_mask(bits, weight, self._weight, self._upstream).values
