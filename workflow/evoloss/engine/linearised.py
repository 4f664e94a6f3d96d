"""Linearised local search: the outer outputs follow the inner step along their tangent. Approximate, an option only.

With the neural tangent kernel (Jacot, Gabriel, Hongler, NeurIPS 2018) Theta = J_outer J_inner^T, the stepped network's
outputs are ``Z_outer - rate * Theta u`` and J g is ``Theta^T v``, where u and v are the loss gradients by inner and
outer outputs: all of the network is in Theta, which candidates and generations share. The error of the meta-gradient
vanishes with the square of the rate; a linear model has none.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from evoloss.engine.path import Context
from evoloss.engine.population_loss import PopulationLoss, TaskLoss
from evoloss.engine.settings import TrainingSettings
from evoloss.engine.streams import Batch
from evoloss.tasks import Task


@runtime_checkable
class LinearisablePath(Protocol):
    """A `evoloss.engine.path.Path` with linearised meta-steps."""

    def prepare_linearised(self, model: nn.Module, inner: Batch, outer: Batch) -> Context:
        """Return the linearised meta-step, for the path's own ``meta_gradients``."""
        ...


@dataclass(frozen=True)
class LinearisedContext:
    """Inner outputs (1, B, C), outer outputs (V, C) without the step, and the kernel Theta (V * C, B * C)."""

    inner_outputs: Tensor
    outer_outputs: Tensor
    kernel: Tensor
    inner_targets: Tensor
    outer_targets: Tensor
    outer_y: Tensor

    @property
    def nbytes(self) -> int:
        """See `evoloss.engine.path.Context`."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))


def linearised_meta_gradients(
    task: Task, settings: TrainingSettings, context: LinearisedContext, loss: PopulationLoss
) -> tuple[Tensor, NDArray[np.float64]]:
    """Return outer losses (P,) and their gradients by all instruction weights (instructions,)."""
    c, rate = context, settings.first_step_rate
    upstream = loss.output_gradients(c.inner_outputs, c.inner_targets)
    change = (upstream.flatten(1) @ c.kernel.mT).view(loss.size, *c.outer_outputs.shape)
    stepped = c.outer_outputs - rate * change
    outer_upstream = TaskLoss(task).output_gradients(stepped, c.outer_targets)
    directions = (outer_upstream.flatten(1) @ c.kernel).view_as(upstream)
    values = task.compute_task_loss(stepped, c.outer_y)
    return values, -rate * loss.weight_gradients(c.inner_outputs, c.inner_targets, directions)
