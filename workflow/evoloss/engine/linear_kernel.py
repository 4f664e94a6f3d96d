"""One meta-step of linear classifiers on a CPU, all of it compiled with numba, a candidate after the other.

A candidate's share of the arithmetic is some tens of microseconds, as long as a few calls from Python take: in one call
a population leaves Python's lock alone, and all that belongs to a candidate stays in the second-level cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evoloss.engine import (
    kernel_forward,
    kernel_reverse,
    kernel_rows,
    kernels,
    row_products,
    softmax_kernels,
)
from evoloss.engine.kernel_rows import TERMINALS, digest_sources, kernel
from evoloss.engine.kernels import (
    PackedPrograms,
    fill_constants,
    make_rows,
    sweep_gradient,
    sweep_mixed,
)
from evoloss.engine.row_products import (
    make_blocks,
    make_sums,
    multiply_row,
    pad_offsets,
)
from evoloss.engine.softmax_kernels import sweep_cross_entropy, sweep_jacobian


@functools.cache
def _compile() -> Callable[..., None]:
    digest = digest_sources(
        *(row_products, kernel_forward, kernel_reverse),
        *(kernel_rows, kernels, softmax_kernels),
    )

    @kernel
    def differentiate(  # type: ignore[no-untyped-def]
        ops, a, b, w, offsets, p, y, gram, gram_t, z, targets, taps, taps_t, rate,
        values, out, u, v, g, direction, stepped, value, sums, bias, keep, inner, top, total, rows, written,
    ):  # fmt: skip
        _ = digest
        classes, batch = g.shape
        factor = w.dtype.type(1.0 / batch)
        x, d, ap, aq = rows[0], rows[1], rows[2], rows[3]
        fill_constants(x, d)
        for i in range(offsets.shape[0] - 1):
            lo, hi = offsets[i], offsets[i + 1]
            sweep_gradient(ops, a, b, w, lo, hi, y, p.reshape(-1), value, g.reshape(-1), x, d)
            sweep_jacobian(p, g, u, -rate * factor, inner)
            for c in range(classes):
                for j in range(z.shape[1]):
                    stepped[c, j] = z[c, j]
            flat = stepped.reshape(-1)
            multiply_row(u, gram_t, 0, taps, flat, 0, z.shape[1], classes, z.shape[1], sums, keep)
            values[i] = sweep_cross_entropy(stepped, targets, v, top, total)
            flat = direction.reshape(-1)
            multiply_row(v, gram, 0, taps_t, flat, 0, batch, classes, batch, sums, bias)
            sweep_jacobian(p, direction, g, -rate * factor, inner)
            sweep_mixed(
                ops, a, b, w, lo, hi, y, p.reshape(-1), g.reshape(-1), out, x, d, ap, aq, written
            )  # fmt: skip

    return differentiate


@functools.lru_cache(8)
def row_offsets(rows: int, length: int) -> NDArray[np.int64]:
    """Return where the rows of a matrix start, filled up to whole blocks."""
    offsets = pad_offsets(np.arange(rows) * length)
    offsets.flags.writeable = False
    return offsets


def linear_meta_gradients(
    packed: PackedPrograms,
    rate: float,
    predictions: NDArray[Any],
    inner_targets: NDArray[Any],
    gram: NDArray[Any],
    gram_t: NDArray[Any],
    outer_outputs: NDArray[Any],
    outer_targets: NDArray[Any],
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return outer losses (P,) and their gradients by all instruction weights, shape ``(instructions,)``.

    Parameters
    ----------
    rate : float
        Learning rate of the inner step.
    predictions, inner_targets : arrays (C, B)
        Softmax at the initial parameters on the inner batch, and its one-hot labels.
    gram, gram_t : arrays (V, B) and (B, V)
        Inner products of the outer and inner batch's inputs, plus 1, and their transpose.
    outer_outputs, outer_targets : arrays (C, V)
        Logits at the initial (with weight decay: shrunk) parameters on the outer batch, and its one-hot labels.

    All are contiguous and of the dtype of ``packed.weights``.
    """
    dtype = packed.weights.dtype
    classes, batch = predictions.shape
    outer = outer_outputs.shape[1]
    values, out = np.empty(len(packed), dtype), np.zeros(len(packed.ops))
    g, direction = np.empty((2, classes, batch), dtype)
    rows = make_rows(packed, 4, TERMINALS)
    _compile()(
        *(*packed.arrays, predictions, inner_targets.reshape(-1)),
        *(gram.reshape(-1), gram_t.reshape(-1), outer_outputs, outer_targets),
        *(row_offsets(batch, outer), row_offsets(outer, batch)),
        *(dtype.type(rate), values, out),
        *(make_blocks(classes, batch, dtype=dtype), make_blocks(classes, outer, dtype=dtype)),
        *(g, direction, np.empty((classes, outer), dtype), np.empty(classes * batch, dtype)),
        *(make_sums(dtype), np.zeros(classes, dtype), np.empty(0, dtype)),
        *(np.empty(batch, dtype), np.empty(outer, dtype), np.empty(outer, dtype)),
        *(rows, np.empty(rows.shape[1], dtype=np.bool_)),
    )
    return values, out
