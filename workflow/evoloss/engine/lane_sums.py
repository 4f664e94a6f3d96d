"""Sums of products of pixels for every sample apart, compiled with numba: a vector's lanes are samples.

`evoloss.engine.row_dots` sums over the samples too, for gradients; these are for the gradients of every single one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import types
from numba.extending import intrinsic

from evoloss.engine.row_vectors import I64, VectorBuilder, find_registers, row_function

ROWS = 5
"""Rows of a block of sums, but for a single row."""


def _make_block(num_rows: int, num_taps: int, num_bytes: int) -> Callable[..., None]:
    """Return the function that writes the sums of some rows and taps, from ``row`` and ``tap`` on.

    Rows after the last one are taken to be that one, taps likewise.
    """

    @intrinsic
    def write_block(  # type: ignore[no-untyped-def]
        typing, out, out_start, row_stride, tap_stride, left, left_start, left_stride, left_places,
        last_row, right, right_start, taps, right_places, row, tap,
    ):  # fmt: skip
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            build = VectorBuilder(context, builder, signature, arguments, num_bytes)
            out, left, left_places, right, taps, right_places = (
                build.find(i) for i in (0, 4, 7, 9, 11, 12)
            )
            out_start, row_stride, tap_stride, left_start, left_stride, last_row, right_start = (
                arguments[i] for i in (1, 2, 3, 5, 6, 8, 10)
            )
            row, tap = arguments[13:]
            last_tap = builder.sub(builder.extract_value(taps.shape, 0), I64(1))
            count = builder.extract_value(left_places.shape, 0)
            rows = [build.find_least(builder.add(row, I64(i)), last_row) for i in range(num_rows)]
            numbers = [
                build.find_least(builder.add(tap, I64(k)), last_tap) for k in range(num_taps)
            ]
            lefts = [builder.add(left_start, builder.mul(r, left_stride)) for r in rows]
            rights = [builder.add(right_start, build.read(taps, number)) for number in numbers]
            places = [
                builder.add(
                    out_start,
                    builder.add(builder.mul(r, row_stride), builder.mul(number, tap_stride)),
                )
                for r in rows
                for number in numbers
            ]
            # far apart, they would be waited for at the end
            for at in places:
                build.prefetch(out, at, for_writing=True)
            start, loop = builder.block, builder.append_basic_block("loop")
            builder.branch(loop)
            builder.position_at_end(loop)
            place = builder.phi(I64)
            place.add_incoming(I64(0), start)
            sums = [builder.phi(build.kind) for _ in range(num_rows * num_taps)]
            for total in sums:
                total.add_incoming(build.zero, start)
            shift = build.read(right_places, place)
            xs = [build.load(right, builder.add(at, shift)) for at in rights]
            shift = build.read(left_places, place)
            totals: list[Any] = []
            for at in lefts:
                value = build.load(left, builder.add(at, shift))
                totals += [
                    build.multiply_add(value, x, total)
                    for x, total in zip(xs, sums[len(totals) :], strict=False)
                ]
            following = builder.add(place, I64(1))
            place.add_incoming(following, loop)
            for total, value in zip(sums, totals, strict=True):
                total.add_incoming(value, loop)
            end = builder.append_basic_block("end")
            builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
            builder.position_at_end(end)
            for value, at in zip(totals, places, strict=True):
                build.store(value, out, at)
            return context.get_dummy_value()

        arguments = (
            out, out_start, row_stride, tap_stride, left, left_start, left_stride, left_places,
            last_row, right, right_start, taps, right_places, row, tap,
        )  # fmt: skip
        return types.void(*arguments), generate

    return write_block


def _make_copy(num_bytes: int) -> Callable[..., None]:
    """Return the function that copies one vector of samples; where there are only ``rest``, zeros fill it up."""

    @intrinsic
    def copy(typing, target, place, source, start, rest):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            build = VectorBuilder(context, builder, signature, arguments, num_bytes)
            value = build.load(build.find(2), arguments[3], build.make_mask(arguments[4]))
            build.store(value, build.find(0), arguments[1])
            return context.get_dummy_value()

        return types.void(target, place, source, start, rest), generate

    return copy


def make_pack(num_bytes: int) -> Callable[..., None]:
    """Return `pack_lanes` on vectors of ``num_bytes`` bytes."""
    copy = _make_copy(num_bytes)

    @row_function
    def pack(target, place, source, start, stride, count, rest):  # type: ignore[no-untyped-def]
        lanes = num_bytes // target.itemsize
        for i in range(count):
            copy(target, place + i * lanes, source, start + i * stride, rest)

    return pack


def make_lane_sums(num_bytes: int, num_sums: int) -> Callable[..., None]:
    """Return `write_lane_sums` on vectors of ``num_bytes`` bytes; see `find_registers`."""
    many_taps, single_taps = num_sums // ROWS, num_sums // 2
    write_many = _make_block(ROWS, many_taps, num_bytes)
    write_single = _make_block(1, single_taps, num_bytes)

    @row_function
    def write_sums(  # type: ignore[no-untyped-def]
        out, out_start, row_stride, tap_stride, left, left_start, left_stride, left_places, rows,
        right, right_start, taps, right_places,
    ):  # fmt: skip
        if rows == 1:
            for tap in range(0, taps.size, single_taps):
                write_single(
                    out, out_start, row_stride, tap_stride, left, left_start, left_stride,
                    left_places, 0, right, right_start, taps, right_places, 0, tap,
                )  # fmt: skip
            return
        for tap in range(0, taps.size, many_taps):
            for row in range(0, rows, ROWS):
                write_many(
                    out, out_start, row_stride, tap_stride, left, left_start, left_stride,
                    left_places, rows - 1, right, right_start, taps, right_places, row, tap,
                )  # fmt: skip

    return write_sums


pack_lanes = make_pack(find_registers()[0])
"""Copy one vector of samples of ``count`` pixels that are ``stride`` apart in ``source``, of samples ``rest``.

The arrays are flat; zeros fill up the last vector.
"""

write_lane_sums = make_lane_sums(*find_registers())
"""Write sums over places, for one vector of samples.

For all r < ``rows`` and t: ``out[out_start + r * row_stride + t * tap_stride]`` = sum over n of ``left[left_start + r *
left_stride + left_places[n]]`` * ``right[right_start + taps[t] + right_places[n]]``, and so for every lane after it.
Arrays are flat, ``taps`` and places int64 and not empty.
"""
