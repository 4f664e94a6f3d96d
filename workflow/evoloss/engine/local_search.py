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
from torch import Tensor

from evoloss.engine.optimizer import OptimizerState, update_parameters
from evoloss.engine.path import Context
from evoloss.engine.safe_point import SafePoint
from evoloss.engine.settings import TrainingSettings
from evoloss.engine.streams import draw_batches
from evoloss.engine.threads import map_on_threads
from evoloss.expressions import Program

if TYPE_CHECKING:
    from evoloss.engine.engine import Engine

STRIDE = 25
"""Meta-steps that a thread takes on its own where candidates are shared out among threads."""

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
    """The local search of some of the candidates: their loss parameters, Adam's moments, and who is still moving."""

    def __init__(
        self, engine: Engine, programs: Sequence[Program], settings: LocalSearchSettings
    ) -> None:
        self._engine = engine
        self._programs = list(programs)
        self._loss = engine.population_loss(programs)
        self._trainable = np.concatenate([program.trainable for program in programs])
        self._owner = np.repeat(np.arange(len(programs)), np.diff(self._loss.offsets))
        # torch's rule without the bookkeeping of `torch.optim.Adam`, which costs as much as a small model's meta-step
        self._rule = TrainingSettings(1, settings.meta_learning_rate, optimizer="adam")
        self._weights = torch.from_numpy(np.concatenate([program.weights for program in programs]))
        self._moments = OptimizerState()
        self._alive = np.ones(len(programs), dtype=bool)
        self._moving = self._trainable.copy()

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of candidates and of their weights."""
        return len(self._alive), len(self._weights)

    def restore(self, alive: Sequence[bool], weights: Tensor, adam: Mapping[str, Tensor]) -> None:
        """Go on from what `describe` returned."""
        self._alive = np.array(alive)
        self._moving = self._trainable & self._alive[self._owner]
        self._weights.copy_(weights)
        self._moments = OptimizerState(
            [adam["exp_avg"].clone()], [adam["exp_avg_sq"].clone()], [adam["step"].clone()]
        )
        self._loss.set_weights(self._weights.numpy())

    def describe(self) -> tuple[list[bool], Tensor, dict[str, Tensor]]:
        """Return all that `restore` needs, after at least one step."""
        first = self._moments.first[0]
        assert first is not None
        adam = {
            "exp_avg": first,
            "exp_avg_sq": self._moments.second[0],
            "step": self._moments.steps[0],
        }
        return self._alive.tolist(), self._weights, adam

    def step(self, context: Context) -> NDArray[np.float64]:
        """Take one meta-step; return the outer losses before it."""
        values, gradient = self._engine.meta_gradients(context, self._loss)
        finite = np.isfinite(gradient)
        if not finite.all():
            finite |= ~self._trainable
            self._alive &= np.logical_and.reduceat(finite, self._loss.offsets[:-1])
            self._moving = self._trainable & self._alive[self._owner]
        moving = self._moving
        before = self._weights.numpy().copy()
        masked = torch.from_numpy(np.where(moving, gradient, 0.0))
        update_parameters(self._rule, [self._weights], [masked], self._moments)
        # a weight that has moved would go on with the moments that are left of its gradients
        np.copyto(self._weights.numpy(), before, where=~moving)
        self._loss.set_weights(self._weights.numpy())
        return values

    def programs(self) -> list[Program]:
        """Return the programs with their loss parameters as they are now."""
        weights, offsets = self._weights.numpy(), self._loss.offsets
        return [
            program.with_loss_params(
                weights[offsets[p] : offsets[p + 1]][program.trainable].astype(np.float64)
            )
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

    A gradient that is not finite ends that candidate's search where it stands. ``on_step``, ``resume`` and
    ``at_safe_point``: see `Engine.local_search`.
    """
    count = 1
    if on_step is None and engine.path.shares_meta_steps:
        count = max(1, min(torch.get_num_threads(), len(programs) // 2))
    edges = [len(programs) * i // count for i in range(count + 1)]
    shares = [_Share(engine, programs[a:b], settings) for a, b in itertools.pairwise(edges)]
    # threads that each take one share meet seldom
    stride = 1 if count == 1 else STRIDE
    first = 0
    if resume is not None:
        first = resume["step"]
        _restore(shares, resume)

    def describe_progress() -> dict[str, Any]:
        return {"step": last, **_describe(shares)}

    for start in range(first, len(steps), stride):
        last = min(start + stride, len(steps))
        contexts = [steps[step] for step in range(start, last)]

        def run(_: None, share: _Share, contexts: list[Context] = contexts) -> None:
            for context in contexts:
                share.step(context)

        if on_step is not None:
            on_step(last, shares[0].step(contexts[0]), shares[0].programs())
        else:
            map_on_threads(lambda: None, run, shares)
        if at_safe_point is not None and last < len(steps):
            at_safe_point(describe_progress)
    return [program for share in shares for program in share.programs()]


def _describe(shares: Sequence[_Share]) -> dict[str, Any]:
    alive, weights, adam = zip(*(share.describe() for share in shares), strict=True)
    moments = {name: torch.cat([own[name] for own in adam]) for name in ("exp_avg", "exp_avg_sq")}
    return {
        "alive": [one for own in alive for one in own],
        "weights": torch.cat(weights),
        "adam": {**moments, "step": adam[0]["step"]},
    }


def _restore(shares: Sequence[_Share], progress: Mapping[str, Any]) -> None:
    adam = progress["adam"]
    candidates = weights = 0
    for share in shares:
        i, j = candidates + share.sizes[0], weights + share.sizes[1]
        own = {name: adam[name][weights:j] for name in ("exp_avg", "exp_avg_sq")}
        share.restore(
            progress["alive"][candidates:i],
            progress["weights"][weights:j],
            {**own, "step": adam["step"]},
        )
        candidates, weights = i, j
