"""Arithmetic faster than float32: TF32 products on a GPU, bfloat16 layers. Parameters and losses stay float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


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
def set_gpu_products(precision: str, device: torch.device) -> Iterator[None]:
    """Let a GPU's float32 products and convolutions round their factors to TF32, or not; restore what was set before.

    Without it torch lets convolutions, but not products, do so, whatever precision was asked for.
    """
    if device.type != "cuda":
        yield
        return
    products, layers = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, layers.allow_tf32
    try:
        products.allow_tf32 = layers.allow_tf32 = precision == "tf32"
        yield
    finally:
        products.allow_tf32, layers.allow_tf32 = before
