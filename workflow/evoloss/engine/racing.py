"""Racing: a candidate stops training as soon as it can no longer win what its fitness is asked for.

Races between intervals (Maron and Moore, "Hoeffding Races: Accelerating Model Selection Search for Classification and
Function Approximation", NIPS 1993): at a rung, a step within the training, every candidate has a best and a worst case
for its fitness, and stops if its best case is worse than the worst case of a rival. As in successive halving (Jamieson
and Talwalkar, AISTATS 2016) all candidates of a generation are compared at the same rungs, and common random numbers
make their scores comparable: same initial parameters, same batches.

Ours is with whom they compete: a search draws beforehand who meets whom in its tournaments, and a candidate stops only
if it can win none of them (`Contest`). So selection goes on as it does without racing, which it does not where a fixed
share of the candidates stops (benchmarks/README.md). And ours is where the bounds come from: how candidates with scores
like these, trained to the end earlier in the search, went on from there. The first race of a search, which knows no
ends yet, stops nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evoloss.engine.safe_point import SafePoint
from evoloss.expressions import Program

if TYPE_CHECKING:
    from evoloss.engine.engine import Engine

NEIGHBOURS = 30
"""Candidates trained to the end that a forecast comes from; a search that knows fewer stops nobody."""

MARGIN = 0.3
"""Share by which a candidate's best case is better than what any of these would have made of its score.

Fewer neighbours and smaller margins stop more candidates and change more tournaments (benchmarks/README.md).
"""


@dataclass(frozen=True)
class Contest:
    """Entrants, by their numbers, of which the best ``places`` count and the others do not."""

    entrants: frozenset[int]
    places: int = 1

    def renumber(self, numbers: Sequence[int]) -> Contest:
        """Return the contest in which entrant i has the number ``numbers[i]``; several may have the same."""
        return Contest(frozenset(numbers[i] for i in self.entrants), self.places)


def find_contenders(
    contests: Sequence[Contest], best_case: ArrayLike, worst_case: ArrayLike
) -> NDArray[np.bool_]:
    """Return who may be among the best of some contest, (N,).

    The cases (N,) are bounds of the entrants' fitness, lower is better; where it is known, both are that.
    """
    best, worst = np.asarray(best_case), np.asarray(worst_case)
    found = np.zeros(len(best), dtype=bool)
    for contest in contests:
        numbers = list(contest.entrants)
        bar = np.sort(worst[numbers])[: contest.places][-1]
        found[numbers] |= best[numbers] <= bar
    return found


class Forecast(NamedTuple):
    """The fitness that is expected of candidates, and its bounds, (P,)."""

    best_case: NDArray[np.float64]
    expected: NDArray[np.float64]
    worst_case: NDArray[np.float64]


@dataclass
class FinishedTrainings:
    """What the races of one search have seen of the candidates trained to the end.

    ``scores`` are theirs by step number: at the rungs and, last, at the end. All lists are in one order.
    """

    scores: dict[int, list[float]] = field(default_factory=dict)

    def forecast(self, rung: int, num_steps: int, scores: ArrayLike) -> Forecast:
        """Return what scores (P,) at a rung let expect at the end, from the `NEIGHBOURS` with the nearest ones there.

        Their ratios of end to score give the bounds (the least, less `MARGIN`, and the greatest) and the expectation
        (median). Others change otherwise: what has learned nothing yet seldom starts to, while what does well becomes
        better. The expectation is worse than the best of all ends, so no search keeps a stopped candidate in that
        one's place. That a training diverges after this rung is not foreseen.
        """
        scores = np.asarray(scores, np.float64)
        at_rung, ends = np.array(self.scores[rung]), np.array(self.scores[num_steps])
        least = np.nextafter(ends.min(), np.inf)
        forecast = Forecast(
            np.full(scores.shape, -np.inf), np.maximum(least, scores), np.full(scores.shape, np.inf)
        )
        usable = at_rung > 0
        at_rung, ratios = at_rung[usable], ends[usable] / at_rung[usable]
        if len(at_rung) == 0:
            return forecast
        last = min(NEIGHBOURS, len(at_rung)) - 1
        for p in np.flatnonzero(scores > 0):
            distances = np.abs(at_rung - scores[p])
            # whoever is as near as the last of them counts too, so the order does not
            near = ratios[distances <= np.partition(distances, last)[last]]
            forecast.best_case[p] = (1 - MARGIN) * scores[p] * near.min()
            forecast.expected[p] = max(least, scores[p] * np.median(near))
            forecast.worst_case[p] = scores[p] * near.max()
        return forecast


@dataclass(frozen=True)
class RacingSettings:
    """``rungs``: the shares of the training, in (0, 1), at which candidates may stop; none: no racing.

    Raises
    ------
    ValueError
        If one is no such share.
    """

    rungs: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not all(0 < share < 1 for share in self.rungs):
            raise ValueError(f"rungs are {self.rungs}; each must be above 0 and below 1")

    def list_rungs(self, num_steps: int) -> list[int]:
        """Return the step numbers at which candidates are scored; the last one is ``num_steps``."""
        return sorted({max(1, round(share * num_steps)) for share in self.rungs} | {num_steps})


@dataclass(frozen=True)
class RaceResult:
    """Per candidate (P,): the validation metric after the full training, NaN where training diverged.

    A candidate with fewer ``steps`` than the full training was stopped at that rung, and its metric is predicted
    (`FinishedTrainings.forecast`), or it was found to have diverged there. No fitness is below its ``best_case``.
    """

    fitness: NDArray[np.float64]
    best_case: NDArray[np.float64]
    steps: NDArray[np.int64]


def run_race(
    engine: Engine,
    programs: Sequence[Program],
    num_steps: int,
    settings: RacingSettings,
    finished: FinishedTrainings,
    contests: Sequence[Contest],
    rivals: Sequence[float],
    *stream: int | str,
    num_networks: int = 1,
    resume: Mapping[str, Any] | None = None,
    at_safe_point: SafePoint | None = None,
) -> RaceResult:
    """Train with every loss and stop those that can win nothing; the others' scores are added to ``finished``.

    The entrants of ``contests`` are the candidates, 0 to P - 1, and after them the ``rivals``, by their known fitness.
    The result does not depend on the order of the candidates. Diverged candidates leave at the next rung.
    ``stream`` and ``num_networks`` as in `TrainingRun`: they must be the same for all that ``finished`` knows.
    ``resume`` is the progress that ``at_safe_point`` was given in an earlier process.
    """
    size = len(programs)
    result = RaceResult(np.full(size, np.nan), np.full(size, np.nan), np.zeros(size, np.int64))
    if size == 0:
        return result
    loss = engine.population_loss(programs)
    run = engine.start_training(loss, num_steps, *stream, num_networks=num_networks)
    running = np.arange(size)
    curves: dict[int, NDArray[np.float64]] = {}
    if resume is not None:
        result = RaceResult(*(np.array(resume[name]) for name in ("fitness", "best_case", "steps")))
        running = np.array(resume["running"])
        curves = {rung: np.array(scores) for rung, scores in resume["curves"]}
        run.keep(running.tolist())
        run.restore(resume["run"])

    def describe_progress() -> dict[str, Any]:
        return {
            "fitness": result.fitness.tolist(),
            "best_case": result.best_case.tolist(),
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
        result.steps[running] = rung
        result.fitness[running] = result.best_case[running] = scores
        if rung == num_steps:
            break
        curves[rung] = np.full(size, np.nan)
        curves[rung][running] = scores
        going = _decide(result, running, rung, num_steps, finished, contests, rivals)
        if len(going) == 0:
            break
        if len(going) < len(running):
            run.keep(going.tolist())
            running = running[going]
    ended = np.isfinite(result.fitness) & (result.steps == num_steps)
    if curves and ended.any():
        for rung, at_rung in (curves | {num_steps: result.fitness}).items():
            finished.scores.setdefault(rung, []).extend(at_rung[ended].tolist())
    return result


def _decide(
    result: RaceResult,
    running: NDArray[np.int64],
    rung: int,
    num_steps: int,
    finished: FinishedTrainings,
    contests: Sequence[Contest],
    rivals: Sequence[float],
) -> NDArray[np.int64]:
    """Return which of ``running`` go on; the others get their expected fitness and their best case in ``result``."""
    scores = result.fitness[running]
    sound = np.isfinite(scores)
    if len(finished.scores.get(num_steps, [])) < NEIGHBOURS:
        return np.flatnonzero(sound)
    # who has left, stopped or diverged, is no rival, and who has diverged now wins nothing
    best_case = np.concatenate([np.full(len(result.fitness), np.inf), rivals])
    worst_case = best_case.copy()
    forecast = finished.forecast(rung, num_steps, scores)
    best_case[running] = np.where(sound, forecast.best_case, np.inf)
    worst_case[running] = np.where(sound, forecast.worst_case, np.inf)
    goes_on = find_contenders(contests, best_case, worst_case)[running] & sound
    stops = sound & ~goes_on
    result.fitness[running[stops]] = forecast.expected[stops]
    result.best_case[running[stops]] = forecast.best_case[stops]
    return np.flatnonzero(goes_on)
