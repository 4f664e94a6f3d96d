"""Element-wise derivatives of a population of losses, compiled with numba.

For programs (`evoloss.expressions.program`) of P losses the kernels compute, for every element of label y and
prediction f,

- `loss_gradients`: dM/df, by forward mode (`evoloss.engine.kernel_forward`),
- `mixed_gradients`: sum over elements of u * d2M / (df dphi) for given u, by one reverse sweep over the forward
  tangents (`evoloss.engine.kernel_reverse`): the last factor of the one-step meta-gradient (Raymond et al. 2023; see
  `evoloss.engine.unrolled`).

They work on blocks of elements, so that a loss's intermediate values stay in the first-level cache. All partial
derivatives follow the protected operators' definition in `evoloss.expressions.operators`; a conformance test compares
them with autograd and SymPy. The first call of a process loads the compiled code from numba's cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evoloss.engine import kernel_forward, kernel_reverse, kernel_rows
from evoloss.engine.kernel_forward import sweep_forward
from evoloss.engine.kernel_reverse import sweep_reverse
from evoloss.engine.kernel_rows import (
    BLOCK,
    PROTECTION,
    TERMINALS,
    digest_sources,
    fill,
    find_row,
    kernel,
    load,
    load_repeated,
    store,
    sweep,
)
from evoloss.errors import ExpressionError
from evoloss.expressions import operators
from evoloss.expressions.program import Program

_NAMES = "add sub mul aq min max sign square abs log sqrt tanh"


def check_operator_table() -> None:
    """Raise `ExpressionError` if the kernels do not follow the operator table (a row was added, moved or changed)."""
    names = tuple(operators.OPERATORS)
    if names != tuple(_NAMES.split()) or operators.PROTECTION != PROTECTION:
        raise ExpressionError(
            f"the kernels know the operators {_NAMES} with protection {PROTECTION}, but the table holds "
            f"{' '.join(names)} with {operators.PROTECTION}; "
            "bring evoloss/engine/kernel_forward.py, kernel_reverse.py and kernel_rows.py up to date"
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

    @functools.cached_property
    def longest(self) -> int:
        """The instructions of the longest program."""
        return int(np.diff(self.offsets).max())

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """What the compiled kernels read, in their order."""
        return self.ops, self.a, self.b, self.weights, self.offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1


def pack_programs(programs: Sequence[Program], dtype: Any = np.float32) -> PackedPrograms:
    """Join programs into the arrays that the kernels read; weights are converted to ``dtype``."""
    check_operator_table()
    lengths = [len(program) for program in programs]
    with np.errstate(over="ignore"):  # what no float32 holds is infinite, and ends its candidate
        weights = np.concatenate([program.weights for program in programs]).astype(dtype)
    return PackedPrograms(
        np.concatenate([program.ops for program in programs]),
        np.concatenate([program.a for program in programs]),
        np.concatenate([program.b for program in programs]),
        weights,
        np.concatenate([program.trainable for program in programs]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


@sweep
def sweep_gradient(ops, a, b, w, lo, hi, y, f, value, gradient, x, d):  # type: ignore[no-untyped-def]
    """Do what `loss_gradients` does, for the program ``lo:hi``; ``f`` holds one or more times as many as ``y``."""
    root = find_row(ops, lo, hi - lo - 1)
    for start in range(0, f.size, BLOCK):
        load_repeated(x[0], y, start, min(BLOCK, f.size - start), y[start % y.size])
        load(x[1], f, start, f[start])
        sweep_forward(ops, a, b, w, lo, hi, x, d)
        store(value, start, x[root], w[hi - 1])
        store(gradient, start, d[root], w[hi - 1])


@sweep
def sweep_mixed(ops, a, b, w, lo, hi, y, f, u, out, x, d, ap, aq, written):  # type: ignore[no-untyped-def]
    """Do what `mixed_gradients` does, for the program ``lo:hi``."""
    zero = w.dtype.type(0.0)
    for start in range(0, y.shape[0], BLOCK):
        # what the last block lacks repeats its first element: no singularity that is not there already
        load(x[0], y, start, y[start])
        load(x[1], f, start, f[start])
        sweep_forward(ops, a, b, w, lo, hi, x, d)
        fill(ap[hi - lo - 1], zero)
        load(aq[hi - lo - 1], u, start, zero)
        sweep_reverse(ops, a, b, w, lo, hi, x, d, ap, aq, written, out)


@sweep
def is_repeated(ops, a, b, w, offsets, p):  # type: ignore[no-untyped-def]
    """Tell whether program ``p`` and its weights equal those of the program before it."""
    before, lo, hi = offsets[p - 1], offsets[p], offsets[p + 1]
    if hi - lo != lo - before:
        return False
    for i in range(hi - lo):
        j, k = before + i, lo + i
        if ops[j] != ops[k] or a[j] != a[k] or b[j] != b[k] or w[j] != w[k]:
            return False
    return True


@functools.cache
def compile_kernels() -> tuple[Callable[..., None], Callable[..., None]]:
    """Return the two compiled functions behind `loss_gradients` and `mixed_gradients`."""
    digest = digest_sources(kernel_rows, kernel_forward, kernel_reverse)

    @kernel
    def gradients(ops, a, b, w, offsets, y, f, value, gradient, x, d):  # type: ignore[no-untyped-def]
        _ = digest
        fill_constants(x, d)
        n, p = y.size, 0
        values, gradients, predictions = value.reshape(-1), gradient.reshape(-1), f.reshape(-1)
        while p < offsets.size - 1:
            # networks of one loss follow each other; few samples of each fill the blocks together
            end = p + 1
            while (
                f.shape[0] > 1
                and end < offsets.size - 1
                and is_repeated(ops, a, b, w, offsets, end)
            ):
                end += 1
            own = slice(p * n, end * n)
            fp = predictions[own] if f.shape[0] > 1 else predictions
            sweep_gradient(
                ops, a, b, w, offsets[p], offsets[p + 1], y, fp, values[own], gradients[own], x, d
            )  # fmt: skip
            p = end

    @kernel
    def mixed(ops, a, b, w, offsets, y, f, u, out, x, d, ap, aq, written):  # type: ignore[no-untyped-def]
        _ = digest
        fill_constants(x, d)
        for p in range(offsets.shape[0] - 1):
            fp = f[min(p, f.shape[0] - 1)]
            sweep_mixed(
                ops, a, b, w, offsets[p], offsets[p + 1], y, fp, u[p], out, x, d, ap, aq, written
            )  # fmt: skip

    return gradients, mixed


@sweep
def fill_constants(x, d):  # type: ignore[no-untyped-def]
    """Fill the terminals' rows that no element changes: x = 1 of ``one``, and the derivatives of all three."""
    zero, one = x.dtype.type(0.0), x.dtype.type(1.0)
    fill(x[2], one)
    fill(d[0], zero)
    fill(d[1], one)
    fill(d[2], zero)


def make_rows(packed: PackedPrograms, count: int, more: int) -> NDArray[Any]:
    """Return ``count`` sets of rows for the longest program and ``more``."""
    return np.empty((count, packed.longest + more, BLOCK), dtype=packed.weights.dtype)


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
    gradients, _ = compile_kernels()
    x, d = make_rows(packed, 2, TERMINALS)
    gradients(*packed.arrays, y, np.ascontiguousarray(f), value, gradient, x, d)
    return value, gradient


def mixed_gradients(
    packed: PackedPrograms, y: NDArray[Any], f: NDArray[Any], u: NDArray[Any]
) -> NDArray[np.float64]:
    """Return d/dw of sum_e u[p, e] * dM_p/df[p, e], for every weight w of every program, shape ``(instructions,)``.

    ``y`` (N,), ``f`` (P, N) or (1, N), ``u`` (P, N); gradients of untrainable weights are computed too.
    """
    out = np.zeros(len(packed.ops))
    _, mixed = compile_kernels()
    x, d, p, q = make_rows(packed, 4, TERMINALS)
    written = np.empty(x.shape[0], dtype=np.bool_)
    mixed(*packed.arrays, y, f, u, out, x, d, p, q, written)
    return out
