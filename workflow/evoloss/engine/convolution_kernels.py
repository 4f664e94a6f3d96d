"""Kernels of the convolutional path, compiled with numba: convolution as products of weights and shifted rows.

Images are stored batch-innermost, (channels, height, width, batch), so one row of an image is contiguous over columns
*and* samples, and a kernel tap is a shift of the whole row. A convolution, its transpose and its weight gradient are
then matrix products whose operands are rows at given offsets: no copy of the input (im2col) is made, the innermost
loops are long, contiguous and free of branches, and `ROWS` x `TAPS` weights stay in registers.

``contract`` and ``reassoc`` change rounding alone; NaN and infinity stay what they are.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from evoloss.engine.kernel_rows import RowCompiler

ACTIVATIONS = ("Tanh", "Sigmoid", "ReLU")
"""Classes of `torch.nn` whose derivative is a function of the output; kernels know them by their place here."""
ROWS, TAPS = 6, 4
"""Block of weights in registers; the compiled code below is written out for it."""
LENGTH = 4096
"""Rows are cut at so many elements, for the caches."""
_FLAGS = {"contract", "reassoc"}
# Above, tanh is 1 in float32; the fraction is accurate below.
_TANH_RANGE = 9.02
# Lambert's continued fraction x / (1 + x^2 / (3 + x^2 / (5 + ...))) to the term 25, as a fraction of two polynomials
# in x^2. In float32 it is within 6 units in the last place on the range; its truncation error is 4e-8 at most.
_TANH_UPPER = (
    1.0, 0.14666666666666667, 0.0052173913043478265, 6.625258799171843e-05,
    3.2286836253274086e-07, 5.179706350792634e-10, 1.264885555749117e-13,
)  # fmt: skip
_TANH_LOWER = (
    1.0, 0.48, 0.03188405797101449, 0.0006625258799171842,
    5.230467473030402e-06, 1.5193805295658393e-08, 1.1510458557316966e-11,
)  # fmt: skip


_row_block = numba.njit(
    error_model="numpy", pipeline_class=RowCompiler, forceinline=True, fastmath=_FLAGS
)
_kernel = numba.njit(
    error_model="numpy", pipeline_class=RowCompiler, nogil=True, cache=True, fastmath=_FLAGS
)


def make_blocks(*shape: int, dtype: Any) -> NDArray[Any]:
    """Return zeros (..., rows, taps) with room for whole blocks, as the kernels take weights."""
    rows, taps = shape[-2:]
    return np.zeros((*shape[:-2], rows + -rows % ROWS, taps + -taps % TAPS), dtype=dtype)


def pad_offsets(taps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return tap offsets filled up to whole blocks: with the last, which any zero weight may multiply."""
    return np.pad(taps, (0, -len(taps) % TAPS), mode="edge")


@_row_block
def _add_block(w, a0, a1, a2, a3, a4, a5, x0, x1, x2, x3):  # type: ignore[no-untyped-def]
    """Add w (ROWS, TAPS) @ x to the rows a."""
    # named, as the compiler cannot know that writing a leaves w alone
    w00, w01, w02, w03 = w[0, 0], w[0, 1], w[0, 2], w[0, 3]
    w10, w11, w12, w13 = w[1, 0], w[1, 1], w[1, 2], w[1, 3]
    w20, w21, w22, w23 = w[2, 0], w[2, 1], w[2, 2], w[2, 3]
    w30, w31, w32, w33 = w[3, 0], w[3, 1], w[3, 2], w[3, 3]
    w40, w41, w42, w43 = w[4, 0], w[4, 1], w[4, 2], w[4, 3]
    w50, w51, w52, w53 = w[5, 0], w[5, 1], w[5, 2], w[5, 3]
    for j in range(a0.size):
        v0, v1, v2, v3 = x0[j], x1[j], x2[j], x3[j]
        a0[j] += w00 * v0 + w01 * v1 + w02 * v2 + w03 * v3
        a1[j] += w10 * v0 + w11 * v1 + w12 * v2 + w13 * v3
        a2[j] += w20 * v0 + w21 * v1 + w22 * v2 + w23 * v3
        a3[j] += w30 * v0 + w31 * v1 + w32 * v2 + w33 * v3
        a4[j] += w40 * v0 + w41 * v1 + w42 * v2 + w43 * v3
        a5[j] += w50 * v0 + w51 * v1 + w52 * v2 + w53 * v3


@_kernel
def add_products(  # type: ignore[no-untyped-def]
    weights,
    source,
    source_starts,
    taps,
    target,
    target_starts,
    shifts,
    stride,
    rows,
    length,
    spare,
    bias,
):
    """Add to every row of ``target`` the weighted sum of the rows of ``source`` that its taps name.

    For all r, k and m < ``rows``: ``target[target_starts[r] + shifts[k] + m * stride + j]`` += sum over t of
    ``weights[k, m, t] * source[source_starts[r] + taps[t] + j]``, j < ``length``.

    Parameters
    ----------
    weights : array (K, rows, taps), whole blocks (`make_blocks`)
    source, target : flat arrays of the same dtype as ``weights``
    source_starts, target_starts : int64 arrays (R,)
    taps : int64 array, whole blocks (`pad_offsets`)
    shifts : int64 array (K,)
    stride, rows, length : int
    spare : array (ROWS, length), written where rows fill up a block; zeros, as denormal numbers would be slow
    bias : array (rows,) or (0,)
        What the target is before: ``bias[m]``, for K = 1, or if empty what stands there.
    """
    for r in range(source_starts.size):
        for start in range(0, length, LENGTH):
            n = min(LENGTH, length - start)
            s = source_starts[r] + start
            for m in range(0, weights.shape[1], ROWS):
                for k in range(shifts.size):
                    p = target_starts[r] + start + shifts[k] + m * stride
                    p1, p2, p3 = p + stride, p + 2 * stride, p + 3 * stride
                    p4, p5 = p + 4 * stride, p + 5 * stride
                    a0 = target[p : p + n]
                    a1 = target[p1 : p1 + n] if m + 1 < rows else spare[1, :n]
                    a2 = target[p2 : p2 + n] if m + 2 < rows else spare[2, :n]
                    a3 = target[p3 : p3 + n] if m + 3 < rows else spare[3, :n]
                    a4 = target[p4 : p4 + n] if m + 4 < rows else spare[4, :n]
                    a5 = target[p5 : p5 + n] if m + 5 < rows else spare[5, :n]
                    if bias.size > 0:
                        for i in range(m, min(m + ROWS, rows)):
                            row = target[p + (i - m) * stride :]
                            for j in range(n):
                                row[j] = bias[i]
                    for t in range(0, taps.size, TAPS):
                        q0, q1 = s + taps[t], s + taps[t + 1]
                        q2, q3 = s + taps[t + 2], s + taps[t + 3]
                        _add_block(
                            weights[k, m : m + ROWS, t : t + TAPS],
                            a0, a1, a2, a3, a4, a5,
                            source[q0 : q0 + n], source[q1 : q1 + n],
                            source[q2 : q2 + n], source[q3 : q3 + n],
                        )  # fmt: skip


@_row_block
def _dot_block(out, y0, y1, y2, y3, y4, y5, x0, x1, x2, x3):  # type: ignore[no-untyped-def]
    """Add y @ x^T to out (ROWS, TAPS)."""
    s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = out.dtype.type(0)
    s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = out.dtype.type(0)
    s40 = s41 = s42 = s43 = s50 = s51 = s52 = s53 = out.dtype.type(0)
    for j in range(y0.size):
        v0, v1, v2, v3 = x0[j], x1[j], x2[j], x3[j]
        y = y0[j]
        s00, s01, s02, s03 = s00 + y * v0, s01 + y * v1, s02 + y * v2, s03 + y * v3
        y = y1[j]
        s10, s11, s12, s13 = s10 + y * v0, s11 + y * v1, s12 + y * v2, s13 + y * v3
        y = y2[j]
        s20, s21, s22, s23 = s20 + y * v0, s21 + y * v1, s22 + y * v2, s23 + y * v3
        y = y3[j]
        s30, s31, s32, s33 = s30 + y * v0, s31 + y * v1, s32 + y * v2, s33 + y * v3
        y = y4[j]
        s40, s41, s42, s43 = s40 + y * v0, s41 + y * v1, s42 + y * v2, s43 + y * v3
        y = y5[j]
        s50, s51, s52, s53 = s50 + y * v0, s51 + y * v1, s52 + y * v2, s53 + y * v3
    for m, sums in enumerate(
        (
            (s00, s01, s02, s03), (s10, s11, s12, s13), (s20, s21, s22, s23),
            (s30, s31, s32, s33), (s40, s41, s42, s43), (s50, s51, s52, s53),
        )
    ):  # fmt: skip
        for t in range(TAPS):
            out[m, t] += sums[t]


@_kernel
def add_dot_products(  # type: ignore[no-untyped-def]
    out, left, left_starts, stride, rows, right, right_starts, taps, length
):
    """Add to ``out`` (rows, taps; whole blocks) the inner products of rows of ``left`` and of ``right``.

    For all m < ``rows``: ``out[m, t]`` += sum over r and j of ``left[left_starts[r] + m * stride + j]``
    * ``right[right_starts[r] + taps[t] + j]``, j < ``length``. What lies beyond ``rows`` has no meaning.
    """
    for r in range(left_starts.size):
        for start in range(0, length, LENGTH):
            n = min(LENGTH, length - start)
            s = right_starts[r] + start
            for m in range(0, out.shape[0], ROWS):
                p0 = left_starts[r] + start + m * stride
                last = p0 + (min(rows, m + ROWS) - m - 1) * stride
                p1, p2, p3 = p0 + stride, p0 + 2 * stride, p0 + 3 * stride
                p1, p2, p3 = min(p1, last), min(p2, last), min(p3, last)
                p4, p5 = min(p0 + 4 * stride, last), min(p0 + 5 * stride, last)
                for t in range(0, taps.size, TAPS):
                    q0, q1 = s + taps[t], s + taps[t + 1]
                    q2, q3 = s + taps[t + 2], s + taps[t + 3]
                    _dot_block(
                        out[m : m + ROWS, t : t + TAPS],
                        left[p0 : p0 + n], left[p1 : p1 + n], left[p2 : p2 + n],
                        left[p3 : p3 + n], left[p4 : p4 + n], left[p5 : p5 + n],
                        right[q0 : q0 + n], right[q1 : q1 + n],
                        right[q2 : q2 + n], right[q3 : q3 + n],
                    )  # fmt: skip


@_row_block
def _add_scaled(out, dx, y, kind, factor):  # type: ignore[no-untyped-def]
    """Add ``factor * dx * (derivative of the activation whose output is y)``; ``kind`` is a place in `ACTIVATIONS`."""
    one, zero = y.dtype.type(1), y.dtype.type(0)
    if kind == 0:
        for j in range(out.size):
            out[j] += factor * dx[j] * (one - y[j] * y[j])
    elif kind == 1:
        for j in range(out.size):
            out[j] += factor * dx[j] * (y[j] * (one - y[j]))
    else:
        for j in range(out.size):
            out[j] += factor * (dx[j] if y[j] > zero else zero)


@_kernel
def pool_activated(y, out, rows, columns):  # type: ignore[no-untyped-def]
    """Write to ``out`` (C, H / rows, W / columns, B) the means of ``y`` (C, H, W, B) over windows."""
    factor = y.dtype.type(1.0 / (rows * columns))
    for c in range(out.shape[0]):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                mean = out[c, i, j]
                for e in range(mean.size):
                    mean[e] = 0
                for k in range(rows * columns):
                    row = y[c, i * rows + k // columns, j * columns + k % columns]
                    for e in range(mean.size):
                        mean[e] += factor * row[e]


@_kernel
def pool_tangent(dx, y, out, rows, columns, kind):  # type: ignore[no-untyped-def]
    """Write to ``out`` the derivative of `pool_activated` along ``dx``, which is that before the activation."""
    factor = y.dtype.type(1.0 / (rows * columns))
    for c in range(out.shape[0]):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                mean = out[c, i, j]
                for e in range(mean.size):
                    mean[e] = 0
                for k in range(rows * columns):
                    h, w = i * rows + k // columns, j * columns + k % columns
                    _add_scaled(mean, dx[c, h, w], y[c, h, w], kind, factor)


@_kernel
def spread_pooled(dy, y, dx, rows, columns, kind):  # type: ignore[no-untyped-def]
    """Write to ``dx`` the gradient before the activation, given that by the output of `pool_activated`."""
    factor = y.dtype.type(1.0 / (rows * columns))
    for c in range(dx.shape[0]):
        for h in range(dx.shape[1]):
            for w in range(dx.shape[2]):
                out = dx[c, h, w]
                for e in range(out.size):
                    out[e] = 0
                _add_scaled(out, dy[c, h // rows, w // columns], y[c, h, w], kind, factor)


@_kernel
def clear(x):  # type: ignore[no-untyped-def]
    """Make every element of a flat array 0."""
    for j in range(x.size):
        x[j] = 0


@_kernel
def sum_rows(x, out):  # type: ignore[no-untyped-def]
    """Write the sums of the rows of ``x`` (R, N) to ``out`` (R,)."""
    for r in range(out.size):
        row, total = x[r], x.dtype.type(0)
        for j in range(row.size):
            total += row[j]
        out[r] = total


@_kernel
def multiply_by_slope(dx, y, kind):  # type: ignore[no-untyped-def]
    """Multiply ``dx`` in place with the derivative of the activation whose output is ``y``, both flat."""
    one, zero = y.dtype.type(1), y.dtype.type(0)
    if kind == 0:
        for j in range(dx.size):
            dx[j] *= one - y[j] * y[j]
    elif kind == 1:
        for j in range(dx.size):
            dx[j] *= y[j] * (one - y[j])
    else:
        for j in range(dx.size):
            dx[j] = dx[j] if y[j] > zero else zero


@_kernel
def _tanh(x, upper, lower):  # type: ignore[no-untyped-def]
    """In place: of two arrays that may be one the compiler would make no vector code."""
    one = np.float32(1)
    bound = np.float32(_TANH_RANGE)
    for j in range(x.size):
        v = x[j]
        v = bound if v > bound else v
        v = -bound if v < -bound else v
        z = v * v
        p, q = np.float32(upper[6]), np.float32(lower[6])
        p, q = p * z + np.float32(upper[5]), q * z + np.float32(lower[5])
        p, q = p * z + np.float32(upper[4]), q * z + np.float32(lower[4])
        p, q = p * z + np.float32(upper[3]), q * z + np.float32(lower[3])
        p, q = p * z + np.float32(upper[2]), q * z + np.float32(lower[2])
        p, q = p * z + np.float32(upper[1]), q * z + np.float32(lower[1])
        p, q = p * z + np.float32(upper[0]), q * z + np.float32(lower[0])
        y = v * p / q
        y = one if y > one else y
        x[j] = -one if y < -one else y


def compute_tanh(x: NDArray[Any]) -> None:
    """Replace the elements of a contiguous array by their tanh.

    In float32 by a rational function, ten times as fast as torch's where its vector library has no code for the
    processor.
    """
    if x.dtype != np.float32:
        np.tanh(x, out=x)
        return
    _tanh(x.reshape(-1), _TANH_UPPER, _TANH_LOWER)
