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

ROWS = 6
TAPS = find_registers()[1] // ROWS
"""Block of sums in registers."""
LENGTH = 1024
"""Rows are cut at so many elements, for the caches."""


def make_blocks(*shape: int, dtype: Any) -> NDArray[Any]:
    """Return zeros (..., rows, taps) with room for whole blocks, as `add_dot_products` writes."""
    rows, taps = shape[-2:]
    return np.zeros((*shape[:-2], rows + -rows % ROWS, taps + -taps % TAPS), dtype=dtype)


def pad_offsets(taps: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return tap offsets filled up to whole blocks with the last."""
    return np.pad(taps, (0, -len(taps) % TAPS), mode="edge")


def _make_block(num_rows: int, num_taps: int, num_bytes: int) -> Callable[..., None]:
    """Return the function that adds to ``out[m:, t:]`` the inner products of some rows and taps.

    Rows after ``last`` are taken to be that one.
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
            rows = [builder.add(m, I64(i)) for i in range(num_rows)]
            lefts = []
            for row in rows:
                nearest = builder.select(builder.icmp_signed("<", row, last), row, last)
                lefts.append(builder.add(left_start, builder.mul(nearest, stride)))
            rights = [
                builder.add(right_start, build.read(taps, builder.add(t, I64(k))))
                for k in range(num_taps)
            ]
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
            part = min(num_taps, build.lanes)
            for first in range(0, num_rows * num_taps, part):
                i, k = divmod(first, num_taps)
                offset = builder.add(builder.mul(rows[i], width), builder.add(t, I64(k)))
                group, lane = divmod(first, build.lanes)
                build.add_lanes(totals[group], range(lane, lane + part), out, offset)
            return context.get_dummy_value()

        arguments = (out, m, t, left, left_start, stride, last, right, right_start, taps, length)
        return types.void(*arguments), generate

    return add_dots


def make_dot_row(num_rows: int, num_taps: int, num_bytes: int) -> Callable[..., None]:
    """Return what does `add_dot_products` for one row, with blocks of this size."""
    add_dots = _make_block(num_rows, num_taps, num_bytes)

    @row_function
    def dot_row(out, left, left_start, stride, rows, right, right_start, taps, length):  # type: ignore[no-untyped-def]
        for start in range(0, length, LENGTH):
            n = min(LENGTH, length - start)
            for m in range(0, rows, num_rows):
                for t in range(0, taps.size, num_taps):
                    add_dots(
                        out, m, t, left, left_start + start, stride, rows - 1,
                        right, right_start + start, taps, n,
                    )  # fmt: skip

    return dot_row


dot_row = make_dot_row(ROWS, TAPS, find_registers()[0])


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
