"""Products of weights and rows at offsets, compiled with numba: matrix products, and convolution without copies.

The convolutional path is made of them, and the compiled meta-step of linear classifiers; no path owns them.

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

ROWS, TAPS = 6, 4
"""Block of weights in registers; the compiled code below is written out for it."""
LENGTH = 4096
"""Rows are cut at so many elements, for the caches."""
SUM_LENGTH = 512
SUM_STRIDE = SUM_LENGTH + 16
"""Sums are formed so many elements at a time, in a first-level cache, where their rows do not share places as those of
images may."""
_FLAGS = {"contract", "reassoc"}

row_block = numba.njit(
    error_model="numpy", pipeline_class=RowCompiler, forceinline=True, fastmath=_FLAGS
)
_row = numba.njit(error_model="numpy", pipeline_class=RowCompiler, fastmath=_FLAGS)
product_kernel = numba.njit(
    error_model="numpy", pipeline_class=RowCompiler, nogil=True, cache=True, fastmath=_FLAGS
)


def make_blocks(*shape: int, dtype: Any) -> NDArray[Any]:
    """Return zeros (..., rows, taps) with room for whole blocks, as the kernels take weights."""
    rows, taps = shape[-2:]
    return np.zeros((*shape[:-2], rows + -rows % ROWS, taps + -taps % TAPS), dtype=dtype)


def make_sums(dtype: Any) -> NDArray[Any]:
    """Return the room that `multiply_rows` needs, for `ROWS` rows."""
    return np.zeros(ROWS * SUM_STRIDE, dtype=dtype)


def pad_offsets(taps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return tap offsets filled up to whole blocks: with the last, which any zero weight may multiply."""
    return np.pad(taps, (0, -len(taps) % TAPS), mode="edge")


@row_block
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


@_row
def multiply_row(  # type: ignore[no-untyped-def]
    weights, source, source_start, taps, target, target_start, stride, rows, length, sums, bias
):
    """Do what `multiply_rows` does, for one row."""
    for start in range(0, length, SUM_LENGTH):
        n = min(SUM_LENGTH, length - start)
        s = source_start + start
        for m in range(0, weights.shape[0], ROWS):
            count = min(ROWS, rows - m)
            p = target_start + start + m * stride
            for i in range(count):
                total, row = sums[i * SUM_STRIDE :], target[p + i * stride :]
                if bias.size > 0:
                    for j in range(n):
                        total[j] = bias[m + i]
                else:
                    for j in range(n):
                        total[j] = row[j]
            for t in range(0, taps.size, TAPS):
                q0, q1 = s + taps[t], s + taps[t + 1]
                q2, q3 = s + taps[t + 2], s + taps[t + 3]
                _add_block(
                    weights[m : m + ROWS, t : t + TAPS],
                    sums[0:n], sums[SUM_STRIDE : SUM_STRIDE + n],
                    sums[2 * SUM_STRIDE : 2 * SUM_STRIDE + n], sums[3 * SUM_STRIDE : 3 * SUM_STRIDE + n],
                    sums[4 * SUM_STRIDE : 4 * SUM_STRIDE + n], sums[5 * SUM_STRIDE : 5 * SUM_STRIDE + n],
                    source[q0 : q0 + n], source[q1 : q1 + n],
                    source[q2 : q2 + n], source[q3 : q3 + n],
                )  # fmt: skip
            for i in range(count):
                total, row = sums[i * SUM_STRIDE :], target[p + i * stride :]
                for j in range(n):
                    row[j] = total[j]


@product_kernel
def multiply_rows(  # type: ignore[no-untyped-def]
    weights, source, source_starts, taps, target, target_starts, stride, rows, length, sums, bias
):
    """Write to every row of ``target`` the weighted sum of the rows of ``source`` that its taps name.

    For all r and m < ``rows``: ``target[target_starts[r] + m * stride + j]`` = ``bias[m]`` + sum over t of
    ``weights[m, t] * source[source_starts[r] + taps[t] + j]``, j < ``length``.

    Parameters
    ----------
    weights : array (rows, taps), whole blocks (`make_blocks`)
    source, target : flat arrays of the same dtype as ``weights``
    source_starts, target_starts : int64 arrays (R,)
    taps : int64 array, whole blocks (`pad_offsets`)
    stride, rows, length : int
    sums : array (`make_sums`), overwritten
    bias : array (rows,) or (0,)
        If empty, the sum is added to what stands in ``target``.
    """
    for r in range(source_starts.size):
        multiply_row(
            weights, source, source_starts[r], taps,
            target, target_starts[r], stride, rows, length, sums, bias,
        )  # fmt: skip


@_row
def scatter_row(  # type: ignore[no-untyped-def]
    weights, source, source_start, taps, target, target_start, shifts, stride, rows, length, spare
):
    """Do what `scatter_rows` does, for one row."""
    for start in range(0, length, LENGTH):
        n = min(LENGTH, length - start)
        s = source_start + start
        for m in range(0, weights.shape[1], ROWS):
            for k in range(shifts.size):
                p = target_start + start + shifts[k] + m * stride
                p1, p2, p3 = p + stride, p + 2 * stride, p + 3 * stride
                p4, p5 = p + 4 * stride, p + 5 * stride
                a0 = target[p : p + n]
                a1 = target[p1 : p1 + n] if m + 1 < rows else spare[1, :n]
                a2 = target[p2 : p2 + n] if m + 2 < rows else spare[2, :n]
                a3 = target[p3 : p3 + n] if m + 3 < rows else spare[3, :n]
                a4 = target[p4 : p4 + n] if m + 4 < rows else spare[4, :n]
                a5 = target[p5 : p5 + n] if m + 5 < rows else spare[5, :n]
                for t in range(0, taps.size, TAPS):
                    q0, q1 = s + taps[t], s + taps[t + 1]
                    q2, q3 = s + taps[t + 2], s + taps[t + 3]
                    _add_block(
                        weights[k, m : m + ROWS, t : t + TAPS],
                        a0, a1, a2, a3, a4, a5,
                        source[q0 : q0 + n], source[q1 : q1 + n],
                        source[q2 : q2 + n], source[q3 : q3 + n],
                    )  # fmt: skip


@product_kernel
def scatter_rows(  # type: ignore[no-untyped-def]
    weights, source, source_starts, taps, target, target_starts, shifts, stride, rows, length, spare
):
    """Add to rows of ``target`` weighted sums of rows of ``source``: the transpose of `multiply_rows`.

    For all r, k and m < ``rows``: ``target[target_starts[r] + shifts[k] + m * stride + j]`` += sum over t of
    ``weights[k, m, t] * source[source_starts[r] + taps[t] + j]``, j < ``length``.

    Parameters
    ----------
    weights : array (K, rows, taps), whole blocks
    shifts : int64 array (K,)
    spare : array (ROWS, length), written where rows fill up a block; zeros, as denormal numbers would be slow
    """
    for r in range(source_starts.size):
        scatter_row(
            weights, source, source_starts[r], taps,
            target, target_starts[r], shifts, stride, rows, length, spare,
        )  # fmt: skip


@row_block
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


@_row
def dot_row(out, left, left_start, stride, rows, right, right_start, taps, length):  # type: ignore[no-untyped-def]
    """Do what `add_dot_products` does, for one row."""
    for start in range(0, length, LENGTH):
        n = min(LENGTH, length - start)
        s = right_start + start
        for m in range(0, out.shape[0], ROWS):
            p0 = left_start + start + m * stride
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


@product_kernel
def add_dot_products(  # type: ignore[no-untyped-def]
    out, left, left_starts, stride, rows, right, right_starts, taps, length
):
    """Add to ``out`` (rows, taps; whole blocks) the inner products of rows of ``left`` and of ``right``.

    For all m < ``rows``: ``out[m, t]`` += sum over r and j of ``left[left_starts[r] + m * stride + j]``
    * ``right[right_starts[r] + taps[t] + j]``, j < ``length``. What lies beyond ``rows`` has no meaning.
    """
    for r in range(left_starts.size):
        dot_row(out, left, left_starts[r], stride, rows, right, right_starts[r], taps, length)


@product_kernel
def clear(x):  # type: ignore[no-untyped-def]
    """Make every element of a flat array 0."""
    for j in range(x.size):
        x[j] = 0


@product_kernel
def sum_rows(x, out):  # type: ignore[no-untyped-def]
    """Write the sums of the rows of ``x`` (R, N) to ``out`` (R,)."""
    for r in range(out.size):
        row, total = x[r], x.dtype.type(0)
        for j in range(row.size):
            total += row[j]
        out[r] = total
