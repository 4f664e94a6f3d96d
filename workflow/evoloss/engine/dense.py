"""The fast path of dense networks (multi-layer perceptrons), large and small, by hand-written backpropagation.

A network whose state fills the cache trains alone, by large matrix products; smaller ones train in stacks, weights
(k, out, in), in batched products. Either way one stack's state stays in the cache for all steps, and stacks are spread
over the threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evoloss.engine.dense_layers import (
    activate,
    activate_backward,
    affine,
    find_tiled,
    read_layers,
)
from evoloss.engine.dense_linearised import linearise_dense
from evoloss.engine.dense_masked import MaskedGradient
from evoloss.engine.dense_meta import DenseContext, dense_meta_gradients, prepare_dense
from evoloss.engine.functional import find_addition
from evoloss.engine.linearised import LinearisedContext, linearised_meta_gradients
from evoloss.engine.optimizer import OptimizerState, update_parameters
from evoloss.engine.population_loss import OutputLoss, PopulationLoss
from evoloss.engine.products import stacked_product
from evoloss.engine.settings import TrainingSettings
from evoloss.engine.streams import Batch
from evoloss.engine.threads import map_on_threads
from evoloss.engine.tiles import is_tiled, make_tiles, read_weight
from evoloss.tasks import Task

STACK_BYTES = 2**23
"""A stack's parameters, gradients, moments and activations take at most about as much, or it is one network."""

MAX_JACOBIAN_BYTES = 2**28
"""Meta-gradients keep the outputs' Jacobian by all layers' values; a network with a larger one goes another path."""

EQUAL_SHARES = 4
"""Several stacks are a multiple of so many, if there are networks enough: two or four threads have the same work."""

OUTPUT_ROWS = 1024
"""Rows whose outputs are computed at a time: a whole training split's hidden layers need not fit into memory."""

CHECK_EVERY = 8
"""Steps between two looks whether a network of the stack is left that has not diverged."""


@dataclass
class Stack:
    """k networks: parameters, each (k, ...), and their optimiser."""

    params: list[Tensor]
    optimizer: OptimizerState

    def __len__(self) -> int:
        return len(self.params[0])

    def split(self) -> Iterator[Stack]:
        """Return the networks as stacks of one."""
        for i in range(len(self)):
            row = slice(i, i + 1)
            optimizer = self.optimizer.apply(lambda tensor, row=row: tensor[row])  # type: ignore[misc]
            yield Stack([p[row] for p in self.params], optimizer)


def join_stacks(stacks: Sequence[Stack]) -> Stack:
    """Return one stack of all networks, which have taken the same number of steps; a single one is not copied."""
    if len(stacks) == 1:
        return stacks[0]
    optimizers = [stack.optimizer for stack in stacks]
    return Stack(
        [torch.cat(parts) for parts in zip(*(s.params for s in stacks), strict=True)],
        OptimizerState(
            [_join_optional(parts) for parts in zip(*(o.first for o in optimizers), strict=True)],
            [torch.cat(parts) for parts in zip(*(o.second for o in optimizers), strict=True)],
            [step.clone() for step in optimizers[0].steps],
        ),
    )


def _join_optional(parts: Sequence[Tensor | None]) -> Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None


class DensePath:
    """Trains P dense networks; results equal those of the general path up to rounding."""

    name = "dense"
    compiled_meta_steps = None

    def __init__(self, task: Task, model: nn.Module, settings: TrainingSettings) -> None:
        self.task = task
        self.settings = settings
        layers = read_layers(model)
        assert not isinstance(layers, str)
        self.activations = [layer.activation for layer in layers]
        self.has_bias = [layer.linear.bias is not None for layer in layers]
        state = (2 + (settings.momentum > 0) + 2 * (settings.optimizer == "adam")) * sum(
            p.numel() for layer in layers for p in layer.params
        )
        activations = 2 * settings.batch_size * sum(layer.linear.out_features for layer in layers)
        size = (state + activations) * torch.finfo(settings.dtype).bits // 8
        self.stack_size = max(1, STACK_BYTES // size)
        rows = min(settings.batch_size, len(task.train.y))
        self.tiled_place = find_tiled(layers, rows)

    @classmethod
    def find_obstacle(cls, task: Task, model: nn.Module, settings: TrainingSettings) -> str | None:
        """See `evoloss.engine.path.Path`."""
        layers = read_layers(model)
        if isinstance(layers, str):
            return layers
        if layers[0].linear.weight.device.type != "cpu":
            return "it is made for a CPU's cache"
        inputs = layers[0].linear.in_features
        if task.vocabulary_size is not None or int(np.prod(task.input_shape)) != inputs:
            return f"inputs that are not {inputs} numbers a row"
        width = sum(layer.linear.out_features for layer in layers)
        entries = settings.batch_size * task.num_outputs * width
        if entries * torch.finfo(settings.dtype).bits // 8 > MAX_JACOBIAN_BYTES:
            return f"{task.num_outputs} outputs: a batch's Jacobian takes over {MAX_JACOBIAN_BYTES >> 20} MiB"
        return find_addition(model)

    def start(self, models: Sequence[nn.Module]) -> list[Stack]:
        """See `evoloss.engine.path.Path`."""
        distinct = {id(model): model for model in models}
        place = {key: i for i, key in enumerate(distinct)}
        params = zip(*(self._params(model) for model in distinct.values()), strict=True)
        initial = [torch.stack(tensors) for tensors in params]
        if models and self.tiled_place is not None and self.stack_size == 1:
            weights = [make_tiles(weight).values for weight in initial[self.tiled_place]]
            initial[self.tiled_place] = torch.stack(weights)
        chosen = [place[id(model)] for model in models]
        # an index copies: no network shares memory with another or with its model
        return [
            Stack([p[chosen[part]] for p in initial], OptimizerState())
            for part in self._stacks(len(chosen))
        ]

    @staticmethod
    def _params(model: nn.Module) -> list[Tensor]:
        layers = read_layers(model)
        assert not isinstance(layers, str)
        return [p for layer in layers for p in layer.params]

    def _stacks(self, size: int) -> Iterator[slice]:
        """Return the networks of every stack: one that holds all, or several of one size, give or take a network."""
        count = -(-size // self.stack_size)
        if count > 1:
            count = min(size, count + -count % EQUAL_SHARES)
        edges = [size * i // count for i in range(count + 1)] if count else []
        return (slice(a, b) for a, b in itertools.pairwise(edges))

    def select(self, state: list[Stack], keep: Sequence[int]) -> list[Stack]:
        """See `evoloss.engine.path.Path`."""
        networks = [network for stack in state for network in stack.split()]
        chosen = [networks[p] for p in keep]
        return [join_stacks(chosen[part]) for part in self._stacks(len(chosen))]

    @torch.no_grad()
    def advance(
        self, state: list[Stack], loss: OutputLoss, x: Tensor, targets: Tensor, batches: Tensor
    ) -> None:
        """See `evoloss.engine.path.Path`."""
        inputs = x.flatten(1)
        stops = np.cumsum([len(stack) for stack in state]).tolist()

        def work(_: None, i: int) -> None:
            numbers = range(stops[i] - len(state[i]), stops[i])
            self._advance_stack(state[i], loss.select(numbers), inputs, targets, batches)

        map_on_threads(lambda: None, work, range(len(state)))

    def _advance_stack(
        self, stack: Stack, loss: OutputLoss, inputs: Tensor, targets: Tensor, batches: Tensor
    ) -> None:
        for step, rows in enumerate(batches):
            values = self._forward(stack.params, inputs[rows])
            upstream = loss.output_gradients(values[-1], targets[rows])
            gradients = self._backward(stack.params, values, upstream)
            update_parameters(self.settings, stack.params, gradients, stack.optimizer)
            # a gradient that is not finite has made parameters of its network so: it has diverged for good
            if step % CHECK_EVERY == 0 and not torch.isfinite(upstream.sum((1, 2))).any():
                return

    def _forward(self, params: list[Tensor], x: Tensor) -> list[Tensor]:
        """Return ``x`` (1, B, in) and every layer's values (k, B, out)."""
        values, below = [x.unsqueeze(0)], "none"
        left = iter(params)
        for activation, has_bias in zip(self.activations, self.has_bias, strict=True):
            weight, bias = next(left), next(left) if has_bias else None
            values.append(activate(activation, affine(values[-1], weight, bias, below)))
            below = activation
        return values

    def _backward(
        self, params: list[Tensor], values: list[Tensor], upstream: Tensor
    ) -> list[Tensor]:
        """Return the gradients by all parameters; ``upstream`` (k, B, out) by the last values."""
        gradients: list[Tensor] = []
        left = list(params)
        masked: MaskedGradient | None = None
        for i in reversed(range(len(self.activations))):
            upstream = activate_backward(self.activations[i], upstream, values[i + 1])
            if self.has_bias[i]:
                left.pop()
                gradients.append(upstream.sum(1))
            weight = left.pop()
            if masked:
                gradients.append(masked.by_weight(values[i], weight))
            else:
                gradients.append(stacked_product(upstream.mT, values[i]))
            if i:
                kind, num_inputs = self.activations[i - 1], values[i - 1].shape[-1]
                if is_tiled(left[-1 - self.has_bias[i - 1]]):
                    below: MaskedGradient | None = MaskedGradient(upstream, weight, values[i])
                else:
                    below = MaskedGradient.find(kind, upstream, weight, values[i], num_inputs)
                if masked:
                    upstream = masked.by_inputs(read_weight(weight, values[i].shape[-1]))
                else:
                    upstream = stacked_product(upstream, weight)
                masked = below
        return gradients[::-1]

    @torch.no_grad()
    def outputs(self, state: list[Stack], x: Tensor) -> Tensor:
        """See `evoloss.engine.path.Path`."""

        def work(_: None, stack: Stack) -> Tensor:
            # a saturated unit hides a weight that is not finite
            finite = torch.stack([p.flatten(1).sum(1).isfinite() for p in stack.params]).all(0)
            parts = torch.split(x.flatten(1), OUTPUT_ROWS)
            out = torch.cat([self._forward(stack.params, part)[-1] for part in parts], 1)
            return torch.where(finite[:, None, None], out, torch.nan)

        return torch.cat(map_on_threads(lambda: None, work, state))

    def prepare(self, model: nn.Module, inner: Batch, outer: Batch) -> DenseContext:
        """See `evoloss.engine.path.Path`."""
        return prepare_dense(model, inner, outer, self.settings)

    def prepare_linearised(self, model: nn.Module, inner: Batch, outer: Batch) -> LinearisedContext:
        """See `evoloss.engine.linearised.LinearisablePath`."""
        return linearise_dense(model, inner, outer, self.settings)

    def meta_gradients(
        self, context: DenseContext | LinearisedContext, loss: PopulationLoss
    ) -> tuple[Tensor, NDArray[np.float64]]:
        """See `evoloss.engine.path.Path`."""
        if isinstance(context, LinearisedContext):
            return linearised_meta_gradients(self.task, self.settings, context, loss)
        return dense_meta_gradients(self.task, self.settings, context, loss)
