"""The fast path of linear models: all P networks in two matrix products a step, and low-rank meta-gradients.

One SGD step on a batch changes a dense layer by at most that batch's rank. So with the Gram matrix of outer and inner
inputs, K = X_out X_in^T + 1, the stepped network's outputs are ``shrink * Z_out - rate * K U``, and J g is ``K^T G``:
the stepped weights are never formed. Of large batches K is not formed either, but kept as these two factors.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evoloss.engine.functional import find_addition
from evoloss.engine.linear_kernel import (
    LinearArrays,
    linear_meta_gradients,
    take_linear_meta_steps,
)
from evoloss.engine.loss_params import LossParams
from evoloss.engine.optimizer import OptimizerState, update_parameters
from evoloss.engine.population_loss import OutputLoss, PopulationLoss, TaskLoss, activate
from evoloss.engine.products import product
from evoloss.engine.settings import TrainingSettings
from evoloss.engine.streams import Batch
from evoloss.engine.threads import map_on_threads
from evoloss.tasks import Task


@dataclass
class LinearState:
    """Weights (P, C, D), biases (P, C) and what their optimiser remembers."""

    weight: Tensor
    bias: Tensor
    optimizer: OptimizerState = field(default_factory=OptimizerState)

    def view(self, first: int, last: int) -> LinearState:
        """Return the networks ``first:last``, in the same memory."""
        state = self.optimizer.apply(lambda t: t[first:last])
        return LinearState(self.weight[first:last], self.bias[first:last], state)

    def join(self, parts: Sequence[LinearState]) -> None:
        """Take over what the optimiser of all networks' `view` remembers; their parameters are here already."""
        states = [part.optimizer for part in parts]
        self.optimizer = OptimizerState(
            [
                None if one[0] is None else torch.cat([t for t in one if t is not None])
                for one in zip(*(s.first for s in states), strict=True)
            ],
            [torch.cat(one) for one in zip(*(s.second for s in states), strict=True)],
            states[0].steps,
        )


@dataclass(frozen=True)
class LinearContext:
    """All at the initial parameters: inner predictions (1, B, C), outer outputs (C, V), the Gram matrix K (V, B), K^T.

    K and K^T are the products of ``gram`` and of ``gram_t``: one matrix, or the two factors (V, D + 1) and (D + 1, B).
    Inner predictions and all targets are transposes of contiguous tensors with the classes first.
    """

    inner_predictions: Tensor
    outer_outputs: Tensor
    gram: tuple[Tensor, ...]
    gram_t: tuple[Tensor, ...]
    inner_targets: Tensor
    outer_targets: Tensor
    outer_y: Tensor

    @functools.cached_property
    def arrays(self) -> LinearArrays:
        """What the compiled meta-steps take: numpy arrays, classes first."""
        tensors = (
            *(self.inner_predictions[0].t(), self.inner_targets.t(), *self.gram, *self.gram_t),
            *(self.outer_outputs, self.outer_targets.t()),
        )
        return LinearArrays(*(tensor.numpy() for tensor in tensors))

    @property
    def nbytes(self) -> int:
        """See `evoloss.engine.path.Context`."""
        values = [getattr(self, entry.name) for entry in fields(self)]
        tensors = [t for v in values for t in (v if isinstance(v, tuple) else (v,))]
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def find_linear_layer(model: nn.Module) -> nn.Linear | None:
    """Return the model's one `nn.Linear` if the model is that layer on flattened inputs and nothing else."""
    leaves = [m for m in model.modules() if not any(True for _ in m.children())]
    layers = [m for m in leaves if not isinstance(m, nn.Flatten)]
    if len(layers) != 1 or type(layers[0]) is not nn.Linear or layers[0].bias is None:
        return None
    containers = [m for m in model.modules() if m not in leaves]
    plain = all(type(m) is nn.Sequential for m in containers)
    return layers[0] if plain and all(p.requires_grad for p in model.parameters()) else None


def pad_ones(x: Tensor) -> Tensor:
    """Return ``x`` (N, D) with a column of ones for the bias."""
    return nn.functional.pad(x, (0, 1), value=1.0)


def gram_pays(num_inner: int, num_outer: int, features: int) -> bool:
    """Tell whether batches of so many rows cost less by their Gram matrix than by its factors.

    Measured on a CPU: with 10 and 100 features they cost the same at about 250 rows each, with 784 at about 600; with
    100 features the factors are half as fast at 100 rows, 5 times as fast at 1,000 and 20 to 40 times at 2,000.
    """
    # B V products against (B + V) D
    return 2 * num_inner * num_outer <= (num_inner + num_outer) * (200 + features // 2)


class LinearPath:
    """Trains P linear models at once; results equal those of the general path up to rounding."""

    name = "linear"

    def __init__(self, task: Task, model: nn.Module, settings: TrainingSettings) -> None:
        self.task = task
        self.settings = settings
        inner, outer = (
            min(settings.batch_size, len(split)) for split in (task.train, task.validation)
        )
        self._keeps_gram = gram_pays(inner, outer, math.prod(task.input_shape))
        self._is_compiled = (
            self._keeps_gram
            and task.kind == "classification"
            and task.num_outputs > 1
            and task.train.x.device.type == "cpu"
        )
        self.compiled_meta_steps = self._take_meta_steps if self._is_compiled else None

    @classmethod
    def find_obstacle(cls, task: Task, model: nn.Module, settings: TrainingSettings) -> str | None:
        """See `evoloss.engine.path.Path`."""
        if find_linear_layer(model) is None:
            return "it is no single linear layer"
        return find_addition(model)

    @staticmethod
    def _layer(model: nn.Module) -> tuple[Tensor, Tensor]:
        layer = find_linear_layer(model)
        assert layer is not None
        return layer.weight.detach(), layer.bias.detach()

    def start(self, models: Sequence[nn.Module]) -> LinearState:
        """See `evoloss.engine.path.Path`."""
        layers = [self._layer(model) for model in models]
        return LinearState(
            torch.stack([weight for weight, _ in layers]), torch.stack([bias for _, bias in layers])
        )

    def select(self, state: LinearState, keep: Sequence[int]) -> LinearState:
        """See `evoloss.engine.path.Path`."""
        chosen = torch.tensor(list(keep), dtype=torch.long, device=state.bias.device)
        return LinearState(
            state.weight[chosen],
            state.bias[chosen],
            state.optimizer.apply(lambda t: t.index_select(0, chosen)),
        )

    def advance(
        self, state: LinearState, loss: OutputLoss, x: Tensor, targets: Tensor, batches: Tensor
    ) -> None:
        """See `evoloss.engine.path.Path`."""
        inputs, labels = x.flatten(1), targets.t().contiguous()
        size = len(state.bias)
        count = torch.get_num_threads() if state.bias.device.type == "cpu" else 1
        if count == 1 or size < 2 * count:
            self._advance(state, loss, inputs, labels, batches)
            return
        # every thread trains some of the networks on its own: the threads meet once, not in every operation
        edges = [size * i // count for i in range(count + 1)]
        parts = [list(range(a, b)) for a, b in itertools.pairwise(edges)]
        states = [state.view(part[0], part[-1] + 1) for part in parts]

        def train(_: None, i: int) -> None:
            self._advance(states[i], loss.select(parts[i]), inputs, labels, batches)

        map_on_threads(lambda: None, train, range(count))
        state.join(states)

    def _advance(
        self, state: LinearState, loss: OutputLoss, inputs: Tensor, labels: Tensor, batches: Tensor
    ) -> None:
        """Train on rows of ``inputs`` (N, D) and ``labels`` (C, N)."""
        for rows in batches:
            batch = inputs.index_select(0, rows)
            outputs = self._multiply(state, batch)
            upstream = loss.output_gradients(outputs.mT, labels.index_select(1, rows).mT).mT
            self._step(state, upstream, batch)

    @staticmethod
    def _multiply(state: LinearState, inputs: Tensor) -> Tensor:
        """Return the outputs (P, C, N) for ``inputs`` (N, D)."""
        weight = state.weight.flatten(0, 1)
        return torch.addmm(state.bias.view(-1, 1), weight, inputs.t()).view(*state.bias.shape, -1)

    def _step(self, state: LinearState, upstream: Tensor, batch: Tensor) -> None:
        s = self.settings
        flat, bias_step = upstream.flatten(0, 1), upstream.sum(-1)
        if s.optimizer == "sgd" and not s.momentum:
            # the product adds to the weights in place: no tensor of steps
            shrink = 1.0 - s.learning_rate * s.weight_decay
            weight = state.weight.flatten(0, 1)
            weight.addmm_(flat, batch, beta=shrink, alpha=-s.learning_rate)
            state.bias.mul_(shrink).sub_(bias_step, alpha=s.learning_rate)
            return
        weight_step = torch.mm(flat, batch).view_as(state.weight)
        params = [state.weight, state.bias]
        update_parameters(s, params, [weight_step, bias_step], state.optimizer)

    def outputs(self, state: LinearState, x: Tensor) -> Tensor:
        """See `evoloss.engine.path.Path`."""
        return self._multiply(state, x.flatten(1)).mT.contiguous()

    def prepare(self, model: nn.Module, inner: Batch, outer: Batch) -> LinearContext:
        """See `evoloss.engine.path.Path`."""
        weight, bias = self._layer(model)
        x_in, x_out = inner.x.flatten(1), outer.x.flatten(1)
        shrink = 1.0 - self.settings.first_step_rate * self.settings.weight_decay
        column = bias.unsqueeze(1)
        if self._keeps_gram:
            # once per meta-step and for all candidates: summed in float64, ten times closer
            product64 = torch.mm(x_out.double(), x_in.double().t())
            gram: tuple[Tensor, ...] = ((product64 + 1.0).to(x_in.dtype),)
        else:
            gram = (pad_ones(x_out), pad_ones(x_in).t())
        return LinearContext(
            activate(self.task, torch.addmm(column, weight, x_in.t()).t().unsqueeze(0)),
            shrink * torch.addmm(column, weight, x_out.t()),
            gram,
            tuple(factor.t().contiguous() for factor in reversed(gram)),
            inner.targets.t().contiguous().t(),
            outer.targets.t().contiguous().t(),
            outer.y,
        )

    def prepare_linearised(self, model: nn.Module, inner: Batch, outer: Batch) -> LinearContext:
        """See `evoloss.engine.linearised.LinearisablePath`: the model is linear, so this is exact."""
        return self.prepare(model, inner, outer)

    def meta_gradients(
        self, context: LinearContext, loss: PopulationLoss
    ) -> tuple[Tensor, NDArray[np.float64]]:
        """See `evoloss.engine.path.Path`."""
        c = context
        rate = self.settings.first_step_rate
        if self._is_compiled:
            values, gradient = linear_meta_gradients(loss.packed, rate, c.arrays)
            return torch.from_numpy(values), gradient
        upstream = loss.output_gradients_at(c.inner_predictions, c.inner_targets).mT
        steps = functools.reduce(product, c.gram_t, upstream.flatten(0, 1))
        steps = steps.view(loss.size, *c.outer_outputs.shape)
        stepped = torch.add(c.outer_outputs, steps, alpha=-rate)
        outer_losses, outer_upstream = TaskLoss(self.task).values_and_gradients(
            stepped.mT, c.outer_targets, c.outer_y
        )
        directions = functools.reduce(product, c.gram, outer_upstream.mT.flatten(0, 1))
        directions = directions.view_as(upstream).mT
        gradient = loss.weight_gradients_at(c.inner_predictions, c.inner_targets, directions)
        return outer_losses, -rate * gradient

    def _take_meta_steps(
        self, contexts: Sequence[LinearContext], loss: PopulationLoss, params: LossParams
    ) -> None:
        steps = [context.arrays for context in contexts]
        take_linear_meta_steps(loss.packed, self.settings.first_step_rate, steps, params)
