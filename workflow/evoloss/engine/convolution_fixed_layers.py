"""Layers without weights in batch-innermost layout; see `evoloss.engine.convolution_layers`."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from evoloss.engine.convolution_activations import (
    ACTIVATIONS,
    activate,
    multiply_by_slope,
)
from evoloss.engine.convolution_layers import Array, Shape, UnsupportedLayerError


class FixedLayer(Protocol):
    """A layer without parameters."""

    shape: Shape

    def forward(self, x: Array) -> Array:
        """Return the output ``y`` for the input ``x``."""
        ...

    def backward(self, x: Array, y: Array, dy: Array) -> Array:
        """Return the gradient by ``x``, given that by ``y``."""
        ...

    def tangent(self, x: Array, y: Array, dx: Array) -> Array:
        """Return the derivative of ``y`` along ``dx``."""
        ...


class Padding:
    """The zeros around the images that an `nn.Conv2d` asks for."""

    def __init__(self, module: nn.Conv2d, shape: Shape, batch: int, dtype: np.dtype[Any]) -> None:
        channels, height, width = shape
        (top, bottom), (left, right) = _find_padding(module)
        self.shape: Shape = (channels, height + top + bottom, width + left + right)
        self._is_empty = self.shape == shape
        self._inside = (slice(None), slice(top, top + height), slice(left, left + width))
        self._y = np.zeros((*self.shape, batch), dtype)
        self._dx = np.empty((*shape, batch), dtype)

    def forward(self, x: Array) -> Array:
        """See `FixedLayer`."""
        if self._is_empty:
            return x
        self._y[self._inside] = x
        return self._y

    def backward(self, x: Array, y: Array, dy: Array) -> Array:
        """See `FixedLayer`."""
        if self._is_empty:
            return dy
        np.copyto(self._dx, dy[self._inside])
        return self._dx

    def tangent(self, x: Array, y: Array, dx: Array) -> Array:
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

    def __init__(self, module: nn.Flatten, shape: Shape, batch: int, dtype: np.dtype[Any]) -> None:
        if module.start_dim != 1 or module.end_dim not in (-1, len(shape)):
            raise UnsupportedLayerError("nn.Flatten of some dimensions only")
        self.shape: Shape = (math.prod(shape),)

    def forward(self, x: Array) -> Array:
        """See `FixedLayer`."""
        return x.reshape(-1, x.shape[-1])

    def backward(self, x: Array, y: Array, dy: Array) -> Array:
        """See `FixedLayer`."""
        return dy.reshape(x.shape)

    def tangent(self, x: Array, y: Array, dx: Array) -> Array:
        """See `FixedLayer`."""
        return self.forward(dx)


class Activation:
    """`nn.Tanh`, `nn.ReLU` or `nn.Sigmoid`: their derivatives are functions of the output.

    ``in_place`` may be set where the layer before needs its own output no more, which saves time.
    """

    def __init__(self, module: nn.Module, shape: Shape, batch: int, dtype: np.dtype[Any]) -> None:
        self.shape = shape
        self.in_place = False
        self._kind = ACTIVATIONS.index(type(module).__name__)
        self._y = np.empty((*shape, batch), dtype)

    def forward(self, x: Array) -> Array:
        """See `FixedLayer`."""
        y = x if self.in_place else self._y
        if y is not x:
            np.copyto(y, x)
        activate(y.reshape(-1), self._kind)
        return y

    def backward(self, x: Array, y: Array, dy: Array) -> Array:
        """See `FixedLayer`."""
        multiply_by_slope(dy.reshape(-1), y.reshape(-1), self._kind)
        return dy

    def tangent(self, x: Array, y: Array, dx: Array) -> Array:
        """See `FixedLayer`."""
        return self.backward(x, y, dx)


def _as_images(array: Array) -> Tensor:
    """View (channels, height, width, batch) as torch's (channels, batch, height, width), channels last."""
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def _pair(size: Any) -> list[int]:
    return list(size) if isinstance(size, tuple) else [size, size]


class AveragePooling:
    """`nn.AvgPool2d`."""

    def __init__(
        self, module: nn.AvgPool2d, shape: Shape, batch: int, dtype: np.dtype[Any]
    ) -> None:
        self._options = (
            *(_pair(size) for size in (module.kernel_size, module.stride, module.padding)),
            *(module.ceil_mode, module.count_include_pad, module.divisor_override),
        )
        self._dx = np.empty((*shape, batch), dtype)
        self.shape: Shape = (shape[0], *module(torch.from_numpy(self._dx[..., 0])).shape[1:])
        self._y = np.empty((*self.shape, batch), dtype)

    def forward(self, x: Array) -> Array:
        """See `FixedLayer`."""
        torch.ops.aten.avg_pool2d.out(_as_images(x), *self._options, out=_as_images(self._y))
        return self._y

    def backward(self, x: Array, y: Array, dy: Array) -> Array:
        """See `FixedLayer`."""
        torch.ops.aten.avg_pool2d_backward.grad_input(
            _as_images(dy), _as_images(x), *self._options, grad_input=_as_images(self._dx)
        )
        return self._dx

    def tangent(self, x: Array, y: Array, dx: Array) -> Array:
        """See `FixedLayer`."""
        return self.forward(dx)


class MaxPooling:
    """`nn.MaxPool2d`; where the maxima were is found anew by each method, so that nothing but ``x`` is kept."""

    def __init__(
        self, module: nn.MaxPool2d, shape: Shape, batch: int, dtype: np.dtype[Any]
    ) -> None:
        if module.return_indices:
            raise UnsupportedLayerError("nn.MaxPool2d that returns indices")
        options = (module.kernel_size, module.stride, module.padding, module.dilation)
        self._options = (*(_pair(size) for size in options), module.ceil_mode)
        self._dx = np.empty((*shape, batch), dtype)
        self.shape: Shape = (shape[0], *module(torch.from_numpy(self._dx[..., 0])).shape[1:])
        self._y = np.empty((*self.shape, batch), dtype)
        self._places = np.empty((*self.shape, batch), np.int64)

    def forward(self, x: Array) -> Array:
        """See `FixedLayer`."""
        torch.ops.aten.max_pool2d_with_indices.out(
            _as_images(x), *self._options, out=_as_images(self._y), indices=_as_images(self._places)
        )
        return self._y

    def backward(self, x: Array, y: Array, dy: Array) -> Array:
        """See `FixedLayer`."""
        self.forward(x)
        torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
            *(_as_images(dy), _as_images(x), *self._options, _as_images(self._places)),
            grad_input=_as_images(self._dx),
        )
        return self._dx

    def tangent(self, x: Array, y: Array, dx: Array) -> Array:
        """See `FixedLayer`."""
        self.forward(x)
        channels, batch = dx.shape[0], dx.shape[-1]
        flat = self._places.reshape(channels, -1, batch)
        chosen = np.take_along_axis(dx.reshape(channels, -1, batch), flat, 1)
        np.copyto(self._y, chosen.reshape(self._y.shape))
        return self._y
