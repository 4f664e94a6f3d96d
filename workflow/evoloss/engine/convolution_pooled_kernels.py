"""Kernels for convolution, activation and average pooling in one: an image row at a time, while it is in the cache.

All three share arguments. ``window`` is (rows, columns, batch); ``kind`` a place in `ACTIVATIONS`; ``y`` (C, H, W * B)
the activation's output; ``pooled`` (C, H / rows, W / columns * B) that of the pooling; ``row`` (C, W * B) is
overwritten. The others are as `evoloss.engine.row_products` takes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from evoloss.engine import (
    convolution_activations,
    kernel_rows,
    row_dots,
    row_products,
    row_vectors,
)
from evoloss.engine.convolution_activations import activate_row, slope_row
from evoloss.engine.kernel_rows import digest_sources
from evoloss.engine.row_dots import dot_row
from evoloss.engine.row_products import multiply_row, scatter_row
from evoloss.engine.row_vectors import product_kernel, row_block


@row_block
def _pool_row(out, x, columns, batch, factor):  # type: ignore[no-untyped-def]
    """Add to ``out`` (W / columns * B,) ``factor`` times the sums of ``columns`` neighbours in ``x`` (W * B,)."""
    for j in range(out.size // batch):
        target = out[j * batch : (j + 1) * batch]
        for k in range(columns):
            source = x[(j * columns + k) * batch : (j * columns + k + 1) * batch]
            for e in range(batch):
                target[e] += factor * source[e]


@row_block
def _clear_row(x):  # type: ignore[no-untyped-def]
    for j in range(x.size):
        x[j] = 0


@functools.cache
def compile_pooled_kernels() -> tuple[
    Callable[..., None], Callable[..., None], Callable[..., None]
]:
    """Return ``convolve_and_pool``, ``pool_tangent`` and ``pool_backward``."""
    digest = digest_sources(
        convolution_activations, kernel_rows, row_dots, row_products, row_vectors
    )

    @product_kernel
    def convolve_and_pool(weights, x, x_starts, taps, y, pooled, window, kind, bias):  # type: ignore[no-untyped-def]
        """Write ``y`` and ``pooled``."""
        _ = digest
        rows, columns, batch = window
        channels, height, length = y.shape
        factor = y.dtype.type(1.0 / (rows * columns))
        flat = y.reshape(-1)
        for h in range(height):
            multiply_row(
                weights, 0, x, x_starts[h], taps,
                flat, h * length, height * length, channels, length, bias,
            )  # fmt: skip
            for c in range(channels):
                activate_row(y[c, h], kind)
                if h % rows == 0:
                    _clear_row(pooled[c, h // rows])
                _pool_row(pooled[c, h // rows], y[c, h], columns, batch, factor)

    @product_kernel
    def pool_tangent(  # type: ignore[no-untyped-def]
        dweights, x, weights, dx, x_starts, taps, y, pooled, window, kind, row, dbias, keep
    ):
        """Write to ``pooled`` its derivative along ``dweights``, ``dbias`` and, if not empty, ``dx``."""
        _ = digest
        rows, columns, batch = window
        channels, height, length = y.shape
        factor, one = y.dtype.type(1.0 / (rows * columns)), y.dtype.type(1)
        flat = row.reshape(-1)
        for h in range(height):
            start = x_starts[h]
            multiply_row(
                dweights, 0, x, start, taps, flat, 0, length, channels, length, dbias
            )  # fmt: skip
            if dx.size > 0:
                multiply_row(
                    weights, 0, dx, start, taps, flat, 0, length, channels, length, keep
                )  # fmt: skip
            for c in range(channels):
                slope_row(row[c], y[c, h], kind, factor)
                if h % rows == 0:
                    _clear_row(pooled[c, h // rows])
                _pool_row(pooled[c, h // rows], row[c], columns, batch, one)

    @product_kernel
    def pool_backward(  # type: ignore[no-untyped-def]
        dy, y, window, kind, row, gradient, bias_gradient, x, x_starts, x_taps,
        transposed, row_taps, dx, shifts, pieces, x_stride, x_channels, keep,
    ):  # fmt: skip
        """Add the gradients by weight, bias and ``x`` (to ``dx``) where not empty, given that by ``pooled``, ``dy``."""
        _ = digest
        rows, columns, batch = window
        channels, height, length = y.shape
        factor = y.dtype.type(1.0 / (rows * columns))
        flat = row.reshape(-1)
        for h in range(height):
            for c in range(channels):
                out, upstream = row[c], dy[c, h // rows]
                for w in range(length // batch):
                    source = upstream[w // columns * batch : (w // columns + 1) * batch]
                    target = out[w * batch : (w + 1) * batch]
                    for e in range(batch):
                        target[e] = source[e]
                slope_row(out, y[c, h], kind, factor)
                if gradient.size > 0:
                    total = y.dtype.type(0)
                    for j in range(length):
                        total += out[j]
                    bias_gradient[c] += total
            if gradient.size > 0:
                dot_row(gradient, flat, 0, length, channels, x, x_starts[h], x_taps, length)
            if dx.size > 0:
                scatter_row(
                    transposed, flat, 0, row_taps, dx, x_starts[h], shifts, pieces, x_stride, x_channels, keep
                )  # fmt: skip

    return convolve_and_pool, pool_tangent, pool_backward
