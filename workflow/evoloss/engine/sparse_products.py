"""Products of a matrix with many zeros, such as a ReLU's values, and a dense one, compiled with numba.

Half of an untrained ReLU layer's values are zero, anywhere, and a product that leaves them out has half the operations.
Every other element of a row is multiplied with the weights of its term, from the nearest cache: there lies a panel,
some outputs of the weight, transposed, `BLOCK` terms at a time, while all rows pass by.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from evoloss.engine import bit_masks, kernel_rows, row_vectors, tiles
from evoloss.engine.bit_masks import BLOCK, Bits, find_bits
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

VECTORS = 8
"""Vectors of outputs in a panel: a row's sums for them stay in registers."""
ROWS = 1024
"""Rows that a panel's outputs are computed for at a time, so that their sums lie in the second-level cache."""
MIN_ROWS = 32
"""With fewer, a weight is read too seldom for what it takes to transpose it."""
MIN_MULTIPLICATIONS = 2**21
"""A product of fewer is left to a matrix product."""
MAX_PADDING = 1.5
"""With more outputs in all panels than so many times its own, a product is left to a matrix product.

A panel costs the same for one output as for all.
"""
MAX_SHARE = 0.75
"""With more elements other than 0, a matrix is left to a matrix product."""

Array = NDArray[Any]


@dataclass(frozen=True)
class SparseRows:
    """A matrix ``values`` (rows, terms) and its `find_bits`."""

    values: Tensor
    bits: Bits

    @classmethod
    def read(cls, values: Tensor) -> SparseRows:
        """Return a matrix on the CPU, whatever it has of zeros."""
        values = values.contiguous()
        return cls(values, find_bits(values))

    @classmethod
    def find(cls, values: Tensor) -> SparseRows | None:
        """Return a matrix on the CPU, or None if it has too few zeros."""
        found = cls.read(values)
        # of signed numbers numpy counts the absolute value's bits
        count = int(np.bitwise_count(found.bits.view(np.uint64)).sum(dtype=np.int64))
        return found if count <= MAX_SHARE * values.numel() else None

    def multiply(self, weight: Tensor | Tiles, bias: Tensor | None = None) -> Tensor:
        """Return values W^T + b (rows, outputs) for a weight (outputs, terms) and a bias (outputs,).

        Zeros are left out, so a weight that is not finite does nothing where it meets them alone.
        """
        array, tiled = self.values.numpy(), as_tiles(weight)
        rows, num_outputs = len(array), tiled.num_rows
        width = _find_width(array.itemsize)
        source = tiled.values.numpy().reshape(-1)
        out = self.values.new_empty(rows, num_outputs)
        target = out.numpy()
        first = (out.new_zeros(num_outputs) if bias is None else bias.contiguous()).numpy()
        # threads share the panels
        count, panels = torch.get_num_threads(), -(-num_outputs // width)
        edges = [panels * i // count for i in range(count + 1)]
        shares = [(panel, end) for panel, end in itertools.pairwise(edges) if panel < end]
        multiply = _compile()

        def make_rooms() -> tuple[Array, Array]:
            panel, sums = out.new_zeros(BLOCK * width), out.new_zeros(min(ROWS, rows), width)
            return panel.numpy(), sums.numpy()

        def work(rooms: tuple[Array, Array], share: tuple[int, int]) -> None:
            multiply(array, self.bits, source, tiled.width, *rooms, first, target, *share)

        map_on_threads(make_rooms, work, shares)
        return out


def skipping_pays(rows: int, terms: int, outputs: int) -> bool:
    """Tell whether a product in float32 is faster without the zeros, if half of the elements are 0."""
    width = _find_width(4)
    padded = -(-outputs // width) * width
    size = rows * terms * outputs
    return rows >= MIN_ROWS and size >= MIN_MULTIPLICATIONS and padded <= MAX_PADDING * outputs


def _find_width(itemsize: int) -> int:
    """Return the outputs of a panel."""
    return VECTORS * find_registers()[0] // itemsize


def find_sparse(activation: str, values: Tensor, num_outputs: int) -> SparseRows | None:
    """Return an activation's values (rows, terms) if that is worthwhile for ``num_outputs`` outputs, else None."""
    rows, terms = values.shape
    if activation == "relu" and skipping_pays(rows, terms, num_outputs):
        return SparseRows.find(values)
    return None


def _make_transposition(num_bytes: int) -> Callable[..., None]:
    """Return the function that transposes a square of as many rows as a vector has elements, ``stride`` apart.

    ``rest`` columns are left, others become 0; ``count`` rows are left, the last one is repeated.
    """

    @intrinsic
    def transpose(  # type: ignore[no-untyped-def]
        typing, source, first, stride, count, rest, target, place, width
    ):
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            build = VectorBuilder(context, builder, signature, arguments, num_bytes)
            source, target = build.find(0), build.find(5)
            first, stride, count, rest, place, width = (arguments[i] for i in (1, 2, 3, 4, 6, 7))
            mask, last = build.make_mask(rest), builder.sub(count, I64(1))
            vectors = []
            for i in range(build.lanes):
                row = build.find_least(I64(i), last)
                offset = builder.add(builder.mul(row, stride), first)
                vectors.append(build.load(source, offset, mask))
            # perfect shuffles: each moves one bit of the row's number into that of the column
            half = build.lanes // 2
            low = [lane for i in range(half) for lane in (i, build.lanes + i)]
            high = [lane + half for lane in low]
            for _ in range(half.bit_length()):
                vectors = [
                    build.shuffle(vectors[i], vectors[i + half], lanes)
                    for i in range(half)
                    for lanes in (low, high)
                ]
            for i, vector in enumerate(vectors):
                build.store(vector, target, builder.add(place, builder.mul(I64(i), width)))
            return context.get_dummy_value()

        arguments = (source, first, stride, count, rest, target, place, width)
        return types.void(*arguments), generate

    return transpose


def _make_sum(num_bytes: int) -> Callable[..., None]:
    """Return the function that adds the products of a row's elements in one block to its sums for one panel.

    It also asks for cache lines of the ``following`` block, ``stride`` apart from ``ahead`` on.
    """

    @intrinsic
    def add_products(  # type: ignore[no-untyped-def]
        typing, source, start, bits, panel, sums, first, following, ahead, stride
    ):
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            build = VectorBuilder(context, builder, signature, arguments, num_bytes)
            source, panel, sums, following = (build.find(i) for i in (0, 3, 4, 6))
            start, bits, first, ahead, stride = (arguments[i] for i in (1, 2, 5, 7, 8))
            shifts = [I64(v * build.lanes) for v in range(VECTORS)]
            for line in range(BLOCK * build.size // TILE_BYTES):
                build.prefetch(following, builder.add(ahead, builder.mul(I64(line), stride)))
            before = [build.load(sums, builder.add(first, shift)) for shift in shifts]
            entry = builder.block
            loop, body, end = (builder.append_basic_block(name) for name in ("loop", "body", "end"))
            builder.branch(loop)
            builder.position_at_end(loop)
            left = builder.phi(I64)
            totals = [builder.phi(build.kind) for _ in shifts]
            builder.cbranch(builder.icmp_signed("!=", left, I64(0)), body, end)
            builder.position_at_end(body)
            term = builder.cttz(left, ir.IntType(1)(1))
            factor = build.spread(build.read(source, builder.add(start, term)))
            weights = builder.mul(term, I64(VECTORS * build.lanes))
            after = [
                build.multiply_add(factor, build.load(panel, builder.add(weights, shift)), total)
                for shift, total in zip(shifts, totals, strict=True)
            ]
            others = builder.and_(left, builder.sub(left, I64(1)))
            builder.branch(loop)
            for block, number, values in ((entry, bits, before), (body, others, after)):
                left.add_incoming(number, block)
                for total, value in zip(totals, values, strict=True):
                    total.add_incoming(value, block)
            builder.position_at_end(end)
            for shift, total in zip(shifts, totals, strict=True):
                build.store(total, sums, builder.add(first, shift))
            return context.get_dummy_value()

        arguments = (source, start, bits, panel, sums, first, following, ahead, stride)
        return types.void(*arguments), generate

    return add_products


def make_sparse_product(num_bytes: int) -> Callable[..., None]:
    """Return `SparseRows.multiply` on vectors of ``num_bytes`` bytes, for panels from first to end.

    The weight is a flat array of `Tiles` of ``width`` columns. There is room for a block of a panel, and for the sums
    (rows, outputs of a panel).
    """
    transpose, add_products = _make_transposition(num_bytes), _make_sum(num_bytes)

    @row_function
    def copy(target, source):  # type: ignore[no-untyped-def]
        for j in range(min(target.size, source.size)):
            target[j] = source[j]

    @row_function
    def pack_block(  # type: ignore[no-untyped-def]
        weight, width, outputs, terms, first_output, first_term, panel, panel_width
    ):
        lanes = num_bytes // weight.itemsize
        for j in range(0, min(panel_width, outputs - first_output), lanes):
            output = first_output + j
            for t in range(0, min(BLOCK, terms - first_term), lanes):
                term = first_term + t
                transpose(
                    weight, find_place(output, term, outputs, width), width,
                    outputs - output, terms - term, panel, t * panel_width + j, panel_width,
                )  # fmt: skip

    @row_function
    def multiply(  # type: ignore[no-untyped-def]
        values, bits, weight, width, panel, sums, bias, target, first_panel, end_panel
    ):
        (rows, terms), outputs = values.shape, bias.size
        line, panel_width = TILE_BYTES // values.itemsize, sums.shape[1]
        for output in range(
            first_panel * panel_width, min(end_panel * panel_width, outputs), panel_width
        ):
            own = slice(output, min(output + panel_width, outputs))
            for first_row in range(0, rows, ROWS):
                count = min(ROWS, rows - first_row)
                for row in range(count):
                    copy(sums[row], bias[own])
                for block in range(bits.shape[0]):
                    term = block * BLOCK
                    pack_block(weight, width, outputs, terms, output, term, panel, panel_width)
                    for row in range(count):
                        # every row asks for one output's weights in the next block
                        ahead = find_place(output + row, term + BLOCK, outputs, width)
                        after = find_place(output + row, term + BLOCK + line, outputs, width)
                        add_products(
                            values, (first_row + row) * terms + term, bits[block, first_row + row],
                            panel, sums, row * panel_width, weight, ahead, after - ahead,
                        )  # fmt: skip
                for row in range(count):
                    copy(target[first_row + row, own], sums[row])

    return multiply


_multiply_panels = make_sparse_product(find_registers()[0])


@functools.cache
def _compile() -> Callable[..., None]:
    # it closes over a number alone, else numba would not find it in its cache again
    digest = digest_sources(bit_masks, kernel_rows, row_vectors, tiles)

    @product_kernel
    def multiply(  # type: ignore[no-untyped-def]
        values, bits, weight, width, panel, sums, bias, target, first_panel, end_panel
    ):
        _ = digest
        _multiply_panels(
            values, bits, weight, width, panel, sums, bias, target, first_panel, end_panel
        )

    return multiply
