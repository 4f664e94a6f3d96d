"""The path for GPUs: P networks at once, by `torch.func.vmap` over their stacked parameters.

One small network leaves most of a GPU idle, and a thousand launches a generation cost more than the arithmetic. Large
networks fill it alone: those go the general path, one after another. So do all networks on a CPU, where one network's
state stays in the cache and batching candidates is slower (measured).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap

from evoloss.engine.cuda_graphs import StepRunner
from evoloss.engine.functional import FunctionalModel
from evoloss.engine.optimizer import OptimizerState, update_parameters
from evoloss.engine.population_loss import OutputLoss, PopulationLoss, TaskLoss
from evoloss.engine.settings import TrainingSettings
from evoloss.engine.streams import Batch
from evoloss.errors import take_first_line
from evoloss.tasks import Task

MAX_PARAMETERS = 4_000_000
MAX_ACTIVATIONS = 32_000_000
"""Numbers kept for the backward pass of one network's batch. Networks beyond either limit are not batched.

Both are estimates, to be measured (`benchmarks.gpu_checks`): an MLP with two layers of 1,000 (1.0 million parameters)
and LeNet-5 (2.0 million activations at batch 128) lie below, ResNet-18 on 32 x 32 images (11 million, 228 million)
above.
"""

OUTPUT_ROWS = 2**15
"""Networks times rows that are evaluated at once."""


@dataclass
class BatchedState:
    """Parameters of P networks, each tensor (P, ...), their optimiser, and which never met a gradient not finite."""

    params: list[Tensor]
    optimizer: OptimizerState
    finite: Tensor


@dataclass(frozen=True)
class BatchedContext:
    """The meta-step itself; ``params`` are the initial parameters that all candidates share."""

    params: tuple[Tensor, ...]
    inner: Batch
    outer: Batch

    @property
    def nbytes(self) -> int:
        """See `evoloss.engine.path.Context`."""
        return sum(part.nbytes for part in (*self.params, *self.inner, *self.outer))


def count_activations(model: nn.Module, x: Tensor, batch_size: int) -> int:
    """Return how many numbers autograd keeps of a batch; measured on the first two and four rows of ``x``.

    What it keeps of the parameters does not grow with the rows.
    """
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    totals = []
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        for rows in (2, 4):
            kept = 0
            model(x[:rows])
            totals.append(kept)
    return (totals[1] - totals[0]) * batch_size // 2


class BatchedPath:
    """Trains P networks as one; results equal those of the general path up to rounding."""

    name = "batched"
    compiled_meta_steps = None

    def __init__(self, task: Task, model: nn.Module, settings: TrainingSettings) -> None:
        self.task = task
        self.model = model
        self.settings = settings
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        self._functional = FunctionalModel(model)
        self._steps = StepRunner()

    @classmethod
    def find_obstacle(cls, task: Task, model: nn.Module, settings: TrainingSettings) -> str | None:
        """See `evoloss.engine.path.Path`."""
        if task.train.x.device.type == "cpu":
            return "on a CPU one network at a time is faster"
        size = sum(p.numel() for p in model.parameters())
        if size > MAX_PARAMETERS:
            return f"with {size:,} parameters one network fills the device"
        activations = count_activations(copy.deepcopy(model), task.train.x, settings.batch_size)
        if activations > MAX_ACTIVATIONS:
            return f"with {activations:,} activations one network fills the device"
        # a copy, as a model may keep what it computes under vmap
        return cls(task, copy.deepcopy(model), settings).find_failure(task.train.x[:2])

    def find_failure(self, x: Tensor) -> str | None:
        """Return why training and meta-gradients fail for two networks on the rows ``x``, None if they do not."""
        try:
            outputs = self.outputs(self.start([self.model] * 2), x)
            # what some layers lack in bfloat16, e.g. nn.LayerNorm's derivative along a direction (torch 2.13)
            _, pull_back, push_forward = self._linearise(self._parameters_of(self.model), x)
            vmap(push_forward)(*vmap(pull_back)(torch.zeros_like(outputs)))
        except Exception as error:  # whatever a model of the user's own raises
            return f"torch.func cannot batch it: {take_first_line(error)}"
        return None

    def _forward(self, params: Sequence[Tensor], x: Tensor) -> Tensor:
        named = dict(zip(self._names, params, strict=True))
        return self._functional(named, x)

    def _forward_all(self, params: Sequence[Tensor], x: Tensor) -> Tensor:
        """Return the outputs (P, B, C) of the networks with parameters (P, ...) on the same rows."""
        outputs: Tensor = vmap(self._forward, in_dims=(0, None))(tuple(params), x)
        return outputs

    def _parameters_of(self, model: nn.Module) -> list[Tensor]:
        return [p.detach() for p in model.parameters() if p.requires_grad]

    def start(self, models: Sequence[nn.Module]) -> BatchedState:
        """See `evoloss.engine.path.Path`."""
        params = [
            torch.stack(copies)
            for copies in zip(*(self._parameters_of(model) for model in models), strict=True)
        ]
        finite = torch.ones(len(models), dtype=torch.bool, device=params[0].device)
        return BatchedState(params, OptimizerState(), finite)

    def select(self, state: BatchedState, keep: Sequence[int]) -> BatchedState:
        """See `evoloss.engine.path.Path`."""
        chosen = torch.tensor(list(keep), dtype=torch.long, device=state.finite.device)
        return BatchedState(
            [p[chosen] for p in state.params],
            state.optimizer.apply(lambda moment: moment[chosen]),
            state.finite[chosen],
        )

    def advance(
        self, state: BatchedState, loss: OutputLoss, x: Tensor, targets: Tensor, batches: Tensor
    ) -> None:
        """See `evoloss.engine.path.Path`."""

        def step(rows: Tensor) -> None:
            leaves = [p.detach().requires_grad_() for p in state.params]
            outputs = self._forward_all(leaves, x[rows])
            upstream = loss.output_gradients(outputs.detach(), targets[rows])
            state.finite &= torch.isfinite(upstream).flatten(1).all(1)
            gradients = list(torch.autograd.grad(outputs, leaves, upstream))
            update_parameters(self.settings, state.params, gradients, state.optimizer)

        self._steps.run(step, batches)

    @torch.no_grad()
    def outputs(self, state: BatchedState, x: Tensor) -> Tensor:
        """See `evoloss.engine.path.Path`."""
        rows = max(1, OUTPUT_ROWS // len(state.finite))
        parts = [self._forward_all(state.params, part) for part in torch.split(x, rows)]
        return torch.where(state.finite.view(-1, 1, 1), torch.cat(parts, 1), torch.nan)

    def _linearise(
        self, params: Sequence[Tensor], x: Tensor
    ) -> tuple[Tensor, Callable[..., tuple[Tensor, ...]], Callable[..., Tensor]]:
        """Return one network's outputs (B, C), and its Jacobian transposed and as it is, as functions."""

        def outputs_of(*params: Tensor) -> Tensor:
            return self._forward(params, x)

        def push_forward(*tangents: Tensor) -> Tensor:
            derivative: Tensor = jvp(outputs_of, tuple(params), tangents)[1]
            return derivative

        results = vjp(outputs_of, *params)
        return results[0].detach(), results[1], push_forward

    def prepare(self, model: nn.Module, inner: Batch, outer: Batch) -> BatchedContext:
        """See `evoloss.engine.path.Path`."""
        return BatchedContext(tuple(self._parameters_of(model)), inner, outer)

    def meta_gradients(
        self, context: BatchedContext, loss: PopulationLoss
    ) -> tuple[Tensor, NDArray[np.float64]]:
        """See `evoloss.engine.path.Path`: vjp, step, gradient and jvp, all candidates at once."""
        inner, outer = context.inner, context.outer
        rate = self.settings.first_step_rate
        shrink = 1.0 - rate * self.settings.weight_decay

        outputs, pull_back, push_forward = self._linearise(context.params, inner.x)
        shared = outputs.unsqueeze(0)
        gradients = vmap(pull_back)(loss.output_gradients(shared, inner.targets))
        stepped = [
            torch.sub(shrink * p, g, alpha=rate).detach().requires_grad_()
            for p, g in zip(context.params, gradients, strict=True)
        ]
        stepped_outputs = self._forward_all(stepped, outer.x)
        detached = stepped_outputs.detach()
        upstream = TaskLoss(self.task).output_gradients(detached, outer.targets)
        directions = vmap(push_forward)(*torch.autograd.grad(stepped_outputs, stepped, upstream))
        values = self.task.compute_task_loss(detached, outer.y)
        return values, -rate * loss.weight_gradients(shared, inner.targets, directions)
