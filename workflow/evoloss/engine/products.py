"""Matrix products of CPU tensors where torch's own are slow.

torch's products go to Intel's MKL, which keeps AVX-512 for Intel's processors: on an AMD EPYC (Zen 5), one thread,
those of a 1000 x 1000 layer run at 90 GFLOP/s there and at 190 GFLOP/s in oneDNN, which torch ships but asks for lower
precisions alone; the arithmetic is float32 in both. (On an Intel Xeon oneDNN takes 1.12 times as long.) MKL is slow at
few columns, too. Everything else (small products, few columns of a transposed matrix, float64, other processors and
devices, a torch without oneDNN) is torch's own.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
from torch import Tensor

MIN_MULTIPLICATIONS = 2**20
"""Below it a call of oneDNN costs what it gains (measured: equal at 60 x 128 x 128, 30 against 41 us at twice that)."""
FEW_COLUMNS = range(2, 17)
"""(1000, 128) by (128, 10) takes 160 us, and 50 us when its transpose is computed (one column: 9 us)."""


def has_onednn() -> bool:
    """Tell whether this torch offers oneDNN's product on plain tensors."""
    return torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@functools.cache
def prefers_onednn() -> bool:
    """Tell whether large products are oneDNN's here: on AMD's processors, if it is there."""
    file = Path("/proc/cpuinfo")
    processor = file.read_text(encoding="utf-8") if file.exists() else platform.processor()
    return has_onednn() and "AuthenticAMD" in processor


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``a @ b``, plus ``bias`` (columns,) in every row; ``a`` and ``b`` are matrices of any strides."""
    on_cpu = a.device.type == "cpu"
    size = a.shape[0] * a.shape[1] * b.shape[1]
    # oneDNN copies a transposed matrix, which for a few columns takes longer than the product
    is_copied = a.stride(0) == 1 and b.shape[1] <= max(FEW_COLUMNS)
    suits_onednn = size >= MIN_MULTIPLICATIONS and a.dtype == torch.float32 and not is_copied
    if on_cpu and suits_onednn and prefers_onednn():
        if not (b.is_contiguous() or b.t().is_contiguous()):
            b = b.contiguous()  # else oneDNN takes a hundred times as long
        result: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
        return result
    if on_cpu and b.shape[1] in FEW_COLUMNS:
        a, b = b.t(), a.t()
        transposed = torch.mm(a, b) if bias is None else torch.addmm(bias.unsqueeze(1), a, b)
        return transposed.t().contiguous()
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def stacked_product(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` of two stacks of matrices, (k, m, n) and (k, n, r) -> (k, m, r); each may have k = 1 for all."""
    k = max(a.shape[0], b.shape[0])
    if k == 1:
        return product(a[0], b[0]).unsqueeze(0)
    if a.shape[2] == 1:
        return a * b
    if b.shape[0] == 1 and b.shape[1] * b.shape[2] >= 2**10:
        return product(a.flatten(0, 1), b[0]).view(*a.shape[:2], -1)
    return torch.bmm(a.expand(k, -1, -1), b.expand(k, -1, -1))
