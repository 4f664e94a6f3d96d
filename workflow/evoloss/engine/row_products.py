"""Products of weights and rows at offsets, compiled with numba: matrix products, and convolution without copies.

The convolutional path is made of them, and the compiled meta-step of linear classifiers; no path owns them.

Images are stored batch-innermost, (channels, height, width, batch), so one row of an image is contiguous over columns
*and* samples, and a kernel tap is a shift of the whole row. A convolution and its transpose are then matrix products
whose operands are rows at given offsets, and no copy of the input (im2col) is made. `evoloss.engine.row_dots` has the
weight gradient.

A few sums of a few vectors each stay in registers from the first tap to the last, as in any fast matrix product
(Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008). A compiler does not do that to plain
loops, so the block is written in LLVM's language, with vectors as long as the processor's; LLVM turns them into what
there is.

``contract`` and ``reassoc`` change rounding alone; NaN and infinity stay what they are.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from evoloss.engine.kernel_rows import RowCompiler

_FLAGS = {"contract", "reassoc"}

row_block = numba.njit(
    error_model="numpy", pipeline_class=RowCompiler, forceinline=True, fastmath=_FLAGS
)
row_function = numba.njit(error_model="numpy", pipeline_class=RowCompiler, fastmath=_FLAGS)
product_kernel = numba.njit(
    error_model="numpy", pipeline_class=RowCompiler, nogil=True, cache=True, fastmath=_FLAGS
)


@functools.cache
def find_registers() -> tuple[int, int]:
    """Return the bytes of this processor's vectors and how many of them sums may take, others being for operands."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 64, 24
    if features.get("avx"):
        return 32, 12
    return 16, 24 if platform.machine().lower() in ("arm64", "aarch64") else 12


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
            weights, place, taps, source, start, target, out, stride, bias, first, rest = arguments
            i64, i32 = ir.IntType(64), ir.IntType(32)
            element = context.get_data_type(signature.args[0].dtype)
            size = 4 if element == ir.FloatType() else 8
            lanes = num_bytes // size
            vector, bits = ir.VectorType(element, lanes), ir.VectorType(ir.IntType(1), lanes)
            suffix = f"v{lanes}f{8 * size}"

            def find(number: int, array: Any) -> Any:
                return context.make_array(signature.args[number])(context, builder, array)

            def spread(value: Any) -> Any:
                kind = ir.VectorType(value.type, lanes)
                one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, i32(0))
                zeros = ir.Constant(ir.VectorType(i32, lanes), [0] * lanes)
                return builder.shuffle_vector(one, one, zeros)

            def declare(name: str, result: Any, *kinds: Any) -> Any:
                kind, name = ir.FunctionType(result, kinds), f"llvm.masked.{name}.{suffix}.p0"
                return cgutils.get_or_insert_function(builder.module, kind, name)  # type: ignore[no-untyped-call]

            pointer = vector.as_pointer()
            if masked:
                numbers = ir.Constant(ir.VectorType(i64, lanes), list(range(lanes)))
                masks = [
                    builder.icmp_signed("<", numbers, spread(builder.sub(rest, i64(v * lanes))))
                    for v in range(num_vectors)
                ]
                masked_load = declare("load", vector, pointer, i32, bits, vector)
                masked_store = declare("store", ir.VoidType(), vector, pointer, i32, bits)

            def load(data: Any, offset: Any, v: int) -> Any:
                at = builder.gep(data, [builder.add(offset, i64(v * lanes))])
                at = builder.bitcast(at, pointer)
                if masked:
                    nothing = ir.Constant(vector, None)
                    return builder.call(masked_load, [at, i32(size), masks[v], nothing])
                return builder.load(at, align=size)

            def store(value: Any, data: Any, offset: Any, v: int) -> None:
                at = builder.gep(data, [builder.add(offset, i64(v * lanes))])
                at = builder.bitcast(at, pointer)
                if masked:
                    builder.call(masked_store, [value, at, i32(size), masks[v]])
                else:
                    builder.store(value, at, align=size)

            weight_array, bias_array, tap_array = find(0, weights), find(8, bias), find(2, taps)
            width = builder.extract_value(weight_array.shape, 1)
            count = builder.extract_value(tap_array.shape, 0)
            data, result = find(3, source).data, find(5, target).data
            rows = [builder.add(out, builder.mul(i64(i), stride)) for i in range(num_rows)]
            places = [builder.add(place, builder.mul(i64(i), width)) for i in range(num_rows)]
            cells = [(i, v) for i in range(num_rows) for v in range(num_vectors)]
            names = ("fresh", "added", "loop", "end")
            fresh, added, loop, end = (builder.append_basic_block(name) for name in names)
            has_bias = builder.icmp_signed(">", builder.extract_value(bias_array.shape, 0), i64(0))
            builder.cbranch(has_bias, fresh, added)
            builder.position_at_end(fresh)
            biases = [
                spread(builder.load(builder.gep(bias_array.data, [builder.add(first, i64(i))])))
                for i in range(num_rows)
            ]
            builder.branch(loop)
            builder.position_at_end(added)
            standing = [load(result, rows[i], v) for i, v in cells]
            builder.branch(loop)
            builder.position_at_end(loop)
            tap = builder.phi(i64)
            sums = [builder.phi(vector) for _ in cells]
            for block, values in ((fresh, [biases[i] for i, _ in cells]), (added, standing)):
                tap.add_incoming(i64(0), block)
                for total, value in zip(sums, values, strict=True):
                    total.add_incoming(value, block)
            shift = builder.load(builder.gep(tap_array.data, [tap]))
            offset = builder.add(start, shift)
            values = [load(data, offset, v) for v in range(num_vectors)]
            totals = []
            for i in range(num_rows):
                at = builder.add(places[i], tap)
                weight = spread(builder.load(builder.gep(weight_array.data, [at])))
                for v in range(num_vectors):
                    term = builder.fmul(weight, values[v], flags=("contract",))
                    total = sums[i * num_vectors + v]
                    totals.append(builder.fadd(total, term, flags=("contract",)))
            following = builder.add(tap, i64(1))
            tap.add_incoming(following, loop)
            for total, value in zip(sums, totals, strict=True):
                total.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
            builder.position_at_end(end)
            for (i, v), value in zip(cells, totals, strict=True):
                store(value, result, rows[i], v)
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
    def multiply(weights, m, source, start, taps, target, out, stride, length, bias):  # type: ignore[no-untyped-def]
        place = m * weights.shape[1]
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
    weights, source, source_start, taps, target, target_start, stride, rows, length, bias
):
    """Do what `multiply_rows` does, for one row."""
    m = 0
    while m < rows:
        out, left = target_start + m * stride, rows - m
        blocks = (left + 7) // 8
        size = (left + blocks - 1) // blocks  # nearly equal blocks keep more registers busy
        if size > 6 and left >= 8:
            _8(weights, m, source, source_start, taps, target, out, stride, length, bias)
            m += 8
        elif size > 4 and left >= 6:
            _6(weights, m, source, source_start, taps, target, out, stride, length, bias)
            m += 6
        elif size > 2 and left >= 4:
            _4(weights, m, source, source_start, taps, target, out, stride, length, bias)
            m += 4
        elif left >= 2:
            _2(weights, m, source, source_start, taps, target, out, stride, length, bias)
            m += 2
        else:
            _1(weights, m, source, source_start, taps, target, out, stride, length, bias)
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
            weights, source, source_starts[r], taps,
            target, target_starts[r], stride, rows, length, bias,
        )  # fmt: skip


@row_function
def scatter_row(  # type: ignore[no-untyped-def]
    weights, source, source_start, taps, target, target_start, shifts, stride, rows, length, keep
):
    """Do what `scatter_rows` does, for one row."""
    for k in range(shifts.size):
        multiply_row(
            weights[k], source, source_start, taps,
            target, target_start + shifts[k], stride, rows, length, keep,
        )  # fmt: skip


@product_kernel
def scatter_rows(  # type: ignore[no-untyped-def]
    weights, source, source_starts, taps, target, target_starts, shifts, stride, rows, length, keep
):
    """Add to rows of ``target`` weighted sums of rows of ``source``: the transpose of `multiply_rows`.

    For all r, k and m < ``rows``: ``target[target_starts[r] + shifts[k] + m * stride + j]`` += sum over t of
    ``weights[k, m, t] * source[source_starts[r] + taps[t] + j]``, j < ``length``.

    Parameters
    ----------
    weights : array (K, rows, taps), contiguous
    shifts : int64 array (K,)
    keep : empty array of the same dtype
    """
    for r in range(source_starts.size):
        scatter_row(
            weights, source, source_starts[r], taps,
            target, target_starts[r], shifts, stride, rows, length, keep,
        )  # fmt: skip


@product_kernel
def clear(x):  # type: ignore[no-untyped-def]
    """Make every element of a flat array 0."""
    for j in range(x.size):
        x[j] = 0
