"""The general path: any network, one candidate after another, by plain autograd.

On a CPU one network's state stays in the cache this way, and every step runs the library's best kernels. With more
than one thread each thread takes candidates of its own: they need not wait for each other within a step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evoloss.engine.optimizer import OptimizerState, update_parameters
from evoloss.engine.population_loss import OutputLoss, PopulationLoss, TaskLoss
from evoloss.engine.settings import TrainingSettings
from evoloss.engine.streams import Batch
from evoloss.engine.threads import map_on_threads
from evoloss.tasks import Task


@dataclass
class GeneralState:
    """Parameters and optimisers of P networks; a candidate whose gradient was not finite is not ``alive``."""

    params: list[list[Tensor]]
    optimizers: list[OptimizerState]
    alive: list[bool]


@dataclass(frozen=True)
class GeneralContext:
    """The meta-step itself: a graph through the network is not kept."""

    model: nn.Module
    inner: Batch
    outer: Batch

    @property
    def nbytes(self) -> int:
        """See `evoloss.engine.path.Context`."""
        return sum(p.nbytes for p in self.model.parameters()) + sum(
            part.nbytes for batch in (self.inner, self.outer) for part in batch
        )


class _Worker:
    """A working copy of the network: its own parameters are overwritten."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)
        self.params = [p for p in self.model.parameters() if p.requires_grad]

    def load(self, params: Sequence[Tensor]) -> None:
        for own, value in zip(self.params, params, strict=True):
            own.data = value


class GeneralPath:
    """Trains P copies of ``model`` in turn."""

    name = "general"
    compiled_meta_steps = None

    def __init__(self, task: Task, model: nn.Module, settings: TrainingSettings) -> None:
        self.task = task
        self.model = model
        self.settings = settings

    @classmethod
    def find_obstacle(cls, task: Task, model: nn.Module, settings: TrainingSettings) -> str | None:
        """See `evoloss.engine.path.Path`: it handles every network."""
        return None

    def start(self, models: Sequence[nn.Module]) -> GeneralState:
        """See `evoloss.engine.path.Path`."""
        copies = [
            [p.detach().clone() for p in model.parameters() if p.requires_grad] for model in models
        ]
        return GeneralState(copies, [OptimizerState() for _ in copies], [True] * len(copies))

    def select(self, state: GeneralState, keep: Sequence[int]) -> GeneralState:
        """See `evoloss.engine.path.Path`."""
        return GeneralState(
            [state.params[p] for p in keep],
            [state.optimizers[p] for p in keep],
            [state.alive[p] for p in keep],
        )

    def advance(
        self, state: GeneralState, loss: OutputLoss, x: Tensor, targets: Tensor, batches: Tensor
    ) -> None:
        """See `evoloss.engine.path.Path`."""

        def work(worker: _Worker, p: int) -> None:
            self._advance_one(worker, state, p, loss.select([p]), x, targets, batches)

        alive = [p for p in range(loss.size) if state.alive[p]]
        map_on_threads(lambda: _Worker(self.model), work, alive)

    def _advance_one(
        self,
        worker: _Worker,
        state: GeneralState,
        p: int,
        loss: OutputLoss,
        x: Tensor,
        targets: Tensor,
        batches: Tensor,
    ) -> None:
        params = state.params[p]
        worker.load(params)
        for rows in batches:
            outputs = worker.model(x[rows])
            upstream = loss.output_gradients(outputs.unsqueeze(0).detach(), targets[rows])[0]
            if not bool(torch.isfinite(upstream).all()):
                state.alive[p] = False
                return
            gradients = list(torch.autograd.grad(outputs, worker.params, upstream))
            update_parameters(self.settings, params, gradients, state.optimizers[p])

    @torch.no_grad()
    def outputs(self, state: GeneralState, x: Tensor, chunk: int = 128) -> Tensor:
        """See `evoloss.engine.path.Path`; ``x`` is taken in parts of ``chunk`` rows, which caches like better."""

        @torch.no_grad()
        def work(worker: _Worker, p: int) -> Tensor:
            worker.load(state.params[p])
            out = torch.cat([worker.model(part) for part in torch.split(x, chunk)])
            return out if state.alive[p] else torch.full_like(out, torch.nan)

        return torch.stack(
            map_on_threads(lambda: _Worker(self.model), work, range(len(state.params)))
        )

    def prepare(self, model: nn.Module, inner: Batch, outer: Batch) -> GeneralContext:
        """See `evoloss.engine.path.Path`."""
        return GeneralContext(model, inner, outer)

    def meta_gradients(
        self, context: GeneralContext, loss: PopulationLoss
    ) -> tuple[Tensor, NDArray[np.float64]]:
        """Return outer losses (P,) and their gradients by all instruction weights (instructions,), one inner step.

        Exact, without second-order backpropagation through the loss: with J the Jacobian of the outputs on the inner
        batch and g the gradient of the outer loss at the stepped parameters, the gradient is
        -rate * < J g, d2 M / (d outputs d phi) >. Outputs and J at the initial parameters are shared by all
        candidates; J g is the derivative by u of < J^T u, g >.
        """
        model, inner, outer = context.model, context.inner, context.outer
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

        def work(worker: _Worker, p: int) -> None:
            gradients = torch.autograd.grad(outputs, params, upstream[p], retain_graph=True)
            worker.load(torch._foreach_add(initial, gradients, alpha=-rate))
            stepped = worker.model(outer.x)
            detached = stepped.detach()
            values[p] = self.task.compute_task_loss(detached, outer.y)
            outer_upstream = task_loss.output_gradients(detached.unsqueeze(0), outer.targets)[0]
            outer_gradients = torch.autograd.grad(stepped, worker.params, outer_upstream)
            (directions[p],) = torch.autograd.grad(
                transposed, probe, outer_gradients, retain_graph=True
            )

        map_on_threads(lambda: _Worker(self.model), work, range(loss.size))
        return values, -rate * loss.weight_gradients(shared, inner.targets, directions)
