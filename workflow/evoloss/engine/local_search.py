"""Local search: the loss parameters of a population by unrolled differentiation (stage 2 of the method).

Raymond et al. (TPAMI 2023), section 3.2. Common random numbers: meta-step s has the same initial parameters and
batches for every candidate of a search, so that what depends on them alone is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from evoloss.engine.optimizer import OptimizerState, update_parameters
from evoloss.engine.path import Context
from evoloss.engine.safe_point import SafePoint
from evoloss.engine.settings import TrainingSettings
from evoloss.engine.streams import draw_batches
from evoloss.expressions import Program

if TYPE_CHECKING:
    from evoloss.engine.engine import Engine

CACHE_BYTES = 2**28
"""Meta-steps' shared quantities are kept for the next generation up to this size."""


@dataclass(frozen=True)
class LocalSearchSettings:
    """Unrolled differentiation: ``meta_steps`` Adam steps of ``meta_learning_rate`` on phi through ``inner_steps``.

    ``linearised``: approximate, along the tangent of the inner step (`evoloss.engine.linearised`).
    """

    meta_steps: int
    inner_steps: int
    meta_learning_rate: float
    linearised: bool = False


class MetaSteps:
    """The contexts of all meta-steps of one random stream, made on demand and kept while they fit `CACHE_BYTES`."""

    def __init__(self, engine: Engine, settings: LocalSearchSettings, *stream: int | str) -> None:
        self._engine = engine
        self._settings = settings
        self._stream = stream
        k, size, count = settings.inner_steps, engine.settings.batch_size, settings.meta_steps
        train, validation = engine.task.train, engine.task.validation
        self._inner = draw_batches(len(train.y), size, count * k, *stream, "inner batches")
        self._outer = draw_batches(len(validation.y), size, count, *stream, "outer batches")
        self._kept: dict[int, Context] = {}
        self._free = CACHE_BYTES

    def belong_to(self, settings: LocalSearchSettings, stream: tuple[int | str, ...]) -> bool:
        """Tell whether these are the meta-steps of that stream."""
        return self._settings == settings and self._stream == stream

    def __len__(self) -> int:
        return self._settings.meta_steps

    def __getitem__(self, step: int) -> Context:
        if step in self._kept:
            return self._kept[step]
        engine, k = self._engine, self._settings.inner_steps
        context = engine.prepare(
            engine.build_model(*self._stream, step),
            [engine.batch("train", rows) for rows in self._inner[step * k : (step + 1) * k]],
            engine.batch("validation", self._outer[step]),
            linearised=self._settings.linearised,
        )
        if context.nbytes <= self._free:
            self._free -= context.nbytes
            self._kept[step] = context
        return context


def run_local_search(
    engine: Engine,
    programs: Sequence[Program],
    steps: MetaSteps,
    settings: LocalSearchSettings,
    on_step: Callable[[int, NDArray[np.float64], list[Program]], None] | None = None,
    resume: Mapping[str, Any] | None = None,
    at_safe_point: SafePoint | None = None,
) -> list[Program]:
    """Return the programs with optimised loss parameters.

    A gradient that is not finite ends that candidate's search where it stands. ``on_step``, ``resume`` and
    ``at_safe_point``: see `Engine.local_search`.
    """
    current = list(programs)
    loss = engine.population_loss(current)
    trainable = np.concatenate([program.trainable for program in current])
    owner = np.repeat(np.arange(len(current)), np.diff(loss.offsets))
    weights = torch.from_numpy(np.concatenate([program.weights for program in current]))
    # torch's rule without the bookkeeping of `torch.optim.Adam`, which costs as much as a meta-step of a small model
    rule = TrainingSettings(1, settings.meta_learning_rate, optimizer="adam")
    moments = OptimizerState()
    alive = np.ones(len(current), dtype=bool)
    first = 0
    if resume is not None:
        first, alive = resume["step"], np.array(resume["alive"])
        weights.copy_(resume["weights"])
        kept = resume["adam"]
        moments = OptimizerState([kept["exp_avg"]], [kept["exp_avg_sq"]], [kept["step"]])
        loss.set_weights(weights.numpy())

    def describe_progress() -> dict[str, Any]:
        names = ("exp_avg", "exp_avg_sq", "step")
        tensors = (moments.first[0], moments.second[0], moments.steps[0])
        kept = dict(zip(names, tensors, strict=True))
        return {"step": step + 1, "alive": alive.tolist(), "weights": weights, "adam": kept}

    for step in range(first, len(steps)):
        values, gradient = engine.meta_gradients(steps[step], loss)
        finite = np.isfinite(gradient) | ~trainable
        if not finite.all():
            alive &= np.logical_and.reduceat(finite, loss.offsets[:-1])
        moving = trainable & alive[owner]
        before = weights.clone()
        masked = torch.from_numpy(np.where(moving, gradient, 0.0))
        update_parameters(rule, [weights], [masked], moments)
        if not alive.all():
            # a weight that has moved would go on with the moments that are left of its gradients
            np.copyto(weights.numpy(), before.numpy(), where=~moving)
        loss.set_weights(weights.numpy())
        if on_step is not None or step == len(steps) - 1:
            current = _with_weights(current, weights.numpy(), loss.offsets)
        if on_step is not None:
            on_step(step + 1, values, current)
        if at_safe_point is not None and step < len(steps) - 1:
            at_safe_point(describe_progress)
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
