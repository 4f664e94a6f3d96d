"""Element-wise derivatives of a population of losses on a GPU, one launch for all of them (Triton).

The same quantities and semantics as `evoloss.engine.kernels`, which see: forward mode for dM/df, one reverse sweep over
the forward tangents for the weights. A kernel instance interprets one program on `BLOCK` elements. Every intermediate
value goes through a scratch tensor, which the second-level cache holds; each thread owns one element of the block, so
it reads only what it wrote itself.

This module needs Triton: import it through `evoloss.engine.device_losses`.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from evoloss.engine.kernels import PackedPrograms
from evoloss.expressions import operators

NUM_WARPS = 4
BLOCK = 32 * NUM_WARPS
"""Elements of one kernel instance: one a thread."""

UNSPECIALIZED = ("f_stride", "longest", "total", "count")
"""Sizes that differ between generations: no new compilation for a multiple of 16."""

# Triton reads only such globals inside a kernel. The order is the table's, which `pack_programs` has checked.
ADD, SUB, MUL, AQ, MIN, MAX, SIGN, SQUARE, ABS, LOG, SQRT, TANH = map(
    tl.constexpr, range(len(operators.OPERATORS))
)
LABEL_CODE = tl.constexpr(operators.LABEL_CODE)
PREDICTION_CODE = tl.constexpr(operators.PREDICTION_CODE)
TINY = tl.constexpr(operators.PROTECTION)


@triton.jit
def _tanh(x):
    # expm1 after Kahan: the rounding error of exp cancels, so small x keep their relative accuracy
    m = 2.0 * tl.minimum(tl.abs(x), 20.0)
    e = tl.exp(m)
    expm1 = tl.where(e == 1.0, m, (e - 1.0) * (m / tl.where(e == 1.0, 1.0, tl.log(e))))
    h = expm1 / (expm1 + 2.0)
    return tl.where(x != x, x, tl.where(x < 0.0, -h, h))


@triton.jit
def _derive(op, x, z):
    """Return value, first (a, b) and second (aa, ab, bb) derivatives of an operator; by b also for unary ones: 0."""
    zero = tl.zeros_like(x)
    one = zero + 1.0
    tiny = tl.full(x.shape, TINY, x.dtype)  # a literal would be rounded to float32 first
    g, ga, gb, gaa, gab, gbb = x + z, one, one, zero, zero, zero
    if op == SUB:
        g, gb = x - z, -one
    elif op == MUL:
        g, ga, gb, gab = x * z, z, x, one
    elif op == AQ:
        r = 1.0 / tl.sqrt(1.0 + z * z)
        zr = z * r
        g, ga, gb = x * r, r, -x * zr * r * r
        gab, gbb = -zr * r * r, x * r * r * r * (3.0 * zr * zr - 1.0)
    elif (op == MIN) | (op == MAX):
        d = tl.where(op == MAX, x - z, z - x)
        # ties share the gradient, as in torch; a NaN argument stays NaN
        k = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, 0.0, 0.5)).to(x.dtype) + (d - d)
        g, ga, gb = tl.where(d > 0.0, x, z) + (d - d), k, 1.0 - k
    elif op == SIGN:
        g, ga = tl.where(x > 0.0, one, tl.where(x < 0.0, -one, x)), zero
    elif op == SQUARE:
        g, ga, gaa = x * x, x + x, one + one
    elif op == ABS:
        g, ga = tl.abs(x), tl.where(x > 0.0, one, tl.where(x < 0.0, -one, zero))
    elif op == LOG:
        free = tl.abs(x) >= tiny
        g = tl.log(tl.where(free, tl.abs(x), tiny)) + (x - x)
        ga = tl.where(free, 1.0 / tl.where(free, x, 1.0), zero)
        gaa = -ga * ga
    elif op == SQRT:
        free = tl.abs(x) >= tiny
        g = tl.sqrt(tl.where(free, tl.abs(x), tiny)) + (x - x)
        half = tl.where(free, 0.5 / g, zero)
        ga = tl.where(x > 0.0, half, -half)
        gaa = tl.where(free, -0.5 * half / tl.abs(x), zero)
    elif op == TANH:
        g = _tanh(x)
        # not 1 - g^2, which loses its digits where tanh is close to 1
        e = tl.exp(-2.0 * tl.abs(x))
        distance = 2.0 * e / (1.0 + e)
        ga = distance * (2.0 - distance)
        gaa = -(g + g) * ga
    return g, ga, gb, gaa, gab, gbb


@triton.jit
def _load_arguments(ops, a, b, lo, i, own, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return values and tangents of an operator's arguments; what does not count is zero, lest 0 * inf spoil it."""
    op = tl.load(ops + lo + i)
    at_a = own + tl.load(a + lo + i) * ROWS * BLOCK
    at_b = own + tl.load(b + lo + i) * ROWS * BLOCK
    x, dx = tl.load(at_a), tl.load(at_a + BLOCK)
    z, dz = tl.load(at_b), tl.load(at_b + BLOCK)
    tiny = tl.full(x.shape, TINY, x.dtype)
    protected = ((op == LOG) | (op == SQRT)) & ((tl.abs(x) >= tiny) == 0)
    dx = tl.where((op == SIGN) | protected, 0.0, dx)
    z, dz = tl.where(op <= MAX, z, 0.0), tl.where(op <= MAX, dz, 0.0)
    return x, z, dx, dz


@triton.jit
def _forward(ops, a, b, w, y, f, lo, hi, own, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Fill rows 0 (values) and 1 (tangents by f) of every instruction; return those of the last one."""
    value, tangent = tl.zeros_like(y), tl.zeros_like(y)
    for i in range(hi - lo):
        op = tl.load(ops + lo + i)
        factor = tl.load(w + lo + i)
        if op >= LABEL_CODE:
            ones = tl.zeros_like(y) + 1.0
            value = tl.where(op == LABEL_CODE, y, tl.where(op == PREDICTION_CODE, f, ones))
            tangent = tl.where(op == PREDICTION_CODE, ones, 0.0)
        else:
            x, z, dx, dz = _load_arguments(ops, a, b, lo, i, own, ROWS, BLOCK)
            g, ga, gb, _, _, _ = _derive(op, x, z)
            value, tangent = g, ga * dx + gb * dz
        value, tangent = factor * value, factor * tangent
        tl.store(own + i * ROWS * BLOCK, value)
        tl.store(own + (i * ROWS + 1) * BLOCK, tangent)
        tl.debug_barrier()
    return value, tangent


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _gradients(
    ops, a, b, w, offsets, y, f, f_stride, scratch, longest, out, count, BLOCK: tl.constexpr
):
    p, block = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    e = block * BLOCK + lane
    inside = e < count
    lo, hi = tl.load(offsets + p), tl.load(offsets + p + 1)
    ye = tl.load(y + e, mask=inside, other=0.0)
    fe = tl.load(f + p.to(tl.int64) * f_stride + e, mask=inside, other=0.0)
    instance = (p * tl.num_programs(1) + block).to(tl.int64)
    own = scratch + instance * longest * 2 * BLOCK + lane
    _, tangent = _forward(ops, a, b, w, ye, fe, lo, hi, own, 2, BLOCK)
    tl.store(out + p.to(tl.int64) * count + e, tangent, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _mixed(
    ops,
    a,
    b,
    w,
    offsets,
    y,
    f,
    f_stride,
    u,
    scratch,
    longest,
    out,
    total,
    count,
    BLOCK: tl.constexpr,
):
    """Rows 2 and 3 of an instruction are the adjoints of value and tangent."""
    p, block = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    e = block * BLOCK + lane
    inside = e < count
    lo, hi = tl.load(offsets + p), tl.load(offsets + p + 1)
    ye = tl.load(y + e, mask=inside, other=0.0)
    fe = tl.load(f + p.to(tl.int64) * f_stride + e, mask=inside, other=0.0)
    ue = tl.load(u + p.to(tl.int64) * count + e, mask=inside, other=0.0)
    instance = (p * tl.num_programs(1) + block).to(tl.int64)
    own = scratch + instance * longest * 4 * BLOCK + lane
    _forward(ops, a, b, w, ye, fe, lo, hi, own, 4, BLOCK)
    zero = tl.zeros_like(ye)
    for i in range(hi - lo):
        tl.store(own + (i * 4 + 2) * BLOCK, zero)
        tl.store(own + (i * 4 + 3) * BLOCK, tl.where(i == hi - lo - 1, ue, zero))
    tl.debug_barrier()
    for back in range(hi - lo):
        i = hi - lo - 1 - back
        op = tl.load(ops + lo + i)
        factor = tl.load(w + lo + i)
        adjoint = tl.load(own + (i * 4 + 2) * BLOCK)
        adjoint_t = tl.load(own + (i * 4 + 3) * BLOCK)
        if op >= LABEL_CODE:
            ones = zero + 1.0
            terminal = tl.where(op == LABEL_CODE, ye, tl.where(op == PREDICTION_CODE, fe, ones))
            share = adjoint * terminal + tl.where(op == PREDICTION_CODE, adjoint_t, 0.0)
        else:
            x, z, dx, dz = _load_arguments(ops, a, b, lo, i, own, 4, BLOCK)
            g, ga, gb, gaa, gab, gbb = _derive(op, x, z)
            share = adjoint * g + adjoint_t * (ga * dx + gb * dz)
            at_a = own + (tl.load(a + lo + i) * 4 + 2) * BLOCK
            to_value = adjoint * ga + adjoint_t * (gaa * dx + gab * dz)
            tl.store(at_a, tl.load(at_a) + factor * to_value)
            tl.store(at_a + BLOCK, tl.load(at_a + BLOCK) + factor * adjoint_t * ga)
            tl.debug_barrier()
            if op <= MAX:
                at_b = own + (tl.load(b + lo + i) * 4 + 2) * BLOCK
                to_value = adjoint * gb + adjoint_t * (gab * dx + gbb * dz)
                tl.store(at_b, tl.load(at_b) + factor * to_value)
                tl.store(at_b + BLOCK, tl.load(at_b + BLOCK) + factor * adjoint_t * gb)
                tl.debug_barrier()
        part = tl.sum(tl.where(inside, share, zero), 0)
        tl.store(out + block.to(tl.int64) * total + lo + i, part)


class DevicePrograms:
    """P packed programs on a device: copied there once, only their weights change."""

    def __init__(self, packed: PackedPrograms, device: torch.device) -> None:
        def copy(array: NDArray[Any], dtype: torch.dtype | None = None) -> Tensor:
            return torch.tensor(array, device=device, dtype=dtype)

        self.size = len(packed)
        self._longest = int(np.diff(packed.offsets).max())
        self._instructions = tuple(copy(part) for part in (packed.ops, packed.a, packed.b))
        self._weights = copy(packed.weights)
        self._offsets = copy(packed.offsets, torch.int32)

    def set_weights(self, weights: NDArray[Any]) -> None:
        """Replace all instruction weights, end to end, shape ``(instructions,)``."""
        self._weights.copy_(torch.from_numpy(weights))

    def loss_gradients(self, y: Tensor, f: Tensor) -> Tensor:
        """Return dM/df (P, N), element by element; ``y`` (N,), ``f`` (P, N) or, shared by all, (1, N)."""
        out = torch.empty(self.size, len(y), device=y.device, dtype=y.dtype)
        grid, scratch = self._plan(y, 2)
        _gradients[grid](
            *self._instructions, self._weights, self._offsets, y, *self._strided(f), scratch,
            self._longest, out, len(y), BLOCK=BLOCK, num_warps=NUM_WARPS, num_stages=1,
        )  # fmt: skip
        return out

    def mixed_gradients(self, y: Tensor, f: Tensor, u: Tensor) -> Tensor:
        """Return d/dw of sum_e u[p, e] * dM_p/df[p, e], shape ``(instructions,)``; ``u`` (P, N), else as above."""
        grid, scratch = self._plan(y, 4)
        # one row for every block of elements: a sum in fixed order, which atomic additions would not give
        out = torch.empty(grid[1], len(self._weights), device=y.device, dtype=y.dtype)
        _mixed[grid](
            *self._instructions, self._weights, self._offsets, y, *self._strided(f), u.contiguous(),
            scratch, self._longest, out, len(self._weights), len(y),
            BLOCK=BLOCK, num_warps=NUM_WARPS, num_stages=1,
        )  # fmt: skip
        return out.sum(0)

    def _plan(self, y: Tensor, rows: int) -> tuple[tuple[int, int], Tensor]:
        grid = (self.size, triton.cdiv(len(y), BLOCK))
        size = grid[0] * grid[1] * self._longest * rows * BLOCK
        return grid, torch.empty(size, device=y.device, dtype=y.dtype)

    @staticmethod
    def _strided(f: Tensor) -> tuple[Tensor, int]:
        return f.contiguous(), f.shape[1] if f.shape[0] > 1 else 0
