"""Meta-steps of linear classifiers on a CPU, all of a step compiled with numba, a candidate after the other.

A candidate's share of the arithmetic is some tens of microseconds, as long as a few calls from Python take: in one call
a population leaves Python's lock alone, and all that belongs to a candidate stays in the second-level cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evoloss.engine import (
    kernel_forward,
    kernel_reverse,
    kernel_rows,
    kernels,
    loss_params,
    row_products,
    row_vectors,
    softmax_kernels,
)
from evoloss.engine.kernel_rows import TERMINALS, digest_sources, kernel, sweep
from evoloss.engine.kernels import (
    PackedPrograms,
    fill_constants,
    make_rows,
    sweep_gradient,
    sweep_mixed,
)
from evoloss.engine.loss_params import LossParams, sweep_adam
from evoloss.engine.row_products import multiply_row
from evoloss.engine.softmax_kernels import sweep_cross_entropy, sweep_jacobian


@sweep
def sweep_candidate(  # type: ignore[no-untyped-def]
    ops, a, b, w, lo, hi, p, y, gram, gram_t, z, targets, taps, taps_t, rate, out,
    u, v, g, direction, stepped, value, bias, keep, inner, top, total, x, d, ap, aq, written,
):  # fmt: skip
    """Return the outer loss of the candidate ``lo:hi`` and add its gradient by the weights to ``out``."""
    classes, batch = g.shape
    factor = w.dtype.type(1.0 / batch)
    sweep_gradient(ops, a, b, w, lo, hi, y, p.reshape(-1), value, g.reshape(-1), x, d)
    sweep_jacobian(p, g, u, -rate * factor, inner)
    for c in range(classes):
        for j in range(z.shape[1]):
            stepped[c, j] = z[c, j]
    flat = stepped.reshape(-1)
    multiply_row(u, 0, gram_t, 0, taps, flat, 0, z.shape[1], classes, z.shape[1], keep)
    outer_loss = sweep_cross_entropy(stepped, targets, v, top, total)
    flat = direction.reshape(-1)
    multiply_row(v, 0, gram, 0, taps_t, flat, 0, batch, classes, batch, bias)
    sweep_jacobian(p, direction, g, -rate * factor, inner)
    sweep_mixed(
        ops, a, b, w, lo, hi, y, p.reshape(-1), g.reshape(-1), out, x, d, ap, aq, written
    )  # fmt: skip
    return outer_loss


@functools.cache
def _compile() -> tuple[Callable[..., None], Callable[..., None]]:
    digest = digest_sources(
        *(row_products, row_vectors, kernel_forward, kernel_reverse),
        *(kernel_rows, kernels, softmax_kernels, loss_params),
    )

    @kernel
    def differentiate(  # type: ignore[no-untyped-def]
        ops, a, b, w, offsets, p, y, gram, gram_t, z, targets, taps, taps_t, rate, out,
        u, v, g, direction, stepped, value, bias, keep, inner, top, total, rows, written, values,
    ):  # fmt: skip
        _ = digest
        x, d, ap, aq = rows[0], rows[1], rows[2], rows[3]
        fill_constants(x, d)
        for i in range(offsets.shape[0] - 1):
            values[i] = sweep_candidate(
                ops, a, b, w, offsets[i], offsets[i + 1], p, y, gram, gram_t, z, targets, taps, taps_t, rate, out,
                u, v, g, direction, stepped, value, bias, keep, inner, top, total, x, d, ap, aq, written,
            )  # fmt: skip

    @kernel
    def search(  # type: ignore[no-untyped-def]
        ops, a, b, w, offsets, p, y, gram, gram_t, z, targets, taps, taps_t, rate, out,
        u, v, g, direction, stepped, value, bias, keep, inner, top, total, rows, written,
        alive, trainable, weights, first, second, meta_rate, root,
    ):  # fmt: skip
        _ = digest
        x, d, ap, aq = rows[0], rows[1], rows[2], rows[3]
        fill_constants(x, d)
        for i in range(alive.size):
            if not alive[i]:
                continue
            lo, hi = offsets[i], offsets[i + 1]
            for k in range(lo, hi):
                out[k] = 0.0
            sweep_candidate(
                ops, a, b, w, lo, hi, p, y, gram, gram_t, z, targets, taps, taps_t, rate, out,
                u, v, g, direction, stepped, value, bias, keep, inner, top, total, x, d, ap, aq, written,
            )  # fmt: skip
            alive[i] = sweep_adam(
                lo, hi, out, trainable, weights, first, second, meta_rate, root
            )  # fmt: skip
            for k in range(lo, hi):
                w[k] = weights[k]

    return differentiate, search


@functools.lru_cache(8)
def row_offsets(rows: int, length: int) -> NDArray[np.int64]:
    """Return where the rows of a matrix start."""
    offsets = np.arange(rows) * length
    offsets.flags.writeable = False
    return offsets


@dataclass(frozen=True)
class LinearArrays:
    """What a meta-step of linear classifiers does not take from the losses, contiguous and of their weights' dtype.

    ``predictions`` and ``inner_targets`` (C, B) are the softmax at the initial parameters on the inner batch and its
    one-hot labels; ``gram`` (V, B) and ``gram_t`` (B, V) the inner products of the outer and inner batch's inputs,
    plus 1; ``outer_outputs`` and ``outer_targets`` (C, V) the logits at the initial (with weight decay: shrunk)
    parameters on the outer batch and its one-hot labels.
    """

    predictions: NDArray[Any]
    inner_targets: NDArray[Any]
    gram: NDArray[Any]
    gram_t: NDArray[Any]
    outer_outputs: NDArray[Any]
    outer_targets: NDArray[Any]

    @functools.cached_property
    def arguments(self) -> tuple[NDArray[Any], ...]:
        """What the compiled functions take, from ``p`` to ``taps_t``."""
        batch, outer = self.predictions.shape[1], self.outer_outputs.shape[1]
        return (
            *(self.predictions, self.inner_targets.reshape(-1)),
            *(self.gram.reshape(-1), self.gram_t.reshape(-1)),
            *(self.outer_outputs, self.outer_targets),
            *(row_offsets(batch, outer), row_offsets(outer, batch)),
        )

    def make_workspace(self, packed: PackedPrograms) -> tuple[NDArray[Any], ...]:
        """Return the arrays that the compiled functions overwrite, from ``u`` to ``written``."""
        dtype = packed.weights.dtype
        classes, batch = self.predictions.shape
        outer = self.outer_outputs.shape[1]
        g, direction = np.empty((2, classes, batch), dtype)
        rows = make_rows(packed, 4, TERMINALS)
        return (
            *(np.empty((classes, batch), dtype), np.empty((classes, outer), dtype)),
            *(g, direction, np.empty((classes, outer), dtype), np.empty(classes * batch, dtype)),
            *(np.zeros(classes, dtype), np.empty(0, dtype)),
            *(np.empty(batch, dtype), np.empty(outer, dtype), np.empty(outer, dtype)),
            *(rows, np.empty(rows.shape[1], dtype=np.bool_)),
        )


def linear_meta_gradients(
    packed: PackedPrograms, rate: float, arrays: LinearArrays
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return outer losses (P,) and their gradients by all instruction weights, shape ``(instructions,)``.

    ``rate`` is the learning rate of the inner step.
    """
    values, out = np.empty(len(packed), packed.weights.dtype), np.zeros(len(packed.ops))
    differentiate, _ = _compile()
    differentiate(
        *(*packed.arrays, *arrays.arguments, values.dtype.type(rate), out),
        *(*arrays.make_workspace(packed), values),
    )
    return values, out


def take_linear_meta_steps(
    packed: PackedPrograms, rate: float, steps: Sequence[LinearArrays], params: LossParams
) -> None:
    """Take meta-steps on ``params`` and ``packed.weights``, one call for each of ``steps``, all of the same shapes."""
    _, search = _compile()
    out, workspace = np.empty(len(packed.ops)), steps[0].make_workspace(packed)
    rate = packed.weights.dtype.type(rate)
    for arrays in steps:
        search(
            *(*packed.arrays, *arrays.arguments, rate, out, *workspace),
            *(params.alive, *params.arrays, *params.next_step()),
        )
