"""Products of a ReLU's mask, a matrix of zeros and ones, with a matrix of floats, compiled with numba.

The method of four Russians (Arlazarov, Dinic, Kronrod and Faradzhev, 1970): for every `BITS` rows of the matrix a table
has the sums of all their subsets, and a row of the product adds one entry of each table: a fourth of a matrix product's
operations, but that the tables must be made. They lie in the nearest caches, for one vector of columns at a time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from evoloss.engine import kernel_rows, row_vectors
from evoloss.engine.kernel_rows import digest_sources
from evoloss.engine.row_vectors import (
    I64,
    VectorBuilder,
    find_registers,
    product_kernel,
    row_function,
)
from evoloss.engine.threads import map_on_threads

BITS = 4
ENTRIES = 2**BITS
TABLE_BYTES = 32 * 2**10
"""All tables that are in use at a time: of 128 terms on the longest vectors, of 256 or 512 on shorter ones.

So the weight gradients of a batch of 128 samples take one pass: 0.93 of the time of two (AMD EPYC, Zen 4).
"""
ROWS = 8
"""Rows of the product that stay in registers while tables are added to them."""
MIN_TERMS = 32
"""With fewer terms or rows a table is read too seldom for what it takes to make it."""
MIN_MULTIPLICATIONS = 2**20
"""A product of fewer is left to a matrix product."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Mask:
    """A matrix (rows, terms) of zeros and ones: ``codes`` (groups, rows) are the entries in the tables of a pass."""

    codes: NDArray[np.uint16]
    num_terms: int


def is_worthwhile(rows: int, terms: int, columns: int) -> bool:
    """Tell whether `multiply_mask` is faster than a matrix product, (rows, terms) by (terms, columns)."""
    return min(rows, terms) >= MIN_TERMS and rows * terms * columns >= MIN_MULTIPLICATIONS


def encode_mask(values: Tensor) -> Mask:
    """Return the mask of a ReLU's values, transposed: (terms, rows) -> (rows, terms); 0 where the value is 0.

    NaN counts as 1, as in torch's derivative of ReLU.
    """
    array = values.numpy()
    terms, rows = array.shape
    codes = np.zeros((-(-terms // BITS), rows), np.uint16)
    lanes, passes = find_layout(array.dtype)
    _encode(array, codes, lanes, passes)
    return Mask(codes, terms)


def multiply_mask(mask: Mask, matrix: Tensor, term_factors: Tensor, row_factors: Tensor) -> Tensor:
    """Return diag(row_factors) mask diag(term_factors) matrix, (rows, columns).

    Parameters
    ----------
    mask : (rows, terms)
    matrix : (terms, columns), on the CPU
    term_factors, row_factors : (terms,), (rows,), of the same dtype as ``matrix``
    """
    source, left, right = (t.contiguous().numpy() for t in (matrix, row_factors, term_factors))
    rows, columns = mask.codes.shape[1], source.shape[1]
    out = torch.empty(rows, columns, dtype=matrix.dtype)
    target = out.numpy()
    lanes, passes = find_layout(source.dtype)
    # threads share the columns, by whole vectors
    count, vectors = torch.get_num_threads(), -(-columns // lanes)
    edges = [min(columns, vectors * i // count * lanes) for i in range(count + 1)]
    shares = [(first, end) for first, end in itertools.pairwise(edges) if first < end]
    multiply = _compile()

    def work(table: Array, share: tuple[int, int]) -> None:
        multiply(mask.codes, source, right, left, target, table, passes, *share)

    map_on_threads(lambda: _make_table(source.dtype), work, shares)
    return out


def find_layout(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Return the elements of a vector, and how many groups' tables are in use at a time."""
    num_bytes, _ = find_registers()
    return num_bytes // dtype.itemsize, TABLE_BYTES // (ENTRIES * num_bytes)


def _make_table(dtype: np.dtype[Any]) -> Array:
    """Return room for the tables, from the start of a cache line on."""
    room = np.empty(TABLE_BYTES + 64, np.uint8)
    first = -room.ctypes.data % 64
    return room[first : first + TABLE_BYTES].view(dtype)


@product_kernel
def _encode(values, codes, lanes, passes):  # type: ignore[no-untyped-def]
    terms, rows = values.shape
    zero = values.dtype.type(0)
    for term in range(terms):
        group = term // BITS
        bit = lanes << (term % BITS)
        base = group % passes * ENTRIES * lanes if term % BITS == 0 else 0
        for r in range(rows):
            codes[group, r] += base + (0 if values[term, r] <= zero else bit)


def _make_table_function(num_bytes: int) -> Callable[..., None]:
    """Return the function that writes the sums of all subsets of `BITS` terms, for one vector of columns."""

    @intrinsic
    def write_entries(  # type: ignore[no-untyped-def]
        typing, table, place, source, first, end, column, stride, factors, rest
    ):
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            build = VectorBuilder(context, builder, signature, arguments, num_bytes)
            table, source, factors = (build.find(i) for i in (0, 2, 7))
            place, first, end, column, stride, rest = (arguments[i] for i in (1, 3, 4, 5, 6, 8))
            mask = build.make_mask(rest)
            sums = [build.zero]
            for k in range(BITS):
                # no code has the bit of a term after the last one
                term = build.find_least(builder.add(first, I64(k)), builder.sub(end, I64(1)))
                offset = builder.add(builder.mul(term, stride), column)
                # the next vector of columns is a cache line of every row
                build.prefetch(source, builder.add(offset, I64(build.lanes)))
                value = builder.fmul(
                    build.load(source, offset, mask), build.spread(build.read(factors, term))
                )
                sums += [value, *(builder.fadd(standing, value) for standing in sums[1:])]
            for entry, total in enumerate(sums):
                build.store(total, table, builder.add(place, I64(entry * build.lanes)))
            return context.get_dummy_value()

        arguments = (table, place, source, first, end, column, stride, factors, rest)
        return types.void(*arguments), generate

    return write_entries


def _make_block(num_rows: int, num_bytes: int) -> Callable[..., None]:
    """Return the function that adds the tables' entries to ``num_rows`` rows, for one vector of columns.

    Rows are 0 before the first pass, and multiplied with their factors after the last one.
    """

    @intrinsic
    def add_entries(  # type: ignore[no-untyped-def]
        typing, table, codes, group, count, row, target, column, factors, is_first, is_last, rest
    ):
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            build = VectorBuilder(context, builder, signature, arguments, num_bytes)
            table, codes, target, factors = (build.find(i) for i in (0, 1, 5, 7))
            group, count, row, column, is_first, is_last, rest = (
                arguments[i] for i in (2, 3, 4, 6, 8, 9, 10)
            )
            mask = build.make_mask(rest)
            columns = builder.extract_value(target.shape, 1)
            num_codes = builder.extract_value(codes.shape, 1)
            rows = [builder.add(row, I64(i)) for i in range(num_rows)]
            outs = [builder.add(builder.mul(row, columns), column) for row in rows]
            names = ("fresh", "standing", "loop", "end", "factor", "plain", "done")
            fresh, standing, loop, end, factor, plain, done = (
                builder.append_basic_block(name) for name in names
            )
            builder.cbranch(is_first, fresh, standing)
            builder.position_at_end(fresh)
            for out in outs:
                build.prefetch(target, builder.add(out, I64(build.lanes)), for_writing=True)
            builder.branch(loop)
            builder.position_at_end(standing)
            before = [build.load(target, out, mask) for out in outs]
            builder.branch(loop)
            builder.position_at_end(loop)
            number = builder.phi(I64)
            sums = [builder.phi(build.kind) for _ in rows]
            number.add_incoming(I64(0), fresh)
            number.add_incoming(I64(0), standing)
            for total, value in zip(sums, before, strict=True):
                total.add_incoming(build.zero, fresh)
                total.add_incoming(value, standing)
            place = builder.mul(builder.add(group, number), num_codes)
            totals = []
            for row, total in zip(rows, sums, strict=True):
                code = builder.zext(build.read(codes, builder.add(place, row)), I64)
                totals.append(builder.fadd(total, build.load(table, code)))
            following = builder.add(number, I64(1))
            number.add_incoming(following, loop)
            for total, value in zip(sums, totals, strict=True):
                total.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
            builder.position_at_end(end)
            builder.cbranch(is_last, factor, plain)
            builder.position_at_end(factor)
            for row, out, total in zip(rows, outs, totals, strict=True):
                times = build.spread(build.read(factors, row))
                build.store(builder.fmul(total, times), target, out, mask)
            builder.branch(done)
            builder.position_at_end(plain)
            for out, total in zip(outs, totals, strict=True):
                build.store(total, target, out, mask)
            builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        arguments = (
            table, codes, group, count, row, target, column, factors, is_first, is_last, rest
        )  # fmt: skip
        return types.void(*arguments), generate

    return add_entries


def make_mask_product(num_bytes: int) -> Callable[..., None]:
    """Return the product on vectors of ``num_bytes`` bytes; see `multiply_mask`, for columns from first to end."""
    write_entries = _make_table_function(num_bytes)
    add_many, add_one = _make_block(ROWS, num_bytes), _make_block(1, num_bytes)

    @row_function
    def multiply(  # type: ignore[no-untyped-def]
        codes, source, term_factors, row_factors, target, table, passes, first_column, end_column
    ):
        groups, rows = codes.shape
        terms, stride = source.shape
        lanes = num_bytes // source.itemsize
        for column in range(first_column, end_column, lanes):
            rest = end_column - column
            for group in range(0, groups, passes):
                count = min(passes, groups - group)
                for g in range(count):
                    write_entries(
                        table, g * ENTRIES * lanes, source, (group + g) * BITS, terms,
                        column, stride, term_factors, rest,
                    )  # fmt: skip
                is_first, is_last = group == 0, group + passes >= groups
                row = 0
                while row + ROWS <= rows:
                    add_many(
                        table, codes, group, count, row, target,
                        column, row_factors, is_first, is_last, rest,
                    )  # fmt: skip
                    row += ROWS
                while row < rows:
                    add_one(
                        table, codes, group, count, row, target,
                        column, row_factors, is_first, is_last, rest,
                    )  # fmt: skip
                    row += 1

    return multiply


_multiply_columns = make_mask_product(find_registers()[0])


@functools.cache
def _compile() -> Callable[..., None]:
    # it closes over a number alone, else numba would not find it in its cache again
    digest = digest_sources(kernel_rows, row_vectors)

    @product_kernel
    def multiply(  # type: ignore[no-untyped-def]
        codes, source, term_factors, row_factors, target, table, passes, first_column, end_column
    ):
        _ = digest
        _multiply_columns(
            codes,
            source,
            term_factors,
            row_factors,
            target,
            table,
            passes,
            first_column,
            end_column,
        )

    return multiply
