"""Unrolled differentiation through k >= 1 inner steps, for any network, by plain double backpropagation.

Loss parameters phi reach the outer loss through every inner SGD step theta <- theta - rate * grad M_phi (momentum and
weight decay as in `torch.optim.SGD`). One step has a cheaper exact form (`meta_gradients` of the paths).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evoloss.engine.functional import FunctionalModel
from evoloss.engine.population_loss import PopulationLoss
from evoloss.engine.settings import TrainingSettings
from evoloss.engine.streams import Batch
from evoloss.expressions import Program, evaluate_program
from evoloss.tasks import Task


def compute_learned_loss(
    task: Task, program: Program, weights: Tensor, outputs: Tensor, targets: Tensor
) -> Tensor:
    """Return M_phi as a differentiable scalar; ``weights`` (instructions,), ``outputs`` and ``targets`` (B, C)."""
    predictions = task.activate(outputs)
    values = evaluate_program(program, targets, predictions, weights.unbind(), torch)
    total = torch.as_tensor(values).sum()
    return total / (targets.numel() if task.kind == "regression" else targets.shape[0])


def unroll(
    task: Task,
    model: nn.Module,
    program: Program,
    weights: Tensor,
    settings: TrainingSettings,
    batches: Sequence[Batch],
) -> dict[str, Tensor]:
    """Return the parameters after one differentiable SGD step per batch, starting from ``model``'s own."""
    params: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    buffers: dict[str, Tensor] = {}
    functional = FunctionalModel(model)
    for batch in batches:
        outputs = functional(params, batch.x)
        loss = compute_learned_loss(task, program, weights, outputs, batch.targets)
        gradients = torch.autograd.grad(
            loss,
            list(params.values()),
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        stepped = {}
        for (name, value), gradient in zip(params.items(), gradients, strict=True):
            step = gradient + settings.weight_decay * value
            if settings.momentum:
                buffers[name] = (
                    settings.momentum * buffers[name] + step if name in buffers else step
                )
                step = (
                    step + settings.momentum * buffers[name] if settings.nesterov else buffers[name]
                )
            stepped[name] = value - settings.learning_rate * step
        params = stepped
    return params


@dataclass(frozen=True)
class UnrolledContext:
    """A meta-step: train ``model`` on the batches ``inner``, measure on ``outer``."""

    model: nn.Module
    inner: tuple[Batch, ...]
    outer: Batch

    @property
    def nbytes(self) -> int:
        """See `evoloss.engine.path.Context`."""
        return sum(p.nbytes for p in self.model.parameters()) + sum(
            part.nbytes for batch in (*self.inner, self.outer) for part in batch
        )


def unrolled_meta_gradients(
    task: Task, settings: TrainingSettings, context: UnrolledContext, loss: PopulationLoss
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return outer losses (P,) after the inner steps and their gradients by all weights (instructions,)."""
    model, outer = context.model, context.outer
    functional = FunctionalModel(model)
    values, gradients = [], []
    # cuDNN's recurrent layers have no second derivative, should a model of the user's own have one
    with torch.backends.cudnn.flags(enabled=False):
        for program, own in zip(loss.programs, loss.split_weights(), strict=True):
            weights = torch.tensor(
                own, dtype=settings.dtype, device=outer.x.device, requires_grad=True
            )
            params = unroll(task, model, program, weights, settings, context.inner)
            value = task.compute_task_loss(functional(params, outer.x), outer.y)
            (gradient,) = torch.autograd.grad(
                value, weights, allow_unused=True, materialize_grads=True
            )
            values.append(value.item())
            gradients.append(gradient.double().cpu().numpy())
    return np.array(values), np.concatenate(gradients)
