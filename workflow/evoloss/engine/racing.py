"""Racing: candidates that are behind stop training early, so that the steps go to those that may win.

Successive halving (Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
AISTATS 2016) whose rungs remember: a candidate goes on if it is among the best 1/reduction of all that ever reached
the rung, in earlier generations too, as in ASHA (Li et al., "A System for Massively Parallel Hyperparameter Tuning",
MLSys 2020). Common random numbers make those scores comparable: same initial parameters, same batches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from evoloss.engine.safe_point import SafePoint
from evoloss.engine.training_run import TrainingRun
from evoloss.expressions import Program

if TYPE_CHECKING:
    from evoloss.engine.engine import Engine

FEWEST_SCORES = 3
"""A rung that knows fewer scores stops nobody."""

RungScores = dict[int, list[float]]
"""The scores of all candidates that ever reached a rung, by its step number."""


@dataclass(frozen=True)
class RacingSettings:
    """At each rung the best 1/``reduction`` go on (1: no racing). The first rung is at the share ``first_rung`` of the
    training, in (0, 1); each further one is ``reduction`` times as far.
    """

    reduction: int = 1
    first_rung: float = 0.25

    def list_rungs(self, num_steps: int) -> list[int]:
        """Return the step numbers at which candidates are scored; the last one is ``num_steps``."""
        rungs = {num_steps}
        step = self.first_rung * num_steps
        while self.reduction > 1 and round(step) < num_steps:
            rungs.add(max(1, round(step)))
            step *= self.reduction
        return sorted(rungs)


@dataclass(frozen=True)
class RaceResult:
    """Per candidate (P,): the validation metric after ``steps`` training steps, NaN where training diverged.

    A candidate with fewer steps than the full training was stopped, or found to have diverged, at that rung.
    """

    fitness: NDArray[np.float64]
    steps: NDArray[np.int64]


def run_race(
    engine: Engine,
    programs: Sequence[Program],
    num_steps: int,
    settings: RacingSettings,
    rung_scores: RungScores,
    *stream: int | str,
    num_networks: int = 1,
    resume: Mapping[str, Any] | None = None,
    at_safe_point: SafePoint | None = None,
) -> RaceResult:
    """Train with every loss and stop those that fall behind; the scores at the rungs are added to ``rung_scores``.

    Candidates with equal scores share their fate, so the result does not depend on their order. Diverged candidates
    leave at the next rung. ``stream`` and ``num_networks`` as in `TrainingRun`: they must be the same for all
    scores of ``rung_scores``.
    ``resume`` is the progress that ``at_safe_point`` was given in an earlier process.
    """
    size = len(programs)
    result = RaceResult(np.full(size, np.nan), np.zeros(size, dtype=np.int64))
    if size == 0:
        return result
    loss = engine.population_loss(programs)
    run = TrainingRun(engine, loss, num_steps, *stream, num_networks=num_networks)
    running = np.arange(size)
    if resume is not None:
        result = RaceResult(np.array(resume["fitness"]), np.array(resume["steps"]))
        running = np.array(resume["running"])
        run.keep(running.tolist())
        run.restore(resume["run"])

    def describe_progress() -> dict[str, Any]:
        return {
            "fitness": result.fitness.tolist(),
            "steps": result.steps.tolist(),
            "running": running.tolist(),
            "run": run.describe(),
        }

    for rung in settings.list_rungs(num_steps):
        if rung < run.step:
            continue
        run.advance(rung, at_safe_point and partial(at_safe_point, describe_progress))
        scores = run.evaluate("validation").metric
        result.fitness[running] = scores
        result.steps[running] = rung
        if rung == num_steps:
            break
        known = rung_scores.setdefault(rung, [])
        known.extend(scores[np.isfinite(scores)].tolist())
        going = np.flatnonzero(scores <= _find_threshold(known, settings.reduction))
        if len(going) == 0:
            break
        if len(going) < len(running):
            run.keep(going.tolist())
            running = running[going]
    return result


def _find_threshold(scores: Sequence[float], reduction: int) -> float:
    """Return the worst score that goes on; infinity, which NaN does not reach, if too few scores are known."""
    if len(scores) < FEWEST_SCORES:
        return math.inf
    return sorted(scores)[math.ceil(len(scores) / reduction) - 1]
