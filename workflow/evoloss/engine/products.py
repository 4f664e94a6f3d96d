"""Matrix products of float32 CPU tensors by oneDNN, which torch ships but asks for lower precisions alone.

torch's own products go to Intel's MKL, which keeps AVX-512 for Intel's processors: on an AMD EPYC (Zen 5), one thread,
the products of a 1000 x 1000 layer run at 90 GFLOP/s there and at 190 GFLOP/s in oneDNN, with the same float32
arithmetic. Everything else (small products, float64, other devices, a torch without oneDNN) is torch's own.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

MIN_MULTIPLICATIONS = 2**21
"""Below it a call of oneDNN costs what it gains (measured: equal at 128 x 100 x 100)."""


@cache
def has_onednn() -> bool:
    """Tell whether this torch offers oneDNN's product on plain tensors."""
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``a @ b``, plus ``bias`` (columns,) in every row; ``a`` and ``b`` are matrices of any strides."""
    if (
        a.device.type == "cpu"
        and a.dtype == torch.float32
        and a.shape[0] * a.shape[1] * b.shape[1] >= MIN_MULTIPLICATIONS
        and has_onednn()
    ):
        result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
        return result
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def stacked_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` of two stacks of matrices, (k, m, n) and (k, n, r) -> (k, m, r); each may have k = 1 for all."""
    if a.shape[0] == b.shape[0] == 1:
        return product(a[0], b[0]).unsqueeze(0)
    if b.shape[0] == 1:
        return product(a.flatten(0, 1), b[0]).view(*a.shape[:2], -1)
    return torch.bmm(a.expand(b.shape[0], -1, -1), b)
