"""Floating-point operations a candidate costs, counted from the layers' shapes: the denominator of the GEMM share.

A multiply-add counts as two. Only matrix products and convolutions count (not activations, losses, optimisers). With m
multiply-adds per row of a layer, B rows of the inner and V of the outer batch, n_in and n_out a dense layer's widths:

- fitness, per step: forward 2Bm, weight gradient 2Bm, input gradient 2Bm (not in the first layer).
- local search, per meta-step: the cheaper of two exact forms, layer by layer. Forward and outputs at the initial
  parameters are shared by all candidates and count nothing.
  - direct: inner gradient 4Bm, outer forward 2Vm, outer gradient 4Vm, J g 4Bm; the first layer has no input
    gradients and no incoming tangent: 4Bm + 4Vm.
  - low rank (dense layers): the step's update has rank B and is never formed. First layer 4VBn_out (its Gram matrix is
    shared); later layers 4Vm + 2VB(2n_in + 3n_out), and 4Bm more unless the network has one output, whose Jacobian
    rows are shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerShape:
    """A dense or convolutional layer: multiply-adds per row, and a dense layer's widths (0 for others)."""

    multiply_adds: int
    num_inputs: int
    num_outputs: int


@torch.no_grad()
def read_layers(model: nn.Module, x: Tensor) -> list[LayerShape]:
    """Return the shapes of all `nn.Linear` and `nn.Conv2d` in the order in which ``model(x)`` calls them."""
    layers: list[LayerShape] = []

    def note(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            n_in, n_out = module.in_features, module.out_features
            layers.append(LayerShape(n_in * n_out, n_in, n_out))
        elif isinstance(module, nn.Conv2d):
            layers.append(LayerShape(module.weight[0].numel() * output[0].numel(), 0, 0))

    handles = [module.register_forward_hook(note) for module in model.modules()]
    model(x)
    for handle in handles:
        handle.remove()
    return layers


def count_training_step(layers: Sequence[LayerShape], batch: int) -> int:
    """Return the operations of one training step."""
    passes = [2, *[3] * (len(layers) - 1)]
    return sum(
        2 * batch * count * layer.multiply_adds for count, layer in zip(passes, layers, strict=True)
    )


def count_meta_step(layers: Sequence[LayerShape], inner: int, outer: int) -> int:
    """Return the operations of one candidate's exact one-step meta-gradient."""
    one_output = layers[-1].num_outputs == 1
    total = 0
    for index, layer in enumerate(layers):
        m, n_in, n_out = layer.multiply_adds, layer.num_inputs, layer.num_outputs
        first = index == 0
        direct = (4 * inner + 4 * outer) * m if first else (8 * inner + 6 * outer) * m
        low_rank = 4 * outer * inner * n_out if first else 4 * outer * m
        if not first:
            low_rank += 2 * outer * inner * (2 * n_in + 3 * n_out)
            low_rank += 0 if one_output else 4 * inner * m
        total += min(direct, low_rank) if n_in else direct
    return total
