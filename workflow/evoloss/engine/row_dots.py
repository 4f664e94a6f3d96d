"""Inner products of rows at offsets, compiled with numba: the weight gradients for `evoloss.engine.row_products`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from evoloss.engine.row_vectors import (
    I64,
    VectorBuilder,
    find_registers,
    product_kernel,
    row_function,
)

HEIGHTS = (6, 4)
"""Rows of the blocks of sums that stay in registers: the second for a multiple of that alone."""
LENGTH = 1280
"""Rows are cut to pieces of at most so many elements, for the caches."""


def make_blocks(*shape: int, dtype: Any) -> NDArray[Any]:
    """Return zeros (..., rows, taps) with room for whole blocks, as `add_dot_products` writes."""
    # of 6, 4, 3 or 2 rows and taps
    rows, taps = (size + -size % 12 for size in shape[-2:])
    return np.zeros((*shape[:-2], rows, taps), dtype=dtype)


def _make_block(num_rows: int, num_taps: int, num_bytes: int) -> Callable[..., None]:
    """Return the function that adds to ``out[m:, t:]`` the inner products of some rows and taps.

    Rows after ``last`` are taken to be that one, taps after the last one likewise.
    """

    @intrinsic
    def add_dots(  # type: ignore[no-untyped-def]
        typing, out, m, t, left, left_start, stride, last, right, right_start, taps, length
    ):
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            build = VectorBuilder(context, builder, signature, arguments, num_bytes)
            out, left, right, taps = (build.find(i) for i in (0, 3, 7, 9))
            m, t, left_start, stride, last, right_start, length = (
                arguments[i] for i in (1, 2, 4, 5, 6, 8, 10)
            )
            last_tap = builder.sub(builder.extract_value(taps.shape, 0), I64(1))
            rows = [builder.add(m, I64(i)) for i in range(num_rows)]
            lefts = [
                builder.add(left_start, builder.mul(build.find_least(row, last), stride))
                for row in rows
            ]
            rights = []
            for k in range(num_taps):
                tap = build.find_least(builder.add(t, I64(k)), last_tap)
                rights.append(builder.add(right_start, build.read(taps, tap)))
            sums = [build.make_sum() for _ in range(num_rows * num_taps)]

            def add(place: Any, mask: Any = None) -> None:
                xs = [build.load(right, builder.add(start, place), mask) for start in rights]
                for i, start in enumerate(lefts):
                    y = build.load(left, builder.add(start, place), mask)
                    for x, total in zip(xs, sums[i * num_taps :], strict=False):
                        builder.store(build.multiply_add(y, x, builder.load(total)), total)

            rest = builder.and_(length, I64(build.lanes - 1))
            whole = builder.sub(length, rest)
            with cgutils.for_range_slice(builder, I64(0), whole, I64(build.lanes), I64) as (j, _):
                add(j)
            with builder.if_then(builder.icmp_signed(">", rest, I64(0))):
                add(whole, build.make_mask(rest))
            totals = build.sum_lanes([builder.load(total) for total in sums])
            width = builder.extract_value(out.shape, 1)
            for i, row in enumerate(rows):
                k = 0
                while k < num_taps:  # a row's sums may go on in the next vector
                    group, lane = divmod(i * num_taps + k, build.lanes)
                    end = min(build.lanes, lane + num_taps - k)
                    offset = builder.add(builder.mul(row, width), builder.add(t, I64(k)))
                    build.add_lanes(totals[group], range(lane, end), out, offset)
                    k += end - lane
            return context.get_dummy_value()

        arguments = (out, m, t, left, left_start, stride, last, right, right_start, taps, length)
        return types.void(*arguments), generate

    return add_dots


def make_dot_row(num_bytes: int, num_sums: int) -> Callable[..., None]:
    """Return what does `add_dot_products` for one row; see `find_registers`."""
    tall, wide = HEIGHTS
    tall_taps, wide_taps = num_sums // tall, num_sums // wide
    add_tall, add_wide = (_make_block(size, num_sums // size, num_bytes) for size in HEIGHTS)

    @row_function
    def dot_row(out, left, left_start, stride, rows, right, right_start, taps, length):  # type: ignore[no-untyped-def]
        pieces = (length + LENGTH - 1) // LENGTH
        piece = (length + pieces - 1) // pieces
        piece = (piece + num_bytes - 1) // num_bytes * num_bytes  # whole vectors
        is_wide = rows % tall > 0 and rows % wide == 0
        for start in range(0, length, piece):
            n, p, q = min(piece, length - start), left_start + start, right_start + start
            if is_wide:
                for m in range(0, rows, wide):
                    for t in range(0, taps.size, wide_taps):
                        add_wide(out, m, t, left, p, stride, rows - 1, right, q, taps, n)
            else:
                for m in range(0, rows, tall):
                    for t in range(0, taps.size, tall_taps):
                        add_tall(out, m, t, left, p, stride, rows - 1, right, q, taps, n)

    return dot_row


dot_row = make_dot_row(*find_registers())


@product_kernel
def add_dot_products(  # type: ignore[no-untyped-def]
    out, left, left_starts, stride, rows, right, right_starts, taps, length
):
    """Add to ``out`` (rows, taps; whole blocks) the inner products of rows of ``left`` and of ``right``.

    For all m < ``rows``: ``out[m, t]`` += sum over r and j of ``left[left_starts[r] + m * stride + j]``
    * ``right[right_starts[r] + taps[t] + j]``, j < ``length``. What lies beyond has no meaning.
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
