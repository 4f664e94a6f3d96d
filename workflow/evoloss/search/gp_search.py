"""Stage 1, the outer loop: genetic programming over losses, with or without local search (evomal, gp_lfl).

Raymond, Chen, Xue, Zhang, "Learning Symbolic Model-Agnostic Loss Functions via Meta-Learning", TPAMI 2023,
arXiv 2209.08907.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evoloss.engine import Engine, LocalSearchSettings
from evoloss.engine.filters import (
    RejectionSettings,
    has_zero_gradient,
    run_rejection_protocol,
)
from evoloss.engine.racing import RacingSettings, run_race
from evoloss.expressions import (
    Expression,
    Program,
    compile_weighted_tree,
    program_to_expression,
)
from evoloss.expressions.canonical import canonical_key
from evoloss.search.archive import WORST, Archive, Record
from evoloss.search.individuals import Individual, Variation, VariationSettings, to_expression
from evoloss.seeding import derive_seed, global_random, numpy_generator

PHASES = ("local_search", "rejection", "fitness")
COUNTS = (
    "archive_hits",
    "zero_gradient",
    "rejected",
    "gradient_hits",
    "stopped",
    "diverged",
    "evaluated",
    "training_steps",
)
"""What a history row counts: fates of candidates, and the steps of the training runs (summed over candidates)."""


@dataclass(frozen=True)
class SearchSettings:
    """Settings of one search; ``local_search`` is None for gp_lfl. See method.md's table for the paper's values."""

    population_size: int
    num_generations: int
    fitness_steps: int
    variation: VariationSettings
    rejection: RejectionSettings
    local_search: LocalSearchSettings | None
    initial_deviation: float
    num_networks: int = 1
    racing: RacingSettings = field(default_factory=RacingSettings)


@dataclass(frozen=True)
class SearchResult:
    """The Pareto front (empty if every candidate was rejected) and one history row per generation."""

    front: list[Record]
    history: list[dict[str, Any]]


class GPSearch:
    """One search with one seed. ``on_generation`` is called with each finished history row."""

    def __init__(self, engine: Engine, settings: SearchSettings, search_seed: int) -> None:
        self.engine = engine
        self.settings = settings
        self.search_seed = search_seed
        self.archive = Archive()
        self.variation = Variation(settings.variation)
        self._random = random.Random(derive_seed(search_seed, "genetic programming"))
        self._generation = 0
        self._counts: Counter[str] = Counter()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def run(self, on_generation: Callable[[dict[str, Any]], None] | None = None) -> SearchResult:
        """Run all generations (the initial population is generation 0)."""
        population: list[Individual] = []
        history = []
        for generation in range(self.settings.num_generations + 1):
            started = time.perf_counter()
            self._generation = generation
            with global_random(self._random):
                population = (
                    self.variation.next_generation(population)
                    if population
                    else self.variation.initial_population(self.settings.population_size)
                )
            self._evaluate(population)
            row = self._describe(population, time.perf_counter() - started)
            history.append(row)
            if on_generation is not None:
                on_generation(row)
        return SearchResult(self.archive.pareto_front(), history)

    def _evaluate(self, population: list[Individual]) -> None:
        """Give every individual its fitness; filters in the paper's order."""
        self._counts = Counter()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        trees = [to_expression(individual) for individual in population]
        keys = [canonical_key(tree) for tree in trees]
        fresh: dict[str, Expression] = {}
        for key, tree in zip(keys, trees, strict=True):
            if key in self.archive.records or key in fresh:
                self._counts["archive_hits"] += 1
            else:
                fresh[key] = tree
        self._evaluate_fresh(fresh)
        for individual, key in zip(population, keys, strict=True):
            individual.fitness.values = self.archive.records[key].rank

    def _remember(
        self,
        key: str,
        tree: Expression,
        program: Program,
        status: str,
        fitness: float,
        spared: int = 0,
    ) -> None:
        self._counts[status] += 1
        tuned = program_to_expression(program) if self.settings.local_search else tree
        self.archive.records[key] = Record(
            tree, tuned, tree.complexity, status, fitness, self._generation, spared
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
        s = self.settings
        started: dict[str, Program] = {}
        for key, tree in fresh.items():
            program = self._initial_program(key, tree)
            if has_zero_gradient(tree):
                self._remember(key, tree, program, "zero_gradient", WORST)
            else:
                started[key] = program
        clock = time.perf_counter()
        programs = list(started.values())
        if s.local_search is not None:
            programs = self.engine.local_search(
                programs, s.local_search, self.search_seed, "local search"
            )
        clock = self._lap("local_search", clock)
        result = run_rejection_protocol(self.engine, programs, s.rejection, self.search_seed)
        clock = self._lap("rejection", clock)
        pending: list[tuple[str, Program, bytes]] = []
        twins: list[tuple[str, Program, bytes]] = []
        first: set[bytes] = set()
        for key, program, rejected, gradient_key in zip(
            started, programs, result.rejected, result.gradient_keys, strict=True
        ):
            if rejected:
                self._remember(key, fresh[key], program, "rejected", WORST)
            elif gradient_key in self.archive.key_by_gradient or gradient_key in first:
                twins.append((key, program, gradient_key))
            else:
                first.add(gradient_key)
                pending.append((key, program, gradient_key))
        self._run_fitness(pending, fresh)
        orphans = []
        for key, program, gradient_key in twins:
            twin = self.archive.key_by_gradient.get(gradient_key)
            if twin is None:  # its first twin diverged, which says nothing about this one
                orphans.append((key, program, gradient_key))
            else:
                known = self.archive.records[twin]
                self._remember(
                    key, fresh[key], program, "gradient_hits", known.fitness, known.spared
                )
        self._run_fitness(orphans, fresh)
        self._lap("fitness", clock)

    def _run_fitness(
        self, pending: list[tuple[str, Program, bytes]], fresh: dict[str, Expression]
    ) -> None:
        """Train with the losses (key, program, gradient fingerprint) and remember how they did."""
        race = run_race(
            self.engine,
            [program for _, program, _ in pending],
            self.settings.fitness_steps,
            self.settings.racing,
            self.archive.rung_scores,
            self.search_seed,
            "fitness",
            num_networks=self.settings.num_networks,
        )
        self._counts["training_steps"] += int(race.steps.sum())
        for (key, program, gradient_key), fitness, steps in zip(
            pending, race.fitness.tolist(), race.steps.tolist(), strict=True
        ):
            if not np.isfinite(fitness):
                self._remember(key, fresh[key], program, "diverged", WORST)
                continue
            spared = self.settings.fitness_steps - steps
            status = "stopped" if spared else "evaluated"
            self._remember(key, fresh[key], program, status, fitness, spared)
            self.archive.key_by_gradient[gradient_key] = key

    def _lap(self, phase: str, since: float) -> float:
        now = time.perf_counter()
        self._seconds[phase] += now - since
        return now

    def _describe(self, population: list[Individual], seconds: float) -> dict[str, Any]:
        """Return this generation's history row. ``best_*`` is the best loss found so far, from the archive.

        ``median_fitness`` is that of the individuals whose fitness is from a whole training.
        """
        ranks = [individual.fitness.values for individual in population]
        finite = [fitness for spared, fitness in ranks if spared == 0]
        sizes = [len(individual) for individual in population]
        front = self.archive.pareto_front()
        best = front[0] if front else None
        return {
            "generation": self._generation,
            "best_fitness": best.fitness if best else float("nan"),
            "median_fitness": statistics.median(finite) if finite else float("nan"),
            "best_expression": str(best.expression) if best else "",
            "best_tree": str(best.tree) if best else "",
            "best_complexity": best.complexity if best else 0,
            "median_complexity": float(statistics.median(sizes)),
            "candidates": len(population),
            **{name: self._counts[name] for name in COUNTS},
            **{f"seconds_{phase}": self._seconds[phase] for phase in PHASES},
            "seconds_total": seconds,
        }
