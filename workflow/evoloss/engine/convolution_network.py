"""Networks of the convolutional path: layers in a row, run forward, backward and along tangents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evoloss.engine.convolution_fixed_layers import (
    Activation,
    AveragePooling,
    FixedLayer,
    Flatten,
    MaxPooling,
    Padding,
)
from evoloss.engine.convolution_layers import (
    Array,
    PooledConvolution,
    Products,
    Shape,
    UnsupportedLayerError,
)

_LAYERS: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.Conv2d: (Padding, Products),
    nn.AvgPool2d: (AveragePooling,),
    nn.MaxPool2d: (MaxPooling,),
    nn.Flatten: (Flatten,),
    nn.Linear: (Products,),
    nn.Tanh: (Activation,),
    nn.ReLU: (Activation,),
    nn.Sigmoid: (Activation,),
}
_OF_IMAGES = (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d)


def list_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of nested `nn.Sequential`, in the order in which they are applied."""
    if type(model) is not nn.Sequential:
        return [model]
    return [module for child in model for module in list_modules(child)]


def _check_module(module: nn.Module, shape: Shape) -> None:
    name = f"nn.{type(module).__name__}"
    if type(module) not in _LAYERS:
        raise UnsupportedLayerError(f"a module {type(module).__name__}")
    if isinstance(module, _OF_IMAGES) and len(shape) != 3:
        raise UnsupportedLayerError(f"{name} of inputs that are no images")
    if isinstance(module, nn.Conv2d):
        if module.groups != 1 or module.dilation != (1, 1):
            raise UnsupportedLayerError(f"{name} with groups or dilation")
        if module.padding_mode != "zeros":
            raise UnsupportedLayerError(f"{name} padded with something else than zeros")
    if not all(p.requires_grad for p in module.parameters()):
        raise UnsupportedLayerError(f"{name} with frozen parameters")


class Network:
    """The layers of a model for one batch size, with their buffers; parameters are given to every method.

    ``params`` are in the order of ``model.parameters()``. Activations are lists: the output of `enter` (or its like),
    then every layer's output; they are overwritten by the next `forward` or `tangent`. What comes before the first
    weight is the same for all candidates: `enter` computes it. ``body`` are the convolutions, if all of them are
    pooled ones and dense layers follow; else it is empty.

    Raises
    ------
    UnsupportedLayerError
        If the model has a module that no layer stands for, or does not fit inputs of ``shape``.
    """

    def __init__(self, model: nn.Module, shape: Shape, batch: int, dtype: np.dtype[Any]) -> None:
        self._input = (*shape, batch)
        self._dtype = dtype
        self._entry: list[FixedLayer] = []
        self._layers: list[tuple[FixedLayer | Products, slice]] = []
        modules = list_modules(model)
        if len({id(m) for m in modules}) < len(modules):
            raise UnsupportedLayerError("a module that is used twice")
        count = 0
        while modules:
            module = modules[0]
            _check_module(module, shape)
            for kind in _LAYERS[type(module)]:
                used = 1
                own = slice(count, count)
                layer: FixedLayer | Products
                if kind is not Products:
                    layer = kind(module, shape, batch, dtype)
                else:
                    count += len(list(module.parameters()))
                    own = slice(own.start, count)
                    if PooledConvolution.fits(modules, shape):
                        used = 3
                        layer = PooledConvolution(modules[:3], shape, batch, dtype)
                    else:
                        layer = Products(module, shape, batch, dtype)
                shape = layer.shape
                if not self._layers and not isinstance(layer, Products):
                    self._entry.append(layer)
                    continue
                if isinstance(layer, Activation):
                    layer.in_place = isinstance(self._layers[-1][0], Products)
                self._layers.append((layer, own))
            modules = modules[used:]
        if len(shape) != 1:
            raise UnsupportedLayerError("outputs that are not flat")
        self.body = self._find_body()

    def enter(self, x: Tensor) -> Array:
        """Return what the first layer with weights gets for at most a batch of samples, zeros filling it up."""
        inputs = np.zeros(self._input, self._dtype)
        torch.from_numpy(inputs)[..., : len(x)] = x.permute(1, 2, 3, 0)
        for layer in self._entry:
            inputs = layer.forward(inputs)
        return inputs.copy() if self._entry else inputs

    def forward(self, params: Sequence[Array], entered: Array) -> list[Array]:
        """Return all activations; the last is the output (outputs, batch)."""
        activations = [entered]
        for layer, own in self._layers:
            x = activations[-1]
            if isinstance(layer, PooledConvolution):
                activations += layer.forward_all(params[own], x)
            elif isinstance(layer, Products):
                activations.append(layer.forward(params[own], x))
            else:
                activations.append(layer.forward(x))
        return activations

    def _walk(
        self, activations: Sequence[Array]
    ) -> list[tuple[FixedLayer | Products, slice, Array, Array]]:
        """Return all layers with their parameters' places, inputs, and (first) outputs."""
        place, walk = 0, []
        for layer, own in self._layers:
            walk.append((layer, own, activations[place], activations[place + 1]))
            place += 2 if isinstance(layer, PooledConvolution) else 1
        return walk

    def _find_body(self) -> list[PooledConvolution]:
        products = [layer for layer, _ in self._layers if isinstance(layer, Products)]
        body = [layer for layer in products if isinstance(layer, PooledConvolution)]
        others = products[len(body) :]
        dense = others and all(layer.geometry.pixels == 1 for layer in others)
        return body if products[: len(body)] == body and dense else []

    def pull_back_output(
        self,
        params: Sequence[Array],
        activations: Sequence[Array],
        output: int,
        into: Sequence[Array],
    ) -> None:
        """Write the gradients of one output by what every layer of the body returns, the pooling's, for all samples.

        ``into`` has an array (outputs, channels, windows, batch) for every layer.
        """
        dy = np.zeros_like(activations[-1])
        dy[output] = 1
        left = len(self.body)
        for layer, own, x, y in reversed(self._walk(activations)):
            if isinstance(layer, PooledConvolution):
                left -= 1
                np.copyto(into[left][output], dy.reshape(into[left].shape[1:]))
            if left == 0:
                return
            is_fixed = not isinstance(layer, Products)
            dy = layer.backward(x, y, dy) if is_fixed else layer.pull_back(params[own], y, dy)

    def list_body(
        self, activations: Sequence[Array]
    ) -> list[tuple[PooledConvolution, Array, Array]]:
        """Return the layers of the body with their inputs and their activations' outputs."""
        walk = self._walk(activations)
        return [(layer, x, y) for layer, _, x, y in walk if isinstance(layer, PooledConvolution)]

    def backward(
        self,
        params: Sequence[Array],
        activations: Sequence[Array],
        upstream: Array,
        first: int = 0,
    ) -> list[Array]:
        """Return the gradients by the parameters from ``first`` on, given that by the output.

        ``first`` is that of a layer; ``upstream`` may be overwritten.
        """
        gradients: list[Array] = []
        dy = upstream
        for layer, own, x, y in reversed(self._walk(activations)):
            if own.stop <= first:
                break
            if isinstance(layer, Products):
                own_gradients, dy = layer.backward(params[own], x, y, dy, own.start > first)
                gradients = own_gradients + gradients
            else:
                dy = layer.backward(x, y, dy)
        return gradients

    def tangent(
        self,
        params: Sequence[Array],
        activations: Sequence[Array],
        dparams: Sequence[Array],
        first: int = 0,
    ) -> Array:
        """Return the derivative of the output along ``dparams``, which are those from ``first`` on."""
        dy: Array | None = None
        for layer, own, x, y in self._walk(activations):
            if isinstance(layer, Products) and own.start >= first:
                moved = dparams[own.start - first : own.stop - first]
                dy = layer.tangent(params[own], moved, x, y, dy)
            elif dy is not None:
                assert not isinstance(layer, Products)
                dy = layer.tangent(x, y, dy)
        assert dy is not None
        return dy
