"""Activations of the convolutional path and their derivatives, compiled with numba."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba.extending import overload

from evoloss.engine.row_vectors import product_kernel, row_block

ACTIVATIONS = ("Tanh", "Sigmoid", "ReLU")
"""Classes of `torch.nn` whose derivative is a function of the output; kernels know them by their place here."""


def quick_tanh(x: Any) -> Any:
    """Hyperbolic tangent; in float32 within 6 units in the last place, and cheaper than that of the loss kernels.

    Lambert's continued fraction x / (1 + x^2 / (3 + x^2 / (5 + ...))) to the term 25, as a fraction of two polynomials
    in x^2; its truncation error is 4e-8 at most where tanh is not 1 in float32.
    """
    return np.tanh(x)


@overload(quick_tanh)
def _overload_quick_tanh(x):  # type: ignore[no-untyped-def]
    if x != numba.float32:
        return lambda x: np.tanh(x)

    def tanh32(x):  # type: ignore[no-untyped-def]
        one, bound = np.float32(1), np.float32(9.02)
        v = bound if x > bound else x
        v = -bound if v < -bound else v
        z = v * v
        p = np.float32(1.264885555749117e-13) * z + np.float32(5.179706350792634e-10)
        p = (p * z + np.float32(3.2286836253274086e-07)) * z + np.float32(6.625258799171843e-05)
        p = (p * z + np.float32(0.0052173913043478265)) * z + np.float32(0.14666666666666667)
        q = np.float32(1.1510458557316966e-11) * z + np.float32(1.5193805295658393e-08)
        q = (q * z + np.float32(5.230467473030402e-06)) * z + np.float32(0.0006625258799171842)
        q = (q * z + np.float32(0.03188405797101449)) * z + np.float32(0.48)
        y = v * (p * z + one) / (q * z + one)
        y = one if y > one else y
        return -one if y < -one else y

    return tanh32


@row_block
def activate_row(x, kind):  # type: ignore[no-untyped-def]
    """Replace the elements of a row by their activation; ``kind`` is a place in `ACTIVATIONS`."""
    one, zero = x.dtype.type(1), x.dtype.type(0)
    if kind == 0:
        for j in range(x.size):
            x[j] = quick_tanh(x[j])
    elif kind == 1:
        for j in range(x.size):
            x[j] = one / (one + np.exp(-x[j]))
    else:
        for j in range(x.size):
            x[j] = zero if x[j] < zero else x[j]


@product_kernel
def activate(x, kind):  # type: ignore[no-untyped-def]
    """Do what `activate_row` does, for a flat array."""
    activate_row(x, kind)


@row_block
def slope_row(out, y, kind, factor):  # type: ignore[no-untyped-def]
    """Multiply ``out`` with ``factor`` and the derivative of the activation whose output is ``y``."""
    one, zero = y.dtype.type(1), y.dtype.type(0)
    if kind == 0:
        for j in range(out.size):
            out[j] *= factor * (one - y[j] * y[j])
    elif kind == 1:
        for j in range(out.size):
            out[j] *= factor * (y[j] * (one - y[j]))
    else:
        for j in range(out.size):
            out[j] = factor * out[j] if y[j] > zero else zero


@product_kernel
def multiply_by_slope(dx, y, kind):  # type: ignore[no-untyped-def]
    """Multiply ``dx`` in place with the derivative of the activation whose output is ``y``, both flat."""
    slope_row(dx, y, kind, dx.dtype.type(1))
