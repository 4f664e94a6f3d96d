"""The fast path of convolutional networks on a CPU, LeNet-5 and its like: every layer and its derivatives by hand.

`evoloss.engine.convolution_kernels` says why it is fast. What a meta-step's candidates share are the activations at the
initial parameters: J^T u is a backward pass through them and J g a tangent pass, so that no graph is built and nothing
is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evoloss.engine.convolution_layers import UnsupportedLayerError
from evoloss.engine.convolution_network import Network, list_modules
from evoloss.engine.general import GeneralPath, GeneralState
from evoloss.engine.optimizer import update_parameters
from evoloss.engine.population_loss import OutputLoss, PopulationLoss, TaskLoss
from evoloss.engine.settings import TrainingSettings
from evoloss.engine.streams import Batch
from evoloss.engine.threads import map_on_threads
from evoloss.tasks import Task

CHUNK = 16
"""So many batches at a time are laid out for all candidates."""
EVALUATION_BATCH = 128


@dataclass(frozen=True)
class ConvolutionalContext:
    """Initial parameters and activations on the inner batch, and both batches as the first layer gets them."""

    params: list[Tensor]
    activations: list[Tensor]
    inner: Batch
    outer: Batch
    outer_entered: Tensor

    @property
    def nbytes(self) -> int:
        """See `evoloss.engine.path.Context`."""
        tensors = (*self.params, *self.activations, self.outer_entered, *self.inner, *self.outer)
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


class ConvolutionalPath:
    """Trains P convolutional networks in turn; results equal those of the general path up to rounding."""

    name = "convolutional"

    def __init__(self, task: Task, model: nn.Module, settings: TrainingSettings) -> None:
        self.task = task
        self.model = model
        self.settings = settings
        self._general = GeneralPath(task, model, settings)
        self._networks: dict[int, list[Network]] = {}

    @classmethod
    def find_obstacle(cls, task: Task, model: nn.Module, settings: TrainingSettings) -> str | None:
        """See `evoloss.engine.path.Path`."""
        if not any(isinstance(module, nn.Conv2d) for module in list_modules(model)):
            return "no convolution"
        if task.train.x.device.type != "cpu":
            return "not on a CPU"
        try:
            Network(model, task.input_shape, 1, settings.dtype)
        except UnsupportedLayerError as error:
            return str(error)
        return None

    def start(self, models: Sequence[nn.Module]) -> GeneralState:
        """See `evoloss.engine.path.Path`."""
        return self._general.start(models)

    def select(self, state: GeneralState, keep: Sequence[int]) -> GeneralState:
        """See `evoloss.engine.path.Path`."""
        return self._general.select(state, keep)

    def _lend_networks(self, batch: int) -> Callable[[], Network]:
        """Return what gives every thread a network of its own; they are kept, as new memory is slow."""
        kept = self._networks.setdefault(batch, [])
        free = list(kept)

        def lend() -> Network:
            if not free:
                kept.append(self._make_network(batch))
                free.append(kept[-1])
            return free.pop()

        return lend

    def _make_network(self, batch: int) -> Network:
        return Network(self.model, self.task.input_shape, batch, self.settings.dtype)

    def advance(
        self, state: GeneralState, loss: OutputLoss, x: Tensor, targets: Tensor, batches: Tensor
    ) -> None:
        """See `evoloss.engine.path.Path`."""
        size = batches.shape[1]
        alone = [loss.select([p]) for p in range(loss.size)]
        for chunk in torch.split(batches, CHUNK):
            entry = self._lend_networks(size)()
            steps = [(entry.enter(x[rows]), targets[rows]) for rows in chunk]

            def work(network: Network, p: int, steps: list[tuple[Tensor, Tensor]] = steps) -> None:
                self._advance_one(network, state, p, alone[p], steps)

            alive = [p for p in range(loss.size) if state.alive[p]]
            map_on_threads(self._lend_networks(size), work, alive)

    @torch.no_grad()
    def _advance_one(
        self,
        network: Network,
        state: GeneralState,
        p: int,
        loss: OutputLoss,
        steps: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        params = state.params[p]
        for entered, targets in steps:
            activations = network.forward(params, entered)
            outputs = activations[-1].t().contiguous().unsqueeze(0)
            upstream = loss.output_gradients(outputs, targets)[0]
            if not bool(torch.isfinite(upstream).all()):
                state.alive[p] = False
                return
            gradients = network.backward(params, activations, upstream.t().contiguous())
            update_parameters(self.settings, params, gradients, state.optimizers[p])

    @torch.no_grad()
    def outputs(self, state: GeneralState, x: Tensor) -> Tensor:
        """See `evoloss.engine.path.Path`."""
        size = min(EVALUATION_BATCH, len(x))
        groups = []
        for group in torch.split(x, size * CHUNK):
            entry = self._lend_networks(size)()
            parts = [(entry.enter(part), len(part)) for part in torch.split(group, size)]

            def work(network: Network, p: int, parts: list[tuple[Tensor, int]] = parts) -> Tensor:
                # cloned, as the next forward pass overwrites it
                outputs = [
                    network.forward(state.params[p], entered)[-1].t()[:rows].clone()
                    for entered, rows in parts
                ]
                out = torch.cat(outputs)
                return out if state.alive[p] else torch.full_like(out, torch.nan)

            everyone = range(len(state.params))
            groups.append(torch.stack(map_on_threads(self._lend_networks(size), work, everyone)))
        return torch.cat(groups, 1)

    @torch.no_grad()
    def prepare(self, model: nn.Module, inner: Batch, outer: Batch) -> ConvolutionalContext:
        """See `evoloss.engine.path.Path`."""
        params = [p.detach() for p in model.parameters()]
        # a network of its own, as the context keeps its buffers
        network = self._make_network(len(inner.x))
        activations = network.forward(params, network.enter(inner.x))
        entered = self._lend_networks(len(outer.x))().enter(outer.x)
        return ConvolutionalContext(params, activations, inner, outer, entered)

    @torch.no_grad()
    def meta_gradients(
        self, context: ConvolutionalContext, loss: PopulationLoss
    ) -> tuple[Tensor, NDArray[np.float64]]:
        """See `evoloss.engine.path.Path`."""
        c = context
        rate = self.settings.first_step_rate
        shrunk = torch._foreach_mul(c.params, 1.0 - rate * self.settings.weight_decay)
        shared = c.activations[-1].t().contiguous().unsqueeze(0)
        upstream = loss.output_gradients(shared, c.inner.targets)
        task_loss = TaskLoss(self.task)
        values = torch.empty(loss.size, dtype=shared.dtype)
        directions = torch.empty_like(upstream)
        sizes = (len(c.inner.x), len(c.outer.x))

        def work(networks: tuple[Network, Network], p: int) -> None:
            inner, outer = networks
            u = upstream[p].t().contiguous()
            gradients = inner.backward(c.params, c.activations, u)
            stepped = torch._foreach_add(shrunk, gradients, alpha=-rate)
            activations = outer.forward(stepped, c.outer_entered)
            outputs = activations[-1].t().contiguous()
            values[p] = self.task.compute_task_loss(outputs, c.outer.y)
            v = task_loss.output_gradients(outputs.unsqueeze(0), c.outer.targets)[0]
            gradients = outer.backward(stepped, activations, v.t().contiguous())
            directions[p] = inner.tangent(c.params, c.activations, gradients).t()

        lend = [self._lend_networks(size) for size in dict.fromkeys(sizes)]
        map_on_threads(lambda: _pair([make() for make in lend]), work, range(loss.size))
        return values, -rate * loss.weight_gradients(shared, c.inner.targets, directions)


def _pair(networks: Sequence[Network]) -> tuple[Network, Network]:
    """Return the first and the last: one network twice where inner and outer batches are of one size."""
    return networks[0], networks[-1]
