"""Layers with weights in batch-innermost layout: forward, backward and tangent, each by hand.

Activations are numpy arrays (channels, height, width, batch) or, once flat, (features, batch). Numpy's views and the
kernels leave Python's lock alone for nearly all of the time, so that threads with a network each do not wait for each
other. A layer is made for one input shape, batch size and dtype and owns the buffers that it writes: what a method
returns is overwritten by its next call, but for gradients by weights, and a method may overwrite the gradient or
tangent that it is given. `evoloss.engine.convolution_fixed_layers` has the layers without weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from evoloss.engine.convolution_kernels import (
    LENGTH,
    ROWS,
    add_dot_products,
    add_products,
    clear,
    make_blocks,
    pad_offsets,
    sum_rows,
)

Array = NDArray[Any]
Shape = tuple[int, ...]


class UnsupportedLayerError(Exception):
    """A module or an input shape that no layer here stands for; the text is half a sentence."""


class Products:
    """`nn.Conv2d` of images that `Padding` has padded, or `nn.Linear`: a convolution of images of one pixel.

    ``params`` are the weight and, perhaps, the bias.
    """

    def __init__(
        self, module: nn.Conv2d | nn.Linear, shape: Shape, batch: int, dtype: np.dtype[Any]
    ) -> None:
        if isinstance(module, nn.Conv2d):
            channels, height, width = shape
            (rows, columns), (down, right) = module.kernel_size, module.stride
            out = (module.out_channels, (height - rows) // down + 1, (width - columns) // right + 1)
            if height < rows or width < columns:
                raise UnsupportedLayerError("images smaller than a kernel")
            self.shape: Shape = out
        else:
            if shape != (module.in_features,):
                raise UnsupportedLayerError(f"a linear layer on inputs {shape}")
            channels, height, width = module.in_features, 1, 1
            rows = columns = down = right = 1
            out = (module.out_features, 1, 1)
            self.shape = out[:1]
        # Without a stride between columns a whole row of the image is one row of the products, else one pixel is.
        pieces, piece = (1, out[2]) if right == 1 else (out[2], 1)
        self._length = piece * batch
        self._x_stride, self._y_stride = height * width * batch, out[1] * out[2] * batch
        y, x = np.arange(out[1])[:, None], np.arange(pieces)
        self._x_rows = ((y * down * width + x * right) * batch).ravel()
        self._y_rows = ((y * pieces + x) * self._length).ravel()
        shifts = (np.arange(rows)[:, None] * width + np.arange(columns)) * batch
        self._shifts, self._no_shift = shifts.ravel(), np.zeros(1, dtype=np.int64)
        taps = np.arange(channels)[:, None] * self._x_stride + self._shifts
        self._x_taps = pad_offsets(taps.ravel())
        self._y_taps = pad_offsets(np.arange(out[0]) * self._y_stride)
        self._y = np.empty((*self.shape, batch), dtype)
        self._dx = np.empty((*shape, batch), dtype)
        self._spare = np.zeros((ROWS, min(self._length, LENGTH)), dtype)
        self._keep, self._no_bias = np.empty(0, dtype), np.zeros(out[0], dtype)
        self._weights = make_blocks(1, out[0], channels * rows * columns, dtype=dtype)
        self._transposed = make_blocks(rows * columns, channels, out[0], dtype=dtype)
        self._gradient = make_blocks(out[0], channels * rows * columns, dtype=dtype)

    def forward(self, params: Sequence[Array], x: Array) -> Array:
        """Return the output ``y`` for the input ``x``."""
        return self._add_products(params[0], x, params[1] if len(params) == 2 else self._no_bias)

    def add_linear(self, params: Sequence[Array], dx: Array) -> Array:
        """Add the product of the weight alone with ``dx`` to the last output and return that."""
        return self._add_products(params[0], dx, self._keep)

    def _add_products(self, weight: Array, x: Array, bias: Array) -> Array:
        rows = len(weight)
        weight = weight.reshape(rows, -1)
        self._weights[0, :rows, : weight.shape[1]] = weight
        add_products(
            self._weights,
            *(x.reshape(-1), self._x_rows, self._x_taps),
            *(self._y.reshape(-1), self._y_rows, self._no_shift, self._y_stride),
            *(rows, self._length, self._spare, bias),
        )
        return self._y

    def backward(self, params: Sequence[Array], dy: Array) -> Array:
        """Return the gradient by ``x``, given that by ``y``."""
        taps = len(self._shifts)
        out, channels = params[0].shape[:2]
        weight = params[0].reshape(out, channels, taps).transpose(2, 1, 0)
        self._transposed[:, :channels, :out] = weight
        clear(self._dx.reshape(-1))
        add_products(
            self._transposed,
            *(dy.reshape(-1), self._y_rows, self._y_taps),
            *(self._dx.reshape(-1), self._x_rows, self._shifts, self._x_stride),
            *(channels, self._length, self._spare, self._keep),
        )
        return self._dx

    def weight_gradients(self, params: Sequence[Array], x: Array, dy: Array) -> list[Array]:
        """Return the gradients by ``params``."""
        rows = len(params[0])
        taps = params[0].size // rows
        self._gradient.fill(0.0)
        add_dot_products(
            self._gradient,
            *(dy.reshape(-1), self._y_rows, self._y_stride, rows),
            *(x.reshape(-1), self._x_rows, self._x_taps, self._length),
        )
        gradients = [self._gradient[:rows, :taps].copy().reshape(params[0].shape)]
        if len(params) == 2:
            gradients.append(np.empty_like(params[1]))
            sum_rows(dy.reshape(rows, -1), gradients[1])
        return gradients
