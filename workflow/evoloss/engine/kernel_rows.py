"""What the kernels' sweeps are made of: how numba compiles a row of elements, opcodes, elementary functions.

A row is one instruction's value (or tangent, or adjoint) at the `BLOCK` elements that a sweep handles at a time; all
rows of a block fit into the first-level cache. The opcodes are literal, so that compiled code needs no table:
`evoloss.engine.kernels.check_operator_table` compares.
"""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.extending import overload

BLOCK = 256
ADD, SUB, MUL, AQ, MIN, MAX = 0, 1, 2, 3, 4, 5
SIGN, SQUARE, ABS, LOG, SQRT, TANH = 6, 7, 8, 9, 10, 11
LABEL_CODE, PREDICTION_CODE, ONE_CODE = 12, 13, 14
PROTECTION = 1e-7
TERMINALS = 3
"""Rows of ``x`` and ``d`` that all programs share: y, f and 1; instruction i has row ``TERMINALS + i``."""


class RowCompiler(CompilerBase):
    """Compiles functions on arrays that do not overlap and that somebody else owns.

    Without the promise LLVM checks every pair of rows at run time or does not vectorise; counting references to views
    costs more than the arithmetic.

    Code that is loaded from numba's cache calls whatever function of the right name is loaded already, and a name is
    made unique by a number that numba counts anew in every process: several processes' code in one cache could be
    mixed up (numba issue 10486). Here the number is random.
    """

    def define_pipelines(self) -> list[Any]:
        """Return numba's own passes, with both promises made, under a name of its own."""
        self.state.func_id.unique_id = uuid.uuid4().int
        self.state.flags.noalias = True
        self.state.targetctx = self.state.targetctx.subtarget(enable_nrt=False)
        return [DefaultPassBuilder.define_nopython_pipeline(self.state)]  # type: ignore[no-untyped-call]


row_function = numba.njit(error_model="numpy", pipeline_class=RowCompiler, forceinline=True)
row_sum = numba.njit(
    error_model="numpy", pipeline_class=RowCompiler, forceinline=True, fastmath={"reassoc"}
)
sweep = numba.njit(error_model="numpy", pipeline_class=RowCompiler)
kernel = numba.njit(error_model="numpy", pipeline_class=RowCompiler, cache=True, nogil=True)
"""The only functions that are kept on disk; see `digest_sources`."""


def digest_sources(*modules: ModuleType) -> int:
    """Return a number that changes with the modules' source.

    Numba's cache on disk sees changes of the file that a function stands in and of what its closure holds: a digest of
    the other files.
    """
    sources = b"".join(Path(str(module.__file__)).read_bytes() for module in modules)
    return int.from_bytes(hashlib.sha256(sources).digest()[:7], "big")


def log(x: Any) -> Any:
    """Logarithm of a normal number > 0; in float32 a polynomial that LLVM vectorises, within 1 ulp."""
    return np.log(x)


@overload(log)
def _overload_log(x):  # type: ignore[no-untyped-def]
    if x != numba.float32:
        return lambda x: np.log(x)

    def log32(x):  # type: ignore[no-untyped-def]
        # Cephes logf: x = 2^k (1 + r), sqrt(1/2) <= 1 + r < sqrt(2)
        bits = np.float32(x).view(np.int32)
        k = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
        r = np.int32(bits - (k << np.int32(23))).view(np.float32) - np.float32(1)
        z = np.float32(7.0376836292e-2) * r - np.float32(1.1514610310e-1)
        z = z * r + np.float32(1.1676998740e-1)
        z = z * r - np.float32(1.2420140846e-1)
        z = z * r + np.float32(1.4249322787e-1)
        z = z * r - np.float32(1.6668057665e-1)
        z = z * r + np.float32(2.0000714765e-1)
        z = z * r - np.float32(2.4999993993e-1)
        z = z * r + np.float32(3.3333331174e-1)
        z = z * r * (r * r) - np.float32(2.12194440e-4) * np.float32(k)
        return r + (z - np.float32(0.5) * (r * r)) + np.float32(0.693359375) * np.float32(k)

    return log32


def exp(x: Any) -> Any:
    """Exponential of a number <= 0; in float32 a polynomial that LLVM vectorises, within 2 ulp, and 0 below 1e-37."""
    return np.exp(x)


@overload(exp)
def _overload_exp(x):  # type: ignore[no-untyped-def]
    if x != numba.float32:
        return lambda x: np.exp(x)

    def exp32(x):  # type: ignore[no-untyped-def]
        # Cephes expf
        least = np.float32(-87)
        v = x if x > least else least
        k = np.floor(v * np.float32(1.44269504) + np.float32(0.5))
        r = v - k * np.float32(0.693359375) + k * np.float32(2.12194440e-4)
        e = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
        e = e * r + np.float32(8.3334519073e-3)
        e = e * r + np.float32(4.1665795894e-2)
        e = e * r + np.float32(1.6666665459e-1)
        e = e * r + np.float32(5.0000001201e-1)
        power = np.int32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)
        y = (e * r * r + r + np.float32(1)) * power
        y = y if x > least else np.float32(0)
        return y if x == x else x

    return exp32


def tanh(x: Any) -> Any:
    """Hyperbolic tangent; in float32 polynomials that LLVM vectorises, within 2 ulp."""
    return np.tanh(x)


@overload(tanh)
def _overload_tanh(x):  # type: ignore[no-untyped-def]
    if x != numba.float32:
        return lambda x: np.tanh(x)

    def tanh32(x):  # type: ignore[no-untyped-def]
        # Cephes tanhf: an odd polynomial near 0
        s = x * x
        near = np.float32(-5.70498872745e-3) * s + np.float32(2.06390887954e-2)
        near = near * s - np.float32(5.37397155531e-2)
        near = near * s + np.float32(1.33314422036e-1)
        near = near * s - np.float32(3.33332819422e-1)
        near = near * s * x + x
        far = np.float32(1) - distance_to_one(x, np.float32(1))
        far = far if x > np.float32(0) else -far
        far = far if x == x else x
        return near if abs(x) < np.float32(0.625) else far

    return tanh32


@row_function
def distance_to_one(x, one):  # type: ignore[no-untyped-def]
    """Return 1 - tanh|x|, exact to a few ulp where it is small too."""
    e = exp(-abs(x + x))
    return (e + e) / (one + e)


@row_function
def tanh_slope(x, one):  # type: ignore[no-untyped-def]
    """Return the derivative of tanh; 1 - tanh(x)^2 would lose its digits where tanh is close to 1."""
    distance = distance_to_one(x, one)
    return distance * (one + one - distance)


@row_function
def fill(x, value):  # type: ignore[no-untyped-def]
    """Make every element of a row ``value``."""
    for e in range(BLOCK):
        x[e] = value


@row_function
def load(x, source, start, rest):  # type: ignore[no-untyped-def]
    """Fill a row from ``source[start:]``; elements that it lacks become ``rest``."""
    part = source[start : start + BLOCK]
    if len(part) < BLOCK:
        fill(x, rest)
    for e in range(len(part)):
        x[e] = part[e]


@row_function
def load_repeated(x, source, start, count, rest):  # type: ignore[no-untyped-def]
    """Fill a row's first ``count`` elements from ``start`` of endlessly repeated ``source``, others with ``rest``."""
    if count < BLOCK:
        fill(x, rest)
    place, done = start % source.size, 0
    while done < count:
        part = source[place : place + count - done]
        for e in range(part.size):
            x[done + e] = part[e]
        done += part.size
        place = 0


@row_function
def store(target, start, x, w):  # type: ignore[no-untyped-def]
    """Write ``w`` times a row to ``target[start:]``, as far as that goes."""
    part = target[start : start + BLOCK]
    for e in range(len(part)):
        part[e] = w * x[e]


@row_function
def add_to(x, other):  # type: ignore[no-untyped-def]
    """Add another row to a row."""
    for e in range(BLOCK):
        x[e] += other[e]


@row_sum
def sum_products(p, x, q, d):  # type: ignore[no-untyped-def]
    """Return sum(p * x + q * d)."""
    total = p.dtype.type(0.0)
    for e in range(BLOCK):
        total += p[e] * x[e] + q[e] * d[e]
    return total


@row_sum
def sum_product(p, x):  # type: ignore[no-untyped-def]
    """Return sum(p * x)."""
    total = p.dtype.type(0.0)
    for e in range(BLOCK):
        total += p[e] * x[e]
    return total


@row_function
def find_row(ops, lo, place):  # type: ignore[no-untyped-def]
    """Return the row of ``x`` and ``d`` that holds instruction ``place`` of the program that starts at ``lo``."""
    op = ops[lo + place]
    return op - LABEL_CODE if op >= LABEL_CODE else TERMINALS + place


@row_function
def share(va, vb, s, one):  # type: ignore[no-untyped-def]
    """Return a's share of the derivative of max (s = 1) or min (s = -1); ties share it, as in torch; NaN stays NaN."""
    tie = one / (one + one) if va == vb else va + vb
    return one if s * va > s * vb else (one - one if s * va < s * vb else tie)


@row_function
def sign(v, one):  # type: ignore[no-untyped-def]
    """Return the sign of v; 0 and NaN stay what they are."""
    return one if v > one - one else (-one if v < one - one else v)
