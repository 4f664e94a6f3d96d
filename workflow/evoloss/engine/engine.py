"""The engine: trains a population of base models at once, and differentiates through their training.

Every population-based method asks it for fitnesses or meta-gradients of P losses; it chooses the path (general or a
fast one) by the model, never the caller.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evoloss.engine.batched import BatchedPath
from evoloss.engine.check_model import check_model, check_second_derivative
from evoloss.engine.convolutional import ConvolutionalPath
from evoloss.engine.dense import DensePath
from evoloss.engine.general import GeneralPath
from evoloss.engine.linear import LinearPath
from evoloss.engine.linearised import LinearisablePath
from evoloss.engine.local_search import LocalSearchSettings, MetaSteps, run_local_search
from evoloss.engine.loss_params import LossParams
from evoloss.engine.memory import Chunk, Chunks
from evoloss.engine.path import Context, Path
from evoloss.engine.population_loss import OutputLoss, PopulationLoss
from evoloss.engine.precision import Bfloat16Layers, set_torch_kernels
from evoloss.engine.safe_point import SafePoint
from evoloss.engine.settings import TrainingSettings
from evoloss.engine.streams import Batch
from evoloss.engine.training_run import Evaluation, TrainingRun
from evoloss.engine.unrolled import UnrolledContext, unrolled_meta_gradients
from evoloss.errors import ConfigError
from evoloss.expressions import Program
from evoloss.seeding import derive_seed
from evoloss.tasks import Split, Task, build_model

logger = logging.getLogger(__name__)

FAST_PATHS: tuple[type[Path], ...] = (LinearPath, DensePath, ConvolutionalPath, BatchedPath)
"""In order of preference; the general path handles what none of them does."""

CURVE_ROWS = 500
"""Before the last step the training split is measured on at most so many rows of it (it is shuffled)."""


def choose_path(task: Task, model: nn.Module, settings: TrainingSettings) -> Path:
    """Return the first fast path that handles the model, else the general one with a log line that says why."""
    obstacles = []
    for kind in FAST_PATHS:
        obstacle = kind.find_obstacle(task, model, settings)
        if obstacle is None:
            return kind(task, model, settings)
        obstacles.append(f"{kind.name}: {obstacle}")
    logger.info("the general path trains this model (%s)", "; ".join(obstacles))
    return GeneralPath(task, model, settings)


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
    model_options
        See `evoloss.tasks.models.build_model`.
    """

    def __init__(
        self,
        task: Task,
        model_name: str,
        settings: TrainingSettings,
        device: torch.device,
        **model_options: Any,
    ) -> None:
        self.settings = settings
        self.device = device
        self.model_name = model_name
        self.model_options = model_options
        self.task = task.to(device, settings.dtype)
        model = self.build_model(0)
        with set_torch_kernels(settings.precision, device):
            check_model(model, model_name, self.task.train.x[:4], task.num_outputs)
            self.path = choose_path(self.task, model, settings)
        if settings.precision == "tf32" and device.type != "cuda":
            logger.info("training.precision: tf32 is a GPU's; on %s it is float32", device.type)
        self._meta_steps: MetaSteps | None = None
        what = f"model {model_name!r} of task {task.name!r}"
        self.training_chunks = Chunks(f"train {what}", settings.batch_size)
        self._meta_chunks = Chunks(
            f"differentiate through the training of {what}", settings.batch_size
        )
        self.encoded_targets = {
            name: self.task.encode_targets(split.y, settings.dtype)
            for name, split in self.splits.items()
        }

    @property
    def splits(self) -> dict[str, Split]:
        """The three splits by name."""
        return {name: getattr(self.task, name) for name in ("train", "validation", "test")}

    def build_model(self, *stream: int | str) -> nn.Module:
        """Return a freshly initialised base model; the same stream gives the same parameters."""
        seed = derive_seed(*stream, "initial parameters")
        model = build_model(self.model_name, self.task, seed, **self.model_options)
        model = model.to(self.device, self.settings.dtype)
        return Bfloat16Layers(model) if self.settings.precision == "bf16" else model

    def population_loss(self, programs: Sequence[Program]) -> PopulationLoss:
        """Return the losses of ``programs`` on this task."""
        return PopulationLoss(self.task, programs, self.settings.dtype)

    def batch(self, split: str, rows: Tensor) -> Batch:
        """Return the samples ``rows`` of a split."""
        data = self.splits[split]
        rows = rows.to(self.device)
        return Batch(data.x[rows], data.y[rows], self.encoded_targets[split][rows])

    def start_training(
        self, loss: OutputLoss, num_steps: int, *stream: int | str, num_networks: int = 1
    ) -> TrainingRun:
        """Return the training of networks under every loss, before its first step; see `TrainingRun`."""
        return TrainingRun(self, loss, num_steps, *stream, num_networks=num_networks)

    def train(
        self,
        loss: OutputLoss,
        num_steps: int,
        *stream: int | str,
        evaluate_at: Sequence[int] | None = None,
        splits: Sequence[str] = ("validation",),
        resume: Mapping[str, Any] | None = None,
        at_safe_point: SafePoint | None = None,
    ) -> Iterator[Evaluation]:
        """Train ``loss.size`` networks from the same parameters on the same batches; yield their evaluations.

        ``evaluate_at`` are step numbers (default: the last one only); step 0 is the untrained network. Before the
        last step the training split is measured on its first `CURVE_ROWS`; the test split at the last step alone.
        ``resume`` is the progress that ``at_safe_point`` was given in an earlier process: then only what had not been
        evaluated before is.
        """
        steps = sorted({num_steps} if evaluate_at is None else {*evaluate_at, num_steps})
        run = self.start_training(loss, num_steps, *stream)
        if resume is not None:
            run.restore(resume)
        for step in steps:
            if step < run.step:
                continue
            run.advance(step, at_safe_point and partial(at_safe_point, run.describe))
            for name in splits:
                if step == num_steps:
                    yield run.evaluate(name)
                elif name != "test":
                    yield run.evaluate(name, CURVE_ROWS if name == "train" else None)

    def compute_fitness(
        self,
        programs: Sequence[Program],
        num_steps: int,
        *stream: int | str,
        num_networks: int = 1,
    ) -> NDArray[np.float64]:
        """Return the validation metric (P,) after ``num_steps`` of training, the mean over ``num_networks`` networks.

        The networks of a loss differ in their initial parameters (see `TrainingRun`); NaN where one of them diverged.
        """
        if not programs:
            return np.empty(0)
        loss = self.population_loss(programs)
        run = self.start_training(loss, num_steps, *stream, num_networks=num_networks)
        run.advance(num_steps)
        return run.evaluate("validation").metric

    def prepare(
        self, model: nn.Module, inner: Sequence[Batch], outer: Batch, linearised: bool = False
    ) -> Context:
        """Return all of a meta-step from ``model`` over ``inner`` to ``outer`` that the losses do not change.

        ``linearised``: see `evoloss.engine.linearised`; there is one inner batch then.
        """
        prepare = self._find_linearisation() if linearised else self.path.prepare
        if len(inner) == 1:
            with set_torch_kernels(self.settings.precision, self.device):
                # there is nothing to halve: out of memory it only ends with a sentence
                ((_, context),) = self._meta_chunks.run(
                    [(0,)], lambda _: prepare(model, inner[0], outer)
                )
            return cast(Context, context)
        return UnrolledContext(model, tuple(inner), outer)

    def _find_linearisation(self) -> Callable[[nn.Module, Batch, Batch], Context]:
        if isinstance(self.path, LinearisablePath):
            return self.path.prepare_linearised
        able = [kind.name for kind in FAST_PATHS if issubclass(kind, LinearisablePath)]
        raise ConfigError(
            f"local_search.linearised: true is for models of the paths {' and '.join(able)}, but {self.model_name} is "
            f"trained by the path {self.path.name}; set it to false"
        )

    def meta_gradients(
        self, context: Context, loss: PopulationLoss
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return outer losses (P,) and their gradients by all instruction weights (instructions,)."""

        def work(chunk: Chunk) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            part = loss if len(chunk) == loss.size else loss.select(chunk)
            if isinstance(context, UnrolledContext):
                return unrolled_meta_gradients(self.task, self.settings, context, part)
            values, gradient = self.path.meta_gradients(context, part)
            return values.double().cpu().numpy(), gradient

        with set_torch_kernels(self.settings.precision, self.device):
            parts = self._meta_chunks.run(self._meta_chunks.split(range(loss.size)), work)
        if len(parts) == 1:
            return parts[0][1]
        values, gradients = zip(*(result for _, result in parts), strict=True)
        return np.concatenate(values), np.concatenate(gradients)

    def take_compiled_meta_steps(
        self, contexts: Sequence[Context], loss: PopulationLoss, params: LossParams
    ) -> None:
        """Take one meta-step after the other by the path's `compiled_meta_steps`, which it must have."""
        compiled = self.path.compiled_meta_steps
        assert compiled is not None
        # memory does not grow with the losses, so there is nothing to halve: without any it only ends with a sentence
        self._meta_chunks.run([(0,)], lambda _: compiled(contexts, loss, params))

    def local_search(
        self,
        programs: Sequence[Program],
        settings: LocalSearchSettings,
        *stream: int | str,
        on_step: Callable[[int, NDArray[np.float64], list[Program]], None] | None = None,
        resume: Mapping[str, Any] | None = None,
        at_safe_point: SafePoint | None = None,
    ) -> list[Program]:
        """Optimise the loss parameters of every program; see `evoloss.engine.local_search`.

        ``on_step`` is called after every meta-step with its number (from 1), the outer losses before it (P,), and the
        programs. ``resume`` is the progress that ``at_safe_point`` was given in an earlier process.

        Raises
        ------
        ConfigError
            If the base models are trained by Adam: the meta-gradients are those of SGD steps. If ``settings`` ask for
            the linearised form and there is none, for this path or for several inner steps.
        ModelError
            If the model has no second derivative, or memory does not hold a single loss.
        """
        if self.settings.optimizer != "sgd":
            raise ConfigError(
                f"training.optimizer: {self.settings.optimizer} has no local search (methods: evomal), "
                "which differentiates through SGD steps; choose sgd"
            )
        if settings.linearised and settings.inner_steps != 1:
            raise ConfigError(
                f"local_search.linearised: true needs local_search.inner_steps: 1, not {settings.inner_steps}"
            )
        if not programs or settings.meta_steps == 0:
            return list(programs)
        if self._meta_steps is None or not self._meta_steps.belong_to(settings, stream):
            with set_torch_kernels(self.settings.precision, self.device):
                check_second_derivative(self.build_model(0), self.model_name, self.task.train.x[:2])
            self._meta_steps = MetaSteps(self, settings, *stream)
        return run_local_search(
            self, programs, self._meta_steps, settings, on_step, resume, at_safe_point
        )
