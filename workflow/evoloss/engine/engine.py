"""The engine: trains a population of base models at once, and differentiates through their training.

Every population-based method asks it for fitnesses or meta-gradients of P losses; it chooses the path (general or a
fast one) by the model, never the caller.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evoloss.engine.general import GeneralPath
from evoloss.engine.linear import LinearPath, find_linear_layer
from evoloss.engine.population_loss import OutputLoss, PopulationLoss
from evoloss.engine.settings import TrainingSettings
from evoloss.engine.streams import Batch, draw_batches
from evoloss.engine.unrolled import unrolled_meta_gradient
from evoloss.expressions import Program
from evoloss.seeding import derive_seed
from evoloss.tasks import Split, Task, build_model

logger = logging.getLogger(__name__)

CURVE_ROWS = 500
"""Before the last step the training split is measured on at most so many rows of it (it is shuffled)."""


@dataclass(frozen=True)
class LocalSearchSettings:
    """Unrolled differentiation: ``meta_steps`` Adam steps of ``meta_learning_rate`` on phi through ``inner_steps``."""

    meta_steps: int
    inner_steps: int
    meta_learning_rate: float


@dataclass(frozen=True)
class Evaluation:
    """Metrics of P networks on one split after ``step`` training steps; float64 arrays (P,), NaN where diverged."""

    step: int
    split: str
    metric: NDArray[np.float64]
    task_loss: NDArray[np.float64]


class Engine:
    """Trains base models of one architecture on one task.

    Parameters
    ----------
    task
        Data, task loss and metric.
    model_name
        Architecture, a key of `evoloss.tasks.models.MODELS`.
    settings
        Inner training.
    device
        Where everything runs.
    """

    def __init__(
        self, task: Task, model_name: str, settings: TrainingSettings, device: torch.device
    ) -> None:
        self.settings = settings
        self.device = device
        self.model_name = model_name
        self.task = task.to(device, settings.dtype)
        model = self.build_model(0)
        self.path: LinearPath | GeneralPath
        if find_linear_layer(model) is not None:
            self.path = LinearPath(self.task, model, settings)
        else:
            self.path = GeneralPath(self.task, model, settings)
        logger.debug("%s on %s: %s path on %s", model_name, task.name, self.path.name, device)
        self._targets = {
            name: self.task.encode_targets(split.y, settings.dtype)
            for name, split in self.splits.items()
        }

    @property
    def splits(self) -> dict[str, Split]:
        """The three splits by name."""
        return {name: getattr(self.task, name) for name in ("train", "validation", "test")}

    def build_model(self, *stream: int | str) -> nn.Module:
        """Return a freshly initialised base model; the same stream gives the same parameters."""
        model = build_model(self.model_name, self.task, derive_seed(*stream, "initial parameters"))
        return model.to(self.device, self.settings.dtype)

    def population_loss(self, programs: Sequence[Program]) -> PopulationLoss:
        """Return the losses of ``programs`` on this task."""
        return PopulationLoss(self.task, programs, self.settings.dtype)

    def batch(self, split: str, rows: Tensor) -> Batch:
        """Return the samples ``rows`` of a split."""
        data = self.splits[split]
        rows = rows.to(self.device)
        return Batch(data.x[rows], data.y[rows], self._targets[split][rows])

    @torch.no_grad()
    def _score(self, outputs: Tensor, y: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        metric = self.task.compute_metric(outputs, y).double().cpu().numpy()
        value = self.task.compute_task_loss(outputs, y).double().cpu().numpy()
        bad = ~torch.isfinite(outputs).flatten(1).all(1).cpu().numpy()
        return np.where(bad, np.nan, metric), np.where(bad, np.nan, value)

    def train(
        self,
        loss: OutputLoss,
        num_steps: int,
        *stream: int | str,
        evaluate_at: Sequence[int] | None = None,
        splits: Sequence[str] = ("validation",),
    ) -> Iterator[Evaluation]:
        """Train ``loss.size`` networks from the same parameters on the same batches; yield their evaluations.

        ``evaluate_at`` are step numbers (default: the last one only); step 0 is the untrained network. Before the
        last step the training split is measured on its first `CURVE_ROWS`; the test split at the last step alone.
        """
        steps = sorted({num_steps} if evaluate_at is None else {*evaluate_at, num_steps})
        batches = draw_batches(
            len(self.task.train.y), self.settings.batch_size, num_steps, *stream, "batches"
        ).to(self.device)
        state = self.path.start(self.build_model(*stream), loss.size)
        done = 0
        for step in steps:
            self.path.advance(
                state,  # type: ignore[arg-type]
                loss,
                self.task.train.x,
                self._targets["train"],
                batches[done:step],
            )
            done = step
            for name in splits:
                if name == "test" and step < num_steps:
                    continue
                data = self.splits[name]
                if name == "train" and step < num_steps:
                    data = Split(data.x[:CURVE_ROWS], data.y[:CURVE_ROWS])
                outputs = self.path.outputs(state, data.x)  # type: ignore[arg-type]
                yield Evaluation(step, name, *self._score(outputs, data.y))

    def compute_fitness(
        self, programs: Sequence[Program], num_steps: int, *stream: int | str
    ) -> NDArray[np.float64]:
        """Return the validation metric (P,) after ``num_steps`` of training; NaN where training diverged."""
        if not programs:
            return np.empty(0)
        (evaluation,) = self.train(self.population_loss(programs), num_steps, *stream)
        return evaluation.metric

    def meta_gradients(
        self,
        programs: Sequence[Program],
        loss: PopulationLoss,
        model: nn.Module,
        inner: Sequence[Batch],
        outer: Batch,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return outer losses (P,) and their gradients by all weights, after ``len(inner)`` steps from ``model``.

        ``programs`` are the compiled losses and ``loss`` the same ones as a population, with current weights.
        """
        if len(inner) == 1:
            values, gradient = self.path.meta_gradients(model, loss, inner[0], outer)
            return values.double().cpu().numpy(), gradient
        results = [
            unrolled_meta_gradient(self.task, model, program, self.settings, inner, outer)
            for program in programs
        ]
        return np.array([value for value, _ in results]), np.concatenate([g for _, g in results])

    def local_search(
        self,
        programs: Sequence[Program],
        settings: LocalSearchSettings,
        *stream: int | str,
        on_step: Callable[[int, NDArray[np.float64], list[Program]], None] | None = None,
    ) -> list[Program]:
        """Optimise the loss parameters of every program by unrolled differentiation with Adam.

        Meta-step s draws fresh initial parameters, ``inner_steps`` training batches and a validation batch, the same
        for every candidate. A gradient that is not finite ends that candidate's search where it stands. ``on_step`` is
        called after every meta-step with its number (from 1), the outer losses before it, and the programs.
        """
        if not programs or settings.meta_steps == 0:
            return list(programs)
        current = list(programs)
        loss = self.population_loss(current)
        trainable = np.concatenate([program.trainable for program in current])
        owner = np.repeat(np.arange(len(current)), np.diff(loss.offsets))
        weights = torch.from_numpy(np.concatenate([program.weights for program in current]))
        adam = torch.optim.Adam([weights], lr=settings.meta_learning_rate, foreach=False)
        alive = np.ones(len(current), dtype=bool)
        k, size = settings.inner_steps, self.settings.batch_size
        count = settings.meta_steps
        inner_rows = draw_batches(len(self.task.train.y), size, count * k, *stream, "inner batches")
        outer_rows = draw_batches(
            len(self.task.validation.y), size, count, *stream, "outer batches"
        )
        for step in range(count):
            model = self.build_model(*stream, step)
            inner = [self.batch("train", rows) for rows in inner_rows[step * k : (step + 1) * k]]
            outer = self.batch("validation", outer_rows[step])
            values, gradient = self.meta_gradients(current, loss, model, inner, outer)
            bad = np.zeros(len(current), dtype=bool)
            np.logical_or.at(bad, owner, ~np.isfinite(gradient) & trainable)
            alive &= ~bad
            before = weights.clone()
            weights.grad = torch.from_numpy(np.where(trainable & alive[owner], gradient, 0.0))
            adam.step()
            frozen = torch.from_numpy(~(trainable & alive[owner]))
            weights[frozen] = before[frozen]
            loss.set_weights(weights.numpy())
            if k > 1 or on_step is not None or step == count - 1:
                current = _with_weights(current, weights.numpy(), loss.offsets)
            if on_step is not None:
                on_step(step + 1, values, current)
        return current


def _with_weights(
    programs: Sequence[Program], weights: NDArray[np.float64], offsets: NDArray[np.int64]
) -> list[Program]:
    return [
        program.with_loss_params(
            weights[offsets[p] : offsets[p + 1]][program.trainable].astype(np.float64)
        )
        for p, program in enumerate(programs)
    ]
