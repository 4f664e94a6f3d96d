"""The oracle: the method one network and one candidate at a time, by plain autograd, as a textbook would write it.

It shares no code with the engine but the operator table (`evaluate_program`). Tests and benchmarks compare the engine
with it. Whatever is random (models, batches) is given to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from evoloss.engine import TrainingSettings
from evoloss.expressions import Program, evaluate_program
from evoloss.tasks import Task

Samples = tuple[Tensor, Tensor]
"""Inputs (B, ...) and labels (B,), or targets (B, outputs)."""


def compute_learned_loss(
    task: Task, program: Program, weights: Any, z: Tensor, y: Tensor
) -> Tensor:
    """Return M(y, f(x)) of raw outputs ``z`` (B, C); ``weights`` are one factor per instruction."""
    if task.kind == "regression":
        target, f, count = y, z, y.numel()
    elif task.num_outputs == 1:
        target, f, count = y.unsqueeze(1).to(z.dtype), torch.sigmoid(z), len(y)
    else:
        target, count = functional.one_hot(y, task.num_outputs).to(z.dtype), len(y)
        f = torch.softmax(z, 1)
    return torch.as_tensor(evaluate_program(program, target, f, list(weights), torch)).sum() / count


def compute_task_loss(task: Task, z: Tensor, y: Tensor) -> Tensor:
    """Return the task loss by `torch.nn.functional`."""
    if task.kind == "regression":
        return functional.mse_loss(z, y)
    if task.num_outputs == 1:
        return functional.binary_cross_entropy_with_logits(z.squeeze(1), y.to(z.dtype))
    return functional.cross_entropy(z, y)


def compute_metric(task: Task, z: Tensor, y: Tensor) -> float:
    """Return the mean squared error, or the share of wrong classes."""
    if task.kind == "regression":
        return functional.mse_loss(z, y).item()
    chosen = (z.squeeze(1) > 0).long() if task.num_outputs == 1 else z.argmax(1)
    return (chosen != y).double().mean().item()


def make_optimizer(params: Iterable[Tensor], settings: TrainingSettings) -> torch.optim.Optimizer:
    """Return torch's own optimiser."""
    if settings.optimizer == "adam":
        return torch.optim.Adam(params, settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.SGD(
        params,
        settings.learning_rate,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
    )


def train(
    task: Task,
    model: nn.Module,
    program: Program,
    settings: TrainingSettings,
    batches: Iterable[Tensor],
) -> None:
    """Train ``model`` in place under one loss on ``batches`` of row numbers of the training split."""
    optimizer = make_optimizer(model.parameters(), settings)
    weights = [float(weight) for weight in program.weights]
    for rows in batches:
        optimizer.zero_grad()
        z = model(task.train.x[rows])
        torch.autograd.backward(compute_learned_loss(task, program, weights, z, task.train.y[rows]))
        optimizer.step()


@torch.no_grad()
def measure(task: Task, model: nn.Module, samples: Samples) -> tuple[float, float]:
    """Return metric and task loss of a model."""
    z = model(samples[0])
    return compute_metric(task, z, samples[1]), compute_task_loss(task, z, samples[1]).item()


def compute_meta_gradient(
    task: Task,
    model: nn.Module,
    program: Program,
    settings: TrainingSettings,
    inner: Sequence[Samples],
    outer: Samples,
) -> tuple[float, NDArray[np.float64]]:
    """Return the outer loss and its gradient by all weights (instructions,), by double backprop through SGD."""
    weights = torch.tensor(program.weights, device=outer[0].device, requires_grad=True)
    params: dict[str, Tensor] = dict(model.named_parameters())
    velocity = {name: torch.zeros_like(value) for name, value in params.items()}
    for x, y in inner:
        z = functional_call(model, params, (x,))
        loss = compute_learned_loss(task, program, weights.to(z.dtype), z, y)
        gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        for (name, value), gradient in zip(list(params.items()), gradients, strict=True):
            d = gradient + settings.weight_decay * value
            velocity[name] = settings.momentum * velocity[name] + d
            d = d + settings.momentum * velocity[name] if settings.nesterov else velocity[name]
            params[name] = value - settings.learning_rate * d
    value = compute_task_loss(task, functional_call(model, params, (outer[0],)), outer[1])
    (gradient,) = torch.autograd.grad(value, weights)
    return value.item(), gradient.cpu().numpy()


def run_local_search(
    task: Task,
    program: Program,
    settings: TrainingSettings,
    meta_learning_rate: float,
    meta_steps: Iterable[tuple[nn.Module, Sequence[Samples], Samples]],
) -> Program:
    """Return the program after one Adam step on phi per (initial model, inner batches, outer batch)."""
    phi = torch.tensor(program.loss_params)
    adam = torch.optim.Adam([phi], meta_learning_rate)
    for model, inner, outer in meta_steps:
        _, gradient = compute_meta_gradient(task, model, program, settings, inner, outer)
        phi.grad = torch.from_numpy(gradient[program.trainable])
        adam.step()
        program = program.with_loss_params(phi.numpy())
    return program


def is_rejected(
    task: Task, outputs: Tensor, y: Tensor, program: Program, num_steps: int, learning_rate: float
) -> bool:
    """Tell whether optimising ``outputs`` (B, C) under the loss leaves the metric no better."""
    before = compute_metric(task, outputs, y)
    z = outputs.clone().requires_grad_()
    adam = torch.optim.Adam([z], learning_rate)
    weights = [float(weight) for weight in program.weights]
    for _ in range(num_steps):
        adam.zero_grad()
        # the sum over samples, so that Adam's epsilon does not matter
        torch.autograd.backward(compute_learned_loss(task, program, weights, z, y) * len(y))
        adam.step()
    return not compute_metric(task, z.detach(), y) < before
