"""The kernels' forward sweep: values and derivatives by f of every instruction of a program, for a block of elements.

``x[r]`` is an instruction's value before its weight, ``d[r]`` the derivative of that by f. An operator whose argument a
has weight ``wa`` sees the value ``wa * x[a]`` and the tangent ``wa * d[a]``.
"""

from __future__ import annotations

import numpy as np

from evoloss.engine.kernel_rows import (
    ABS,
    ADD,
    AQ,
    BLOCK,
    LABEL_CODE,
    LOG,
    MAX,
    MIN,
    MUL,
    PROTECTION,
    SIGN,
    SQRT,
    SQUARE,
    SUB,
    TERMINALS,
    find_row,
    log,
    row_function,
    share,
    sign,
    sweep,
    tanh,
    tanh_slope,
)


@row_function
def _forward_linear(x, d, xa, da, wa, xb, db, wb):  # type: ignore[no-untyped-def]
    for e in range(BLOCK):
        x[e] = wa * xa[e] + wb * xb[e]
        d[e] = wa * da[e] + wb * db[e]


@row_function
def _forward_mul(x, d, xa, da, wa, xb, db, wb):  # type: ignore[no-untyped-def]
    for e in range(BLOCK):
        va, vb = wa * xa[e], wb * xb[e]
        x[e] = va * vb
        d[e] = (wa * da[e]) * vb + va * (wb * db[e])


@row_function
def _forward_aq(x, d, xa, da, wa, xb, db, wb):  # type: ignore[no-untyped-def]
    one = x.dtype.type(1.0)
    for e in range(BLOCK):
        vb = wb * xb[e]
        r = one / np.sqrt(one + vb * vb)
        h = (wa * xa[e]) * r
        x[e] = h
        d[e] = (wa * da[e]) * r - h * (vb * r) * r * (wb * db[e])


@row_function
def _forward_choice(x, d, xa, da, wa, xb, db, wb, s):  # type: ignore[no-untyped-def]
    one = x.dtype.type(1.0)
    for e in range(BLOCK):
        va, vb = wa * xa[e], wb * xb[e]
        k = share(va, vb, s, one)
        x[e] = (va if s * va > s * vb else vb) + (k - k)
        d[e] = k * (wa * da[e]) + (one - k) * (wb * db[e])


@row_function
def _forward_sign(x, d, xa, wa):  # type: ignore[no-untyped-def]
    one = x.dtype.type(1.0)
    for e in range(BLOCK):
        x[e] = sign(wa * xa[e], one)
        d[e] = one - one


@row_function
def _forward_square(x, d, xa, da, wa):  # type: ignore[no-untyped-def]
    for e in range(BLOCK):
        v = wa * xa[e]
        x[e] = v * v
        d[e] = (v + v) * (wa * da[e])


@row_function
def _forward_abs(x, d, xa, da, wa):  # type: ignore[no-untyped-def]
    one = x.dtype.type(1.0)
    for e in range(BLOCK):
        v = wa * xa[e]
        x[e] = abs(v)
        d[e] = sign(v, one) * (wa * da[e])


@row_function
def _forward_log(x, d, xa, da, wa):  # type: ignore[no-untyped-def]
    tiny, zero = x.dtype.type(PROTECTION), x.dtype.type(0.0)
    for e in range(BLOCK):
        v = wa * xa[e]
        slope = wa * da[e] / v
        x[e] = log(abs(v) if abs(v) > tiny else tiny) + (v - v)
        d[e] = slope if abs(v) >= tiny else zero


@row_function
def _forward_sqrt(x, d, xa, da, wa):  # type: ignore[no-untyped-def]
    tiny, zero, half = x.dtype.type(PROTECTION), x.dtype.type(0.0), x.dtype.type(0.5)
    for e in range(BLOCK):
        v = wa * xa[e]
        r = np.sqrt(abs(v) if abs(v) > tiny else tiny)
        slope = half * (wa * da[e]) / (r if v > zero else -r)
        x[e] = r + (v - v)
        d[e] = slope if abs(v) >= tiny else zero


@row_function
def _forward_tanh(x, d, xa, da, wa):  # type: ignore[no-untyped-def]
    one = x.dtype.type(1.0)
    for e in range(BLOCK):
        v = wa * xa[e]
        x[e] = tanh(v)
        d[e] = tanh_slope(v, one) * (wa * da[e])


@sweep
def sweep_forward(ops, a, b, w, lo, hi, x, d):  # type: ignore[no-untyped-def]
    """Fill the rows of the instructions lo..hi; those of the terminals are filled already."""
    one = w.dtype.type(1.0)
    for i in range(lo, hi):
        op = ops[i]
        if op >= LABEL_CODE:
            continue
        row, ra, rb = i - lo + TERMINALS, find_row(ops, lo, a[i]), find_row(ops, lo, b[i])
        xi, di, xa, da, xb, db = x[row], d[row], x[ra], d[ra], x[rb], d[rb]
        wa, wb = w[lo + a[i]], w[lo + b[i]]
        if op == ADD:
            _forward_linear(xi, di, xa, da, wa, xb, db, wb)
        elif op == SUB:
            _forward_linear(xi, di, xa, da, wa, xb, db, -wb)
        elif op == MUL:
            _forward_mul(xi, di, xa, da, wa, xb, db, wb)
        elif op == AQ:
            _forward_aq(xi, di, xa, da, wa, xb, db, wb)
        elif op in (MIN, MAX):
            _forward_choice(xi, di, xa, da, wa, xb, db, wb, one if op == MAX else -one)
        elif op == SIGN:
            _forward_sign(xi, di, xa, wa)
        elif op == SQUARE:
            _forward_square(xi, di, xa, da, wa)
        elif op == ABS:
            _forward_abs(xi, di, xa, da, wa)
        elif op == LOG:
            _forward_log(xi, di, xa, da, wa)
        elif op == SQRT:
            _forward_sqrt(xi, di, xa, da, wa)
        else:
            _forward_tanh(xi, di, xa, da, wa)
