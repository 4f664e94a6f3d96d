"""Element-wise derivatives of a population of losses, compiled with numba.

For programs (`evoloss.expressions.program`) of P losses the kernels compute, for every element of label y and
prediction f,

- `loss_gradients`: dM/df, by forward mode,
- `mixed_gradients`: sum over elements of u * d2M / (df dphi) for given u, by one reverse sweep over the forward
  tangents: the last factor of the one-step meta-gradient (Raymond et al. 2023; see `evoloss.engine.unrolled`).

They work on blocks of elements, so that a loss's intermediate values stay in the first-level cache. All partial
derivatives below follow the protected operators' definition in `evoloss.expressions.operators`; a conformance test
compares them with autograd and SymPy. The first call of a process loads the compiled code from numba's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from evoloss.errors import ExpressionError
from evoloss.expressions import operators
from evoloss.expressions.program import Program

BLOCK = 64
# Literal, not computed from the operator table: numba's cache of compiled code sees changes of this file alone.
# `check_operator_table` compares.
ADD, SUB, MUL, AQ, MIN, MAX = 0, 1, 2, 3, 4, 5
SIGN, SQUARE, ABS, LOG, SQRT, TANH = 6, 7, 8, 9, 10, 11
LABEL_CODE, PREDICTION_CODE, ONE_CODE = 12, 13, 14
PROTECTION = 1e-7
_NAMES = "add sub mul aq min max sign square abs log sqrt tanh"


def check_operator_table() -> None:
    """Raise `ExpressionError` if the kernels do not follow the operator table (a row was added, moved or changed)."""
    names = tuple(operators.OPERATORS)
    if names != tuple(_NAMES.split()) or operators.PROTECTION != PROTECTION:
        raise ExpressionError(
            f"the kernels know the operators {_NAMES} with protection {PROTECTION}, but the table holds "
            f"{' '.join(names)} with {operators.PROTECTION}; bring evoloss/engine/kernels.py up to date"
        )


@dataclass(frozen=True, eq=False)
class PackedPrograms:
    """P programs end to end; program p occupies ``offsets[p]:offsets[p + 1]``."""

    ops: NDArray[np.int32]
    a: NDArray[np.int32]
    b: NDArray[np.int32]
    weights: NDArray[Any]
    trainable: NDArray[np.bool_]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1


def pack_programs(programs: Sequence[Program], dtype: Any = np.float32) -> PackedPrograms:
    """Join programs into the arrays that the kernels read; weights are converted to ``dtype``."""
    check_operator_table()
    lengths = [len(program) for program in programs]
    return PackedPrograms(
        np.concatenate([program.ops for program in programs]),
        np.concatenate([program.a for program in programs]),
        np.concatenate([program.b for program in programs]),
        np.concatenate([program.weights for program in programs]).astype(dtype),
        np.concatenate([program.trainable for program in programs]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


@numba.njit(cache=True, error_model="numpy", inline="never")
def _forward(ops, a, b, w, y, f, v, t):  # type: ignore[no-untyped-def]
    """Fill values ``v`` and tangents ``t`` = d value / df, both (instructions, BLOCK)."""
    size = y.shape[0]
    one = w.dtype.type(1.0)
    zero = w.dtype.type(0.0)
    half = w.dtype.type(0.5)
    tiny = w.dtype.type(PROTECTION)
    for i in range(ops.shape[0]):
        op = ops[i]
        wi = w[i]
        va, vb, ta, tb = v[a[i]], v[b[i]], t[a[i]], t[b[i]]
        vi, ti = v[i], t[i]
        if op == PREDICTION_CODE:
            for e in range(size):
                vi[e] = wi * f[e]
                ti[e] = wi
        elif op == LABEL_CODE:
            for e in range(size):
                vi[e] = wi * y[e]
                ti[e] = zero
        elif op == ONE_CODE:
            for e in range(size):
                vi[e] = wi
                ti[e] = zero
        elif op == ADD:
            for e in range(size):
                vi[e] = wi * (va[e] + vb[e])
                ti[e] = wi * (ta[e] + tb[e])
        elif op == SUB:
            for e in range(size):
                vi[e] = wi * (va[e] - vb[e])
                ti[e] = wi * (ta[e] - tb[e])
        elif op == MUL:
            for e in range(size):
                vi[e] = wi * (va[e] * vb[e])
                ti[e] = wi * (ta[e] * vb[e] + va[e] * tb[e])
        elif op == AQ:
            for e in range(size):
                r = one / np.sqrt(one + vb[e] * vb[e])
                q = va[e] * r
                vi[e] = wi * q
                ti[e] = wi * (ta[e] * r - q * (vb[e] * r) * r * tb[e])
        elif op in (MIN, MAX):
            s = one if op == MAX else -one
            for e in range(size):
                d = s * (va[e] - vb[e])
                # ties share the gradient, as in torch; a NaN argument stays NaN
                k = one if d > zero else (zero if d < zero else half)
                if va[e] != va[e] or vb[e] != vb[e]:
                    k = w.dtype.type(np.nan)
                vi[e] = wi * ((va[e] if d > zero else vb[e]) + (k - k))
                ti[e] = wi * (k * ta[e] + (one - k) * tb[e])
        elif op == SIGN:
            for e in range(size):
                x = va[e]
                vi[e] = wi * (one if x > zero else (-one if x < zero else x))
                ti[e] = zero
        elif op == SQUARE:
            for e in range(size):
                vi[e] = wi * (va[e] * va[e])
                ti[e] = wi * (va[e] + va[e]) * ta[e]
        elif op == ABS:
            for e in range(size):
                x = va[e]
                s = one if x > zero else (-one if x < zero else zero)
                vi[e] = wi * abs(x)
                ti[e] = wi * s * ta[e]
        elif op == LOG:
            for e in range(size):
                x = va[e]
                vi[e] = wi * np.log(max(abs(x), tiny)) + (x - x)
                ti[e] = wi * ta[e] / x if abs(x) >= tiny else zero
        elif op == SQRT:
            for e in range(size):
                x = va[e]
                r = np.sqrt(max(abs(x), tiny))
                s = one if x > zero else -one
                vi[e] = wi * r + (x - x)
                ti[e] = wi * half * s * ta[e] / r if abs(x) >= tiny else zero
        else:
            for e in range(size):
                h = np.tanh(va[e])
                vi[e] = wi * h
                ti[e] = wi * (one - h * h) * ta[e]


@numba.njit(cache=True, error_model="numpy", inline="never")
def _reverse(ops, a, b, w, y, f, u, v, t, bv, bt, dw):  # type: ignore[no-untyped-def]
    """Add to ``dw`` (instructions,) the derivative by the weights of sum(u * t[-1]).

    ``bv`` and ``bt`` are the adjoints of values and tangents. With x_i the unweighted operator value, v_i = w_i x_i, so
    the adjoint of x_i is w_i bv_i, and d/dw_i adds bv_i x_i + bt_i dx_i.
    """
    size = y.shape[0]
    n = ops.shape[0]
    one = w.dtype.type(1.0)
    zero = w.dtype.type(0.0)
    half = w.dtype.type(0.5)
    three = w.dtype.type(3.0)
    tiny = w.dtype.type(PROTECTION)
    for i in range(n - 1):
        for e in range(size):
            bv[i, e] = zero
            bt[i, e] = zero
    for e in range(size):
        bv[n - 1, e] = zero
        bt[n - 1, e] = u[e]
    for i in range(n - 1, -1, -1):
        op = ops[i]
        wi = w[i]
        va, vb, ta, tb = v[a[i]], v[b[i]], t[a[i]], t[b[i]]
        ba, bb, ca, cb = bv[a[i]], bv[b[i]], bt[a[i]], bt[b[i]]
        p, q = bv[i], bt[i]
        acc = zero
        if op == PREDICTION_CODE:
            for e in range(size):
                acc += p[e] * f[e] + q[e]
        elif op == LABEL_CODE:
            for e in range(size):
                acc += p[e] * y[e]
        elif op == ONE_CODE:
            for e in range(size):
                acc += p[e]
        elif op in (ADD, SUB):
            s = one if op == ADD else -one
            for e in range(size):
                acc += p[e] * (va[e] + s * vb[e]) + q[e] * (ta[e] + s * tb[e])
                ba[e] += wi * p[e]
                ca[e] += wi * q[e]
                bb[e] += wi * s * p[e]
                cb[e] += wi * s * q[e]
        elif op == MUL:
            for e in range(size):
                # read before writing: both arguments may be one shared instruction
                x, z, dx, dz = va[e], vb[e], ta[e], tb[e]
                acc += p[e] * (x * z) + q[e] * (dx * z + x * dz)
                ba[e] += wi * (p[e] * z + q[e] * dz)
                ca[e] += wi * q[e] * z
                bb[e] += wi * (p[e] * x + q[e] * dx)
                cb[e] += wi * q[e] * x
        elif op == AQ:
            for e in range(size):
                x, z, dx, dz = va[e], vb[e], ta[e], tb[e]
                r = one / np.sqrt(one + z * z)
                gz = -x * (z * r) * r * r
                gxz = -(z * r) * r * r
                gzz = x * r * r * r * (three * (z * r) * (z * r) - one)
                acc += p[e] * (x * r) + q[e] * (r * dx + gz * dz)
                ba[e] += wi * (p[e] * r + q[e] * gxz * dz)
                ca[e] += wi * q[e] * r
                bb[e] += wi * (p[e] * gz + q[e] * (gxz * dx + gzz * dz))
                cb[e] += wi * q[e] * gz
        elif op in (MIN, MAX):
            s = one if op == MAX else -one
            for e in range(size):
                x, z, dx, dz = va[e], vb[e], ta[e], tb[e]
                d = s * (x - z)
                k = one if d > zero else (zero if d < zero else half)
                acc += p[e] * (k * x + (one - k) * z) + q[e] * (k * dx + (one - k) * dz)
                ba[e] += wi * k * p[e]
                ca[e] += wi * k * q[e]
                bb[e] += wi * (one - k) * p[e]
                cb[e] += wi * (one - k) * q[e]
        elif op == SIGN:
            for e in range(size):
                x = va[e]
                acc += p[e] * (one if x > zero else (-one if x < zero else x))
        else:
            for e in range(size):
                x, dx = va[e], ta[e]
                if op == SQUARE:
                    g, g1, g2 = x * x, x + x, one + one
                elif op == ABS:
                    g, g2 = abs(x), zero
                    g1 = one if x > zero else (-one if x < zero else zero)
                elif op == LOG:
                    g = np.log(max(abs(x), tiny))
                    g1 = one / x if abs(x) >= tiny else zero
                    g2 = -g1 * g1
                elif op == SQRT:
                    g = np.sqrt(max(abs(x), tiny))
                    g1 = half / g if abs(x) >= tiny else zero
                    g2 = -half * g1 / abs(x) if abs(x) >= tiny else zero
                    if x < zero:
                        g1 = -g1
                else:
                    g = np.tanh(x)
                    g1 = one - g * g
                    g2 = -(g + g) * g1
                acc += p[e] * g + q[e] * g1 * dx
                ba[e] += wi * (p[e] * g1 + q[e] * g2 * dx)
                ca[e] += wi * q[e] * g1
        dw[i] += acc


@numba.njit(cache=True, error_model="numpy", nogil=True)
def _gradients(ops, a, b, w, offsets, y, f, out_value, out_gradient):  # type: ignore[no-untyped-def]
    longest = np.max(offsets[1:] - offsets[:-1])
    v = np.empty((longest, BLOCK), dtype=w.dtype)
    t = np.empty((longest, BLOCK), dtype=w.dtype)
    shared = f.shape[0] == 1
    for p in range(offsets.shape[0] - 1):
        lo, hi = offsets[p], offsets[p + 1]
        fp = f[0] if shared else f[p]
        for start in range(0, y.shape[0], BLOCK):
            stop = min(start + BLOCK, y.shape[0])
            _forward(ops[lo:hi], a[lo:hi], b[lo:hi], w[lo:hi], y[start:stop], fp[start:stop], v, t)
            for e in range(stop - start):
                out_value[p, start + e] = v[hi - lo - 1, e]
                out_gradient[p, start + e] = t[hi - lo - 1, e]


@numba.njit(cache=True, error_model="numpy", nogil=True)
def _mixed(ops, a, b, w, offsets, y, f, u, out):  # type: ignore[no-untyped-def]
    longest = np.max(offsets[1:] - offsets[:-1])
    v = np.empty((longest, BLOCK), dtype=w.dtype)
    t = np.empty((longest, BLOCK), dtype=w.dtype)
    bv = np.empty((longest, BLOCK), dtype=w.dtype)
    bt = np.empty((longest, BLOCK), dtype=w.dtype)
    shared = f.shape[0] == 1
    for p in range(offsets.shape[0] - 1):
        lo, hi = offsets[p], offsets[p + 1]
        fp = f[0] if shared else f[p]
        for start in range(0, y.shape[0], BLOCK):
            stop = min(start + BLOCK, y.shape[0])
            ys, fs, us = y[start:stop], fp[start:stop], u[p, start:stop]
            _forward(ops[lo:hi], a[lo:hi], b[lo:hi], w[lo:hi], ys, fs, v, t)
            _reverse(ops[lo:hi], a[lo:hi], b[lo:hi], w[lo:hi], ys, fs, us, v, t, bv, bt, out[lo:hi])


def loss_gradients(
    packed: PackedPrograms, y: NDArray[Any], f: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the losses' values and derivatives by f, element by element.

    Parameters
    ----------
    y : array (N,)
        Labels of all elements (samples x outputs, flattened).
    f : array (P, N) or (1, N)
        Predictions of every candidate, or those that all share. The dtype is that of ``packed.weights``.

    Returns
    -------
    value, gradient : arrays (P, N)
    """
    shape = (len(packed), y.shape[0])
    value = np.empty(shape, dtype=packed.weights.dtype)
    gradient = np.empty(shape, dtype=packed.weights.dtype)
    _gradients(
        packed.ops, packed.a, packed.b, packed.weights, packed.offsets, y, f, value, gradient
    )
    return value, gradient


def mixed_gradients(
    packed: PackedPrograms, y: NDArray[Any], f: NDArray[Any], u: NDArray[Any]
) -> NDArray[Any]:
    """Return d/dw of sum_e u[p, e] * dM_p/df[p, e], for every weight w of every program, shape ``(instructions,)``.

    ``y`` (N,), ``f`` (P, N) or (1, N), ``u`` (P, N); gradients of untrainable weights are computed too.
    """
    out = np.zeros(len(packed.ops), dtype=packed.weights.dtype)
    _mixed(packed.ops, packed.a, packed.b, packed.weights, packed.offsets, y, f, u, out)
    return out
