"""Which elements of a matrix are not 0, such as a ReLU's values: 64 bits to an integer, compiled with numba."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
from llvmlite import ir
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

BLOCK = 64
"""Terms whose bits are in one integer, the first one's the lowest."""

Bits = NDArray[np.int64]


def find_bits(values: Tensor) -> Bits:
    """Return (blocks of terms, rows): the bit of an element of ``values`` (rows, terms) is 1 unless it is 0.

    That of NaN is 1, as is a ReLU's derivative in torch.
    """
    array = values.contiguous().numpy()
    bits = np.empty((-(-array.shape[1] // BLOCK), len(array)), np.int64)
    _compile()[0](array, bits)
    return bits


def find_column_bits(values: Tensor) -> Bits:
    """Return `find_bits` of the transposed matrix."""
    array = values.contiguous().numpy()
    bits = np.zeros((-(-len(array) // BLOCK), array.shape[1]), np.int64)
    _compile()[1](array, bits)
    return bits


def _make_comparison(num_bytes: int) -> Callable[..., int]:
    """Return the function that finds the bits of one vector's elements, of which ``rest`` are left."""

    @intrinsic
    def compare(typing, values, place, rest):  # type: ignore[no-untyped-def]
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            build = VectorBuilder(context, builder, signature, arguments, num_bytes)
            value = build.load(build.find(0), arguments[1], build.make_mask(arguments[2]))
            flags = builder.fcmp_unordered("!=", value, build.zero)
            return builder.zext(builder.bitcast(flags, ir.IntType(build.lanes)), I64)

        return types.int64(values, place, rest), generate

    return compare


def make_bit_search(num_bytes: int) -> Callable[..., None]:
    """Return the kernel of `find_bits` on vectors of ``num_bytes`` bytes."""
    compare = _make_comparison(num_bytes)

    @row_function
    def search(values, bits):  # type: ignore[no-untyped-def]
        rows, terms = values.shape
        lanes = num_bytes // values.itemsize
        for row in range(rows):
            for block in range(bits.shape[0]):
                found, first = 0, block * BLOCK
                for term in range(first, min(first + BLOCK, terms), lanes):
                    found |= compare(values, row * terms + term, terms - term) << (term - first)
                bits[block, row] = found

    return search


_search = make_bit_search(find_registers()[0])


@functools.cache
def _compile() -> tuple[Callable[..., None], Callable[..., None]]:
    # they close over a number alone, else numba would not find them in its cache again
    digest = digest_sources(kernel_rows, row_vectors)

    @product_kernel
    def search(values, bits):  # type: ignore[no-untyped-def]
        _ = digest
        _search(values, bits)

    @product_kernel
    def search_columns(values, bits):  # type: ignore[no-untyped-def]
        _ = digest
        zero = values.dtype.type(0)
        for row in range(values.shape[0]):
            line, found = values[row], bits[row // BLOCK]
            bit = np.int64(1) << (row % BLOCK)
            for column in range(line.size):
                found[column] |= bit if line[column] != zero else 0

    return search, search_columns
