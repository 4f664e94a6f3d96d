"""The evaluation of one generation: archive, local search, the filters in the paper's order, training."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from evoloss.engine import Engine
from evoloss.engine.filters import RejectionResult, has_zero_gradient, run_rejection_protocol
from evoloss.engine.racing import Contest, run_race
from evoloss.engine.safe_point import SafePoint
from evoloss.expressions import (
    Expression,
    Program,
    compile_expression,
    compile_weighted_tree,
    program_to_expression,
)
from evoloss.expressions.canonical import canonical_key
from evoloss.search.archive import WORST, Archive, Record
from evoloss.search.contests import LineUp, Pending, find_reopened, line_up
from evoloss.search.history import PHASES
from evoloss.search.individuals import Individual, to_expression
from evoloss.search.settings import SearchSettings
from evoloss.seeding import numpy_generator


class Evaluation:
    """Gives the individuals of a search their fitness, one generation after the other.

    Parameters
    ----------
    archive
        What the search remembers; every loss that is evaluated is added.
    at_safe_point
        Called within a generation wherever its progress can be saved, with a function that returns that progress;
        None if nothing is saved.

    Attributes
    ----------
    counts
        Of the last generation, by the names of `SEARCH_COUNTS`.
    seconds
        That the last generation took, by `PHASES`.
    """

    def __init__(
        self,
        engine: Engine,
        settings: SearchSettings,
        search_seed: int,
        archive: Archive,
        at_safe_point: SafePoint | None = None,
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.search_seed = search_seed
        self.archive = archive
        self.counts: Counter[str] = Counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._at_safe_point = at_safe_point
        self._generation = 0
        self._keys: list[str] = []
        self._contests: Sequence[Contest] = ()
        self._resume: Mapping[str, Any] = {}
        self._tuned: list[Program] = []
        self._programs: dict[str, Program] = {}
        self._verdicts = RejectionResult(np.zeros(0, dtype=bool), [])

    def evaluate(
        self,
        population: Sequence[Individual],
        generation: int,
        contests: Sequence[Contest],
        resume: Mapping[str, Any] | None = None,
    ) -> None:
        """Give every individual its fitness.

        ``contests`` are between individuals, by their numbers: what racing must not change. ``resume`` is the progress
        that ``at_safe_point`` was given for this population.
        """
        self.counts = Counter()
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._generation = generation
        self._resume = resume or {}
        self._contests = contests
        trees = [to_expression(individual) for individual in population]
        self._keys = [canonical_key(tree) for tree in trees]
        fresh: dict[str, Expression] = {}
        for key, tree in zip(self._keys, trees, strict=True):
            if key in self.archive.records or key in fresh:
                self.counts["archive_hits"] += 1
            else:
                fresh[key] = tree
        self._evaluate_fresh(fresh)
        for individual, key in zip(population, self._keys, strict=True):
            individual.fitness.values = (self.archive.records[key].fitness,)

    def _remember(
        self, key: str, tree: Expression, program: Program, status: str, fitness: float
    ) -> None:
        tuned = program_to_expression(program) if self.settings.local_search else tree
        self.counts[status] += 1
        self.archive.records[key] = Record(
            tree, tuned, tree.complexity, status, fitness, self._generation
        )

    def _initial_program(self, key: str, tree: Expression) -> Program:
        """Compile a tree; for the local search with weights drawn from N(1, deviation) by the tree's own stream."""
        program = compile_weighted_tree(tree)
        if self.settings.local_search is None:
            return program
        noise = numpy_generator(self.search_seed, "loss parameters", key).normal(
            0.0, self.settings.initial_deviation, int(program.trainable.sum())
        )
        return program.with_loss_params(program.loss_params * (1.0 + noise))

    def _evaluate_fresh(self, fresh: dict[str, Expression]) -> None:
        started: dict[str, Program] = {}
        for key, tree in fresh.items():
            program = self._initial_program(key, tree)
            if has_zero_gradient(tree):
                self._remember(key, tree, program, "zero_gradient", WORST)
            else:
                started[key] = program
        clock = time.perf_counter()
        programs = self._tuned = self._run_local_search(list(started.values()))
        self._programs = dict(zip(started, programs, strict=True))
        clock = self._lap("local_search", clock)
        result = self._verdicts = self._run_rejection(programs)
        clock = self._lap("rejection", clock)
        pending: list[Pending] = []
        owners = dict(self.archive.key_by_gradient)
        for key, program, rejected, gradient_key in zip(
            started, programs, result.rejected, result.gradient_keys, strict=True
        ):
            if rejected:
                self._remember(key, fresh[key], program, "rejected", WORST)
            elif gradient_key in owners:
                self._remember(key, fresh[key], program, "gradient_hits", WORST)
                self.archive.share_fitness(owners[gradient_key], [key])
            else:
                owners[gradient_key] = key
                pending.append(Pending(key, fresh[key], program, gradient_key))
        self._run_races(pending)
        self._lap("fitness", clock)

    def _run_local_search(self, programs: list[Program]) -> list[Program]:
        """Optimise the weights; a resumed generation takes them from the checkpoint as far as it has them."""
        s = self.settings
        if s.local_search is None:
            return programs
        if "fitness" in self._resume:
            done = self._resume["fitness"]["weights"]
            return [replace(p, weights=w.numpy()) for p, w in zip(programs, done, strict=True)]
        return self.engine.local_search(
            programs,
            s.local_search,
            self.search_seed,
            "local search",
            resume=self._resume.get("local_search"),
            at_safe_point=partial(self._reach_safe_point, "local_search")
            if self._at_safe_point
            else None,
        )

    def _run_rejection(self, programs: list[Program]) -> RejectionResult:
        """Return the verdicts; a resumed fitness run's are the checkpoint's, as another machine may round otherwise."""
        if "fitness" in self._resume:
            known = self._resume["fitness"]
            keys = [bytes.fromhex(key) for key in known["gradient_keys"]]
            return RejectionResult(np.array(known["rejected"], dtype=bool), keys)
        return run_rejection_protocol(
            self.engine, programs, self.settings.rejection, self.search_seed
        )

    def _reach_safe_point(self, name: str, get_progress: Callable[[], Any]) -> None:
        if self._at_safe_point is not None:
            self._at_safe_point(lambda: {name: get_progress()})

    def _reach_fitness_point(self, get_race: Callable[[], Any]) -> None:
        self._reach_safe_point(
            "fitness",
            lambda: {
                "weights": [torch.from_numpy(program.weights) for program in self._tuned],
                "rejected": self._verdicts.rejected.tolist(),
                "gradient_keys": [key.hex() for key in self._verdicts.gradient_keys],
                "race": get_race(),
            },
        )

    def _run_races(self, pending: Sequence[Pending]) -> None:
        """Train with the losses, and then with those that come to matter by how these have done.

        These were stopped, now or in an earlier generation, and by what is known then may win a contest of this one
        after all; or they take the place of a loss that diverged.
        """
        self._run_race(
            pending,
            self._resume.get("fitness"),
            self._reach_fitness_point if self._at_safe_point else None,
        )
        while reopened := self._find_reopened():
            self._run_race(reopened)

    def _find_reopened(self) -> list[Pending]:
        owners = [self.archive.find_owner(key) for key in self._keys]
        return [
            self._read_pending(key) for key in find_reopened(owners, self._contests, self.archive)
        ]

    def _read_pending(self, key: str) -> Pending:
        record = self.archive.records[key]
        program = self._programs.get(key)
        if program is None:  # of an earlier generation
            compiled = compile_expression if self.settings.local_search else compile_weighted_tree
            program = compiled(record.expression)
        return Pending(key, record.tree, program, self.archive.find_gradient_key(key))

    def _run_race(
        self,
        racing: Sequence[Pending],
        resume: dict[str, Any] | None = None,
        at_safe_point: SafePoint | None = None,
    ) -> None:
        """Train with the losses and remember how they did."""
        owners = [self.archive.find_owner(key) for key in self._keys]
        lined = LineUp([], [], [])
        if self.settings.racing.rungs:
            lined = line_up(racing, owners, self._contests, self.archive)
        race = run_race(
            self.engine,
            [loss.program for loss in racing],
            self.settings.fitness_steps,
            self.settings.racing,
            self.archive.finished,
            lined.contests,
            lined.rivals,
            self.search_seed,
            "fitness",
            num_networks=self.settings.num_networks,
            resume=resume and resume["race"],
            at_safe_point=at_safe_point,
        )
        self.counts["training_steps"] += int(race.steps.sum())
        twins = self.archive.list_twins()
        for loss, fitness, best_case, steps in zip(
            racing, race.fitness.tolist(), race.best_case.tolist(), race.steps.tolist(), strict=True
        ):
            self._settle(loss, fitness, best_case, steps, twins.get(loss.key, []))

    def _settle(
        self, loss: Pending, fitness: float, best_case: float, steps: int, twins: Sequence[str]
    ) -> None:
        """Remember how a training went, for the loss and its ``twins``."""
        num_steps = self.settings.fitness_steps
        diverged = not np.isfinite(fitness)
        status, spared = "evaluated", num_steps - steps
        if diverged:
            status, spared, fitness, best_case = "diverged", 0, WORST, WORST
        elif spared:
            status = "stopped"
        known = self.archive.records.get(loss.key)
        if known is None:
            self._remember(loss.key, loss.tree, loss.program, status, WORST)
        elif known.generation == self._generation:
            self.counts.subtract([known.status])
            self.counts[status] += 1
        self.archive.records[loss.key] = replace(
            self.archive.records[loss.key],
            status=status,
            fitness=fitness,
            spared=spared,
            best_case=best_case,
        )
        if diverged:
            self.archive.pass_on(loss.gradient_key, twins, num_steps)
        else:
            self.archive.key_by_gradient[loss.gradient_key] = loss.key
            self.archive.share_fitness(loss.key, twins)

    def _lap(self, phase: str, since: float) -> float:
        now = time.perf_counter()
        self.seconds[phase] += now - since
        return now
