"""The fast path of convolutional networks on a CPU, LeNet-5 and its like: every layer and its derivatives by hand.

`evoloss.engine.row_products` says why it is fast. What a meta-step's candidates share are the activations at the
initial parameters: J^T u is a backward pass through them and J g a tangent pass, so that no graph is built and nothing
is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evoloss.engine.convolution_jacobian import Jacobian, find_body
from evoloss.engine.convolution_layers import Array, UnsupportedLayerError
from evoloss.engine.convolution_network import Network, list_modules
from evoloss.engine.functional import find_addition
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

    params: list[Array]
    activations: list[Array]
    inner: Batch
    outer: Batch
    outer_entered: Array

    @property
    def nbytes(self) -> int:
        """See `evoloss.engine.path.Context`."""
        arrays = [*self.params, *self.activations, self.outer_entered]
        arrays += [t.numpy() for t in (*self.inner, *self.outer)]
        return sum({a.ctypes.data: a.nbytes for a in arrays}.values())


def find_dtype(settings: TrainingSettings) -> np.dtype[Any]:
    """Return the numpy dtype that networks train in."""
    return torch.empty(0, dtype=settings.dtype).numpy().dtype


def _as_arrays(params: Sequence[Tensor]) -> list[Array]:
    return [p.numpy() for p in params]


def _as_outputs(activation: Array) -> Tensor:
    """Return the last activation (C, B) as the outputs (1, B, C) of one network; classes stay first in memory."""
    return torch.from_numpy(activation).unsqueeze(0).mT


class ConvolutionalPath:
    """Trains P convolutional networks in turn; results equal those of the general path up to rounding."""

    name = "convolutional"
    compiled_meta_steps = None

    def __init__(self, task: Task, model: nn.Module, settings: TrainingSettings) -> None:
        self.task = task
        self.model = model
        self.settings = settings
        self._general = GeneralPath(task, model, settings)
        self._networks: dict[int, list[Network]] = {}
        self._jacobians: dict[int, Jacobian] = {}

    @classmethod
    def find_obstacle(cls, task: Task, model: nn.Module, settings: TrainingSettings) -> str | None:
        """See `evoloss.engine.path.Path`."""
        if not any(isinstance(module, nn.Conv2d) for module in list_modules(model)):
            return "no convolution"
        if task.train.x.device.type != "cpu":
            return "not on a CPU"
        if addition := find_addition(model):
            return addition
        try:
            Network(model, task.input_shape, 1, find_dtype(settings))
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
        return Network(self.model, self.task.input_shape, batch, find_dtype(self.settings))

    def advance(
        self, state: GeneralState, loss: OutputLoss, x: Tensor, targets: Tensor, batches: Tensor
    ) -> None:
        """See `evoloss.engine.path.Path`."""
        size = batches.shape[1]
        alone = [loss.select([p]) for p in range(loss.size)]
        for chunk in torch.split(batches, CHUNK):
            entry = self._lend_networks(size)()
            steps = [(entry.enter(x[rows]), targets[rows]) for rows in chunk]

            def work(network: Network, p: int, steps: list[tuple[Array, Tensor]] = steps) -> None:
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
        steps: Sequence[tuple[Array, Tensor]],
    ) -> None:
        params = state.params[p]
        arrays = _as_arrays(params)
        for entered, targets in steps:
            activations = network.forward(arrays, entered)
            upstream = loss.output_gradients(_as_outputs(activations[-1]), targets)
            if not bool(torch.isfinite(upstream).all()):
                state.alive[p] = False
                return
            gradients = network.backward(arrays, activations, upstream[0].t().numpy())
            tensors = [torch.from_numpy(gradient) for gradient in gradients]
            update_parameters(self.settings, params, tensors, state.optimizers[p])

    @torch.no_grad()
    def outputs(self, state: GeneralState, x: Tensor) -> Tensor:
        """See `evoloss.engine.path.Path`."""
        size = min(EVALUATION_BATCH, len(x))
        groups = []
        for group in torch.split(x, size * CHUNK):
            entry = self._lend_networks(size)()
            parts = [(entry.enter(part), len(part)) for part in torch.split(group, size)]

            def work(network: Network, p: int, parts: list[tuple[Array, int]] = parts) -> Tensor:
                arrays = _as_arrays(state.params[p])
                # copied, as the next forward pass overwrites it
                outputs = [
                    network.forward(arrays, entered)[-1].T[:rows].copy() for entered, rows in parts
                ]
                out = torch.from_numpy(np.concatenate(outputs))
                return out if state.alive[p] else torch.full_like(out, torch.nan)

            everyone = range(len(state.params))
            groups.append(torch.stack(map_on_threads(self._lend_networks(size), work, everyone)))
        return torch.cat(groups, 1)

    @torch.no_grad()
    def prepare(self, model: nn.Module, inner: Batch, outer: Batch) -> ConvolutionalContext:
        """See `evoloss.engine.path.Path`."""
        params = _as_arrays([p.detach() for p in model.parameters()])
        # a network of its own, as the context keeps its buffers
        network = self._make_network(len(inner.x))
        activations = network.forward(params, network.enter(inner.x))
        entered = self._lend_networks(len(outer.x))().enter(outer.x)
        inner, outer = (
            Batch(batch.x, batch.y, batch.targets.t().contiguous().t()) for batch in (inner, outer)
        )
        return ConvolutionalContext(params, activations, inner, outer, entered)

    @torch.no_grad()
    def meta_gradients(
        self, context: ConvolutionalContext, loss: PopulationLoss
    ) -> tuple[Tensor, NDArray[np.float64]]:
        """See `evoloss.engine.path.Path`."""
        c = context
        rate = self.settings.first_step_rate
        shrink = 1.0 - rate * self.settings.weight_decay
        shared = _as_outputs(c.activations[-1])
        upstream = loss.output_gradients(shared, c.inner.targets).mT.numpy()
        task_loss = TaskLoss(self.task)
        values = torch.empty(loss.size, dtype=shared.dtype)
        directions = np.empty_like(upstream)
        sizes = (len(c.inner.x), len(c.outer.x))
        jacobian = self._share_jacobian(c, loss.size)
        first = jacobian.num_arrays
        steps = jacobian.pull_back(torch.from_numpy(upstream)).numpy()
        moves = np.empty_like(steps)

        def work(networks: tuple[Network, Network], p: int) -> None:
            inner, outer = networks
            stepped = jacobian.split(steps[p], c.params)
            stepped += inner.backward(c.params, c.activations, upstream[p].copy(), first)
            for gradient, param in zip(stepped, c.params, strict=True):
                gradient *= -rate
                gradient += shrink * param
            activations = outer.forward(stepped, c.outer_entered)
            values[p : p + 1], v = task_loss.values_and_gradients(
                _as_outputs(activations[-1]), c.outer.targets, c.outer.y
            )
            gradients = outer.backward(stepped, activations, v[0].t().numpy())
            moves[p] = jacobian.join(gradients)
            directions[p] = inner.tangent(c.params, c.activations, gradients[first:], first)

        lend = [self._lend_networks(size) for size in dict.fromkeys(sizes)]
        map_on_threads(lambda: _pair([make() for make in lend]), work, range(loss.size))
        directions += jacobian.push_forward(torch.from_numpy(moves)).numpy()
        along = torch.from_numpy(directions).mT
        return values, -rate * loss.weight_gradients(shared, c.inner.targets, along)

    def _share_jacobian(self, c: ConvolutionalContext, size: int) -> Jacobian:
        """Return that by which ``size`` candidates pass through the convolutions; by no layer if it costs more."""
        batch, outputs = len(c.inner.x), c.activations[-1]
        network = self._lend_networks(batch)()
        body = find_body(network, outputs, size)
        if not body:
            return Jacobian([], outputs)
        if batch not in self._jacobians:
            self._jacobians[batch] = Jacobian(body, outputs)
        jacobian = self._jacobians[batch]
        jacobian.update(network, self._lend_networks(batch), c.params, c.activations)
        return jacobian


def _pair(networks: Sequence[Network]) -> tuple[Network, Network]:
    """Return the first and the last: one network twice where inner and outer batches are of one size."""
    return networks[0], networks[-1]
