"""Arithmetic of a base model: bfloat16 layers, TF32 products on a GPU, and which of torch's kernels compute it.

Parameters and losses stay float32 under bf16 and tf32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class Bfloat16Layers(nn.Module):
    """A base model whose layers compute in bfloat16, forward and backward (`torch.autocast`), with float32 outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's outputs as float32."""
        with torch.autocast(x.device.type, torch.bfloat16):
            outputs: Tensor = self.model(x)
        return outputs.float()


@contextmanager
def set_torch_kernels(precision: str, device: torch.device) -> Iterator[None]:
    """Choose among torch's kernels for what a base model does; restore the choice that was set before.

    Attention is computed by the kernel that has a second derivative and a rule for `torch.func.vmap`: the fused ones,
    torch's own choice, have neither. A GPU's float32 products and convolutions round their factors to TF32, or not: by
    itself torch lets convolutions, but not products, do so, whatever precision was asked for.
    """
    products, layers = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (products.allow_tf32, layers.allow_tf32) if device.type == "cuda" else None
    fused = torch.backends.mha.get_fastpath_enabled()
    try:
        # of encoder layers in evaluation mode
        torch.backends.mha.set_fastpath_enabled(False)
        if before is not None:
            products.allow_tf32 = layers.allow_tf32 = precision == "tf32"
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        if before is not None:
            products.allow_tf32, layers.allow_tf32 = before
