"""Inner products of rows at offsets, compiled with numba: the weight gradients for `evoloss.engine.row_products`.

A block of `ROWS` x `TAPS` sums stays in registers; the innermost loops are long, contiguous and free of branches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from evoloss.engine.row_products import product_kernel, row_block, row_function

ROWS, TAPS = 6, 4
"""Block of sums in registers; the compiled code below is written out for it."""
LENGTH = 4096
"""Rows are cut at so many elements, for the caches."""


def make_blocks(*shape: int, dtype: Any) -> NDArray[Any]:
    """Return zeros (..., rows, taps) with room for whole blocks, as `add_dot_products` writes."""
    rows, taps = shape[-2:]
    return np.zeros((*shape[:-2], rows + -rows % ROWS, taps + -taps % TAPS), dtype=dtype)


def pad_offsets(taps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return tap offsets filled up to whole blocks with the last."""
    return np.pad(taps, (0, -len(taps) % TAPS), mode="edge")


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


@row_function
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
def sum_rows(x, out):  # type: ignore[no-untyped-def]
    """Write the sums of the rows of ``x`` (R, N) to ``out`` (R,)."""
    for r in range(out.size):
        row, total = x[r], x.dtype.type(0)
        for j in range(row.size):
            total += row[j]
        out[r] = total
