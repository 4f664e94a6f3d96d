"""The kernels' reverse sweep: from the adjoints of a program's last instruction to the derivatives by its weights.

Instruction j has the rows ``p[j]`` and ``q[j]``: the adjoints of its weighted value w * x and tangent w * d. So the
derivative by its weight is the sum of p * x + q * d, and the adjoints of x and d themselves are w * p and w * q.
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
    MUL,
    ONE_CODE,
    PREDICTION_CODE,
    PROTECTION,
    SIGN,
    SQRT,
    SQUARE,
    SUB,
    add_to,
    fill,
    find_row,
    row_function,
    share,
    sign,
    sum_product,
    sum_products,
    sweep,
    tanh_slope,
)


@row_function
def _reverse_linear(pa, qa, pb, qb, p, q, s, wi):  # type: ignore[no-untyped-def]
    for e in range(BLOCK):
        pa[e] = wi * p[e]
        qa[e] = wi * q[e]
        pb[e] = (s * wi) * p[e]
        qb[e] = (s * wi) * q[e]


@row_function
def _reverse_mul(pa, qa, pb, qb, p, q, wi, xa, da, wa, xb, db, wb):  # type: ignore[no-untyped-def]
    for e in range(BLOCK):
        pe, qe = wi * p[e], wi * q[e]
        va, vb = wa * xa[e], wb * xb[e]
        pa[e] = pe * vb + qe * (wb * db[e])
        qa[e] = qe * vb
        pb[e] = pe * va + qe * (wa * da[e])
        qb[e] = qe * va


@row_function
def _reverse_aq(pa, qa, pb, qb, p, q, wi, xa, da, wa, xb, db, wb):  # type: ignore[no-untyped-def]
    one, three = p.dtype.type(1.0), p.dtype.type(3.0)
    for e in range(BLOCK):
        pe, qe = wi * p[e], wi * q[e]
        va, vb, ta, tb = wa * xa[e], wb * xb[e], wa * da[e], wb * db[e]
        r = one / np.sqrt(one + vb * vb)
        h = vb * r
        gb, gab = -(va * r) * h * r, -h * r * r
        gbb = va * r * r * r * (three * h * h - one)
        pa[e] = pe * r + qe * gab * tb
        qa[e] = qe * r
        pb[e] = pe * gb + qe * (gab * ta + gbb * tb)
        qb[e] = qe * gb


@row_function
def _reverse_choice(pa, qa, pb, qb, p, q, wi, xa, wa, xb, wb, s):  # type: ignore[no-untyped-def]
    one = p.dtype.type(1.0)
    for e in range(BLOCK):
        k = share(wa * xa[e], wb * xb[e], s, one)
        pa[e] = wi * k * p[e]
        qa[e] = wi * k * q[e]
        pb[e] = wi * (one - k) * p[e]
        qb[e] = wi * (one - k) * q[e]


@row_function
def _reverse_square(pa, qa, p, q, wi, xa, da, wa):  # type: ignore[no-untyped-def]
    for e in range(BLOCK):
        g1 = wa * xa[e] + wa * xa[e]
        pa[e] = (wi * p[e]) * g1 + (wi * q[e]) * (wa * da[e] + wa * da[e])
        qa[e] = (wi * q[e]) * g1


@row_function
def _reverse_abs(pa, qa, p, q, wi, xa, wa):  # type: ignore[no-untyped-def]
    one = p.dtype.type(1.0)
    for e in range(BLOCK):
        g1 = sign(wa * xa[e], one)
        pa[e] = (wi * p[e]) * g1
        qa[e] = (wi * q[e]) * g1


@row_function
def _reverse_log(pa, qa, p, q, wi, xa, da, wa):  # type: ignore[no-untyped-def]
    tiny, zero, one = p.dtype.type(PROTECTION), p.dtype.type(0.0), p.dtype.type(1.0)
    for e in range(BLOCK):
        v = wa * xa[e]
        g1 = one / v
        g1 = g1 if abs(v) >= tiny else zero
        pa[e] = (wi * p[e]) * g1 - (wi * q[e]) * (g1 * g1) * (wa * da[e])
        qa[e] = (wi * q[e]) * g1


@row_function
def _reverse_sqrt(pa, qa, p, q, wi, xi, xa, da, wa):  # type: ignore[no-untyped-def]
    tiny, zero, half = p.dtype.type(PROTECTION), p.dtype.type(0.0), p.dtype.type(0.5)
    for e in range(BLOCK):
        v = wa * xa[e]
        g1 = half / (xi[e] if v > zero else -xi[e])
        g1 = g1 if abs(v) >= tiny else zero
        g2 = -half * g1 / v
        g2 = g2 if abs(v) >= tiny else zero
        pa[e] = (wi * p[e]) * g1 + (wi * q[e]) * g2 * (wa * da[e])
        qa[e] = (wi * q[e]) * g1


@row_function
def _reverse_tanh(pa, qa, p, q, wi, xi, xa, da, wa):  # type: ignore[no-untyped-def]
    one, two = p.dtype.type(1.0), p.dtype.type(2.0)
    for e in range(BLOCK):
        g1 = tanh_slope(wa * xa[e], one)
        pa[e] = (wi * p[e]) * g1 - (wi * q[e]) * (two * xi[e] * g1) * (wa * da[e])
        qa[e] = (wi * q[e]) * g1


@sweep
def sweep_reverse(ops, a, b, w, lo, hi, x, d, p, q, written, out):  # type: ignore[no-untyped-def]
    """Add to ``out[lo:hi]`` the derivatives by the weights, for the rows ``x`` and ``d`` of the forward sweep.

    The last instruction's rows of ``p`` and ``q`` are given; there are two rows to spare after them.
    """
    n = hi - lo
    one, zero = w.dtype.type(1.0), w.dtype.type(0.0)
    for j in range(n):
        written[j] = j == n - 1
    for j in range(n - 1, -1, -1):
        if not written[j]:
            continue
        op, wi, row = ops[lo + j], w[lo + j], find_row(ops, lo, j)
        pj, qj, xj = p[j], q[j], x[row]
        if op in (LABEL_CODE, ONE_CODE):
            out[lo + j] += sum_product(pj, xj)
            continue
        out[lo + j] += sum_products(pj, xj, qj, d[row])
        if op == PREDICTION_CODE:
            continue
        ja, jb = a[lo + j], b[lo + j]
        wa, wb = w[lo + ja], w[lo + jb]
        ra, rb = find_row(ops, lo, ja), find_row(ops, lo, jb)
        xa, da, xb, db = x[ra], d[ra], x[rb], d[rb]
        # the first user of a shared instruction writes its adjoints, the others add to them
        ta = n if written[ja] else ja
        written[ja] = True
        pa, qa = p[ta], q[ta]
        if op <= MAX:
            tb = n + 1 if written[jb] else jb
            written[jb] = True
            pb, qb = p[tb], q[tb]
            if op in (ADD, SUB):
                _reverse_linear(pa, qa, pb, qb, pj, qj, one if op == ADD else -one, wi)
            elif op == MUL:
                _reverse_mul(pa, qa, pb, qb, pj, qj, wi, xa, da, wa, xb, db, wb)
            elif op == AQ:
                _reverse_aq(pa, qa, pb, qb, pj, qj, wi, xa, da, wa, xb, db, wb)
            else:
                s = one if op == MAX else -one
                _reverse_choice(pa, qa, pb, qb, pj, qj, wi, xa, wa, xb, wb, s)
            if tb != jb:
                add_to(p[jb], pb)
                add_to(q[jb], qb)
        elif op == SIGN:
            fill(pa, zero)
            fill(qa, zero)
        elif op == SQUARE:
            _reverse_square(pa, qa, pj, qj, wi, xa, da, wa)
        elif op == ABS:
            _reverse_abs(pa, qa, pj, qj, wi, xa, wa)
        elif op == LOG:
            _reverse_log(pa, qa, pj, qj, wi, xa, da, wa)
        elif op == SQRT:
            _reverse_sqrt(pa, qa, pj, qj, wi, xj, xa, da, wa)
        else:
            _reverse_tanh(pa, qa, pj, qj, wi, xj, xa, da, wa)
        if ta != ja:
            add_to(p[ja], pa)
            add_to(q[ja], qa)
