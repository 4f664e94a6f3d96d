"""Layers with weights in batch-innermost layout: forward, backward and tangent, each by hand.

Activations are numpy arrays (channels, height, width, batch) or, once flat, (features, batch). Numpy's views and the
kernels leave Python's lock alone for nearly all of the time, so that threads with a network each do not wait for each
other. A layer is made for one input shape, batch size and dtype and owns the buffers that it writes: what a method
returns is overwritten by its next call, but for gradients by weights, and a method may overwrite the gradient or
tangent that it is given. `evoloss.engine.convolution_fixed_layers` has the layers without weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from evoloss.engine.convolution_activations import ACTIVATIONS
from evoloss.engine.convolution_pooled_kernels import compile_pooled_kernels
from evoloss.engine.row_dots import add_dot_products, make_blocks, sum_rows
from evoloss.engine.row_products import clear, multiply_rows, scatter_rows

Array = NDArray[Any]
Shape = tuple[int, ...]


class UnsupportedLayerError(Exception):
    """A module or an input shape that no layer here stands for; the text is half a sentence."""


@dataclass(frozen=True)
class Geometry:
    """A convolution in pixels: ``taps`` of the input for output pixel 0, ``row_step`` between those of output rows."""

    channels: int
    pixels: int
    taps: NDArray[np.int64]
    row_step: int
    out_height: int
    out_width: int


class Products:
    """`nn.Conv2d` of images that `Padding` has padded, or `nn.Linear`: a convolution of images of one pixel.

    ``params`` are the weight and, perhaps, the bias.
    """

    def __init__(self, module: nn.Module, shape: Shape, batch: int, dtype: np.dtype[Any]) -> None:
        if isinstance(module, nn.Conv2d):
            channels, height, width = shape
            (rows, columns), (down, right) = module.kernel_size, module.stride
            out = (module.out_channels, (height - rows) // down + 1, (width - columns) // right + 1)
            if height < rows or width < columns:
                raise UnsupportedLayerError("images smaller than a kernel")
            self.shape: Shape = out
        else:
            assert isinstance(module, nn.Linear)
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
        taps = np.arange(channels)[:, None] * self._x_stride + shifts.ravel()
        self._x_taps = taps.ravel()
        # Backward, the columns that reach a pixel are summed at once if the pixels of a row follow each other.
        together = columns if right == 1 else 1
        self._shifts = shifts.reshape(-1, together)[:, 0].copy()
        self._pieces = _list_pieces(piece, together, out[0], batch)
        self._columns = np.arange(together)[:, None] * batch
        self._y_taps = (np.arange(out[0]) * self._y_stride - self._columns).ravel()
        self.has_bias = module.bias is not None
        self.geometry = Geometry(
            channels, height * width, self._x_taps // batch, down * width, out[1], out[2]
        )
        self._y = np.empty((*self.shape, batch), dtype)
        self._dx = np.empty((*shape, batch), dtype)
        self._keep, self._no_bias = np.empty(0, dtype), np.zeros(out[0], dtype)
        self._transposed = np.empty((len(self._shifts), channels, together, out[0]), dtype)
        self._gradient = make_blocks(out[0], channels * rows * columns, dtype=dtype)

    def forward(self, params: Sequence[Array], x: Array) -> Array:
        """Return the output ``y`` for the input ``x``."""
        return self._add_products(params[0], x, params[1] if len(params) == 2 else self._no_bias)

    @staticmethod
    def _flatten(weight: Array) -> Array:
        return np.ascontiguousarray(weight.reshape(len(weight), -1))

    def _load_transposed(self, weight: Array) -> Array:
        count, channels, together, out = self._transposed.shape
        shaped = weight.reshape(out, channels, count, together)
        np.copyto(self._transposed, shaped.transpose(2, 1, 3, 0))
        return self._transposed.reshape(count, channels, -1)

    def _add_products(self, weight: Array, x: Array, bias: Array) -> Array:
        rows = len(weight)
        multiply_rows(
            self._flatten(weight),
            *(x.reshape(-1), self._x_rows, self._x_taps),
            *(self._y.reshape(-1), self._y_rows, self._y_stride),
            *(rows, self._length, bias),
        )
        return self._y

    def backward(
        self, params: Sequence[Array], x: Array, y: Array, dy: Array, wants_dx: bool
    ) -> tuple[list[Array], Array]:
        """Return the gradients by ``params`` and, if it is wanted, by ``x``, given that by ``y``."""
        rows = len(params[0])
        self._gradient.fill(0.0)
        add_dot_products(
            self._gradient,
            *(dy.reshape(-1), self._y_rows, self._y_stride, rows),
            *(x.reshape(-1), self._x_rows, self._x_taps, self._length),
        )
        bias_gradient = np.empty(rows, dy.dtype)
        sum_rows(dy.reshape(rows, -1), bias_gradient)
        if wants_dx:
            self.pull_back(params, y, dy)
        return self._take_gradients(params, bias_gradient), self._dx

    def pull_back(self, params: Sequence[Array], y: Array, dy: Array) -> Array:
        """Return the gradient by the input alone."""
        clear(self._dx.reshape(-1))
        scatter_rows(
            self._load_transposed(params[0]),
            *(dy.reshape(-1), self._y_rows, self._y_taps),
            *(self._dx.reshape(-1), self._x_rows, self._shifts, self._pieces),
            *(self._x_stride, len(self._dx), self._keep),
        )
        return self._dx

    def _take_gradients(self, params: Sequence[Array], bias_gradient: Array) -> list[Array]:
        rows = len(params[0])
        gradient = self._gradient[:rows, : params[0][0].size].copy()
        return [gradient.reshape(params[0].shape), bias_gradient][: len(params)]

    def tangent(
        self,
        params: Sequence[Array],
        dparams: Sequence[Array],
        x: Array,
        y: Array,
        dx: Array | None,
    ) -> Array:
        """Return the derivative of ``y`` along ``dparams`` and, unless ``x`` is constant, ``dx``."""
        dy = self.forward(dparams, x)
        return dy if dx is None else self._add_products(params[0], dx, self._keep)


def _list_pieces(pixels: int, columns: int, channels: int, batch: int) -> NDArray[np.int64]:
    """Return the pieces for `scatter_rows`: stretches of a row of ``dx`` that the same columns of a kernel reach.

    Tap t is column t // ``channels`` and channel t % ``channels`` of a row of ``pixels``.
    """
    pieces: list[list[int]] = []
    for pixel in range(pixels + columns - 1):
        first, end = max(0, pixel - pixels + 1) * channels, min(columns, pixel + 1) * channels
        if pieces and pieces[-1][:2] == [first, end]:
            pieces[-1][3] += batch
        else:
            pieces.append([first, end, pixel * batch, batch])
    return np.array(pieces)


class PooledConvolution(Products):
    """`nn.Conv2d`, an activation and `nn.AvgPool2d` in one: every image row stays in the cache from start to end.

    For windows that tile the images and kernels without a stride between columns. Its output is that of the activation
    *and* that of the pooling.
    """

    def __init__(
        self,
        modules: Sequence[Any],
        shape: Shape,
        batch: int,
        dtype: np.dtype[Any],
    ) -> None:
        super().__init__(modules[0], shape, batch, dtype)
        rows, columns = find_window(modules[2])
        channels, height, width = self.shape
        self.kind = ACTIVATIONS.index(type(modules[1]).__name__)
        self.window = (rows, columns, batch)
        self.shape = (channels, height // rows, width // columns)
        self.num_params = channels * (len(self.geometry.taps) + self.has_bias)
        self._pooled = np.empty((*self.shape, batch), dtype)
        self._row = np.empty((channels, self._length), dtype)
        self._row_taps = (np.arange(channels) * self._length - self._columns).ravel()
        self._no_gradient = np.empty((1, 0), dtype)
        self._convolve_and_pool, self._pool_tangent, self._pool_backward = compile_pooled_kernels()

    @staticmethod
    def fits(modules: Sequence[nn.Module], shape: Shape) -> bool:
        """Tell whether images of ``shape``, already padded, go through these modules in this way."""
        kinds = [type(module) for module in modules]
        if len(kinds) < 3 or kinds[0] is not nn.Conv2d or kinds[2] is not nn.AvgPool2d:
            return False
        convolution, activation, pool = modules[:3]
        assert isinstance(convolution, nn.Conv2d)
        assert isinstance(pool, nn.AvgPool2d)
        rows, columns = find_window(pool)
        height = (shape[1] - convolution.kernel_size[0]) // convolution.stride[0] + 1
        width = shape[2] - convolution.kernel_size[1] + 1
        return (
            type(activation) in (nn.Tanh, nn.Sigmoid, nn.ReLU)
            and convolution.stride[1] == 1
            and pool.divisor_override is None
            and pool.padding in (0, (0, 0))
            and pool.stride in (pool.kernel_size, (rows, columns))
            and height % rows == width % columns == 0
        )

    def _in_rows(self, array: Array) -> Array:
        return array.reshape(*array.shape[:2], -1)

    def forward_all(self, params: Sequence[Array], x: Array) -> tuple[Array, Array]:
        """Return the activation's and the pooling's output."""
        self._convolve_and_pool(
            *(self._flatten(params[0]), x.reshape(-1), self._x_rows, self._x_taps),
            *(self._in_rows(self._y), self._in_rows(self._pooled), self.window, self.kind),
            params[1] if len(params) == 2 else self._no_bias,
        )
        return self._y, self._pooled

    def backward(
        self, params: Sequence[Array], x: Array, y: Array, dy: Array, wants_dx: bool
    ) -> tuple[list[Array], Array]:
        """See `Products`; ``y`` is the activation's output, ``dy`` the gradient by the pooling's."""
        self._gradient.fill(0.0)
        bias_gradient = np.zeros(len(params[0]), dy.dtype)
        dx = self._dx if wants_dx else self._keep
        self._run_backward(params, self._gradient, bias_gradient, x, y, dy, dx)
        return self._take_gradients(params, bias_gradient), self._dx

    def pull_back(self, params: Sequence[Array], y: Array, dy: Array) -> Array:
        """See `Products`; ``y`` and ``dy`` as in `backward`."""
        none = self._no_gradient
        self._run_backward(params, none, none[0], self._keep, y, dy, self._dx)
        return self._dx

    def _run_backward(
        self,
        params: Sequence[Array],
        gradient: Array,
        bias_gradient: Array,
        x: Array,
        y: Array,
        dy: Array,
        dx: Array,
    ) -> None:
        """Add the gradients to those of the arrays that are not empty; ``dx`` is cleared."""
        clear(dx.reshape(-1))
        self._pool_backward(
            *(self._in_rows(dy), self._in_rows(y), self.window, self.kind, self._row),
            *(gradient, bias_gradient, x.reshape(-1), self._x_rows, self._x_taps),
            *(self._load_transposed(params[0]), self._row_taps, dx.reshape(-1)),
            *(self._shifts, self._pieces, self._x_stride, len(self._dx), self._keep),
        )

    def tangent(
        self,
        params: Sequence[Array],
        dparams: Sequence[Array],
        x: Array,
        y: Array,
        dx: Array | None,
    ) -> Array:
        """See `Products`; ``y`` is the activation's output, the result is the pooling's."""
        self._pool_tangent(
            *(self._flatten(dparams[0]), x.reshape(-1), self._flatten(params[0])),
            *(self._keep if dx is None else dx.reshape(-1), self._x_rows, self._x_taps),
            *(self._in_rows(y), self._in_rows(self._pooled), self.window, self.kind, self._row),
            *(dparams[1] if len(params) == 2 else self._no_bias, self._keep),
        )
        return self._pooled


def find_window(pool: nn.AvgPool2d) -> tuple[int, int]:
    """Return the rows and columns of the windows."""
    size = pool.kernel_size
    return size if isinstance(size, tuple) else (size, size)
