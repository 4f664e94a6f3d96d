"""Layers without weights in batch-innermost layout; see `evoloss.engine.convolution_layers`."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from evoloss.engine.convolution_kernels import compute_tanh
from evoloss.engine.convolution_layers import Shape, UnsupportedLayerError


class FixedLayer(Protocol):
    """A layer without parameters."""

    shape: Shape

    def forward(self, x: Tensor) -> Tensor:
        """Return the output ``y`` for the input ``x``."""
        ...

    def backward(self, x: Tensor, y: Tensor, dy: Tensor) -> Tensor:
        """Return the gradient by ``x``, given that by ``y``."""
        ...

    def tangent(self, x: Tensor, y: Tensor, dx: Tensor) -> Tensor:
        """Return the derivative of ``y`` along ``dx``."""
        ...


class Padding:
    """The zeros around the images that an `nn.Conv2d` asks for."""

    def __init__(self, module: nn.Conv2d, shape: Shape, batch: int, dtype: torch.dtype) -> None:
        channels, height, width = shape
        (top, bottom), (left, right) = _find_padding(module)
        self.shape: Shape = (channels, height + top + bottom, width + left + right)
        self._is_empty = self.shape == shape
        self._inside = (slice(None), slice(top, top + height), slice(left, left + width))
        self._y = torch.zeros(*self.shape, batch, dtype=dtype)
        self._dx = torch.empty(*shape, batch, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """See `FixedLayer`."""
        if self._is_empty:
            return x
        self._y[self._inside] = x
        return self._y

    def backward(self, x: Tensor, y: Tensor, dy: Tensor) -> Tensor:
        """See `FixedLayer`."""
        return dy if self._is_empty else self._dx.copy_(dy[self._inside])

    def tangent(self, x: Tensor, y: Tensor, dx: Tensor) -> Tensor:
        """See `FixedLayer`."""
        return self.forward(dx)


def _find_padding(module: nn.Conv2d) -> list[tuple[int, int]]:
    """Return the zeros (before, after) rows and columns; ``same`` puts the odd one after, as torch does."""
    if module.padding == "valid":
        return [(0, 0), (0, 0)]
    if isinstance(module.padding, str):
        return [((size - 1) // 2, size - 1 - (size - 1) // 2) for size in module.kernel_size]
    return [(size, size) for size in module.padding]


class Flatten:
    """`nn.Flatten`."""

    def __init__(self, module: nn.Flatten, shape: Shape, batch: int, dtype: torch.dtype) -> None:
        if module.start_dim != 1 or module.end_dim not in (-1, len(shape)):
            raise UnsupportedLayerError("nn.Flatten of some dimensions only")
        self.shape: Shape = (math.prod(shape),)

    def forward(self, x: Tensor) -> Tensor:
        """See `FixedLayer`."""
        return x.view(-1, x.shape[-1])

    def backward(self, x: Tensor, y: Tensor, dy: Tensor) -> Tensor:
        """See `FixedLayer`."""
        return dy.view(x.shape)

    def tangent(self, x: Tensor, y: Tensor, dx: Tensor) -> Tensor:
        """See `FixedLayer`."""
        return self.forward(dx)


class Activation:
    """`nn.Tanh`, `nn.ReLU` or `nn.Sigmoid`: their derivatives are functions of the output.

    ``in_place`` may be set where the layer before needs its own output no more, which saves time and memory.
    """

    def __init__(self, module: nn.Module, shape: Shape, batch: int, dtype: torch.dtype) -> None:
        self.shape = shape
        self.in_place = False
        self._module = module
        self._y = torch.empty(*shape, batch, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """See `FixedLayer`."""
        y = x if self.in_place else self._y
        if isinstance(self._module, nn.Tanh):
            compute_tanh(x, y)
        elif isinstance(self._module, nn.Sigmoid):
            torch.sigmoid(x, out=y)
        else:
            torch.clamp_min(x, 0.0, out=y)
        return y

    def backward(self, x: Tensor, y: Tensor, dy: Tensor) -> Tensor:
        """See `FixedLayer`."""
        aten = torch.ops.aten
        if isinstance(self._module, nn.Tanh):
            return aten.tanh_backward.grad_input(dy, y, grad_input=dy)  # type: ignore[no-any-return]
        if isinstance(self._module, nn.Sigmoid):
            return aten.sigmoid_backward.grad_input(dy, y, grad_input=dy)  # type: ignore[no-any-return]
        return aten.threshold_backward.grad_input(dy, y, 0.0, grad_input=dy)  # type: ignore[no-any-return]

    def tangent(self, x: Tensor, y: Tensor, dx: Tensor) -> Tensor:
        """See `FixedLayer`."""
        return self.backward(x, y, dx)


def _as_images(tensor: Tensor) -> Tensor:
    """View (channels, height, width, batch) as torch's (channels, batch, height, width), channels last."""
    return tensor.permute(0, 3, 1, 2)


def _pair(size: Any) -> list[int]:
    return list(size) if isinstance(size, tuple) else [size, size]


class AveragePooling:
    """`nn.AvgPool2d`."""

    def __init__(self, module: nn.AvgPool2d, shape: Shape, batch: int, dtype: torch.dtype) -> None:
        self._options = (
            *(_pair(size) for size in (module.kernel_size, module.stride, module.padding)),
            *(module.ceil_mode, module.count_include_pad, module.divisor_override),
        )
        self._dx = torch.empty(*shape, batch, dtype=dtype)
        self.shape: Shape = (shape[0], *module(self._dx[..., 0]).shape[1:])
        self._y = torch.empty(*self.shape, batch, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """See `FixedLayer`."""
        torch.ops.aten.avg_pool2d.out(_as_images(x), *self._options, out=_as_images(self._y))
        return self._y

    def backward(self, x: Tensor, y: Tensor, dy: Tensor) -> Tensor:
        """See `FixedLayer`."""
        torch.ops.aten.avg_pool2d_backward.grad_input(
            _as_images(dy), _as_images(x), *self._options, grad_input=_as_images(self._dx)
        )
        return self._dx

    def tangent(self, x: Tensor, y: Tensor, dx: Tensor) -> Tensor:
        """See `FixedLayer`."""
        return self.forward(dx)


class MaxPooling:
    """`nn.MaxPool2d`; where the maxima were is found anew by each method, so that nothing but ``x`` is kept."""

    def __init__(self, module: nn.MaxPool2d, shape: Shape, batch: int, dtype: torch.dtype) -> None:
        if module.return_indices:
            raise UnsupportedLayerError("nn.MaxPool2d that returns indices")
        options = (module.kernel_size, module.stride, module.padding, module.dilation)
        self._options = (*(_pair(size) for size in options), module.ceil_mode)
        self._dx = torch.empty(*shape, batch, dtype=dtype)
        self.shape: Shape = (shape[0], *module(self._dx[..., 0]).shape[1:])
        self._y = torch.empty(*self.shape, batch, dtype=dtype)
        self._places = torch.empty(*self.shape, batch, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        """See `FixedLayer`."""
        torch.ops.aten.max_pool2d_with_indices.out(
            _as_images(x), *self._options, out=_as_images(self._y), indices=_as_images(self._places)
        )
        return self._y

    def backward(self, x: Tensor, y: Tensor, dy: Tensor) -> Tensor:
        """See `FixedLayer`."""
        self.forward(x)
        torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
            *(_as_images(dy), _as_images(x), *self._options, _as_images(self._places)),
            grad_input=_as_images(self._dx),
        )
        return self._dx

    def tangent(self, x: Tensor, y: Tensor, dx: Tensor) -> Tensor:
        """See `FixedLayer`."""
        self.forward(x)
        torch.gather(dx.flatten(1, 2), 1, self._places.flatten(1, 2), out=self._y.flatten(1, 2))
        return self._y
