"""Products of weights and rows at offsets, compiled with numba: matrix products, and convolution without copies.

The convolutional path is made of them, and the compiled meta-step of linear classifiers; no path owns them.

Images are stored batch-innermost, (channels, height, width, batch), so one row of an image is contiguous over columns
*and* samples, and a kernel tap is a shift of the whole row. A convolution and its transpose are then matrix products
whose operands are rows at given offsets, and no copy of the input (im2col) is made. `evoloss.engine.row_dots` has the
weight gradient.

A few sums of a few vectors each stay in registers from the first tap to the last, as in any fast matrix product
(Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008); `evoloss.engine.row_vectors` has the
language that this is written in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import types
from numba.extending import intrinsic

from evoloss.engine.row_vectors import (
    I64,
    VectorBuilder,
    find_registers,
    product_kernel,
    row_function,
)


def _make_block(
    num_rows: int, num_vectors: int, num_bytes: int, masked: bool
) -> Callable[..., None]:
    """Return the function that sums ``num_rows`` rows of ``num_vectors`` vectors over all taps.

    If ``masked``, elements from ``rest`` on are neither read nor written.
    """

    @intrinsic
    def add_products(  # type: ignore[no-untyped-def]
        typing, weights, place, taps, source, start, target, out, stride, bias, first, rest
    ):
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            build = VectorBuilder(context, builder, signature, arguments, num_bytes)
            weights, taps, source, target, bias = (build.find(i) for i in (0, 2, 3, 5, 8))
            place, start, out, stride, first, rest = (arguments[i] for i in (1, 4, 6, 7, 9, 10))
            width = builder.extract_value(weights.shape, 1)
            count = builder.extract_value(taps.shape, 0)
            cells = [(i, v) for i in range(num_rows) for v in range(num_vectors)]
            shifts = [I64(v * build.lanes) for v in range(num_vectors)]
            masks: list[Any] = [None] * num_vectors
            if masked:
                masks = [build.make_mask(builder.sub(rest, shift)) for shift in shifts]
            outs = [
                builder.add(builder.add(out, builder.mul(I64(i), stride)), shifts[v])
                for i, v in cells
            ]
            places = [builder.add(place, builder.mul(I64(i), width)) for i in range(num_rows)]
            names = ("fresh", "added", "loop", "end")
            fresh, added, loop, end = (builder.append_basic_block(name) for name in names)
            has_bias = builder.icmp_signed(">", builder.extract_value(bias.shape, 0), I64(0))
            builder.cbranch(has_bias, fresh, added)
            builder.position_at_end(fresh)
            biases = [
                build.spread(build.read(bias, builder.add(first, I64(i)))) for i in range(num_rows)
            ]
            builder.branch(loop)
            builder.position_at_end(added)
            standing = [
                build.load(target, offset, masks[v])
                for offset, (_, v) in zip(outs, cells, strict=True)
            ]
            builder.branch(loop)
            builder.position_at_end(loop)
            tap = builder.phi(I64)
            sums = [builder.phi(build.kind) for _ in cells]
            for block, values in ((fresh, [biases[i] for i, _ in cells]), (added, standing)):
                tap.add_incoming(I64(0), block)
                for total, value in zip(sums, values, strict=True):
                    total.add_incoming(value, block)
            offset = builder.add(start, build.read(taps, tap))
            values = [
                build.load(source, builder.add(offset, shift), mask)
                for shift, mask in zip(shifts, masks, strict=True)
            ]
            totals: list[Any] = []
            for i in range(num_rows):
                weight = build.spread(build.read(weights, builder.add(places[i], tap)))
                for v in range(num_vectors):
                    totals.append(build.multiply_add(weight, values[v], sums[len(totals)]))
            following = builder.add(tap, I64(1))
            tap.add_incoming(following, loop)
            for total, value in zip(sums, totals, strict=True):
                total.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
            builder.position_at_end(end)
            for value, offset, (_, v) in zip(totals, outs, cells, strict=True):
                build.store(value, target, offset, masks[v])
            return context.get_dummy_value()

        arguments = (weights, place, taps, source, start, target, out, stride, bias, first, rest)
        return types.void(*arguments), generate

    return add_products


def make_block_row(num_rows: int, num_bytes: int, num_sums: int) -> Callable[..., None]:
    """Return `multiply_row` for ``num_rows`` rows of the weights, from row ``m`` on; see `find_registers`."""
    num_vectors = min(8, max(1, num_sums // num_rows))
    whole = _make_block(num_rows, num_vectors, num_bytes, masked=False)
    part = _make_block(num_rows, 1, num_bytes, masked=True)

    @row_function
    def multiply(  # type: ignore[no-untyped-def]
        weights, m, column, source, start, taps, target, out, stride, length, bias
    ):
        place = m * weights.shape[1] + column
        lanes = num_bytes // weights.itemsize
        step = lanes * num_vectors
        j = 0
        while j + step <= length:
            whole(weights, place, taps, source, start + j, target, out + j, stride, bias, m, length)
            j += step
        while j < length:
            part(
                weights, place, taps, source, start + j, target, out + j, stride, bias, m, length - j
            )  # fmt: skip
            j += lanes

    return multiply


_1, _2, _4, _6, _8 = (make_block_row(size, *find_registers()) for size in (1, 2, 4, 6, 8))


@row_function
def multiply_row(  # type: ignore[no-untyped-def]
    weights, column, source, source_start, taps, target, target_start, stride, rows, length, bias
):
    """Do what `multiply_rows` does, for one row; the weights are those from ``column`` on."""
    m = 0
    while m < rows:
        out, left = target_start + m * stride, rows - m
        blocks = (left + 7) // 8
        size = (left + blocks - 1) // blocks  # nearly equal blocks keep more registers busy
        if size > 6 and left >= 8:
            _8(weights, m, column, source, source_start, taps, target, out, stride, length, bias)
            m += 8
        elif size > 4 and left >= 6:
            _6(weights, m, column, source, source_start, taps, target, out, stride, length, bias)
            m += 6
        elif size > 2 and left >= 4:
            _4(weights, m, column, source, source_start, taps, target, out, stride, length, bias)
            m += 4
        elif left >= 2:
            _2(weights, m, column, source, source_start, taps, target, out, stride, length, bias)
            m += 2
        else:
            _1(weights, m, column, source, source_start, taps, target, out, stride, length, bias)
            m += 1


@product_kernel
def multiply_rows(  # type: ignore[no-untyped-def]
    weights, source, source_starts, taps, target, target_starts, stride, rows, length, bias
):
    """Write to every row of ``target`` the weighted sum of the rows of ``source`` that its taps name.

    For all r and m < ``rows``: ``target[target_starts[r] + m * stride + j]`` = ``bias[m]`` + sum over t of
    ``weights[m, t] * source[source_starts[r] + taps[t] + j]``, j < ``length``.

    Parameters
    ----------
    weights : array (rows, taps), contiguous
    source, target : flat arrays of the same dtype as ``weights``, apart in memory
    source_starts, target_starts : int64 arrays (R,)
    taps : int64 array, not empty
    stride, rows, length : int
    bias : array (rows,) or (0,)
        If empty, the sum is added to what stands in ``target``.
    """
    for r in range(source_starts.size):
        multiply_row(
            weights, 0, source, source_starts[r], taps,
            target, target_starts[r], stride, rows, length, bias,
        )  # fmt: skip


@row_function
def scatter_row(  # type: ignore[no-untyped-def]
    weights, source, source_start, taps, target, target_start, shifts, pieces, stride, rows, keep
):
    """Do what `scatter_rows` does, for one row."""
    for k in range(shifts.size):
        for i in range(len(pieces)):
            first, end, place, length = pieces[i]
            multiply_row(
                weights[k], first, source, source_start + place, taps[first:end],
                target, target_start + shifts[k] + place, stride, rows, length, keep,
            )  # fmt: skip


@product_kernel
def scatter_rows(  # type: ignore[no-untyped-def]
    weights, source, source_starts, taps, target, target_starts, shifts, pieces, stride, rows, keep
):
    """Add to rows of ``target`` weighted sums of rows of ``source``: the transpose of `multiply_rows`.

    For all r, k, m < ``rows`` and pieces (first, end, place, length): ``target[target_starts[r] + shifts[k] + m *
    stride + place + j]`` += sum over first <= t < end of ``weights[k, m, t] * source[source_starts[r] + taps[t] +
    place + j]``, j < length.

    Parameters
    ----------
    weights : array (K, rows, taps), contiguous
    shifts : int64 array (K,)
    pieces : int64 array (N, 4)
    keep : empty array of the same dtype
    """
    for r in range(source_starts.size):
        scatter_row(
            weights, source, source_starts[r], taps,
            target, target_starts[r], shifts, pieces, stride, rows, keep,
        )  # fmt: skip


@product_kernel
def clear(x):  # type: ignore[no-untyped-def]
    """Make every element of a flat array 0."""
    for j in range(x.size):
        x[j] = 0
