"""Unrolled differentiation through k >= 1 inner steps, for any network, by plain double backpropagation.

Loss parameters phi reach the outer loss through every inner SGD step theta <- theta - rate * grad M_phi (momentum and
weight decay as in `torch.optim.SGD`). One step has a cheaper exact form (`meta_gradients` of the paths).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

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
    for batch in batches:
        outputs = functional_call(model, params, (batch.x,))
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


def unrolled_meta_gradient(
    task: Task,
    model: nn.Module,
    program: Program,
    settings: TrainingSettings,
    inner: Sequence[Batch],
    outer: Batch,
) -> tuple[float, NDArray[np.float64]]:
    """Return the outer loss after ``len(inner)`` steps and its gradient by all weights, shape ``(instructions,)``."""
    device = outer.x.device
    weights = torch.tensor(program.weights, dtype=settings.dtype, device=device, requires_grad=True)
    # cuDNN's recurrent layers have no second derivative, should a model of the user's own have one
    with torch.backends.cudnn.flags(enabled=False):
        params = unroll(task, model, program, weights, settings, inner)
        value = task.compute_task_loss(functional_call(model, params, (outer.x,)), outer.y)
        (gradient,) = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
    return value.item(), gradient.double().cpu().numpy()
