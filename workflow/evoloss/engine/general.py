"""The general path: any network, one candidate after another, by plain autograd.

On a CPU one network's state stays in the cache this way, and every step runs the library's best kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evoloss.engine.population_loss import OutputLoss, PopulationLoss, TaskLoss
from evoloss.engine.settings import TrainingSettings
from evoloss.engine.streams import Batch
from evoloss.tasks import Task


@dataclass
class GeneralState:
    """Parameters and momentum buffers of P networks; a candidate whose gradient was not finite is not ``alive``."""

    params: list[list[Tensor]]
    momenta: list[list[Tensor] | None]
    alive: list[bool]


class GeneralPath:
    """Trains P copies of ``model`` in turn. ``model`` is the work place: its own parameters are overwritten."""

    name = "general"

    def __init__(self, task: Task, model: nn.Module, settings: TrainingSettings) -> None:
        self.task = task
        self.model = model
        self.settings = settings
        self._params = [p for p in model.parameters() if p.requires_grad]

    def start(self, model: nn.Module, size: int) -> GeneralState:
        """Return ``size`` copies of a freshly initialised ``model``."""
        initial = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        copies = [[p.clone() for p in initial] for _ in range(size)]
        return GeneralState(copies, [None] * size, [True] * size)

    def _load(self, params: Sequence[Tensor]) -> None:
        for own, value in zip(self._params, params, strict=True):
            own.data = value

    def advance(
        self, state: GeneralState, loss: OutputLoss, x: Tensor, targets: Tensor, batches: Tensor
    ) -> None:
        """Train every candidate in place on ``batches`` (steps, batch) of the rows of ``x`` and ``targets``."""
        for p in range(loss.size):
            if state.alive[p]:
                self._advance_one(state, p, loss.select([p]), x, targets, batches)

    def _advance_one(
        self,
        state: GeneralState,
        p: int,
        loss: OutputLoss,
        x: Tensor,
        targets: Tensor,
        batches: Tensor,
    ) -> None:
        self._load(state.params[p])
        s = self.settings
        for rows in batches:
            outputs = self.model(x[rows])
            upstream = loss.output_gradients(outputs.unsqueeze(0).detach(), targets[rows])[0]
            if not bool(torch.isfinite(upstream).all()):
                state.alive[p] = False
                return
            gradients = list(torch.autograd.grad(outputs, self._params, upstream))
            with torch.no_grad():
                if s.weight_decay:
                    torch._foreach_add_(gradients, state.params[p], alpha=s.weight_decay)
                if s.momentum:
                    buffers = state.momenta[p]
                    if buffers is None:
                        buffers = state.momenta[p] = [g.clone() for g in gradients]
                    else:
                        torch._foreach_mul_(buffers, s.momentum)
                        torch._foreach_add_(buffers, gradients)
                    if s.nesterov:
                        torch._foreach_add_(gradients, buffers, alpha=s.momentum)
                    else:
                        gradients = buffers
                torch._foreach_add_(state.params[p], gradients, alpha=-s.learning_rate)

    @torch.no_grad()
    def outputs(self, state: GeneralState, x: Tensor, chunk: int = 128) -> Tensor:
        """Return the networks' outputs (P, N, C); NaN for candidates that are not alive."""
        results = []
        for p, params in enumerate(state.params):
            self._load(params)
            out = torch.cat([self.model(part) for part in torch.split(x, chunk)])
            results.append(out if state.alive[p] else torch.full_like(out, torch.nan))
        return torch.stack(results)

    def meta_gradients(
        self, model: nn.Module, loss: PopulationLoss, inner: Batch, outer: Batch
    ) -> tuple[Tensor, NDArray[np.float64]]:
        """Return outer losses (P,) and their gradients by all instruction weights (instructions,), one inner step.

        Exact, without second-order backpropagation through the loss: with J the Jacobian of the outputs on the inner
        batch and g the gradient of the outer loss at the stepped parameters, the gradient is
        -rate * < J g, d2 M / (d outputs d phi) >. Outputs and J at the initial parameters of ``model`` are shared by
        all candidates; J g is the derivative by u of < J^T u, g >.
        """
        params = [p for p in model.parameters() if p.requires_grad]
        outputs = model(inner.x)
        shared = outputs.detach().unsqueeze(0)
        upstream = loss.output_gradients(shared, inner.targets)
        probe = torch.zeros_like(outputs, requires_grad=True)
        transposed = torch.autograd.grad(outputs, params, probe, create_graph=True)
        task_loss = TaskLoss(self.task)
        rate = self.settings.first_step_rate
        shrink = 1.0 - rate * self.settings.weight_decay
        initial = [p.detach() * shrink for p in params]
        values = torch.empty(loss.size, dtype=outputs.dtype)
        directions = torch.empty_like(upstream)
        for p in range(loss.size):
            gradients = torch.autograd.grad(outputs, params, upstream[p], retain_graph=True)
            self._load(torch._foreach_add(initial, gradients, alpha=-rate))
            stepped = self.model(outer.x)
            detached = stepped.detach()
            values[p] = self.task.compute_task_loss(detached, outer.y)
            outer_upstream = task_loss.output_gradients(detached.unsqueeze(0), outer.targets)[0]
            outer_gradients = torch.autograd.grad(stepped, self._params, outer_upstream)
            (directions[p],) = torch.autograd.grad(
                transposed, probe, outer_gradients, retain_graph=True
            )
        return values, -rate * loss.weight_gradients(shared, inner.targets, directions)
