"""Softmax of populations on a CPU, compiled with numba: one pass where torch's operators take four to six.

Arrays are (P, C, B): the classes first, so that every loop runs along the samples of a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evoloss.engine import kernel_rows
from evoloss.engine.kernel_rows import digest_sources, exp, kernel, log, sweep


@sweep
def sweep_jacobian(p, u, out, factor, inner):  # type: ignore[no-untyped-def]
    """Do what `multiply_by_jacobian` does, for one network; ``inner`` (B,) is overwritten."""
    for b in range(inner.size):
        inner[b] = 0
    for c in range(u.shape[0]):
        pc, uc = p[c], u[c]
        for b in range(inner.size):
            inner[b] += pc[b] * uc[b]
    for c in range(u.shape[0]):
        pc, uc, oc = p[c], u[c], out[c]
        for b in range(inner.size):
            oc[b] = factor * pc[b] * (uc[b] - inner[b])


@sweep
def sweep_cross_entropy(z, targets, gradient, top, total):  # type: ignore[no-untyped-def]
    """Do what `cross_entropy` does, for one network; ``top`` and ``total`` (B,) are overwritten."""
    size = z.shape[1]
    scale = z.dtype.type(1.0 / size)
    for b in range(size):
        top[b] = z[0, b]
        total[b] = 0
    for c in range(1, z.shape[0]):
        zc = z[c]
        for b in range(size):
            top[b] = zc[b] if zc[b] > top[b] else top[b]
    for c in range(z.shape[0]):
        zc, gc = z[c], gradient[c]
        for b in range(size):
            gc[b] = exp(zc[b] - top[b])
            total[b] += gc[b]
    value = 0.0
    for c in range(z.shape[0]):
        zc, gc, tc = z[c], gradient[c], targets[c]
        for b in range(size):
            gc[b] = scale * (gc[b] / total[b] - tc[b])
            # another class may have the logit -inf, its probability 0
            value += tc[b] * (top[b] - zc[b]) if tc[b] != 0 else 0.0
    for b in range(size):
        value += log(total[b])
    return value / size


@functools.cache
def _compile() -> tuple[Callable[..., None], Callable[..., None]]:
    digest = digest_sources(kernel_rows)

    @kernel
    def jacobian(p, u, out, factor, inner):  # type: ignore[no-untyped-def]
        _ = digest
        for i in range(u.shape[0]):
            sweep_jacobian(p[min(i, p.shape[0] - 1)], u[i], out[i], factor, inner)

    @kernel
    def entropy(z, targets, values, gradient, top, total):  # type: ignore[no-untyped-def]
        _ = digest
        for i in range(z.shape[0]):
            values[i] = sweep_cross_entropy(z[i], targets, gradient[i], top, total)

    return jacobian, entropy


def multiply_by_jacobian(p: NDArray[Any], u: NDArray[Any], factor: float) -> NDArray[Any]:
    """Return ``factor`` times the softmax's Jacobian (it is symmetric) at its output ``p``, times ``u``.

    ``p`` (P or 1, C, B) and ``u`` (P, C, B), both contiguous and of one dtype -> (P, C, B).
    """
    out = np.empty_like(u)
    jacobian, _ = _compile()
    jacobian(p, u, out, u.dtype.type(factor), np.empty(u.shape[-1], u.dtype))
    return out


def cross_entropy(z: NDArray[Any], targets: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the mean cross-entropy (P,) of logits ``z`` (P, C, B) against one-hot ``targets`` (C, B), and d/dz."""
    values, gradient = np.empty(len(z), z.dtype), np.empty_like(z)
    top, total = np.empty((2, z.shape[-1]), z.dtype)
    _, entropy = _compile()
    entropy(z, targets, values, gradient, top, total)
    return values, gradient
