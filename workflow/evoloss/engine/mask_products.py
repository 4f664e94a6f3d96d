"""Products of a ReLU's mask, a matrix of zeros and ones, with a matrix of floats, compiled with numba.

The method of four Russians (Arlazarov, Dinic, Kronrod and Faradzhev, 1970): for every `BITS` rows of the matrix a table
has the sums of all their subsets, and a row of the product adds one entry of each table: a fourth of a matrix product's
operations, but that the tables must be made. They lie in the nearest caches, for one vector of columns at a time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from evoloss.engine import bit_masks, kernel_rows, row_vectors, tiles
from evoloss.engine.bit_masks import BLOCK, Bits
from evoloss.engine.kernel_rows import digest_sources
from evoloss.engine.row_vectors import (
    I64,
    VectorBuilder,
    find_registers,
    product_kernel,
    row_function,
)
from evoloss.engine.threads import map_on_threads
from evoloss.engine.tiles import TILE_BYTES, Tiles, as_tiles, find_place

BITS = 4
ENTRIES = 2**BITS
TERMS = 32
"""Terms that tables are made for together; half of an element of the bits."""
GROUPS = TERMS // BITS
TABLE_BYTES = 32 * 2**10
"""All tables that are in use at a time: of 128 terms on the longest vectors, of 256 or 512 on shorter ones.

So the weight gradients of a batch of 128 samples take one pass.
"""
ROWS = 4
"""Rows of the product that stay in registers while tables are added to them."""
MIN_TERMS = 32
"""With fewer terms or rows a table is read too seldom for what it takes to make it."""
MIN_MULTIPLICATIONS = 2**20
"""A product of fewer is left to a matrix product."""

Array = NDArray[Any]


def is_worthwhile(rows: int, terms: int, columns: int) -> bool:
    """Tell whether `multiply_mask` is faster than a matrix product, (rows, terms) by (terms, columns)."""
    return min(rows, terms) >= MIN_TERMS and rows * terms * columns >= MIN_MULTIPLICATIONS


def multiply_mask(
    bits: Bits,
    matrix: Tensor | Tiles,
    term_factors: Tensor,
    row_factors: Tensor,
    tiled: bool = False,
) -> Tiles:
    """Return diag(row_factors) M diag(term_factors) matrix, (rows, columns), M a mask (rows, terms).

    Parameters
    ----------
    bits : (blocks of terms, rows), M as in `find_bits`
    matrix : (terms, columns), on the CPU
    term_factors, row_factors : (terms,), (rows,), of the same dtype as ``matrix``
    tiled : whether the result is as `make_tiles` would make it, or a single tile
    """
    source = as_tiles(matrix)
    left, right = (t.contiguous().numpy() for t in (row_factors, term_factors))
    rows, columns = bits.shape[1], source.num_columns
    width = TILE_BYTES // left.itemsize if tiled else columns
    out = Tiles(row_factors.new_empty(-(-columns // width), rows, width), columns)
    values, target = source.values.numpy().reshape(-1), out.values.numpy().reshape(-1)
    lanes, passes = find_layout(left.dtype)
    # threads share the columns, by whole vectors
    end, count = len(out.values) * width, torch.get_num_threads()
    edges = [min(end, -(-end // lanes) * i // count * lanes) for i in range(count + 1)]
    shares = [(first, last) for first, last in itertools.pairwise(edges) if first < last]
    multiply = _compile()

    def make_rooms() -> tuple[Array, Array]:
        return _make_table(left.dtype), np.empty(rows * lanes, left.dtype)

    def work(rooms: tuple[Array, Array], share: tuple[int, int]) -> None:
        multiply(
            bits, values, source.width, columns, right, left, target, width, *rooms, passes, *share
        )

    map_on_threads(make_rooms, work, shares)
    return out


def find_layout(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Return the elements of a vector, and for how many times `TERMS` terms tables are in use at a time."""
    num_bytes, _ = find_registers()
    return num_bytes // dtype.itemsize, TABLE_BYTES // (GROUPS * ENTRIES * num_bytes)


def _make_table(dtype: np.dtype[Any]) -> Array:
    """Return room for the tables, from the start of a cache line on."""
    room = np.empty(TABLE_BYTES + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + TABLE_BYTES].view(dtype)


def _make_table_function(num_bytes: int) -> Callable[..., None]:
    """Return the function that writes the sums of all subsets of `BITS` terms, for one vector of columns."""

    @intrinsic
    def write_entries(  # type: ignore[no-untyped-def]
        typing, table, place, source, start, stride, ahead, first, end, factors, rest
    ):
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            build = VectorBuilder(context, builder, signature, arguments, num_bytes)
            table, source, factors = (build.find(i) for i in (0, 2, 8))
            place, start, stride, ahead, first, end, rest = (
                arguments[i] for i in (1, 3, 4, 5, 6, 7, 9)
            )
            mask = build.make_mask(rest)
            sums = [build.zero]
            for k in range(BITS):
                # no row has the bit of a term after the last one
                term = build.find_least(builder.add(first, I64(k)), builder.sub(end, I64(1)))
                offset = builder.add(builder.mul(term, stride), start)
                # the next vector of columns is a cache line of every row
                build.prefetch(source, builder.add(offset, ahead))
                value = builder.fmul(
                    build.load(source, offset, mask), build.spread(build.read(factors, term))
                )
                sums += [value, *(builder.fadd(standing, value) for standing in sums[1:])]
            for entry, total in enumerate(sums):
                build.store(total, table, builder.add(place, I64(entry * build.lanes)))
            return context.get_dummy_value()

        arguments = (table, place, source, start, stride, ahead, first, end, factors, rest)
        return types.void(*arguments), generate

    return write_entries


def _make_block(num_rows: int, num_bytes: int) -> Callable[..., None]:
    """Return the function that adds the tables' entries to ``num_rows`` rows, for one vector of columns.

    Between passes the rows' sums stand in ``sums``; after the last one they are multiplied with their factors.
    """

    @intrinsic
    def add_entries(  # type: ignore[no-untyped-def]
        typing, table, bits, part, count, row, sums, target, place, stride, ahead, factors,
        is_first, is_last, rest,
    ):  # fmt: skip
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            build = VectorBuilder(context, builder, signature, arguments, num_bytes)
            table, bits, sums, target, factors = (build.find(i) for i in (0, 1, 5, 6, 10))
            part, count, row, place, stride, ahead, is_first, is_last, rest = (
                arguments[i] for i in (2, 3, 4, 7, 8, 9, 11, 12, 13)
            )
            num_rows_in_all = builder.extract_value(bits.shape, 1)
            rows = [builder.add(row, I64(i)) for i in range(num_rows)]
            stands = [builder.mul(row, I64(build.lanes)) for row in rows]
            outs = [builder.add(builder.mul(row, stride), place) for row in rows]
            names = ("fresh", "standing", "loop", "end", "factor", "plain", "done")
            fresh, standing, loop, end, factor, plain, done = (
                builder.append_basic_block(name) for name in names
            )
            builder.cbranch(is_first, fresh, standing)
            builder.position_at_end(fresh)
            for out in outs:
                build.prefetch(target, builder.add(out, ahead), for_writing=True)
            builder.branch(loop)
            builder.position_at_end(standing)
            before = [build.load(sums, stand) for stand in stands]
            builder.branch(loop)
            builder.position_at_end(loop)
            number = builder.phi(I64)
            totals = [builder.phi(build.kind) for _ in rows]
            number.add_incoming(I64(0), fresh)
            number.add_incoming(I64(0), standing)
            for total, value in zip(totals, before, strict=True):
                total.add_incoming(build.zero, fresh)
                total.add_incoming(value, standing)
            current = builder.add(part, number)
            element, half = (
                divide(current, I64(BLOCK // TERMS)) for divide in (builder.udiv, builder.urem)
            )
            line, shift = builder.mul(element, num_rows_in_all), builder.mul(half, I64(TERMS))
            words = [builder.lshr(build.read(bits, builder.add(line, row)), shift) for row in rows]
            tables = builder.mul(number, I64(GROUPS * ENTRIES * build.lanes))
            after = list(totals)
            for group in range(GROUPS):
                first = builder.add(tables, I64(group * ENTRIES * build.lanes))
                for i, word in enumerate(words):
                    code = builder.and_(builder.lshr(word, I64(group * BITS)), I64(ENTRIES - 1))
                    entry = builder.add(first, builder.mul(code, I64(build.lanes)))
                    after[i] = builder.fadd(after[i], build.load(table, entry))
            following = builder.add(number, I64(1))
            number.add_incoming(following, loop)
            for total, value in zip(totals, after, strict=True):
                total.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
            builder.position_at_end(end)
            builder.cbranch(is_last, factor, plain)
            builder.position_at_end(factor)
            mask = build.make_mask(rest)
            for row, out, total in zip(rows, outs, after, strict=True):
                times = build.spread(build.read(factors, row))
                build.store(builder.fmul(total, times), target, out, mask)
            builder.branch(done)
            builder.position_at_end(plain)
            for stand, total in zip(stands, after, strict=True):
                build.store(total, sums, stand)
            builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        arguments = (
            table, bits, part, count, row, sums, target, place, stride, ahead, factors,
            is_first, is_last, rest,
        )  # fmt: skip
        return types.void(*arguments), generate

    return add_entries


def make_mask_product(num_bytes: int) -> Callable[..., None]:
    """Return the product on vectors of ``num_bytes`` bytes; see `multiply_mask`, for columns from first to end."""
    write_entries = _make_table_function(num_bytes)
    add_many, add_one = _make_block(ROWS, num_bytes), _make_block(1, num_bytes)

    @row_function
    def multiply(  # type: ignore[no-untyped-def]
        bits, source, source_width, columns, term_factors, row_factors,
        target, width, table, sums, passes, first_column, end_column,
    ):  # fmt: skip
        rows, terms = bits.shape[1], term_factors.size
        parts = (terms + TERMS - 1) // TERMS
        lanes = num_bytes // source.itemsize
        for column in range(first_column, end_column, lanes):
            start = find_place(0, column, terms, source_width)
            source_ahead = find_place(0, column + lanes, terms, source_width) - start
            place = find_place(0, column, rows, width)
            ahead = find_place(0, column + lanes, rows, width) - place
            for part in range(0, parts, passes):
                count = min(passes, parts - part)
                for g in range(count * GROUPS):
                    write_entries(
                        table, g * ENTRIES * lanes, source, start, source_width, source_ahead,
                        part * TERMS + g * BITS, terms, term_factors, columns - column,
                    )  # fmt: skip
                is_first, is_last = part == 0, part + passes >= parts
                row = 0
                while row + ROWS <= rows:
                    add_many(
                        table, bits, part, count, row, sums, target, place, width, ahead,
                        row_factors, is_first, is_last, end_column - column,
                    )  # fmt: skip
                    row += ROWS
                while row < rows:
                    add_one(
                        table, bits, part, count, row, sums, target, place, width, ahead,
                        row_factors, is_first, is_last, end_column - column,
                    )  # fmt: skip
                    row += 1

    return multiply


_multiply_columns = make_mask_product(find_registers()[0])


@functools.cache
def _compile() -> Callable[..., None]:
    # it closes over a number alone, else numba would not find it in its cache again
    digest = digest_sources(bit_masks, kernel_rows, row_vectors, tiles)

    @product_kernel
    def multiply(  # type: ignore[no-untyped-def]
        bits, source, source_width, columns, term_factors, row_factors,
        target, width, table, sums, passes, first_column, end_column,
    ):  # fmt: skip
        _ = digest
        _multiply_columns(
            bits, source, source_width, columns, term_factors, row_factors,
            target, width, table, sums, passes, first_column, end_column,
        )  # fmt: skip

    return multiply
