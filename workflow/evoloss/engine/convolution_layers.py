"""Layers with weights in batch-innermost layout: forward, backward and tangent, each by hand.

Activations are (channels, height, width, batch) or, once flat, (features, batch). A layer is made for one input shape,
batch size and dtype and owns the buffers that it writes: what a method returns is overwritten by its next call, and a
method may overwrite the gradient or tangent that it is given. `evoloss.engine.convolution_fixed_layers` has the layers
without weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evoloss.engine.convolution_kernels import (
    add_dot_products,
    add_products,
    pad_offsets,
    pad_to_blocks,
)

Shape = tuple[int, ...]


class UnsupportedLayerError(Exception):
    """A module or an input shape that no layer here stands for; the text is half a sentence."""


class WeightLayer(ABC):
    """A layer with a weight and, perhaps, a bias: ``params``."""

    shape: Shape
    """Of the output, without the batch."""

    @abstractmethod
    def forward(self, params: Sequence[Tensor], x: Tensor) -> Tensor:
        """Return the output ``y`` for the input ``x``."""

    @abstractmethod
    def backward(self, params: Sequence[Tensor], dy: Tensor) -> Tensor:
        """Return the gradient by ``x``, given that by ``y``."""

    @abstractmethod
    def weight_gradients(self, params: Sequence[Tensor], x: Tensor, dy: Tensor) -> list[Tensor]:
        """Return the gradients by ``params``."""

    @abstractmethod
    def add_linear(self, params: Sequence[Tensor], dx: Tensor) -> Tensor:
        """Add the product of the weight alone with ``dx`` to the last output and return that."""


def _flat(tensor: Tensor) -> NDArray[Any]:
    return tensor.view(-1).numpy()


class Convolution(WeightLayer):
    """`nn.Conv2d` of images that `Padding` has padded."""

    def __init__(self, module: nn.Conv2d, shape: Shape, batch: int, dtype: torch.dtype) -> None:
        channels, height, width = shape
        rows, columns = module.kernel_size
        down, right = module.stride
        out = (module.out_channels, (height - rows) // down + 1, (width - columns) // right + 1)
        if height < rows or width < columns:
            raise UnsupportedLayerError("images smaller than a kernel")
        self.shape: Shape = out
        # Without a stride between columns a whole row of the image is one row of the products, else one pixel is.
        pieces, piece = (1, out[2]) if right == 1 else (out[2], 1)
        self._length = piece * batch
        self._x_stride, self._y_stride = height * width * batch, out[1] * out[2] * batch
        y, x = np.arange(out[1])[:, None], np.arange(pieces)
        self._x_rows = ((y * down * width + x * right) * batch).ravel()
        self._y_rows = ((y * pieces + x) * self._length).ravel()
        shifts = (np.arange(rows)[:, None] * width + np.arange(columns)) * batch
        self._shifts, self._no_shift = shifts.ravel(), np.zeros(1, dtype=np.int64)
        taps = np.arange(channels)[:, None] * self._x_stride + self._shifts
        self._x_taps = pad_offsets(taps.ravel())
        self._y_taps = pad_offsets(np.arange(out[0]) * self._y_stride)
        self._y = torch.empty(*out, batch, dtype=dtype)
        self._dx = torch.empty(*shape, batch, dtype=dtype)

    def forward(self, params: Sequence[Tensor], x: Tensor) -> Tensor:
        """See `WeightLayer`."""
        if len(params) == 2:
            self._y.copy_(params[1].view(-1, 1, 1, 1).expand_as(self._y))
        else:
            self._y.zero_()
        return self.add_linear(params, x)

    def add_linear(self, params: Sequence[Tensor], dx: Tensor) -> Tensor:
        """See `WeightLayer`."""
        add_products(
            pad_to_blocks(params[0].reshape(1, self.shape[0], -1)),
            *(_flat(dx), self._x_rows, self._x_taps),
            *(_flat(self._y), self._y_rows, self._no_shift, self._y_stride),
            *(self.shape[0], self._length),
        )
        return self._y

    def backward(self, params: Sequence[Tensor], dy: Tensor) -> Tensor:
        """See `WeightLayer`."""
        add_products(
            pad_to_blocks(params[0].permute(2, 3, 1, 0).flatten(0, 1)),
            *(_flat(dy), self._y_rows, self._y_taps),
            *(_flat(self._dx.zero_()), self._x_rows, self._shifts, self._x_stride),
            *(self._dx.shape[0], self._length),
        )
        return self._dx

    def weight_gradients(self, params: Sequence[Tensor], x: Tensor, dy: Tensor) -> list[Tensor]:
        """See `WeightLayer`."""
        weight = params[0]
        rows, taps = self.shape[0], weight[0].numel()
        out = pad_to_blocks(torch.zeros(rows, taps, dtype=weight.dtype))
        add_dot_products(
            out,
            *(_flat(dy), self._y_rows, self._y_stride, rows),
            *(_flat(x), self._x_rows, self._x_taps, self._length),
        )
        gradient = torch.from_numpy(out)[:rows, :taps].reshape(weight.shape)
        return [gradient, dy.flatten(1).sum(1)][: len(params)]


class Linear(WeightLayer):
    """`nn.Linear`."""

    def __init__(self, module: nn.Linear, shape: Shape, batch: int, dtype: torch.dtype) -> None:
        if shape != (module.in_features,):
            raise UnsupportedLayerError(f"a linear layer on inputs {shape}")
        self.shape: Shape = (module.out_features,)
        self._y = torch.empty(module.out_features, batch, dtype=dtype)
        self._dx = torch.empty(module.in_features, batch, dtype=dtype)
        self._dw = torch.empty(module.out_features, module.in_features, dtype=dtype)

    def forward(self, params: Sequence[Tensor], x: Tensor) -> Tensor:
        """See `WeightLayer`."""
        torch.mm(params[0], x, out=self._y)
        return self._y.add_(params[1].unsqueeze(1)) if len(params) == 2 else self._y

    def add_linear(self, params: Sequence[Tensor], dx: Tensor) -> Tensor:
        """See `WeightLayer`."""
        return self._y.addmm_(params[0], dx)

    def backward(self, params: Sequence[Tensor], dy: Tensor) -> Tensor:
        """See `WeightLayer`."""
        return torch.mm(params[0].t(), dy, out=self._dx)

    def weight_gradients(self, params: Sequence[Tensor], x: Tensor, dy: Tensor) -> list[Tensor]:
        """See `WeightLayer`."""
        return [torch.mm(dy, x.t(), out=self._dw), dy.sum(1)][: len(params)]
