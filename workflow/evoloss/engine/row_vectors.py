"""LLVM code on vectors as long as the processor's, for the blocks of sums that products of rows are made of.

Given plain loops a compiler does not keep a block of sums in registers, nor use the longest vectors of every processor.
So these blocks are written in LLVM's language, and LLVM turns vectors into what there is.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from typing import Any

import llvmlite.binding
import numba
from llvmlite import ir
from numba.core import cgutils

from evoloss.engine.kernel_rows import RowCompiler

_FLAGS = {"contract", "reassoc"}  # change rounding alone: NaN and infinity stay what they are

row_block = numba.njit(
    error_model="numpy", pipeline_class=RowCompiler, forceinline=True, fastmath=_FLAGS
)
row_function = numba.njit(error_model="numpy", pipeline_class=RowCompiler, fastmath=_FLAGS)
product_kernel = numba.njit(
    error_model="numpy", pipeline_class=RowCompiler, nogil=True, cache=True, fastmath=_FLAGS
)

I64, I32 = ir.IntType(64), ir.IntType(32)


@functools.cache
def find_registers() -> tuple[int, int]:
    """Return the bytes of this processor's vectors and how many of them sums may take, others being for operands."""
    features = llvmlite.binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 64, 24
    if features.get("avx"):
        return 32, 12
    return 16, 24 if platform.machine().lower() in ("arm64", "aarch64") else 12


class VectorBuilder:
    """Builds an intrinsic's code on vectors of ``num_bytes`` bytes of the elements of its first array argument.

    ``find`` gives the array that stands for an argument, by its number.
    """

    def __init__(
        self, context: Any, builder: Any, signature: Any, arguments: Sequence[Any], num_bytes: int
    ) -> None:
        self._context, self._builder = context, builder
        self._kinds, self._arguments = signature.args, arguments
        self.element = context.get_data_type(signature.args[0].dtype)
        self.size = 4 if self.element == ir.FloatType() else 8
        self.lanes = num_bytes // self.size
        self.kind = ir.VectorType(self.element, self.lanes)
        self.zero = ir.Constant(self.kind, None)

    def find(self, number: int) -> Any:
        """Return the array argument ``number``."""
        make = self._context.make_array(self._kinds[number])
        return make(self._context, self._builder, self._arguments[number])

    def read(self, array: Any, offset: Any) -> Any:
        """Return one element of an array."""
        return self._builder.load(self._builder.gep(array.data, [offset]))

    def find_least(self, a: Any, b: Any) -> Any:
        """Return the smaller one of two integers."""
        return self._builder.select(self._builder.icmp_signed("<", a, b), a, b)

    def spread(self, value: Any) -> Any:
        """Return a vector with a value in all lanes."""
        kind = ir.VectorType(value.type, self.lanes)
        one = self._builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
        zeros = ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes)
        return self._builder.shuffle_vector(one, one, zeros)

    def shuffle(self, a: Any, b: Any, lanes: Sequence[int]) -> Any:
        """Return the vector of these lanes of two vectors, those of ``b`` coming after those of ``a``."""
        return self._builder.shuffle_vector(
            a, b, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        )

    def multiply_add(self, a: Any, b: Any, total: Any) -> Any:
        """Return a * b + total."""
        term = self._builder.fmul(a, b, flags=("contract",))
        return self._builder.fadd(total, term, flags=("contract",))

    def make_sum(self) -> Any:
        """Return where a sum stands that is 0 at first; LLVM finds a register for it."""
        return cgutils.alloca_once_value(self._builder, self.zero)  # type: ignore[no-untyped-call]

    def make_mask(self, rest: Any) -> Any:
        """Return the mask of the first ``rest`` lanes."""
        numbers = ir.Constant(ir.VectorType(I64, self.lanes), list(range(self.lanes)))
        return self._builder.icmp_signed("<", numbers, self.spread(rest))

    def _declare(self, name: str, result: Any, *kinds: Any) -> Any:
        full = f"llvm.masked.{name}.v{self.lanes}f{8 * self.size}.p0"
        function = ir.FunctionType(result, kinds)
        return cgutils.get_or_insert_function(self._builder.module, function, full)  # type: ignore[no-untyped-call]

    def _point(self, array: Any, offset: Any, kind: Any) -> Any:
        return self._builder.bitcast(self._builder.gep(array.data, [offset]), kind.as_pointer())

    def load(self, array: Any, offset: Any, mask: Any = None) -> Any:
        """Return the vector that starts at an element; what ``mask`` leaves out is not read, and 0."""
        at = self._point(array, offset, self.kind)
        if mask is None:
            return self._builder.load(at, align=self.size)
        load = self._declare("load", self.kind, at.type, I32, mask.type, self.kind)
        return self._builder.call(load, [at, I32(self.size), mask, self.zero])

    def store(self, value: Any, array: Any, offset: Any, mask: Any = None) -> None:
        """Write a vector from an element on, but for what ``mask`` leaves out."""
        at = self._point(array, offset, self.kind)
        if mask is None:
            self._builder.store(value, at, align=self.size)
            return
        store = self._declare("store", ir.VoidType(), self.kind, at.type, I32, mask.type)
        self._builder.call(store, [value, at, I32(self.size), mask])

    def prefetch(self, array: Any, offset: Any, for_writing: bool = False) -> None:
        """Ask for an element's cache line to come to the second-level cache; it may lie outside the array."""
        at = self._builder.gep(array.data, [offset])
        name = f"llvm.prefetch.p{at.type.addrspace}"
        function = ir.FunctionType(ir.VoidType(), (at.type, I32, I32, I32))
        prefetch = cgutils.get_or_insert_function(self._builder.module, function, name)  # type: ignore[no-untyped-call]
        self._builder.call(prefetch, [at, I32(int(for_writing)), I32(2), I32(1)])

    def add_lanes(self, value: Any, lanes: Sequence[int], array: Any, offset: Any) -> None:
        """Add these lanes of a vector to elements of an array that follow each other."""
        part = self.shuffle(value, value, lanes)
        at = self._point(array, offset, part.type)
        standing = self._builder.load(at, align=self.size)
        self._builder.store(self._builder.fadd(standing, part), at, align=self.size)

    def sum_lanes(self, vectors: Sequence[Any]) -> list[Any]:
        """Return vectors whose lanes are the sums of the lanes of ``vectors``, one after the other."""
        even = list(range(0, 2 * self.lanes, 2))
        odd = [lane + 1 for lane in even]
        padded = [*vectors, *[self.zero] * (-len(vectors) % self.lanes)]
        width = self.lanes
        while width > 1:
            padded = [
                self._builder.fadd(self.shuffle(a, b, even), self.shuffle(a, b, odd))
                for a, b in zip(padded[::2], padded[1::2], strict=True)
            ]
            width //= 2
        return padded
