"""Local search: the loss parameters of a population by unrolled differentiation (stage 2 of the method).

Raymond et al. (TPAMI 2023), section 3.2. Common random numbers: meta-step s has the same initial parameters and
batches for every candidate of a search, so that what depends on them alone is computed once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from evoloss.engine.loss_params import LossParams, join_progress
from evoloss.engine.path import Context
from evoloss.engine.safe_point import SafePoint
from evoloss.engine.streams import draw_batches
from evoloss.engine.threads import map_on_threads
from evoloss.expressions import Program

if TYPE_CHECKING:
    from evoloss.engine.engine import Engine

STRIDE = 25
"""Meta-steps that a thread takes on its own where they are compiled."""

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


class _Share:
    """The local search of some of the candidates."""

    def __init__(
        self, engine: Engine, programs: Sequence[Program], settings: LocalSearchSettings
    ) -> None:
        self._engine = engine
        self._programs = list(programs)
        self._loss = engine.population_loss(programs)
        self.params = LossParams(programs, settings.meta_learning_rate)

    def restore(self, progress: dict[str, Any], first_program: int, first_weight: int) -> None:
        """Go on from `LossParams.describe` of this and other shares."""
        self.params.restore(progress, first_program, first_weight)

    def step(self, context: Context) -> NDArray[np.float64]:
        """Take one meta-step; return the outer losses before it, NaN where a search has ended."""
        living = np.flatnonzero(self.params.alive)
        values, gradient = np.full(len(self._programs), np.nan), np.zeros_like(self.params.weights)
        if len(living) > 0:
            if len(living) < self._loss.size:
                self._loss = self._engine.population_loss([self._programs[p] for p in living])
            own = np.repeat(self.params.alive, np.diff(self.params.offsets))
            self._loss.set_weights(self.params.weights[own])
            values[living], gradient[own] = self._engine.meta_gradients(context, self._loss)
        self.params.update(gradient)
        return values

    def take_steps(self, contexts: Sequence[Context], compiled: bool) -> None:
        """Take one meta-step after the other."""
        if compiled:
            self._loss.set_weights(self.params.weights)
            self._engine.take_compiled_meta_steps(contexts, self._loss, self.params)
            return
        for context in contexts:
            self.step(context)

    def programs(self) -> list[Program]:
        """Return the programs with their loss parameters as they are now."""
        weights, offsets = self.params.weights, self.params.offsets
        return [
            program.with_loss_params(weights[offsets[p] : offsets[p + 1]][program.trainable])
            for p, program in enumerate(self._programs)
        ]


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

    A gradient that is not finite ends that candidate's search where it stands, and it is left out from then on, but
    where meta-steps are compiled. ``on_step``, ``resume`` and ``at_safe_point``: see `Engine.local_search`.
    """
    # compiled meta-steps leave other threads alone, so every thread takes some of the candidates; several inner steps
    # are autograd's, whose threads would wait for each other
    compiled = (
        engine.path.compiled_meta_steps is not None
        and on_step is None
        and settings.inner_steps == 1
    )
    count = max(1, min(torch.get_num_threads(), len(programs) // 2)) if compiled else 1
    edges = [len(programs) * i // count for i in range(count + 1)]
    shares = [_Share(engine, programs[a:b], settings) for a, b in itertools.pairwise(edges)]
    first = 0
    if resume is not None:
        first = resume["step"]
        first_weight = 0
        for share, first_program in zip(shares, edges, strict=False):
            share.restore(resume["loss_params"], first_program, first_weight)
            first_weight += len(share.params.weights)

    def describe_progress() -> dict[str, Any]:
        return {"step": last, "loss_params": join_progress([s.params.describe() for s in shares])}

    stride = STRIDE if compiled else 1
    for start in range(first, len(steps), stride):
        last = min(start + stride, len(steps))
        contexts = [steps[step] for step in range(start, last)]

        def run(_: None, share: _Share, contexts: list[Context] = contexts) -> None:
            share.take_steps(contexts, compiled)

        if on_step is not None:
            on_step(last, shares[0].step(contexts[0]), shares[0].programs())
        else:
            map_on_threads(lambda: None, run, shares)
        if at_safe_point is not None and last < len(steps):
            at_safe_point(describe_progress)
    return [program for share in shares for program in share.programs()]
