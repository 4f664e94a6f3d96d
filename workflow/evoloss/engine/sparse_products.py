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

from evoloss.engine import kernel_rows, row_vectors
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

VECTORS = 8
"""Vectors of outputs in a panel: a row's sums for them stay in registers."""
ROWS = 1024
"""Rows that a panel's outputs are computed for at a time, so that their sums lie in the second-level cache."""
MIN_ROWS = 32
"""With fewer, a weight is read too seldom for what it takes to transpose it."""
MIN_MULTIPLICATIONS = 2**21
"""A product of fewer is left to a matrix product."""
MAX_SHARE = 0.75
"""With more elements other than 0, a matrix is left to a matrix product."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Panels:
    """A weight (outputs, terms) as `SparseRows.multiply` reads it, for more than one product."""

    values: Tensor
    num_outputs: int


@dataclass(frozen=True)
class SparseRows:
    """A matrix ``values`` (rows, terms) and its `find_bits`."""

    values: Tensor
    bits: Bits

    @classmethod
    def find(cls, values: Tensor) -> SparseRows | None:
        """Return a matrix on the CPU, or None if it has too few zeros."""
        values = values.contiguous()
        bits = find_bits(values)
        count = int(np.bitwise_count(bits.view(np.uint64)).sum(dtype=np.int64))
        return cls(values, bits) if count <= MAX_SHARE * values.numel() else None

    def multiply(self, weight: Tensor | Panels, bias: Tensor | None = None) -> Tensor:
        """Return values W^T + b (rows, outputs) for a weight (outputs, terms) and a bias (outputs,).

        Zeros are left out, so a weight that is not finite does nothing where it meets them alone.
        """
        array = self.values.numpy()
        if isinstance(weight, Panels):
            num_outputs, plain, panels = (
                weight.num_outputs,
                np.empty((0, 0), array.dtype),
                weight.values,
            )
        else:
            num_outputs, plain, panels = len(weight), weight.contiguous().numpy(), None
        out = torch.empty(len(array), num_outputs, dtype=self.values.dtype)
        target = out.numpy()
        first = (out.new_zeros(num_outputs) if bias is None else bias.contiguous()).numpy()
        multiply = _compile()[1]

        def make_rooms() -> tuple[Array, Array]:
            width = find_width(array.dtype)
            sums = out.new_zeros(min(ROWS, len(out)), width)
            return (
                out.new_empty(BLOCK * width) if panels is None else panels
            ).numpy(), sums.numpy()

        def work(rooms: tuple[Array, Array], share: tuple[int, int]) -> None:
            multiply(array, self.bits, plain, *rooms, first, target, *share)

        map_on_threads(make_rooms, work, _share_panels(num_outputs, array.dtype))
        return out


def is_worthwhile(rows: int, terms: int, outputs: int) -> bool:
    """Tell whether a product is faster without the zeros, if half of the elements are 0."""
    return rows >= MIN_ROWS and rows * terms * outputs >= MIN_MULTIPLICATIONS


def find_sparse(activation: str, values: Tensor, num_outputs: int) -> SparseRows | None:
    """Return an activation's values (rows, terms) if that is worthwhile for ``num_outputs`` outputs, else None."""
    rows, terms = values.shape
    if activation == "relu" and is_worthwhile(rows, terms, num_outputs):
        return SparseRows.find(values)
    return None


def pack_panels(weight: Tensor) -> Panels:
    """Return a weight (outputs, terms) in panels."""
    source = weight.contiguous().numpy()
    num_outputs, terms = source.shape
    width = find_width(source.dtype)
    size = find_panel_size(terms, source.dtype)
    panels = weight.new_empty(-(-num_outputs // width) * size)
    target = panels.numpy()
    pack = _compile()[0]
    map_on_threads(
        lambda: None,
        lambda _, share: pack(source, target, *share),
        _share_panels(num_outputs, source.dtype),
    )
    return Panels(panels, num_outputs)


def find_width(dtype: np.dtype[Any]) -> int:
    """Return the outputs of a panel."""
    return VECTORS * find_registers()[0] // dtype.itemsize


def find_panel_size(terms: int, dtype: np.dtype[Any]) -> int:
    """Return the elements of a panel; terms are padded to whole vectors."""
    lanes = find_registers()[0] // dtype.itemsize
    return -(-terms // lanes) * lanes * find_width(dtype)


def _share_panels(num_outputs: int, dtype: np.dtype[Any]) -> list[tuple[int, int]]:
    """Return the first panel of every thread and the one after its last."""
    count, panels = torch.get_num_threads(), -(-num_outputs // find_width(dtype))
    edges = [panels * i // count for i in range(count + 1)]
    return [(first, end) for first, end in itertools.pairwise(edges) if first < end]


def _make_transposition(num_bytes: int) -> Callable[..., None]:
    """Return the function that transposes a square of as many rows as a vector has elements.

    ``rest`` columns are left, others become 0; after the last row it is repeated.
    """

    @intrinsic
    def transpose(  # type: ignore[no-untyped-def]
        typing, source, row, column, rest, target, place, stride
    ):
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            build = VectorBuilder(context, builder, signature, arguments, num_bytes)
            source, target = build.find(0), build.find(4)
            row, column, rest, place, stride = (arguments[i] for i in (1, 2, 3, 5, 6))
            mask = build.make_mask(rest)
            rows, columns = (builder.extract_value(source.shape, i) for i in (0, 1))
            last = builder.sub(rows, I64(1))
            vectors = []
            for i in range(build.lanes):
                number = build.find_least(builder.add(row, I64(i)), last)
                offset = builder.add(builder.mul(number, columns), column)
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
                build.store(vector, target, builder.add(place, builder.mul(I64(i), stride)))
            return context.get_dummy_value()

        arguments = (source, row, column, rest, target, place, stride)
        return types.void(*arguments), generate

    return transpose


def _make_sum(num_bytes: int) -> Callable[..., None]:
    """Return the function that adds the products of a row's elements in one block to its sums for one panel."""

    @intrinsic
    def add_products(  # type: ignore[no-untyped-def]
        typing, source, start, bits, panels, place, sums, first, following, ahead
    ):
        def generate(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            build = VectorBuilder(context, builder, signature, arguments, num_bytes)
            source, panels, sums, following = (build.find(i) for i in (0, 3, 5, 7))
            start, bits, place, first, ahead = (arguments[i] for i in (1, 2, 4, 6, 8))
            shifts = [I64(v * build.lanes) for v in range(VECTORS)]
            for line in range(0, BLOCK * build.size, 64):
                build.prefetch(following, builder.add(ahead, I64(line // build.size)))
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
            weights = builder.add(place, builder.mul(term, I64(VECTORS * build.lanes)))
            after = [
                build.multiply_add(factor, build.load(panels, builder.add(weights, shift)), total)
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

        arguments = (source, start, bits, panels, place, sums, first, following, ahead)
        return types.void(*arguments), generate

    return add_products


def make_sparse_product(num_bytes: int) -> tuple[Callable[..., Any], ...]:
    """Return `pack` and `multiply` on vectors of ``num_bytes`` bytes, for panels from first to end.

    If the weight is empty, `multiply` gets all panels; else room for a block of one. ``sums`` (rows, outputs of a
    panel) is room, too.
    """
    transpose, add_products = _make_transposition(num_bytes), _make_sum(num_bytes)

    @row_function
    def copy(target, source):  # type: ignore[no-untyped-def]
        for j in range(min(target.size, source.size)):
            target[j] = source[j]

    @row_function
    def pack_block(weight, column, first, panels, place):  # type: ignore[no-untyped-def]
        outputs, terms = weight.shape
        lanes = num_bytes // weight.itemsize
        width = VECTORS * lanes
        for output in range(0, min(width, outputs - column), lanes):
            for term in range(first, min(first + BLOCK, terms), lanes):
                transpose(
                    weight, column + output, term, terms - term,
                    panels, place + (term - first) * width + output, width,
                )  # fmt: skip

    @row_function
    def pack(weight, panels, first_panel, end_panel):  # type: ignore[no-untyped-def]
        terms = weight.shape[1]
        lanes = num_bytes // weight.itemsize
        width = VECTORS * lanes
        size = (terms + lanes - 1) // lanes * lanes * width
        for panel in range(first_panel, end_panel):
            for term in range(0, terms, BLOCK):
                pack_block(weight, panel * width, term, panels, panel * size + term * width)

    @row_function
    def multiply(  # type: ignore[no-untyped-def]
        values, bits, weight, panels, sums, bias, target, first_panel, end_panel
    ):
        (rows, terms), outputs = values.shape, bias.size
        lanes = num_bytes // values.itemsize
        width = VECTORS * lanes
        size = (terms + lanes - 1) // lanes * lanes * width
        plain = weight.size > 0
        for panel in range(first_panel, end_panel):
            column = panel * width
            rest = min(width, outputs - column)
            for first_row in range(0, rows, ROWS):
                count = min(ROWS, rows - first_row)
                for row in range(count):
                    copy(sums[row], bias[column : column + rest])
                for block in range(bits.shape[0]):
                    term = block * BLOCK
                    place = panel * size + term * width
                    if plain:
                        place = 0
                        pack_block(weight, column, term, panels, place)
                    for row in range(count):
                        start = (first_row + row) * terms + term
                        nonzero = bits[block, first_row + row]
                        if plain:
                            add_products(
                                values, start, nonzero, panels, place, sums, row * width,
                                weight, (column + row) * terms + term + BLOCK,
                            )  # fmt: skip
                        else:
                            add_products(
                                values, start, nonzero, panels, place, sums, row * width,
                                panels, place + BLOCK * width + row * BLOCK,
                            )  # fmt: skip
                for row in range(count):
                    copy(target[first_row + row, column : column + rest], sums[row])

    return pack, multiply


_pack, _multiply = make_sparse_product(find_registers()[0])


@functools.cache
def _compile() -> tuple[Callable[..., Any], ...]:
    # they close over a number alone, else numba would not find them in its cache again
    digest = digest_sources(kernel_rows, row_vectors)

    @product_kernel
    def pack(weight, panels, first_panel, end_panel):  # type: ignore[no-untyped-def]
        _ = digest
        _pack(weight, panels, first_panel, end_panel)

    @product_kernel
    def multiply(  # type: ignore[no-untyped-def]
        values, bits, weight, panels, sums, bias, target, first_panel, end_panel
    ):
        _ = digest
        _multiply(values, bits, weight, panels, sums, bias, target, first_panel, end_panel)

    return pack, multiply
