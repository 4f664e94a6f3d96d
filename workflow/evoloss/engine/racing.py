"""Racing: candidates that are behind stop training early, so that the steps go to those that may win.

Successive halving (Jamieson and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization",
AISTATS 2016) whose rungs remember: a candidate goes on if it is among the best 1/reduction of all that ever reached
the rung, in earlier generations too, as in ASHA (Li et al., "A System for Massively Parallel Hyperparameter Tuning",
MLSys 2020). Common random numbers make those scores comparable: same initial parameters, same batches.

Ours: a candidate also goes on if it is no worse at the rung than some of the best `PROTECTED` of those trained to the
end were there: where good losses start slowly, as on a plateau, early scores tell little and should stop few. The first
race of a search, which knows no ends yet, stops nobody. And a stopped candidate gets the fitness that its score lets
expect, from how those with scores like it, trained to the end, went on from there: selection then works as it does
without racing, while the raw score, or a place behind all others, changes which losses have offspring, and the search
finds worse ones (benchmarks/README.md).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
"""A rung that knows fewer scores, or fewer ends, stops nobody."""

PROTECTED = 0.25
"""Share of the candidates trained to the end whose like is not stopped."""

NEIGHBOURS = 9
"""Candidates trained to the end that a stopped one's fitness is predicted from (benchmarks/README.md)."""


@dataclass
class RungScores:
    """What the races of one search have seen, by the rungs' step numbers.

    ``reached`` has the scores of all candidates that ever reached a rung; ``finished`` those of the candidates trained
    to the end, in one order for all rungs and the end itself.
    """

    reached: dict[int, list[float]] = field(default_factory=dict)
    finished: dict[int, list[float]] = field(default_factory=dict)

    def find_threshold(self, rung: int, num_steps: int, reduction: int) -> float:
        """Return the worst score that goes on; infinity, which NaN does not reach, if too little is known."""
        scores, ends = self.reached.get(rung, []), self.finished.get(num_steps, [])
        if min(len(scores), len(ends)) < FEWEST_SCORES:
            return math.inf
        best = sorted(ends)[math.ceil(PROTECTED * len(ends)) - 1]
        slowest = max(at for at, end in zip(self.finished[rung], ends, strict=True) if end <= best)
        return max(slowest, sorted(scores)[math.ceil(len(scores) / reduction) - 1])

    def predict_end(self, rung: int, num_steps: int, score: float) -> float:
        """Return what a score at a rung lets expect at the end: as the `NEIGHBOURS` next to it changed (median ratio).

        Far away others change otherwise: what has learned nothing yet seldom starts to, while what does well becomes
        better. It is worse than the best of all ends, so that no search keeps a stopped candidate in that one's place.
        """
        ends = self.finished[num_steps]
        known = [(at, end) for at, end in zip(self.finished[rung], ends, strict=True) if at > 0]
        expected = score
        if known:
            # whoever is as near as the last of them counts too, so the order does not
            reach = sorted(abs(at - score) for at, _ in known)[:NEIGHBOURS][-1]
            near = [end / at for at, end in known if abs(at - score) <= reach]
            expected *= statistics.median(near)
        return max(math.nextafter(min(ends), math.inf), expected)


@dataclass(frozen=True)
class RacingSettings:
    """At each rung the best 1/``reduction`` go on (1: no racing). The first rung is at the share ``first_rung`` of the
    training, in (0, 1); each further one is ``reduction`` times as far.
    """

    reduction: int = 1
    first_rung: float = 0.5

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
    """Per candidate (P,): the validation metric after the full training, NaN where training diverged.

    A candidate with fewer ``steps`` than the full training was stopped at that rung, and its metric is predicted
    (`RungScores.predict_end`), or it was found to have diverged there.
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
    curves: dict[int, NDArray[np.float64]] = {}
    if resume is not None:
        result = RaceResult(np.array(resume["fitness"]), np.array(resume["steps"]))
        running = np.array(resume["running"])
        curves = {rung: np.array(scores) for rung, scores in resume["curves"]}
        run.keep(running.tolist())
        run.restore(resume["run"])

    def describe_progress() -> dict[str, Any]:
        return {
            "fitness": result.fitness.tolist(),
            "steps": result.steps.tolist(),
            "running": running.tolist(),
            "curves": [[rung, scores.tolist()] for rung, scores in curves.items()],
            "run": run.describe(),
        }

    for rung in settings.list_rungs(num_steps):
        if rung < run.step:
            continue
        run.advance(rung, at_safe_point and partial(at_safe_point, describe_progress))
        scores = run.evaluate("validation").metric
        result.fitness[running] = scores
        result.steps[running] = rung
        curves[rung] = result.fitness.copy()
        if rung == num_steps:
            break
        known = rung_scores.reached.setdefault(rung, [])
        known.extend(scores[np.isfinite(scores)].tolist())
        threshold = rung_scores.find_threshold(rung, num_steps, settings.reduction)
        going = np.flatnonzero(scores <= threshold)
        if len(going) == 0:
            break
        if len(going) < len(running):
            run.keep(going.tolist())
            running = running[going]
    finished = np.isfinite(result.fitness) & (result.steps == num_steps)
    if settings.reduction > 1 and finished.any():
        for rung, scores in curves.items():
            rung_scores.finished.setdefault(rung, []).extend(scores[finished].tolist())
    for p in np.flatnonzero(np.isfinite(result.fitness) & (result.steps < num_steps)):
        result.fitness[p] = rung_scores.predict_end(
            int(result.steps[p]), num_steps, float(result.fitness[p])
        )
    return result
